"""Priors of poses: what they sample, in which units, and how a model takes them."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from images import blobs, observed
from pyro import poutine
from torch import nn

from pyro_cryo.data.batch import Batch
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.physics.rotations import angle_deg, log, random_rotations
from pyro_cryo.pose import AnyPose, KnownPose, PoseAbout

BOX, IMAGES = 16, 2000


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Half of the images have half the field of view: a pixel of the model is two of theirs."""
    return observed(blobs(BOX, 7), IMAGES, 1.0, torch.where(torch.arange(IMAGES) % 2 == 0, 1.0, 2.0))


def drawn(poses: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    pyro.set_rng_seed(0)
    with pyro.plate("particles", len(batch), dim=-1):
        return poses(batch)


def test_known_poses_are_the_tables_and_no_sites(batch: Batch) -> None:
    trace = poutine.trace(KnownPose()).get_trace(batch)
    assert not trace.stochastic_nodes
    assert trace.nodes["_RETURN"]["value"] == (batch.rotation, batch.translation)


def test_poses_about_a_consensus_have_its_spreads(batch: Batch) -> None:
    rotation, translation = drawn(PoseAbout(turn_sd_deg=4.0, shift_sd_px=1.5), batch)
    turn = log(rotation @ batch.rotation.mT)
    shift = translation - batch.translation
    assert abs(float(turn.std()) / math.radians(4.0) - 1) < 4 / (6 * IMAGES) ** 0.5
    for scale in (1.0, 2.0):
        own = shift[batch.freq_scale == scale]
        assert abs(float(own.std()) / (1.5 * scale) - 1) < 4 / (2 * IMAGES) ** 0.5  # pixels of the image's own field


def test_any_pose_is_uniform(batch: Batch) -> None:
    rotation, translation = drawn(AnyPose(shift_sd_px=1.5), batch)
    other = random_rotations(IMAGES, torch.Generator().manual_seed(3))
    angle = torch.deg2rad(angle_deg(rotation, other))
    uniform = (angle - angle.sin()) / math.pi  # the distribution function of the angle under the Haar measure
    assert abs(float(uniform.mean()) - 0.5) < 4 / (12 * IMAGES) ** 0.5
    assert abs(float(uniform.var()) - 1 / 12) < 0.01
    whole = translation[batch.freq_scale == 1]
    assert abs(float(whole.std()) / 1.5 - 1) < 4 / (2 * IMAGES) ** 0.5


def test_a_model_samples_the_poses_it_is_given(batch: Batch) -> None:
    model, few = CryoDRGN(BOX, zdim=1, width=8, layers=1, symmetry="C2"), batch[torch.arange(6)]
    known = poutine.trace(model).get_trace(few)
    assert "rotation" not in known.nodes
    model.poses = PoseAbout(turn_sd_deg=1.0, shift_sd_px=0.5)
    trace = poutine.trace(model).get_trace(few)
    trace.compute_log_prob()
    for name in ("rotation", "translation"):
        assert trace.nodes[name]["log_prob"].shape == (6,), name
    assert "poses.turn_sd" in model.state_dict()


def test_spreads_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="turn_sd_deg is 0; expected a positive number of degrees, or use AnyPose"):
        PoseAbout(0)
    with pytest.raises(ValueError, match="shift_sd_px is -1; expected a positive number of pixels"):
        AnyPose(-1)
    with pytest.raises(ValueError, match="maps is 0; expected 1 or more"):
        AnyPose(maps=0)
