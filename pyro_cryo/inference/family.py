"""Families of maps, solved for: a linear subspace and the curved family within it.

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
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from pyro_cryo.data.particles import Particles
from pyro_cryo.distributions.volume import filter_shells
from pyro_cryo.guides.coefficients import Coefficients, LinearCoefficients, Moments, Projected, Seen, images_at_once
from pyro_cryo.guides.points import ClassesCoefficients, CurvedCoefficients, PointCoefficients
from pyro_cryo.inference.em import EM, Maps
from pyro_cryo.inference.reconstruct import Reconstruction, band_limit
from pyro_cryo.physics.fourier import resize
from pyro_cryo.physics.slices import channel_grid
from pyro_cryo.progress import Progress, quiet
from pyro_cryo.volumes.prior import MapPrior

BANDS = ((16, 12, 0), (32, 3, 3))  # boxes of the coarse bands; passes there, and more with priors by component
COARSE = BANDS[-1][0]
FEWEST_PASSES = 5  # before a band may be called converged: motions grow out of noise at first
FINEST_PASSES = 2
MANIFOLD_PASSES = 3
MOTION_SHARE = 0.1  # of the consensus' variance, that a component is given until it has a prior of its own
MOST_HELD_OUT = 1000  # particles, that are left out of the coarse bands and tell the rank
SUBSET = 30_000  # images from which a coarse band is learned
CONVERGED = 30.0  # nats, all particles together, that a further pass may still find
FLOOR = 0.005  # of a prior's sd: more, in all the solvent, adds up
LEAST_SNR = 0.05  # of the consensus, solvent included
BEYOND = 1.2  # the molecule alone is seen farther, and priors by shell hold back what is not seen


@dataclass(frozen=True)
class Family:
    """Maps and the coefficients that combine them, fitted to images.

    maps:     (C, b, b, b) on the scale of images cropped to b pixels
    sigma:    (noise groups, D / 2 + 1) noise sd
    gram:     (C, C) mean information that the images of a particle have of the coefficients
    prior:    of the maps; None before they are fitted
    """

    maps: Tensor
    coefficients: Coefficients
    sigma: Tensor
    gram: Tensor
    prior: MapPrior | None = None

    @property
    def zdim(self) -> int:
        """Dimension of z."""
        if isinstance(self.coefficients, PointCoefficients):
            return int(self.coefficients.points.shape[1])
        return len(self.maps) - 1

    def warn_if_still(self) -> None:
        """Warn where nothing moves."""
        if not bool(self.maps[1:].any()):
            warnings.warn("the images support no motion: all maps of the family are one", UserWarning, stacklevel=3)


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
        em = self.em(self.particles, family, family.maps[1:], side, FINEST_PASSES)
        for _ in range(FINEST_PASSES):
            em.step()
            whiten(em)
        return family_of(em, family)

    def coarse_subspace(self, zdim: int, side: int, contrast_sd: float = 0.1) -> Family:
        """The same, from the coarse bands and the images for training alone."""
        coefficients = LinearCoefficients(contrast_sd).to(self.start.volume.device)
        family = Family(self.start.volume[None], coefficients, self.start.sigma, torch.zeros(0))
        moving = self.start.volume.new_zeros(zdim, 4, 4, 4)
        train, held = self.split
        for number, (band, passes, solo) in enumerate(BANDS):
            box = min(band, side)
            em = self.em(train, family, moving, box, passes + solo + (number == 0))
            if number == 0:
                em.begin(_random(zdim, self.generator))
                _expect_motion(em.maps)
            before = -math.inf
            for n in range(passes):
                evidence = em.step()
                whiten(em)
                _expect_motion(em.maps)
                if n >= FEWEST_PASSES and (evidence - before) * train.n_particles < CONVERGED:
                    break
                before = evidence
            for _ in range(solo):
                em.step()
                whiten(em)
            em.close()
            family = family_of(em, family)
            moving = family.maps[1:]
        return _supported(em, family, held)

    def manifold(self, subspace: Family, side: int, points: int = 400, features: int = 24) -> Family:
        """A coarse subspace bent: maps that are smooth functions of z, z distributed as in the images.

        points:   particles whose z are the support of the population
        features: of z, at most
        """
        z = subspace.coefficients.moments(self.seen(self.drawn(points), subspace)).z
        value, vector = torch.linalg.eigh(subspace.gram[1:, 1:])
        root = value.clamp_min(0).sqrt()[:, None] * vector.T
        coefficients = CurvedCoefficients.through(z, root, float(subspace.coefficients.contrast_sd), features)
        # The linear family in terms of the features: where the curved one starts from.
        turn = torch.linalg.lstsq(coefficients.features, z).solution
        maps = torch.einsum("cr,rzyx->czyx", turn, subspace.maps[1:])
        maps[0] += subspace.maps[0]
        family = replace(subspace, maps=maps, coefficients=coefficients)
        train, held = self.split
        em = self.em(train, family, family.maps[1:], min(COARSE, side), MANIFOLD_PASSES)
        family = _supported(em, _climbed(em, family, MANIFOLD_PASSES), held)
        em = self.em(self.particles, family, family.maps[1:], side, FINEST_PASSES)
        return _climbed(em, family, FINEST_PASSES)

    def seen(self, images: Particles, family: Family) -> Seen:
        """What images say of a family's coefficients, by particle (n,)."""
        box = family.maps.shape[-1]
        grid, sigma, small = channel_grid(family.maps), self._sigma(family, box), replace(images, box=box)
        batches = small.batches(images_at_once(len(small.half), grid.device), device=grid.device)
        return Seen.of(Projected.of(batch, grid, sigma).seen().by_particle(batch) for batch in batches)

    def drawn(self, count: int) -> Particles:
        """All images of at most `count` particles for training, drawn at random."""
        train, _ = self.split
        drawn = torch.randperm(train.n_particles, generator=self.generator)[:count]
        return train[train.images_of(drawn.sort().values)]

    @cached_property
    def split(self) -> tuple[Particles, Particles]:
        """Images from which a coarse band is learned, and others that tell how many components it has.

        Those of a particle are in one of the two.
        """
        particles = self.particles
        order = torch.randperm(particles.n_particles, generator=self.generator)
        held = min(MOST_HELD_OUT, -(-len(order) // 10))
        parts = order[held:][: particles.particles_of(SUBSET)], order[:held]
        train, others = (particles[particles.images_of(part.sort().values)] for part in parts)
        return train, others

    def em(self, images: Particles, family: Family, moving: Tensor, box: int, passes: int) -> EM:
        """EM of a family on a box; `moving` are its maps but the first, on any box: motion is where they have it."""
        start, where = self.start, self.start.mask if self.focus is None else self.focus
        if bool(moving.any()):
            tau = start.tau[: moving.shape[-1] // 2 + 1]
            even = filter_shells(moving, 1 / tau.clamp_min(1e-3 * tau.max()))  # as `density_envelope` says
            # not their product, which would narrow a tight mask
            where = torch.minimum(where, _on_box(motion_envelope(even), len(where)))
        maps = Maps(
            torch.cat([resize(with_band(start.volume, family.maps[0]), box)[None], resize(moving, box)]),
            torch.stack([_scale_on(start.scale, box), _scale_on(where, box)]),
            self._sigma(family, box),
        )
        kind = type(family.coefficients).__name__.removesuffix("Coefficients").lower()
        title = f"{kind} family at {box} px"
        return EM(replace(images, box=box), maps, family.coefficients, self.symmetry, self.progress, title, passes)

    def _sigma(self, family: Family, box: int) -> Tensor:
        """The noise sd of images cropped to a box: (noise groups, b / 2 + 1)."""
        return family.sigma[:, : box // 2 + 1] * (box / self.particles.box)


def _climbed(em: EM, before: Family, passes: int) -> Family:
    """The family after so many passes."""
    for _ in range(passes):
        em.step()
    return family_of(em, before)


def family_of(em: EM, before: Family) -> Family:
    maps = em.maps
    box = 2 * (before.sigma.shape[1] - 1)
    sigma = before.sigma.clone()
    last = maps.box // 2 + (1 if maps.box == box else 0)  # the shell of the corner is half empty on a smaller box
    sigma[:, 1:last] = maps.sigma[:, 1:last] * (box / maps.box)
    assert maps.tau is not None
    return Family(maps.values, em.coefficients, sigma, em.gram, MapPrior.of(maps.scale, maps.tau))


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
    error = short.std(1) / held.n_particles**0.5
    rank = int((short.mean(1) <= error).nonzero()[0])
    kept = max(rank, 1)
    maps = family.maps[: 1 + kept].clone()
    if rank == 0:
        maps[1:] = 0
    coefficients = family.coefficients.first(kept)
    gram, prior = family.gram[: 1 + kept, : 1 + kept], family.prior
    if prior is not None:
        prior = MapPrior.of(prior.scale, prior.tau[: 1 + kept])
    return replace(family, maps=maps, coefficients=coefficients, gram=gram, prior=prior)


def with_band(volume: Tensor, low: Tensor) -> Tensor:
    """A map (D, D, D) with its lowest frequencies taken from one on b <= D voxels (b, b, b)."""
    box, side = volume.shape[-1], low.shape[-1]
    return low if box == side else volume + resize(low - resize(volume, side), box)


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


def whiten(em: EM) -> None:
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


def motion_side(found: Reconstruction, kmax: float | None = None) -> int:
    """The box on which what moves is solved for; without kmax, as fine as a consensus shows anything."""
    limit = BEYOND * band_limit(found.signal_to_noise, LEAST_SNR) if kmax is None else kmax
    return min(2 * int(limit) + 2, found.volume.shape[-1])
