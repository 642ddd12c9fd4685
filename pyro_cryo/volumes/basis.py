"""A family of maps that is linear in a few coefficients: voxel maps and what each counts for."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_cryo.physics.fourier import HalfPlane, resize
from pyro_cryo.physics.slices import GridPoints, channel_grid
from pyro_cryo.volumes.sized import Sized


class VoxelBasis(Sized):
    """C maps on a box of b <= D voxels of the same field of view: the band limit b / 2 of what they show.

    `components` (C, b, b, b) are on the scale of images cropped to b pixels. The Fourier grid is transient.
    """

    components: Tensor

    def __init__(self, box: int, count: int, side: int | None = None) -> None:
        super().__init__()
        self.box = box
        side = box if side is None else side
        self.register_buffer("components", torch.zeros(count, side, side, side))
        self._grid: tuple[Tensor, int, Tensor] | None = None

    def set(self, components: Tensor) -> None:
        """Take a copy of the maps (C, b, b, b)."""
        self.components = components.to(self.components, copy=True)

    @property
    def side(self) -> int:
        """b, voxels."""
        return self.components.shape[-1]

    @property
    def count(self) -> int:
        """How many coefficients of the half-plane of D the maps reach: a prefix."""
        return int(HalfPlane.of(self.box).count(self.side / 2 - 1e-3))

    def forward(self, k: Tensor, coefficients: Tensor) -> Tensor:
        """The transform of the combinations (*batch, C) at points (*batch, P, 3): (*batch, P, 2), as of the images."""
        grid = self.grid()
        points = GridPoints.of(k, grid.shape[0])
        slices = points.columns(grid).view(*k.shape[:-2], -1, grid.shape[-1])
        combined = (slices @ (self.box / self.side * coefficients)[..., None])[..., 0].unflatten(-1, (-1, 2))
        values = points.as_on_grid(torch.view_as_complex(combined.contiguous()).flatten(-k.dim() + 1))
        return torch.view_as_real(values).view(combined.shape)

    def map(self, coefficients: Tensor) -> Tensor:
        """Maps (*batch, C) -> (*batch, D, D, D)."""
        return resize(torch.einsum("...c,czyx->...zyx", coefficients, self.components), self.box)

    def grid(self) -> Tensor:
        """The Fourier grid of the maps as they are now: (2b, 2b, b + 1, 2, C)."""
        made = self._grid
        if made is None or made[0] is not self.components or made[1] != self.components._version:
            made = self._grid = (self.components, self.components._version, channel_grid(self.components))
        return made[2]
