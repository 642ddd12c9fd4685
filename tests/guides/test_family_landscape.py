"""What images say about their poses in a family of maps, its coefficients integrated out."""

from __future__ import annotations

import pytest
import torch
from images import blobs, observed
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.distributions.image import LowRankFourier
from pyro_cryo.guides.coefficients import LinearCoefficients
from pyro_cryo.guides.family_landscape import FamilyLikelihood
from pyro_cryo.guides.landscape import Landscape, MapLikelihood
from pyro_cryo.guides.poses import moved
from pyro_cryo.model import form_image
from pyro_cryo.physics.fourier import HalfPlane, resize
from pyro_cryo.physics.slices import fourier_grid, read_grid, slice_coordinates, slope_grid

BOX, SIDE, IMAGES, SIGMA = 24, 16, 120, 0.5
MAPS = 3


@pytest.fixture(scope="module")
def maps() -> Tensor:
    """A map, and others that are added to it."""
    one = blobs(BOX, 8)
    return torch.stack([one, 0.6 * one.flip(0), 0.5 * one.transpose(0, 1)])


@pytest.fixture(scope="module")
def batch(maps: Tensor) -> Batch:
    """Images of one member of the family, some of a wider field of view."""
    scale = torch.where(torch.arange(IMAGES) % 3 == 0, 1.0, 0.9)
    return observed(maps[0] + 0.8 * maps[1] - 1.1 * maps[2], IMAGES, SIGMA, scale)


@pytest.fixture
def sigma() -> Tensor:
    return torch.full((1, BOX // 2 + 1), SIGMA)


def family(maps: Tensor, sigma: Tensor, side: int, contrast: float = 0.0) -> FamilyLikelihood:
    """The family on a box of `side` pixels, the first map alone beyond its band."""
    small = resize(maps, side)
    slopes = torch.stack([slope_grid(one) for one in small], -1).flatten(3)
    count = int(HalfPlane.of(BOX).count(side / 2 - 1e-3))
    beyond = MapLikelihood(slope_grid(maps[0]), sigma)
    return FamilyLikelihood(slopes, LinearCoefficients(contrast), sigma, BOX / side, count, beyond)


def poses(batch: Batch, seed: int = 2) -> tuple[Tensor, Tensor]:
    away = torch.randn(IMAGES, 5, generator=torch.Generator().manual_seed(seed))
    return moved(batch.rotation, batch.translation, away * torch.tensor([0.05] * 3 + [0.3] * 2))


def differences(likelihood: FamilyLikelihood, batch: Batch, px: Tensor) -> tuple[Landscape, Tensor]:
    """The landscape at poses, and its gradient by differences."""
    pose, slopes = poses(batch), []
    for axis, step in enumerate([0.01] * 3 + [0.05] * 2):
        e = torch.zeros(IMAGES, 5)
        e[:, axis] = step
        beside = [likelihood.at(batch, *moved(*pose, s * e), px).value for s in (1.0, -1.0)]
        slopes.append((beside[0] - beside[1]) / (2 * step))
    return likelihood.at(batch, *pose, px), torch.stack(slopes, 1)


@pytest.mark.parametrize(("side", "contrast"), [(BOX, 0.0), (SIDE, 0.0), (SIDE, 0.2)])
def test_the_gradient_is_that_of_the_evidence(
    maps: Tensor, batch: Batch, sigma: Tensor, side: int, contrast: float
) -> None:
    here, slope = differences(family(maps, sigma, side, contrast), batch, torch.ones(IMAGES))
    error = (here.gradient - slope).norm(dim=0) / slope.norm(dim=0)
    assert float(error.max()) < 0.1  # slices between nodes of the grid are not smooth


def test_coefficients_are_integrated_out(maps: Tensor, batch: Batch, sigma: Tensor) -> None:
    """The evidence is that of an image whose covariance has low rank."""
    rotation, translation = poses(batch)
    points = slice_coordinates(rotation, batch.half.k, batch.freq_scale)
    images = [form_image(torch.view_as_real(read_grid(fourier_grid(m), points)), translation, batch) for m in maps]
    wide = torch.full((1, 1, 1), SIGMA)
    full = LowRankFourier(images[0], torch.stack(images[1:], -1), wide).log_prob(batch.image)
    empty = torch.distributions.Normal(0.0, SIGMA).log_prob(batch.image).sum((1, 2))
    here = family(maps, sigma, BOX).at(batch, rotation, translation, torch.ones(IMAGES))
    torch.testing.assert_close(here.value, full - empty, rtol=1e-3, atol=0.05)


def test_the_information_is_what_the_coefficients_leave(maps: Tensor, batch: Batch, sigma: Tensor) -> None:
    """Its inverse is the covariance of the pose in the joint Gaussian of pose and coefficients."""
    likelihood, px = family(maps, sigma, BOX), torch.ones(IMAGES)
    rotation, translation = poses(batch)
    points = slice_coordinates(rotation, batch.half.k, batch.freq_scale)
    y = torch.cat([torch.ones(IMAGES, 1), torch.tensor([[0.8, -1.1]]).expand(IMAGES, 2)], 1)
    basis = torch.stack(
        [form_image(torch.view_as_real(read_grid(fourier_grid(m), points)), translation, batch) for m in maps[1:]], -1
    ).flatten(1, 2)
    sd = torch.full((IMAGES, 1), SIGMA)
    mean = MapLikelihood(slope_grid((y[0, :, None, None, None] * maps).sum(0)), sigma)
    alone = mean.at(batch, rotation, translation, px).information
    cross = []
    for axis in range(5):
        e = torch.zeros(IMAGES, 5)
        e[:, axis] = 1e-3
        there = moved(rotation, translation, e)
        grid = fourier_grid((y[0, :, None, None, None] * maps).sum(0))
        ends = [
            form_image(
                torch.view_as_real(read_grid(grid, slice_coordinates(r, batch.half.k, batch.freq_scale))), t, batch
            )
            for r, t in (there, (rotation, translation))
        ]
        cross.append(((ends[0] - ends[1]) / 1e-3).flatten(1))
    slopes = torch.stack(cross, 1) / sd[..., None]
    white = basis / sd[..., None]
    inner = white.mT @ white + torch.eye(MAPS - 1)
    left = alone - (slopes @ white) @ torch.linalg.solve(inner, (slopes @ white).mT)
    here = likelihood.at(batch, rotation, translation, px).information
    ratio = here.diagonal(dim1=1, dim2=2) / left.diagonal(dim1=1, dim2=2)
    assert float((ratio.log().abs() > 0.3).float().mean()) < 0.1
    assert bool((torch.linalg.eigvalsh(here) > 0).all())
    less = here.diagonal(dim1=1, dim2=2).sum(1) / alone.diagonal(dim1=1, dim2=2).sum(1)
    assert float(less.median()) < 0.97


def test_a_basis_on_a_small_box_is_that_on_the_large_one(maps: Tensor, batch: Batch, sigma: Tensor) -> None:
    """Where the maps show nothing beyond its band."""
    coarse, low = resize(resize(maps, SIDE), BOX), batch.band(int(HalfPlane.of(BOX).count(SIDE / 2 - 1.5)))
    pose, px = poses(batch), torch.ones(IMAGES)
    large, small = (family(coarse, sigma, side).at(low, *pose, px) for side in (BOX, SIDE))
    for a, b in zip(vars(large).values(), vars(small).values(), strict=True):
        assert float((a - b).norm() / a.norm()) < 0.05
