"""Posteriors of poses as the model has them, matched by draws that are weighed beside it.

A fit leaves Laplace's approximation about each mode: where an image tells little of its pose that is too sure, and
draws have weights that vary. For some particles, whose posterior is asked for, it can be better.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.guides.pose_mixture import OfImages, PosedGuide
from pyro_cryo.guides.pose_moments import matched
from pyro_cryo.guides.poses import PoseModes
from pyro_cryo.inference.draws import latent_of, log_density, of_particles, trace_of

if TYPE_CHECKING:
    from pyro_cryo.inference.run import Run

ROUNDS = 3  # settle from Laplace's approximation


def with_matched_poses(run: Run, batch: Batch) -> Run:
    """The run whose guide has masses and moments of the posteriors of a batch's poses, and of no others."""
    assert isinstance(run.guide, PosedGuide)
    modes = run.guide.poses.rows(batch)
    for seed in range(ROUNDS):
        found = _at(run, batch, modes)
        modes = matched(modes, batch, partial(_log_weight, found), seed=seed)
    return _at(run, batch, modes)


def _log_weight(run: Run, batch: Batch, rotation: Tensor, translation: Tensor) -> Tensor:
    """log p(images, latent) - log q(latent) (n,) at poses in pixels of the modes, what else is latent drawn there."""
    pose = {"rotation": rotation[batch.first], "translation": translation * batch.freq_scale[:, None]}
    assert run.guide is not None
    with torch.no_grad(), pyro.validation_enabled(False):
        guess = trace_of(poutine.condition(run.guide, pose), batch)
        rest = {name: node["value"] if of_particles(node) else node["fn"].mean for name, node in latent_of(guess)}
        told = trace_of(poutine.condition(run.model, rest | pose), batch)
        return log_density(told, batch) - log_density(guess, batch)


def _at(run: Run, batch: Batch, modes: PoseModes) -> Run:
    """The run with modes (B, K) of a batch's images, and of no others."""
    assert isinstance(run.guide, PosedGuide)
    return replace(run, guide=PosedGuide(OfImages(batch.index, modes), run.guide.rest, run.guide.draws))
