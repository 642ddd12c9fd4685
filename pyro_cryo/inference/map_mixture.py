"""Several maps at once from one: 3-D classification of images whose poses are not known.

A pass searches a sample of the images in all maps, over the whole grid of poses, and adds them to the maps in which
they are found, by weight; what earlier passes added counts on, less and less (stepwise expectation maximisation, Cappe
and Moulines, J. R. Stat. Soc. B 71 (2009) 593). The maps begin as one, parted by chance, at a band so low that cells of
30 degrees tell poses apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_cryo.inference.pose_em import Added, PoseEM, Solved, box_of
from pyro_cryo.inference.search import Level

BANDS = (5,) * 24 + (6,) * 6 + (7,) * 14  # cycles a box, a pass each
SAMPLE = 80  # images of a pass, for every map
VIEWS = 8  # of an image, in all maps together
COUNTS_ON = 0.6  # of what earlier passes added
LEAST_SHARE = 0.2  # of an equal share, that a map keeps


@dataclass(frozen=True)
class MapMixture:
    """M maps of one box, and the log of what share of the particles each has, (M,).

    added: what the last pass made each map of; nothing where they are still one
    """

    known: tuple[Solved, ...]
    log_share: Tensor
    added: tuple[Added, ...] = ()

    @staticmethod
    def begun(known: Solved, count: int) -> MapMixture:
        """`count` maps, all of them one that the images have in common."""
        return MapMixture((known,) * count, torch.full((count,), -float(count)).log_softmax(0))

    def on(self, box: int) -> MapMixture:
        """The same maps on another box of the same field of view."""
        return MapMixture(tuple(one.on(box) for one in self.known), self.log_share, self.added)

    @property
    def state(self) -> dict[str, Any]:
        """All of it as tensors, to be kept in a file."""
        maps = [(one.volume, one.variance) for one in self.known]
        return {"maps": maps, "log_share": self.log_share, "added": [list(vars(one).values()) for one in self.added]}

    @staticmethod
    def of(state: dict[str, Any], device: torch.device) -> MapMixture:
        """What was kept."""
        known = tuple(Solved(volume.to(device), variance.to(device)) for volume, variance in state["maps"])
        added = tuple(Added(*(value.to(device) for value in values)) for values in state["added"])
        return MapMixture(known, state["log_share"], added)


def passed(em: PoseEM, mixture: MapMixture, kmax: float) -> MapMixture:
    """The next maps, from a sample of the images."""
    mixture, count = mixture.on(box_of(kmax, em.particles.box)), len(mixture.known)
    rows = em.sample(SAMPLE * count)
    found = em.search(rows, mixture.known, grids(kmax), VIEWS, apart=0.0, log_share=mixture.log_share)
    if not mixture.added:  # by chance
        drawn = torch.randint(count, (em.particles.n_particles,), generator=em.generator)
        found.which.copy_(drawn[em.particles.particle[rows]][:, None].expand_as(found.which))
    sums, weight = [em.sums(one) for one in mixture.known], found.log_mass.softmax(1)
    em.add_up(rows, found, weight, sums)
    if mixture.added and mixture.added[0].box == mixture.known[0].box:
        for own, earlier in zip(sums, mixture.added, strict=True):
            own.count_on(earlier, COUNTS_ON)
    em.learn_noise(*sums)
    share = torch.zeros(count).index_add_(0, found.which.flatten(), weight.flatten()) / len(rows)
    share = 0.5 * (mixture.log_share.exp() + share.clamp_min(LEAST_SHARE / count))
    return MapMixture(
        tuple(em.solved(own) for own in sums), (share / share.sum()).log(), tuple(own.added for own in sums)
    )


def grids(kmax: float) -> tuple[Level, ...]:
    """One level, searched whole: cells of 30 degrees, or of 15 where the band tells them apart."""
    return (Level(1 if kmax < 6 else 2, 3, kmax),)
