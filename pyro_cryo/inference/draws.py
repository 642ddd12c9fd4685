"""Draws of what is latent about particles, from a run's guide, and what each weighs beside the model.

A guide q is made to come near p(latent | images) and need not be it. The weights of its draws tell how near,

    w_s = p(images, latent_s) / q(latent_s | images),    latent_s ~ q:

their mean is p(images), draws picked by them are the exact posterior's where their distribution has no heavy tail, and
the tail says so (`pyro_cryo.inference.importance`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_cryo.data.batch import Batch
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
        traces = _traces(run, batch, draws)
        together = torch.cat if run.poses is None else torch.stack
        latent = latent_of(traces[0])
        names = [name for name, node in latent if of_particles(node) and not node["infer"].get("is_auxiliary")]
        sites = {name: together([trace.nodes[name]["value"] for trace in traces]) for name in names}
        shared = {name: node["fn"].mean for name, node in latent if not of_particles(node)}
        log_weight = batch.image.new_zeros(weighed, batch.particles)
        if weighed:
            guessed = together([log_density(trace, batch) for trace in traces[:weighed]])
            log_weight -= guessed if guessed.ndim == 1 else guessed[:weighed]  # one for all where nothing is guessed
        for s in range(weighed):
            given = shared | {name: value[s] for name, value in sites.items()}
            log_weight[s] += log_density(trace_of(poutine.condition(run.model, given), batch), batch)
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


def _traces(run: Run, batch: Batch, draws: int) -> list[Any]:
    """The guide's: one of all draws where it looks at the images from known poses, else one for each drawn pose."""
    if run.poses is not None:
        return [trace_of(run.guide, batch) for _ in range(draws)]
    with pyro.plate("draws", draws, dim=-2), poutine.block(hide_fn=lambda node: not of_particles(node)):
        return [trace_of(run.guide, batch)]


def _at(value: Tensor, draw: Tensor, batch: Batch) -> Tensor:
    """Of a site (W, n, *event) or (W, B, *event) the draws (S, n) of each particle."""
    draw = draw if value.shape[1] == batch.particles else batch.of_images(draw, 1)
    draw = draw.view(*draw.shape, *[1] * (value.ndim - 2))
    return value.gather(0, draw.expand(*draw.shape[:2], *value.shape[2:]))
