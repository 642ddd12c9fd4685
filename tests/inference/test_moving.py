"""Poses of a molecule that moves: what is pose and what is motion."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from images import blobs, hinge_images

from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.poses import PoseModes, PosePrior, moved
from pyro_cryo.inference import moving
from pyro_cryo.inference.moving import free_of, generators, refined_with_motion, without_rigid
from pyro_cryo.inference.pose_em import PoseEM, Solved
from pyro_cryo.inference.refine import refined
from pyro_cryo.inference.stages import Reached
from pyro_cryo.physics.rotations import angle_deg, exp, random_rotations
from pyro_cryo.physics.slices import fourier_grid, read_grid, slice_coordinates

BOX, COUNT = 32, 1000
EVERY = torch.eye(3)[None]


def test_generators_are_derivatives_of_moved_maps() -> None:
    """The slice of a map after a small motion less that before is the slice of a generator."""
    volume, k = blobs(BOX, 10), torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * 4
    made, step = generators(volume), 2e-3
    grid = fourier_grid(volume, 4)
    here = slice_coordinates(torch.eye(3), k)
    for axis in range(3):
        turn = torch.zeros(3)
        turn[axis] = step
        # V(S^T r) has the slice of V at k @ S.
        after, before = (read_grid(grid, slice_coordinates(exp(s * turn), k), 4) for s in (1.0, -1.0))
        found = read_grid(fourier_grid(made[3 + axis], 4), here, 4)
        assert float(((after - before) / (2 * step) - found).norm() / found.norm()) < 0.1  # slices are not smooth
    shifted = read_grid(grid, here, 4) * (-2j * math.pi / BOX) * k[:, 0]
    found = read_grid(fourier_grid(made[0], 4), here, 4)
    assert float((shifted - found).abs().max() / found.abs().max()) < 0.01


def test_components_without_a_part_in_rigid_motion() -> None:
    volume = blobs(BOX, 10)
    made = generators(volume)
    own = volume.flip(0) * volume
    left = without_rigid(torch.stack([own, own + 3 * made[1] - made[4], made[5]]), volume)
    assert float((left[0] - left[1]).norm() / left[0].norm()) < 1e-3
    assert float(left[2].norm() / made[5].norm()) < 1e-3
    assert float((made.flatten(1) @ left[0].flatten()).abs().max() / (made[0].norm() * own.norm())) < 1e-5


def test_displacements_are_freed_of_what_z_tells() -> None:
    generator, n = torch.Generator().manual_seed(0), 3000
    centre = PosePrior(random_rotations(n, generator), torch.zeros(n, 2), 0.05, 1.0)
    z = torch.randn(n, 3, generator=generator)
    principal = z * torch.tensor([9.0, 3.0, 1.0])
    own = torch.randn(n, 5, generator=generator) * torch.tensor([0.05] * 3 + [1.0] * 2)
    rotation, translation = moved(centre.rotation, centre.translation, own)
    turn = torch.stack([0.08 * z[:, 0], -0.04 * z[:, 1] ** 2, torch.zeros(n)], 1)
    offset = torch.stack([2 * z[:, 0], torch.zeros(n), z[:, 2] ** 3], 1)
    tied = PoseModes.single(rotation @ exp(turn), translation + (rotation[:, :2] @ offset[..., None])[..., 0])
    left = free_of(tied, centre, principal)
    assert float(angle_deg(left.best[0], rotation).median()) < 0.3 * float(angle_deg(tied.best[0], rotation).median())
    error = (left.best[1] - translation).norm(dim=1).median()
    assert float(error) < 0.2 * float((tied.best[1] - translation).norm(dim=1).median())
    free = free_of(PoseModes.single(rotation, translation), centre, principal)  # nothing to undo
    assert float(angle_deg(free.best[0], rotation).median()) < 0.15 * math.degrees(0.05)


@pytest.fixture(scope="module")
def swinging(tmp_path_factory: pytest.TempPathFactory) -> Particles:
    return hinge_images(tmp_path_factory.mktemp("hinge"), 15, COUNT, BOX, 0.5)


@pytest.mark.slow
def test_motion_is_not_taken_for_pose(swinging: Particles) -> None:
    away = torch.randn(COUNT, 5, generator=torch.Generator().manual_seed(1))
    away = away * torch.tensor([math.radians(4.0)] * 3 + [1.0] * 2)
    centre = moved(swinging.rotation, swinging.translation, away)
    prior = PosePrior(*centre, math.radians(4.0), 1.0)
    error = {}
    for how in (refined, refined_with_motion):
        found = how(swinging, prior, EVERY)
        rotation, translation = found.modes.best
        error[how.__name__] = (
            float(angle_deg(rotation, swinging.rotation).median()),
            float((translation - swinging.translation).norm(dim=1).median()),
        )
    one, many = error["refined"], error["refined_with_motion"]
    assert many[0] < 0.7 * one[0], error
    assert many[1] < 0.95 * one[1], error


def test_a_killed_refinement_goes_on(swinging: Particles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyro_cryo.inference import moving

    some = swinging[:80]
    prior = PosePrior(some.rotation, some.translation, math.radians(2.0), 0.5)
    monkeypatch.setattr(moving, "march", lambda first, finest: [5.0])
    whole = refined_with_motion(some, prior, EVERY, components=1)
    count, solve = [0], moving.reconstruct

    def killed(*args: object, **how: object) -> object:
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
        return solve(*args, **how)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(moving, "reconstruct", killed)
        with pytest.raises(KeyboardInterrupt):
            refined_with_motion(some, prior, EVERY, components=1, kept=tmp_path / "poses.pt")
    again = refined_with_motion(some, prior, EVERY, components=1, kept=tmp_path / "poses.pt")
    # A manifold is not solved to the last digit twice, and where a peak is flat its top is anywhere.
    assert float(angle_deg(whole.modes.best[0], again.modes.best[0]).quantile(0.95)) < 0.15
    assert again.evidence == pytest.approx(whole.evidence, abs=0.05)
    assert float(angle_deg(again.modes.best[0], some.rotation).median()) > 0.3  # they moved


@pytest.mark.parametrize("gain", [1.0, -1.0])
def test_hands_that_show_late_are_mirrored_where_images_are_then_more_probable(
    swinging: Particles, monkeypatch: pytest.MonkeyPatch, gain: float
) -> None:
    """After the first passes no state has the wrong hand, after the last linear one some have: all are made again."""
    count, made, begun = len(swinging), [], []
    centre = PosePrior(EVERY.expand(count, 3, 3), torch.zeros(count, 2), math.inf, 1.0)
    mirrored = PoseModes.single(swinging.rotation, torch.ones(count, 2))
    answers = iter((None, mirrored, None))

    def passed(
        em: PoseEM, start: PoseModes, band: float, solve: object, eckart: bool, reached: Reached | None
    ) -> moving._Pass:
        made.append((band, eckart, isinstance(solve, moving._Linear)))
        modes = start if reached is None else reached.modes
        begun.append(modes.translation.max())
        known = Solved(torch.zeros(BOX, BOX, BOX), torch.zeros(BOX // 2 + 1))
        em.sigma[:] = 1 + begun[-1]
        return moving._Pass(Reached(known, modes, gain * float(begun[-1])), None, None)  # type: ignore[arg-type]

    monkeypatch.setattr(moving, "_pass", passed)
    monkeypatch.setattr(moving, "_mirrored_where_wrong", lambda *_: next(answers))
    found = refined_with_motion(swinging, centre, EVERY, first=8.0)
    bands, curved = made[: -moving.CURVED_PASSES], made[-moving.CURVED_PASSES :]
    once, again = bands[: len(bands) // 2], bands[len(bands) // 2 :]
    assert once == again
    assert [eckart for _, eckart, _ in once] == [n < moving.HELD for n in range(len(once))]
    assert once[-1][0] == BOX / 2 - 1
    assert len(once) > moving.HELD + 1
    assert all(linear for *_, linear in bands)
    assert not any(linear for *_, linear in curved)
    assert max(begun[: len(once)]) == 0
    assert min(begun[len(once) : len(bands)]) == 1
    better = float(gain > 0)
    assert begun[len(bands)] == better
    assert bool((found.modes.translation == better).all())
    assert bool((found.sigma == 1 + better).all())
