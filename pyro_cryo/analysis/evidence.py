"""How probable particles are under a fit with all that is latent integrated out: what models are compared by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.inference.draws import drawn
from pyro_cryo.inference.importance import SAME, pareto_smoothed
from pyro_cryo.inference.run import Run
from pyro_cryo.progress import Progress, quiet
from pyro_cryo.rows import Rows

FEW = 4  # draws whose weights show whether they are all the same


@dataclass(frozen=True)
class Evidence(Rows):
    """log p of n particles, each from the weights of its draws.

    log_p:    (n,) nats, a bound from below on average
    pareto_k: (n,) of the weights: minus infinity where the guide is the exact posterior, NaN of fewer than 25 draws
    rise:     (n,) nats that log p is above its mean over the two halves of the draws: how it still rises with them
    """

    log_p: Tensor
    pareto_k: Tensor
    rise: Tensor


def log_evidence(run: Run, particles: Particles, draws: int = 20, batch_size: int = 64) -> Tensor:
    """log mean_k p(images, latent_k) / q(latent_k | images), latent_k drawn from the run's guide: (n,), nats.

    One number a particle: its images are one observation, explained by one z, and log p of several is not the sum of
    theirs. A lower bound of log p(images) on average, which more draws tighten (Burda, Grosse and Salakhutdinov, ICLR
    2016); exact with one draw where the guide is the exact posterior. Give particles that were not fitted: those that
    were tell which model has more to fit with. Windowed images count for `Batch.window_power` of their likelihood.
    """
    batches = run.batches(particles, batch_size)
    total = [drawn(run, batch, draws, draws).log_weight.logsumexp(0).cpu() for batch in batches]
    return torch.cat(total) - math.log(draws)


def evidence(
    run: Run, particles: Particles, draws: int = 100, batch_size: int = 64, progress: Progress = quiet
) -> Evidence:
    """The same with what its draws tell of it; a few are drawn where the guide is the exact posterior."""
    batches = run.batches(particles, batch_size)
    total = progress(batches, particles.n_batches(batch_size), "evidence")
    return Evidence.of(_weighed(run, batch, draws) for batch in total)


def _weighed(run: Run, batch: Batch, draws: int) -> Evidence:
    log_weight = drawn(run, batch, FEW, FEW).log_weight.cpu().double()
    if float(log_weight.amax(0).sub(log_weight.amin(0)).max()) < SAME:
        log_p = log_weight.mean(0)
        return Evidence(log_p, torch.full_like(log_p, -math.inf), torch.zeros_like(log_p))
    log_weight = drawn(run, batch, draws, draws).log_weight.cpu().double()
    log_p = _log_mean(log_weight)
    halves = [_log_mean(half) for half in log_weight.tensor_split(2)]
    return Evidence(log_p, pareto_smoothed(log_weight)[1], (log_p - sum(halves) / 2).clamp_min(0))


def _log_mean(log_weight: Tensor) -> Tensor:
    return log_weight.logsumexp(0) - math.log(len(log_weight))
