"""A map and poses that a table knows only about: how far they are off is learned, and most of it mended."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from images import hinge_images
from pyro import poutine
from pyro.infer import Trace_ELBO

from pyro_cryo.data.particles import Particles
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.run import Run
from pyro_cryo.models.homogeneous import Homogeneous
from pyro_cryo.models.uncertain_pose import UncertainPose
from pyro_cryo.physics.rotations import angle_deg, exp

BOX, COUNT, TURN_DEG, SHIFT_PX = 24, 400, 5.0, 0.7


@pytest.fixture(scope="module")
def true(tmp_path_factory: pytest.TempPathFactory) -> Particles:
    return hinge_images(tmp_path_factory.mktemp("case"), 1, COUNT, BOX, 0.5, fill=0.6)


@pytest.fixture(scope="module")
def off(true: Particles) -> Particles:
    """The same images with poses that are off."""
    generator = torch.Generator().manual_seed(5)
    turn = exp(math.radians(TURN_DEG) * torch.randn(COUNT, 3, generator=generator))
    return true.with_poses(
        turn @ true.rotation, true.translation + SHIFT_PX * torch.randn(COUNT, 2, generator=generator)
    )


@pytest.fixture(scope="module")
def run(off: Particles, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fit(UncertainPose(BOX, turn_sd_deg=8.0, shift_sd_px=1.5), off, tmp_path_factory.mktemp("fits") / "run")


def test_how_far_poses_are_off_is_learned(run: Run) -> None:
    assert isinstance(run.model, UncertainPose)
    assert math.degrees(float(run.model.poses.turn_sd)) == pytest.approx(TURN_DEG, rel=0.2)
    assert float(run.model.poses.shift_sd) == pytest.approx(SHIFT_PX, rel=0.2)


def test_poses_and_map_are_mended(run: Run, true: Particles, off: Particles) -> None:
    assert run.poses is not None
    rotation, translation = run.poses.best
    before = angle_deg(off.rotation, true.rotation).median()
    assert float(angle_deg(rotation, true.rotation).median()) < 0.85 * float(before)
    moved = (translation - true.translation).norm(dim=1).median()
    assert float(moved) < 0.5 * float((off.translation - true.translation).norm(dim=1).median())
    best, blurred = Homogeneous(BOX), Homogeneous(BOX)
    best.prepare(true)
    blurred.prepare(off)
    error = [float((model.map() - best.map()).norm()) for model in (run.model, blurred)]
    assert error[0] < 0.5 * error[1]


def test_a_run_that_is_loaded_has_its_posteriors(run: Run, off: Particles) -> None:
    assert run.folder is not None
    again = Run.load(run.folder, particles=off)
    batch, values = run.particles.batch(slice(0, 20)), []
    for one in (run, again):
        pyro.set_rng_seed(0)
        with torch.no_grad():
            values.append(Trace_ELBO().loss(one.model, one.guide, batch))
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_the_guide_draws_poses_from_the_posteriors(run: Run) -> None:
    batch = run.particles.batch(slice(0, 50))
    with torch.no_grad():
        drawn = [poutine.trace(run.guide).get_trace(batch).nodes["rotation"]["value"] for _ in range(40)]
    assert run.poses is not None
    apart = angle_deg(torch.stack(drawn), batch.rotation).square().mean().sqrt()
    said = run.poses.spread.angle_deg[:50].square().mean().sqrt()
    assert float(apart) == pytest.approx(float(said), rel=0.1)
