"""Discrete classes: 3-D classification, each image of one of K maps. Poses are known."""

from __future__ import annotations

import pyro
import torch
from torch import Tensor

from pyro_cryo.data.particles import Particles
from pyro_cryo.distributions import Atoms
from pyro_cryo.guides.coefficients import ClassesCoefficients
from pyro_cryo.inference.reconstruct import Reconstruction
from pyro_cryo.inference.subspace import COARSE, Family, solve_classes, solve_subspace
from pyro_cryo.models.linear_subspace import LinearSubspace
from pyro_cryo.progress import Progress
from pyro_cryo.volumes.basis import VoxelBasis


class Classes(LinearSubspace):
    """V(z) = sum_k z_k V_k, z one of the K unit vectors with probabilities w that are learned.

    The posterior mean of z, which a run keeps, is the probability of each class. Classes begin as clusters in a linear
    subspace.

    classes: K, at least 2
    rank:    dimension of that subspace at most
    box, contrast, kmax, symmetry, mask: as in LinearSubspace
    """

    coefficients: ClassesCoefficients

    def __init__(
        self,
        box: int,
        classes: int = 4,
        rank: int = 8,
        contrast: float = 0.1,
        kmax: float | None = None,
        symmetry: str = "C1",
        mask: str = "auto",
        noise_groups: int = 1,
    ) -> None:
        super().__init__(box, rank, contrast, kmax, symmetry, mask, noise_groups=noise_groups)
        if classes < 2:
            raise ValueError(f"classes is {classes}; expected 2 or more (homogeneous makes one map)")
        self.rank, self.zdim = rank, classes
        self.volume = VoxelBasis(box, classes)
        self.coefficients = ClassesCoefficients(classes, contrast)

    def latent(self) -> Tensor:
        return pyro.sample("z", Atoms(self.coefficients.points, self.coefficients.log_weight))

    def solve(
        self, particles: Particles, found: Reconstruction, generator: torch.Generator, progress: Progress
    ) -> Family:
        sd, side = float(self.coefficients.contrast_sd), self.side
        linear = solve_subspace(
            particles, found, self.rank, symmetry=self.symmetry, side=min(side, COARSE), contrast_sd=sd,
            generator=generator, progress=progress,
        )  # fmt: skip
        return solve_classes(
            particles, found, linear, self.zdim, symmetry=self.symmetry, side=side, generator=generator,
            progress=progress,
        )  # fmt: skip
