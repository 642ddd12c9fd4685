"""Poses refined about a table's, the spread of their prior, and going on after a kill."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from images import hinge_images

from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.poses import PoseModes, PosePrior, moved
from pyro_cryo.inference import refine
from pyro_cryo.inference.pose_em import PoseEM
from pyro_cryo.inference.refine import first_band, refined
from pyro_cryo.physics.rotations import angle_deg

BOX, COUNT = 32, 400
EVERY = torch.eye(3)[None]
TURN_SD, SHIFT_SD = math.radians(6.0), 1.0


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> Particles:
    return hinge_images(tmp_path_factory.mktemp("one"), 1, COUNT, BOX, 0.5)


@pytest.fixture(scope="module")
def rough(particles: Particles) -> PosePrior:
    """Poses that are known to 6 degrees and 1 pixel, said to be twice as unsure."""
    away = torch.randn(COUNT, 5, generator=torch.Generator().manual_seed(1))
    away = away * torch.tensor([TURN_SD] * 3 + [SHIFT_SD] * 2)
    return PosePrior(*moved(particles.rotation, particles.translation, away), 2 * TURN_SD, 2 * SHIFT_SD)


def test_poses_and_their_spread_are_found(particles: Particles, rough: PosePrior) -> None:
    found = refined(particles, rough, EVERY)
    rotation, translation = found.modes.best
    before = float(angle_deg(rough.rotation, particles.rotation).median())
    assert float(angle_deg(rotation, particles.rotation).median()) < 0.45 * before
    assert float((translation - particles.translation).norm(dim=1).median()) < 0.4
    assert found.prior.turn_sd == pytest.approx(TURN_SD, rel=0.2)
    assert found.prior.shift_sd == pytest.approx(SHIFT_SD, rel=0.2)


def test_a_killed_refinement_goes_on(
    particles: Particles, rough: PosePrior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refine, "FIRST", 1)
    some, prior = particles[:60], rough[torch.arange(60)]
    whole = refined(some, prior, EVERY)
    kept, climb, left = tmp_path / "poses.pt", PoseEM.climb, [3]

    def killed(self: PoseEM, *args: object) -> object:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return climb(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(PoseEM, "climb", killed)
    with pytest.raises(KeyboardInterrupt):
        refined(some, prior, EVERY, kept=kept)
    passes = []
    monkeypatch.setattr(PoseEM, "climb", lambda self, *args: (passes.append(args[3]), climb(self, *args))[1])
    again = refined(some, prior, EVERY, kept=kept)
    assert passes[0] > first_band(prior, BOX)
    for a, b in zip(whole.modes.tensors, again.modes.tensors, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(whole.volume, again.volume)
    assert (again.evidence, again.prior.turn_sd) == (whole.evidence, whole.prior.turn_sd)


def test_spread_is_learned_from_posteriors(rough: PosePrior) -> None:
    n = 4000
    centre = PosePrior(torch.eye(3).expand(n, 3, 3), torch.zeros(n, 2), 1.0, 1.0)
    away = torch.randn(n, 5, generator=torch.Generator().manual_seed(2)) * torch.tensor([0.03] * 3 + [0.4] * 2)
    modes = PoseModes.single(*moved(centre.rotation, centre.translation, away))
    sharp = torch.diag(torch.tensor([0.04**-2] * 3 + [0.3**-2] * 2)).expand(n, 1, 5, 5)
    learned = centre.learned(PoseModes(modes.rotation, modes.translation, sharp, modes.log_weight))
    assert learned.turn_sd == pytest.approx(0.05, rel=0.02)
    assert learned.shift_sd == pytest.approx(0.5, rel=0.02)
    assert math.isinf(replace(centre, turn_sd=math.inf).learned(modes).turn_sd)  # uniform rotations stay so


def test_sure_poses_are_compared_at_high_frequency_at_once() -> None:
    def prior(turn_deg: float, shift_px: float) -> PosePrior:
        return PosePrior(torch.eye(3)[None], torch.zeros(1, 2), math.radians(turn_deg), shift_px)

    assert first_band(prior(0.2, 0.1), 64) == 31
    assert first_band(prior(5.0, 0.1), 64) == pytest.approx(7.8, abs=0.1)
    assert first_band(prior(0.2, 2.0), 64) == pytest.approx(7.6, abs=0.1)
    assert first_band(prior(60.0, 2.0), 64) == 5
