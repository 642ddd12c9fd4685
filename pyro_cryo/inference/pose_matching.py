"""Posteriors of poses as the model has them, matched by draws that are weighed beside it.

A fit leaves Laplace's approximation about each mode: where an image tells little of its pose that is too sure, and
draws have weights that vary. For some particles, whose posterior is asked for, it can be better.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.guides.pose_mixture import PosedGuide, PoseMixture
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

    def log_ratio(some: Batch, row: Tensor, rotation: Tensor, translation: Tensor) -> Tensor:
        pose = {"rotation": rotation[some.first], "translation": translation * some.freq_scale[:, None]}
        return _log_weight(_at(run, modes[row]), some, pose)

    for seed in range(ROUNDS):
        modes = matched(modes, batch, log_ratio, seed=seed)
    return _at(run, modes)


def _log_weight(run: Run, batch: Batch, pose: dict[str, Tensor]) -> Tensor:
    """log p(images, latent) - log q(latent) (n,) at a pose, what else is latent drawn given it."""
    assert run.guide is not None
    with torch.no_grad(), pyro.validation_enabled(False):
        guess = trace_of(poutine.condition(run.guide, pose), batch)
        rest = {name: node["value"] if of_particles(node) else node["fn"].mean for name, node in latent_of(guess)}
        told = trace_of(poutine.condition(run.model, rest | pose), batch)
        return log_density(told, batch) - log_density(guess, batch)


def _at(run: Run, modes: PoseModes) -> Run:
    """The run with modes (B, K) of the images of one batch."""
    assert isinstance(run.guide, PosedGuide)
    return replace(run, guide=PosedGuide(_OfBatch(modes, enumerated=False), run.guide.rest, run.guide.draws))


class _OfBatch(PoseMixture):
    """Modes of the images of one batch, in its order."""

    def rows(self, batch: Batch) -> PoseModes:
        return self.modes
