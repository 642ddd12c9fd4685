"""A nested grid of shifts: level r cuts the square |x|, |y| <= extent_px into 2^r x 2^r cells, each with 4 children.

Numbers do not depend on the extent. A descent in poses takes a step of both grids: a pair of a cell of rotations
and a cell of shifts has the 8 x 4 pairs of their children.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_cryo.physics import nested


def count(level: int) -> int:
    """Number of cells of a level."""
    return 4**level


def step_px(level: int, extent_px: float) -> float:
    """Side of a cell in pixels."""
    return 2 * extent_px / 2**level


def cells(level: int, device: torch.device | str | None = None) -> Tensor:
    """All cells of a level: (4^level,) int64."""
    return torch.arange(count(level), device=device)


def disc(level: int, device: torch.device | str | None = None) -> Tensor:
    """The cells of a level (n,) int64, in order, that meet the disc of radius extent_px: they cover it."""
    cell = cells(level, device)
    nearest = (centres(cell, level, 1.0, torch.float64).abs() - 0.5**level).clamp_min(0)
    return cell[nearest.square().sum(-1) < 1]


def children(cell: Tensor) -> Tensor:
    """The cells of the next level in each cell (*batch,): (*batch, 4), from 4 cell on. The parent is cell // 4."""
    return nested.children(cell, 2)


def centres(cell: Tensor, level: int, extent_px: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Shifts (*batch, 2), x and y in pixels, at the centres of cells (*batch,) of a level."""
    index = torch.stack(nested.separate(cell, 2, level), -1).double()
    return ((index + 0.5) * step_px(level, extent_px) - extent_px).to(dtype)


def uniform_in(cell: Tensor, level: int, extent_px: float, generator: torch.Generator | None = None) -> Tensor:
    """Shifts (*batch, 2) in pixels, one drawn uniformly in each cell (*batch,) of a level."""
    share = torch.rand(*cell.shape, 2, device=cell.device, generator=generator) - 0.5
    return centres(cell, level, extent_px) + share * step_px(level, extent_px)


def cell_of(shift_px: Tensor, level: int, extent_px: float) -> Tensor:
    """The cells (*batch,) int64 of a level that hold shifts (*batch, 2); outside the square, the nearest ones."""
    index = ((shift_px.double() + extent_px) / step_px(level, extent_px)).floor().clamp(0, 2**level - 1).long()
    return nested.interleave(index.unbind(-1), level)
