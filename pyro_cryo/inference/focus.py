"""The defocus of every image, refined beside its pose: last passes over poses, between which images are refocused.

In the map of a pass each image's offset from its table's defocus has a posterior at the best pose (`guides.defocus`);
the spread of the offsets is learned from all images. The next pass takes offsets at their means, which are near 0 where
images tell little of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.coefficients import images_at_once
from pyro_cryo.guides.defocus import Defocus, DefocusLikelihood, offsets_about
from pyro_cryo.inference.pose_em import PoseEM, noise_left
from pyro_cryo.inference.stages import Reached, Stage
from pyro_cryo.physics.slices import fourier_grid

ROUNDS = 2  # of refocusing, each followed by a pass


def refocusing(em: PoseEM, last: Stage) -> list[Stage]:
    """Stages that refocus images and pass over poses once more, by turns; none where the prior knows the defocus.

    last: the pass. Raises ValueError where the images have no defocus that can be refined
    """
    if not em.prior.defocus_sd:
        return []
    table = em.particles.with_defocus(torch.zeros(len(em.particles)))
    return [partial(_refocused, em, table), last] * ROUNDS


def _refocused(em: PoseEM, table: Particles, reached: Reached | None) -> Reached:
    """Posteriors of the offsets from the table's defocus, in the map that the images make at their best poses."""
    assert reached is not None
    likelihood, box = _added_up(em, reached), reached.known.box
    rotation, translation = reached.modes.best
    images = replace(table, box=box).with_poses(rotation, translation * (box / table.box))
    added = torch.zeros(len(images)) if em.defocus is None else em.defocus.mean
    turn, along = images.defocus_turn, torch.stack([images.defocus_turn, added], -1)
    offsets = offsets_about(em.prior.defocus_sd, float(turn.max()) * (box / 2) ** 2)
    every = torch.empty(len(images), len(offsets))
    for batch in _batches(em, images, "defocus"):
        row = batch.index.cpu()
        own = along[row].to(em.device)
        told = likelihood.at(batch, images.quadrature(batch), own[:, 0], own[:, 1], offsets.to(em.device))
        every[row] = told.cpu()
    em.defocus = Defocus.given(every, offsets, em.prior.defocus_sd)
    em.particles = table.with_defocus(em.defocus.mean)
    em.progress.note(f"defocus differs by {em.defocus.spread:.0f} A, known to {float(em.defocus.sd.median()):.0f} A")
    return reached


def _added_up(em: PoseEM, reached: Reached) -> DefocusLikelihood:
    """The map of all images at their best poses, as they are focused, and what the one before left of them as noise."""
    box, (rotation, translation) = reached.known.box, reached.modes.best
    images = replace(em.particles, box=box).with_poses(rotation, translation * (box / em.particles.box))
    sums = em.sums(reached.known)
    for batch in _batches(em, images, "map"):
        sums.add(batch)
    known = em.solved(sums, enveloped=True)
    return DefocusLikelihood(fourier_grid(known.volume), known.variance, noise_left(sums))


def _batches(em: PoseEM, images: Particles, title: str) -> Iterator[Batch]:
    size = images_at_once(len(images.half), em.device)
    return em.progress(images.batches(size, device=em.device), images.n_batches(size), title)
