"""A population of any shape: z from a normalising flow."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
from pyro.distributions import transforms
from torch import Tensor

from pyro_cryo.models.cryodrgn import CryoDRGN


class Flow(CryoDRGN):
    """z = f(e), e ~ Normal(0, I), f a rational spline of each coordinate before and after an autoregressive map.

    bins: of a spline (Durkan et al., NeurIPS 2019); other arguments as in CryoDRGN
    """

    def __init__(self, box: int, zdim: int = 2, bins: int = 8, **arguments: Any) -> None:
        super().__init__(box, zdim, **arguments)
        self.first = identity_spline(zdim, bins)
        self.between = transforms.affine_autoregressive(zdim, hidden_dims=[32], stable=True) if zdim > 1 else None
        self.second = identity_spline(zdim, bins)

    def prior(self) -> dist.TransformedDistribution:
        """p(z)"""
        base = dist.Normal(self.log_sigma.new_zeros(self.zdim), 1.0).to_event(1)
        steps = [step for step in (self.first, self.between, self.second) if step is not None]
        return dist.TransformedDistribution(base, steps)

    def latent(self) -> Tensor:
        return pyro.sample("z", self.prior())


def identity_spline(zdim: int, bins: int, bound: float = 4.0) -> transforms.Spline:
    """A spline that changes nothing until it learns: from random ones, spikes of density take long to dissolve."""
    spline = transforms.Spline(zdim, count_bins=bins, bound=bound)
    spline.unnormalized_widths.data.zero_()
    spline.unnormalized_heights.data.zero_()
    spline.unnormalized_derivatives.data.fill_(math.log(math.e - 1))  # a slope of 1
    return spline
