"""Tilt pairs as two stacks of the same particles."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import hinge, simulate
from pyro_cryo.inference.reconstruct import reconstruct
from pyro_cryo.physics.rotations import tilt

COUNT, BOX = 12, 16


@pytest.fixture
def stacks(tmp_path: Path) -> tuple[Path, Path]:
    """Images 2i and 2i + 1 of simulated pairs, each kind in a stack, with cryoDRGN's pickles of the first ones."""
    simulate(hinge(3), tmp_path / "case", n_images=2 * COUNT, box=BOX, snr=5.0, tilt_deg=30.0)
    with mrcfile.open(tmp_path / "case" / "particles.mrcs") as file:
        images, apix = file.data.copy(), float(file.voxel_size.x)
    for name, part in (("one", images[::2]), ("other", images[1::2])):
        with mrcfile.new(tmp_path / f"{name}.mrcs") as file:
            file.set_data(part)
            file.voxel_size = apix
    with np.load(tmp_path / "case" / "truth.npz") as truth:
        poses = truth["rotation"][::2], -truth["shift_px"][::2] / BOX
        ctf = truth["ctf"][::2]
    for name, content in (("poses", poses), ("ctf", ctf)):
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(content))
    return tmp_path / "one.mrcs", tmp_path / "other.mrcs"


def test_images_of_a_pair_stand_together(stacks: tuple[Path, Path]) -> None:
    folder = stacks[0].parent
    pairs = Particles.open(stacks[0], tilt=stacks[1], tilt_deg=30.0, poses=folder / "poses.pkl", ctf=folder / "ctf.pkl")
    whole = Particles.open(folder / "case" / "particles.star")
    np.testing.assert_array_equal(pairs.particle.numpy(), np.arange(2 * COUNT) // 2)
    torch.testing.assert_close(pairs.rotation, whole.rotation, atol=1e-4, rtol=0)
    torch.testing.assert_close(pairs.translation[::2], whole.translation[::2], atol=1e-3, rtol=0)
    torch.testing.assert_close(pairs.translation[1::2], pairs.translation[::2])
    rows = slice(0, 6)
    torch.testing.assert_close(pairs.batch(rows).image, whole.batch(rows).image, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pairs.batch(rows).ctf[::2], whole.batch(rows).ctf[::2], atol=1e-3, rtol=0)
    some = pairs[torch.tensor([4, 5, 9, 8])]
    assert some.first.tolist() == [0, 2]
    torch.testing.assert_close(some.relative[[1, 3]], torch.stack([tilt(30.0), tilt(-30.0)]), atol=1e-4, rtol=0)


def test_pairs_without_poses_know_how_their_views_lie(stacks: tuple[Path, Path]) -> None:
    with pytest.warns(UserWarning, match="no CTF"):
        pairs = Particles.open(stacks[0], tilt=stacks[1], tilt_deg=30.0)
    assert not pairs.has_poses
    torch.testing.assert_close(pairs.relative[::2], torch.eye(3).expand(COUNT, 3, 3))
    torch.testing.assert_close(pairs.relative[1::2], tilt(30.0).expand(COUNT, 3, 3))
    with pytest.warns(UserWarning, match="no CTF"):
        other = Particles.open(stacks[0], tilt=stacks[1], tilt_deg=-30.0)
    assert other.fingerprint() != pairs.fingerprint()
    first = pairs[torch.arange(0, 6)]
    assert first.n_particles == 3
    torch.testing.assert_close(first.relative[1], tilt(30.0))


def test_what_is_no_pair_is_refused(stacks: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = stacks
    star = tmp_path / "case" / "particles.star"
    with pytest.raises(ValueError, match="tilt pairs need the second stack and the angle"):
        Particles.open(one, tilt=other)
    with pytest.raises(ValueError, match="tilt pairs need the second stack and the angle"):
        Particles.open(one, tilt_deg=30.0)
    with pytest.raises(ValueError, match="is a table; tilt pairs are two stacks"):
        Particles.open(star, tilt=other, tilt_deg=30.0)
    with mrcfile.new(tmp_path / "few.mrcs") as file:
        file.set_data(np.zeros((3, BOX, BOX), np.float32))
        file.voxel_size = 5.0
    with pytest.warns(UserWarning, match="no CTF"), pytest.raises(ValueError, match="has 3 images and "):
        Particles.open(one, tilt=tmp_path / "few.mrcs", tilt_deg=30.0)
    with (
        pytest.warns(UserWarning, match="no CTF"),
        pytest.raises(ValueError, match="tilt_deg is nan; expected degrees"),
    ):
        Particles.open(one, tilt=other, tilt_deg=float("nan"))


def test_series_without_poses_or_angles_say_so(stacks: tuple[Path, Path], tmp_path: Path) -> None:
    known = Particles.open(tmp_path / "case" / "particles.star")
    lost = replace(known, table=replace(known.table, rotation=None))
    with pytest.raises(ValueError, match="24 images of 12 particles and does not say how their views lie"):
        lost.relative  # noqa: B018


def test_the_tilt_is_that_of_the_reference_pairs(shared: Path) -> None:
    """Real conventions: two stacks that cryoDRGN made, 45 degrees apart; the wrong sign does not explain them."""
    folder = shared / "data" / "simulated" / "cryodrgn_hand"
    left = []
    for angle in (45.0, -45.0):
        pairs = Particles.open(
            folder / "hand.mrcs",
            apix=1.0,
            tilt=folder / "hand_tilt.mrcs",
            tilt_deg=angle,
            poses=folder / "hand_rot.pkl",
            box=32,
        )
        left.append(float(reconstruct(pairs, mask=None).sigma.mean()))
    assert left[0] < 0.6 * left[1]
