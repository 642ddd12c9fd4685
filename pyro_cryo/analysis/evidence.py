"""How probable particles are under a fit with all that is latent integrated out: what models are compared by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_cryo.data.particles import Particles
from pyro_cryo.inference.draws import drawn
from pyro_cryo.inference.run import Run


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
