"""Maps that may be true, given the images of a run: draws from the posterior of its map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_cryo.inference.draws import drawn
from pyro_cryo.inference.map_draws import BATCH, deviation
from pyro_cryo.inference.reconstruct import add_up, half_sets
from pyro_cryo.inference.run import Run
from pyro_cryo.model import MapDraw
from pyro_cryo.progress import Progress, quiet
from pyro_cryo.volumes.conjugate import VoxelPosterior, score_noise
from pyro_cryo.volumes.prior import MapPrior


def volume_draws(
    run: Run,
    draws: int,
    *,
    index: int | Sequence[int] | np.ndarray | None = None,
    z: Tensor | np.ndarray | None = None,
    seed: int = 0,
    progress: Progress = quiet,
) -> Iterator[Tensor]:
    """So many draws of the map: (D, D, D), or (n, D, D, D) for n particles or z, those of a draw being true together.

    index: a particle, or some: maps at its z, as uncertain as the images leave it
    z:     (zdim,) or (n, zdim): maps of the state that the run has at this z
    Neither for a model without z.

    Noise and prior are taken for known; so are poses, unless they were found: then each draw has poses of its own, from
    their posteriors. Of one map draws are independent; of a family they are a chain, each after a pass over the images.
    A network's map has no posterior: its draws differ by z alone (`maps_have_posterior`), so that a given z leaves
    nothing to draw. Nothing of a map is local but what prior, z and images make so: with mask "none" the sd of a
    homogeneous map is nearly the same at every voxel.

    for volume in volume_draws(run, 50, index=12): ...
    """
    _check(run, draws, index, z)
    poses = {} if run.poses is None else {"poses": partial(run.poses.drawn, images=run.particles)}
    found = run.model.posterior_draws(run.particles, seed, progress, **poses)
    if found is None:
        assert index is not None
        return _guided(run, draws, index, seed)
    return _solved(run, progress(islice(found, draws), draws, "draws", unit="draw"), index, z)


def half_map_draws(run: Run, draws: int, seed: int = 0, progress: Progress = quiet) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of half-maps (D, D, D) of a run's consensus as other noise would have given them: error bars of their FSC.

    The map is drawn from its posterior, each half of the images shows it with noise of its own, and its half-map is
    solved for as `reconstruct` does: a parametric bootstrap on the normal equations, after one pass over the images.
    Of a symmetric map, whose noise has fewer independent coefficients, the pairs vary too little by the root of the
    order of its group.
    """
    prior = getattr(run.model, "consensus_prior", None)
    if prior is None:
        raise ValueError(f"{type(run.model).__name__} solves for no consensus; half-maps are drawn of models that do")
    return islice(_half_maps(run, prior, draws, seed, progress), 1, None)


def half_maps_again(run: Run, draws: int, seed: int = 0, progress: Progress = quiet) -> Iterator[tuple[Tensor, Tensor]]:
    """The half-maps (D, D, D) of one map as the images give them, and then so many pairs of `half_map_draws`."""
    if run.model.zdim:
        raise ValueError(f"halves of the images that {type(run.model).__name__} explains differ by what moves, too")
    return _half_maps(run, run.model.consensus_prior, draws, seed, progress)  # type: ignore[arg-type]


def _half_maps(run: Run, prior: MapPrior, draws: int, seed: int, progress: Progress) -> Iterator[tuple[Tensor, Tensor]]:
    """The run's own, and then those of other noise."""
    particles, generator = run.particles, torch.Generator().manual_seed(seed)
    model: Any = run.model
    symmetry, sigma = model.symmetry.to(run.device), model.sigma.detach()
    sets = half_sets(particles, generator)
    halves = add_up(particles, sets, sigma, symmetry, BATCH, run.device, progress)
    whole = (halves[0] + halves[1]).posterior(prior.scale, prior.tau, order=len(symmetry))
    mean = whole.mean(3e-3)
    everywhere = torch.ones((particles.box,) * 3, device=run.device)
    alone = [half.posterior(everywhere, order=len(symmetry)) for half in halves]
    first, second = (half.to_map(half.mean(1e-2)) for half in alone)
    yield first.cpu(), second.cpu()
    for _ in progress(range(draws), draws, "half-maps", unit="draw"):
        volume = whole.to_map(mean) + deviation(whole, generator)
        first, second = (_seen_again(half, volume, generator) for half in alone)
        yield first.cpu(), second.cpu()


def _seen_again(half: VoxelPosterior, volume: Tensor, generator: torch.Generator) -> Tensor:
    """The posterior mean of a map (D, D, D) from the same views of `volume` with other noise."""
    noise = score_noise(half.spectrum, generator) / half.order**0.5
    again = half.stepped(volume, half.in_box(noise))
    return half.to_map(again.mean(1e-2))


def maps_have_posterior(run: Run) -> bool:
    """Whether the maps of a run are uncertain beside z; those of a network are not."""
    return run.model.posterior_draws(run.particles) is not None


def _solved(
    run: Run, found: Iterator[MapDraw], index: int | Sequence[int] | np.ndarray | None, z: Tensor | np.ndarray | None
) -> Iterator[Tensor]:
    """The maps of some particles or z in each draw."""
    if z is None:
        numbers, one = [0] if index is None else _numbers(index), index is None or np.ndim(index) == 0
        for draw in found:
            maps = torch.stack([draw.of(i) for i in numbers]).cpu()
            yield maps[0] if one else maps
        return
    points = torch.as_tensor(z, dtype=torch.float32, device=run.device)
    for draw in found:
        maps = torch.stack([draw.at(point) for point in points.reshape(-1, points.shape[-1])]).cpu()
        yield maps[0] if points.ndim == 1 else maps


def _guided(run: Run, draws: int, index: int | Sequence[int] | np.ndarray, seed: int) -> Iterator[Tensor]:
    """The model's maps at z drawn from the guide."""
    with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
        torch.manual_seed(seed)
        batches = run.batches(run.some(_numbers(index)), BATCH)
        z = torch.cat([drawn(run, batch, draws).sites["z"] for batch in batches], 1)
    for points in z:
        yield run.volume(points[0] if np.ndim(index) == 0 else points)


def _numbers(index: int | Sequence[int] | np.ndarray) -> list[int]:
    """One particle, or some, as a list."""
    return [int(i) for i in np.atleast_1d(np.asarray(index))]


def _check(run: Run, draws: int, index: int | Sequence[int] | np.ndarray | None, z: Tensor | np.ndarray | None) -> None:
    name, zdim = type(run.model).__name__, run.model.zdim
    if draws < 2:
        raise ValueError(f"{draws} draws; give 2 or more, of fewer there is no spread")
    if zdim == 0:
        if index is not None or z is not None:
            raise ValueError(f"{name} has no z: its map is that of every particle; leave out z, index and against")
        return
    if (index is None) == (z is None):
        raise ValueError(f"{name} has a map for every z; give index or z, one of them")
    if z is not None:
        if np.ndim(z) not in (1, 2) or np.shape(z)[-1] != zdim:
            raise ValueError(f"z of shape {tuple(np.shape(z))}; expected ({zdim},) or (n, {zdim})")
        if not maps_have_posterior(run):
            raise ValueError(f"the maps of {name} have no posterior of their own and z is given; give index instead")
        return
    assert index is not None
    run.some(_numbers(index))
