"""The nested grid of shifts."""

import math

import pytest
import torch

from pyro_cryo.physics import shift_grid as grid

EXTENT = 7.3


@pytest.mark.parametrize("level", [0, 1, 4])
def test_centres_are_a_square_lattice_and_in_their_cells(level: int) -> None:
    cell = grid.cells(level)
    centre = grid.centres(cell, level, EXTENT, torch.float64)
    n, step = 2**level, grid.step_px(level, EXTENT)
    axis = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * step
    expected = torch.cartesian_prod(axis, axis)
    assert n * step == pytest.approx(2 * EXTENT)
    order = (centre[:, 1] + 100 * centre[:, 0]).argsort()
    torch.testing.assert_close(centre[order], expected)
    assert torch.equal(grid.cell_of(centre.float(), level, EXTENT), cell)


def test_the_first_child_is_a_step_in_x() -> None:
    centre = grid.centres(torch.arange(4), 1, 2.0)
    assert centre.tolist() == [[-1, -1], [1, -1], [-1, 1], [1, 1]]


def test_children_tile_their_parent() -> None:
    shift = EXTENT * (2 * torch.rand(5000, 2, generator=torch.Generator().manual_seed(0)) - 1)
    parent, inner = grid.cell_of(shift, 3, EXTENT), grid.cell_of(shift, 4, EXTENT)
    assert torch.equal((grid.children(parent) == inner[:, None]).sum(-1), torch.ones_like(parent))
    assert torch.equal(grid.children(grid.cells(2)).flatten(), grid.cells(3))


def test_draws_are_uniform_in_their_cell() -> None:
    cell = torch.arange(16).repeat(4000)
    shift = grid.uniform_in(cell, 2, EXTENT, torch.Generator().manual_seed(1))
    assert (grid.cell_of(shift, 2, EXTENT) == cell).double().mean() > 0.9999  # rounding at a border
    inside = (shift - grid.centres(cell, 2, EXTENT)) / grid.step_px(2, EXTENT)
    torch.testing.assert_close(inside.mean(0), torch.zeros(2), rtol=0, atol=0.006)
    torch.testing.assert_close(torch.cov(inside.T), torch.eye(2) / 12, rtol=0, atol=0.002)


def test_shifts_outside_go_to_the_border() -> None:
    shift = torch.tensor([[50.0, 0.1], [-50.0, -50.0], [EXTENT, EXTENT]])
    found = grid.centres(grid.cell_of(shift, 1, EXTENT), 1, EXTENT)
    torch.testing.assert_close(found, EXTENT / 2 * torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, 1.0]]))


@pytest.mark.parametrize("level", [0, 1, 3, 5])
def test_the_disc_is_covered_and_little_else(level: int) -> None:
    kept = grid.disc(level)
    g = torch.Generator().manual_seed(2)
    radius, turn = torch.rand(20_000, generator=g).sqrt(), 2 * math.pi * torch.rand(20_000, generator=g)
    shift = EXTENT * radius[:, None] * torch.stack([turn.cos(), turn.sin()], -1)
    held = torch.bincount(grid.cell_of(shift, level, EXTENT), minlength=grid.count(level))
    assert torch.isin(held.nonzero()[:, 0], kept).all()
    half = math.sqrt(0.5) * grid.step_px(level, EXTENT)
    assert float(grid.centres(kept, level, EXTENT).norm(dim=-1).max()) < EXTENT + half
    assert len(kept) == {0: 1, 1: 4, 3: 60, 5: 856}[level]
