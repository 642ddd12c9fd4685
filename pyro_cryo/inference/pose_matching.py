"""Posteriors of poses as the model has them, matched from draws that are weighed beside it.

A fit leaves Laplace's approximation about each mode: where an image tells little of its pose that is too sure, and
draws have weights that vary. For some particles, whose posterior is asked for, it can be better.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pyro_cryo.data.batch import Batch
from pyro_cryo.guides.pose_mixture import PosedGuide, PoseMixture
from pyro_cryo.guides.pose_moments import matched, proposal
from pyro_cryo.guides.poses import PoseModes
from pyro_cryo.inference.draws import drawn
from pyro_cryo.pose import seen_from

if TYPE_CHECKING:
    from pyro_cryo.inference.run import Run

ROUNDS = 2
DRAWS = 128  # a round


def with_matched_poses(run: Run, batch: Batch) -> Run:
    """The run whose guide has masses and moments of the posteriors of a batch's poses, and of no others."""
    assert isinstance(run.guide, PosedGuide)
    modes = run.guide.poses.rows(batch)
    for _ in range(ROUNDS):
        wide = proposal(modes)
        found = drawn(_at(run, wide), batch, DRAWS, DRAWS)
        log_weight = found.smoothed[0].to(batch.image)
        rotation = seen_from(found.sites["rotation"], batch)
        modes = matched(wide, batch, rotation, found.sites["translation"], log_weight)
    return _at(run, modes)


def _at(run: Run, modes: PoseModes) -> Run:
    """The run with modes (B, K) of the images of one batch."""
    assert isinstance(run.guide, PosedGuide)
    return replace(run, guide=PosedGuide(_OfBatch(modes, enumerated=False), run.guide.rest, run.guide.draws))


class _OfBatch(PoseMixture):
    """Modes of the images of one batch, in its order."""

    def rows(self, batch: Batch) -> PoseModes:
        return self.modes
