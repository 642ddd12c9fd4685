"""Poses and a map from nothing: random maps, raced at low frequency; the best one is marched to fine detail.

1. from each of a few random maps, EM at low frequency: a sample of the images is searched from a whole grid of poses
   on and added up, ten views an image by their weight; the band grows from 4 to 7 cycles a box
2. of these maps the one under which the same images are most probable goes on so, up to 10 cycles a box; in what it
   comes to all images are searched, a few peaks of each
3. passes in which these climb and the map is solved for anew, while the band grows as far as there are pixels

The hand of the map is not determined by the images: its mirror image explains them as well. It is where particles are
seen from several sides.

Particles of several kinds have several maps (`map_mixture`), which part from the one that won, more of them than there
are kinds; those that are missed least are left out. At low frequency what maps share shows less than what they differ
in, so that each comes to a frame and a hand of its own: when all images have been searched in them at finer detail,
they are brought to one.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.poses import PoseModes, PosePrior
from pyro_cryo.inference import map_mixture
from pyro_cryo.inference.map_mixture import MapMixture, grids
from pyro_cryo.inference.one_hand import to_one_frame
from pyro_cryo.inference.pose_em import BATCH, EDGE, PoseEM, Solved, box_of, march
from pyro_cryo.inference.reconstruct import image_power, sample_rows
from pyro_cryo.inference.search import Level
from pyro_cryo.inference.stages import Posed, Reached, Stage, through
from pyro_cryo.physics.fourier import half_radius, soft_disc
from pyro_cryo.physics.rotations import random_rotations
from pyro_cryo.physics.slices import fourier_grid, read_grid, slice_coordinates
from pyro_cryo.progress import Progress, quiet

SAMPLE = 400  # images of a pass that searches a whole grid
JUDGED = 500  # images that judge the race
RACE = (4, 5, 6, 6, 6, 7, 7, 7)  # cycles a box, a pass each, from every random map
SETTLING = (7,) * 24 + (8,) * 8 + (9,) * 3 + (10,) * 3  # from the one that won
SETTLED = 6  # passes of these, before one map is parted into several
VIEWS = 10  # of an image, in those passes
WHOLE = (Level(2, 3, 7.0),)  # cells of 15 degrees
FINE = 10.0
SEARCHED = (*WHOLE, Level(3, 4, FINE))  # then of 7.5
IN_SEVERAL = (*grids(7.0), Level(3, 4, FINE))  # where that is done in several maps
PEAKS = 4
IN_ALL = 1  # passes of all images in several maps, when there are no more of them than are asked for
ROUNDS = 6  # of search at most, each followed by a pass
SUBSET = 2000  # images of a round
CONVERGED = 0.5  # nats an image that a further round may still find
STEPS = 3  # of Newton's method, a pass


def ab_initio(
    particles: Particles,
    symmetry: Tensor,
    *,
    shift_sd: float | None = None,
    maps: int = 1,
    starts: int = 2,
    finest: float | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = quiet,
    kept: Path | None = None,
) -> Posed:
    """Poses of images and their map, without any to begin with.

    symmetry: (G, 3, 3) point group of the map
    shift_sd: of the particles about the box centre, pixels along each axis (default: box / 25)
    maps:     how many different ones the particles may have. With several, poses are searched in all of them, what is
              left of more that part. They are then brought to one frame where they have no symmetry; they do not climb,
              and the map that comes with them is of all images
    starts:   random maps that are raced
    finest:   band of the last pass in one map, cycles a box (default: all that images show)
    kept:     file of the state after each stage, from which a killed search goes on
    """
    generator = generator or torch.Generator().manual_seed(0)
    count, box = len(particles), particles.box
    if not particles.has_poses:
        particles = particles.with_poses(particles.relative, torch.zeros(count, 2))
    centred = PosePrior(
        torch.eye(3).expand(count, 3, 3), torch.zeros(count, 2), math.inf, box / 25 if shift_sd is None else shift_sd
    )
    sigma = image_power(particles[sample_rows(particles, generator)], BATCH, device)
    em = PoseEM(particles, centred, symmetry.to(device), sigma, generator, progress)
    if maps > 1:
        parted = math.ceil(map_mixture.EXCESS * maps)
        parting: list[Stage] = [partial(_parted, em, parted, band) for band in map_mixture.BANDS]
        searched = partial(_searched_in_all, em)
        in_all: list[Stage] = [searched, partial(_fewer, em, maps), *[searched] * IN_ALL, partial(_in_one_frame, em)]
        return through(em, [lambda _: _settled(em, starts), *parting, *in_all], kept)
    bands: list[Stage] = [partial(_climbed, em, band) for band in march(FINE, min(box / 2 - 1, finest or math.inf))]
    return through(em, [lambda _: _found(em, starts), lambda reached: _all_searched(em, reached), *bands], kept)


def _settled(em: PoseEM, starts: int) -> Reached:
    """A map from nothing that is to be parted into several, and no poses yet."""
    known = _raced(em, starts)
    for kmax in SETTLING[:SETTLED]:
        known = _passed(em, known, kmax)
    return Reached(known, PoseModes.single(torch.zeros(0, 3, 3), torch.zeros(0, 2)), -math.inf)


def _parted(em: PoseEM, maps: int, kmax: float, reached: Reached | None) -> Reached:
    """A pass of the maps that part."""
    assert reached is not None
    mixture = MapMixture.begun(reached.known, maps) if reached.mixture is None else reached.mixture
    return replace(reached, mixture=map_mixture.passed(em, mixture, kmax))


def _searched_in_all(em: PoseEM, reached: Reached | None) -> Reached:
    """All images in several maps, each of which is solved for anew from those that are found in it."""
    assert reached is not None
    assert reached.mixture is not None
    everyone = torch.arange(len(em.particles))
    mixture, evidence = map_mixture.added(em, reached.mixture, everyone, IN_SEVERAL)
    shares = ", ".join(f"{one:.2f}" for one in mixture.log_share.exp().tolist())
    em.progress.note(f"log evidence {evidence:.2f}, shares of the maps {shares}")
    return replace(reached, mixture=mixture, evidence=evidence)


def _fewer(em: PoseEM, maps: int, reached: Reached | None) -> Reached:
    """So many of the maps, those that are missed most."""
    assert reached is not None
    assert reached.mixture is not None
    return replace(reached, mixture=map_mixture.fewer(em, reached.mixture, maps, IN_SEVERAL))


def _in_one_frame(em: PoseEM, reached: Reached | None) -> Reached:
    """The peaks of all images in several maps, in the frame and, where images do not tell it, the hand of one."""
    assert reached is not None
    assert reached.mixture is not None
    box, everyone = box_of(FINE, em.particles.box), torch.arange(len(em.particles))
    mixture = reached.mixture.on(box)
    found = em.search(everyone, mixture.known, IN_SEVERAL, PEAKS, log_share=mixture.log_share)
    if len(em.symmetry) == 1:
        maps = torch.stack([one.volume for one in mixture.known])
        placed = to_one_frame(maps, mixture.log_share.exp(), mirrored=not em.particles.several)
        for number, one in enumerate(placed):
            em.progress.note(f"map {number}: agrees {one.correlation:.2f}{', mirrored' if one.mirrored else ''}")
            image, peak = (found.which == number).nonzero(as_tuple=True)
            rotation, translation = found.rotation[image, peak], found.translation[image, peak]
            found.rotation[image, peak], found.translation[image, peak] = one.poses(
                rotation, translation, em.particles.box
            )
    return Reached(em.add(everyone, found, reached.known.on(box)), found.modes, float(found.evidence.mean()))


def _found(em: PoseEM, starts: int) -> Reached:
    """A map from nothing, and the modes of those images that were searched last."""
    known = _raced(em, starts)
    for kmax in SETTLING:
        known = _passed(em, known, kmax)
    before = -math.inf
    for _ in range(ROUNDS):
        rows = em.sample(SUBSET).sort().values
        reached = _searched(em, rows, known)
        if reached.evidence - before < CONVERGED:
            break
        known, before = reached.known, reached.evidence
    return reached


def _all_searched(em: PoseEM, reached: Reached | None) -> Reached:
    """All images searched, unless they were."""
    assert reached is not None
    count = len(em.particles)
    return reached if len(reached.modes.log_weight) == count else _searched(em, torch.arange(count), reached.known)


def _searched(em: PoseEM, rows: Tensor, known: Solved) -> Reached:
    """Some images (n,) searched and climbed once."""
    known = known.on(box_of(FINE, em.particles.box))
    modes = em.search(rows, known, SEARCHED, PEAKS).modes
    known, evidence = em.climb(rows, modes, known, FINE, STEPS)
    return Reached(known, modes, evidence)


def _climbed(em: PoseEM, band: float, reached: Reached | None) -> Reached:
    """A pass over all images."""
    assert reached is not None
    known = reached.known.on(box_of(band, em.particles.box))
    known, evidence = em.climb(torch.arange(len(em.particles)), reached.modes, known, band, STEPS)
    return Reached(known, reached.modes, evidence)


def _raced(em: PoseEM, starts: int) -> Solved:
    """Of the maps that random ones come to, the one that most images would choose."""
    judges = em.sample(JUDGED)
    begun = em.sigma.clone()
    raced = []
    for _ in range(starts):
        em.sigma = begun.clone()
        known = _random_map(em)
        for kmax in RACE:
            known = _passed(em, known, kmax)
        raced.append((known, em.sigma))
    em.sigma = torch.stack([sigma for _, sigma in raced]).mean(0)
    evidence = [float(em.search(judges, known, WHOLE, 1).evidence.mean()) for known, _ in raced]
    best = max(range(starts), key=evidence.__getitem__)
    em.progress.note(f"log evidence of the starts {', '.join(f'{e:.2f}' for e in evidence)}")
    known, em.sigma = raced[best]
    return known


def _passed(em: PoseEM, known: Solved, kmax: float) -> Solved:
    """The next map, from a sample of the images, each from its best views in a whole grid."""
    known = known.on(box_of(kmax, em.particles.box))
    rows = em.sample(SAMPLE)
    return em.add(rows, em.search(rows, known, grids(kmax), VIEWS, apart=0.0), known)


def _random_map(em: PoseEM) -> Solved:
    """Smooth noise in a ball, of half the amplitude of the images."""
    box = box_of(RACE[0], em.particles.box)
    noise = torch.randn(box, box, box, generator=em.generator).to(em.device)
    smooth = torch.exp(-0.5 * (half_radius(box, em.device) / (RACE[0] / 1.5)).square())
    volume = torch.fft.irfftn(torch.fft.rfftn(noise) * smooth, s=noise.shape)
    volume = volume * soft_disc(box, 0.6 * box / 2, EDGE * box / 2, dims=3, device=em.device)
    batch = replace(em.particles, box=box).batch(torch.arange(min(JUDGED, len(em.particles))), em.device)
    grid = fourier_grid(volume)
    slices = read_grid(grid, slice_coordinates(random_rotations(len(batch), em.generator).to(em.device), batch.half.k))
    expected = (batch.ctf.square() * slices.abs().square()).mean()
    volume = volume * (0.25 * batch.image.square().sum(-1).mean() / expected).sqrt()
    return Solved(volume, torch.zeros(box // 2 + 1, device=em.device))
