"""One map, the same for every particle. Poses are known, the posterior of the map is solved for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyro
import torch
from torch import Tensor, nn

from pyro_cryo.analysis.report import write_reconstruction
from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.distributions import ShellNormal
from pyro_cryo.inference.map_draws import StillDraw, still_draws
from pyro_cryo.inference.reconstruct import Reconstruction, reconstruct
from pyro_cryo.model import CryoModel, Density, DrawPoses, refuse_other_stories
from pyro_cryo.physics.rotations import point_group
from pyro_cryo.physics.slices import fourier_grid, read_grid
from pyro_cryo.progress import Progress, quiet
from pyro_cryo.volumes.grid import VoxelGrid
from pyro_cryo.volumes.mask import chosen_mask
from pyro_cryo.volumes.prior import MapPrior


class Homogeneous(CryoModel):
    """V = scale * u, u ~ Normal(0, tau^2) in every Fourier shell; image_i ~ Normal(ctf . shift . slice(V, R_i), sigma).

    box:      D, pixels
    symmetry: point group of the map, for example C1, D7, O
    mask:     "auto" finds where the density is, "none" expects it everywhere alike, else the path of a map in 0 to 1
    """

    epochs = 0  # everything is conjugate: solved in `prepare`, nothing left to descend
    volume: VoxelGrid
    scale: Tensor
    tau: Tensor
    u: Tensor
    u_sd: Tensor

    def __init__(self, box: int, symmetry: str = "C1", mask: str = "auto", noise_groups: int = 1) -> None:
        super().__init__(box, noise_groups)
        self.symmetry, self.mask = point_group(symmetry), mask
        self.volume = VoxelGrid(box)
        self.register_buffer("scale", torch.ones(box, box, box))
        self.register_buffer("tau", torch.ones(box // 2 + 1))
        self.register_buffer("u", torch.zeros(box, box, box))
        self.register_buffer("u_sd", torch.ones(box // 2 + 1))
        self.reconstruction: Reconstruction | None = None

    def density(self) -> Density:
        u = pyro.sample("volume", ShellNormal(self.tau))
        grid = fourier_grid(self.scale * u)
        return lambda k, z: torch.view_as_real(read_grid(grid, k))

    def make_guide(self) -> nn.Module:
        return VolumeGuide(self)

    def prepare(self, particles: Particles, seed: int = 0, progress: Progress = quiet) -> None:
        refuse_other_stories(self)
        found = reconstruct(
            particles,
            symmetry=self.symmetry,
            mask=chosen_mask(self.mask, self.box),
            device=self.tau.device,
            generator=torch.Generator().manual_seed(seed),
            progress=progress,
        )
        self.volume.set(found.volume)
        self.scale.copy_(found.scale)
        self.tau.copy_(found.tau)
        self.u.copy_(found.u)
        self.u_sd.copy_(found.coefficient_sd)
        self.log_sigma.data.copy_(found.sigma.log())
        self.reconstruction = found

    def posterior_draws(
        self, particles: Particles, seed: int = 0, progress: Progress = quiet, poses: DrawPoses | None = None
    ) -> Iterator[StillDraw] | None:
        symmetry = self.symmetry.to(self.tau.device)
        return still_draws(particles, self.sigma.detach(), self.consensus_prior, symmetry, seed, progress, poses)

    @property
    def consensus_prior(self) -> MapPrior:
        """scale and tau."""
        return MapPrior.of(self.scale, self.tau)

    def write_results(self, folder: Path, particles: Particles) -> None:
        """map, sd, half1, half2, mask (.mrc) and the half-maps' FSC (fsc.tsv)."""
        assert self.reconstruction is not None
        write_reconstruction(folder, self.reconstruction, particles.apix)


class VolumeGuide(nn.Module):
    """q(u) = Normal(exact posterior mean, a standard deviation a shell)."""

    def __init__(self, model: Homogeneous) -> None:
        super().__init__()
        self._model = (model,)

    def forward(self, batch: Batch) -> None:
        """Sample `volume`."""
        (model,) = self._model
        pyro.sample("volume", ShellNormal(model.u_sd, model.u))
