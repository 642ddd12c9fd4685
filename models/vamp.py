"""VampPrior: what the encoder says of made-up images is the population (Tomczak and Welling, AISTATS 2018)."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.encoder import FrameEncoder
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.progress import Progress, quiet


class Vamp(CryoDRGN):
    """z ~ sum_k w_k q(z | u_k): u_k are learned inputs of the encoder, those of K particles at first, w their weights.

    inputs: K; other arguments as in CryoDRGN
    """

    def __init__(self, box: int, zdim: int = 2, inputs: int = 16, **arguments: Any) -> None:
        super().__init__(box, zdim, **arguments)
        if inputs < 1:
            raise ValueError(f"inputs is {inputs}; expected 1 or more")
        size: int = self.make_guide().net[0].in_features  # type: ignore[assignment]
        self.log_weight = nn.Parameter(torch.zeros(inputs))
        self.inputs = nn.Parameter(torch.randn(inputs, size))

    def latent(self) -> Tensor:
        (encoder,) = self._encoder
        loc, sd = encoder.moments_of(self.inputs)
        states = dist.Normal(loc, sd).to_event(1)
        return pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=self.log_weight), states))

    def make_guide(self) -> FrameEncoder:
        encoder = FrameEncoder(self, self.expected, width=self.width, layers=self.layers)
        self._encoder = (encoder,)  # aside: its parameters are the guide's
        return encoder

    def prepare(self, particles: Particles, seed: int = 0, progress: Progress = quiet) -> None:
        super().prepare(particles, seed, progress)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(particles.n_particles, (len(self.inputs),), generator=generator)
        chosen, which = drawn.unique(return_inverse=True)
        batch = particles.batch(particles.images_of(chosen), self.inputs.device)
        self.inputs.data.copy_(self.make_guide().to(self.inputs.device).features(batch)[which.to(batch.index.device)])
