"""Maps from the images near a z: what images weigh, how maps are corrected and which bandwidth a shell is given."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from torch import Tensor

from pyro_cryo.analysis.fsc import fsc
from pyro_cryo.analysis.local import (
    BANDWIDTHS,
    FEWEST,
    MOST,
    Neighbours,
    added,
    best_by_shell,
    correction,
    effective,
    local_estimates,
    local_maps,
    residual,
)
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import hinge, simulate
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.run import Latent, Run
from pyro_cryo.model import form_image, noise_of
from pyro_cryo.models.linear_subspace import LinearSubspace
from pyro_cryo.physics.slices import channel_grid, fourier_grid, read_grid, slice_coordinates
from pyro_cryo.volumes.conjugate import NormalEquations

BOX = 24
COUNT = 600
SD = 0.3  # posterior standard deviation of z, which is -1 or 1


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two states of a hinge, 90 degrees apart."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = tmp_path_factory.mktemp("two") / "case"
        return simulate(hinge(2), folder, n_images=COUNT, box=BOX, snr=0.3, seed=0)


@pytest.fixture(scope="module")
def truth(case: Path) -> dict[str, Tensor]:
    with np.load(case.parent / "truth.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in ("volumes", "state")}


@pytest.fixture(scope="module")
def fitted(case: Path) -> Run:
    torch.manual_seed(0)
    return fit(LinearSubspace(BOX, zdim=1), Particles.open(case))


@pytest.fixture
def blind(fitted: Run, truth: dict[str, Tensor]) -> Run:
    """A run that knows z, to within SD, but whose map is the consensus at every z."""
    model = LinearSubspace(BOX, zdim=1)
    model.load_state_dict(fitted.model.state_dict())
    model.volume.components[1:] = 0
    run = Run(model, fitted.particles, guide=model.make_guide())
    state = 2.0 * truth["state"][:, None].float() - 1
    run.latent = Latent(np.arange(COUNT), state.numpy(), np.full((COUNT, 1, 1), SD**2, np.float32))
    return run


def posteriors(images: int, zdim: int) -> Latent:
    generator = torch.Generator().manual_seed(zdim)
    factor = 0.5 * torch.randn(images, zdim, 2 * zdim, generator=generator)
    z = torch.randn(images, zdim, generator=generator)
    return Latent(np.arange(images), z.numpy(), (factor @ factor.mT).numpy())


@pytest.mark.parametrize("zdim", [1, 3])
def test_weights_are_the_kernel_in_expectation_over_the_posterior(zdim: int, device: str) -> None:
    latent, z, h = posteriors(5, zdim), torch.full((zdim,), 0.3), 1.5
    metric = torch.linalg.inv(torch.from_numpy(latent.z_cov).mean(0))
    posterior = torch.distributions.MultivariateNormal(*map(torch.from_numpy, (latent.z, latent.z_cov)))
    torch.manual_seed(0)
    away = posterior.sample((200_000,)) - z
    kernel = torch.exp(-0.5 * torch.einsum("nbi,ij,nbj->nb", away, metric, away) / h**2).mean(0)
    weight = Neighbours.of(latent, device).weights(z.to(device), torch.tensor([h]))[0].cpu()
    torch.testing.assert_close(weight, kernel / kernel.max(), atol=0.01, rtol=0.01)


def test_a_huge_bandwidth_counts_every_image_alike() -> None:
    weight = Neighbours.of(posteriors(50, 2)).weights(torch.zeros(2), torch.tensor([1e4]))
    torch.testing.assert_close(weight, torch.ones(1, 50))


def test_bandwidths_are_those_at_which_so_many_images_count() -> None:
    latent = posteriors(3000, 2)
    latent = replace(latent, z_cov=0.01 * latent.z_cov)
    weight, bandwidth = Neighbours.of(latent).kernels(torch.zeros(2))
    expected = torch.as_tensor(np.geomspace(FEWEST, MOST * 3000, BANDWIDTHS)).float()
    torch.testing.assert_close(effective(weight), expected, rtol=0.01, atol=0)
    assert bool((bandwidth.diff() > 0).all())


def test_probabilities_and_certain_z_have_a_metric_too() -> None:
    """Of three classes z adds up to one: no image differs along (1, 1, 1)."""
    z = np.eye(3, dtype=np.float32)[np.arange(300) % 3]
    near = Neighbours.of(Latent(np.arange(300), z, np.zeros((300, 3, 3), np.float32)))
    weight, _ = near.kernels(torch.tensor([1.0, 0, 0]))
    assert bool(torch.isfinite(weight).all())
    torch.testing.assert_close(weight[0, :3], torch.tensor([1.0, 0, 0]), atol=1e-3, rtol=0)


def test_all_images_alike_give_the_consensus(blind: Run) -> None:
    sigma, symmetry = blind.model.sigma.detach(), torch.eye(3)[None]
    plain, counted = NormalEquations.empty(BOX), NormalEquations.empty(BOX)
    nothing = fourier_grid(torch.zeros(BOX, BOX, BOX))
    for batch in blind.particles.batches(200):
        plain.add(batch, sigma, symmetry)
        counted.add(residual(batch, nothing), sigma, symmetry, torch.ones(len(batch)))
    torch.testing.assert_close(counted.value, plain.value)
    torch.testing.assert_close(counted.weight, plain.weight)
    consensus = blind.volume(np.zeros(1))
    assert float(fsc(correction(counted, torch.ones(BOX, BOX, BOX)), consensus)[1:5].min()) > 0.98


def test_the_gain_is_the_difference_of_log_likelihoods(blind: Run) -> None:
    batch, sigma = blind.particles.batch(slice(0, 6)), blind.model.sigma.detach()
    own, other = 0.1 * torch.randn(2, BOX, BOX, BOX, generator=torch.Generator().manual_seed(0))
    points = slice_coordinates(batch.rotation, batch.half.k, batch.freq_scale)

    def log_likelihood(volume: Tensor) -> Tensor:
        image = form_image(torch.view_as_real(read_grid(fourier_grid(volume), points)), batch.translation, batch)
        return torch.distributions.Normal(image, noise_of(batch, sigma)).log_prob(batch.image).sum(-1)

    gain = added(residual(batch, fourier_grid(own)), channel_grid(other[None]), sigma)
    difference = log_likelihood(own + other) - log_likelihood(own)
    expected = torch.zeros(6, BOX // 2 + 1).index_add_(1, batch.half.shell, difference)
    torch.testing.assert_close(gain[:, 0], expected, atol=2e-3, rtol=1e-3)


def test_a_gain_must_exceed_its_error() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 3, 64, generator=generator)
    noise = noise - noise.mean(0)
    assert bool((best_by_shell(noise - 0.1, torch.ones(400)) == -1).all())
    low = torch.arange(64) < 32
    clear = noise + torch.where(low, torch.tensor([0.5, 1.0, 0.0])[:, None], torch.tensor([0.5, -1.0, 0.0])[:, None])
    chosen = best_by_shell(clear, torch.ones(400))
    assert_array_equal(chosen[:16], 1)
    assert_array_equal(chosen[48:], 0)


def test_the_map_of_one_of_two_states_is_found(blind: Run, truth: dict[str, Tensor]) -> None:
    found = local_estimates(blind, np.array([[-1.0], [1.0]]))
    consensus = blind.volume(np.zeros(1))
    for volume, choice, own, other in zip(
        found.volumes, found.choice, truth["volumes"], truth["volumes"].flip(0), strict=True
    ):
        better = fsc(volume, own) - fsc(consensus, own)
        assert float(better[1:7].mean()) > 0.05
        assert float(better.min()) > -0.1
        assert float(fsc(volume, own)[1:7].mean()) > float(fsc(volume, other)[1:7].mean()) + 0.1
        assert bool((choice[1:5] >= 0).all())
    assert found.images.shape == found.bandwidth.shape == (2, BANDWIDTHS)


def test_a_map_that_is_right_is_left_as_it_is(blind: Run, truth: dict[str, Tensor]) -> None:
    scale = float(
        (blind.volume(np.zeros(1)) * truth["volumes"].mean(0)).sum() / truth["volumes"].mean(0).square().sum()
    )
    middle, moved = truth["volumes"].mean(0), 0.5 * (truth["volumes"][1] - truth["volumes"][0])
    blind.model.consensus.set(scale * middle)
    blind.model.volume.set(scale * torch.stack([middle, moved]))
    z = np.array([1.0])
    changed = local_maps(blind, z) - blind.volume(z)
    assert float(changed.norm() / blind.volume(z).norm()) < 0.1


def test_one_map_or_many_as_the_run_gives_them(blind: Run) -> None:
    one, many = local_maps(blind, np.array([1.0])), local_maps(blind, torch.tensor([[1.0]]))
    assert one.shape == (BOX, BOX, BOX)
    torch.testing.assert_close(many[0], one)


def test_z_that_does_not_fit_is_told(blind: Run, homogeneous_run: Path) -> None:
    with pytest.raises(ValueError, match=r"z of shape \(2, 3\); expected \(\*batch, 1\)"):
        local_maps(blind, np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"z of map 1 is \[nan\]; expected finite numbers"):
        local_maps(blind, np.array([[0.0], [np.nan]]))
    with pytest.raises(ValueError, match="has no z"):
        local_maps(Run.load(homogeneous_run), np.zeros((1, 2)))


def test_local_maps_of_a_decoder_from_the_command_line(
    cryodrgn_run: Path, homogeneous_run: Path, tmp_path: Path, command: Callable[..., int]
) -> None:
    asked = ("--index", 3, 7, "--local", "--quiet")
    assert command("volumes", cryodrgn_run, *asked, "-o", tmp_path / "out") == 0
    run = Run.load(cryodrgn_run)
    with np.load(tmp_path / "out" / "volumes.npz") as file:
        assert_array_equal(file["index"], [3, 7])
        torch.testing.assert_close(torch.from_numpy(file["volumes"]), local_maps(run, run.latent.z[[3, 7]]))
    assert command("volumes", homogeneous_run, "--local", "--quiet", "-o", tmp_path / "none") == 2
