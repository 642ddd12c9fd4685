"""A curved family of maps: smooth functions of z, whose population is learned. Poses are known."""

from __future__ import annotations

import pyro
from torch import Tensor

from pyro_cryo.distributions import Atoms
from pyro_cryo.guides.points import CurvedCoefficients
from pyro_cryo.inference.family import COARSE, Family, FamilySolver
from pyro_cryo.models.linear_subspace import LinearSubspace


class Manifold(LinearSubspace):
    """V(z) = sum_m phi_m(z) F_m, z ~ sum_l w_l delta(z - z_l): maps that bend with z, and a population of any shape.

    A linear subspace comes first and gives z its meaning; phi are the smoothest functions on the images' z, each F_m
    has a prior of its own, and the weights w of the population are learned.

    points:   atoms of the population
    features: phi at most
    box, zdim, contrast, kmax, symmetry, mask, focus: as in LinearSubspace
    """

    coefficients: CurvedCoefficients

    def __init__(
        self,
        box: int,
        zdim: int = 8,
        points: int = 400,
        features: int = 24,
        contrast: float = 0.1,
        kmax: float | None = None,
        symmetry: str = "C1",
        mask: str = "auto",
        focus: str = "none",
        noise_groups: int = 1,
    ) -> None:
        super().__init__(box, zdim, contrast, kmax, symmetry, mask, focus, noise_groups)
        if points < 10 or features < 1:
            raise ValueError(f"points {points}, features {features}; expected at least 10 and 1")
        self.points, self.features = points, features
        self.coefficients = CurvedCoefficients(contrast)

    def latent(self) -> Tensor:
        return pyro.sample("z", Atoms(self.coefficients.points, self.coefficients.log_weight))

    def solve(self, solver: FamilySolver, side: int) -> Family:
        linear = solver.coarse_subspace(self.most, min(side, COARSE), self.contrast)
        return solver.manifold(linear, side, self.points, self.features)
