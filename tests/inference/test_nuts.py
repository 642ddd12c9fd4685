"""Hamiltonian Monte Carlo of a particle: the exact posterior where that is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pyro_cryo.data.particles import Particles
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.nuts import nuts
from pyro_cryo.models.linear_subspace import LinearSubspace
from pyro_cryo.models.manifold import Manifold
from pyro_cryo.models.uncertain_pose import UncertainPose
from tests.images import hinge_images


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> Particles:
    return hinge_images(tmp_path_factory.mktemp("nuts") / "case", 9, 150, 24, 1.0)  # 16 px tell of one component


def test_it_samples_the_exact_posterior_of_a_linear_model(particles: Particles) -> None:
    run = fit(LinearSubspace(particles.box, zdim=2), particles)
    found = nuts(run, particles[:1], 120, index=[7], warmup=60).posterior
    mean, covariance = (v.numpy() for v in run.guide.posterior(particles.batch(slice(0, 1))))  # type: ignore[union-attr, operator]
    sd = np.sqrt(covariance.diagonal(axis1=1, axis2=2))
    assert found["z"].shape == (1, 120, 1, 2)
    assert found["particle"].values.tolist() == [7]
    assert np.abs((found["z"].values[0].mean(0) - mean) / sd).max() < 0.5
    assert np.abs(np.log(found["z"].values[0].std(0) / sd)).max() < 0.4
    assert abs(float(found["contrast"].mean()) - 1) < 0.3


@pytest.mark.slow
def test_poses_move_in_the_tangent_space(particles: Particles) -> None:
    run = fit(UncertainPose(particles.box, 2.0, 0.5), particles)
    assert run.poses is not None
    found = nuts(run, particles[:1], 150, warmup=150).posterior
    shift = found["translation"].values[0, :, 0]
    assert np.abs(shift.mean(0) - run.poses.best[1][0].numpy()).max() < 0.3
    spread = run.poses.spread
    distance = np.sqrt(((shift - shift.mean(0)) ** 2).sum(-1).mean())
    assert abs(math.log(distance / float(spread.shift_px[0]))) < 0.4
    rotation = torch.from_numpy(found["rotation"].values[0, :, 0])
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand_as(rotation), atol=1e-5, rtol=0)


def test_a_discrete_population_is_refused(particles: Particles) -> None:
    run = fit(Manifold(particles.box, zdim=2, points=20), particles)
    with pytest.raises(ValueError, match="z of Manifold is discrete"):
        nuts(run, particles[:1], 10, warmup=10)
