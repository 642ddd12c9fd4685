"""Rotations by cells of a grid: a histogram on SO(3)."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from pyro_cryo.distributions.so3 import rotation_matrix
from pyro_cryo.physics import rotation_grid


class RotationCells(TorchDistribution):
    """R is in one of some cells of `rotation_grid`, uniform within it: a density that is constant in every cell.

    cell: (L,) int64, different cells of one level, in any order.
    log_weight: (*batch, L), of each cell's probability; need not be normalised, may be learned or minus infinity.

    Densities are with respect to the normalised Haar measure: equal weights on all cells have the density 1 everywhere.
    The posterior that a search over a grid leaves, or a population of views with preferred orientations:

        cell = rotation_grid.cells(2)
        pyro.sample("rotation", RotationCells(cell, torch.zeros(len(cell)), level=2))
    """

    arg_constraints = {"cell": constraints.nonnegative_integer, "log_weight": constraints.real}  # noqa: RUF012
    support = rotation_matrix

    def __init__(self, cell: Tensor, log_weight: Tensor, level: int, validate_args: bool | None = None) -> None:
        if log_weight.shape[-1:] != cell.shape:
            raise ValueError(
                f"weights {tuple(log_weight.shape)} for cells {tuple(cell.shape)}; expected (*batch, L) and (L,)"
            )
        self.cell, order = cell.sort()
        self.log_weight = log_weight[..., order] - log_weight.logsumexp(-1, keepdim=True)
        self.level = level
        super().__init__(log_weight.shape[:-1], torch.Size((3, 3)), validate_args=validate_args)
        if self._validate_args and bool((self.cell.diff() == 0).any() | (self.cell[-1] >= rotation_grid.count(level))):
            raise ValueError(f"cells repeat or are beyond the {rotation_grid.count(level)} of level {level}")

    def expand(self, batch_shape: Any, _instance: object = None) -> RotationCells:
        """The same distribution for every element of a larger batch; weights are not copied."""
        new = self._get_checked_instance(RotationCells, _instance)
        new.cell, new.log_weight, new.level = self.cell, self.log_weight, self.level
        super(RotationCells, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Rotations (*sample_shape, *batch, 3, 3): a cell by its weight, then uniform within."""
        lead = len(self.batch_shape) - (self.log_weight.dim() - 1)
        logits = self.log_weight.expand(self.batch_shape[lead:] + self.cell.shape)
        drawn = torch.distributions.Categorical(logits=logits).sample(
            torch.Size(sample_shape) + self.batch_shape[:lead]
        )
        return rotation_grid.uniform_in(self.cell[drawn], self.level, dtype=self.log_weight.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of rotations (*batch, 3, 3), minus infinity outside the cells: (*batch,)."""
        cell = rotation_grid.cell_of(value, self.level)
        place = torch.searchsorted(self.cell, cell).clamp_max(len(self.cell) - 1)
        rows = self.log_weight.shape[:-1]
        row = torch.arange(rows.numel(), device=cell.device).view(rows)
        place, beside = torch.broadcast_tensors(place, self.cell[place] != cell, row)[:2]
        weight = self.log_weight.reshape(-1, len(self.cell))[row, place]
        log_prob = weight.masked_fill(beside, -torch.inf) + math.log(rotation_grid.count(self.level))
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))
