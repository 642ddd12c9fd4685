"""Leave-one-out log p of particles that were fitted, over draws of what a fit knows beside them: its maps.

Draws maps_s from their posterior given all images are weighed to be those given all but particle i's,

    p(x_i | x_-i) = sum_s w_s p(x_i | maps_s),    w_s ~ 1 / p(x_i | maps_s),

each p with z and contrast integrated out: conditional on its own z a particle would be left out of nothing. The tails
of the weights are smoothed, and Pareto's k of a particle says whether its own images told the maps too much for that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_cryo.analysis.compare import elpd_data
from pyro_cryo.analysis.evidence import Evidence
from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.coefficients import images_at_once
from pyro_cryo.inference.draws import log_density, trace_of
from pyro_cryo.inference.importance import GOOD, LEAST, pareto_smoothed
from pyro_cryo.inference.run import Run
from pyro_cryo.pose import seen_from
from pyro_cryo.progress import Progress, quiet

if TYPE_CHECKING:
    from pyro_cryo.model import MapDraw

PARTICLES = 300
POSES = 20  # of each particle, over which its pose is integrated


def loo(
    run: Run,
    index: Sequence[int] | None = None,
    draws: int = 100,
    *,
    seed: int = 0,
    progress: Progress = quiet,
) -> Any:
    """PSIS-LOO of a run's own particles: ArviZ's ELPDData, with k and log p(x_i | x_-i) in nats of each.

    index: numbers of particles (default: 300 at random)
    draws: of the maps, as `inference.volume_draws` makes them: independent ones of one map, a chain of a family, a pass
           over the images each. Bad k are bad for one and all: a model of many maps is told much by each of few images

    Noise, priors of the maps and the population of z stay as all images told them, which is the same for every particle
    but for one part in their number. So do poses where they were found, of the others; that of a particle left out is
    integrated out, by 20 draws of its guide weighed beside the prior. p_loo is the effective number of parameters that
    these particles told. In memory are images of the particles asked for, one draw, and log p of each by draw.

    Raises ValueError where maps have no posterior (a network's), and of fewer than 25 draws.

    Source: Vehtari, Gelman and Gabry, Statistics and Computing 27 (2017) 1413.
    """
    if draws < LEAST:
        raise ValueError(f"{draws} draws have no tail that tells k; give {LEAST} or more, 100 for k to say something")
    maps = run.model.posterior_draws(run.particles, seed, progress)
    if maps is None:
        raise ValueError(
            f"the maps of {type(run.model).__name__} have no posterior to leave particles out of; compare fits on "
            "particles that were held out (analysis.compare)"
        )
    if index is None:
        count = run.particles.n_particles
        index = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:PARTICLES].sort().values.tolist()
    with torch.no_grad():
        drawn = progress(islice(maps, draws), draws, "draws", unit="draw")
        return left_out(*_log_p(run, drawn, run.some(index), seed))


def left_out(given: Tensor, log_p: Tensor | None = None) -> Any:
    """ELPDData of log p(x_i | globals_s) (S, n), what draws of globals had been told of each particle.

    log_p: (S, n) where it is asked for otherwise than it was told: with its pose integrated out, say
    """
    log_p = given if log_p is None else log_p
    log_weight, k = pareto_smoothed(-given)
    each = (log_weight + log_p.double().cpu()).logsumexp(0)
    everything = log_p.double().cpu().logsumexp(0) - math.log(len(log_p))
    found = Evidence(each, k, torch.zeros_like(each))
    good = min(1 - 1 / math.log10(len(log_p)), GOOD)
    return elpd_data(found, len(log_p), float((everything - each).sum()), good)


def _log_p(run: Run, maps: Iterable[MapDraw], particles: Particles, seed: int) -> tuple[Tensor, Tensor | None]:
    """log p (S, n) under draws of maps at the poses of the particles; where these were found, integrated out too."""
    sigma, size = run.model.sigma.detach(), images_at_once(len(particles.half), run.device)
    told = list(particles.batches(size, device=run.device))
    posed: list[_Posed] = []
    if run.poses is not None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            posed = [_Posed(run, batch) for batch in run.batches(particles, size)]
    given, log_p = [], []
    for draw in maps:
        given.append(torch.cat([draw.log_prob(batch, sigma) for batch in told]).cpu())
        log_p += [torch.cat([own.log_prob(draw, sigma) for own in posed]).cpu()] if posed else []
    return torch.stack(given), torch.stack(log_p) if posed else None


class _Posed:
    """A batch at poses drawn from the guide, and what each draw weighs beside the prior of poses, (n,)."""

    def __init__(self, run: Run, batch: Batch) -> None:
        self.batch = batch
        self.poses = [_drawn_pose(run, batch) for _ in range(POSES)]

    def log_prob(self, draw: MapDraw, sigma: Tensor) -> Tensor:
        """log p of each particle (n,), its pose integrated out."""
        each = []
        for rotation, translation, log_weight in self.poses:
            posed = replace(self.batch, rotation=rotation, translation=translation)
            each.append(log_weight + draw.log_prob(posed, sigma))
        return torch.stack(each).logsumexp(0) - math.log(len(each))


def _drawn_pose(run: Run, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Rotation (B, 3, 3) and translation (B, 2) of images, from the guide, and log p / q of each particle (n,)."""

    def story(own: Batch) -> None:
        with pyro.plate("particles", own.size, subsample=own.shown, dim=-1):
            run.model.poses(own)

    guess: Any = trace_of(run.guide.poses, batch)  # type: ignore[union-attr]
    sites = {name: guess.nodes[name]["value"] for name in ("rotation", "translation")}
    log_weight = log_density(trace_of(poutine.condition(story, sites), batch), batch) - log_density(guess, batch)
    return seen_from(sites["rotation"], batch), sites["translation"], log_weight
