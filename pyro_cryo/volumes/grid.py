"""A map on voxels, read by central slices of its oversampled Fourier grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_cryo.physics.slices import fourier_grid, read_grid


class VoxelGrid(nn.Module):
    """One map, the same for every image. The Fourier grid is transient: made from the voxels when first read."""

    voxels: Tensor

    def __init__(self, box: int) -> None:
        super().__init__()
        self.register_buffer("voxels", torch.zeros(box, box, box))
        self._grid: tuple[Tensor, int, Tensor] | None = None

    def set(self, voxels: Tensor) -> None:
        """Take a copy of the map (D, D, D)."""
        self.voxels = voxels.to(self.voxels, copy=True)

    def forward(self, k: Tensor, z: Tensor | None = None) -> Tensor:
        """The transform at points (*batch, P, 3): (*batch, P, 2)."""
        return torch.view_as_real(read_grid(self.grid(), k))

    def map(self, z: Tensor | None = None) -> Tensor:
        """The voxels, once for every z: (*batch, D, D, D)."""
        return self.voxels if z is None else self.voxels.expand(*z.shape[:-1], *self.voxels.shape)

    def grid(self) -> Tensor:
        """The Fourier grid of the voxels as they are now."""
        made = self._grid
        if made is None or made[0] is not self.voxels or made[1] != self.voxels._version:
            made = self._grid = (self.voxels, self.voxels._version, fourier_grid(self.voxels))
        return made[2]
