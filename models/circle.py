"""A motion that returns to where it began: z on a circle."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_cryo.data.batch import Batch
from pyro_cryo.guides.encoder import FrameEncoder
from pyro_cryo.models.cryodrgn import CryoDRGN

DRAWS = 64


class Circle(CryoDRGN):
    """z = (cos, sin) of an angle, z ~ ProjectedNormal(drift): uniform on the circle where the drift is 0, as at first.

    The drift, a vector, is learned: where on the circle particles gather. Arguments as in CryoDRGN, but zdim is 2.
    """

    def __init__(self, box: int, **arguments: Any) -> None:
        super().__init__(box, 2, **arguments)
        self.drift = nn.Parameter(torch.zeros(2))

    def latent(self) -> Tensor:
        return pyro.sample("z", dist.ProjectedNormal(self.drift))

    def make_guide(self) -> nn.Module:
        return CircleEncoder(self, self.expected, width=self.width, layers=self.layers)


class CircleEncoder(FrameEncoder):
    """q(z | image) = ProjectedNormal(loc): concentrated about loc / |loc| as |loc| grows."""

    def concentration(self, batch: Batch) -> Tensor:
        """loc (B, 2)."""
        loc, sd = self.moments(batch)
        return loc / sd.mean(-1, keepdim=True)

    def distribution(self, batch: Batch) -> TorchDistributionMixin:
        return dist.ProjectedNormal(self.concentration(batch))

    def posterior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean direction on the circle (B, 2) and covariance (B, 2, 2) about it, from draws."""
        loc = self.concentration(batch)
        drawn = dist.ProjectedNormal(loc).sample((DRAWS,))
        away = drawn - nn.functional.normalize(loc, dim=-1)
        return nn.functional.normalize(loc, dim=-1), torch.einsum("nbi,nbj->bij", away, away) / DRAWS
