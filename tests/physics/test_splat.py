"""The transform of points is the sum of their waves, in images and in maps, and moves with them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_cryo.physics.fourier import HalfPlane, shift_phase
from pyro_cryo.physics.splat import project_points, splat, transform_points

BOX = 32


def points(dims: int, count: int = 200) -> tuple[Tensor, Tensor]:
    """A ball of points, some of them beyond the edge, and their masses."""
    generator = torch.Generator().manual_seed(0)
    return 6 * torch.randn(2, count, dims, generator=generator), torch.rand(count, generator=generator)


def summed(position: Tensor, weight: Tensor, k: Tensor) -> Tensor:
    phase = (-2 * math.pi / BOX) * (k @ position.mT)
    return torch.polar((weight / BOX).expand_as(phase), phase).sum(-1)


def test_mass_is_conserved_and_lies_where_the_points_are() -> None:
    position, weight = torch.tensor([[1.0, 2.0], [-0.75, 0.5]]), torch.tensor([1.0, 2.0])
    grid = splat(position, weight, 8)
    expected = torch.zeros(8, 8)
    expected[2, 1] = 1.0
    expected[0, 7], expected[1, 7] = 2 * 0.5 * 0.75, 2 * 0.5 * 0.75  # y-x, and -1 is the last column
    expected[0, 0], expected[1, 0] = 2 * 0.5 * 0.25, 2 * 0.5 * 0.25
    torch.testing.assert_close(grid, expected)


def test_an_image_is_the_sum_of_the_points_waves() -> None:
    position, weight = points(2)
    half = HalfPlane.of(BOX)
    k = half.k[: half.count(BOX / 4)]
    found, expected = project_points(position, weight, k, BOX), summed(position, weight, k)
    assert found.shape == (2, len(k))
    assert float((found - expected).norm() / expected.norm()) < 0.02
    finer = project_points(position, weight, k, BOX, oversample=8)
    assert float((finer - expected).norm() / expected.norm()) < 1e-3


def test_a_map_is_the_sum_of_the_points_waves() -> None:
    position, weight = points(3)
    half = BOX // 2
    axis = torch.arange(-half, half).float()
    kz, ky, kx = torch.meshgrid(axis, axis, torch.arange(half + 1).float(), indexing="ij")
    k = torch.stack([kx, ky, kz], -1)
    near = k.norm(dim=-1) <= BOX / 4
    found, expected = transform_points(position, weight, BOX)[:, near], summed(position, weight, k[near])
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_points_that_move_together_shift_the_image() -> None:
    position, weight = points(2)
    half = HalfPlane.of(BOX)
    k = half.k[: half.count(6)]
    shift = torch.tensor([1.3, -2.6])
    moved = project_points(position + shift, weight, k, BOX, oversample=4)
    expected = project_points(position, weight, k, BOX, oversample=4) * shift_phase(k, shift, BOX)
    torch.testing.assert_close(moved, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


def test_gradients_reach_positions_and_masses() -> None:
    """Those of the sum of waves, for what is smooth on the scale of a cell."""
    position, weight = points(2, 50)
    half = HalfPlane.of(BOX)
    k = half.k[: half.count(5)]
    target = torch.randn(2, len(k), dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    found: list[Tensor] = []
    for of in (lambda x, w: project_points(x, w, k, BOX, oversample=8), lambda x, w: summed(x, w, k)):
        x, w = position.clone().requires_grad_(), weight.clone().requires_grad_()
        (of(x, w) * target.conj()).real.sum().backward()
        found += [x.grad, w.grad]  # type: ignore[list-item]
    for fast, exact in zip(found[:2], found[2:], strict=True):
        assert float((fast - exact).norm() / exact.norm()) < 0.1
        assert float(exact.norm()) > 0
