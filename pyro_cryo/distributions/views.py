"""Images of one particle, or what else each of them has, counted together."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor


class Views(TorchDistribution):
    """A value for each of B images, independent, with the density of each of n particles: that of its images together.

    log p(x_1 .. x_B) of particle i = sum over its images b of log base_b(x_b)

    So what each image has of its own stands in a plate of particles, and one z of a particle explains all its images.
    base:     of batch shape (*batch, B)
    particle: (B,) long, which of the n particles each image shows
    count:    n

    Values, draws and moments are those of `base`, (*batch, B, *event); `log_prob` is (*batch, n), which is the batch
    shape.
    """

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, base: Any, particle: Tensor, count: int) -> None:
        self.base, self.particle, self.count = base, particle, count
        super().__init__(torch.Size((*base.batch_shape[:-1], count)), base.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """As of base."""
        return bool(self.base.has_rsample)

    @property
    def support(self) -> Any:
        """Of a value of one image."""
        return self.base.support

    @property
    def mean(self) -> Tensor:
        """(*batch, B, *event)"""
        return torch.as_tensor(self.base.mean)

    @property
    def variance(self) -> Tensor:
        """(*batch, B, *event)"""
        return torch.as_tensor(self.base.variance)

    def expand(self, batch_shape: Any, _instance: object = None) -> Views:
        """The same for more elements of the leading axes; the last remains n."""
        shape = torch.Size(batch_shape)
        if shape[-1] != self.count:
            raise ValueError(f"a plate of {shape[-1]} for images of {self.count} particles; make it batch.particles")
        return Views(self.base.expand(shape[:-1] + self.particle.shape), self.particle, self.count)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Values of the images: (*sample_shape, *batch, B, *event)."""
        return torch.as_tensor(self.base.sample(torch.Size(sample_shape)))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """The same, with gradients."""
        return torch.as_tensor(self.base.rsample(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of each particle's values: (*batch, n)."""
        each = self.base.log_prob(value)
        return each.new_zeros((*each.shape[:-1], self.count)).index_add_(-1, self.particle, each)


class Showing(Protocol):
    """B images, and which of n particles each shows."""

    @property
    def particle(self) -> Tensor:
        """(B,) long"""

    @property
    def particles(self) -> int:
        """n"""

    @property
    def several(self) -> bool:
        """Whether any particle has several images."""


def counted(each: Any, images: Showing) -> Any:
    """What images have each on their own, of batch shape (*batch, B), as a site of the plate of particles."""
    return Views(each, images.particle, images.particles) if images.several else each
