"""Posteriors of defocus: the likelihood is that of refocused images; they are calibrated, and shrink."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from images import fine_images
from torch import Tensor

from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.defocus import Defocus, DefocusLikelihood, offsets_about
from pyro_cryo.inference.reconstruct import left_of, reconstruct
from pyro_cryo.physics.slices import fourier_grid

SD = 400.0


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> Particles:
    return fine_images(tmp_path_factory.mktemp("fine"), 200, 24, 0.5)


def test_it_is_the_likelihood_of_refocused_images(particles: Particles) -> None:
    """In two microscopes: half of the images at 200 kV."""
    assert particles.ctf is not None
    voltage = torch.where(torch.arange(len(particles)) % 2 == 0, 300.0, 200.0)
    optics = dataclasses.replace(particles.ctf, voltage_kv=voltage)
    particles = dataclasses.replace(particles, table=particles.table.with_ctf(optics))
    grid, offsets = fourier_grid(reconstruct(particles).volume), torch.tensor([-700.0, -50.0, 0.0, 300.0])
    sigma = 0.5 + torch.rand(1, 13, generator=torch.Generator().manual_seed(0))
    expected = []
    for offset in offsets:
        batch = particles.with_defocus(offset.expand(len(particles))).batch(slice(0, 20))
        expected.append(-0.5 * (left_of(batch, grid) / sigma[0][batch.half.shell][:, None]).square().sum((1, 2)))
    batch, turn = particles.batch(slice(0, 20)), particles.defocus_turn[:20]
    likelihood = DefocusLikelihood(grid, torch.zeros(13), sigma)
    got = likelihood.at(batch, particles.quadrature(batch), turn, torch.zeros(20), offsets)
    want = torch.stack(expected, 1)
    torch.testing.assert_close(got - got[:, 2:3], want - want[:, 2:3], rtol=1e-3, atol=2e-2)


def gaussian(truth: Tensor, sd: float) -> Defocus:
    """Posteriors from likelihoods that are Gaussian, of images that tell offsets to an sd."""
    offsets = offsets_about(SD, 1e-2)
    told = truth + sd * torch.randn(len(truth), generator=torch.Generator().manual_seed(1))
    return Defocus.given(-0.5 * ((offsets - told[:, None]) / sd).square(), offsets, SD)


@pytest.mark.parametrize(("sd", "spread"), [(60.0, 150.0), (300.0, 150.0), (60.0, 400.0), (1000.0, 400.0)])
def test_posteriors_and_their_spread_are_calibrated(sd: float, spread: float) -> None:
    truth = spread * torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    found = gaussian(truth, sd)
    assert float(((found.mean - truth) / found.sd).square().mean()) == pytest.approx(1, abs=0.05)
    best = (sd**-2 + spread**-2) ** -0.5  # were the spread known
    assert float((found.mean - truth).square().mean().sqrt()) == pytest.approx(best, rel=0.03)
    assert found.spread == pytest.approx(spread, rel=0.05)


def test_offsets_that_are_none_stay_none() -> None:
    found = gaussian(torch.zeros(20_000), 300.0)
    assert found.spread < 0.1 * SD
    assert float(found.mean.abs().max()) < 0.1 * SD


def test_images_that_tell_nothing_leave_the_prior() -> None:
    found = gaussian(torch.zeros(1000), 1e6)
    assert float(found.mean.abs().max()) < 0.01 * SD
    assert float(found.sd.min()) > 0.3 * SD
