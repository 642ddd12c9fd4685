"""Poses in the maps of a model that is descended to: rounds of a short descent, in which poses stand, and of a climb.

A linear family follows what moves, and that is all it knows. What else a model's story says, that mass is conserved,
say, leaves fewer maps open, and poses are no better than maps are. The maps at the z of some particles stand for all:
z is one of these points, and an image's coefficients in their leading principal components are integrated out as in
any other family.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.points import TabulatedCoefficients
from pyro_cryo.inference.family import Family
from pyro_cryo.inference.moving import climbed_in_family, likelihood_in
from pyro_cryo.inference.pose_em import PoseEM
from pyro_cryo.inference.refine import STEPS
from pyro_cryo.inference.run import Run
from pyro_cryo.inference.stages import Posed, Reached, Stage, through
from pyro_cryo.physics.fourier import resize
from pyro_cryo.progress import Progress, quiet

ROUNDS = 3
POINTS = 200  # particles whose maps stand for all
MAPS = 24  # principal components at most
MOST_SIDE = 96  # pixels, on which they are kept

Descent = Callable[[Particles], Run]


def refined_in_decoder(
    particles: Particles,
    begun: Posed,
    symmetry: Tensor,
    descend: Descent,
    *,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    progress: Progress = quiet,
    kept: Path | None = None,
) -> Posed:
    """Posteriors of poses, begun in another family, in the maps of a model; its mean map.

    descend: fits a model with z to particles whose poses are taken as known
    kept:    file of the state after each round, from which a killed refinement goes on
    """
    em = PoseEM(particles, begun.prior, symmetry.to(device), begun.sigma.to(device), generator, progress)
    stages: list[Stage] = [partial(_round, em, begun, descend)] * ROUNDS
    return through(em, stages, kept)


def _round(em: PoseEM, begun: Posed, descend: Descent, reached: Reached | None) -> Reached:
    """A model of the poses as they are; all images climb in its maps."""
    modes, box = begun.modes if reached is None else reached.modes, em.particles.box
    run = descend(em.particles.with_poses(*modes.drawn(em.generator, em.particles)))
    family, middle = tabulated(run, em.generator)
    likelihood = likelihood_in(family, middle, eckart=False)
    em.sigma = run.model.sigma.detach().clone()
    everyone, evidence = torch.arange(len(em.particles)), torch.zeros((), device=em.device)
    for _, _, gain in em.climbing(everyone, modes, likelihood, box, box / 2 - 1, STEPS):
        evidence += gain.sum()
    return climbed_in_family(em, middle, modes, torch.as_tensor(run.latent.z, dtype=torch.float32), float(evidence))


def tabulated(run: Run, generator: torch.Generator) -> tuple[Family, Tensor]:
    """The family of the maps at the z of particles drawn at random, and their mean (D, D, D)."""
    z = torch.as_tensor(run.latent.z, dtype=torch.float32)
    z = z[torch.randperm(len(z), generator=generator)[:POINTS]]
    return family_of_maps(z.to(run.device), run.volume(z).to(run.device), run.model.sigma.detach())


def family_of_maps(z: Tensor, maps: Tensor, sigma: Tensor) -> tuple[Family, Tensor]:
    """The family of maps (L, D, D, D) at points z (L, r), all alike, in noise sigma (noise groups, D / 2 + 1).

    Beside it their mean (D, D, D).
    """
    middle = maps.mean(0)
    side, count = min(MOST_SIDE, maps.shape[-1]), len(maps)
    away = torch.stack([resize(one - middle, side) for one in maps]).flatten(1)
    value, vector = torch.linalg.eigh(away @ away.T)
    value, vector = value.flip(0)[:MAPS], vector.flip(1)[:, :MAPS]
    kept = value > 1e-6 * value[0]
    features = vector[:, kept] * math.sqrt(count)
    basis = (features.T @ away).view(-1, side, side, side) / count
    everything = torch.cat([resize(middle, side)[None], basis])
    return Family(everything, TabulatedCoefficients(z, features), sigma, torch.zeros(0)), middle
