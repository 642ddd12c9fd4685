"""Passes over poses in stages: the state after each is kept, so that what was killed goes on after its last one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pyro_cryo.guides.defocus import Defocus
from pyro_cryo.guides.poses import PoseModes, PosePrior
from pyro_cryo.inference.map_mixture import MapMixture
from pyro_cryo.inference.pose_em import PoseEM, Solved
from pyro_cryo.inference.state import write_atomically


@dataclass(frozen=True)
class Reached:
    """What a stage came to: a map, posteriors of poses, and the mean log evidence of an image beside an empty one.

    mixture: the maps that are parting from it, where particles are of several kinds; poses are found afterwards
    """

    known: Solved
    modes: PoseModes
    evidence: float
    mixture: MapMixture | None = None


Stage = Callable[[Reached | None], Reached]


@dataclass(frozen=True)
class Posed:
    """Posteriors of the poses of N images, on the CPU, and a map that goes with them.

    modes:    translations in pixels of the particles' box D
    prior:    under which they were found
    volume:   (D, D, D)
    sigma:    (noise groups, D / 2 + 1) noise sd
    evidence: mean log evidence of an image beside an empty one
    defocus:  posteriors of the offsets from the table's; None where it was not refined
    """

    modes: PoseModes
    prior: PosePrior
    volume: Tensor
    sigma: Tensor
    evidence: float
    defocus: Defocus | None = None


def through(em: PoseEM, stages: Sequence[Stage], kept: Path | None) -> Posed:
    """All stages, one after the other; from the state in the file `kept` where one is, which each stage replaces."""
    done, reached = (0, None) if kept is None or not kept.exists() else _read(em, kept)
    for number, stage in enumerate(stages[done:], done + 1):
        reached = stage(reached)
        if kept is not None:
            _write(em, number, reached, kept)
    assert reached is not None
    volume = reached.known.on(em.particles.box).volume
    return Posed(reached.modes, em.prior, volume, em.sigma, reached.evidence, em.defocus)


def _write(em: PoseEM, done: int, reached: Reached, path: Path) -> None:
    state = {
        "done": done,
        "volume": reached.known.volume,
        "variance": reached.known.variance,
        "modes": reached.modes.tensors,
        "evidence": reached.evidence,
        "mixture": None if reached.mixture is None else reached.mixture.state,
        "spread": (em.prior.turn_sd, em.prior.shift_sd),
        "sigma": em.sigma,
        "defocus": None if em.defocus is None else em.defocus.tensors,
        "random": em.generator.get_state(),
    }
    write_atomically(path, lambda beside: torch.save(state, beside))


def _read(em: PoseEM, path: Path) -> tuple[int, Reached]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    turn_sd, shift_sd = state["spread"]
    em.prior, em.sigma = replace(em.prior, turn_sd=turn_sd, shift_sd=shift_sd), state["sigma"].to(em.device)
    em.generator.set_state(state["random"])
    if state["defocus"] is not None:
        em.defocus = Defocus(*state["defocus"])
        em.particles = em.particles.with_defocus(em.defocus.mean)
    known = Solved(state["volume"].to(em.device), state["variance"].to(em.device))
    mixture = None if state["mixture"] is None else MapMixture.of(state["mixture"], em.device)
    return state["done"], Reached(known, PoseModes(*state["modes"]), state["evidence"], mixture)
