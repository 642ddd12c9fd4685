"""Several maps from one, and poses in them, from nothing."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import simulate, ten_classes
from pyro_cryo.inference import ab_initio as stages
from pyro_cryo.inference.ab_initio import ab_initio
from pyro_cryo.inference.map_mixture import MapMixture, parted
from pyro_cryo.inference.pose_em import PoseEM

BOX = 32


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

    def watched(em: PoseEM, known: object, count: int) -> MapMixture:
        kept.append(parted(em, known, count))  # type: ignore[arg-type]
        return kept[-1]

    monkeypatch.setattr(stages, "parted", watched)
    found = ab_initio(some, torch.eye(3)[None], maps=2, shift_sd=1.0)
    (mixture,) = kept
    assert float(mixture.log_share.exp().sum()) == pytest.approx(1, abs=1e-5)
    assert found.modes.rotation.shape[0] == len(some)
    em = PoseEM(some, found.prior, torch.eye(3)[None], found.sigma, torch.Generator().manual_seed(0))
    last = mixture.on(20)
    searched = em.search(torch.arange(len(some)), last.known, stages.SEARCHED, 1, log_share=last.log_share)
    agree = float((searched.which[:, 0] == kind).float().mean())
    assert max(agree, 1 - agree) > 0.9
    assert math.isfinite(found.evidence)
