"""Few images in an optics group: its noise spectrum borrows from the other groups'."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.progress import Progress, quiet

ROUNDS = 30  # of EM for the first value of the spread


class OpticsNoise(CryoDRGN):
    """log sigma[group, shell] ~ Normal(level[group] + mean[shell], spread), level ~ Normal(0, 1).

    Groups differ by a factor of their own, and else by about `spread` (LogNormal(log 0.1, 1), learned as `mean` and
    `level` are). A group is what the table calls an optics group; with one for every micrograph this is a noise
    spectrum a micrograph. Arguments as in CryoDRGN.

    log_sigma is the mode given the images. The spread is learned with log_sigma integrated out in Laplace's
    approximation: at the mode alone, a spread of 0 would be the most probable whatever the images say.
    """

    information: Tensor

    def __init__(self, box: int, zdim: int = 8, **arguments: Any) -> None:
        super().__init__(box, zdim, **arguments)
        groups, shells = self.log_sigma.shape
        self.mean = nn.Parameter(torch.zeros(shells))
        self.level = nn.Parameter(torch.zeros(groups))
        self.log_spread = nn.Parameter(torch.tensor(math.log(0.1)))
        self.register_buffer("information", torch.zeros(groups, shells))  # that the images have of log sigma

    def expected_log_sigma(self) -> Tensor:
        """level + mean: (noise groups, D / 2 + 1)."""
        return self.level[:, None] + self.mean

    def forward(self, batch: Batch) -> None:
        spread = self.log_spread.exp()
        pyro.sample("log_spread", dist.Normal(math.log(0.1), 1.0), obs=self.log_spread)
        pyro.sample("level", dist.Normal(torch.zeros_like(self.level), 1.0).to_event(1), obs=self.level)
        pyro.sample("log_sigma", dist.Normal(self.expected_log_sigma(), spread).to_event(2), obs=self.log_sigma)
        # Laplace's factor: the volume of the posterior of log sigma, sqrt(2 pi / precision) for each
        pyro.factor("width", -0.5 * (self.information + spread**-2).log().sum())
        super().forward(batch)

    def prepare(self, particles: Particles, seed: int = 0, progress: Progress = quiet) -> None:
        super().prepare(particles, seed, progress)
        # A component e ~ Normal(0, sigma) has the Fisher information 2 of log sigma, a coefficient has two of them.
        coefficients = torch.bincount(particles.half.shell, minlength=len(self.mean))
        images = torch.bincount(particles.noise_group, minlength=len(self.level))
        self.information.copy_(4.0 * images[:, None] * coefficients)
        with torch.no_grad():
            told, seen = self.information, self.log_sigma.clone()
            self.mean.copy_((told * seen).sum(0) / told.sum(0).clamp_min(1))
            self.level.copy_((told * (seen - self.mean)).sum(1) / told.sum(1).clamp_min(1))
            square, expected = torch.full_like(told[0, 0], 0.01), self.expected_log_sigma()
            for _ in range(ROUNDS):
                variance = 1 / (told + 1 / square)
                self.log_sigma.copy_(variance * (told * seen + expected / square))
                square = (variance + (self.log_sigma - expected).square()).mean()
            self.log_spread.copy_(0.5 * square.log())
