"""Draws of z are independent of the pose where z is, whatever the views hide; what is not independent is found."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_cryo.analysis.association import FEWEST, association, pose_association
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import hinge, simulate
from pyro_cryo.guides.poses import PoseModes
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.run import guide_of
from pyro_cryo.models.linear_subspace import LinearSubspace
from pyro_cryo.physics.rotations import exp, point_group, random_rotations


def rotations(n: int, seed: int) -> Tensor:
    return random_rotations(n, torch.Generator().manual_seed(seed))


def posterior(rotation: Tensor, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws and means of z ~ Normal(0, I_2), which is seen along its first axis only from where the view's x is large.

    Image = x sqrt(8) z_1 + noise of variance 1: the posterior in closed form.
    """
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(len(rotation), 2))
    factor = math.sqrt(8) * rotation[:, 2, 0].double().numpy()
    variance = 1 / (1 + factor**2)
    mean = variance * factor * (factor * z[:, 0] + rng.normal(size=len(z)))
    draw = mean + np.sqrt(variance) * rng.normal(size=len(z))
    return np.stack([draw, rng.normal(size=len(z))], 1), np.stack([mean, 0 * mean], 1)


def crowded(n: int, seed: int) -> Tensor:
    """Views about one axis, all particles lying much the same way."""
    turn = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)) * torch.tensor([0.3, 0.3, 3.0])
    return exp(turn)


@pytest.mark.parametrize("views", [rotations, crowded])
def test_exact_draws_are_called_associated_at_the_stated_rate(views: object) -> None:
    p = []
    for seed in range(150):
        rotation = views(150, seed)  # type: ignore[operator]
        p.append(association(posterior(rotation, seed)[0], rotation, permutations=99, seed=seed).p_value)
    assert 0.005 < np.mean(np.array(p) <= 0.05) < 0.11  # three standard errors about 5%
    assert 0.4 < np.mean(p) < 0.6


def test_posterior_means_would_be_called_associated_always() -> None:
    p = []
    for seed in range(20):
        rotation = rotations(600, seed)
        p.append(association(posterior(rotation, seed)[1], rotation, permutations=99, seed=seed).p_value)
    assert np.mean(np.array(p) <= 0.05) > 0.9


@pytest.mark.parametrize(
    ("said", "part"),
    [
        (lambda r: r[:, 2, 0].sign(), "view direction"),
        (lambda r: r[:, 2, 0].square(), "view direction"),  # the same from the back
        (lambda r: r[:, 0, 1], "in-plane angle"),
        (lambda r: r[:, 0, 0] * r[:, 1, 1] + r[:, 0, 1] * r[:, 1, 0], "in-plane angle"),
    ],
)
def test_what_z_says_of_the_pose_is_found(said: object, part: str) -> None:
    for seed in range(5):
        rotation, rng = rotations(400, seed), np.random.default_rng(seed)
        value = said(rotation).numpy()  # type: ignore[operator]
        value = (value - value.mean()) / value.std()
        z = rng.normal(size=(400, 4))
        z[:, 2] = 0.5 * value + math.sqrt(0.75) * z[:, 2]
        found = association(z, rotation, permutations=199, seed=seed)
        assert found.p_value == 1 / 200
        assert found.part == part


def test_a_variance_that_depends_on_the_view_is_found() -> None:
    rotation = rotations(400, 0)
    z = np.random.default_rng(0).normal(size=(400, 2)) * (0.3 + rotation[:, 2, :1].abs().numpy())
    found = association(z, rotation)
    assert found.p_value <= 0.002
    assert found.score.argmax() == 1  # of the view direction, in z's squares and products
    assert abs(found.share) < 0.03


def test_the_share_is_what_the_pose_explains_less_chance() -> None:
    rotation, rng = rotations(4000, 1), np.random.default_rng(1)
    noise = rng.normal(size=(4000, 3))
    z = noise.copy()
    z[:, 1] = math.sqrt(0.3 * 3) * rotation[:, 2, 1].numpy() + math.sqrt(0.7) * noise[:, 1]
    found = association(z @ np.linalg.qr(rng.normal(size=(3, 3)))[0], rotation, permutations=99)
    assert found.largest == pytest.approx(0.3, abs=0.03)
    assert found.share == pytest.approx(0.1, abs=0.02)
    few = [association(noise[n : n + 80], rotation[n : n + 80], permutations=99).share for n in range(0, 800, 80)]
    assert abs(np.mean(few)) < 0.06  # of 80 particles' z, 34 functions of the pose explain 43% by chance


def test_a_probability_of_classes_is_a_z() -> None:
    rotation, rng = rotations(300, 2), np.random.default_rng(2)
    label = rng.integers(4, size=300)
    assert 0.01 < association(np.eye(4)[label], rotation).p_value < 1
    label[rotation[:, 2, 2].numpy() > 0.3] = 0
    assert association(np.eye(4)[label], rotation).p_value <= 0.002


@pytest.mark.parametrize("name", ["C3", "D2", "I"])
def test_equivalent_poses_of_a_symmetric_map_are_one(name: str) -> None:
    group, rotation = point_group(name), rotations(400, 3)
    other = rotation @ group[torch.randint(len(group), (400,), generator=torch.Generator().manual_seed(0))]
    z = np.random.default_rng(3).normal(size=(400, 2))
    one, same = (association(z, r, group, permutations=99) for r in (rotation, other))
    assert one.statistic == pytest.approx(same.statistic, abs=1e-3)
    nearest = (rotation[:, 2] @ (group @ torch.tensor([0.3, 0.137, 0.94])).T).amax(1).numpy()
    z[:, 0] += 30 * nearest  # a function of the view that is the same for all equivalents
    assert association(z, other, group, permutations=99).p_value == 0.01


def test_draws_that_cannot_be_tested_are_refused() -> None:
    rotation, z = rotations(60, 0), np.zeros((60, 2))
    with pytest.raises(ValueError, match="59 draws of z and 60"):
        association(z[1:], rotation)
    with pytest.raises(ValueError, match=f"20 particles are too few.*{FEWEST}"):
        association(z[:20], rotation[:20])
    with pytest.raises(ValueError, match="z is the same for all 60"):
        association(z, rotation)


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Particles:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = tmp_path_factory.mktemp("association") / "case"
        return Particles.open(simulate(hinge(1), folder, n_images=400, box=20, snr=0.5, seed=0))


def test_a_run_whose_z_explains_errors_of_the_poses_is_found(still: Particles) -> None:
    side = still.rotation[:, 2, 0].sign()
    turn = exp(math.radians(8) * side[:, None] * torch.tensor([0.6, 0.0, 0.8]))
    run = fit(LinearSubspace(20, zdim=1, contrast=0.0), still.with_poses(still.rotation @ turn, still.translation))
    state = torch.get_rng_state()
    found = pose_association(run, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.p_value == 0.001
    assert found.part == "view direction"
    assert found.share > 0.3
    assert pose_association(run, seed=1).share == found.share != pose_association(run, seed=2).share
    assert pose_association(run, run.particles[:200]).p_value == 0.001


def test_particles_of_several_images_count_once(still: Particles) -> None:
    run = fit(LinearSubspace(20, zdim=1, contrast=0.0), still)
    pairs = replace(still, table=replace(still.table, particle=torch.arange(400) // 2))
    assert pose_association(run, pairs).particles == 200


def test_poses_that_are_uncertain_are_drawn_with_z(still: Particles) -> None:
    run = fit(LinearSubspace(20, zdim=1, contrast=0.0), still)
    pairs = replace(still, table=replace(still.table, particle=torch.arange(400) // 2))
    for particles, turn in ((still, exp(torch.tensor([0.0, 0.0, 1.0]))), (pairs, torch.eye(3))):
        rotation = turn @ particles.relative @ particles.of_images(particles.rotation[particles.first])
        precision = (1e4 * torch.eye(5)).expand(400, 1, 5, 5)
        modes = PoseModes(rotation[:, None], particles.translation[:, None], precision, torch.zeros(400, 1))
        posed = replace(run, source=particles, poses=modes, guide=guide_of(run.model, modes))
        vars(posed).pop("particles", None)
        assert pose_association(posed).particles == particles.n_particles
        assert pose_association(posed, particles[:200]).particles == particles[:200].n_particles
