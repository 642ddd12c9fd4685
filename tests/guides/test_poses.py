"""Posteriors of poses: slopes, steps that climb, Gaussians that cover."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from images import blobs, observed
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.guides.landscape import MapLikelihood, climbed
from pyro_cryo.guides.poses import PoseModes, PosePrior, merged, moved
from pyro_cryo.physics.rotations import angle_deg, exp, log, random_rotations
from pyro_cryo.physics.slices import fourier_grid, read_grid, slope_grid

BOX, IMAGES, SIGMA = 24, 200, 0.5


@pytest.fixture(scope="module")
def volume() -> Tensor:
    return blobs(BOX, 11)


@pytest.fixture(scope="module")
def batch(volume: Tensor) -> Batch:
    """Noisy images at known poses, two thirds of a wider field of view."""
    return observed(volume, IMAGES, SIGMA, torch.where(torch.arange(IMAGES) % 3 == 0, 1.0, 0.9))


@pytest.fixture
def sigma() -> Tensor:
    return torch.full((1, BOX // 2 + 1), SIGMA)


def anywhere(batch: Batch, shift_sd: float = 2.0) -> PosePrior:
    n = len(batch)
    return PosePrior(torch.eye(3).expand(n, 3, 3), torch.zeros(n, 2), math.inf, shift_sd)


def single(rotation: Tensor, translation: Tensor) -> PoseModes:
    n = len(rotation)
    return PoseModes(rotation[:, None], translation[:, None], torch.eye(5).expand(n, 1, 5, 5), torch.zeros(n, 1))


def test_slopes_are_the_gradient_of_the_transform(volume: Tensor) -> None:
    points = 4 * torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    grid = slope_grid(volume, oversample=8)
    slope = -2j * math.pi / BOX * read_grid(grid, points, oversample=8)[:, 1:]
    for axis in range(3):
        step = torch.zeros(3)
        step[axis] = 0.05
        after, before = (read_grid(fourier_grid(volume, 8), points + s * step, oversample=8) for s in (1, -1))
        torch.testing.assert_close(slope[:, axis], (after - before) / 0.1, rtol=0.05, atol=0.02)


def test_the_gradient_is_that_of_the_log_density(volume: Tensor, batch: Batch, sigma: Tensor) -> None:
    likely, prior, px = MapLikelihood(slope_grid(volume), sigma), anywhere(batch), 1.5 * torch.ones(IMAGES)
    away = torch.randn(IMAGES, 5, generator=torch.Generator().manual_seed(2)) * torch.tensor([0.05] * 3 + [0.3] * 2)
    pose = moved(batch.rotation, batch.translation / 1.5, away)
    here = likely.at(batch, *pose, px).under(prior, batch, *pose)
    for axis, step in enumerate([0.01] * 3 + [0.05] * 2):
        e = torch.zeros(IMAGES, 5)
        e[:, axis] = step
        beside = [moved(*pose, s * e) for s in (1.0, -1.0)]
        after, before = (likely.at(batch, *there, px).under(prior, batch, *there).value for there in beside)
        slope = (after - before) / (2 * step)
        error = (here.gradient[:, axis] - slope).norm() / slope.norm()
        assert float(error) < 0.1, axis  # slices between nodes of the grid are not smooth


def test_modes_climb_back(volume: Tensor, batch: Batch, sigma: Tensor) -> None:
    generator, slopes, px = torch.Generator().manual_seed(3), slope_grid(volume), torch.ones(IMAGES)
    away = torch.randn(IMAGES, 5, generator=generator) * torch.tensor([math.radians(4)] * 3 + [0.5] * 2)
    prior = anywhere(batch)
    start = single(*moved(batch.rotation, batch.translation, away))
    end, evidence = climbed(batch, MapLikelihood(slopes, sigma), start, prior, px, steps=8)
    rotation, translation = end.best
    sd = torch.linalg.inv(end.precision[:, 0]).diagonal(dim1=1, dim2=2).median(0).values.sqrt()
    assert float(angle_deg(start.best[0], batch.rotation).median()) > 2 * math.degrees(float(sd[:3].norm()))
    assert float(angle_deg(rotation, batch.rotation).median()) < 1.3 * math.degrees(float(sd[:3].norm()))
    assert float((translation - batch.translation).norm(dim=1).median()) < 1.3 * float(sd[3:].norm())
    _, more = climbed(batch, MapLikelihood(slopes, sigma), end, prior, px, steps=4)
    assert bool((more >= evidence - 1e-2).all())


def test_the_gaussian_about_a_mode_covers_the_truth(volume: Tensor, batch: Batch, sigma: Tensor) -> None:
    """(mode - truth)' precision (mode - truth) is chi-square with 5 degrees of freedom where the map is true."""
    px, prior = torch.ones(IMAGES), anywhere(batch, shift_sd=100.0)
    end, _ = climbed(
        batch, MapLikelihood(slope_grid(volume), sigma), single(batch.rotation, batch.translation), prior, px, steps=8
    )
    away = PosePrior(batch.rotation, batch.translation, 1.0, 1.0).away(*end.best)
    square = torch.einsum("ni,nij,nj->n", away, end.precision[:, 0], away)
    assert abs(float(square.mean()) - 5) < 4 * (10 / IMAGES) ** 0.5
    inside = (square < 9.236).float().mean()  # where 90% of chi-square are
    assert abs(float(inside) - 0.9) < 4 * (0.09 / IMAGES) ** 0.5


def test_modes_weigh_by_their_mass(volume: Tensor, batch: Batch, sigma: Tensor) -> None:
    """A mode elsewhere loses its weight; one that is not there keeps none."""
    turned = torch.stack([batch.rotation, exp(torch.tensor([0.0, 1.5, 0.0])) @ batch.rotation, batch.rotation], 1)
    weight = torch.tensor([0.5, 0.5, 0.0]).log().expand(IMAGES, 3)
    modes = PoseModes(
        turned, batch.translation[:, None].expand(-1, 3, -1), torch.eye(5).expand(IMAGES, 3, 5, 5), weight
    )
    end, _ = climbed(
        batch, MapLikelihood(slope_grid(volume), sigma), modes, anywhere(batch), torch.ones(IMAGES), steps=3
    )
    share = end.log_weight.exp()
    torch.testing.assert_close(share.sum(1), torch.ones(IMAGES))
    assert float(share[:, 0].mean()) > 0.99
    assert bool((share[:, 2] == 0).all())


def test_draws_have_the_covariance_of_the_mode() -> None:
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(5, 5, generator=generator)
    precision = 400 * (factor @ factor.T + torch.eye(5))
    n = 20_000
    rotation = random_rotations(1, generator).expand(n, 3, 3)
    modes = replace(single(rotation, torch.zeros(n, 2)), precision=precision.expand(n, 1, 5, 5))
    away = PosePrior(rotation, torch.zeros(n, 2), 1.0, 1.0).away(*modes.drawn(generator))
    torch.testing.assert_close(away.T.cov() @ precision, torch.eye(5), atol=0.06, rtol=0)


def test_a_narrow_prior_holds_poses(volume: Tensor, batch: Batch, sigma: Tensor) -> None:
    prior = PosePrior(batch.rotation, batch.translation, 1e-4, 1e-3)
    start = single(*moved(batch.rotation, batch.translation, 0.02 * torch.ones(IMAGES, 5)))
    end, _ = climbed(batch, MapLikelihood(slope_grid(volume), sigma), start, prior, torch.ones(IMAGES), steps=8)
    assert float(angle_deg(end.best[0], batch.rotation).max()) < 0.1


def test_modes_on_one_peak_are_one(batch: Batch) -> None:
    near, far = (
        exp(torch.tensor([0.0, 0.0, 0.01])) @ batch.rotation,
        exp(torch.tensor([0.0, 0.5, 0.0])) @ batch.rotation,
    )
    rotation = torch.stack([near, far, batch.rotation], 1)
    weight = torch.tensor([0.3, 0.2, 0.5]).log().expand(IMAGES, 3)
    precision = torch.diag(torch.tensor([2500.0] * 3 + [25.0] * 2)).expand(IMAGES, 3, 5, 5)
    one = merged(PoseModes(rotation, torch.zeros(IMAGES, 3, 2), precision, weight))
    torch.testing.assert_close(one.best[0], batch.rotation)
    share = one.log_weight.exp().sort(1, descending=True).values
    torch.testing.assert_close(share[0], torch.tensor([0.5, 0.2, 0.0]))


def test_spread_and_entropy_are_those_of_draws() -> None:
    """Two modes 40 degrees and 3 pixels apart, of weights .7 and .3."""
    generator = torch.Generator().manual_seed(3)
    turn = exp(torch.tensor([math.radians(40.0), 0.0, 0.0]))
    rotation = torch.stack([torch.eye(3), turn]).expand(1, 2, 3, 3)
    translation = torch.tensor([[[0.0, 0.0], [0.0, 3.0]]])
    root = 0.3 * torch.randn(2, 5, 5, generator=generator) + torch.diag(torch.tensor([30.0] * 3 + [3.0] * 2))
    modes = PoseModes(rotation, translation, (root @ root.mT)[None], torch.tensor([[0.7, 0.3]]).log())
    n = 40_000
    many = PoseModes(*(value.expand(n, *value.shape[1:]) for value in modes.tensors))
    drawn, moved_to = many.drawn(generator)
    spread = modes.spread
    angle = angle_deg(drawn, torch.eye(3)).square().mean().sqrt()
    torch.testing.assert_close(spread.angle_deg[0], angle, rtol=0.02, atol=0)
    torch.testing.assert_close(spread.shift_px[0], moved_to.square().sum(1).mean().sqrt(), rtol=0.02, atol=0)
    density = torch.zeros(n)
    for k in range(2):
        away = torch.cat([log(drawn @ rotation[0, k].mT), moved_to - translation[0, k]], 1)
        normal = torch.distributions.MultivariateNormal(torch.zeros(5), precision_matrix=modes.precision[0, k])
        density = density + modes.log_weight[0, k].exp() * normal.log_prob(away).exp()
    assert float(spread.entropy[0]) == pytest.approx(-float(density.log().mean()), abs=0.03)


def test_a_peak_counts_once(volume: Tensor, batch: Batch, sigma: Tensor) -> None:
    """The evidence of two modes that climb to one peak is that of one."""
    slopes, px, prior = slope_grid(volume), torch.ones(IMAGES), anywhere(batch)
    one = single(*moved(batch.rotation, batch.translation, 0.01 * torch.ones(IMAGES, 5)))
    other = moved(batch.rotation, batch.translation, -0.01 * torch.ones(IMAGES, 5))
    two = PoseModes(
        torch.stack([one.rotation[:, 0], other[0]], 1),
        torch.stack([one.translation[:, 0], other[1]], 1),
        one.precision.expand(-1, 2, 5, 5),
        torch.full((IMAGES, 2), 0.5).log(),
    )
    end, of_one = climbed(batch, MapLikelihood(slopes, sigma), one, prior, px, steps=8)
    both, of_two = climbed(batch, MapLikelihood(slopes, sigma), two, prior, px, steps=8)
    assert float((both.log_weight.exp()[:, 0] > 0.999).float().mean()) > 0.9
    assert float((of_two - of_one).median().abs()) < 0.05
    assert bool((end.log_weight == 0).all())
