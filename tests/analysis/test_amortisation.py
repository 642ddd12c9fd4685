"""The bounds of a guide, of a particle's own Gaussian and the evidence stand in order; an exact guide loses nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyro_cryo.analysis.amortisation import amortisation
from pyro_cryo.analysis.calibration import LIKELIHOOD, sbc
from pyro_cryo.data.particles import Particles
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.run import Run
from pyro_cryo.models.circle import Circle
from pyro_cryo.models.classes import Classes
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.models.homogeneous import Homogeneous
from pyro_cryo.models.linear_subspace import LinearSubspace
from pyro_cryo.pose import PoseAbout
from tests.images import hinge_images


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> Particles:
    return hinge_images(tmp_path_factory.mktemp("amortisation") / "case", 9, 120, 16, 1.0)


@pytest.fixture(scope="module")
def run(particles: Particles) -> Run:
    torch.manual_seed(0)
    return fit(CryoDRGN(particles.box, zdim=2, width=32, layers=1), particles, epochs=2)


def test_a_guide_loses_to_a_particles_own_gaussian_and_that_to_the_posterior(run: Run, particles: Particles) -> None:
    found = amortisation(run, particles[:50], draws=60)
    assert found.gap.shape == found.left.shape == (50,)
    error = 3 * (found.left + found.gap.clamp_min(0) + 0.05).sqrt() / 60**0.5  # log weights have variance 2 KL
    assert float(found.gap.mean()) > 0.05
    assert bool((found.gap > -error).all())
    assert bool((found.left >= 0).all())  # Jensen's, of the same draws
    assert float(found.left.mean()) < float(found.gap.mean())
    assert float((found.best_k < 0.7).double().mean()) > 0.7
    again = amortisation(run, particles[:50], draws=60)
    assert torch.equal(again.best, found.best)


@pytest.mark.parametrize("kind", [LinearSubspace, Classes])
def test_an_exact_guide_has_nothing_to_lose(kind: Any, particles: Particles) -> None:
    arguments = {"zdim": 2} if kind is LinearSubspace else {"classes": 3}
    run = fit(kind(particles.box, contrast=0.0, **arguments), particles)
    found = amortisation(run, particles[:20], draws=30)
    assert bool((found.gap == 0).all())
    assert float(found.left.abs().max()) < 0.01
    assert bool((found.guide_k == -torch.inf).all())
    assert bool((found.best_k == -torch.inf).all())


def test_all_that_asks_the_guide_asks_the_better_one(run: Run, particles: Particles) -> None:
    better = run.semi_amortised()
    z = better.encode(particles[:30])
    assert z.z.shape == (30, 2)
    assert abs(z.z_cov[:, 0, 1]).max() > 1e-4  # the encoder's is diagonal
    assert float(abs(z.z - run.encode(particles[:30]).z).max()) > 0.01
    stats = better.posterior(particles[:30], draws=200, corrected=True).sample_stats
    assert float(stats["corrected"].mean()) > 0.5


def test_its_own_images_are_nearer_to_what_it_says(run: Run, particles: Particles) -> None:
    """The encoder, two passes old, hardly tells images apart: only the rank of the likelihood says so."""
    encoder, best = (sbc(one, particles, 19) for one in (run, run.semi_amortised()))
    strays = [found[LIKELIHOOD].uniformity().excess for found in (encoder, best)]
    assert float(strays[0]) > 0.2
    assert float(strays[1]) < 0.1
    assert float(best["z"].sharpness.mean()) < 0.8 * float(encoder["z"].sharpness.mean())
    held = best["z"].coverage(0.9)
    assert float((held.interval - 0.9).abs().max()) < 0.05 + 2 * held.error


def test_what_has_no_gaussian_of_its_own_is_refused(run: Run, particles: Particles) -> None:
    with pytest.raises(ValueError, match="20 draws have no tail to tell k by; give 25 or more"):
        amortisation(run, particles[:5], draws=20)
    still = fit(Homogeneous(particles.box), particles)
    with pytest.raises(ValueError, match="Homogeneous has no latent coordinate z"):
        amortisation(still, particles[:5])
    linear = LinearSubspace(particles.box, zdim=2, contrast=0.0)
    with pytest.raises(ValueError, match="LinearSubspace is the exact posterior; nothing is better"):
        Run(linear, particles, guide=linear.make_guide()).semi_amortised()
    circle = Circle(particles.box, width=8, layers=1)
    with pytest.raises(ValueError, match="z of Circle cannot be anywhere"):
        Run(circle, particles, guide=circle.make_guide()).semi_amortised()
    unsure = CryoDRGN(particles.box, zdim=2, width=8, layers=1)
    unsure.poses = PoseAbout(2.0, 0.5)
    with pytest.raises(ValueError, match=r"poses are PoseAbout, .* fit particles whose poses are known"):
        Run(unsure, particles, guide=unsure.make_guide()).semi_amortised()
