"""A molecule that bends: one template, carried along by a smooth displacement of z (3DFlex). Poses are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.model import Density, form_image
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.physics.fourier import fourier_to_volume, volume_to_fourier
from pyro_cryo.physics.slices import slice_coordinates
from pyro_cryo.progress import Progress, quiet
from pyro_cryo.volumes.mask import find_mask
from pyro_cryo.volumes.moving_points import MovingPoints, lattice_radius


class Deformation(CryoDRGN):
    """V(r | z) = sum_j w_j g(r - x_j - u(x_j, z)), z ~ Normal(0, I): Gaussian points g of fixed mass w_j that move.

    The points begin as the solved consensus; their masses and their motion are then learned. No density appears or
    vanishes, so what binds and leaves is for `cryodrgn` or `classes`. Beyond kmax, which is at most what the points
    carry, the map is the consensus and stands still.

    points: how many; more reach higher frequencies; modes: smooth fields that u is made of; length: over which
    neighbours move alike, in boxes; width, layers: of the encoder; other arguments as in CryoDRGN.

    Source: Punjani and Fleet, Nature Methods 2023, with points for their mesh and voxels.
    """

    pose_steps = 2500
    volume: MovingPoints  # type: ignore[assignment]

    def __init__(
        self, box: int, zdim: int = 2, points: int = 4096, modes: int = 64, length: float = 0.15, **arguments: Any
    ) -> None:
        super().__init__(box, zdim, **arguments)
        if points < 1 or modes < 1 or not length > 0:
            raise ValueError(f"points {points}, modes {modes}, length {length}; expected at least 1, 1 and above 0")
        self.volume = MovingPoints(box, zdim, points, modes=modes, length=length, kmax=self.kmax)

    def signal(self, density: Density, z: Tensor | None, rotation: Tensor, translation: Tensor, batch: Batch) -> Tensor:
        assert isinstance(density, MovingPoints)
        assert z is not None
        slices = self.consensus(slice_coordinates(rotation, batch.half.k, batch.freq_scale))
        count = self.reached(density.kmax)
        k = batch.half.k[:count]
        moved = density.images(z, rotation, k, batch.freq_scale)
        near = k.norm(dim=-1) * batch.freq_scale[:, None] <= density.kmax
        low = torch.where(near[..., None], moved, slices[:, :count])
        return form_image(torch.cat([low, slices[:, count:]], 1), translation, batch)

    def prepare(self, particles: Particles, seed: int = 0, progress: Progress = quiet) -> None:
        super().prepare(particles, seed, progress)
        consensus = self.consensus.voxels
        self.volume.set(consensus, find_mask(consensus) * self.mask)

    def map(self, z: Tensor | None = None) -> Tensor:
        assert z is not None
        still = volume_to_fourier(self.consensus.voxels)
        near = lattice_radius(self.box, still.device) <= self.volume.kmax
        return self.mask * fourier_to_volume(torch.where(near, self.volume.spectrum(z), still))
