"""One z a particle: what its images say of it together is what one image of all their coefficients would."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from images import blobs, observed, seen_together
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.distributions import LowRankFourier
from pyro_cryo.guides.exact import ExactGuide
from pyro_cryo.model import CryoModel, noise_of
from pyro_cryo.models.classes import Classes
from pyro_cryo.models.linear_subspace import LinearSubspace

BOX = 12
NOISE = 1.0


def with_maps(model: CryoModel) -> CryoModel:
    """The model with smooth maps at random."""
    generator = torch.Generator().manual_seed(3)
    maps = [0.3 * blobs(BOX, 5).roll(int(shift), 0) for shift in torch.randint(-2, 3, (8,), generator=generator)]
    moving = torch.stack([maps[0], *(a - b.flip(1) for a, b in zip(maps[1:], maps[:-1], strict=True))])
    assert isinstance(model, LinearSubspace)
    model.consensus.set(maps[0])
    model.volume.set(moving[: len(model.volume.components)])
    model.log_sigma.data.fill_(math.log(NOISE))
    return model


def linear(contrast: float = 0.0) -> LinearSubspace:
    model = with_maps(LinearSubspace(BOX, zdim=2, contrast=contrast))
    assert isinstance(model, LinearSubspace)
    return model


def drawn(model: CryoModel, views: int, particles: int) -> tuple[Batch, Tensor]:
    """Images of the model's own story, and their z."""
    count = views * particles
    batch = observed(blobs(BOX, 5), count, NOISE, torch.ones(count))
    batch = seen_together(batch, [i // views for i in range(count)])
    torch.manual_seed(views)
    with torch.no_grad():
        trace = pyro.poutine.trace(pyro.poutine.uncondition(model)).get_trace(batch)
    return replace(batch, image=trace.nodes["image"]["value"]), trace.nodes["z"]["value"]


def as_one(model: LinearSubspace, batch: Batch, views: int) -> tuple[LowRankFourier, Tensor]:
    """The Gaussian of all coefficients of a particle's images, side by side, and these images (n, views P, 2)."""
    with torch.no_grad():
        pose = batch.rotation, batch.translation
        z = torch.cat([torch.zeros(1, 2), torch.eye(2)])
        loc, *moved = (model.signal(model.density(), row.expand(len(batch), -1), *pose, batch) for row in z)
        factor = torch.stack([image - loc for image in moved], -1)
        sigma = noise_of(batch, model.sigma).expand(loc.shape)
    side_by_side = [v.unflatten(0, (-1, views)).flatten(1, 2) for v in (loc, factor, sigma, batch.image)]
    return LowRankFourier(*side_by_side[:3]), side_by_side[3]


@pytest.mark.parametrize("views", [1, 2, 5])
def test_the_posterior_is_that_of_all_images_side_by_side(views: int) -> None:
    model = linear()
    batch, _ = drawn(model, views, 6)
    gaussian, images = as_one(model, batch, views)
    mean, covariance = model.make_guide().posterior(batch)
    expected = gaussian.posterior(images)
    torch.testing.assert_close(mean, expected[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(covariance, expected[1], rtol=1e-3, atol=1e-4)


def test_an_elbo_with_the_exact_guide_is_the_evidence_of_all_images_side_by_side() -> None:
    model = linear()
    batch, _ = drawn(model, 2, 6)
    gaussian, images = as_one(model, batch, 2)
    evidence = gaussian.log_prob(images)
    guide = model.make_guide()
    elbo, total = Trace_ELBO()(model, guide), float(evidence.sum())
    apart = replace(batch, particle=torch.arange(12), shown=torch.arange(12), size=12)
    with torch.no_grad():
        assert float(elbo(batch)) == pytest.approx(-total, abs=0.05)
        assert float(elbo(batch.standing_for(60))) == pytest.approx(-10 * total, abs=0.5)
        assert abs(float(elbo(apart)) + total) > 1  # one z an image is another story


def test_of_windowed_images_the_guide_is_exact_too() -> None:
    """What images of half the information say: log p(image | z)^(1/2) p(z) over q(z) is the same for every z."""
    model = linear()
    batch = replace(drawn(model, 1, 6)[0], window_power=0.5)
    guide, ratios = model.make_guide(), []
    with torch.no_grad():
        for _ in range(3):
            asked = pyro.poutine.trace(guide).get_trace(batch)
            told = pyro.poutine.trace(pyro.poutine.replay(model, asked)).get_trace(batch)
            ratios.append(told.log_prob_sum() - asked.log_prob_sum())
    assert float(max(ratios) - min(ratios)) < 0.05


def test_the_noise_of_windowed_images_is_their_own() -> None:
    """The likelihood is highest at the sd of their coefficients, whatever share of them counts."""
    model = linear()
    batch, z = drawn(model, 1, 300)
    told = pyro.poutine.trace(pyro.poutine.condition(model, {"z": z})).get_trace(replace(batch, window_power=0.5))
    told.log_prob_sum(lambda name, site: name == "image").backward()
    slope = model.log_sigma.grad
    assert slope is not None
    count = 2 * 300 * torch.bincount(batch.half.shell, minlength=BOX // 2 + 1)
    assert bool((slope.abs() <= 4 * 0.5 * (2 * count).sqrt()).all())


def test_the_same_image_twice_has_twice_the_information() -> None:
    model = linear()
    batch, _ = drawn(model, 1, 5)
    guide = model.make_guide()
    twice = seen_together(batch[torch.arange(5).repeat_interleave(2)], [i // 2 for i in range(10)])
    one, two = (torch.linalg.inv(guide.posterior(b)[1]) - torch.eye(2) for b in (batch, twice))
    torch.testing.assert_close(two, 2 * one, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("contrast", [0.0, 0.2])
def test_z_of_more_images_is_as_accurate_as_their_information_says(contrast: float) -> None:
    """Squared errors of z, of images drawn from the story, are on average the posterior variances."""
    model, errors = linear(contrast), []
    for views in (1, 2, 4):
        batch, z = drawn(model, views, 400)
        mean, covariance = model.make_guide().posterior(batch)
        square = float((mean - z).square().sum(1).mean())
        said = float(covariance.diagonal(dim1=1, dim2=2).sum(1).mean())
        assert square == pytest.approx(said, rel=0.2)
        errors.append(square)
    print("mean squared error of z from 1, 2, 4 images:", errors)
    assert errors[1] < 0.75 * errors[0]
    assert errors[2] < 0.75 * errors[1]


def test_a_particles_contrast_is_one_in_all_its_images() -> None:
    """The evidence is an integral over one contrast and one z a particle, by quadrature."""
    model = linear(0.2)
    batch, _ = drawn(model, 3, 4)
    guide = model.make_guide()
    found = model.coefficients.moments(guide.seen(batch))
    x, w = np.polynomial.hermite_e.hermegauss(80)
    gains = []
    model.coefficients.contrast_varies = False
    for a in 1 + 0.2 * x:  # a contrast is a factor of the CTF
        gaussian, images = as_one(model, replace(batch, ctf=batch.ctf * float(a)), 3)
        gains.append(gaussian.log_prob(images))
    log_w = torch.as_tensor(w / math.sqrt(2 * math.pi)).log()
    expected = (torch.stack(gains).double() + log_w[:, None]).logsumexp(0)
    constant = len(batch.half) * 3 * math.log(2 * math.pi)
    torch.testing.assert_close(found.evidence.double() - constant, expected, rtol=0, atol=0.02)


def test_classes_of_pairs_are_weighed_by_both_images() -> None:
    """The guide's probabilities are those of Bayes' rule, and with z summed over, the ELBO is the evidence."""
    model = with_maps(Classes(BOX, classes=3, contrast=0.0))
    assert isinstance(model, Classes)
    batch, _ = drawn(model, 2, 6)
    log_p = []
    with torch.no_grad():
        for z in torch.eye(3):
            mean = model.signal(model.density(), z.expand(12, 3), batch.rotation, batch.translation, batch)
            each = dist.Normal(mean, noise_of(batch, model.sigma)).log_prob(batch.image).sum((1, 2))
            log_p.append(each.unflatten(0, (6, 2)).sum(1))
    joint = torch.stack(log_p, 1) + model.coefficients.log_weight
    guide = model.make_guide()
    assert isinstance(guide, ExactGuide)
    torch.testing.assert_close(guide.posterior(batch)[0], joint.softmax(1), rtol=1e-2, atol=1e-3)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    found = -elbo.loss(model, config_enumerate(guide.forward), batch)
    assert found == pytest.approx(float(joint.logsumexp(1).sum()), abs=0.05)
