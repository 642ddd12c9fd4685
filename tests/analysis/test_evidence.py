"""log p(image): exact where the guide is, a bound that draws tighten elsewhere."""

import warnings
from dataclasses import replace

import pytest
import torch

from pyro_cryo.analysis.evidence import log_evidence
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import hinge, simulate
from pyro_cryo.distributions import LowRankFourier
from pyro_cryo.inference.fit import fit
from pyro_cryo.model import noise_of
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.models.linear_subspace import LinearSubspace

BOX = 16


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> Particles:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = tmp_path_factory.mktemp("evidence") / "case"
        return Particles.open(simulate(hinge(9), folder, n_images=200, box=BOX, snr=1.0, seed=0))


def test_one_draw_of_an_exact_guide_is_the_density_with_z_integrated_out(particles: Particles) -> None:
    run = fit(LinearSubspace(BOX, zdim=2, contrast=0.0), particles)
    model, batch = run.model, particles.batch(slice(0, 50))
    with torch.no_grad():
        z = torch.cat([torch.zeros(1, model.zdim), torch.eye(model.zdim)])
        pose = model.pose(batch)
        loc, *moved = (model.signal(model.density(), row.expand(50, -1), *pose, batch) for row in z)
        factor = torch.stack([image - loc for image in moved], -1)
        sigma = noise_of(batch, model.sigma)
        expected = LowRankFourier(loc, factor, sigma).log_prob(batch.image)
    assert float(factor.abs().max()) > 0
    torch.testing.assert_close(log_evidence(run, particles[:50], draws=1), expected, atol=0.02, rtol=0)


def test_images_of_a_particle_are_one_observation(particles: Particles) -> None:
    run = fit(LinearSubspace(BOX, zdim=2, contrast=0.0), particles)
    pairs = replace(particles[:50], table=replace(particles[:50].table, particle=torch.arange(50) // 2))
    model, batch = run.model, pairs.batch(slice(None))
    with torch.no_grad():
        z = torch.cat([torch.zeros(1, model.zdim), torch.eye(model.zdim)])
        pose = model.pose(batch)
        loc, *moved = (model.signal(model.density(), row.expand(50, -1), *pose, batch) for row in z)
        factor = torch.stack([image - loc for image in moved], -1)
        parts = (loc, factor, noise_of(batch, model.sigma).expand(loc.shape), batch.image)
        *gaussian, both = (v.unflatten(0, (25, 2)).flatten(1, 2) for v in parts)
        expected = LowRankFourier(*gaussian).log_prob(both)
    found = log_evidence(run, pairs, draws=1)
    torch.testing.assert_close(found, expected, atol=0.04, rtol=0)
    assert float((found.sum() - log_evidence(run, particles[:50], draws=1).sum()).abs()) > 1


def test_more_draws_say_no_less(particles: Particles) -> None:
    torch.manual_seed(0)
    run = fit(CryoDRGN(BOX, zdim=2, width=16, layers=1), particles, epochs=1)
    few, many = (log_evidence(run, particles[:60], draws=draws) for draws in (1, 30))
    assert many.shape == (60,)
    assert float(many.mean()) > float(few.mean())
