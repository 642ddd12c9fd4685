"""Draws of what is latent about particles, from a run's guide, and what each weighs beside the model.

A guide q is made to come near p(latent | images) and need not be it. The weights of its draws tell how near,

    w_s = p(images, latent_s) / q(latent_s | images),    latent_s ~ q:

their mean is p(images), draws picked by them are the exact posterior's where their distribution has no heavy tail, and
the tail says so (`pyro_cryo.inference.importance`).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_cryo.data.batch import Batch, of_copies, to_copies
from pyro_cryo.inference.importance import GOOD, pareto_smoothed, resampled

if TYPE_CHECKING:
    from pyro_cryo.inference.run import Run


@dataclass(frozen=True)
class Draws:
    """S draws of the latent sites of n particles, seen in B images.

    sites:      by name (S, n, *event), or (S, B, *event) of what each image has on its own
    log_weight: (W, n) log w of the first W draws, nats
    shared:     posterior means of what a model has beside its particles, by name
    """

    sites: dict[str, Tensor]
    log_weight: Tensor
    shared: dict[str, Tensor]

    @cached_property
    def smoothed(self) -> tuple[Tensor, Tensor]:
        """Normalised log weights (W, n), their tails smoothed, and Pareto's k (n,); on the CPU."""
        return pareto_smoothed(self.log_weight.cpu())

    @property
    def trusted(self) -> Tensor:
        """(n,) whether weighed draws stand for the posterior: k is below 0.7."""
        return self.smoothed[1] < GOOD


def drawn(run: Run, batch: Batch, draws: int, weighed: int = 0) -> Draws:
    """Draws of a batch's particles; the first `weighed` of them are weighed, each by a look of the model at the images.

    What a model has beside its particles (`volume`) is held at its posterior mean.
    """
    if not 0 <= weighed <= draws or draws < 1:
        raise ValueError(f"{weighed} of {draws} draws are to be weighed; expected 0 or more, of 1 or more")
    with torch.no_grad(), pyro.validation_enabled(False):
        together = torch.arange(draws).split(draws if run.poses is None else batch.times_at_once)
        guesses = [_guessed(run, batch, len(part), int(part[0]) < weighed) for part in together]
        sites = {name: torch.cat([guess.sites[name] for guess in guesses]) for name in guesses[0].sites}
        log_weight, shared = torch.cat([guess.log_weight for guess in guesses])[:weighed], guesses[0].shared
        for part in torch.arange(weighed).split(batch.times_at_once) if weighed else ():
            copies, given = batch.again(len(part)), {name: to_copies(value[part]) for name, value in sites.items()}
            told = trace_of(poutine.condition(run.model, shared | given), copies)
            log_weight[part] += of_copies(log_density(told, copies), len(part))
    return Draws(sites, log_weight, shared)


def picked(found: Draws, batch: Batch, draws: int, generator: torch.Generator) -> Draws:
    """S draws that are the exact posterior's, of draws all weighed; of a particle that is not trusted the first S.

    Those that weigh more than 1 / S of all are picked more than once: from several times S, few do.
    """
    chosen = resampled(found.smoothed[0], draws, generator)
    chosen = torch.where(found.trusted, chosen, torch.arange(draws)[:, None]).to(found.log_weight.device)
    sites = {name: _at(value, chosen, batch) for name, value in found.sites.items()}
    return Draws(sites, found.log_weight.gather(0, chosen), found.shared)


def predicted(run: Run, batch: Batch, sites: dict[str, Tensor]) -> Tensor:
    """Images that the model makes of latent sites (n, *event) and (B, *event), noise and all: (B, P, 2).

    What it has beside its particles is drawn from its prior, unless `Draws.shared` is among the sites.
    """
    with torch.no_grad(), pyro.validation_enabled(False):
        story = poutine.condition(poutine.uncondition(run.model), sites)
        return torch.as_tensor(trace_of(story, batch).nodes["image"]["value"])


def log_density(trace: Any, batch: Batch) -> Tensor:
    """log p of all that a trace says of each particle, windowed images counted as the model counts: (*draws, n)."""
    trace.compute_log_prob(site_filter=lambda name, node: of_particles(node))
    total = batch.image.new_zeros(batch.particles)
    for node in trace.nodes.values():
        if node["type"] == "sample" and of_particles(node):
            total = total + node["log_prob"]
    return total


def trace_of(story: Any, batch: Batch) -> Any:
    """Pyro's trace of a model or a guide, the particles counted for themselves."""
    return poutine.trace(story).get_trace(batch.standing_for(batch.particles))


def of_particles(node: Any) -> bool:
    """Whether a site is one of the particles'."""
    return any(frame.name == "particles" for frame in node["cond_indep_stack"])


def latent_of(trace: Any) -> list[tuple[str, Any]]:
    """The sites that a guide draws."""
    return [(name, trace.nodes[name]) for name in trace.stochastic_nodes if name != "particles"]


def _guessed(run: Run, batch: Batch, draws: int, weighed: bool) -> Draws:
    """What the guide draws; log_weight is -log q, if it is asked for.

    One look at images in known poses serves all draws; else each has a pose, and copies of the images, of its own.
    """
    once = run.poses is None
    looked = batch if once else batch.again(draws)
    plate = pyro.plate("draws", draws, dim=-2) if once else nullcontext()
    with plate, poutine.block(hide_fn=lambda node: not of_particles(node)):
        trace = trace_of(run.guide, looked)

    def each(values: Tensor) -> Tensor:
        return values if once else of_copies(values, draws)

    latent = latent_of(trace)
    mine = [(name, node) for name, node in latent if of_particles(node) and not node["infer"].get("is_auxiliary")]
    sites = {name: each(node["value"]) for name, node in mine}
    shared = {name: node["fn"].mean for name, node in latent if not of_particles(node)}
    density = each(log_density(trace, looked)) if weighed else batch.image.new_zeros(0, batch.particles)
    # one for all where nothing is guessed
    return Draws(sites, -density.expand(draws, -1) if weighed else density, shared)


def _at(value: Tensor, draw: Tensor, batch: Batch) -> Tensor:
    """Of a site (W, n, *event) or (W, B, *event) the draws (S, n) of each particle."""
    draw = draw if value.shape[1] == batch.particles else batch.of_images(draw, 1)
    draw = draw.view(*draw.shape, *[1] * (value.ndim - 2))
    return value.gather(0, draw.expand(*draw.shape[:2], *value.shape[2:]))
