"""A Gaussian a particle: the posterior where that is Gaussian, elsewhere a better bound than the encoder's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.semi_amortised import SemiAmortised
from pyro_cryo.inference.draws import drawn, log_density, trace_of
from pyro_cryo.inference.fit import fit
from pyro_cryo.models.contrast import Contrast
from pyro_cryo.models.linear_subspace import LinearSubspace
from pyro_cryo.models.mixture import Mixture
from tests.images import blobs, hinge_images


class Ignorant(nn.Module):
    """q(z | images) = p(z): a guide that has learned nothing."""

    def __init__(self, zdim: int) -> None:
        super().__init__()
        self.zdim = zdim

    def posterior(self, batch: Batch) -> Any:
        n = batch.particles
        return torch.zeros(n, self.zdim), torch.eye(self.zdim).expand(n, -1, -1)

    def forward(self, batch: Batch) -> None:
        with pyro.plate("particles", batch.size, subsample=batch.shown, dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(self.zdim), 1.0).to_event(1))


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> Particles:
    return hinge_images(tmp_path_factory.mktemp("semi") / "case", 9, 150, 16, 1.0)


def test_it_is_the_exact_posterior_of_a_linear_model(particles: Particles) -> None:
    run = fit(LinearSubspace(particles.box, zdim=3, contrast=0.0), particles)
    batch = particles.batch(slice(0, 30))
    mean, covariance = SemiAmortised(run.model, Ignorant(run.model.zdim)).posterior(batch)
    exact, its = run.guide.posterior(batch)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(mean, exact, atol=0.01, rtol=0)
    torch.testing.assert_close(covariance, its, atol=0.01, rtol=0.02)


def test_it_is_so_in_more_dimensions_than_its_points_reach(particles: Particles) -> None:
    model = LinearSubspace(particles.box, zdim=6, contrast=0.0)
    base = blobs(particles.box, 6)
    model.consensus.set(base)
    model.volume.set(torch.stack([base, *(0.5 * (base - base.roll(s, a)) for a in range(3) for s in (1, 2))]))
    batch = particles.batch(slice(0, 30))
    mean, covariance = SemiAmortised(model, Ignorant(6)).posterior(batch)
    exact, its = model.make_guide().posterior(batch)
    assert float(its.diagonal(dim1=1, dim2=2).min()) < 0.5
    torch.testing.assert_close(mean, exact, atol=0.02, rtol=0)
    torch.testing.assert_close(covariance, its, atol=0.02, rtol=0.02)


def test_images_of_a_particle_tell_its_z_together(particles: Particles) -> None:
    run = fit(LinearSubspace(particles.box, zdim=2, contrast=0.0), particles)
    pairs = replace(particles[:20], table=replace(particles[:20].table, particle=torch.arange(20) // 2))
    batch = pairs.batch(slice(None))
    mean, covariance = SemiAmortised(run.model, Ignorant(run.model.zdim)).posterior(batch)
    exact, its = run.guide.posterior(batch)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(mean, exact, atol=0.01, rtol=0)
    torch.testing.assert_close(covariance, its, atol=0.01, rtol=0.02)


@pytest.mark.parametrize("kind", [Mixture, Contrast])
def test_the_bound_is_above_the_encoders(kind: Any, particles: Particles) -> None:
    torch.manual_seed(0)
    run = fit(kind(particles.box, zdim=2, width=32, layers=1), particles, epochs=2)
    assert run.guide is not None
    better = replace(run, guide=SemiAmortised(run.model, run.guide))
    batch = particles.batch(slice(0, 60))
    torch.manual_seed(0)
    before, after = (drawn(one, batch, 40, 40).log_weight for one in (run, better))
    assert float((after.mean(0) - before.mean(0)).mean()) > 0
    assert float((after.mean(0) - before.mean(0)).min()) > -1.0  # of 40 draws
    evidence = [weight.logsumexp(0).mean() for weight in (before, after)]
    assert abs(float(evidence[1] - evidence[0])) < 0.5


def test_it_has_the_moments_of_a_posterior_that_is_not_gaussian(particles: Particles) -> None:
    """Of a mixture of two states, between which an image may lie."""
    torch.manual_seed(0)
    run = fit(Mixture(particles.box, zdim=1, states=2, width=32, layers=1), particles, epochs=4)
    batch = particles.batch(slice(0, 60))
    mean, covariance = SemiAmortised(run.model, run.guide).posterior(batch)  # type: ignore[arg-type]
    grid = torch.linspace(-6, 6, 600)
    with torch.no_grad():
        at = [poutine.condition(run.model, {"z": z.expand(60, 1)}) for z in grid]  # type: ignore[arg-type]
        weight = torch.stack([log_density(trace_of(one, batch), batch) for one in at]).softmax(0)
    exact = (weight * grid[:, None]).sum(0)
    variance = (weight * (grid[:, None] - exact).square()).sum(0)
    away = (mean[:, 0] - exact).abs() / variance.sqrt()
    assert float(away.median()) < 0.05
    assert float(away.max()) < 0.3
    ratio = covariance[:, 0, 0] / variance
    assert float(ratio.median()) == pytest.approx(1.0, abs=0.1)
    assert float(ratio.min()) > 0.6
