"""Posteriors of poses in the maps of a finished run, of images of which they are known roughly: simulated ones, say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from pyro_cryo.data.batch import Batch
from pyro_cryo.guides.exact import ExactGuide
from pyro_cryo.guides.landscape import MapLikelihood, PoseLikelihood, climbed
from pyro_cryo.guides.pose_mixture import OfImages, PosedGuide
from pyro_cryo.guides.poses import PoseModes, PosePrior
from pyro_cryo.inference.decoded import tabulated
from pyro_cryo.inference.family import Family
from pyro_cryo.inference.moving import likelihood_in
from pyro_cryo.inference.run import Run
from pyro_cryo.physics.slices import slope_grid
from pyro_cryo.pose import PoseAbout

WIDER = 2.0  # than posteriors of poses, a prior about their best
STEPS = 6  # of Newton's method


@contextmanager
def about_its_poses(run: Run) -> Iterator[Run]:
    """The run with a prior about the best pose of each image, somewhat wider than posteriors are, as long as it lasts.

    Whether poses are as sure as they say can be asked of the peaks in which they were found, not of the search.
    """
    assert run.poses is not None
    modes, own = run.poses, run.model.poses
    heaviest = modes.precision[torch.arange(len(modes.log_weight)), modes.log_weight.argmax(1)]
    variance = torch.diagonal(torch.linalg.inv(heaviest), dim1=1, dim2=2)
    turn, shift = (WIDER * float(part.mean(1).median()) ** 0.5 for part in (variance[:, :3], variance[:, 3:]))
    run.model.poses = PoseAbout(math.degrees(turn), shift).to(run.device)
    try:
        yield replace(run, source=run.particles, folder=None, defocus=None)
    finally:
        run.model.poses = own


def pose_likelihood(run: Run) -> PoseLikelihood:
    """What images say of their poses in a run's maps, z integrated out; of a network's at the z of some particles."""
    model, sigma = run.model, run.model.sigma.detach()
    if not model.zdim:
        return MapLikelihood(slope_grid(run.volume().to(run.device)), sigma)
    rest = run.guide.rest if isinstance(run.guide, PosedGuide) else run.guide
    if not isinstance(rest, ExactGuide):
        return likelihood_in(*tabulated(run, torch.Generator().manual_seed(0)), eckart=False)
    basis, coefficients = rest.family
    family = Family(basis.components, coefficients, sigma, torch.zeros(0))
    beyond = run.volume(np.zeros(model.zdim, dtype=np.float32)).to(run.device)  # the same at any z
    return likelihood_in(family, beyond, eckart=False)


def climbing(run: Run, likelihood: PoseLikelihood, batch: Batch) -> PosedGuide:
    """The guide of other images than the run's: a Gaussian about the mode to which each climbs from the batch's pose.

    likelihood: of the run (`pose_likelihood`); the prior of its model is about the batch's poses
    """
    poses = run.model.poses
    assert isinstance(poses, PoseAbout)
    assert isinstance(run.guide, PosedGuide)
    px = batch.freq_scale
    begun = PoseModes.single(batch.rotation, batch.translation / px[:, None]).to(batch.image.device)
    prior = PosePrior(batch.rotation, begun.translation[:, 0], float(poses.turn_sd), float(poses.shift_sd))
    with torch.no_grad():
        modes, _ = climbed(batch, likelihood, begun, prior, px, STEPS)
    return PosedGuide(OfImages(batch.index, modes), run.guide.rest)
