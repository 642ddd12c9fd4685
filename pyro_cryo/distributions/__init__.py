"""Distributions that Pyro lacks."""

from pyro_cryo.distributions.atoms import Atoms
from pyro_cryo.distributions.image import LowRankFourier, StudentImage
from pyro_cryo.distributions.rotation_cells import RotationCells
from pyro_cryo.distributions.so3 import MatrixFisher, TangentNormal, UniformRotation
from pyro_cryo.distributions.views import Views
from pyro_cryo.distributions.volume import ShellNormal

__all__ = [
    "Atoms",
    "LowRankFourier",
    "MatrixFisher",
    "RotationCells",
    "ShellNormal",
    "StudentImage",
    "TangentNormal",
    "UniformRotation",
    "Views",
]
