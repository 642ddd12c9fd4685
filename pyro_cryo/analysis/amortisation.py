"""What an encoder loses by being one function for all images, and what a Gaussian of each particle's own does.

The evidence bound of a particle, E_q[log p(images, z) - log q(z)], falls short of log p(images) by KL(q || posterior).
Of a run's guide it falls short by two parts,

    log p(images) - bound(guide)  =  gap + left,    gap = bound(own Gaussian) - bound(guide):

the first is what the guide loses at this particle to the Gaussian with the posterior's mean and covariance
(`Run.semi_amortised`), whose bound is about the largest that one has, the second what no Gaussian can be.
Source: Cremer, Li and Duvenaud, ICML 2018.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.exact import ExactGuide
from pyro_cryo.inference.draws import Draws, drawn
from pyro_cryo.inference.importance import LEAST
from pyro_cryo.inference.run import Run
from pyro_cryo.progress import Progress, quiet
from pyro_cryo.rows import Rows


@dataclass(frozen=True)
class Amortisation(Rows):
    """Evidence bounds of n particles under a run's guide and under a Gaussian for each, nats.

    guide, best:     (n,) bounds: mean log weights of draws
    evidence:        (n,) log p(images): log mean weight, of the one with the higher bound
    guide_k, best_k: (n,) Pareto k of the weights: minus infinity where q is the posterior, and below 0.7 where draws
                     picked by weight are its draws
    """

    guide: Tensor
    best: Tensor
    evidence: Tensor
    guide_k: Tensor
    best_k: Tensor

    @property
    def gap(self) -> Tensor:
        """Nats (n,) that the guide loses to the particle's own Gaussian; below 0 mostly by the chance of draws."""
        return self.best - self.guide

    @property
    def left(self) -> Tensor:
        """Nats (n,) that this Gaussian leaves, KL(q || posterior): how far the posterior is from any."""
        return self.evidence - self.best


def amortisation(
    run: Run, particles: Particles, draws: int = 100, seed: int = 0, batch_size: int = 64, progress: Progress = quiet
) -> Amortisation:
    """What the guide of a run loses of the evidence of each particle.

    A guide that is exact (of a linear subspace, a manifold, classes) has nothing to lose: it is compared with itself.

    draws: of each q, all weighed beside the model

    Raises ValueError of fewer than 25 draws, and for runs that `Run.semi_amortised` refuses.

        found = amortisation(run, particles[:200])
        print(found.gap.mean(), found.left.mean(), (found.best_k < 0.7).float().mean())
    """
    run.refuse_without_z()
    if draws < LEAST:
        raise ValueError(f"{draws} draws have no tail to tell k by; give {LEAST} or more")
    best = run if isinstance(run.guide, ExactGuide) else run.semi_amortised()
    parts = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in progress(run.batches(particles, batch_size), particles.n_batches(batch_size), "amortisation"):
            own = drawn(run, batch, draws, draws)
            parts.append(_compared(own, own if best is run else drawn(best, batch, draws, draws)))
    return Amortisation.of(parts)


def _compared(own: Draws, other: Draws) -> Amortisation:
    """Of weighed draws of both."""
    weights = [draws.log_weight.double().cpu() for draws in (own, other)]
    guide, best = (weight.mean(0) for weight in weights)
    means = [weight.logsumexp(0) - math.log(len(weight)) for weight in weights]
    evidence = torch.where(best >= guide, means[1], means[0])
    return Amortisation(guide, best, evidence, own.smoothed[1], other.smoothed[1])
