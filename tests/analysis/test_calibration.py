"""Calibrated posteriors pass, those that are too sure or know nothing do not; a model's own images tell."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mrcfile
import pyro
import pytest
import torch
from images import Given, blobs
from torch import Tensor

from pyro_cryo.analysis.calibration import (
    DIRECTIONS,
    LIKELIHOOD,
    calibration,
    ranks,
    sbc,
    simulated,
    simultaneous_band,
    uniformity,
)
from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import hinge, simulate
from pyro_cryo.guides.landscape import MapLikelihood, climbed
from pyro_cryo.guides.pose_mixture import PoseMixture
from pyro_cryo.guides.poses import PoseModes, PosePrior
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.pose_climb import about_its_poses, climbing, pose_likelihood
from pyro_cryo.inference.run import Run, guide_of
from pyro_cryo.model import CryoModel
from pyro_cryo.models.classes import Classes
from pyro_cryo.models.homogeneous import Homogeneous
from pyro_cryo.models.linear_subspace import LinearSubspace
from pyro_cryo.physics.fourier import half_plane_to_image
from pyro_cryo.physics.rotations import exp
from pyro_cryo.physics.slices import slope_grid
from pyro_cryo.pose import PoseAbout

BOX = 32


def conjugate(n: int, draws: int, confidence: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """theta ~ Normal(0, I_2), x ~ Normal(A theta, 1): truths and draws, of a posterior sd divided by `confidence`."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(n, 2, generator=generator)
    a = torch.tensor([[1.0, 0.5], [0.0, 2.0]])
    x = theta @ a.T + torch.randn(n, 2, generator=generator)
    covariance = torch.linalg.inv(a.T @ a + torch.eye(2))
    white = torch.randn(draws, n, 2, generator=generator)
    return theta, x @ a @ covariance + white @ torch.linalg.cholesky(covariance).T / confidence


def test_a_rank_counts_the_draws_below() -> None:
    draws = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None].expand(4, 3, 1)
    assert ranks(torch.tensor([[0.5], [2.5], [9.0]]), draws).flatten().tolist() == [0, 2, 4]


def test_ties_are_broken_at_random() -> None:
    """A truth and its draws from two atoms: all ranks are alike."""
    generator = torch.Generator().manual_seed(0)
    values = (torch.rand(10, 1000, 1, generator=generator) < 0.3).float()
    found = ranks(values[0], values[1:], generator)
    assert bool(uniformity(found, 9).inside.all())
    below = (values[1:] < values[0]).sum(0)
    assert not bool(uniformity(below, 9).inside.any())


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 5, 2\) for truths of \(4, 2\)"):
        ranks(torch.zeros(4, 2), torch.zeros(3, 5, 2))
    with pytest.raises(ValueError, match="0 to 9"):
        uniformity(torch.tensor([[10]]), 9)
    with pytest.raises(ValueError, match="more draws"):
        calibration(*conjugate(10, 3)).coverage(0.1)


@pytest.mark.parametrize(("n", "draws", "level"), [(400, 19, 0.9), (101, 99, 0.95)])
def test_a_band_has_its_level(n: int, draws: int, level: float) -> None:
    generator, times = torch.Generator().manual_seed(1), 1000
    found = uniformity(torch.randint(draws + 1, (n, times), generator=generator), draws, level)
    inside = float(found.inside.double().mean())
    error = (level * (1 - level) / times) ** 0.5
    assert level - 4 * error < inside < level + 4 * error + 0.02  # counts are discrete: a little more
    assert torch.equal(found.excess > 0, ~found.inside)
    assert torch.equal(found.p_value < 1 - level, ~found.inside)
    band = simultaneous_band(n, draws, level)
    assert bool((band.lower < band.expected).all() and (band.expected < band.upper).all())


def test_a_conjugate_posterior_is_calibrated() -> None:
    found = calibration(*conjugate(1000, 99))
    assert bool(found.uniformity().inside.all())
    for level in (0.5, 0.9):
        held = found.coverage(level)
        assert held.level == pytest.approx(level)
        rates = torch.cat([held.interval, held.region[None]])
        assert float((rates - level).abs().max()) < 4 * held.error
    expected = torch.linalg.inv(torch.tensor([[2.0, 0.5], [0.5, 5.25]])).diagonal().sqrt()
    torch.testing.assert_close(found.sharpness, expected, rtol=0.06, atol=0)


@pytest.mark.parametrize("confidence", [0.7, 1.4])
def test_one_that_is_too_sure_or_too_unsure_is_not(confidence: float) -> None:
    found = calibration(*conjugate(1000, 99, confidence))
    verdict, held = found.uniformity(), found.coverage(0.9)
    assert not bool(verdict.inside.any())
    assert float(verdict.p_value.max()) < 0.001
    assert bool(((held.interval > 0.9 + 4 * held.error) == (confidence < 1)).all())
    assert bool((held.region > 0.9 + 4 * held.error) == (confidence < 1))


def test_wrong_correlation_shows_in_the_region_alone() -> None:
    """Marginals that are right, of coordinates that are taken for independent."""
    generator = torch.Generator().manual_seed(0)
    root = torch.linalg.cholesky(torch.tensor([[1.0, 0.95], [0.95, 1.0]]))
    truth, draws = torch.randn(1000, 2, generator=generator) @ root.T, torch.randn(99, 1000, 2, generator=generator)
    found = calibration(truth, draws)
    assert bool(found.uniformity().inside.all())
    assert not bool(uniformity(found.distance[:, None], 99).inside.any())


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> Particles:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = tmp_path_factory.mktemp("calibration") / "case"
        return Particles.open(simulate(hinge(1), folder, n_images=150, box=BOX, snr=1.0, seed=0))


def with_maps(model: LinearSubspace, noise: float, radius_px: float = 12.0) -> LinearSubspace:
    base = blobs(BOX, radius_px)
    still = [0.3 * base.roll(shift, 0) for shift in (0, 2, -1, 1)]
    moving = [0.3 * (a - b.flip(1)) for a, b in zip(still[1:], still[:-1], strict=True)]
    model.consensus.set(still[0])
    model.volume.set(torch.stack([still[0], *moving])[: len(model.volume.components)])
    model.log_sigma.data.fill_(math.log(noise))
    return model


def run_of(model: CryoModel, particles: Particles) -> Run:
    return Run(model, particles, guide=model.make_guide())


@pytest.mark.parametrize("contrast", [0.0, 0.2])
def test_the_exact_guide_is_the_posterior_of_the_models_own_images(particles: Particles, contrast: float) -> None:
    run = run_of(with_maps(LinearSubspace(BOX, zdim=2, contrast=contrast), 1.0), particles)
    found = sbc(run, particles, draws=19)
    assert set(found) == {"z", "z along", LIKELIHOOD} | ({"contrast"} if contrast else set())
    assert found["z"].ranks.shape == (150, 2)
    assert found["z along"].ranks.shape == (150, DIRECTIONS)
    for name, quantity in found.items():
        assert bool(quantity.uniformity(0.999).inside.all()), name
    assert float(found["z"].sharpness.max()) < 0.95
    again = sbc(run, particles, draws=19)
    assert torch.equal(again["z"].ranks, found["z"].ranks)


def test_with_half_the_noise_it_is_not(particles: Particles) -> None:
    run = run_of(with_maps(LinearSubspace(BOX, zdim=2, contrast=0.0), 1.0), particles)
    sure = with_maps(LinearSubspace(BOX, zdim=2, contrast=0.0), 0.5).make_guide()
    found = sbc(run, particles, draws=19, guide=lambda batch: sure)
    assert not bool(found["z"].uniformity().inside.any())
    assert float(found["z"].coverage(0.9).region) < 0.7


def test_draws_picked_by_weight_from_one_that_is_too_unsure_are_the_posteriors(particles: Particles) -> None:
    run = run_of(with_maps(LinearSubspace(BOX, zdim=2, contrast=0.0), 1.0), particles)
    unsure = with_maps(LinearSubspace(BOX, zdim=2, contrast=0.0), 2.0).make_guide()
    drawn, picked = (sbc(run, particles, 19, guide=lambda batch: unsure, weighed=weighed) for weighed in (0, 100))
    assert not bool(drawn[LIKELIHOOD].uniformity().inside.any())
    for name, quantity in picked.items():
        assert bool(quantity.uniformity(0.999).inside.all()), name
    with pytest.raises(ValueError, match="19 draws are to be picked from 10; expected weighed=0, or at least 19"):
        sbc(run, particles, 19, weighed=10)


class Ignorant(torch.nn.Module):
    """q(z | image) = p(z)."""

    def __init__(self, model: CryoModel) -> None:
        super().__init__()
        self._model = (model,)

    def forward(self, batch: Batch) -> None:
        with pyro.plate("particles", batch.size, subsample=batch.shown, dim=-1):
            self._model[0].latent()


def test_a_guide_that_knows_nothing_fails_by_the_likelihood(particles: Particles) -> None:
    run = run_of(with_maps(LinearSubspace(BOX, zdim=2, contrast=0.0), 1.0), particles)
    found = sbc(run, particles, draws=19, guide=lambda batch: Ignorant(run.model))
    assert bool(found["z"].uniformity(0.999).inside.all())
    assert float(found["z"].sharpness.min()) > 0.8
    assert not bool(found[LIKELIHOOD].uniformity().inside.any())


def test_classes_are_ranked_though_all_their_draws_are_tied(particles: Particles) -> None:
    run = run_of(with_maps(Classes(BOX, classes=3, contrast=0.0), 1.0), particles)
    found = sbc(run, particles, draws=19)
    assert bool(found["z"].uniformity(0.999).inside.all())


def test_images_of_a_particle_share_its_z(particles: Particles) -> None:
    pairs = replace(particles, table=replace(particles.table, particle=torch.arange(150) // 2))
    run = run_of(with_maps(LinearSubspace(BOX, zdim=2, contrast=0.0), 1.0), pairs)
    found = sbc(run, pairs, draws=19)
    assert found["z"].ranks.shape == (75, 2)
    assert bool(found["z"].uniformity(0.999).inside.all())


def test_the_map_of_a_run_is_drawn_once_for_images_and_likelihood(particles: Particles) -> None:
    model = Homogeneous(BOX)
    model.u.copy_(blobs(BOX, 12))
    model.u_sd.fill_(0.01)
    made = simulated(run_of(model, particles), particles.batch(slice(0, 5)))
    assert made.latent == {}
    drawn = made.shared["volume"]
    torch.testing.assert_close(drawn, model.u, rtol=0, atol=0.2)
    assert bool((made.batch.image != particles.batch(slice(0, 5)).image).any())
    assert made.log_likelihood.shape == (5,)


@pytest.mark.parametrize(("share", "calibrated"), [(1.0, True), (0.45, False)])
def test_windowed_images_tell_no_more_than_they_did(tmp_path: Path, share: float, calibrated: bool) -> None:
    """Noise in real space, a tight window, its own power as sigma^2; counted as if it were white it tells too much."""
    count, window = 300, 0.6
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        star = simulate(hinge(1), tmp_path / "case", n_images=count, box=BOX, snr=1.0, seed=0)
    model = with_maps(LinearSubspace(BOX, zdim=2, contrast=0.0), 1e-3, radius_px=6)
    torch.manual_seed(0)
    batch = Particles.open(star).batch(slice(None))
    with torch.no_grad():
        trace: Any = pyro.poutine.trace(pyro.poutine.uncondition(model)).get_trace(batch)
    clean, z = half_plane_to_image(trace.nodes["image"]["value"], batch.half), trace.nodes["z"]["value"]
    with mrcfile.open(star.with_name("particles.mrcs"), mode="r+") as stack:
        stack.data[:] = (clean + torch.randn(clean.shape, generator=generator)).numpy()
    windowed = Particles.open(star, window=window)
    assert windowed.batch([0]).window_power == pytest.approx(0.45, abs=0.01)
    model.log_sigma.data.fill_(0.5 * math.log(0.5 * windowed.batch([0]).window_power * share))
    latent = run_of(model, windowed).encode(windowed)
    mean, root = torch.from_numpy(latent.z), torch.linalg.cholesky(torch.from_numpy(latent.z_cov))
    draws = mean + (root @ torch.randn(99, count, 2, 1, generator=generator))[..., 0]
    held = calibration(z, draws).coverage(0.9)
    assert (float((held.interval - 0.9).abs().max()) < 4 * held.error) == calibrated
    assert (float(held.region) > 0.9 - 4 * held.error) == calibrated


def about(modes: PoseModes, precision: float) -> Callable[[Batch], Any]:
    return lambda batch: PoseMixture(replace(modes, precision=modes.precision * precision), enumerated=False)


def test_poses_are_ranked_about_the_tables(particles: Particles) -> None:
    """In a sharp posterior Laplace's approximation is the posterior: it passes, and fails where it is too sure."""
    spread = PoseAbout(turn_sd_deg=1.0, shift_sd_px=0.3)
    model = Given(3 * blobs(BOX, 12), 1.0, 1.0)
    model.poses = spread
    run = Run(model, particles, guide=model.make_guide())

    def ask(precision: float) -> Callable[[Batch], Any]:
        def guide(batch: Batch) -> PoseMixture:
            prior = PosePrior(batch.rotation, batch.translation, float(spread.turn_sd), float(spread.shift_sd))
            start = PoseModes.single(batch.rotation, batch.translation)
            likelihood = MapLikelihood(slope_grid(model.volume.map()), model.sigma.detach())
            modes = climbed(batch, likelihood, start, prior, batch.freq_scale, steps=6)[0]
            return about(modes, precision)(batch)

        return guide

    found = sbc(run, particles, draws=19, guide=ask(1.0), batch_size=150)
    assert found["rotation"].ranks.shape == (150, 4)
    assert found["translation"].ranks.shape == (150, 2)
    for name in ("rotation", "translation", LIKELIHOOD):
        assert bool(found[name].uniformity(0.999).inside.all()), name
    assert float(found["rotation"].sharpness[:3].max()) < 0.9
    sure = sbc(run, particles, draws=19, guide=ask(4.0), batch_size=150)
    assert not bool(sure["rotation"].uniformity().inside[:3].any())
    assert not bool(sure["translation"].uniformity().inside.any())


@pytest.mark.parametrize("kind", ["given", "solved", "family"])
def test_poses_of_a_run_are_ranked_about_its_own(kind: str, particles: Particles) -> None:
    """In its own maps, z integrated out, a map that is solved for at its mean; the prior is what it was afterwards.

    Of two modes far apart the heavier one tells how sure poses are.
    """
    model: CryoModel = Given(3 * blobs(BOX, 12), 1.0, 1.0)
    if kind == "family":
        model = with_maps(LinearSubspace(BOX, zdim=1, contrast=0.0), 0.3)
    elif kind == "solved":
        fitted = fit(Homogeneous(BOX), particles).model
        assert isinstance(fitted, Homogeneous)
        fitted.u_sd.fill_(float(fitted.u.std()))  # as unsure as can be
        model = fitted
    sd = torch.tensor([0.01] * 3 + [0.15] * 2)
    one = PoseModes.single(particles.rotation, particles.translation)
    far = exp(torch.tensor([math.pi / 2, 0.0, 0.0])) @ one.rotation
    modes = PoseModes(
        torch.cat([one.rotation, far], 1),
        one.translation.repeat(1, 2, 1),
        (one.precision / sd.square()).repeat(1, 2, 1, 1),
        torch.tensor([0.7, 0.3]).log().expand(len(particles), 2),
    )
    run = Run(model, particles, guide=guide_of(model, modes), poses=modes)
    before = model.poses
    with about_its_poses(run) as near:
        assert float(model.poses.turn_sd) == pytest.approx(0.02, rel=0.01)
        assert float(model.poses.shift_sd) == pytest.approx(0.3, rel=0.01)
        guide = partial(climbing, near, pose_likelihood(near))
        found = sbc(near, particles, draws=19, guide=guide, batch_size=150)
    assert model.poses is before
    for name in ("rotation", "translation", *(["z"] if kind == "family" else [])):
        assert bool(found[name].uniformity(0.999).inside.all()), name
    assert float(found["rotation"].sharpness[:3].max()) < 0.98


def test_a_table_of_poses_is_of_its_own_images(particles: Particles) -> None:
    modes = PoseModes.single(particles.rotation, particles.translation)
    run = Run(Given(blobs(BOX, 12), 1.0, 1.0), particles, poses=modes)
    with pytest.raises(ValueError, match="give guide="):
        sbc(run, particles)
