"""States: z from a mixture of Gaussians whose weights, centres and widths are learned."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_cryo.models.cryodrgn import CryoDRGN


class Mixture(CryoDRGN):
    """z ~ sum_k w_k Normal(mu_k, diag sd_k^2).

    states: K; other arguments as in CryoDRGN
    """

    def __init__(self, box: int, zdim: int = 2, states: int = 2, **arguments: Any) -> None:
        super().__init__(box, zdim, **arguments)
        if states < 1:
            raise ValueError(f"states is {states}; expected 1 or more")
        self.log_weight = nn.Parameter(torch.zeros(states))
        self.centre = nn.Parameter(1.5 * apart(states, zdim))
        self.log_sd = nn.Parameter(torch.zeros(states, zdim))

    def prior(self) -> dist.MixtureSameFamily:
        """p(z)"""
        states = dist.Normal(self.centre, self.log_sd.clamp_min(-3).exp()).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.log_weight), states)

    def latent(self) -> Tensor:
        return pyro.sample("z", self.prior())


def apart(states: int, zdim: int) -> Tensor:
    """Where states begin: at both ends of every axis, further ones at random; two that begin alike stay alike."""
    ends = torch.stack([torch.eye(zdim), -torch.eye(zdim)], 1).flatten(0, 1)[:states]
    return torch.cat([ends, torch.randn(states - len(ends), zdim)])
