"""Mean and covariance of a distribution, by points of a Gaussian near it that are weighed beside it.

Points come from a Gaussian that is a quarter wider, so that the tails are seen, and are quasi-random with moments that
are exact: a Gaussian is found as it is. Source: Cappe et al., Statistics and Computing 18 (2008) 447, eq. 9-11.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

WIDER = 1.25  # sd of what is drawn from beside the Gaussian's
TRUSTED = 8.0  # points for which the moments that the Gaussian had count


@lru_cache(maxsize=64)
def normal_rule(count: int, dim: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Points (count, dim) and weights (count,) of a standard normal: sum 1, mean 0, covariance 1, to rounding.

    Scrambled Sobol points and their opposites, of a wider normal, weighted by the ratio of the two.
    """
    points = WIDER * _opposites(count, dim, seed)
    weight = (0.5 * (WIDER**-2 - 1) * points.square().sum(1)).softmax(0)
    return _exact(points, weight).float().to(device), weight.float().to(device)


@lru_cache(maxsize=64)
def even_points(count: int, dim: int, seed: int, device: torch.device) -> Tensor:
    """Points (count, dim) of a standard normal, all of the same weight, with its mean and covariance to rounding."""
    points = _opposites(count, dim, seed)
    return _exact(points, torch.full_like(points[:, 0], 1 / len(points))).float().to(device)


def _opposites(count: int, dim: int, seed: int) -> Tensor:
    """Scrambled Sobol points of a standard normal, each followed by its opposite: (count, dim)."""
    half = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(count // 2, dtype=torch.float64)
    side = torch.special.ndtri(half.clamp(1e-6, 1 - 1e-6))
    return torch.stack([side, -side], 1).flatten(0, 1)


def _exact(points: Tensor, weight: Tensor) -> Tensor:
    """Points (S, d) of mean 0 under weights (S,), of covariance 1 too."""
    root = torch.linalg.cholesky(points.T @ (weight[:, None] * points))
    return torch.linalg.solve_triangular(root, points.T, upper=False).T


def weighted_moments(points: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Means (*batch, d) and covariances (*batch, d, d) of points with weights (S, *batch), which add up to 1.

    points: (S, d) or (S, *batch, d)

    The fewer points have the weight, the more counts what is said without them: mean 0, covariance 1.
    """
    count = 1 / share.square().sum(0)
    trust = (count / (count + TRUSTED))[..., None]
    points = points.view(len(points), *[1] * (share.ndim + 1 - points.ndim), *points.shape[1:])
    mean = trust * torch.einsum("s...,s...i->...i", share, points)
    apart = points - mean
    spread = torch.einsum("s...,s...i,s...j->...ij", share, apart, apart)
    unit = torch.eye(points.shape[-1], device=points.device)
    return mean, trust[..., None] * spread + (1 - trust[..., None]) * unit
