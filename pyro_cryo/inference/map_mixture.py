"""Several maps at once from one: 3-D classification of images whose poses are not known.

A pass searches a sample of the images in all maps, over the whole grid of poses, and adds them to the maps in which
they are found, by weight; what earlier passes added counts on, less and less (stepwise expectation maximisation, Cappe
and Moulines, J. R. Stat. Soc. B 71 (2009) 593). The maps begin as one, parted by chance, at a band so low that cells of
30 degrees tell poses apart. A map in which next to no images are found any more becomes one with that of most images,
from which it parts anew.

Where no more maps part than there are kinds, two maps may come to one kind and another map to what is left of two, in
poses that agree with each other and are wrong. So more of them part, and those are left out that are missed least.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_cryo.inference.pose_em import Added, PoseEM, Solved, box_of
from pyro_cryo.inference.search import Level

BANDS = (5,) * 24 + (6,) * 6 + (7,) * 8 + (8,) * 6  # cycles a box, a pass each
EXCESS = 1.4  # maps that part, of those that are asked for
SAMPLE = 60  # images of a pass, for every map
JUDGES = 30  # particles for every map, that tell which are missed least
SHARING = 20  # passes in which the shares of those that are left are fitted
COARSE = 6.0  # cycles a box, in which cells of 30 degrees are compared at most
VIEWS = 8  # of an image, in all maps together
COUNTS_ON = 0.6  # of what earlier passes added
LEAST_SHARE = 0.2  # of an equal share, that a map keeps; where it is found in fewer images it begins anew


@dataclass(frozen=True)
class MapMixture:
    """M maps of one box, and the log of what share of the particles each has, (M,).

    same:  (M,) long, the number of the map with which each is still one, often its own
    added: what the last pass made each map of; nothing where all are still one, or where some were left out
    """

    known: tuple[Solved, ...]
    log_share: Tensor
    same: Tensor
    added: tuple[Added, ...] = ()

    @staticmethod
    def begun(known: Solved, count: int) -> MapMixture:
        """`count` maps, all of them one that the images have in common."""
        equal = torch.full((count,), -math.log(count))
        return MapMixture((known,) * count, equal, torch.zeros(count, dtype=torch.long))

    def on(self, box: int) -> MapMixture:
        """The same maps on another box of the same field of view."""
        return replace(self, known=tuple(one.on(box) for one in self.known))

    def parted_by_chance(self, which: Tensor, drawn: Tensor) -> Tensor:
        """Maps (n, K) of images, drawn anew where several are one: by numbers (n,) in 0 to 1."""
        chosen = which.clone()
        for first in self.same.unique().tolist():
            among = (self.same == first).nonzero()[:, 0]
            mine = among[(drawn * len(among)).long()][:, None].expand_as(which)
            chosen = torch.where(torch.isin(which, among), mine, chosen)
        return chosen

    def begun_anew(self, found: Tensor) -> MapMixture:
        """With each map in whose favour next to nothing was found, shares (M,), as one with that of most images."""
        known, added, same, share = list(self.known), list(self.added), self.same.clone(), self.log_share.exp()
        found = found.clone()
        for number in (found < LEAST_SHARE / len(found)).nonzero()[:, 0].tolist():
            most = int(found.argmax())
            known[number], same[number] = known[most], same[most]
            added[most] = added[number] = added[most].times(0.5)
            share[[number, most]] = share[[number, most]].mean()
            found[[number, most]] = 0.5 * found[most]
        return MapMixture(tuple(known), (share / share.sum()).log(), same, tuple(added))

    def of_maps(self, kept: Tensor, log_share: Tensor) -> MapMixture:
        """Only the maps of these numbers (m,), with these shares (m,)."""
        known, one_with = tuple(self.known[number] for number in kept.tolist()), self.same[kept]
        return MapMixture(known, log_share, (one_with[:, None] == one_with).int().argmax(1))

    @property
    def state(self) -> dict[str, Any]:
        """All of it as tensors, to be kept in a file."""
        maps = [(one.volume, one.variance) for one in self.known]
        added = [list(vars(one).values()) for one in self.added]
        return {"maps": maps, "log_share": self.log_share, "same": self.same, "added": added}

    @staticmethod
    def of(state: dict[str, Any], device: torch.device) -> MapMixture:
        """What was kept."""
        known = tuple(Solved(volume.to(device), variance.to(device)) for volume, variance in state["maps"])
        added = tuple(Added(*(value.to(device) for value in values)) for values in state["added"])
        same = state.get("same", torch.arange(len(known)) if added else torch.zeros(len(known), dtype=torch.long))
        return MapMixture(known, state["log_share"], same, added)


def passed(em: PoseEM, mixture: MapMixture, kmax: float) -> MapMixture:
    """The next maps, from a sample of the images and, where the box is the same, what was added before."""
    return added(em, mixture, em.sample(SAMPLE * len(mixture.known)), grids(kmax), COUNTS_ON)[0]


def added(
    em: PoseEM, mixture: MapMixture, rows: Tensor, levels: tuple[Level, ...], counts_on: float = 0.0
) -> tuple[MapMixture, float]:
    """The next maps from some images (n,), and the mean log evidence of these."""
    mixture, count = mixture.on(box_of(levels[-1].kmax, em.particles.box)), len(mixture.known)
    found = em.search(rows, mixture.known, levels, VIEWS, apart=0.0, log_share=mixture.log_share)
    drawn = torch.rand(em.particles.n_particles, generator=em.generator)[em.particles.particle[rows]]
    found.which.copy_(mixture.parted_by_chance(found.which, drawn))
    sums, weight = [em.sums(one) for one in mixture.known], found.log_mass.softmax(1)
    em.add_up(rows, found, weight, sums)
    if counts_on and mixture.added and mixture.added[0].box == mixture.known[0].box:
        for own, earlier in zip(sums, mixture.added, strict=True):
            own.count_on(earlier, counts_on)
    em.learn_noise(*sums)
    share = torch.zeros(count).index_add_(0, found.which.flatten(), weight.flatten()) / len(rows)
    log_share = (0.5 * (mixture.log_share.exp() + share.clamp_min(LEAST_SHARE / count))).log().log_softmax(0)
    known, sent = tuple(em.solved(own) for own in sums), tuple(own.added for own in sums)
    return MapMixture(known, log_share, torch.arange(count), sent).begun_anew(share), float(found.evidence.mean())


def fewer(em: PoseEM, mixture: MapMixture, count: int, levels: tuple[Level, ...]) -> MapMixture:
    """The mixture of `count` of its maps: one after the other goes that a sample of the particles misses least."""
    particles = em.particles
    rows = em.sample(JUDGES * len(mixture.known) * math.ceil(len(particles) / particles.n_particles))
    on = mixture.on(box_of(levels[-1].kmax, particles.box))
    # The mass of all cells that are looked at, whichever peak they are of.
    each = [em.search(rows, one, levels, 1, apart=math.inf).log_mass[:, 0] for one in on.known]
    return mixture.of_maps(*least_missed(torch.stack(each, 1), count))


def least_missed(log_prob: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which `count` maps are left, of log p(image | map) (n, M), when one after the other goes that is missed least.

    Beside them the log of their shares. What a map is worth is told with those of the others fitted anew: a second map
    of one kind is worth nothing, and one of a rare kind what its images lose.
    """
    kept = torch.arange(log_prob.shape[1])
    while len(kept) > count:
        others = kept.expand(len(kept), -1)[~torch.eye(len(kept), dtype=torch.bool)].view(len(kept), -1)
        without = [float(_shared(log_prob[:, some])[1]) for some in others]
        kept = others[max(range(len(without)), key=without.__getitem__)]
    return kept, _shared(log_prob[:, kept])[0]


def _shared(log_prob: Tensor) -> tuple[Tensor, Tensor]:
    """The log shares (m,) under which images of log p(image | map) (n, m) are most probable, and their mean log p."""
    log_share = torch.full_like(log_prob[0], -math.log(log_prob.shape[1]))
    for _ in range(SHARING):
        log_share = (log_prob + log_share).log_softmax(1).logsumexp(0) - math.log(len(log_prob))
    return log_share, (log_prob + log_share).logsumexp(1).mean()


def grids(kmax: float) -> tuple[Level, ...]:
    """Cells of 30 degrees, all of them; where the band tells those of 15 apart, these within the best of the others."""
    coarse = Level(1, 3, min(kmax, COARSE))
    return (coarse,) if kmax < COARSE else (coarse, Level(2, 3, kmax))
