"""Fits whose poses are not known: found first, kept in the run, written out with how unsure they are."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from images import fine_images, hinge_images
from torch import nn

from pyro_cryo.data.particles import Particles
from pyro_cryo.data.star import read_star
from pyro_cryo.guides.poses import PoseModes, moved
from pyro_cryo.inference import fit as fitting
from pyro_cryo.inference import posing
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.run import Run
from pyro_cryo.models.classes import Classes
from pyro_cryo.models.homogeneous import Homogeneous
from pyro_cryo.models.linear_subspace import LinearSubspace
from pyro_cryo.physics.rotations import angle_deg, exp
from pyro_cryo.pose import AnyPose, PoseAbout

BOX, COUNT = 32, 300


@pytest.fixture(scope="module")
def true(tmp_path_factory: pytest.TempPathFactory) -> Particles:
    return hinge_images(tmp_path_factory.mktemp("one"), 1, COUNT, BOX, 0.5)


@pytest.fixture(scope="module")
def rough(true: Particles, tmp_path_factory: pytest.TempPathFactory) -> Particles:
    """Particles whose table is wrong by 5 degrees and 1 pixel about each axis."""
    away = torch.randn(COUNT, 5, generator=torch.Generator().manual_seed(1))
    away = away * torch.tensor([math.radians(5.0)] * 3 + [1.0] * 2)
    path = tmp_path_factory.mktemp("rough") / "particles.star"
    true.with_poses(*moved(true.rotation, true.translation, away)).write_star(path)
    return Particles.open(path)


def refining(box: int) -> Homogeneous:
    model = Homogeneous(box)
    model.poses = PoseAbout(turn_sd_deg=6.0, shift_sd_px=1.5)
    return model


@pytest.fixture(scope="module")
def run(rough: Particles, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fit(refining(BOX), rough, tmp_path_factory.mktemp("fit") / "run")


def error_deg(particles: Particles, true: Particles) -> float:
    return float(angle_deg(particles.rotation, true.rotation).median())


def test_poses_are_refined_and_the_map_is_theirs(run: Run, rough: Particles, true: Particles) -> None:
    assert error_deg(run.particles, true) < 0.5 * error_deg(rough, true)
    exact = fit(Homogeneous(BOX), true).volume()
    blurred = fit(Homogeneous(BOX), rough).volume()
    wrong = [float((volume - exact).norm()) for volume in (run.volume(), blurred)]
    assert wrong[0] < 0.7 * wrong[1]


def test_a_loaded_run_has_the_poses(run: Run) -> None:
    assert run.folder is not None
    again = Run.load(run.folder)
    torch.testing.assert_close(again.particles.rotation, run.particles.rotation)
    assert again.poses is not None
    assert run.poses is not None
    for a, b in zip(again.poses.tensors, run.poses.tensors, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(again.volume(), run.volume())
    assert isinstance(again.model.poses, PoseAbout)
    assert math.degrees(float(again.model.poses.turn_sd)) == pytest.approx(5.0, rel=0.3)  # learned
    assert not (run.folder / "poses.part.pt").exists()


def test_the_table_says_how_unsure_poses_are(run: Run, true: Particles) -> None:
    assert run.folder is not None
    rows = read_star(run.folder / "particles.star")["particles"]
    written = Particles.open(run.folder / "particles.star")
    torch.testing.assert_close(written.rotation, run.particles.rotation, atol=1e-4, rtol=0)
    torch.testing.assert_close(written.translation, run.particles.translation, atol=1e-3, rtol=0)
    rms = math.sqrt(float(angle_deg(written.rotation, true.rotation).square().median()))
    said = float(np.median(np.asarray(rows["pyroCryoAngleSdDeg"], float)))
    assert 0.5 * rms < said < 2 * rms
    assert {"pyroCryoShiftSdPx", "pyroCryoPoseEntropy"} <= set(rows.columns)


def test_a_fit_killed_after_the_poses_does_not_find_them_again(
    rough: Particles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = rough[:40]

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Homogeneous, "prepare", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(refining(BOX), some, tmp_path / "run")
    monkeypatch.setattr(fitting, "find_poses", killed)
    run = fit(refining(BOX), some, tmp_path / "run", resume=True)
    assert run.poses is not None
    assert error_deg(run.particles, some) > 0


def test_other_poses_are_not_resumed(rough: Particles, run: Run) -> None:
    assert run.folder is not None
    said = r"PoseAbout\(turn_sd_deg=6, shift_sd_px=1.5, defocus_sd_angstrom=0\), not KnownPose\(\)"
    with pytest.raises(ValueError, match=f"was fitted with poses {said}"):
        fit(Homogeneous(BOX), rough, run.folder, resume=True)


def test_poses_from_nothing_are_asked_for_by_the_prior(true: Particles, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, int, object]] = []
    known = type("Posed", (), {"modes": PoseModes.single(true.rotation, true.translation), "defocus": None})

    def ab_initio(particles: Particles, symmetry: torch.Tensor, *, shift_sd: float, maps: int, **how: object) -> object:
        asked.append((shift_sd, maps, how["finest"]))
        return known

    monkeypatch.setattr(posing, "ab_initio", ab_initio)
    model = Homogeneous(BOX)
    model.poses = AnyPose(shift_sd_px=1.25)
    run = fit(model, true)
    assert asked == [(1.25, 1, None)]
    torch.testing.assert_close(run.particles.rotation, true.rotation)
    model.poses = AnyPose(shift_sd_px=1.25, maps=3)
    with pytest.raises(ValueError, match="Homogeneous has one map, poses are to be searched in 3"):
        fit(model, true)
    begun: list[object] = []

    def refined_with_motion(particles: Particles, *_: object, start: object, **how: object) -> object:
        begun.append(start)
        return known

    monkeypatch.setattr(posing, "refined_with_motion", refined_with_motion)
    moving = LinearSubspace(BOX, zdim=1)
    moving.poses = AnyPose(shift_sd_px=1.25, maps=3)
    fit(moving, true)
    assert asked[1:] == [(1.25, 3, posing.MOVING)]
    assert begun == [known.modes]  # type: ignore[attr-defined]
    classes = Classes(BOX, classes=2)
    classes.poses = AnyPose(shift_sd_px=1.25, maps=3)
    with pytest.raises(ValueError, match="each of the 2 classes has one; leave --search-maps out"):
        fit(classes, true)


def test_defocus_is_refined_where_the_prior_has_a_spread_of_it(tmp_path: Path) -> None:
    true = fine_images(tmp_path / "fine", 60, 24, 0.5)
    off = 500 * torch.randn(60, generator=torch.Generator().manual_seed(2))
    rough, model = true.with_defocus(off), Homogeneous(24)
    model.poses = PoseAbout(turn_sd_deg=2.0, shift_sd_px=0.5, defocus_sd_angstrom=400.0)
    run = fit(model, rough, tmp_path / "run")
    assert run.defocus is not None
    assert float(model.poses.defocus_sd) == pytest.approx(run.defocus.spread)
    again = Run.load(tmp_path / "run", particles=rough)
    assert again.defocus is not None
    torch.testing.assert_close(again.defocus.sd, run.defocus.sd)
    written = Particles.open(tmp_path / "run" / "particles.star")
    assert true.ctf is not None
    for particles in (run.particles, again.particles, written):
        assert particles.ctf is not None
        moved_by = particles.ctf.defocus_v_angstrom - true.ctf.defocus_v_angstrom
        torch.testing.assert_close(moved_by, off + run.defocus.mean, atol=0.1, rtol=0)
    rows = read_star(tmp_path / "run" / "particles.star")["particles"]
    said = torch.from_numpy(np.asarray(rows["pyroCryoDefocusSdAngst"], np.float32))
    torch.testing.assert_close(said, run.defocus.sd, atol=0.1, rtol=0)


def test_images_of_a_particle_stay_together(true: Particles) -> None:
    """Poses that are refined of tilt pairs, turned as one and shifted each on its own, are better than of images."""
    pairs = dataclasses.replace(true, table=dataclasses.replace(true.table, particle=torch.arange(COUNT) // 2))
    generator = torch.Generator().manual_seed(0)
    turn = exp(math.radians(3) * torch.randn(COUNT // 2, 3, generator=generator)) @ true.rotation[pairs.first]
    shift = true.translation + 0.5 * torch.randn(COUNT, 2, generator=generator)
    error = []
    for particles in (pairs, true):
        start = particles.with_poses(pairs.relative @ pairs.of_images(turn), shift)
        poses = fit(refining(BOX), start).poses
        assert poses is not None
        error.append(float(angle_deg(poses.best[0], true.rotation).median()))
        if particles is pairs:
            torch.testing.assert_close(start.with_poses(*poses.best).relative, pairs.relative, atol=1e-5, rtol=0)
    assert error[0] < 0.85 * error[1]


def test_a_prior_that_nothing_solves_for_is_refused(true: Particles) -> None:
    class Odd(nn.Module):
        """A prior of its own."""

    model = Homogeneous(BOX)
    model.poses = Odd()
    with pytest.raises(TypeError, match="poses of Odd cannot be found; derive it from PoseAbout or AnyPose"):
        fit(model, true)
