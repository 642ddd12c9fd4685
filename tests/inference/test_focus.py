"""Defocus refined beside poses: found as well as can be, said to be as unsure as it is, and going on after a kill."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from images import fine_images

from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.defocus import DefocusLikelihood
from pyro_cryo.guides.poses import PosePrior, moved
from pyro_cryo.inference import focus, refine
from pyro_cryo.inference.moving import refined_with_motion
from pyro_cryo.inference.refine import refined
from pyro_cryo.inference.stages import Posed

BOX, COUNT, SD = 32, 500, 500.0
EVERY = torch.eye(3)[None]


@pytest.fixture(scope="module")
def true(tmp_path_factory: pytest.TempPathFactory) -> Particles:
    return fine_images(tmp_path_factory.mktemp("fine"), COUNT, BOX, 0.3)


@pytest.fixture(scope="module")
def offset() -> torch.Tensor:
    return SD * torch.randn(COUNT, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def rough(true: Particles, offset: torch.Tensor) -> tuple[Particles, PosePrior]:
    """Defocus off by 500 angstrom, poses by 2 degrees and half a pixel."""
    away = torch.randn(COUNT, 5, generator=torch.Generator().manual_seed(1))
    away = away * torch.tensor([math.radians(2.0)] * 3 + [0.5] * 2)
    poses = moved(true.rotation, true.translation, away)
    return true.with_poses(*poses).with_defocus(-offset), PosePrior(*poses, math.radians(2.0), 0.5, 400.0)


@pytest.fixture(scope="module")
def found(rough: tuple[Particles, PosePrior]) -> Posed:
    return refined(*rough, EVERY)


def test_offsets_are_found_and_their_sds_hold(found: Posed, offset: torch.Tensor) -> None:
    assert found.defocus is not None
    wrong = found.defocus.mean - offset
    assert float(wrong.square().mean().sqrt()) < 0.6 * SD
    assert float((wrong / found.defocus.sd).square().mean()) == pytest.approx(1, abs=0.3)
    assert found.defocus.spread == pytest.approx(SD, rel=0.15)


def test_an_image_has_no_say_in_the_map_it_is_compared_with(
    found: Posed, rough: tuple[Particles, PosePrior], offset: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would speak for the defocus that it was added at: offsets and their sds would be too small."""
    at = DefocusLikelihood.at
    monkeypatch.setattr(
        DefocusLikelihood, "at", lambda self, *args: at(replace(self, variance=0 * self.variance), *args)
    )
    counted = refined(*rough, EVERY).defocus
    assert counted is not None
    assert found.defocus is not None
    assert counted.spread < 0.97 * found.defocus.spread
    z2 = [float(((one.mean - offset) / one.sd).square().mean()) for one in (counted, found.defocus)]
    assert z2[0] > 1.1 * z2[1]


def test_a_killed_refinement_goes_on(
    rough: tuple[Particles, PosePrior], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refine, "FIRST", 1)
    some, prior = rough[0][:60], rough[1][torch.arange(60)]
    whole = refined(some, prior, EVERY)
    refocused, left = focus._refocused, [2]

    def killed(*args: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return refocused(*args)

    monkeypatch.setattr(focus, "_refocused", killed)
    with pytest.raises(KeyboardInterrupt):
        refined(some, prior, EVERY, kept=tmp_path / "poses.pt")
    monkeypatch.setattr(focus, "_refocused", refocused)
    again = refined(some, prior, EVERY, kept=tmp_path / "poses.pt")
    assert whole.defocus is not None
    assert again.defocus is not None
    for one, other in ((whole.defocus, again.defocus), (whole.modes, again.modes)):
        for a, b in zip(one.tensors, other.tensors, strict=True):
            torch.testing.assert_close(a, b)
    assert again.evidence == whole.evidence


def test_a_table_that_is_known_is_kept(rough: tuple[Particles, PosePrior]) -> None:
    some, prior = rough[0][:20], rough[1][torch.arange(20)]
    assert refined(some, replace(prior, defocus_sd=0.0), EVERY).defocus is None


@pytest.mark.slow
def test_molecules_that_move_are_refocused_in_their_consensus(
    rough: tuple[Particles, PosePrior], offset: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(focus, "ROUNDS", 1)
    found = refined_with_motion(*rough, EVERY, components=2, first=12.0).defocus
    assert found is not None
    assert float((found.mean - offset).square().mean().sqrt()) < 0.7 * SD
