"""Discrete classes: 3-D classification, each particle of one of K maps. Poses are known."""

from __future__ import annotations

import pyro
from torch import Tensor

from pyro_cryo.distributions import Atoms
from pyro_cryo.guides.points import ClassesCoefficients
from pyro_cryo.inference.classes import solve_classes
from pyro_cryo.inference.family import COARSE, Family, FamilySolver
from pyro_cryo.models.linear_subspace import LinearSubspace
from pyro_cryo.volumes.basis import VoxelBasis


class Classes(LinearSubspace):
    """V(z) = sum_k z_k V_k, z one of the K unit vectors with probabilities w that are learned.

    The posterior mean of z, which a run keeps, is the probability of each class. Classes are found in a linear subspace
    and in those that they span themselves.

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
        self.zdim = classes
        self.volume = VoxelBasis(box, classes)
        self.coefficients = ClassesCoefficients(classes, contrast)

    def latent(self) -> Tensor:
        return pyro.sample("z", Atoms(self.coefficients.points, self.coefficients.log_weight))

    def solve(self, solver: FamilySolver, side: int) -> Family:
        linear = solver.coarse_subspace(self.most, min(side, COARSE), self.contrast)
        return solve_classes(solver, linear, self.zdim, side)
