"""Classes of maps, found from a linear subspace on: 3-D classification.

Classes are points in the space of the maps' differences, V_k = V_0 + sum_m phi_m(k) F_m. What a subspace does not show
of them, more classes than there are to be do: their differences span a better subspace, in which the images fall into
classes anew, by EM on the images' Gram matrices alone, which is quick. After a few rounds of that, those classes are
merged that the images tell apart least. The features phi are kept orthonormal over the images and turned to the axes of
most information, each F_m with its own prior by shell: classes borrow from each other what they share.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.coefficients import Seen
from pyro_cryo.guides.points import ClassesCoefficients, fit_points, merge_points, point_evidence, scaled
from pyro_cryo.inference.em import Maps
from pyro_cryo.inference.family import COARSE, FINEST_PASSES, Family, FamilySolver, family_of, whiten

ROUNDS = 3
PASSES = 4  # of a round
EXCESS = 1.4  # classes in a round, of those that are asked for
RANKS = (4, 8, 12, 16)  # of the subspace in which classes are sought
CLUSTERED = 5000  # particles among which they are sought
STARTS = 10
DIFFERENCE_SHARE = 0.02  # of the consensus' variance, that differences are given at least while classes are sought


def solve_classes(solver: FamilySolver, subspace: Family, count: int, side: int) -> Family:
    """Maps of `count` >= 2 classes.

    subspace: a coarse one, where the search begins
    side:     b, even: the band limit b / 2 of the classes' differences
    """
    train, _ = solver.split
    box, more = min(COARSE, side), math.ceil(EXCESS * count)
    family = subspace
    for _ in range(ROUNDS):
        family = _climbed(solver, train, _classified(solver, family, more), box, PASSES)
    family = _climbed(solver, train, _merged(solver, family, count), box, PASSES)
    return _climbed(solver, solver.particles, family, side, FINEST_PASSES)


def _climbed(solver: FamilySolver, images: Particles, family: Family, box: int, passes: int) -> Family:
    em = solver.em(images, family, family.maps[1:], box, passes)
    for n in range(passes):
        em.step()
        whiten(em)
        if n + 1 < passes:
            _expect_differences(em.maps)
    return family_of(em, family)


def _expect_differences(maps: Maps) -> None:
    """A prior that lets differences grow out of noise."""
    assert maps.tau is not None
    maps.tau[1:] = torch.maximum(maps.tau[1:], DIFFERENCE_SHARE**0.5 * maps.tau[0])


def _classified(solver: FamilySolver, family: Family, count: int) -> Family:
    """Classes anew: `count` points in the leading axes of a family's maps, as many as held-out images support."""
    seen, held_out = (_given_contrast(solver, images, family) for images in (solver.drawn(CLUSTERED), solver.split[1]))
    ranks = sorted({min(len(family.maps) - 1, r) for r in RANKS})
    fits = [fit_points(seen.first(rank), count, STARTS, solver.generator) for rank in ranks]

    def evidence(fitted: tuple[Tensor, Tensor]) -> float:
        points, log_weight = fitted
        return float(point_evidence(held_out.first(points.shape[1]), points, log_weight).mean())

    return _at_points(family, *max(fits, key=evidence))


def _merged(solver: FamilySolver, family: Family, count: int) -> Family:
    """The same classes, some of them merged, so that `count` are left."""
    coefficients = family.coefficients
    assert isinstance(coefficients, ClassesCoefficients)
    rank = min(len(family.maps) - 1, RANKS[-1])
    seen = _given_contrast(solver, solver.drawn(CLUSTERED), family).first(rank)
    points, log_weight = coefficients.features[:, 1 : 1 + rank], coefficients.log_weight
    return _at_points(family, *merge_points(seen, points, log_weight, count))


def _given_contrast(solver: FamilySolver, images: Particles, family: Family) -> Seen:
    """What images say of the coefficients, taking the posterior mean of their particles' contrast for it."""
    seen = solver.seen(images, family)
    return scaled(seen, family.coefficients.moments(seen).a)


def _at_points(family: Family, points: Tensor, log_weight: Tensor) -> Family:
    """The family whose classes are points (K, r) of the first maps of another.

    Its features are orthonormal over the images; those beyond the points' span begin with empty maps.
    """
    count = len(points)
    coefficients = ClassesCoefficients(count, float(family.coefficients.contrast_sd)).to(points)
    coefficients.log_weight = log_weight
    weight = log_weight.exp().clamp_min(0.1 / count)
    root = (weight / weight.sum()).sqrt()[:, None]
    middle = (root.square() * points).sum(0)
    spanned = torch.cat([root, root * (points - middle), torch.eye(count).to(points)], 1)
    features = torch.linalg.qr(spanned)[0] / root
    coefficients.features = features * features[0, 0].sign()
    of_points = torch.cat([torch.ones_like(root), points], 1)
    own = torch.linalg.lstsq(coefficients.features, of_points).solution
    maps = torch.einsum("mc,czyx->mzyx", own, family.maps[: own.shape[1]])
    return replace(family, maps=maps, coefficients=coefficients)
