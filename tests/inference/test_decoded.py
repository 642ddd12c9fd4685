"""Poses that climb in the maps of a model that is descended to."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from images import hinge_images

from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.poses import moved
from pyro_cryo.inference import decoded
from pyro_cryo.inference.decoded import tabulated
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.run import Run
from pyro_cryo.models.deformation import Deformation
from pyro_cryo.physics.rotations import angle_deg
from pyro_cryo.pose import KnownPose, PoseAbout

BOX, COUNT = 24, 300


@pytest.fixture(scope="module")
def true(tmp_path_factory: pytest.TempPathFactory) -> Particles:
    return hinge_images(tmp_path_factory.mktemp("moving"), 11, COUNT, BOX, 1.0)


def deformation() -> Deformation:
    return Deformation(BOX, zdim=1, points=300, modes=16, width=32, layers=1)


def test_maps_at_points_are_those_of_the_model(true: Particles) -> None:
    run = fit(deformation(), true, epochs=2)
    family, middle = tabulated(run, torch.Generator().manual_seed(0))
    maps = torch.einsum("lc,czyx->lzyx", family.coefficients.features, family.maps)  # type: ignore[arg-type]
    expected = run.volume(family.coefficients.points)  # type: ignore[arg-type]
    torch.testing.assert_close(maps, expected, atol=2e-3 * float(expected.abs().max()), rtol=0)
    torch.testing.assert_close(middle, family.maps[0])
    z = family.coefficients.points[3:5]
    torch.testing.assert_close(family.coefficients.at(z), family.coefficients.features[3:5])  # type: ignore[arg-type, index]


def rough(true: Particles) -> Particles:
    """Poses wrong by 4 degrees and .7 pixels along each axis."""
    away = torch.randn(len(true), 5, generator=torch.Generator().manual_seed(1))
    return true.with_poses(
        *moved(true.rotation, true.translation, away * torch.tensor([math.radians(4.0)] * 3 + [0.7] * 2))
    )


def refining(model: Deformation) -> Deformation:
    model.poses = PoseAbout(turn_sd_deg=4.0, shift_sd_px=0.7)
    return model


def test_a_fit_that_was_killed_between_rounds_goes_on(
    true: Particles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each round descends with poses that are known, and one that stands is not done again."""
    seen: list[Run] = []
    monkeypatch.setattr(decoded, "ROUNDS", 2)
    monkeypatch.setattr(Deformation, "pose_steps", 60)

    def watched(run: Run, generator: torch.Generator) -> object:
        seen.append(run)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return tabulated(run, generator)

    monkeypatch.setattr(decoded, "tabulated", watched)
    start = rough(true)
    with pytest.raises(KeyboardInterrupt):
        fit(refining(deformation()), start, tmp_path / "run", epochs=1)
    run = fit(refining(deformation()), start, tmp_path / "run", epochs=1, resume=True)
    assert len(seen) == 3
    assert all(isinstance(each.model.poses, KnownPose) for each in seen)
    assert [each.records[-1]["epoch"] for each in seen] == [4, 4, 4]  # 60 steps of 16 images
    assert run.poses is not None
    assert not torch.equal(run.poses.best[0], start.rotation)
    assert not list((tmp_path / "run").glob("*.part.pt"))


@pytest.mark.slow
def test_poses_are_better_in_the_models_own_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Than in a linear family, where the model's story is true."""
    true = hinge_images(tmp_path / "moving", 11, 600, 32, 1.0)
    error = []
    for steps in (0, 2500):
        monkeypatch.setattr(Deformation, "pose_steps", steps)
        torch.manual_seed(0)
        model = refining(Deformation(32, zdim=1, points=600, modes=32, width=64, layers=1))
        poses = fit(model, rough(true), epochs=1).poses
        assert poses is not None
        error.append(float(angle_deg(poses.best[0], true.rotation).median()))
    assert error[1] < 0.95 * error[0]
