"""Distributions that Pyro lacks."""

from pyro_cryo.distributions.atoms import Atoms
from pyro_cryo.distributions.image import LowRankFourier, StudentImage
from pyro_cryo.distributions.rotation_cells import RotationCells
from pyro_cryo.distributions.volume import ShellNormal

__all__ = ["Atoms", "LowRankFourier", "RotationCells", "ShellNormal", "StudentImage"]
