"""Posteriors of poses, found before a model is fitted: refined or searched, as its prior of poses says."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.defocus import Defocus
from pyro_cryo.guides.points import ClassesCoefficients
from pyro_cryo.guides.poses import PoseModes, prior_of
from pyro_cryo.inference.ab_initio import ab_initio
from pyro_cryo.inference.decoded import Descent, refined_in_decoder
from pyro_cryo.inference.moving import refined_with_motion
from pyro_cryo.inference.refine import refined
from pyro_cryo.inference.stages import Posed
from pyro_cryo.model import CryoModel
from pyro_cryo.pose import AnyPose, PoseAbout
from pyro_cryo.progress import Progress, quiet

MOVING = 10.0  # cycles a box, in which poses from nothing are first compared with maps that move


def find_poses(
    model: CryoModel,
    particles: Particles,
    seed: int = 0,
    progress: Progress = quiet,
    kept: Path | None = None,
    descend: Descent | None = None,
) -> Posed:
    """Posteriors of the poses under `model.poses`: in one map for all images, or where the model has z in a family.

    Poses known roughly are refined about the table's; where any is possible they are searched from nothing, up to a
    rotation and the hand of the map: in as many maps at once as a model of classes has, else in as many as the prior
    says. The family is linear, whatever the model's own: it only has to follow what moves. Where a model's `pose_steps`
    are not 0 poses then climb in its own maps. The defocus is refined about the table's where that has a spread, in the
    map that images have in common.

    kept:    file of the state on the way, from which what was killed goes on
    descend: fits a model like this one to particles whose poses are known
    """
    prior = prior_of(model.poses, particles)
    generator = torch.Generator().manual_seed(seed)
    symmetry = getattr(model, "symmetry", torch.eye(3)[None])
    device = model.log_sigma.device
    how: dict[str, Any] = {"generator": generator, "device": device, "progress": progress}

    def decoded(posed: Posed) -> Posed:
        if descend is None or not model.pose_steps:
            return posed
        images = particles if posed.defocus is None else particles.with_defocus(posed.defocus.mean)
        found = refined_in_decoder(images, posed, symmetry, descend, kept=_beside(kept, "decoded"), **how)
        return replace(found, defocus=posed.defocus)

    if math.isfinite(prior.turn_sd):
        refine = refined_with_motion if model.zdim else refined
        return decoded(refine(particles, prior, symmetry, kept=kept, **how))
    classes = isinstance(getattr(model, "coefficients", None), ClassesCoefficients)
    assert isinstance(model.poses, AnyPose)
    if model.poses.maps > 1 and not model.zdim:
        raise ValueError(
            f"{type(model).__name__} has one map, poses are to be searched in {model.poses.maps}; "
            "leave --search-maps out (maps=1)"
        )
    if classes and model.poses.maps not in (1, model.zdim):
        raise ValueError(
            f"poses are to be searched in {model.poses.maps} maps, but each of the {model.zdim} classes has one; "
            "leave --search-maps out (maps=1), or give as many classes"
        )
    maps = model.zdim if classes else model.poses.maps
    finest = MOVING if model.zdim else None  # beyond which one map is not what images show
    found = ab_initio(particles, symmetry, shift_sd=prior.shift_sd, maps=maps, finest=finest, kept=kept, **how)
    if not model.zdim:
        return found
    begun: dict[str, Any] = {"start": found.modes, "one_hand": not classes}  # each class has a hand of its own
    moving = _beside(kept, "moving")
    return decoded(refined_with_motion(particles, prior, symmetry, first=MOVING, kept=moving, **begun, **how))


def _beside(kept: Path | None, name: str) -> Path | None:
    """Another file of a state on the way."""
    return None if kept is None else kept.with_name(f"{name}.{kept.name}")


def learn_spread(model: CryoModel, particles: Particles, modes: PoseModes, defocus: Defocus | None) -> None:
    """Set the spreads of a prior about a consensus, the particles' own poses, to what posteriors say of them."""
    if isinstance(model.poses, PoseAbout):
        learned = prior_of(model.poses, particles).learned(modes)
        model.poses.turn_sd.fill_(learned.turn_sd)
        model.poses.shift_sd.fill_(learned.shift_sd)
        if defocus is not None:
            model.poses.defocus_sd.fill_(defocus.spread)
