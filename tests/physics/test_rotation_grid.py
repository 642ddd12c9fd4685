"""The nested grid of rotations: a partition into cells that are equal, compact and nested."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from pyro_cryo.physics import healpix
from pyro_cryo.physics import rotation_grid as grid
from pyro_cryo.physics.rotations import (
    angle_deg,
    from_euler_deg,
    log,
    orthogonality_error,
    point_group,
    random_rotations,
    to_euler_deg,
)


def haar(n: int, seed: int) -> Tensor:
    return random_rotations(n, torch.Generator().manual_seed(seed))


def some(level: int, n: int = 20_000) -> Tensor:
    return torch.randint(grid.count(level), (n,), generator=torch.Generator().manual_seed(level))


def near_the_poles(n: int, degrees: float) -> Tensor:
    """Rotations that view to within some degrees from either pole."""
    rng = np.random.default_rng(0)
    tilt = rng.uniform(0, degrees, n)
    tilt[::2] = 180 - tilt[::2]
    return torch.from_numpy(from_euler_deg(np.stack([rng.uniform(0, 360, n), tilt, rng.uniform(0, 360, n)], 1)))


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_every_centre_is_in_its_cell(level: int) -> None:
    cell = grid.cells(level)
    assert len(cell) == grid.count(level) == 72 * 8**level
    centre = grid.centres(cell, level)
    assert centre.dtype == torch.float32
    assert orthogonality_error(centre) < 1e-6
    assert torch.equal(grid.cell_of(centre, level), cell)


@pytest.mark.parametrize("level", [5, 7, 9, 12])
def test_fine_levels_are_exact_in_single_precision(level: int) -> None:
    cell = some(level)
    drawn = grid.uniform_in(cell, level, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32
    assert torch.equal(grid.cell_of(grid.centres(cell, level), level), cell)
    assert torch.equal(grid.cell_of(drawn, level), cell)


def test_levels_beyond_what_integers_hold_are_refused() -> None:
    last = torch.tensor([grid.count(18) - 1])
    assert torch.equal(grid.cell_of(grid.centres(last, 18, torch.float64), 18), last)
    with pytest.raises(ValueError, match="level 19 of the grid of rotations; expected 0 to 18"):
        grid.count(19)


def test_shapes_of_any_batch() -> None:
    cell = torch.tensor([[3, 500], [7, 575]])
    assert grid.children(cell).shape == (2, 2, 8)
    assert grid.centres(cell, 1).shape == grid.uniform_in(cell, 1).shape == (2, 2, 3, 3)
    assert torch.equal(grid.cell_of(grid.centres(cell, 1), 1), cell)
    assert int(grid.cell_of(grid.centres(cell[1, 1], 1), 1)) == 575


def test_directions_are_relions_and_turns_are_psi() -> None:
    """(rot, tilt) are the pixel's centre; psi is the turn at centres of faces, and grows with the turn elsewhere."""
    euler = to_euler_deg(grid.centres(torch.arange(72), 0, torch.float64).numpy())
    z = healpix.centre(torch.arange(12), 0).numpy()
    rot, tilt = np.degrees(np.arctan2(z[:, 1], z[:, 0])), np.degrees(np.arccos(z[:, 2]))
    np.testing.assert_allclose(euler[:, 0] % 360, np.repeat(rot % 360, 6), atol=1e-9)
    np.testing.assert_allclose(euler[:, 1], np.repeat(tilt, 6), atol=1e-9)
    np.testing.assert_allclose(euler[:, 2] % 360, np.tile(30 + 60 * np.arange(6.0), 12), atol=1e-9)

    cell = grid.cells(2)
    euler = to_euler_deg(grid.centres(cell, 2, torch.float64).numpy())
    next_turn = to_euler_deg(grid.centres(cell[cell % 8 < 4] + 4, 2, torch.float64).numpy())
    np.testing.assert_allclose(next_turn[:, :2], euler[cell % 8 < 4][:, :2], atol=1e-9)
    np.testing.assert_allclose((next_turn - euler[cell % 8 < 4])[:, 2] % 360, grid.step_deg(2), atol=1e-9)


@pytest.mark.parametrize("level", [0, 2, 5])
def test_children_tile_their_parent(level: int) -> None:
    """All cells of the next level are some cell's children; a rotation is in one of them where it is in the parent."""
    child = grid.children(some(level, 2000))
    assert torch.equal(child // 8, some(level, 2000)[:, None].expand(-1, 8))
    assert torch.equal(grid.children(grid.cells(1)).flatten(), grid.cells(2))
    assert torch.equal(grid.cell_of(grid.centres(child, level + 1), level), some(level, 2000)[:, None].expand(-1, 8))
    for rotation in (haar(20_000, 0), near_the_poles(5000, 20)):
        parent, inner = grid.cell_of(rotation, level), grid.cell_of(rotation, level + 1)
        assert torch.equal((grid.children(parent) == inner[:, None]).sum(-1), torch.ones_like(parent))


@pytest.mark.parametrize("level", [0, 1])
def test_cells_have_equal_volumes(level: int) -> None:
    drawn = torch.bincount(grid.cell_of(haar(100_000, 1), level), minlength=grid.count(level))
    assert stats.chisquare(drawn.numpy()).pvalue > 1e-3


def test_draws_in_a_cell_are_those_of_the_haar_measure_that_fall_there() -> None:
    """Mean and spread of the nine matrix elements, against draws that owe nothing to the grid."""
    rotation = haar(400_000, 2)
    cell = grid.cell_of(rotation, 0)
    for c in (0, 27, 70):
        kept = rotation[cell == c].flatten(1)
        drawn = grid.uniform_in(torch.full((20_000,), c), 0, torch.Generator().manual_seed(c)).flatten(1)
        error = kept.std(0) * math.sqrt(1 / len(kept) + 1 / len(drawn))
        assert float(((drawn.mean(0) - kept.mean(0)) / error).abs().max()) < 4
        torch.testing.assert_close(drawn.std(0), kept.std(0), rtol=0.04, atol=0)


@pytest.mark.parametrize("level", [0, 1, 3, 5])
def test_cells_are_compact_everywhere(level: int) -> None:
    """Within 1.3 steps of their centre, also at the poles, where cells of RELION's psi reach 45 degrees."""
    for rotation in (haar(50_000, 3).double(), near_the_poles(20_000, 2 * grid.step_deg(level) / 3)):
        centre = grid.centres(grid.cell_of(rotation, level), level, torch.float64)
        assert float(angle_deg(rotation, centre).max()) < 1.3 * grid.step_deg(level)


def test_the_sum_over_centres_is_the_integral() -> None:
    """A tangent Gaussian of sd step / 1.3 has the mean 1 over the cells; within a pixel of a pole it is 9% off."""
    level = 2
    sd = math.radians(grid.step_deg(level) / 1.3)
    where = torch.cat([haar(60, 4).double(), near_the_poles(20, 60)])
    polar = where[:, 2, 2].abs() > math.cos(math.radians(25))
    assert 5 < int(polar.sum()) < 20
    centre = grid.centres(grid.cells(level), level, torch.float64)
    v = log(centre @ where[:, None].mT)
    a = v.norm(dim=-1)
    # Haar measure = 2 (1 - cos a) / a^2 dv / 8 pi^2.
    haar_density = (1 - a.cos()) / (4 * math.pi**2 * a.square())
    density = (-0.5 * (a / sd).square()).exp() / (2 * math.pi * sd**2) ** 1.5 / haar_density
    error = (density.mean(-1) - 1).abs()
    assert float(error[~polar].max()) < 0.015
    assert float(error[polar].max()) < 0.1
    drawn = grid.uniform_in(grid.cells(3), 3, torch.Generator().manual_seed(6), torch.float64)
    assert float(drawn.mean(0).abs().max()) < 1e-3  # E R = 0, and strata take the noise out


GROUPS = {"C1": 1, "C2": 2, "C3": 3, "C4": 4, "D2": 4, "T": 12, "O": 24, "I": 60}


@pytest.mark.parametrize("name", GROUPS)
def test_symmetry_leaves_one_of_each_orbit(name: str) -> None:
    """About one in G of the cells, which hold one equivalent of a rotation but near the border; `covering` one or two.

    Turns by 90 degrees about z and half turns about x take the grid to itself: there all is exact.
    """
    level, group, order = 2, point_group(name), GROUPS[name]
    kept, covering = grid.cells(level, group), grid.covering(level, group)
    share = len(kept) * order / grid.count(level)
    orbit = grid.cell_of(haar(4000, 5)[:, None] @ group, level)
    held = torch.isin(orbit, kept).sum(-1)
    assert float(held.double().mean()) == pytest.approx(share, abs=0.02)
    if name in ("C1", "C2", "C4", "D2"):
        assert share == 1
        assert (held == 1).all()
        assert torch.equal(covering, kept)
    assert share == pytest.approx(1, abs=0.13)
    assert float((held == 1).double().mean()) > 0.75
    assert torch.isin(kept, covering).all()
    assert float((torch.isin(orbit, covering).sum(-1) >= 1).double().mean()) > 0.999
    assert len(covering) * order < 1.6 * grid.count(level)


@pytest.mark.parametrize("name", ["C2", "C4", "D2", "D4", "T", "O", "I"])
@pytest.mark.parametrize("level", [1, 3])
def test_rounding_does_not_decide_which_cells_are_kept(name: str, level: int) -> None:
    group = point_group(name)
    noise = 1e-6 * torch.randn(group.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(grid.cells(level, group), grid.cells(level, group + noise))


@pytest.mark.parametrize("name", ["C1", "C2", "I"])
def test_cells_of_a_group_come_in_order(name: str) -> None:
    for found in (grid.cells(1, point_group(name)), grid.covering(1, point_group(name))):
        assert (found.diff() > 0).all()
