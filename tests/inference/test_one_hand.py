"""Maps of either hand, each in a frame of its own, brought to one."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from images import hinge_images
from torch import Tensor

from pyro_cryo.data.blobs import Complex, hinge, ten_classes
from pyro_cryo.guides.poses import PoseModes, PosePrior
from pyro_cryo.inference import moving
from pyro_cryo.inference.moving import refined_with_motion
from pyro_cryo.inference.one_hand import Placement, to_one_frame, to_one_hand
from pyro_cryo.physics.fourier import flip_hand, resize
from pyro_cryo.physics.rotations import align_poses, angle_deg, exp, random_rotations

BOX, APIX = 32, 9.0
MIRROR = torch.diag(torch.tensor([1.0, 1.0, -1.0]))


def moved(source: Complex, placement: Placement, apix: float = APIX) -> Complex:
    """The molecule whose map the placement brings to that of this one."""
    mirror = MIRROR if placement.mirrored else torch.eye(3)
    return Complex(
        (source.xyz - BOX * apix * placement.shift) @ placement.rotation @ mirror,
        source.weight,
        source.coordinate,
        source.sigma_angstrom,
    )


@pytest.fixture(params=[False, True])
def placement(request: pytest.FixtureRequest) -> Placement:
    """Of a mirror image anywhere, of another map nearby."""
    anywhere = random_rotations(1, torch.Generator().manual_seed(3))[0]
    turn = anywhere if request.param else exp(torch.tensor([0.1, 0.05, -0.08]))
    return Placement(turn, torch.tensor([1.0, -2.0, 1.0]) / BOX, request.param, 1.0)


def test_a_placement_says_what_it_does_to_maps_and_to_poses(placement: Placement) -> None:
    """Images of the map that is placed, at poses, are those of the other at the poses that are said."""
    there, here = hinge(1), moved(hinge(1), placement)
    generator = torch.Generator().manual_seed(0)
    rotation, translation = random_rotations(5, generator), torch.randn(5, 2, generator=generator)
    seen = here.projector(0, BOX, APIX)(rotation, translation)
    placed = there.projector(0, BOX, APIX)(*placement.poses(rotation, translation, BOX))
    assert float((seen - placed).abs().max() / seen.max()) < 1e-4


def test_a_flipped_hand_is_the_map_of_mirrored_atoms() -> None:
    whole = hinge(1)
    other = moved(whole, Placement(torch.eye(3), torch.zeros(3), True, 1.0))
    away = flip_hand(whole.volume(0, BOX, APIX)) - other.volume(0, BOX, APIX)
    assert float(away[1:].abs().max()) < 1e-5 * float(other.volume(0, BOX, APIX).max())


def test_maps_come_to_the_hand_and_frame_of_most(placement: Placement) -> None:
    """Of three states of a hinge one is turned, shifted and perhaps mirrored."""
    state = hinge(3)
    maps = torch.stack([state.volume(0, BOX, APIX), state.volume(1, BOX, APIX)])
    other = moved(state, placement).volume(2, BOX, APIX)
    found = to_one_hand(torch.cat([maps, other[None]]), torch.tensor([0.3, 0.4, 0.3]))
    assert [one.mirrored for one in found] == [False, False, placement.mirrored]
    right = [torch.eye(3), torch.eye(3), placement.rotation]
    for one, rotation in zip(found, right, strict=True):
        assert float(angle_deg(one.rotation, rotation)) < 15  # the arms pull
    assert float((found[2].shift - placement.shift).norm()) * BOX < 2.5


def test_maps_that_lie_anywhere_come_to_one_frame() -> None:
    """Two of three assemblies are turned and shifted, one of them mirrored: what they share says how."""
    state, turns = ten_classes(), random_rotations(2, torch.Generator().manual_seed(4))
    apix, small = state.apix_for(BOX, None), 20
    away = [
        Placement(turns[0], torch.tensor([1.0, -2.0, 1.0]) / BOX, False, 1.0),
        Placement(turns[1], torch.tensor([-1.0, 1.0, 0.0]) / BOX, True, 1.0),
    ]
    others = [moved(state, one, apix).volume(number, BOX, apix) for number, one in zip((1, 8), away, strict=True)]
    maps = torch.stack([resize(one, small) for one in (state.volume(0, BOX, apix), *others)])
    found = to_one_frame(maps, torch.tensor([0.4, 0.3, 0.3]), mirrored=True)
    for one, right in zip(found[1:], away, strict=True):
        assert one.mirrored == right.mirrored
        assert float(angle_deg(one.rotation, right.rotation)) < 5
        assert float((one.shift - right.shift).norm()) * BOX < 1


def half_mirrored(modes: PoseModes, other: Tensor) -> PoseModes:
    """With the poses of some images as they are beside the mirror image."""
    turn = exp(torch.tensor([0.3, -0.2, 0.5]))
    rotation = torch.where(other[:, None, None], MIRROR @ modes.best[0] @ MIRROR @ turn, modes.best[0])
    return PoseModes.single(rotation, modes.best[1])


def test_images_of_the_wrong_hand_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four states, two begin in the poses of their mirror images."""
    particles = hinge_images(tmp_path / "case", 4, 600, BOX, 0.5)
    with np.load(tmp_path / "case" / "truth.npz") as truth:
        other = torch.from_numpy(truth["state"]) > 1
    monkeypatch.setattr(moving, "STATES", 4)
    monkeypatch.setattr(moving, "march", lambda first, finest: [9.0, 10.0])
    monkeypatch.setattr(moving, "CURVED_PASSES", 0)
    start = half_mirrored(PoseModes.single(particles.rotation, particles.translation), other)
    given = start.copy()
    count = len(particles)
    prior = PosePrior(torch.eye(3).expand(count, 3, 3), torch.zeros(count, 2), math.inf, 1.0)

    def right(modes: PoseModes) -> float:
        """The share of images within 40 degrees: how far the arm takes the frame along is not asked."""
        aligned, _ = align_poses(modes.best[0], particles.rotation)
        return float((angle_deg(aligned, particles.rotation) < 40).float().mean())

    assert right(start) < 0.7
    found = refined_with_motion(particles, prior, torch.eye(3)[None], components=2, first=8.0, start=start)
    assert right(found.modes) > 0.9
    assert torch.equal(start.rotation, given.rotation)


def test_right_poses_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass is made again."""
    particles, passes = hinge_images(tmp_path / "case", 4, 400, BOX, 0.5), []
    monkeypatch.setattr(moving, "STATES", 4)
    monkeypatch.setattr(moving, "march", lambda first, finest: [9.0, 10.0])
    monkeypatch.setattr(moving, "CURVED_PASSES", 0)
    once = moving._pass
    monkeypatch.setattr(moving, "_pass", lambda *how: passes.append(how[2]) or once(*how))
    count = len(particles)
    prior = PosePrior(torch.eye(3).expand(count, 3, 3), torch.zeros(count, 2), math.inf, 1.0)
    start = PoseModes.single(particles.rotation, particles.translation)
    refined_with_motion(particles, prior, torch.eye(3)[None], components=2, first=8.0, start=start)
    assert passes == [8.0, 9.0, 10.0]
