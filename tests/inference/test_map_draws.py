"""Draws of maps: of one map as the dense posterior has them, of a family calibrated where the prior is true."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_cryo.analysis.fsc import fsc, shell_sum
from pyro_cryo.analysis.voxels import fsc_spread
from pyro_cryo.data.density_maps import DensityMaps
from pyro_cryo.data.mrc_map import read_map
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import simulate
from pyro_cryo.distributions.volume import filter_shells
from pyro_cryo.guides.coefficients import LinearCoefficients
from pyro_cryo.guides.points import ClassesCoefficients
from pyro_cryo.guides.poses import PoseModes
from pyro_cryo.inference.em import Maps
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.map_draws import family_draws, still_draws, turn_of
from pyro_cryo.inference.run import Run
from pyro_cryo.inference.volume_draws import half_map_draws, maps_have_posterior, volume_draws
from pyro_cryo.model import CryoModel
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.models.homogeneous import Homogeneous
from pyro_cryo.models.linear_subspace import LinearSubspace
from pyro_cryo.physics.fourier import soft_disc
from pyro_cryo.physics.slices import convolve
from pyro_cryo.volumes.conjugate import NormalEquations
from pyro_cryo.volumes.prior import MapPrior

BOX, IMAGES, STATES = 16, 600, 300
C1 = torch.eye(3)[None]
TAU = 1 / (1 + (3 * torch.linspace(0, 1, BOX // 2 + 1)) ** 2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scale(box: int = BOX) -> Tensor:
    return soft_disc(box, 0.26 * box, 0.12 * box, dims=3)


def case(folder: Path, maps: Tensor, snr: float, images: int = IMAGES) -> tuple[Particles, Tensor, Tensor, Tensor]:
    """Particles, the noise sd (1, L), what maps are multiplied by on the images' scale, and the state of each."""
    star = simulate(DensityMaps(maps, 4.0), folder / "case", n_images=images, box=maps.shape[-1], snr=snr, seed=1)
    with np.load(star.parent / "truth.npz") as truth:
        sigma = torch.full((1, maps.shape[-1] // 2 + 1), float(truth["noise_sd"]) / 2**0.5)
        volumes, state = torch.from_numpy(truth["volumes"]), torch.from_numpy(truth["state"])
    factor = (volumes[0] * maps[0]).sum() / maps[0].square().sum()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the CTF, which aliases in so small a box
        return Particles.open(star), sigma, factor, state


def test_draws_of_one_map_have_the_covariance_of_the_dense_posterior(tmp_path: Path) -> None:
    """On 8^3 voxels, the precision made of the same convolution."""
    box = 8
    where = soft_disc(box, 1.5, 1.5, dims=3)
    tau = torch.linspace(1.0, 0.4, box // 2 + 1)
    truth = where * filter_shells(torch.randn(1, box, box, box, generator=seeded()), tau)
    particles, sigma, factor, _ = case(tmp_path, truth, 0.3)
    prior = MapPrior.of(where, tau * factor)
    equations = NormalEquations.empty(box)
    for batch in particles.batches(256):
        equations.add(batch, sigma, C1)
    posterior = equations.posterior(prior.scale, prior.tau)
    b = len(posterior.scale)
    white = torch.eye(b**3).view(-1, b, b, b)
    seen = convolve(posterior.spectrum, posterior.scale * posterior.colour(white))
    precision = (posterior.whiten(seen) + white).flatten(1).double()
    root = posterior.to_map(white).flatten(1).T.double()
    covariance = root @ torch.linalg.inv(precision) @ root.T
    value, axes = torch.linalg.eigh(covariance)
    kept = value > 1e-6 * value[-1]
    draws = torch.stack([d.volume.flatten() for d in islice(still_draws(particles, sigma, prior, C1), 150)]).double()
    along = ((draws - draws.mean(0)) @ axes)[:, kept].square().sum(0) / 149 / value[kept]
    for band in along.chunk(4):
        assert float(band.mean()) == pytest.approx(1.0, abs=0.06)
    mean = root @ torch.linalg.solve(precision, posterior.whiten(posterior.rhs).flatten().double())
    offset = ((draws.mean(0) - mean) @ axes)[kept].square() / value[kept]
    assert float(offset.mean()) == pytest.approx(1 / 150, rel=0.3)


Family = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def drawn_families(tmp_path_factory: pytest.TempPathFactory) -> list[Family]:
    """Of three families the truth (n, D, D, D), draws (S, n, D, D, D) at the particles' own z, and (S, D, D, D) at 0.

    The prior is the one that maps were drawn from; images are noisy enough to leave z unsure.
    """
    return [family_of(tmp_path_factory.mktemp("family"), seed) for seed in range(3)]


def family_of(folder: Path, seed: int) -> Family:
    generator = seeded(seed)
    scales = torch.stack([scale(), scale()]).clamp_min(0.02)
    basis = scales[[0, 1, 1]] * filter_shells(torch.randn(3, BOX, BOX, BOX, generator=generator), TAU)
    basis[1:] *= 0.5
    z = torch.randn(STATES, 2, generator=generator)
    maps = basis[0] + torch.einsum("sj,jzyx->szyx", z, basis[1:])
    particles, sigma, factor, state = case(folder, maps, 0.1)
    tau = factor * torch.stack([TAU, 0.5 * TAU, 0.5 * TAU])
    start = Maps(factor * basis, scales, sigma, tau)
    chain = family_draws(particles, start, LinearCoefficients(0.0), MapPrior(), C1, seed=1)
    draws = [(torch.stack([d.of(i) for i in range(12)]), d.at(torch.zeros(2))) for d in islice(chain, 20)]
    own, middle = (torch.stack(part) for part in zip(*draws, strict=True))
    return factor * maps[state[:12]], own, middle


def test_draws_of_a_family_are_calibrated(drawn_families: list[Family]) -> None:
    ratios = []
    for truth, draws, _ in drawn_families:
        count, spectrum = len(draws), torch.fft.rfftn(draws, dim=(-3, -2, -1))
        mean = spectrum.mean(0)
        square = (mean - torch.fft.rfftn(truth, dim=(-3, -2, -1))).abs().square().sum(0)
        variance = (spectrum - mean).abs().square().sum((0, 1)) / (count - 1)
        ratios.append((shell_sum(square) / shell_sum(variance) / (1 + 1 / count))[1:])
    ratio = torch.stack(ratios).mean(0)
    print("error over variance by shell:", *[f"{float(r):.2f}" for r in ratio])
    assert float(ratio[2:].mean()) == pytest.approx(1.0, abs=0.2)  # 0.12 from family to family


def test_a_chain_forgets_where_it_was(drawn_families: list[Family]) -> None:
    """So that draws are worth nearly as many."""
    _, draws, _ = drawn_families[0]
    deviation = draws - draws.mean(0)
    after = [float((deviation[lag:] * deviation[:-lag]).mean() / deviation.square().mean()) for lag in (1, 5)]
    print("correlation of draws 1 and 5 apart:", *[f"{a:.3f}" for a in after])
    assert after[0] < 0.3
    assert abs(after[1]) < 0.15


def test_the_middle_of_a_family_is_surer_than_a_particle(drawn_families: list[Family]) -> None:
    """At a given z nothing of z is unsure."""
    for _, draws, middle in drawn_families:
        assert float(middle.var(0).sum()) < 0.8 * float(draws.var(0).sum((1, 2, 3)).mean())


def test_what_a_chain_turns_is_turned_back() -> None:
    fitted = torch.randn(500, 2, generator=seeded())
    turn = torch.linalg.qr(torch.randn(2, 2, generator=seeded(1))).Q
    drawn = fitted @ turn + 0.3 + 0.1 * torch.randn(500, 2, generator=seeded(2))
    found = turn_of(LinearCoefficients(0.0), fitted, drawn)
    torch.testing.assert_close(found[1:], turn, rtol=0, atol=0.03)
    torch.testing.assert_close(found[0], torch.tensor([0.3, 0.3]), rtol=0, atol=0.03)
    same = turn_of(ClassesCoefficients(2, 0.0), fitted, drawn)
    torch.testing.assert_close(same, torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    torch.testing.assert_close(turn_of(LinearCoefficients(0.0), 0 * fitted, fitted)[1:], torch.eye(2))


def test_draws_of_a_saved_run_are_those_of_its_map(homogeneous_run: Path) -> None:
    run = Run.load(homogeneous_run)
    assert maps_have_posterior(run)
    draws = torch.stack(list(volume_draws(run, 6, seed=2)))
    torch.testing.assert_close(draws, torch.stack(list(volume_draws(run, 6, seed=2))))
    inside = run.volume() > 0.3 * run.volume().max()
    assert float((draws.mean(0) - run.volume()).norm() / run.volume().norm()) < 0.1
    assert float(draws.std(0)[inside].mean()) > 2 * float(draws.std(0)[~inside].mean())  # the envelope makes it local


def test_half_maps_of_other_noise_agree_as_the_run_s_own(homogeneous_run: Path) -> None:
    run = Run.load(homogeneous_run)
    own = fsc(*(read_map(homogeneous_run / f"{name}.mrc")[0] for name in ("half1", "half2")))
    spread = fsc_spread(half_map_draws(run, 12))
    seen = slice(2, 12)
    assert bool((spread.low <= spread.high).all())
    assert float((own - spread.mean)[seen].abs().mean()) < 0.06
    away = ((own - spread.mean) / spread.sd)[seen]
    print("the run's own FSC, in sd:", *[f"{float(a):.1f}" for a in away])
    assert float(away.abs().median()) < 2.5


@pytest.mark.parametrize("zdim", [0, 1])
def test_poses_that_are_not_known_leave_maps_less_sure(zdim: int, toy: Path) -> None:
    """By what images tell of a map that are a little out of place; poses that are as good as known change nothing."""
    model: CryoModel = LinearSubspace(16, zdim=zdim, contrast=0.0) if zdim else Homogeneous(16)
    run = fit(model, Particles.open(toy, box=16))
    middle = torch.zeros(zdim) if zdim else None

    def spread(angle_deg: float) -> Tensor:
        """sd by shell of draws of a map, at poses that are so unsure, and a tenth of it in pixels."""
        sd = torch.tensor([math.radians(angle_deg)] * 3 + [0.1 * angle_deg] * 2)
        single = PoseModes.single(run.particles.rotation, run.particles.translation)
        modes = replace(single, precision=single.precision / sd.square().clamp_min(1e-8))
        posed = run if not angle_deg else replace(run, poses=modes)
        drawn = torch.stack(list(volume_draws(posed, 25, z=middle)))
        return shell_sum(torch.fft.rfftn(drawn - drawn.mean(0), dim=(-3, -2, -1)).abs().square().sum(0))[1:-1].sqrt()

    known, sure, unsure = spread(0.0), spread(0.01), spread(6.0)
    torch.testing.assert_close(sure, known, rtol=0.15, atol=0)
    assert float((unsure / known)[2:].min()) > 1.2


def test_a_network_s_maps_differ_by_z_alone(cryodrgn_run: Path) -> None:
    run = Run.load(cryodrgn_run)
    assert not maps_have_posterior(run)
    pair = torch.stack(list(volume_draws(run, 5, index=[3, 4])))
    assert pair.shape == (5, 2, 32, 32, 32)
    assert float(pair.std(0).max()) > 0
    with pytest.raises(ValueError, match="give index instead"):
        volume_draws(run, 5, z=np.zeros(2))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "give index or z"),
        ({"index": 0, "z": np.zeros(2)}, "give index or z"),
        ({"index": 600}, "particles 0 to 599"),
        ({"z": np.zeros(3)}, "expected"),
        ({"index": 0, "draws": 1}, "2 or more"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(cryodrgn_run: Path, asked: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        volume_draws(Run.load(cryodrgn_run), **{"draws": 5, **asked})


def test_one_map_has_no_z_to_ask_for() -> None:
    model: CryoModel = Homogeneous(16)
    with pytest.raises(ValueError, match="no z"):
        volume_draws(Run(model, lambda: None), 5, index=0)  # type: ignore[arg-type, return-value]
    assert CryoDRGN(16, zdim=2).posterior_draws(None) is None  # type: ignore[arg-type]


def test_a_saved_family_is_drawn_at_particles_and_at_z(toy: Path, tmp_path: Path) -> None:
    """One or several, by number or z; draws of what a fit has at a z lie about its map as far as they spread."""
    fit(LinearSubspace(16, zdim=2, contrast=0.0), Particles.open(toy, box=16), tmp_path / "run")
    run = Run.load(tmp_path / "run")
    pair = torch.stack(list(volume_draws(run, 4, index=np.array([3, 9]))))
    torch.testing.assert_close(torch.stack(list(volume_draws(run, 4, index=9))), pair[:, 1])
    z = run.latent.z[9]
    at = torch.stack(list(volume_draws(run, 4, z=z)))
    torch.testing.assert_close(torch.stack(list(volume_draws(run, 4, z=z[None]))), at[:, None])
    own = run.volume(z)
    other = run.volume(run.latent.z[np.linalg.norm(run.latent.z - z, axis=1).argmax()])
    assert float((at.mean(0) - own).norm()) < 0.3 * float((at.mean(0) - other).norm())
    assert float((at.mean(0) - own).square().sum() / at.var(0).sum()) < 2.5  # a mode of a few passes is not the mean
