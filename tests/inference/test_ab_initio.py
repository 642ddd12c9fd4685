"""Poses and a map from nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import hinge, simulate
from pyro_cryo.inference.ab_initio import ab_initio
from pyro_cryo.physics.rotations import align_poses, angle_deg

BOX = 32


@pytest.mark.slow
def test_poses_are_found_up_to_frame_and_hand(tmp_path: Path) -> None:
    source = hinge(1)
    apix = 2 * source.radius_angstrom / (0.65 * BOX)
    source = dataclasses.replace(source, sigma_angstrom=1.3 * apix)
    particles = Particles.open(simulate(source, tmp_path / "one", n_images=400, box=BOX, apix=apix, snr=0.5))
    nowhere = particles.with_poses(torch.eye(3).expand(400, 3, 3), torch.zeros(400, 2))
    found = ab_initio(nowhere, torch.eye(3)[None], shift_sd=1.5, starts=2)
    rotation, _ = align_poses(found.modes.best[0], particles.rotation)
    assert float(angle_deg(rotation, particles.rotation).median()) < 7
    assert found.volume.shape == (BOX, BOX, BOX)
