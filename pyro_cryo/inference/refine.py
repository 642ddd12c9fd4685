"""Poses refined about those of a table, together with the map: passes that climb and solve, from coarse to fine.

The first band is one in which poses as unsure as their prior says still move coefficients by less than a turn of phase,
so that climbing finds the peak. After every pass the prior's spread is what the posteriors say of it. Where the prior
has a spread of defocus, that is refined in further passes (`focus`).
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.poses import PoseModes, PosePrior
from pyro_cryo.inference.focus import refocusing
from pyro_cryo.inference.pose_em import BATCH, PoseEM, Solved, box_of, march
from pyro_cryo.inference.reconstruct import image_power, reconstruct, sample_rows
from pyro_cryo.inference.stages import Posed, Reached, Stage, through
from pyro_cryo.progress import Progress, quiet

FIRST = 3  # passes in the first band
LAST = 2  # and in the last
PHASE = 1.5  # radians by which poses of one standard deviation move coefficients at the first band's edge
ARM = 0.35  # boxes: how far from the centre a molecule's mass lies
COARSEST = 5.0  # cycles a box
STEPS = 3  # of Newton's method, a pass


def refined(
    particles: Particles,
    prior: PosePrior,
    symmetry: Tensor,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = quiet,
    kept: Path | None = None,
) -> Posed:
    """Posteriors of poses about those that are known roughly, and the map.

    prior:    its centre is where poses begin, its spread is where learning it begins
    symmetry: (G, 3, 3) point group of the map
    kept:     file of the state after each pass, from which a killed refinement goes on
    """
    generator = generator or torch.Generator().manual_seed(0)
    sigma = image_power(particles[sample_rows(particles, generator)], BATCH, device)
    em = PoseEM(particles, prior, symmetry.to(device), sigma, generator, progress)
    finest = particles.box / 2 - 1
    bands = march(first_band(prior, particles.box), finest)
    bands = bands[:1] * FIRST + bands[1:] + [finest] * (LAST - 1)
    passes: list[Stage] = [partial(_passed, em, band) for band in bands]
    return through(em, [lambda _: _begun(em), *passes, *refocusing(em, passes[-1])], kept)


def first_band(prior: PosePrior, box: int) -> float:
    """Cycles a box up to which images are compared first."""
    turn, shift = prior.turn_sd * ARM, prior.shift_sd / box
    return min(max(PHASE / (2 * math.pi * max(turn, shift, 1e-6)), COARSEST), box / 2 - 1)


def _begun(em: PoseEM) -> Reached:
    """A map from the poses as they are."""
    posed = em.particles.with_poses(em.prior.rotation, em.prior.translation)
    start = reconstruct(
        posed, symmetry=em.symmetry, device=em.device, generator=em.generator, progress=em.progress, mask=None
    )
    em.sigma = start.sigma.to(em.device)
    known = Solved(start.volume, torch.zeros(em.particles.box // 2 + 1, device=em.device))
    return Reached(known, PoseModes.single(em.prior.rotation, em.prior.translation), -math.inf)


def _passed(em: PoseEM, band: float, reached: Reached | None) -> Reached:
    """All images climb in the map, which is solved for anew."""
    assert reached is not None
    everyone = torch.arange(len(em.particles))
    known, evidence = em.climb(everyone, reached.modes, reached.known.on(box_of(band, em.particles.box)), band, STEPS)
    em.prior = em.prior.learned(reached.modes)
    em.progress.note(f"log evidence {evidence:.2f}")
    return Reached(known, reached.modes, evidence)
