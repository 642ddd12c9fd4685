"""Distributions of images with something integrated out: z of a linear family, or a scale of the noise."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor


class LowRankFourier(TorchDistribution):
    """x = loc + factor z + sigma e with z ~ Normal(0, I_r) and e white: a Gaussian of low rank plus a diagonal.

    loc (*batch, P, 2), factor (*batch, P, 2, r), sigma broadcasting over (*batch, P, 2). An image (P, 2) is the event.
    Every solve is r x r (Woodbury): the cost is that of factor' factor.
    """

    arg_constraints = {"loc": constraints.real_vector, "sigma": constraints.positive}  # noqa: RUF012
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(self, loc: Tensor, factor: Tensor, sigma: Tensor, validate_args: bool | None = None) -> None:
        self.loc, self.factor = loc, factor
        self.sigma = sigma.expand(loc.shape)
        super().__init__(loc.shape[:-2], loc.shape[-2:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: object = None) -> LowRankFourier:
        """The same distribution for every element of a larger batch."""
        shape = torch.Size(batch_shape)
        return LowRankFourier(
            self.loc.expand(shape + self.loc.shape[-2:]),
            self.factor.expand(shape + self.factor.shape[-3:]),
            self.sigma.expand(shape + self.sigma.shape[-2:]),
        )

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Images (*sample_shape, *batch, P, 2)."""
        shape = torch.Size(sample_shape) + self.batch_shape
        z = torch.randn(*shape, self.factor.shape[-1], dtype=self.loc.dtype, device=self.loc.device)
        noise = torch.randn(*shape, *self.event_shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + (self.factor @ z[..., None, :, None])[..., 0] + self.sigma * noise

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of images (*batch, P, 2), z integrated out: (*batch,)."""
        white, mean, _, root = self._solved(value)
        gain = (mean * (root @ (root.mT @ mean[..., None]))[..., 0]).sum(-1)
        log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + self.sigma.log().sum((-2, -1))
        size = math.prod(self.event_shape)
        return 0.5 * (gain - white.square().sum(-1)) - log_det - 0.5 * size * math.log(2 * math.pi)

    def posterior(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (*batch, r) and covariance (*batch, r, r) of z given images (*batch, P, 2)."""
        _, mean, covariance, _ = self._solved(value)
        return mean, covariance

    def _solved(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        white = ((value - self.loc) / self.sigma).flatten(-2)
        factor = (self.factor / self.sigma[..., None]).flatten(-3, -2)
        precision = factor.mT @ factor + torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        root = torch.linalg.cholesky(precision)
        covariance = torch.cholesky_inverse(root)
        mean = (covariance @ (factor.mT @ white[..., None]))[..., 0]
        return white, mean, covariance, root


class StudentImage(TorchDistribution):
    """x = loc + scale e / sqrt(u), e white, u ~ Gamma(df / 2, df / 2) one number for the whole image (P, 2).

    A multivariate t: an image that fits badly everywhere counts less, which a t for every pixel does not bring about.
    df () or (*batch,); loc (*batch, P, 2); scale broadcasting over it.
    Source: Lange, Little and Taylor, J. Am. Stat. Assoc. 84 (1989) 881.
    """

    arg_constraints = {"df": constraints.positive, "scale": constraints.positive}  # noqa: RUF012
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(self, df: Tensor, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        self.loc, self.scale = loc, scale.expand(loc.shape)
        self.df = torch.as_tensor(df, dtype=loc.dtype, device=loc.device).expand(loc.shape[:-2])
        super().__init__(loc.shape[:-2], loc.shape[-2:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: object = None) -> StudentImage:
        """The same distribution for every element of a larger batch."""
        shape = torch.Size(batch_shape)
        loc, scale = (v.expand(shape + v.shape[-2:]) for v in (self.loc, self.scale))
        return StudentImage(self.df.expand(shape), loc, scale)

    @property
    def mean(self) -> Tensor:
        """(*batch, P, 2), where df is above 1."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """(*batch, P, 2), scale^2 df / (df - 2) where df is above 2."""
        return self.scale.square() * (self.df / (self.df - 2))[..., None, None]

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Images (*sample_shape, *batch, P, 2)."""
        shape = torch.Size(sample_shape)
        u = torch.distributions.Gamma(0.5 * self.df, 0.5 * self.df).rsample(shape)
        noise = torch.randn(shape + self.loc.shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self.scale * noise * u.rsqrt()[..., None, None]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of images (*batch, P, 2): (*batch,)."""
        size = math.prod(self.event_shape)
        half = 0.5 * (self.df + size)
        constant = torch.lgamma(half) - torch.lgamma(0.5 * self.df) - 0.5 * size * (math.pi * self.df).log()
        return constant - self.scale.log().sum((-2, -1)) - half * torch.log1p(self._distance(value) / self.df)

    def weight(self, value: Tensor, independent: float = 1.0) -> Tensor:
        """Posterior mean of u, what an image counts for: about 1 where it fits, small where it does not. (*batch,)

        independent: share of its numbers that e has as many independent ones of: `Batch.window_power`
        """
        size = independent * math.prod(self.event_shape)
        return (self.df + size) / (self.df + independent * self._distance(value))

    def _distance(self, value: Tensor) -> Tensor:
        return ((value - self.loc) / self.scale).square().sum((-2, -1))
