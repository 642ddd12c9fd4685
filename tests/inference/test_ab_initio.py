"""Poses and a map from nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from images import hinge_images

from pyro_cryo.inference.ab_initio import ab_initio
from pyro_cryo.physics.rotations import align_poses, angle_deg

BOX = 32


@pytest.mark.slow
def test_poses_are_found_up_to_frame_and_hand(tmp_path: Path) -> None:
    particles = hinge_images(tmp_path / "one", 1, 400, BOX, 0.5)
    nowhere = particles.with_poses(torch.eye(3).expand(400, 3, 3), torch.zeros(400, 2))
    found = ab_initio(nowhere, torch.eye(3)[None], shift_sd=1.5, starts=2)
    rotation, _ = align_poses(found.modes.best[0], particles.rotation)
    assert float(angle_deg(rotation, particles.rotation).median()) < 7
    assert found.volume.shape == (BOX, BOX, BOX)
