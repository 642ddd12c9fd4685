"""The linear subspace in which particles differ, and the curved family of maps within it.

`solve_subspace`  V(z) = V_0 + sum_j z_j U_j, z ~ Normal(0, I): EM on a coarse band, then on finer ones. Between passes
                  z is whitened and turned to principal axes (parameter-expanded EM, Liu, Rubin and Wu, Biometrika 85
                  (1998)). Each U_j has a variance by shell, so that what the images do not support vanishes (automatic
                  relevance), and components without which images that were not fitted are as probable are dropped.
`solve_manifold`  V(z) = V_0 + sum_m phi_m(z) F_m, phi the leading kernel principal components (Schoelkopf, Smola and
                  Mueller, Neural Computation 10 (1998)) of points drawn from the images' z, which are also the support
                  of a nonparametric population. Each F_m has its own variance by shell: how sharply the family may bend
                  is learned, finer where the images show more.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.coefficients import (
    ClassesCoefficients,
    Coefficients,
    CurvedCoefficients,
    LinearCoefficients,
    Moments,
    Projected,
)
from pyro_cryo.inference.em import EM, Maps
from pyro_cryo.inference.reconstruct import Reconstruction
from pyro_cryo.physics.fourier import resize
from pyro_cryo.physics.slices import fourier_grid
from pyro_cryo.progress import Progress, quiet

BANDS = ((16, 12), (32, 6))  # boxes of the coarse bands and passes there
COARSE = BANDS[-1][0]
FEWEST_PASSES = 5  # before a band may be called converged: motions grow out of noise at first
FINEST_PASSES = 2
MANIFOLD_PASSES = 3
CLASS_PASSES = 8
CLUSTERED = 5000  # images from whose z classes begin
SOLO_PASSES = 3  # the last passes, in which each component has a prior of its own
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
    evidence: nats an image above noise alone
    """

    maps: Tensor
    coefficients: Coefficients
    sigma: Tensor
    gram: Tensor
    evidence: float

    @property
    def zdim(self) -> int:
        """Dimension of z."""
        if isinstance(self.coefficients, CurvedCoefficients):
            return int(self.coefficients.points.shape[1])
        return len(self.maps) - 1


def solve_subspace(
    particles: Particles,
    start: Reconstruction,
    zdim: int,
    *,
    symmetry: Tensor,
    side: int,
    contrast_sd: float = 0.1,
    focus: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: Progress = quiet,
) -> Family:
    """Fit at most zdim components about a consensus.

    side:        b, even: the band limit b / 2 of what moves
    contrast_sd: where that of the images starts from; 0 holds their contrast at 1
    focus:       (D, D, D) in 0 to 1, where motion may be; default: the solvent mask of the consensus
    """
    generator = generator or torch.Generator().manual_seed(0)
    where = start.mask if focus is None else focus
    coefficients = LinearCoefficients(contrast_sd).to(start.volume.device)
    family = Family(start.volume[None], coefficients, start.sigma, torch.zeros(0), 0.0)
    moving = start.volume.new_zeros(zdim, 4, 4, 4)
    train, held = _held_out(particles, generator)
    for box, passes in [(min(box, side), passes) for box, passes in BANDS]:
        em = _em(train, start, family, moving, where, box, symmetry, progress, passes + (not len(family.gram)))
        if not len(family.gram):
            em.begin(_random(zdim, generator))
            _expect_motion(em.maps)
        before = -math.inf
        for n in range(passes):
            evidence = em.step()
            _whiten(em)
            if n < passes - SOLO_PASSES:
                _expect_motion(em.maps)
            if n >= FEWEST_PASSES and (evidence - before) * len(train) < CONVERGED:
                break
            before = evidence
        em.close()
        family = _family(em, family, evidence)
        moving = family.maps[1:]
    family = _supported(em, family, held)
    em = _em(particles, start, family, family.maps[1:], where, side, symmetry, progress, FINEST_PASSES)
    for _ in range(FINEST_PASSES):
        evidence = em.step()
        _whiten(em)
    return _family(em, family, evidence)


def solve_manifold(
    particles: Particles,
    start: Reconstruction,
    subspace: Family,
    *,
    symmetry: Tensor,
    side: int,
    points: int = 400,
    features: int = 24,
    focus: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: Progress = quiet,
) -> Family:
    """Bend a subspace: maps that are smooth functions of z, z distributed as in the images.

    points:   images whose z are the support of the population
    features: of z, at most
    """
    generator = generator or torch.Generator().manual_seed(0)
    where = start.mask if focus is None else focus
    z = _points(particles, subspace, points, generator)
    value, vector = torch.linalg.eigh(subspace.gram[1:, 1:])
    root = value.clamp_min(0).sqrt()[:, None] * vector.T
    coefficients = CurvedCoefficients.through(z, root, float(subspace.coefficients.contrast_sd), features)
    # The linear family in terms of the features: where the curved one starts from.
    turn = torch.linalg.lstsq(coefficients.features, z).solution
    maps = torch.einsum("cr,rzyx->czyx", turn, subspace.maps[1:])
    maps[0] += subspace.maps[0]
    family = replace(subspace, maps=maps, coefficients=coefficients)
    train, held = _held_out(particles, generator)
    em = _em(train, start, family, family.maps[1:], where, min(COARSE, side), symmetry, progress, MANIFOLD_PASSES)
    for _ in range(MANIFOLD_PASSES):
        evidence = em.step()
    family = _supported(em, _family(em, family, evidence), held)
    em = _em(particles, start, family, family.maps[1:], where, side, symmetry, progress, FINEST_PASSES)
    for _ in range(FINEST_PASSES):
        evidence = em.step()
    return _family(em, family, evidence)


def solve_classes(
    particles: Particles,
    start: Reconstruction,
    subspace: Family,
    classes: int,
    *,
    symmetry: Tensor,
    side: int,
    generator: torch.Generator | None = None,
    progress: Progress = quiet,
) -> Family:
    """Maps of K >= 2 classes, from clusters in a subspace on."""
    from scipy.cluster.vq import kmeans2

    generator = generator or torch.Generator().manual_seed(0)
    z = _points(particles, subspace, CLUSTERED, generator)
    information = subspace.gram.diagonal()[1:].clamp_min(0).sqrt()
    seed = int(torch.randint(2**31, (), generator=generator))
    label = torch.as_tensor(kmeans2((z * information).cpu().numpy(), classes, minit="++", seed=seed)[1]).to(z.device)
    centre = torch.stack([z[label == k].mean(0) if bool((label == k).any()) else z.mean(0) for k in range(classes)])
    maps = subspace.maps[0] + torch.einsum("kr,rzyx->kzyx", centre, subspace.maps[1:])
    coefficients = ClassesCoefficients(classes, float(subspace.coefficients.contrast_sd)).to(z.device)
    family = replace(subspace, maps=maps, coefficients=coefficients)
    train, _ = _held_out(particles, generator)
    for images, box, passes in ((train, min(COARSE, side), CLASS_PASSES), (particles, side, FINEST_PASSES)):
        others = torch.stack([with_band(start.volume, own) for own in family.maps[1:]])
        em = _em(images, start, family, others, start.scale, box, symmetry, progress, passes)
        for _ in range(passes):
            evidence = em.step()
        family = _family(em, family, evidence)
    return family


def _held_out(particles: Particles, generator: torch.Generator) -> tuple[Particles, Particles]:
    """Images from which a coarse band is learned, and others that tell how many components it has."""
    order = torch.randperm(len(particles), generator=generator)
    held = min(MOST_HELD_OUT, -(-len(particles) // 10))
    return particles[order[held:][:SUBSET].sort().values], particles[order[:held].sort().values]


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


def _em(
    particles: Particles,
    start: Reconstruction,
    family: Family,
    moving: Tensor,
    where: Tensor,
    box: int,
    symmetry: Tensor,
    progress: Progress,
    passes: int,
) -> EM:
    """EM of a family on a box."""
    still = with_band(start.volume, family.maps[0])
    ratio = box / particles.box
    maps = Maps(
        torch.cat([resize(still, box)[None], resize(moving, box)]),
        torch.stack([_scale_on(start.scale, box), _scale_on(where, box)]),
        family.sigma[:, : box // 2 + 1] * ratio,
    )
    kind = type(family.coefficients).__name__.removesuffix("Coefficients").lower()
    title = f"{kind} family at {box} px"
    return EM(replace(particles, box=box), maps, family.coefficients, symmetry, progress, title, passes)


def _family(em: EM, before: Family, evidence: float) -> Family:
    maps = em.maps
    box = 2 * (before.sigma.shape[1] - 1)
    sigma = before.sigma.clone()
    last = maps.box // 2 + (1 if maps.box == box else 0)  # the shell of the corner is half empty on a smaller box
    sigma[:, 1:last] = maps.sigma[:, 1:last] * (box / maps.box)
    return Family(maps.values, em.coefficients, sigma, em.gram, evidence)


def with_band(volume: Tensor, low: Tensor) -> Tensor:
    """A map (D, D, D) with its lowest frequencies taken from one on b <= D voxels (b, b, b)."""
    box, side = volume.shape[-1], low.shape[-1]
    return low if box == side else volume + resize(low - resize(volume, side), box)


def _scale_on(scale: Tensor, box: int) -> Tensor:
    """A mask or an envelope on another box, with a floor: what is expected nowhere is never found."""
    return (resize(scale, box) * (scale.shape[-1] / box)).clamp(FLOOR, 1.0)


def _expect_motion(maps: Maps) -> None:
    """A prior that lets every component grow out of noise: a part of the consensus' own variance in each shell."""
    assert maps.tau is not None
    maps.tau[1:] = MOTION_SHARE**0.5 * maps.tau[0]


def _whiten(em: EM) -> None:
    """Take up the mean and the covariance of z into the maps, and turn them to the axes of most information."""
    maps, mean = em.maps, em.mean
    assert mean is not None
    assert maps.tau is not None
    root = torch.linalg.cholesky(mean.z_cov + 1e-6 * torch.eye(len(mean.z), device=mean.z.device))
    value, vector = torch.linalg.eigh(root.T @ em.gram[1:, 1:] @ root)
    turn = root @ vector.flip(1)
    maps.values = torch.cat(
        [
            (maps.values[0] + torch.einsum("j,jzyx->zyx", mean.z, maps.values[1:]))[None],
            torch.einsum("jk,jzyx->kzyx", turn, maps.values[1:]),
        ]
    )
    maps.tau = torch.cat([maps.tau[:1], (turn.T.square() @ maps.tau[1:].square()).sqrt()])
    em.gram[1:, 1:] = torch.diag(value.flip(0))


def _random(zdim: int, generator: torch.Generator) -> Callable[[Moments], Moments]:
    """Coefficients drawn at random, with which EM begins."""

    def start(moments: Moments) -> Moments:
        z = torch.randn(len(moments.y), zdim, generator=generator).to(moments.y)
        y = torch.cat([torch.ones_like(z[:, :1]), z], -1)
        pairs = [v[:, :, None] * v[:, None, :] for v in (y, z)]
        one = torch.ones_like(moments.a)
        return replace(moments, y=y, yy=pairs[0], z=z, zz=pairs[1], a=one, aa=one)

    return start


def _points(particles: Particles, family: Family, count: int, generator: torch.Generator) -> Tensor:
    """Posterior means of z of images drawn at random: (L, r)."""
    rows = torch.randperm(len(particles), generator=generator)[:count].sort().values
    box = family.maps.shape[-1]
    chosen, grid = replace(particles, box=box)[rows], fourier_grid(family.maps)
    sigma = family.sigma[:, : box // 2 + 1] * (box / particles.box)
    batches = chosen.batches(32, device=grid.device)
    return torch.cat([family.coefficients.moments(Projected.of(b, grid, sigma).seen()).z for b in batches])
