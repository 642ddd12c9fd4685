"""cryoDRGN as in its paper (Zhong et al., ICLR 2020): no consensus, positional encoding, an encoder of images.

To compare with, and to start from where a consensus map misleads. Noise and KL weight are those of the ELBO here.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.encoder import ImageEncoder
from pyro_cryo.inference.reconstruct import image_power, sample_rows
from pyro_cryo.model import CryoModel
from pyro_cryo.progress import Progress, quiet
from pyro_cryo.volumes.mlp import CoordinateMLP, PositionalEncoding


class CryoDRGN2020(CryoModel):
    """V(k | z) = net(encoding(k), z), z ~ Normal(0, I)."""

    volume: CoordinateMLP

    def __init__(self, box: int, zdim: int = 8, width: int = 256, layers: int = 3, noise_groups: int = 1) -> None:
        super().__init__(box, noise_groups)
        self.zdim, self.width, self.layers = zdim, width, layers
        self.volume = CoordinateMLP(box, zdim, width, layers, encoding=PositionalEncoding(box))

    def latent(self) -> Tensor:
        return pyro.sample("z", dist.Normal(self.log_sigma.new_zeros(self.zdim), 1.0).to_event(1))

    def make_guide(self) -> nn.Module:
        return ImageEncoder(self, width=self.width, layers=self.layers)

    def prepare(self, particles: Particles, seed: int = 0, progress: Progress = quiet) -> None:
        sample = particles[sample_rows(particles, torch.Generator().manual_seed(seed))]
        power = image_power(sample, 256, self.log_sigma.device)
        self.log_sigma.data.copy_(power.log())
        self.volume.amplitude.copy_(power.mean(0))
