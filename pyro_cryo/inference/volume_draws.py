"""Maps that may be true, given the images of a run: draws from the posterior of its map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from pyro_cryo.inference.run import Run
from pyro_cryo.model import MapDraw
from pyro_cryo.progress import Progress, quiet


def volume_draws(
    run: Run,
    draws: int,
    *,
    index: int | Sequence[int] | None = None,
    z: Tensor | np.ndarray | None = None,
    seed: int = 0,
    progress: Progress = quiet,
) -> Iterator[Tensor]:
    """So many draws of the map: (D, D, D), or (n, D, D, D) for n particles or z, those of a draw being true together.

    index: a particle, or some: maps at its z, as uncertain as the images leave it
    z:     (zdim,) or (n, zdim): maps of the state that the run has at this z
    Neither for a model without z.

    Noise, prior and poses are taken for known. Of one map draws are independent; of a family they are a chain, each
    after a pass over the images, and near ones are alike. A network's map has no posterior: its draws differ by z
    alone (`maps_have_posterior`), so that a given z leaves nothing to draw. Nothing of a map is local but what prior,
    z and images make so: with mask "none" the sd of a homogeneous map is nearly the same at every voxel.

    for volume in volume_draws(run, 50, index=12): ...
    """
    _check(run, draws, index, z)
    found = run.model.posterior_draws(run.particles, seed, progress)
    if found is None:
        assert index is not None
        return _guided(run, draws, index, seed)
    return _solved(run, progress(islice(found, draws), draws, "draws", unit="draw"), index, z)


def maps_have_posterior(run: Run) -> bool:
    """Whether the maps of a run are uncertain beside z; those of a network are not."""
    return run.model.posterior_draws(run.particles) is not None


def _solved(
    run: Run, found: Iterator[MapDraw], index: int | Sequence[int] | None, z: Tensor | np.ndarray | None
) -> Iterator[Tensor]:
    """The maps of some particles or z in each draw."""
    points = None if z is None else torch.as_tensor(z, dtype=torch.float32, device=run.device)
    for draw in found:
        if points is None:
            maps = torch.stack([draw.of(i) for i in index]) if isinstance(index, Sequence) else draw.of(index or 0)
        else:
            maps = draw.at(points) if points.ndim == 1 else torch.stack([draw.at(one) for one in points])
        yield maps.cpu()


def _guided(run: Run, draws: int, index: int | Sequence[int], seed: int) -> Iterator[Tensor]:
    """The model's maps at z drawn from the guide."""
    each = [index] if isinstance(index, int) else list(index)
    devices = [run.device] if run.device.type == "cuda" else []
    batches = [run.particles.batch(run.particles.images_of(torch.tensor([i])), run.device) for i in each]
    guide: Any = run.guide
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        drawn = [
            torch.cat([poutine.trace(guide).get_trace(batch).nodes["z"]["value"] for batch in batches])
            for _ in range(draws)
        ]
    for points in drawn:
        yield run.volume(points[0] if isinstance(index, int) else points)


def _check(run: Run, draws: int, index: int | Sequence[int] | None, z: Tensor | np.ndarray | None) -> None:
    name, zdim = type(run.model).__name__, run.model.zdim
    if draws < 2:
        raise ValueError(f"{draws} draws; give 2 or more, of fewer there is no spread")
    if zdim == 0:
        if index is not None or z is not None:
            raise ValueError(f"{name} has no z: its map is that of every particle; leave index and z out")
        return
    if (index is None) == (z is None):
        raise ValueError(f"{name} has a map for every z; give index or z, one of them")
    if z is not None:
        if np.ndim(z) not in (1, 2) or np.shape(z)[-1] != zdim:
            raise ValueError(f"z of shape {tuple(np.shape(z))}; expected ({zdim},) or (n, {zdim})")
        if not maps_have_posterior(run):
            raise ValueError(f"the maps of {name} have no posterior of their own and z is given; give index instead")
        return
    count = run.particles.n_particles
    for i in index if isinstance(index, Sequence) else [index]:
        if i is None or not 0 <= i < count:
            raise ValueError(f"particle {i} is not there; the run has particles 0 to {count - 1}")
