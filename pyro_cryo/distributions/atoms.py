"""A discrete distribution on points: a population of shapes, each point one of them."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor


class Atoms(TorchDistribution):
    """z is one of the points (L, d), with log weights (*batch, L) that need not be normalised.

    A nonparametric population, and any posterior under it. `log_prob` is the log of a probability, of the point
    that a value lies on (to within rounding; minus infinity beside all of them).
    """

    arg_constraints = {"points": constraints.real, "log_weight": constraints.real}  # noqa: RUF012
    support = constraints.real_vector
    has_enumerate_support = True

    def __init__(self, points: Tensor, log_weight: Tensor, validate_args: bool | None = None) -> None:
        self.points = points
        self.log_weight = log_weight - log_weight.logsumexp(-1, keepdim=True)
        super().__init__(log_weight.shape[:-1], points.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: object = None) -> Atoms:
        """The same distribution for every element of a larger batch."""
        return Atoms(self.points, self.log_weight.expand(torch.Size(batch_shape) + self.log_weight.shape[-1:]))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Points (*sample_shape, *batch, d)."""
        drawn = torch.distributions.Categorical(logits=self.log_weight).sample(torch.Size(sample_shape))
        return self.points[drawn]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of values (*batch, d): (*batch,)."""
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        rows = value.expand(*shape, -1).reshape(-1, value.shape[-1])
        # By differences: a matrix product leaves a point at a distance from itself.
        distance, nearest = torch.cdist(rows, self.points, compute_mode="donot_use_mm_for_euclid_dist").min(-1)
        weight = self.log_weight.expand(*shape, -1).reshape(len(nearest), -1).gather(-1, nearest[:, None])[:, 0]
        beside = distance > 1e-3 * self.points.abs().amax()
        return weight.masked_fill(beside, -torch.inf).view(shape)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Every point: (L, *batch, d), or (L, 1, ..., d)."""
        points = self.points.reshape(-1, *(1 for _ in self.batch_shape), self.points.shape[-1])
        return points.expand(-1, *self.batch_shape, -1) if expand else points

    @property
    def mean(self) -> Tensor:
        """(*batch, d)"""
        return self.log_weight.exp() @ self.points

    @property
    def covariance(self) -> Tensor:
        """(*batch, d, d)"""
        weight, centred = self.log_weight.exp(), self.points - self.mean[..., None, :]
        return torch.einsum("...l,...li,...lj->...ij", weight, centred, centred)
