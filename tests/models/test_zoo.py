"""Variant priors and noises: each recovers what it assumes, at toy size."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import classes, hinge, simulate
from pyro_cryo.inference.fit import fit
from pyro_cryo.models.circle import Circle
from pyro_cryo.models.classes import Classes
from pyro_cryo.models.contrast import Contrast
from pyro_cryo.models.flow import Flow
from pyro_cryo.models.mixture import Mixture
from pyro_cryo.models.robust_noise import RobustNoise
from pyro_cryo.models.vamp import Vamp

BOX = 24


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Particles:
    """600 images of a complex with four states."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = tmp_path_factory.mktemp("states") / "case"
        return Particles.open(simulate(classes(), folder, n_images=600, box=BOX, snr=1.0, seed=0))


def true_state(particles: Particles) -> np.ndarray:
    with np.load(particles.table.path.parent / "truth.npz") as truth:
        return truth["state"]


def scaled(particles: Particles, factor: torch.Tensor) -> Particles:
    """The same images, each times a number of its own (N,)."""
    return replace(particles, table=replace(particles.table, sign=particles.table.sign * factor))


def test_classes_are_found_with_their_probabilities(states: Particles) -> None:
    run = fit(Classes(BOX, classes=4), states)
    z = run.latent.z
    np.testing.assert_allclose(z.sum(1), 1, atol=1e-4)
    table = np.zeros((4, 4))
    np.add.at(table, (z.argmax(1), true_state(states)), 1)
    assert table.max(1).sum() / len(z) > 0.95
    weight = run.model.coefficients.log_weight.exp()  # type: ignore[union-attr, operator]
    np.testing.assert_allclose(weight.numpy(), z.mean(0), atol=0.01)


def test_junk_counts_little(tmp_path: Path, states: Particles) -> None:
    """Every tenth image is three times as strong, noise and all: nothing that the model can explain."""
    factor = torch.ones(len(states))
    factor[::10] = 3.0
    torch.manual_seed(0)
    fit(RobustNoise(BOX, zdim=2, width=32, layers=1), scaled(states, factor), tmp_path / "run", epochs=3)
    with np.load(tmp_path / "run" / "weights.npz") as file:
        weight = file["weight"]
    assert weight.shape == (len(states),)
    assert np.median(weight[::10]) < 0.4 * np.median(np.delete(weight, np.s_[::10]))


def test_a_mixture_learns_how_many_are_where(states: Particles) -> None:
    kept = np.isin(true_state(states), (0, 3))
    small = states[kept]
    torch.manual_seed(0)
    model = Mixture(BOX, zdim=1, states=2, width=48)
    run = fit(model, small, epochs=8, learning_rate=2e-3)
    prior = model.prior()
    z = torch.as_tensor(run.latent.z)
    component = (prior.component_distribution.log_prob(z[:, None]) + prior.mixture_distribution.logits).argmax(1)
    label = true_state(states)[kept] == 3
    agree = float((component.numpy() == label).mean())
    assert max(agree, 1 - agree) > 0.9
    share = prior.mixture_distribution.probs[int(agree > 0.5)].detach()
    assert float(share) == pytest.approx(label.mean(), abs=0.12)


def test_z_of_a_circle_is_on_it(states: Particles) -> None:
    torch.manual_seed(0)
    run = fit(Circle(BOX, width=16, layers=1), states[:100], epochs=1)
    np.testing.assert_allclose(np.linalg.norm(run.latent.z, axis=1), 1, atol=1e-5)


def test_contrast_is_told_from_motion(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        particles = Particles.open(simulate(hinge(3), tmp_path / "case", n_images=400, box=BOX, snr=1.0, seed=0))
    factor = torch.exp(0.3 * torch.randn(len(particles), generator=torch.Generator().manual_seed(1)))
    torch.manual_seed(0)
    model = Contrast(BOX, zdim=2, width=32, layers=1)
    run = fit(model, scaled(particles, factor), epochs=5, learning_rate=2e-3)
    batch = run.particles.batch(slice(0, 200))
    with torch.no_grad():
        found = run.guide.contrast(batch).mean  # type: ignore[union-attr, operator]
    assert float(torch.corrcoef(torch.stack([found.log(), factor[:200].log()]))[0, 1]) > 0.9
    assert 0.15 < float(model.log_s.exp()) < 0.5


@pytest.mark.parametrize("kind", [Flow, Vamp])
def test_a_learned_population_is_the_images(kind: type, states: Particles) -> None:
    """The prior's samples have the spread of the posterior means, wider by no more than the posterior is."""
    torch.manual_seed(0)
    model = kind(BOX, zdim=2, width=32, layers=1)
    run = fit(model, states, epochs=4, learning_rate=2e-3)
    with torch.no_grad():
        if isinstance(model, Flow):
            drawn = model.prior().sample((4000,))
        else:
            loc, sd = run.guide.moments_of(model.inputs)  # type: ignore[union-attr, operator]
            pick = torch.multinomial(model.log_weight.softmax(0), 4000, replacement=True)
            drawn = loc[pick] + sd[pick] * torch.randn(4000, 2)
    total = torch.as_tensor(run.latent.z).var(0) + torch.as_tensor(run.latent.z_cov).diagonal(dim1=1, dim2=2).mean(0)
    ratio = drawn.var(0) / total
    assert bool((ratio > 0.4).all())
    assert bool((ratio < 2.5).all())
