"""Poses and a map from nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from images import hinge_images

from pyro_cryo.data.particles import Particles
from pyro_cryo.inference import ab_initio as stages
from pyro_cryo.inference.ab_initio import ab_initio
from pyro_cryo.inference.pose_em import PoseEM
from pyro_cryo.inference.search import Level
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


def test_passes_end_in_the_band_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    particles = hinge_images(tmp_path / "one", 1, 30, BOX, 0.5)
    for name, value in (("RACE", (4,)), ("SETTLING", (7,)), ("SAMPLE", 20), ("SEARCHED", (Level(1, 2, 6.0),))):
        monkeypatch.setattr(stages, name, value)
    bands: list[float] = []

    def climb(em: PoseEM, rows: torch.Tensor, modes: object, known: object, band: float, steps: int) -> object:
        bands.append(band)
        return known, 0.0

    monkeypatch.setattr(PoseEM, "climb", climb)
    ab_initio(particles, torch.eye(3)[None], finest=12.0)
    assert bands[0] == 10
    assert bands[-1] == 12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no CTF")
@pytest.mark.parametrize(("tilted", "within_deg"), [(True, 0.2), (False, 1.0)])
def test_a_hand_is_found_from_a_hundred_images(shared: Path, tilted: bool, within_deg: float) -> None:
    """Images without noise; with their tilt pairs the map's hand is determined, and the hand's poses are closer."""
    folder = shared / "data" / "simulated" / "cryodrgn_hand"
    pair = {"tilt": folder / "hand_tilt.mrcs", "tilt_deg": 45.0} if tilted else {}
    true = Particles.open(folder / "hand.mrcs", apix=1.0, poses=folder / "hand_rot.pkl", **pair)
    bare = Particles.open(folder / "hand.mrcs", apix=1.0, **pair)
    found = ab_initio(bare, torch.eye(3)[None], generator=torch.Generator().manual_seed(1))
    rotation, flipped = align_poses(found.modes.best[0], true.rotation)
    assert float(angle_deg(rotation, true.rotation).median()) < within_deg
    assert not (tilted and flipped)
