"""Poses and a map by turns."""

from __future__ import annotations

import math

import pytest
import torch
from images import hinge_images

from pyro_cryo.analysis.fsc import fsc
from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.poses import PoseModes, PosePrior, moved
from pyro_cryo.inference.pose_em import PoseEM, Solved
from pyro_cryo.inference.reconstruct import image_power, reconstruct
from pyro_cryo.inference.search import Level
from pyro_cryo.physics.rotations import angle_deg

BOX, COUNT = 32, 400
EVERY = torch.eye(3)[None]


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> Particles:
    """One state of a hinge."""
    return hinge_images(tmp_path_factory.mktemp("one"), 1, COUNT, BOX, 0.5)


@pytest.fixture
def known(particles: Particles) -> Solved:
    """The map of the true poses."""
    return Solved(reconstruct(particles).volume, torch.zeros(BOX // 2 + 1))


def passes(particles: Particles, prior: PosePrior) -> PoseEM:
    return PoseEM(particles, prior, EVERY, image_power(particles, 200, "cpu"), torch.Generator().manual_seed(0))


def perturbed(particles: Particles, turn_deg: float, shift_px: float) -> PosePrior:
    away = torch.randn(COUNT, 5, generator=torch.Generator().manual_seed(1))
    away = away * torch.tensor([math.radians(turn_deg)] * 3 + [shift_px] * 2)
    rotation, translation = moved(particles.rotation, particles.translation, away)
    return PosePrior(rotation, translation, math.radians(turn_deg), shift_px)


def test_perturbed_poses_and_the_map_are_refined(particles: Particles, known: Solved) -> None:
    prior = perturbed(particles, 8.0, 1.0)
    em, modes, everyone = (
        passes(particles, prior),
        PoseModes.single(prior.rotation, prior.translation),
        torch.arange(COUNT),
    )
    start = reconstruct(particles.with_poses(prior.rotation, prior.translation)).volume
    found, evidence = Solved(start, torch.zeros(BOX // 2 + 1)), []
    for kmax in (6.0, 8.0, 10.0, 12.0, 12.0):
        found, gain = em.climb(everyone, modes, found, kmax, 3)
        evidence.append(gain)
    rotation, translation = modes.best
    before = float(angle_deg(prior.rotation, particles.rotation).median())
    assert float(angle_deg(rotation, particles.rotation).median()) < 0.5 * before
    assert float((translation - particles.translation).norm(dim=1).median()) < 0.4
    assert evidence[-1] > evidence[0]
    assert float(fsc(found.volume, known.volume)[1:9].mean()) > float(fsc(start, known.volume)[1:9].mean()) + 0.02


def test_the_noise_is_what_poses_leave(particles: Particles, known: Solved) -> None:
    prior = PosePrior(particles.rotation, particles.translation, 0.02, 0.1)
    em, modes = passes(particles, prior), PoseModes.single(prior.rotation, prior.translation)
    em.sigma = reconstruct(particles).sigma
    true = em.sigma.clone()
    em.climb(torch.arange(COUNT), modes, known, 14.0, 2)
    torch.testing.assert_close(em.sigma[:, 2:], true[:, 2:], rtol=0.08, atol=0)


def test_a_search_in_the_map_finds_the_poses_and_its_sum_the_map(particles: Particles, known: Solved) -> None:
    anywhere = PosePrior(torch.eye(3).expand(COUNT, 3, 3), torch.zeros(COUNT, 2), math.inf, 1.5)
    em, rows = passes(particles, anywhere), torch.arange(0, COUNT, 2)
    small = known.on(20)
    found = em.search(rows, small, (Level(1, 2, 4.5), Level(2, 3, 7.0)), 4)
    assert float(angle_deg(found.rotation[:, 0], particles.rotation[rows]).median()) < 15
    assert float((found.translation[:, 0] - particles.translation[rows]).norm(dim=1).median()) < 1
    added = em.add(rows, found, small)
    assert float(fsc(added.volume, small.volume)[1:6].min()) > 0.8


def test_a_map_on_another_box_is_the_same_map(known: Solved) -> None:
    there = Solved(known.volume, torch.rand(BOX // 2 + 1)).on(20)
    torch.testing.assert_close(there.on(20).volume, there.volume)
    assert there.on(BOX).variance.shape == (BOX // 2 + 1,)
    torch.testing.assert_close(there.on(BOX).on(20).variance, there.variance)
