"""Draws of several maps together: against the dense posterior, with coefficients known."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pyro_cryo.physics.fourier import HalfPlane, soft_disc
from pyro_cryo.physics.rotations import random_rotations
from pyro_cryo.physics.slices import add_to_grid, fourier_grid, fourier_grid_adjoint, read_grid, slice_coordinates
from pyro_cryo.volumes.conjugate import NormalEquations
from pyro_cryo.volumes.joint import JointPosterior

BOX, IMAGES, SIGMA = 8, 500, 2.0
SCALE = torch.stack([soft_disc(BOX, 2, 2, dims=3), soft_disc(BOX, 1, 2, dims=3)]).clamp_min(0.05)
TAU = torch.tensor([[2.0, 2.0, 1.5, 1.0, 0.5], [1.0, 1.0, 0.8, 0.6, 0.3]])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass
class Case:
    """Images of y_1 V_1 + y_2 V_2 with y known: what a step needs, and the dense posterior of both maps' voxels."""

    points: Tensor
    y: Tensor
    image: Tensor
    posterior: JointPosterior
    mean: Tensor
    covariance: Tensor

    def score(self, maps: Tensor) -> Tensor:
        """The gradient of the log likelihood by both maps (2, D, D, D)."""
        slices = torch.stack([read_grid(fourier_grid(one), self.points) for one in maps], -1)
        left = (self.image - (slices * self.y[:, None]).sum(-1)) / SIGMA**2
        return torch.stack([adjoint(self.points, left * self.y[:, c, None]) for c in range(2)])


def adjoint(points: Tensor, values: Tensor) -> Tensor:
    grid = torch.zeros(2 * BOX, 2 * BOX, BOX + 1, dtype=torch.complex64)
    add_to_grid(grid, points, values)
    return fourier_grid_adjoint(grid, BOX)


@pytest.fixture(scope="module")
def case() -> Case:
    generator = seeded(0)
    half = HalfPlane.of(BOX)
    points = slice_coordinates(random_rotations(IMAGES, generator), half.k)
    # coefficients whose second moment couples the maps
    y = torch.stack([torch.ones(IMAGES), 0.5 + torch.randn(IMAGES, generator=generator)], 1)
    weight = NormalEquations.empty(BOX)
    add_to_grid(weight.weight, points, torch.full((IMAGES, len(half)), 1 / SIGMA**2))
    alone = [weight.posterior(scale, tau) for scale, tau in zip(SCALE, TAU, strict=True)]
    posterior = JointPosterior.of(alone, (y.T @ y) / IMAGES)
    white = torch.eye(BOX**3).view(-1, BOX, BOX, BOX)
    # voxels of V = root e, e white
    root = torch.block_diag(*(p.to_map(white).flatten(1).T for p in alone)).double()
    unit = torch.stack([read_grid(fourier_grid(voxel), points) for voxel in white], -1)
    rows = torch.view_as_real(unit).transpose(-1, -2).flatten(1, 2)  # (images, 2 P, voxels)
    flat, each = rows.flatten(0, 1), y[:, None].expand(-1, rows.shape[1], -1).flatten(0, 1)
    told = [[flat.T @ (flat * (each[:, i] * each[:, j])[:, None]) for j in range(2)] for i in range(2)]
    precision = root.T @ torch.cat([torch.cat(line, 1) for line in told]).double() @ root / SIGMA**2
    covariance = root @ torch.linalg.inv(precision + torch.eye(len(root))) @ root.T
    truth = (root @ torch.randn(len(root), generator=generator, dtype=torch.float64)).float().view(2, -1)
    seen = ((flat @ truth.T) * each).sum(1) + SIGMA * torch.randn(len(flat), generator=generator)
    mean = covariance @ torch.cat([flat.T @ (seen * each[:, c]) for c in range(2)]).double() / SIGMA**2
    image = torch.view_as_complex(seen.view(IMAGES, -1, 2).contiguous())
    return Case(points, y, image, posterior, mean, covariance)


def test_a_chain_of_draws_has_the_mean_and_covariance_of_the_dense_posterior(case: Case) -> None:
    generator, draws = seeded(1), []
    maps = torch.zeros(2, BOX, BOX, BOX)
    e = case.posterior.climbed(maps, case.score(maps))
    for step in range(125):
        maps = case.posterior.to_maps(e)
        e = case.posterior.drawn(e, case.score(maps), generator)
        if step >= 5:
            draws.append(maps.flatten())
    error = torch.stack(draws).double() - case.mean
    value, axes = torch.linalg.eigh(case.covariance)
    kept = value > 1e-6 * value[-1]  # what neither prior nor images let vary is noise of single precision
    along = (error @ axes)[:, kept]
    variance, offset = along.square().mean(0) / value[kept], along.mean(0) / value[kept].sqrt()
    bands = torch.stack([band.mean() for band in variance.chunk(6)])
    print("variance over the dense one, from the best known on:", *[f"{float(b):.3f}" for b in bands])
    torch.testing.assert_close(bands, torch.ones_like(bands), rtol=0, atol=0.08)
    assert float(offset.square().mean()) == pytest.approx(1 / len(draws), rel=0.3)  # of independent draws
    halves = case.covariance.chunk(2)[0].chunk(2, 1)[1]  # between the maps
    found = (error.T @ error / len(error)).chunk(2)[0].chunk(2, 1)[1]
    assert float((found * halves).sum() / halves.square().sum()) == pytest.approx(1.0, abs=0.15)


def test_a_scale_that_ends_within_the_box_is_refused() -> None:
    weight = NormalEquations.empty(BOX)
    alone = weight.posterior(soft_disc(BOX, 1, 1, dims=3), torch.ones(BOX // 2 + 1))
    with pytest.raises(ValueError, match="zero towards the edge"):
        JointPosterior.of([alone], torch.eye(1))
