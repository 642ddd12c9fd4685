"""The prior of voxel maps, as it was fitted: what their posterior needs beside the images."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_cryo.volumes.sized import Sized


class MapPrior(Sized):
    """V = scale * u, u ~ ShellNormal(tau): scale (*, b, b, b) where density is expected, tau (*, b / 2 + 1) by shell.

    Empty until maps are fitted.
    """

    scale: Tensor
    tau: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.zeros(0))
        self.register_buffer("tau", torch.zeros(0))

    @staticmethod
    def of(scale: Tensor, tau: Tensor) -> MapPrior:
        """This scale and tau."""
        made = MapPrior()
        made.scale, made.tau = scale, tau
        return made
