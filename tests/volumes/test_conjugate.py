"""The posterior of a voxel map: against a dense solve, and calibrated where the story is true."""

from collections.abc import Callable

import pyro
import pytest
import torch
from torch import Tensor

from pyro_cryo.analysis.fsc import fsc, shell_sum
from pyro_cryo.data.batch import Batch
from pyro_cryo.distributions import ShellNormal
from pyro_cryo.distributions.volume import filter_shells, shell_values
from pyro_cryo.physics.fourier import HalfPlane, half_radius, radius, shift_phase, soft_disc
from pyro_cryo.physics.rotations import exp, point_group, random_rotations
from pyro_cryo.physics.slices import (
    add_to_grid,
    convolve,
    fourier_grid,
    fourier_grid_adjoint,
    read_grid,
    slice_coordinates,
)
from pyro_cryo.volumes import conjugate
from pyro_cryo.volumes.conjugate import (
    NormalEquations,
    VoxelPosterior,
    coefficient_information,
    first_tau,
    mackay_tau,
    noise_sd,
    nonnegative,
    shell_mean,
    shell_power,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def observe(volume: Tensor, rotation: Tensor, sigma: Tensor, seed: int = 0) -> Batch:
    """Noisy images of a map: shifts, CTFs between -1 and 1, sigma (L,) by shell."""
    half, generator, count = HalfPlane.of(len(volume)), seeded(seed), len(rotation)
    translation = 2 * torch.randn(count, 2, generator=generator)
    defocus = 0.5 + torch.rand(count, 1, generator=generator)
    ctf = torch.sin(3 * defocus * (half.k.norm(dim=-1) / half.box * 4) ** 2 + 0.3)
    slices = read_grid(fourier_grid(volume), slice_coordinates(rotation, half.k))
    clean = torch.view_as_real(slices * shift_phase(half.k, translation, half.box) * ctf)
    noise = torch.randn(clean.shape, generator=generator) * sigma[half.shell, None]
    return Batch(
        half=half,
        index=torch.arange(count),
        image=clean + noise,
        ctf=ctf,
        noise_scale=None,
        rotation=rotation,
        translation=translation,
        noise_group=torch.zeros(count, dtype=torch.long),
        freq_scale=torch.ones(count),
        particle=torch.arange(count),
        shown=torch.arange(count),
        size=count,
    )


def equations(batch: Batch, sigma: Tensor, symmetry: str = "C1") -> NormalEquations:
    result = NormalEquations.empty(batch.half.box)
    result.add(batch, sigma[None], point_group(symmetry))
    return result


def support(box: int) -> Tensor:
    return soft_disc(box, 0.3 * box, 0.15 * box, dims=3)


def drawn_map(box: int, tau: Tensor, seed: int = 0) -> Tensor:
    pyro.set_rng_seed(seed)
    return support(box) * ShellNormal(tau).sample()


def decaying(box: int, top: float = 1.0) -> Tensor:
    """A prior sd by shell that falls by a factor of 10 to Nyquist."""
    return top * torch.logspace(0, -1, box // 2 + 1)


@pytest.fixture
def tiny() -> tuple[VoxelPosterior, Tensor]:
    """A posterior on few voxels, and its dense precision H (b^3, b^3) made of the same convolution."""
    box = 12
    tau, sigma = decaying(box), torch.full((box // 2 + 1,), 2.0)
    batch = observe(drawn_map(box, tau), random_rotations(40, seeded(1)), sigma)
    scale = soft_disc(box, 2, 1, dims=3)
    posterior = equations(batch, sigma).posterior(scale, tau)
    b = len(posterior.scale)
    basis = torch.eye(b**3).view(-1, b, b, b)
    seen = convolve(posterior.spectrum, posterior.scale * posterior.colour(basis))
    dense = (posterior.whiten(seen) + basis).flatten(1)
    return posterior, dense.double()


def test_the_cube_holds_all_voxels_of_the_support(tiny: tuple[VoxelPosterior, Tensor]) -> None:
    posterior, dense = tiny
    assert len(posterior.scale) < posterior.box
    e = torch.randn(posterior.scale.shape, generator=seeded())
    volume = posterior.to_map(e)
    assert volume.shape == (12, 12, 12)
    torch.testing.assert_close(volume.sum(), (posterior.scale * posterior.colour(e)).sum())
    torch.testing.assert_close(posterior.scale.sum(), soft_disc(12, 2, 1, dims=3).sum())
    torch.testing.assert_close(dense, dense.T, rtol=0, atol=1e-5 * float(dense.abs().max()))


def test_conjugate_gradients_give_the_mean_of_the_dense_solve(tiny: tuple[VoxelPosterior, Tensor]) -> None:
    posterior, dense = tiny
    rhs = posterior.whiten(posterior.rhs).flatten().double()
    expected = torch.linalg.solve(dense, rhs)
    found = posterior.mean(1e-6).flatten().double()
    assert (found - expected).norm() < 1e-4 * expected.norm()
    rough = posterior.mean(1e-2).flatten().double()
    assert (rough - expected).norm() < 0.03 * expected.norm()
    again = posterior.mean(1e-2, start=posterior.mean(1e-6)).flatten().double()
    assert (again - expected).norm() < 1e-3 * expected.norm()


def test_draws_have_the_covariance_of_the_dense_posterior(tiny: tuple[VoxelPosterior, Tensor]) -> None:
    posterior, dense = tiny
    precision, axes = torch.linalg.eigh(dense)
    draws = posterior.deviations(300, seeded(3), 1e-4).flatten(1).double() @ axes
    ratio = (draws.square() * precision).mean(0)  # variance over 1 / precision along each axis of H
    for band in ratio.chunk(6):  # from what the prior determines to what the images do
        assert float(band.mean()) == pytest.approx(1.0, abs=0.05)
    correlation = torch.corrcoef(draws.T) - torch.eye(len(precision))
    assert float(correlation.square().mean()) == pytest.approx(1 / 300, rel=0.1)  # as of independent numbers


def test_where_density_is_makes_a_solve_easy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a factor of each coefficient alone; with a narrow envelope, and a transfer that begins near 0."""
    box = 32
    shell = torch.arange(box // 2 + 1)
    radius = half_radius(2 * box, "cpu") / 2
    spectrum = 5000 * (0.02 + 1 - torch.cos(0.05 * radius**2)) / (1 + radius)
    scale = soft_disc(box, 1, 8, dims=3).square()
    everywhere, seen = (slice(0, box),) * 3, shell_mean(spectrum, len(shell), 0.5)
    prior = 100 / (1 + shell) ** 2
    posterior = VoxelPosterior(box, everywhere, 0 * scale, spectrum, seen, torch.ones_like(seen), scale, prior)

    def drawn(*tolerance: float) -> tuple[Tensor, int]:
        steps = []
        monkeypatch.setattr(conjugate, "convolve", lambda *given: steps.append(1) or convolve(*given))
        return posterior.to_map(posterior.deviations(1, seeded(), *tolerance)[0]), len(steps)

    def error(draw: Tensor) -> Tensor:
        return (shell_sum(torch.fft.rfftn(draw - right).abs().square()) / power)[1:].sqrt()

    right, _ = drawn(1e-5)
    power = shell_sum(torch.fft.rfftn(right).abs().square())
    found, steps = drawn()
    typical = scale.square().square().mean() / scale.square().mean()
    monkeypatch.setattr(conjugate, "preconditioner", lambda _, strength: lambda e: e / (1 + typical * strength))
    plain, more = drawn()
    print(f"{steps} steps, {more} without; largest error over sd {float(error(found).max()):.2f}, ", end="")
    print(f"{float(error(plain).max()):.2f} without")
    assert steps < 0.6 * more
    assert float(error(found).max()) < 0.25  # of the sd in any shell
    assert float(error(found).max()) < 2 * float(error(plain).max())


def test_nonnegative_spectra_keep_the_mean_of_every_shell() -> None:
    spectrum = torch.randn(16, 16, 9, generator=seeded()) + 0.5
    found = nonnegative(spectrum)
    assert float(found.min()) >= 0

    torch.testing.assert_close(shell_mean(found, 9)[2:], shell_mean(spectrum, 9)[2:])


def test_the_operator_is_right_in_every_shell() -> None:
    """Also where the CTF lets through a hundredth of what it does elsewhere: nothing may leak into those shells."""
    box = 24
    noise = torch.ones(box // 2 + 1)
    truth = drawn_map(box, decaying(box))
    batch = observe(truth, random_rotations(300, seeded(1)), noise)
    weak = 0.1 + 0.9 * (batch.half.shell > 3)
    batch = Batch(**{**vars(batch), "ctf": torch.ones(300, 1) * weak})
    points = slice_coordinates(batch.rotation, batch.half.k)
    gathered = torch.zeros(2 * box, 2 * box, box + 1, dtype=torch.complex64)
    add_to_grid(gathered, points, read_grid(fourier_grid(truth), points) * batch.ctf.square())
    exact = fourier_grid_adjoint(gathered, box)
    posterior = equations(batch, noise).posterior(torch.ones(box, box, box))
    inside = support(box) > 0.5
    error = shell_power(inside * (convolve(posterior.spectrum, truth) - exact), box // 2 + 1)
    relative = (error / shell_power(inside * exact, box // 2 + 1)).sqrt()
    print("relative error by shell:", *[f"{float(r):.3f}" for r in relative])
    assert float(relative[1:-1].max()) < 0.05


def test_normal_equations_add_up() -> None:
    sigma, batch = torch.ones(9), observe(drawn_map(16, torch.ones(9)), random_rotations(20, seeded(1)), torch.ones(9))
    whole = equations(batch, sigma)
    first = torch.arange(20) < 7
    parts = equations(batch[first], sigma) + equations(batch[~first], sigma)
    torch.testing.assert_close(parts.value, whole.value, rtol=0, atol=1e-4)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=0, atol=1e-4)


def test_an_image_of_weight_two_counts_as_two_images() -> None:
    box, sigma = 8, torch.ones(5)
    batch = observe(torch.randn(box, box, box, generator=seeded()), random_rotations(3, seeded()), sigma)
    weighted, repeated = NormalEquations.empty(box), NormalEquations.empty(box)
    weighted.add(batch, sigma[None], point_group("C2"), torch.tensor([2.0, 1.0, 0.0]))
    repeated.add(batch[torch.tensor([0, 0, 1])], sigma[None], point_group("C2"))
    torch.testing.assert_close(weighted.value, repeated.value)
    torch.testing.assert_close(weighted.weight, repeated.weight)


def test_noise_sd_is_by_group_and_shell_and_scaled_by_the_image() -> None:
    batch = observe(torch.zeros(8, 8, 8), random_rotations(2, seeded()), torch.ones(5))
    sigma = torch.arange(10.0).view(2, 5)
    groups = Batch(**{**vars(batch), "noise_group": torch.tensor([1, 0])})
    torch.testing.assert_close(noise_sd(groups, sigma), torch.stack([sigma[1], sigma[0]])[:, batch.half.shell])
    scaled = Batch(**{**vars(groups), "noise_scale": 0.5 * torch.ones(2, len(batch.half))})
    torch.testing.assert_close(noise_sd(scaled, sigma), 0.5 * noise_sd(groups, sigma))


@pytest.mark.parametrize("sigma", [1.0, 3.0])
@pytest.mark.parametrize("everywhere", [True, False])
def test_the_prior_variance_of_every_shell_is_recovered(sigma: float, everywhere: bool) -> None:
    """In a mask too, where most of what the prior expects is not seen."""
    box = 28
    planted = decaying(box, 3.0)
    noise = torch.full((box // 2 + 1,), sigma)
    scale = torch.ones(box, box, box) if everywhere else support(box)
    pyro.set_rng_seed(0)
    batch = observe(scale * ShellNormal(planted).sample(), random_rotations(400, seeded(1)), noise)
    posterior = equations(batch, noise).posterior(scale)
    torch.testing.assert_close(posterior.tau, first_tau(posterior))
    seen = posterior.information() * planted.square() > 1
    seen[:3] = seen[-1] = False  # too few coefficients to tell
    assert int(seen.sum()) >= 4
    rough = posterior.tau[seen] / planted[seen]
    for _ in range(4):
        posterior = posterior.with_tau(mackay_tau(posterior, posterior.mean(1e-3)))
    ratio = posterior.tau[seen] / planted[seen]
    print("tau over planted, moments:", *[f"{float(r):.2f}" for r in rough])
    print("tau over planted, MacKay: ", *[f"{float(r):.2f}" for r in ratio])
    assert float(rough.log().abs().max()) < 0.4
    assert float(ratio.log().abs().max()) < 0.35
    assert float(ratio.log().mean().abs()) < 0.08


def test_the_prior_variance_of_a_symmetric_map_is_recovered() -> None:
    """A quarter of a C4 map's coefficients are free: those of the map that is drawn and then symmetrised."""
    box = 28
    planted = decaying(box, 3.0)
    noise = torch.full((box // 2 + 1,), 2.0)
    found = []
    for seed in range(3):
        pyro.set_rng_seed(seed)
        truth = support(box) * turned(ShellNormal(planted).sample())
        batch = observe(truth, random_rotations(200, seeded(seed)), noise)
        posterior = equations(batch, noise, "C4").posterior(support(box), order=4)
        for _ in range(4):
            posterior = posterior.with_tau(mackay_tau(posterior, posterior.mean(1e-3)))
        found.append(posterior.tau.square())
    ratio = (torch.stack(found).mean(0).sqrt() / planted)[3:10]
    print("tau over planted:", *[f"{float(r):.2f}" for r in ratio])
    assert float(ratio.log().abs().max()) < 0.35
    assert float(ratio.log().mean().abs()) < 0.12


def test_what_images_say_of_a_coefficient_is_the_dense_diagonal(tiny: tuple[VoxelPosterior, Tensor]) -> None:
    """Of u, on the frequencies of the cube: every second point of the spectrum's."""
    posterior, _ = tiny
    b = len(posterior.scale)
    basis = torch.eye(b**3).view(-1, b, b, b)
    told = posterior.scale * convolve(posterior.spectrum, posterior.scale * basis)
    columns = torch.fft.fftn(told, dim=(1, 2, 3), norm="ortho").flatten(1).conj()
    transform = torch.fft.fftn(basis, dim=(1, 2, 3), norm="ortho").flatten(1)
    dense = (columns * transform).sum(0).real.view(b, b, b)[..., : b // 2 + 1]
    found = coefficient_information(posterior.spectrum, posterior.scale)[::2, ::2, ::2]
    torch.testing.assert_close(found, dense, rtol=1e-3, atol=1e-4 * float(dense.max()))


def test_the_share_that_the_images_determine_is_that_of_the_dense_posterior(
    tiny: tuple[VoxelPosterior, Tensor],
) -> None:
    """1 - var of e, whose prior is white, averaged over all coefficients: trace(1 - H^-1) / b^3."""
    posterior, dense = tiny
    count = len(dense)
    for factor in (1.0, 5.0, 25.0):  # of tau, so the data's part of H goes with its square
        strong = factor**2 * (dense - torch.eye(count)) + torch.eye(count)
        expected = 1 - float(torch.linalg.inv(strong).diagonal().mean())
        share = posterior.with_tau(factor * posterior.tau).determined()
        found = float(shell_values(share, len(posterior.scale)).mean())
        print(f"tau x {factor:g}: {found:.3f} determined, exactly {expected:.3f}")
        assert found == pytest.approx(expected, rel=0.2)


def test_a_shell_by_chance_without_signal_is_not_taken_for_one() -> None:
    """Its neighbours count, by half; alone it would have the least variance there is, and its maps an sd of none."""
    box = 28
    noise = torch.full((box // 2 + 1,), 3.0)
    batch = observe(drawn_map(box, decaying(box, 3.0)), random_rotations(200, seeded(1)), noise)
    posterior = equations(batch, noise).posterior(support(box)).with_tau(decaying(box, 3.0))
    mean, chance = posterior.mean(1e-3), torch.ones(box // 2 + 1)
    before = mackay_tau(posterior, mean)
    chance[9] = 0
    square = (mackay_tau(posterior, filter_shells(mean, chance)) / before).square()
    torch.testing.assert_close(square[9], torch.tensor(0.5), rtol=0, atol=0.2)
    torch.testing.assert_close(square[[8, 10]], torch.tensor([0.75, 0.75]), rtol=0, atol=0.2)
    torch.testing.assert_close(square[:7], torch.ones(7), rtol=0, atol=1e-3)


def test_without_signal_the_prior_says_so() -> None:
    box, noise = 16, torch.full((9,), 5.0)
    batch = observe(torch.zeros(box, box, box), random_rotations(300, seeded(1)), noise)
    posterior = equations(batch, noise).posterior(support(box))
    for _ in range(3):
        posterior = posterior.with_tau(mackay_tau(posterior, posterior.mean()))
    assert float((posterior.information() * posterior.tau.square())[2:].max()) < 0.3


@pytest.mark.parametrize("sigma", [2.0, 8.0])
def test_the_posterior_is_calibrated(sigma: float) -> None:
    """Maps drawn from the prior lie from the posterior mean as far as the posterior says."""
    box = 20
    tau, noise = decaying(box, 3.0), torch.full((box // 2 + 1,), sigma)
    inside = support(box) > 0.5
    square = []
    for seed in range(4):
        truth = drawn_map(box, tau, seed)
        batch = observe(truth, random_rotations(150, seeded(10 + seed)), noise, seed)
        posterior = equations(batch, noise).posterior(support(box), tau)
        mean = posterior.to_map(posterior.mean(1e-3))
        variance = posterior.to_map(posterior.deviations(16, seeded(seed), 1e-2)).square().mean(0)
        variance = torch.nn.functional.avg_pool3d(variance[None, None], 3, 1, 1)[0, 0]
        square.append(((truth - mean).square() / variance)[inside].mean())
        prior = support(box).square() * tau.square().mean()
        assert float(variance[inside].mean()) < 0.9 * float(prior[inside].mean())  # the images said something
    ratio = float(torch.stack(square).mean())
    print(f"sigma {sigma}: mean squared error over posterior variance {ratio:.3f}")
    assert ratio == pytest.approx(1.0, abs=0.15)


def c4_map(box: int, tau: Tensor, symmetrise: Callable[[Tensor], Tensor]) -> Tensor:
    """A map with a 4-fold axis along z whose coefficients have the variance tau^2."""
    return 2 * support(box) * symmetrise(drawn_map(box, tau))


def turned(volume: Tensor) -> Tensor:
    """The mean of the four maps turned about z by quarters; the first row and column have no partner."""
    own = torch.zeros_like(volume)
    own[:, 1:, 1:] = sum(volume[:, 1:, 1:].rot90(i, (1, 2)) for i in range(4)) / 4
    return own


def test_symmetry_counts_every_view_from_all_its_equivalents() -> None:
    """One view of a C4 map with symmetry is what its four equivalent views, each a quarter as often, are without."""
    box, noise = 16, torch.ones(9)
    batch = observe(c4_map(box, torch.ones(9), turned), random_rotations(10, seeded(1)), noise)
    four = [Batch(**{**vars(batch), "rotation": batch.rotation @ element}) for element in point_group("C4")]
    whole = sum((equations(own, noise) for own in four[1:]), equations(four[0], noise))
    found = equations(batch, noise, "C4")
    torch.testing.assert_close(found.value, whole.value / 4, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.weight, whole.weight / 4, rtol=0, atol=1e-4)


def test_a_symmetric_map_is_reconstructed_from_a_quarter_of_the_views() -> None:
    """Views from one quarter of the azimuths, tilted by 30 to 60 degrees, leave wedges that the symmetry fills."""
    box = 24
    tau, noise = decaying(box, 3.0), torch.full((box // 2 + 1,), 3.0)
    truth = c4_map(box, tau, turned)
    rot, tilt, psi = torch.rand(3, 200, 1, generator=seeded(2)).unbind(0)
    x, z = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    tilt = torch.deg2rad(30 + 30 * tilt)
    rotation = exp(6.28 * psi * z) @ exp(tilt * x) @ exp(torch.pi / 2 * rot * z)
    batch = observe(truth, rotation, noise)
    curves = {}
    for name in ("C1", "C4"):
        posterior = equations(batch, noise, name).posterior(support(box), tau)
        volume = posterior.to_map(posterior.mean(1e-3))
        curves[name] = fsc(volume, truth)[1:11].mean()
        symmetric = fsc(volume, turned(volume))[1:11]
    assert float(symmetric.min()) > 0.99
    print(f"mean FSC to the truth {float(curves['C1']):.3f} without, {float(curves['C4']):.3f} with symmetry")
    assert curves["C4"] > curves["C1"] + 0.03


def test_shell_means_count_both_halves() -> None:
    volume = torch.randn(16, 16, 16, generator=seeded())
    full = torch.fft.fftn(volume, norm="ortho").abs().square()
    k = torch.fft.fftfreq(16, 1 / 16)
    shell = (k[:, None, None] ** 2 + k[:, None] ** 2 + k**2).sqrt().round()
    expected = torch.stack([full[shell == s].mean() for s in range(9)])
    torch.testing.assert_close(shell_power(volume, 9), expected)
    torch.testing.assert_close(shell_mean(torch.ones(16, 16, 9), 9), torch.ones(9))


def test_support_of_a_map_is_where_it_is_not_zero() -> None:
    box = 20
    noise = torch.ones(11)
    batch = observe(drawn_map(box, torch.ones(11)), random_rotations(20, seeded(1)), noise)
    scale = (radius(box, 3) < 5).float()
    posterior = equations(batch, noise).posterior(scale, torch.ones(11))
    assert posterior.crop[0] == slice(3, 17)  # 10 voxels and a margin
    volume = posterior.to_map(posterior.mean())
    assert float(volume[scale == 0].abs().max()) == 0.0
    assert float(volume.abs().max()) > 0
