"""Whether draws from q can stand for the posterior, and draws picked so that they do."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

GOOD = 0.7  # a Pareto k up to here: means over weighed draws have errors that say something (Vehtari et al., section 3)
SAME = 1e-2  # nats: weights that differ by less are one, and q is the posterior
LEAST = 25  # draws, whose tail is of 5


def pareto_smoothed(log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised log weights (S, n) with their tails smoothed, and the tails' Pareto k (n,), of log weights (S, n).

    k below 0.7 is good: the weighed draws stand for the posterior. Minus infinity where all weights are the same, and
    q is the posterior; NaN of fewer draws than `LEAST`.

    Source: Vehtari, Simpson, Gelman, Yao and Gabry, Journal of Machine Learning Research 25 (2024).
    """
    values = log_weight.double().cpu().numpy().T
    normalised = values - np.logaddexp.reduce(values, 1, keepdims=True) if len(log_weight) else values
    k = np.full(len(values), np.nan)
    if len(log_weight) >= LEAST:
        same = np.ptp(values, 1) < SAME
        k[same] = -np.inf
        if not same.all():
            normalised[~same], k[~same] = _psis(values[~same])
    return torch.from_numpy(normalised.T.copy()), torch.from_numpy(k)


def resampled(log_weight: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Which of S draws to take, in proportion to their weights exp(log_weight) (S, n): (draws, n) long.

    Each as often as its share of `draws` says, rounded down or up at random, so that none comes again that need not.
    Source: systematic resampling, Kitagawa, Journal of Computational and Graphical Statistics 5 (1996).
    """
    reached = log_weight.double().exp().cumsum(0).T.contiguous()  # (n, S)
    chance = torch.rand(len(reached), 1 + draws, generator=generator, dtype=torch.float64).to(reached.device)
    place = (torch.arange(draws, device=reached.device) + chance[:, :1]) / draws * reached[:, -1:]
    chosen = torch.searchsorted(reached, place, right=True).clamp_max(len(log_weight) - 1)
    return chosen.gather(1, chance[:, 1:].argsort(1)).T


def _psis(log_weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ArviZ's smoothing of rows (n, S), whichever of its two generations is there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the import, and of what k says anyway
        try:
            from arviz import psislw
        except ImportError:  # since 1.0, where it takes log densities that are missing
            from arviz_stats.base import array_stats

            smoothed, k = array_stats.psislw(-log_weight, axis=-1)
        else:
            smoothed, k = psislw(log_weight.copy())
    return np.asarray(smoothed), np.asarray(k)
