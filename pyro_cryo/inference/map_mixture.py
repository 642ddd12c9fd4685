"""Several maps at once from one: 3-D classification of images whose poses are not known.

A pass searches a sample of the images in all maps, over the whole grid of poses, and adds them to the maps in which
they are found, by weight; what earlier passes added counts on, less and less (stepwise expectation maximisation, Cappe
and Moulines, J. R. Stat. Soc. B 71 (2009) 593). The maps begin as one, parted by chance, at a band so low that cells of
30 degrees tell poses apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_cryo.inference.pose_em import PoseEM, Solved, Sums, box_of
from pyro_cryo.inference.search import Level

BANDS = (5,) * 24 + (6,) * 6 + (7,) * 14  # cycles a box, a pass each
SAMPLE = 80  # images of a pass, for every map
VIEWS = 8  # of an image, in all maps together
COUNTS_ON = 0.6  # of what earlier passes added
LEAST_SHARE = 0.2  # of an equal share, that a map keeps


@dataclass(frozen=True)
class MapMixture:
    """M maps of one box, and the log of what share of the particles each has, (M,)."""

    known: tuple[Solved, ...]
    log_share: Tensor

    def on(self, box: int) -> MapMixture:
        """The same maps on another box of the same field of view."""
        return MapMixture(tuple(one.on(box) for one in self.known), self.log_share)


def parted(em: PoseEM, known: Solved, count: int) -> MapMixture:
    """`count` maps, all begun as one that the images have in common."""
    mixture = MapMixture((known,) * count, torch.full((count,), -float(count)).log_softmax(0))
    before: list[Sums] = []
    for number, kmax in enumerate(BANDS):
        mixture, before = _passed(em, mixture.on(box_of(kmax, em.particles.box)), kmax, before, number == 0)
    return mixture


def _passed(
    em: PoseEM, mixture: MapMixture, kmax: float, before: list[Sums], by_chance: bool
) -> tuple[MapMixture, list[Sums]]:
    """The next maps, from a sample of the images, and the sums that they are made of."""
    count = len(mixture.known)
    rows = em.sample(SAMPLE * count)
    found = em.search(rows, mixture.known, grids(kmax), VIEWS, apart=0.0, log_share=mixture.log_share)
    if by_chance:
        drawn = torch.randint(count, (em.particles.n_particles,), generator=em.generator)
        found.which.copy_(drawn[em.particles.particle[rows]][:, None].expand_as(found.which))
    sums, weight = [em.sums(one) for one in mixture.known], found.log_mass.softmax(1)
    em.add_up(rows, found, weight, sums)
    if before and before[0].known.box == sums[0].known.box:
        for own, earlier in zip(sums, before, strict=True):
            own.count_on(earlier, COUNTS_ON)
    em.learn_noise(*sums)
    share = torch.zeros(count).index_add_(0, found.which.flatten(), weight.flatten()) / len(rows)
    share = 0.5 * (mixture.log_share.exp() + share.clamp_min(LEAST_SHARE / count))
    return MapMixture(tuple(em.solved(own) for own in sums), (share / share.sum()).log()), sums


def grids(kmax: float) -> tuple[Level, ...]:
    """One level, searched whole: cells of 30 degrees, or of 15 where the band tells them apart."""
    return (Level(1 if kmax < 6 else 2, 3, kmax),)
