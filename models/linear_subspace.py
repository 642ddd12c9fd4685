"""A linear family of maps with z integrated out: no encoder, no descent. Poses are known."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_cryo.analysis.report import write_reconstruction
from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.coefficients import Coefficients, LinearCoefficients
from pyro_cryo.guides.exact import ExactGuide
from pyro_cryo.inference.em import Maps
from pyro_cryo.inference.family import Family, FamilySolver, motion_side, with_band
from pyro_cryo.inference.map_draws import FamilyDraw, family_draws
from pyro_cryo.inference.reconstruct import Reconstruction, reconstruct
from pyro_cryo.model import CryoModel, Density, DrawPoses, form_image, refuse_other_stories
from pyro_cryo.physics.rotations import point_group
from pyro_cryo.physics.slices import slice_coordinates
from pyro_cryo.progress import Progress, quiet
from pyro_cryo.volumes.basis import VoxelBasis
from pyro_cryo.volumes.grid import VoxelGrid
from pyro_cryo.volumes.mask import chosen_mask, read_mask
from pyro_cryo.volumes.prior import MapPrior


class LinearSubspace(CryoModel):
    """V(z) = V0 + sum_j z_j U_j, z ~ Normal(0, I); image_i ~ Normal(a_i ctf . shift . slice(V(z_i), R_i), sigma).

    z_i and the contrast a_i are a particle's: the same in all its images.

    box:      D, pixels
    zdim:     components at most: those that the evidence does not pay for are dropped
    contrast: sd of the particles' contrast a about 1 to begin with, then learned; 0 holds every contrast at 1
    kmax:     band limit of what moves, cycles a box (default: as far as the consensus shows anything)
    symmetry: point group of every map of the family
    mask:     "auto", "none" or the path of a map in 0 to 1, outside which next to nothing is expected
    focus:    the path of a map in 0 to 1, outside which next to no motion is expected (default: the mask)
    """

    epochs = 0  # solved in `prepare`
    volume: VoxelBasis
    consensus: VoxelGrid
    symmetry: Tensor

    def __init__(
        self,
        box: int,
        zdim: int = 8,
        contrast: float = 0.1,
        kmax: float | None = None,
        symmetry: str = "C1",
        mask: str = "auto",
        focus: str = "none",
        noise_groups: int = 1,
    ) -> None:
        super().__init__(box, noise_groups)
        if zdim < 1 or contrast < 0:
            raise ValueError(f"zdim {zdim}, contrast {contrast}; expected at least 1 and 0")
        self.zdim = self.most = zdim
        self.contrast, self.kmax, self.mask, self.focus = contrast, kmax, mask, focus
        self.consensus = VoxelGrid(box)
        self.volume = VoxelBasis(box, 1 + zdim)
        self.prior, self.consensus_prior = MapPrior(), MapPrior()
        self.coefficients: Coefficients = LinearCoefficients(contrast)
        self.register_buffer("symmetry", point_group(symmetry), persistent=False)
        self.reconstruction: Reconstruction | None = None

    def get_extra_state(self) -> dict[str, int]:
        """How many components the data kept."""
        return {"zdim": self.zdim}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.zdim = state["zdim"]

    def latent(self) -> Tensor:
        return pyro.sample("z", dist.Normal(self.log_sigma.new_zeros(self.zdim), 1.0).to_event(1))

    def density(self) -> Density:
        def at(points: Tensor, z: Tensor | None) -> Tensor:
            assert z is not None
            return self.volume(points, self.coefficients.at(z))

        return at

    def signal(self, density: Density, z: Tensor | None, rotation: Tensor, translation: Tensor, batch: Batch) -> Tensor:
        points, count = slice_coordinates(rotation, batch.half.k, batch.freq_scale), self.volume.count
        moving, still = density(points[..., :count, :], z), self.consensus(points[..., count:, :])
        slices = torch.cat([moving, still.expand(*moving.shape[:-2], *still.shape[-2:])], -2)
        image = form_image(slices, translation, batch)
        if not self.coefficients.contrast_varies:
            return image
        contrast = pyro.sample("contrast", dist.Normal(1.0, self.coefficients.contrast_sd).expand([batch.particles]))
        return batch.of_images(contrast, -1)[..., None, None] * image

    def make_guide(self) -> nn.Module:
        return ExactGuide(self, self.volume, self.coefficients)

    def prepare(self, particles: Particles, seed: int = 0, progress: Progress = quiet) -> None:
        refuse_other_stories(self)
        found = reconstruct(
            particles,
            symmetry=self.symmetry,
            mask=chosen_mask(self.mask, self.box),
            device=self.symmetry.device,
            generator=torch.Generator().manual_seed(seed),
            progress=progress,
        )
        solver = FamilySolver(
            particles, found, self.symmetry, self.where(), torch.Generator().manual_seed(seed), progress
        )
        family = self.solve(solver, motion_side(found, self.kmax))
        family.warn_if_still()
        self.consensus.set(with_band(found.volume, family.maps[0]))
        self.volume.set(family.maps)
        self.coefficients, self.zdim = family.coefficients, family.zdim
        self.log_sigma.data.copy_(family.sigma.log())
        assert family.prior is not None
        self.prior, self.consensus_prior = family.prior, MapPrior.of(found.scale, found.tau)
        self.reconstruction = found

    def solve(self, solver: FamilySolver, side: int) -> Family:
        """The family of maps about the consensus, on a box of `side` pixels, which is its band limit."""
        return solver.subspace(self.most, side, self.contrast)

    def where(self) -> Tensor | None:
        """The focus mask, where one was given."""
        return None if self.focus == "none" else read_mask(self.focus, self.box).to(self.symmetry.device)

    def map(self, z: Tensor | None = None) -> Tensor:
        assert z is not None
        y = self.coefficients.at(z)
        y = torch.cat([y[..., :1] - 1, y[..., 1:]], -1)  # the first map is a part of the consensus
        return self.consensus.map(z) + self.volume.map(y)

    def posterior_draws(
        self, particles: Particles, seed: int = 0, progress: Progress = quiet, poses: DrawPoses | None = None
    ) -> Iterator[FamilyDraw] | None:
        if not len(self.prior.tau):
            raise ValueError(f"the maps of this {type(self).__name__} are not fitted yet; let the fit finish first")
        maps = Maps(self.volume.components, self.prior.scale, self.sigma.detach(), self.prior.tau)
        how = (self.coefficients, self.consensus_prior, self.symmetry, seed, progress, poses)
        return family_draws(particles, maps, *how)

    def write_results(self, folder: Path, particles: Particles) -> None:
        """Of the consensus: map, sd, half1, half2, mask (.mrc) and the half-maps' FSC (fsc.tsv)."""
        assert self.reconstruction is not None
        write_reconstruction(folder, self.reconstruction, particles.apix)
