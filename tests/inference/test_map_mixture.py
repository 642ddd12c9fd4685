"""Several maps from one, and poses in them, from nothing; going on after a kill."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import hinge_images

from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import simulate, ten_classes
from pyro_cryo.inference import ab_initio as stages
from pyro_cryo.inference import map_mixture
from pyro_cryo.inference.ab_initio import ab_initio
from pyro_cryo.inference.map_mixture import MapMixture
from pyro_cryo.inference.pose_em import PoseEM
from pyro_cryo.inference.search import Found, Level
from pyro_cryo.inference.stages import Reached

BOX = 32


def shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few passes of few images: what is done is tested, not what it comes to."""
    for where, name, value in (
        (map_mixture, "BANDS", (5, 5, 5, 5, 6, 6)),
        (map_mixture, "SAMPLE", 20),
        (stages, "RACE", (4,)),
        (stages, "SETTLING", (7, 8)),
        (stages, "SETTLED", 1),
        (stages, "SAMPLE", 30),
        (stages, "JUDGED", 30),
        (stages, "SEARCHED", (Level(1, 2, 6.0),)),
    ):
        monkeypatch.setattr(where, name, value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_images_of_two_kinds_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ten_classes()
    simulate(source, tmp_path / "case", n_images=1600, box=BOX, snr=0.5, seed=0)
    particles = Particles.open(tmp_path / "case" / "particles.star")
    with np.load(tmp_path / "case" / "truth.npz") as truth:
        state = truth["state"]
    some = particles[np.isin(state, (0, 9))]
    kind = torch.from_numpy((state[np.isin(state, (0, 9))] == 9).astype(np.int64))
    kept: list[MapMixture] = []
    searched_in_all = stages._searched_in_all

    def watched(em: PoseEM, reached: Reached) -> Reached:
        assert reached.mixture is not None
        kept.append(reached.mixture)
        return searched_in_all(em, reached)

    monkeypatch.setattr(stages, "_searched_in_all", watched)
    monkeypatch.setattr(stages, "SEVERAL", 2)
    found = ab_initio(some, torch.eye(3)[None], maps=None, shift_sd=1.0)  # that there are several is found
    (mixture,) = kept
    assert float(mixture.log_share.exp().sum()) == pytest.approx(1, abs=1e-5)
    assert found.modes.rotation.shape[0] == len(some)
    em = PoseEM(some, found.prior, torch.eye(3)[None], found.sigma, torch.Generator().manual_seed(0))
    last = mixture.on(20)
    searched = em.search(torch.arange(len(some)), last.known, stages.SEARCHED, 1, log_share=last.log_share)
    agree = float((searched.which[:, 0] == kind).float().mean())
    assert max(agree, 1 - agree) > 0.9
    assert math.isfinite(found.evidence)


@pytest.mark.parametrize("several", [True, False])
def test_the_judges_choose_and_are_not_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, several: bool) -> None:
    """Where maps are no more probable than the one they parted from, poses climb in this one."""
    particles = hinge_images(tmp_path / "one", 2, 60, BOX, 0.5)
    shorten(monkeypatch)
    asked: list[torch.Tensor] = []
    search, sample, climb, climbed = PoseEM.search, PoseEM.sample, PoseEM.climb, []

    def told(em: PoseEM, rows: torch.Tensor, known: Any, levels: Any, *how: Any, **more: Any) -> Found:
        found = search(em, rows, known, levels, *how, **more)
        if levels == stages.WHOLE and len(rows) == 12:  # one in five: the judges
            asked.append(rows)
            gain = (1.0 if several else -1.0) if isinstance(known, tuple) else 0.0
            return dataclasses.replace(found, evidence=torch.full_like(found.evidence, gain))
        return found

    def drawn(em: PoseEM, count: int, without: torch.Tensor | None = None) -> torch.Tensor:
        rows = sample(em, count, without)
        if without is not None:
            assert not torch.isin(rows, without).any()
            asked.append(without)
        return rows

    def climbing(em: PoseEM, *how: Any) -> Any:
        climbed.append(how)
        return climb(em, *how)

    for name, value in (("search", told), ("sample", drawn), ("climb", climbing)):
        monkeypatch.setattr(PoseEM, name, value)
    found = ab_initio(particles, torch.eye(3)[None], maps=None, shift_sd=1.0)
    assert len(asked) == 6 + 2
    assert all(torch.equal(one.sort().values, asked[0].sort().values) for one in asked)
    assert bool(climbed) != several
    assert len(found.modes.rotation) == len(particles)


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_maps_that_were_parting_go_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """In the first pass; in one on the box of the pass before, which counts on; in one on another box."""
    particles = hinge_images(tmp_path / "one", 2, 60, BOX, 0.5)
    shorten(monkeypatch)
    whole = ab_initio(particles, torch.eye(3)[None], maps=2, shift_sd=1.0)
    kept, passed, bands = tmp_path / "poses.pt", map_mixture.passed, []

    def killed(em: PoseEM, mixture: MapMixture, kmax: float, judges: torch.Tensor) -> MapMixture:
        bands.append(kmax)
        if len(bands) == stop:
            raise KeyboardInterrupt
        return passed(em, mixture, kmax, judges)

    monkeypatch.setattr(map_mixture, "passed", killed)
    with pytest.raises(KeyboardInterrupt):
        ab_initio(particles, torch.eye(3)[None], maps=2, shift_sd=1.0, kept=kept)
    again = ab_initio(particles, torch.eye(3)[None], maps=2, shift_sd=1.0, kept=kept)
    assert len(bands) == 6 + 1  # one of them twice
    for a, b in zip((*whole.modes.tensors, whole.volume), (*again.modes.tensors, again.volume), strict=True):
        torch.testing.assert_close(a, b)
    assert again.evidence == whole.evidence
