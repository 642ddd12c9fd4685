"""How probable particles are under a fit with all that is latent integrated out: what models are compared by."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.inference.run import Run


def log_evidence(run: Run, particles: Particles, draws: int = 20, batch_size: int = 64) -> Tensor:
    """log mean_k p(images, latent_k) / q(latent_k | images), latent_k drawn from the run's guide: (n,), nats.

    One number a particle: its images are one observation, explained by one z, and log p of several is not the sum of
    theirs. A lower bound of log p(images) on average, which more draws tighten (Burda, Grosse and Salakhutdinov, ICLR
    2016); exact with one draw where the guide is the exact posterior. Give particles that were not fitted: those that
    were tell which model has more to fit with. Windowed images count for `Batch.window_power` of their likelihood.
    """
    with torch.no_grad():
        return torch.cat([_of_batch(run, b, draws).cpu() for b in particles.batches(batch_size, device=run.device)])


def _of_batch(run: Run, batch: Batch, draws: int) -> Tensor:
    ratios = []
    for _ in range(draws):
        guide: Any = poutine.trace(run.guide).get_trace(batch)  # type: ignore[arg-type, call-arg]
        model: Any = poutine.trace(poutine.replay(run.model, guide)).get_trace(batch)  # type: ignore[call-arg]
        guide.compute_log_prob()
        model.compute_log_prob()
        own = (batch.particles,)
        latent = [name for name in guide.stochastic_nodes if guide.nodes[name]["unscaled_log_prob"].shape == own]
        ratio = batch.window_power * model.nodes["image"]["unscaled_log_prob"]
        for name in latent:
            ratio = ratio + model.nodes[name]["unscaled_log_prob"] - guide.nodes[name]["unscaled_log_prob"]
        ratios.append(ratio)
    return torch.stack(ratios).logsumexp(0) - math.log(draws)
