"""The posterior of chosen particles by Hamiltonian Monte Carlo: slow, of no family, what a guide is held to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from torch import Tensor
from torch.distributions import biject_to

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.distributions.so3 import log_jacobian
from pyro_cryo.inference.draws import log_density, of_particles, trace_of
from pyro_cryo.inference.posterior import as_arviz, described, noise_draws
from pyro_cryo.physics.rotations import exp
from pyro_cryo.progress import Progress, quiet

if TYPE_CHECKING:
    from pyro_cryo.inference.run import Run


def nuts(
    run: Run,
    particles: Particles,
    draws: int = 300,
    *,
    index: Sequence[int] | None = None,
    warmup: int = 300,
    seed: int = 0,
    progress: Progress = quiet,
) -> Any:
    """What `run.posterior` gives, drawn by Pyro's NUTS from p(latent | images) at the fitted map: seconds a particle.

    index: numbers by which the particles are named; default: their places

    Rotations move in tangent coordinates at a draw of the guide's, with the Haar measure's density there.

    Raises ValueError where a site is discrete: NUTS has no gradient to go by.
    """
    parts = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        batches = run.batches(particles, 1)  # one particle with all its images
        for batch in progress(batches, particles.n_batches(1), "nuts"):
            parts.append(_sampled(run, batch, draws, warmup))
        sigma = noise_draws(run, draws)
    shown = particles.particle.sort().values
    sites = {name: torch.cat([part[name] for part in parts], 1).cpu() for name in parts[0]}
    names = range(particles.n_particles) if index is None else index
    return as_arviz({"posterior": sites}, sigma, names, described(run, particles), shown)


def _sampled(run: Run, batch: Batch, draws: int, warmup: int) -> dict[str, Tensor]:
    """Sites (draws, 1, *event), or (draws, B, *event), of the one particle of a batch."""
    with torch.no_grad(), pyro.validation_enabled(False):
        guide, story = trace_of(run.guide, batch), trace_of(run.model, batch)
    own = [name for name in guide.stochastic_nodes if name in story.nodes and name != "particles"]
    shared = {name: guide.nodes[name]["fn"].mean for name in own if not of_particles(story.nodes[name])}
    start = {name: guide.nodes[name]["value"] for name in own if name not in shared}
    supports = {name: story.nodes[name]["fn"].support for name in start}
    discrete = [name for name in start if getattr(story.nodes[name]["fn"], "has_enumerate_support", False)]
    if discrete:
        raise ValueError(
            f"{discrete[0]} of {type(run.model).__name__} is discrete, which NUTS has no gradient for; "
            "its guide is exact: run.posterior draws from it"
        )
    moves = {name: biject_to(support) for name, support in supports.items() if name != "rotation"}

    def placed(free: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Values of the sites at unconstrained ones, and the log volume of the latter."""
        values, volume = {}, batch.image.new_zeros(())
        for name, at in free.items():
            if name == "rotation":
                values[name] = exp(at) @ start[name]
                volume = volume - log_jacobian(at.square().sum(-1)).sum()
            else:
                values[name] = moves[name](at)
                volume = volume + moves[name].log_abs_det_jacobian(at, values[name]).sum()
        return values, volume

    def potential(free: dict[str, Tensor]) -> Tensor:
        values, volume = placed(free)
        story = trace_of(poutine.condition(run.model, {**shared, **values}), batch)
        return -log_density(story, batch).sum() - volume

    begin = {name: moves[name].inv(value) for name, value in start.items() if name in moves}
    if "rotation" in start:
        begin["rotation"] = torch.zeros_like(start["rotation"][..., 0])
    with pyro.validation_enabled(False):
        chain = MCMC(
            NUTS(potential_fn=potential, full_mass=True), draws, warmup, initial_params=begin, disable_progbar=True
        )
        chain.run()
        return placed(chain.get_samples())[0]
