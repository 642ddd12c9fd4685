"""Several maps from one, and poses in them, from nothing; going on after a kill."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from images import hinge_images

from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import simulate, ten_classes
from pyro_cryo.guides.poses import PosePrior
from pyro_cryo.inference import ab_initio as stages
from pyro_cryo.inference import map_mixture
from pyro_cryo.inference.ab_initio import ab_initio
from pyro_cryo.inference.map_mixture import MapMixture
from pyro_cryo.inference.pose_em import Added, PoseEM, Solved
from pyro_cryo.inference.reconstruct import image_power
from pyro_cryo.inference.search import Level
from pyro_cryo.inference.stages import Reached

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
    in_one_frame = stages._in_one_frame

    def watched(em: PoseEM, reached: Reached) -> Reached:
        assert reached.mixture is not None
        kept.append(reached.mixture)
        return in_one_frame(em, reached)

    monkeypatch.setattr(stages, "_in_one_frame", watched)
    found = ab_initio(some, torch.eye(3)[None], maps=2, shift_sd=1.0)
    (mixture,) = kept
    assert len(mixture.known) == 2
    assert float(mixture.log_share.exp().sum()) == pytest.approx(1, abs=1e-5)
    assert found.modes.rotation.shape[0] == len(some)
    em = PoseEM(some, found.prior, torch.eye(3)[None], found.sigma, torch.Generator().manual_seed(0))
    last = mixture.on(20)
    searched = em.search(torch.arange(len(some)), last.known, stages.IN_SEVERAL, 1, log_share=last.log_share)
    agree = float((searched.which[:, 0] == kind).float().mean())
    assert max(agree, 1 - agree) > 0.9
    assert math.isfinite(found.evidence)


def test_an_empty_map_begins_anew_as_one_with_that_of_most_images() -> None:
    """Images of the two are then in either, by chance; all others stay."""
    known = tuple(Solved(torch.full((4, 4, 4), float(n)), torch.zeros(3)) for n in range(4))
    added = tuple(Added(*[torch.full((8, 8, 5), float(n))] * 4) for n in range(4))
    share = torch.tensor([0.2, 0.5, 0.3, 1e-3])
    mixture = MapMixture(known, share.log(), torch.arange(4), added).begun_anew(share)
    assert mixture.same.tolist() == [0, 1, 2, 1]
    assert torch.equal(mixture.known[3].volume, known[1].volume)
    assert float(mixture.added[1].value[0, 0, 0]) == float(mixture.added[3].value[0, 0, 0]) == 0.5
    assert float(mixture.log_share.exp().sum()) == pytest.approx(1, abs=1e-5)
    assert float(mixture.log_share[3]) == pytest.approx(float(mixture.log_share[1]), abs=1e-5)
    which = torch.arange(4).repeat(1000)[:, None]
    chosen = mixture.parted_by_chance(which, torch.rand(4000, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(chosen[(which == 0) | (which == 2)], which[(which == 0) | (which == 2)])
    twins = chosen[(which == 1) | (which == 3)]
    assert set(twins.tolist()) == {1, 3}
    assert 0.45 < float((twins == 1).float().mean()) < 0.55


@pytest.mark.parametrize("best", [0, 1, 2])
def test_of_several_maps_of_one_kind_the_best_is_left(best: int) -> None:
    """Each is missed least while there are others of it; together they are missed most."""
    kind = torch.tensor([0, 0, 0, 1, 1, 2])  # of each map
    image = torch.tensor([0] * 90 + [1] * 57 + [2] * 3)
    fit = torch.where(image[:, None] == kind, 10.0, 0.0)
    fit += torch.rand(150, 6, generator=torch.Generator().manual_seed(0))
    fit[:, best] += 0.5 * (image == 0)
    kept, log_share = map_mixture.least_missed(fit, 3)
    assert kind[kept].tolist() == [0, 1, 2]
    assert int(kept[0]) == best
    torch.testing.assert_close(log_share.exp(), torch.tensor([0.6, 0.38, 0.02]), atol=0.005, rtol=0)
    assert map_mixture.least_missed(fit, 6)[0].tolist() == list(range(6))


def test_a_rare_kind_is_missed_more_than_a_second_map_of_a_common_one() -> None:
    image = torch.tensor([0] * 98 + [1] * 2)
    fit = torch.where(image[:, None] == torch.tensor([0, 0, 1]), 10.0, 0.0)
    kept, _ = map_mixture.least_missed(fit, 2)
    assert 2 in kept.tolist()


def test_maps_that_are_left_are_still_one_where_they_were() -> None:
    known = tuple(Solved(torch.full((4, 4, 4), float(n)), torch.zeros(3)) for n in range(5))
    mixture = MapMixture(known, torch.full((5,), 0.2).log(), torch.tensor([0, 1, 0, 3, 0]))
    share = torch.tensor([0.2, 0.5, 0.3]).log()
    left = mixture.of_maps(torch.tensor([1, 2, 4]), share)
    assert left.same.tolist() == [0, 1, 1]
    assert [float(one.volume[0, 0, 0]) for one in left.known] == [1, 2, 4]
    assert torch.equal(left.log_share, share)


def test_no_map_is_left_without_images(tmp_path: Path) -> None:
    """More maps than images can fill: one of no images would not be a number."""
    particles = hinge_images(tmp_path / "one", 2, 12, BOX, 0.5)
    count = len(particles)
    prior = PosePrior(torch.eye(3).expand(count, 3, 3), torch.zeros(count, 2), math.inf, 1.0)
    sigma = image_power(particles, count, "cpu")
    em = PoseEM(particles, prior, torch.eye(3)[None], sigma, torch.Generator().manual_seed(0))
    mixture = MapMixture.begun(stages._random_map(em), 8)
    for kmax in (5, 5, 6, 6):
        mixture = map_mixture.passed(em, mixture, kmax)
    assert all(bool(one.volume.isfinite().all()) for one in mixture.known)


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_maps_that_were_parting_go_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """In the first pass; in one on the box of the pass before, which counts on; in one on another box."""
    particles = hinge_images(tmp_path / "one", 2, 60, BOX, 0.5)
    for where, name, value in (
        (map_mixture, "BANDS", (5, 5, 5, 5, 6, 6)),
        (map_mixture, "SAMPLE", 20),
        (stages, "RACE", (4,)),
        (stages, "SETTLED", 1),
        (stages, "SAMPLE", 30),
        (stages, "JUDGED", 30),
        (stages, "IN_SEVERAL", (Level(1, 2, 6.0),)),
    ):
        monkeypatch.setattr(where, name, value)
    whole = ab_initio(particles, torch.eye(3)[None], maps=2, shift_sd=1.0)
    kept, passed, bands = tmp_path / "poses.pt", map_mixture.passed, []

    def killed(em: PoseEM, mixture: MapMixture, kmax: float) -> MapMixture:
        bands.append(kmax)
        if len(bands) == stop:
            raise KeyboardInterrupt
        return passed(em, mixture, kmax)

    monkeypatch.setattr(map_mixture, "passed", killed)
    with pytest.raises(KeyboardInterrupt):
        ab_initio(particles, torch.eye(3)[None], maps=2, shift_sd=1.0, kept=kept)
    again = ab_initio(particles, torch.eye(3)[None], maps=2, shift_sd=1.0, kept=kept)
    assert len(bands) == 6 + 1  # one of them twice
    for a, b in zip((*whole.modes.tensors, whole.volume), (*again.modes.tensors, again.volume), strict=True):
        torch.testing.assert_close(a, b)
    assert again.evidence == whole.evidence
