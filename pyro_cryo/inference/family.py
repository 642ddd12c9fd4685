"""Families of maps, solved for: a linear subspace, the curved family within it, classes.

A subspace is V(z) = V_0 + sum_j z_j U_j, z ~ Normal(0, I): EM on a coarse band, then on finer ones. Between passes z is
whitened and turned to principal axes (parameter-expanded EM, Liu, Rubin and Wu, Biometrika 85 (1998)). Each U_j has a
variance by shell, so that what the images do not support vanishes (automatic relevance), and components without which
images that were not fitted are as probable are dropped.

A manifold is V(z) = V_0 + sum_m phi_m(z) F_m, phi the leading kernel principal components (Schoelkopf, Smola and
Mueller, Neural Computation 10 (1998)) of points drawn from the images' z, which are also the support of a nonparametric
population. Each F_m has its own variance by shell: how sharply the family may bend is learned, finer where the images
show more.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.coefficients import Coefficients, LinearCoefficients, Moments, Projected, Seen, images_at_once
from pyro_cryo.guides.points import (
    ClassesCoefficients,
    CurvedCoefficients,
    PointCoefficients,
    fit_points,
    merge_points,
    point_evidence,
    scaled,
)
from pyro_cryo.inference.em import EM, Maps
from pyro_cryo.inference.reconstruct import Reconstruction
from pyro_cryo.physics.fourier import resize
from pyro_cryo.physics.slices import fourier_grid
from pyro_cryo.progress import Progress, quiet

BANDS = ((16, 12, 0), (32, 3, 3))  # boxes of the coarse bands; passes there, and more with priors by component
COARSE = BANDS[-1][0]
FEWEST_PASSES = 5  # before a band may be called converged: motions grow out of noise at first
FINEST_PASSES = 2
MANIFOLD_PASSES = 3
CLASS_ROUNDS = 3
CLASS_PASSES = 4  # of a round
CLASS_EXCESS = 1.4  # classes in a round, of those that are asked for
CLASS_SHARE = 0.02  # of the consensus' variance, that differences of classes are given while they are sought
CLASS_RANKS = (4, 8, 12, 16)  # of the subspace in which classes are sought
CLUSTERED = 5000  # images among which they are sought
STARTS = 10
MOTION_SHARE = 0.1  # of the consensus' variance, that a component is given until it has a prior of its own
MOST_HELD_OUT = 1000  # images, that are left out of the coarse bands and tell the rank
SUBSET = 30_000  # images from which a coarse band is learned
CONVERGED = 30.0  # nats, all images together, that a further pass may still find
FLOOR = 0.02


@dataclass(frozen=True)
class Family:
    """Maps and the coefficients that combine them, fitted to images.

    maps:     (C, b, b, b) on the scale of images cropped to b pixels
    sigma:    (noise groups, D / 2 + 1) noise sd
    gram:     (C, C) mean information that an image has of the coefficients
    """

    maps: Tensor
    coefficients: Coefficients
    sigma: Tensor
    gram: Tensor

    @property
    def zdim(self) -> int:
        """Dimension of z."""
        if isinstance(self.coefficients, PointCoefficients):
            return int(self.coefficients.points.shape[1])
        return len(self.maps) - 1


@dataclass(frozen=True)
class FamilySolver:
    """Fits families about a consensus.

    particles: N images of box D
    start:     their consensus
    symmetry:  (G, 3, 3) point group of every map
    focus:     (D, D, D) in 0 to 1, where motion may be; default: the solvent mask of the consensus
    generator: of what is drawn: starting values, the images held out, points
    """

    particles: Particles
    start: Reconstruction
    symmetry: Tensor
    focus: Tensor | None = None
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    progress: Progress = quiet

    def subspace(self, zdim: int, side: int, contrast_sd: float = 0.1) -> Family:
        """A linear family of at most zdim components.

        side:        b, even: the band limit b / 2 of what moves
        contrast_sd: where that of the images starts from; 0 holds their contrast at 1
        """
        family = self.coarse_subspace(zdim, side, contrast_sd)
        em = self._em(self.particles, family, family.maps[1:], side, FINEST_PASSES)
        for _ in range(FINEST_PASSES):
            em.step()
            _whiten(em)
        return _family(em, family)

    def coarse_subspace(self, zdim: int, side: int, contrast_sd: float = 0.1) -> Family:
        """The same, from the coarse bands and the images for training alone."""
        coefficients = LinearCoefficients(contrast_sd).to(self.start.volume.device)
        family = Family(self.start.volume[None], coefficients, self.start.sigma, torch.zeros(0))
        moving = self.start.volume.new_zeros(zdim, 4, 4, 4)
        train, held = self._split
        for number, (band, passes, solo) in enumerate(BANDS):
            box = min(band, side)
            em = self._em(train, family, moving, box, passes + solo + (number == 0))
            if number == 0:
                em.begin(_random(zdim, self.generator))
                _expect_motion(em.maps)
            before = -math.inf
            for n in range(passes):
                evidence = em.step()
                _whiten(em)
                _expect_motion(em.maps)
                if n >= FEWEST_PASSES and (evidence - before) * len(train) < CONVERGED:
                    break
                before = evidence
            for _ in range(solo):
                em.step()
                _whiten(em)
            em.close()
            family = _family(em, family)
            moving = family.maps[1:]
        return _supported(em, family, held)

    def manifold(self, subspace: Family, side: int, points: int = 400, features: int = 24) -> Family:
        """A coarse subspace bent: maps that are smooth functions of z, z distributed as in the images.

        points:   images whose z are the support of the population
        features: of z, at most
        """
        z = self._points(subspace, points)
        value, vector = torch.linalg.eigh(subspace.gram[1:, 1:])
        root = value.clamp_min(0).sqrt()[:, None] * vector.T
        coefficients = CurvedCoefficients.through(z, root, float(subspace.coefficients.contrast_sd), features)
        # The linear family in terms of the features: where the curved one starts from.
        turn = torch.linalg.lstsq(coefficients.features, z).solution
        maps = torch.einsum("cr,rzyx->czyx", turn, subspace.maps[1:])
        maps[0] += subspace.maps[0]
        family = replace(subspace, maps=maps, coefficients=coefficients)
        train, held = self._split
        em = self._em(train, family, family.maps[1:], min(COARSE, side), MANIFOLD_PASSES)
        family = _supported(em, _climbed(em, family, MANIFOLD_PASSES), held)
        em = self._em(self.particles, family, family.maps[1:], side, FINEST_PASSES)
        return _climbed(em, family, FINEST_PASSES)

    def classes(self, subspace: Family, count: int, side: int) -> Family:
        """Maps of `count` >= 2 classes, from a coarse subspace on.

        More classes than are asked for tell apart what the subspace does not: their maps span a better one, in which
        the images fall into classes anew. In the end those are merged that are told apart least.
        """
        train, _ = self._split
        box, more = min(COARSE, side), math.ceil(CLASS_EXCESS * count)
        family = subspace
        for _ in range(CLASS_ROUNDS):
            family = self._climbed_classes(train, self._classified(family, more), box, CLASS_PASSES)
        family = self._climbed_classes(train, self._merged(family, count), box, CLASS_PASSES)
        return self._climbed_classes(self.particles, family, side, FINEST_PASSES)

    def _climbed_classes(self, images: Particles, family: Family, box: int, passes: int) -> Family:
        em = self._em(images, family, family.maps[1:], box, passes)
        for n in range(passes):
            em.step()
            _whiten(em)
            if n + 1 < passes:
                _expect_differences(em.maps)
        return _family(em, family)

    def _classified(self, family: Family, count: int) -> Family:
        """Classes anew: `count` points in the leading axes of a family's maps, as many as held-out images support."""
        train, held = self._split
        seen, held_out = self._seen(train, family), self._seen(held, family)
        best: tuple[float, Tensor, Tensor] | None = None
        for rank in sorted({min(len(family.maps) - 1, r) for r in CLASS_RANKS}):
            points, log_weight, _ = fit_points(seen.first(rank), count, STARTS, self.generator)
            evidence = float(point_evidence(held_out.first(rank), points, log_weight).mean())
            if best is None or evidence > best[0]:
                best = evidence, points, log_weight
        assert best is not None
        return _family_of_classes(family, *best[1:])

    def _merged(self, family: Family, count: int) -> Family:
        """The same classes, some of them merged, so that `count` are left."""
        train, _ = self._split
        coefficients = family.coefficients
        assert isinstance(coefficients, ClassesCoefficients)
        rank = min(len(family.maps) - 1, CLASS_RANKS[-1])
        points, log_weight = coefficients.features[:, 1 : 1 + rank], coefficients.log_weight
        return _family_of_classes(
            family, *merge_points(self._seen(train, family).first(rank), points, log_weight, count)
        )

    def _seen(self, images: Particles, family: Family) -> Seen:
        """What some of the images say of a family's coefficients, given their contrasts."""
        chosen = torch.randperm(len(images), generator=self.generator)[:CLUSTERED].sort().values
        box = family.maps.shape[-1]
        grid, sigma = fourier_grid(family.maps), family.sigma[:, : box // 2 + 1] * (box / self.particles.box)
        parts = []
        for batch in replace(images, box=box)[chosen].batches(
            images_at_once(len(images.half), grid.device), device=grid.device
        ):
            seen = Projected.of(batch, grid, sigma).seen()
            parts.append(scaled(seen, family.coefficients.moments(seen).a))
        return Seen(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Seen)))

    @cached_property
    def _split(self) -> tuple[Particles, Particles]:
        """Images from which a coarse band is learned, and others that tell how many components it has."""
        particles = self.particles
        order = torch.randperm(len(particles), generator=self.generator)
        held = min(MOST_HELD_OUT, -(-len(particles) // 10))
        return particles[order[held:][:SUBSET].sort().values], particles[order[:held].sort().values]

    def _em(self, images: Particles, family: Family, moving: Tensor, box: int, passes: int) -> EM:
        """EM of a family on a box; `moving` are its maps but the first, on any box: motion is where they have it."""
        start, where = self.start, self.start.mask if self.focus is None else self.focus
        if bool(moving.any()):
            where = where * _on_box(motion_envelope(moving), len(where))
        maps = Maps(
            torch.cat([resize(with_band(start.volume, family.maps[0]), box)[None], resize(moving, box)]),
            torch.stack([_scale_on(start.scale, box), _scale_on(where, box)]),
            family.sigma[:, : box // 2 + 1] * (box / images.box),
        )
        kind = type(family.coefficients).__name__.removesuffix("Coefficients").lower()
        title = f"{kind} family at {box} px"
        return EM(replace(images, box=box), maps, family.coefficients, self.symmetry, self.progress, title, passes)

    def _points(self, family: Family, count: int) -> Tensor:
        """Posterior means of z of images for training, drawn at random: (L, r)."""
        train, _ = self._split
        rows = torch.randperm(len(train), generator=self.generator)[:count].sort().values
        box = family.maps.shape[-1]
        chosen, grid = replace(train, box=box)[rows], fourier_grid(family.maps)
        sigma = family.sigma[:, : box // 2 + 1] * (box / self.particles.box)
        batches = chosen.batches(32, device=grid.device)
        return torch.cat([family.coefficients.moments(Projected.of(b, grid, sigma).seen()).z for b in batches])


def _climbed(em: EM, before: Family, passes: int) -> Family:
    """The family after so many passes."""
    for _ in range(passes):
        em.step()
    return _family(em, before)


def _family(em: EM, before: Family) -> Family:
    maps = em.maps
    box = 2 * (before.sigma.shape[1] - 1)
    sigma = before.sigma.clone()
    last = maps.box // 2 + (1 if maps.box == box else 0)  # the shell of the corner is half empty on a smaller box
    sigma[:, 1:last] = maps.sigma[:, 1:last] * (box / maps.box)
    return Family(maps.values, em.coefficients, sigma, em.gram)


def _supported(em: EM, family: Family, held: Particles) -> Family:
    """The family with as many components as images that were not fitted support.

    The fewest whose evidence is not less than the best by more than its standard error. Where not even one is
    supported, one is left, and its map is zero.
    """
    most = len(family.maps) - 1
    if most == 0:
        return family
    evidence = em.evidence(replace(held, box=em.maps.box), range(most + 1))
    short = evidence[int(evidence.mean(1).argmax())] - evidence
    error = short.std(1) / len(held) ** 0.5
    rank = int((short.mean(1) <= error).nonzero()[0])
    kept = max(rank, 1)
    maps = family.maps[: 1 + kept].clone()
    if rank == 0:
        warnings.warn("the images support no motion: all maps of the family are one", UserWarning, stacklevel=5)
        maps[1:] = 0
    coefficients = family.coefficients.first(kept)
    return replace(family, maps=maps, coefficients=coefficients, gram=family.gram[: 1 + kept, : 1 + kept])


def with_band(volume: Tensor, low: Tensor) -> Tensor:
    """A map (D, D, D) with its lowest frequencies taken from one on b <= D voxels (b, b, b)."""
    box, side = volume.shape[-1], low.shape[-1]
    return low if box == side else volume + resize(low - resize(volume, side), box)


def _family_of_classes(family: Family, points: Tensor, log_weight: Tensor) -> Family:
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


def motion_envelope(moving: Tensor) -> Tensor:
    """Prior sd of what moves at each voxel, up to a factor: the local rms of the maps (C, b, b, b), at most 1."""
    square = torch.nn.functional.avg_pool3d(moving.square().sum(0)[None, None], 3, stride=1, padding=1)[0, 0]
    local = square.sqrt()
    return local / local.max()


def _scale_on(scale: Tensor, box: int) -> Tensor:
    """A mask or an envelope on another box, with a floor: what is expected nowhere is never found."""
    return _on_box(scale, box).clamp(FLOOR, 1.0)


def _on_box(values: Tensor, box: int) -> Tensor:
    """The same values on another box of the same field of view."""
    return resize(values, box) * (box / values.shape[-1])


def _expect_motion(maps: Maps) -> None:
    """A prior that lets every component grow out of noise: a part of the consensus' own variance in each shell."""
    assert maps.tau is not None
    maps.tau[1:] = MOTION_SHARE**0.5 * maps.tau[0]


def _expect_differences(maps: Maps) -> None:
    """The same for what tells classes apart, at least a smaller part."""
    assert maps.tau is not None
    maps.tau[1:] = torch.maximum(maps.tau[1:], CLASS_SHARE**0.5 * maps.tau[0])


def _whiten(em: EM) -> None:
    """Take up mean and covariance of the coefficients into the maps, and turn these to the axes of most information."""
    maps, mean, coefficients = em.maps, em.mean, em.coefficients
    assert mean is not None
    assert maps.tau is not None
    assert isinstance(coefficients, LinearCoefficients | ClassesCoefficients)
    middle, covariance = coefficients.spread(mean)
    root = torch.linalg.cholesky(covariance + 1e-6 * torch.eye(len(middle), device=middle.device))
    value, vector = torch.linalg.eigh(root.T @ em.gram[1:, 1:] @ root)
    turn = root @ vector.flip(1)
    undo = torch.linalg.inv(turn)
    y = torch.block_diag(torch.ones_like(undo[:1, :1]), undo)
    y[1:, 0] = -undo @ middle  # what the coefficients of the new maps are to those of the old
    em.mean = replace(mean, yy=y @ mean.yy @ y.T)
    maps.values = torch.cat(
        [
            (maps.values[0] + torch.einsum("j,jzyx->zyx", middle, maps.values[1:]))[None],
            torch.einsum("jk,jzyx->kzyx", turn, maps.values[1:]),
        ]
    )
    maps.tau = torch.cat([maps.tau[:1], (turn.T.square() @ maps.tau[1:].square()).sqrt()])
    em.gram[1:, 1:] = torch.diag(value.flip(0))
    coefficients.turned(middle, undo)


def _random(zdim: int, generator: torch.Generator) -> Callable[[Moments], Moments]:
    """Coefficients drawn at random, with which EM begins."""

    def start(moments: Moments) -> Moments:
        z = torch.randn(len(moments.y), zdim, generator=generator).to(moments.y)
        y = torch.cat([torch.ones_like(z[:, :1]), z], -1)
        pairs = [v[:, :, None] * v[:, None, :] for v in (y, z)]
        one = torch.ones_like(moments.a)
        return replace(moments, y=y, yy=pairs[0], z=z, zz=pairs[1], a=one, aa=one)

    return start
