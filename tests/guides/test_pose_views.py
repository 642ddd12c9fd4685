"""Poses of particles that are seen in several images: one rotation, and in each image a shift."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pyro
import pytest
import torch
from images import Given, blobs, observed, seen_together
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from quadrature import log_likelihood
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.guides.landscape import MapLikelihood, _Arrow, climbed
from pyro_cryo.guides.pose_mixture import PoseMixture
from pyro_cryo.guides.poses import PoseModes, PosePrior, moved
from pyro_cryo.inference.draws import drawn
from pyro_cryo.inference.pose_matching import with_matched_poses
from pyro_cryo.inference.run import Run, guide_of
from pyro_cryo.inference.search import Level, Search
from pyro_cryo.model import CryoModel
from pyro_cryo.physics import rotation_grid, shift_grid
from pyro_cryo.physics.fourier import HalfPlane
from pyro_cryo.physics.rotations import angle_deg, exp
from pyro_cryo.physics.slices import fourier_grid, slope_grid

BOX, IMAGES, SIGMA, SHIFT_SD = 24, 60, 0.8, 2.0
PARTICLE = [i // 2 for i in range(40)] + [20 + i // 4 for i in range(20)]  # 20 pairs and 5 series of four
PARTICLES = 25


@pytest.fixture(scope="module")
def volume() -> Tensor:
    return blobs(BOX, 11)


@pytest.fixture(scope="module")
def batch(volume: Tensor) -> Batch:
    """Views of a particle at any rotation to each other, some of a wider field."""
    scale = torch.where(torch.arange(IMAGES) % 3 == 0, 1.0, 0.9)
    return seen_together(observed(volume, IMAGES, SIGMA, scale), PARTICLE)


@pytest.fixture
def sigma() -> Tensor:
    return torch.full((1, BOX // 2 + 1), SIGMA)


def anywhere() -> PosePrior:
    return PosePrior(torch.eye(3).expand(IMAGES, 3, 3), torch.zeros(IMAGES, 2), math.inf, SHIFT_SD)


def off(batch: Batch, turn_sd: float) -> PoseModes:
    """One mode of each image away from its pose, its particle's images turned as one."""
    generator = torch.Generator().manual_seed(3)
    turn = exp(turn_sd * torch.randn(PARTICLES, 3, generator=generator)) @ batch.rotation[batch.first]
    shift = batch.translation / batch.freq_scale[:, None] + 0.4 * torch.randn(IMAGES, 2, generator=generator)
    return PoseModes.single(batch.relative @ batch.of_images(turn), shift)


def climbed_back(volume: Tensor, batch: Batch, sigma: Tensor) -> tuple[PoseModes, Tensor]:
    likely, px = MapLikelihood(slope_grid(volume), sigma), batch.freq_scale
    return climbed(batch, likely, off(batch, 0.06), anywhere(), px, steps=8)


def test_an_arrow_is_the_whole_matrix(batch: Batch) -> None:
    """Solutions, determinant and marginal precisions are those of the matrix of a turn and all shifts."""
    generator = torch.Generator().manual_seed(5)
    root = torch.randn(IMAGES, 5, 8, generator=generator, dtype=torch.float64)
    information, relative = root @ root.mT, exp(torch.randn(IMAGES, 3, generator=generator, dtype=torch.float64))
    gradient = torch.randn(IMAGES, 5, generator=generator, dtype=torch.float64)
    arrow = _Arrow.of(information, batch, relative)
    step, log_det = arrow.solve(gradient, batch, relative), arrow.log_det(batch)
    precision = arrow.precision(batch, relative)
    for particle in (0, 22):
        images = (batch.particle == particle).nonzero()[:, 0]
        size = 3 + 2 * len(images)
        whole, score = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        own = []
        for number, image in enumerate(images.tolist()):
            select = torch.zeros(5, size, dtype=torch.float64)
            select[:3, :3] = relative[image]
            select[3:, 3 + 2 * number : 5 + 2 * number] = torch.eye(2)
            whole += select.T @ information[image] @ select
            score += select.T @ gradient[image]
            own.append(select)
        solution, covariance = torch.linalg.solve(whole, score), torch.linalg.inv(whole)
        torch.testing.assert_close(log_det[particle], torch.linalg.slogdet(whole)[1])
        for image, select in zip(images.tolist(), own, strict=True):
            torch.testing.assert_close(step[image], select @ solution)
            torch.testing.assert_close(precision[image], torch.linalg.inv(select @ covariance @ select.T))


def test_images_of_a_particle_climb_together(volume: Tensor, batch: Batch, sigma: Tensor) -> None:
    """To a mode whose Gaussian covers the truth: 3 + 2 V numbers of a particle, 5 of each image."""
    modes, _ = climbed_back(volume, batch, sigma)
    rotation, translation = modes.best
    turned = replace(batch, rotation=rotation)
    torch.testing.assert_close(turned.relative, batch.relative, atol=1e-5, rtol=0)
    away = PosePrior(batch.rotation, batch.translation / batch.freq_scale[:, None], 1.0, 1.0).away(
        rotation, translation
    )
    square = torch.einsum("ni,nij,nj->n", away, modes.precision[:, 0], away)
    assert abs(float(square.mean()) - 5) < 4 * (2 * 10 / IMAGES) ** 0.5  # images of a particle are no two samples
    alone, _ = climbed(
        seen_together(batch, list(range(IMAGES))),
        MapLikelihood(slope_grid(volume), sigma),
        off(batch, 0.06),
        anywhere(),
        batch.freq_scale,
        steps=8,
    )
    together, apart = (angle_deg(each.best[0], batch.rotation).median() for each in (modes, alone))
    assert float(together) < 0.85 * float(apart)


def test_draws_turn_the_images_of_a_particle_as_one(volume: Tensor, batch: Batch, sigma: Tensor) -> None:
    modes, _ = climbed_back(volume, batch, sigma)
    generator, draws = torch.Generator().manual_seed(0), []
    centre = PosePrior(*modes.best, 1.0, 1.0)
    for _ in range(400):
        pose = modes.drawn(generator, batch)
        torch.testing.assert_close(replace(batch, rotation=pose[0]).relative, batch.relative, atol=1e-5, rtol=0)
        draws.append(centre.away(*pose))
    away = torch.stack(draws)
    square = torch.einsum("sni,nij,snj->sn", away, modes.precision[:, 0], away)
    assert abs(float(square.mean()) - 5) < 0.15
    covariance = torch.einsum("sni,snj->nij", away, away) / len(away)
    share = covariance @ modes.precision[:, 0]
    assert float((share - torch.eye(5)).mean(0).abs().max()) < 0.1


def log_ratios(model: CryoModel, guide: PoseMixture, batch: Batch, draws: int) -> Tensor:
    """log p(images, poses) - log q(poses) of each particle at draws from q, less log p of empty images: (draws, n)."""
    pyro.set_rng_seed(0)
    empty = -0.5 * (batch.image / SIGMA).square() - math.log(SIGMA) - 0.5 * math.log(2 * math.pi)
    ratios = []
    for _ in range(draws):
        drawn = poutine.trace(guide).get_trace(batch)
        told = poutine.trace(poutine.replay(model, drawn)).get_trace(batch)
        sums = []
        for trace in (told, drawn):
            trace.compute_log_prob()
            sites = [site for site in trace.nodes.values() if site["type"] == "sample" and site["name"] != "particles"]
            sums.append(sum(site["log_prob"] for site in sites))
        ratios.append(sums[0] - sums[1] - batch.by_particle(empty.sum((1, 2))))
    return torch.stack(ratios)


def test_the_evidence_of_a_particle_is_that_of_importance_sampling(volume: Tensor, batch: Batch, sigma: Tensor) -> None:
    """The densities that model and guide have, against Laplace's approximation; the ELBO is a little below."""
    modes, laplace = climbed_back(volume, batch, sigma)
    with torch.no_grad():
        ratio = log_ratios(Given(volume, SIGMA, SHIFT_SD), PoseMixture(modes, enumerated=False), batch, 300)
    evidence = ratio.logsumexp(0) - math.log(len(ratio))
    assert abs(float((evidence - laplace).mean())) < 0.15  # .22 nats a particle: slices are not smooth
    assert 0.02 < float((evidence - ratio.mean(0)).mean()) < 0.2


def test_components_that_coincide_count_once_a_particle(volume: Tensor, batch: Batch, sigma: Tensor) -> None:
    one, _ = climbed_back(volume, batch, sigma)
    two = PoseModes(*(value.repeat(1, 2, *[1] * (value.dim() - 2)) for value in one.tensors))
    bound, few = TraceEnum_ELBO(max_plate_nesting=1), batch[torch.arange(8)]
    values = []
    for modes in (one, two):
        pyro.set_rng_seed(0)
        with torch.no_grad():
            values.append(
                sum(-bound.loss(Given(volume, SIGMA, SHIFT_SD), PoseMixture(modes), few) for _ in range(200)) / 200
            )
    assert abs(values[1] - values[0]) < 4 * 0.1  # log 2 a particle if they did not


def test_views_are_matched_as_one(volume: Tensor, batch: Batch, sigma: Tensor) -> None:
    """Draws of posteriors that were taken for too narrow weigh more alike; the views of a particle stay together."""
    found, _ = climbed_back(volume, batch, sigma)
    narrow = replace(found, precision=2 * found.precision)
    run = Run(Given(volume, SIGMA, SHIFT_SD), Path, poses=narrow)
    run.guide = guide_of(run.model, narrow)
    better = with_matched_poses(run, batch)
    pyro.set_rng_seed(0)
    before, after = (float(drawn(one, batch, 40, 40).log_weight.var(0).median()) for one in (run, better))
    assert after < 0.5 * before
    modes = better.guide.poses.modes  # type: ignore[union-attr]
    together = batch.relative @ batch.of_images(modes.rotation[batch.first, 0])
    torch.testing.assert_close(modes.rotation[:, 0], together, atol=1e-4, rtol=0)


def test_a_search_adds_up_what_all_images_say(volume: Tensor, batch: Batch, sigma: Tensor) -> None:
    """Log masses of rotations are those of a sum over all shifts of every image."""
    level = Level(1, 2, BOX / 2)
    search = Search(volume, (level,), 4.0, SHIFT_SD, torch.eye(3)[None], peaks=8, apart=0.0)
    found = search(batch, sigma)
    few = (batch.particle < 2).nonzero()[:, 0]
    some = batch[few].band(HalfPlane.of(BOX).count(level.kmax))
    centre = rotation_grid.centres(search.cells, level.rotations)
    shift = shift_grid.centres(search.shifts, level.shifts, 4.0)
    images, turned = [some[torch.tensor([i])] for i in range(len(some))], some.relative[:, None] @ centre
    pairs = zip(images, turned, strict=True)
    grid = fourier_grid(volume)
    each = [log_likelihood(one, grid, SIGMA, there, shift / one.freq_scale) for one, there in pairs]
    by_particle = some.by_particle((torch.stack(each) - 0.5 * (shift / SHIFT_SD).square().sum(1)).logsumexp(2))
    best = by_particle.topk(8, 1)
    torch.testing.assert_close(found.log_mass[few][some.first], best.values, atol=2e-2, rtol=1e-4)
    torch.testing.assert_close(found.rotation[few][some.first, 0], centre[best.indices[:, 0]])
    torch.testing.assert_close(found.rotation[few][1, 0], some.relative[1] @ found.rotation[few][0, 0])
    evidence = by_particle.logsumexp(1) - math.log(len(centre))
    torch.testing.assert_close(found.evidence[few][some.first], evidence, atol=2e-2, rtol=1e-4)


def test_particles_are_searched_whole_however_few_fit(
    volume: Tensor, batch: Batch, sigma: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = (Level(1, 2, 6.0), Level(2, 3, 9.0))
    whole = Search(volume, levels, 4.0, SHIFT_SD, torch.eye(3)[None])(batch, sigma)
    monkeypatch.setattr("pyro_cryo.inference.search.NUMBERS", 1)
    monkeypatch.setattr("pyro_cryo.inference.search.TABLE", 1)
    few = Search(volume, levels, 4.0, SHIFT_SD, torch.eye(3)[None])(batch, sigma)
    torch.testing.assert_close(few.rotation[:, 0], whole.rotation[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(few.evidence, whole.evidence, atol=1e-2, rtol=1e-4)
    error = angle_deg(whole.rotation[:, 0], batch.rotation)
    assert float(error.median()) < rotation_grid.step_deg(2)
    pose = moved(whole.rotation[:, 0], whole.translation[:, 0], torch.zeros(IMAGES, 5))
    torch.testing.assert_close(replace(batch, rotation=pose[0]).relative, batch.relative, atol=1e-5, rtol=0)
