"""Ice is thick and thin: every image has a contrast of its own, inferred beside z."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_cryo.data.batch import Batch
from pyro_cryo.guides.encoder import FrameEncoder
from pyro_cryo.model import Density, counted
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.volumes.conjugate import noise_sd


class Contrast(CryoDRGN):
    """contrast_i ~ LogNormal(0, s), s learned; image_i ~ Normal(contrast_i ctf . shift . slice(V(z_i), R_i), sigma).

    Of several images of a particle each has its own contrast: ice is thicker the farther it is tilted.
    Arguments as in CryoDRGN.
    """

    def __init__(self, box: int, zdim: int = 8, **arguments: Any) -> None:
        super().__init__(box, zdim, **arguments)
        self.log_s = nn.Parameter(torch.tensor(-1.5))

    def signal(self, density: Density, z: Tensor | None, rotation: Tensor, translation: Tensor, batch: Batch) -> Tensor:
        each = dist.LogNormal(0.0, self.log_s.exp()).expand([len(batch)])
        contrast = pyro.sample("contrast", counted(each, batch))
        return contrast[..., None, None] * super().signal(density, z, rotation, translation, batch)

    def make_guide(self) -> nn.Module:
        return ContrastEncoder(self, self.expected, width=self.width, layers=self.layers)


class ContrastEncoder(FrameEncoder):
    """q(contrast | image) is what the consensus says, a least-squares fit, widened by a learned factor."""

    def __init__(self, model: Contrast, *arguments: Any, **settings: Any) -> None:
        super().__init__(model, *arguments, **settings)
        self.log_width = nn.Parameter(torch.zeros(()))

    def contrast(self, batch: Batch) -> dist.LogNormal:
        """q(contrast | image), (B,)."""
        consensus, _ = self._expected[0](batch)
        sd = noise_sd(batch, self.model.sigma.detach())[..., None]
        white, image = consensus / sd, batch.image / sd
        model = self.model
        assert isinstance(model, Contrast)
        precision = white.square().sum((1, 2)) + torch.exp(-2 * model.log_s.detach())
        mean = 1 + ((image - white) * white).sum((1, 2)) / precision
        mean = mean.clamp(0.2, 5.0)
        return dist.LogNormal(mean.log(), self.log_width.exp() * precision.rsqrt() / mean)

    def forward(self, batch: Batch) -> None:
        """Sample `contrast` and `z`."""
        loc, sd = self.moments(batch)
        with pyro.plate("particles", batch.size, subsample=batch.shown, dim=-1):
            pyro.sample("contrast", counted(self.contrast(batch), batch))
            with poutine.scale(scale=self.model.beta):
                pyro.sample("z", dist.Normal(loc, sd).to_event(1))
