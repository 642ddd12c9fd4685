"""Exact posteriors of coefficients: against quadrature over contrast and z, and as guides with no gap."""

import math
from dataclasses import replace

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_cryo.distributions import LowRankFourier
from pyro_cryo.guides.coefficients import (
    Coefficients,
    LinearCoefficients,
    Moments,
    Seen,
)
from pyro_cryo.guides.points import CurvedCoefficients

CONTRAST_SD = 0.2


def columns(count: int, images: int = 4, rows: int = 30) -> tuple[Tensor, Tensor]:
    """Slices of `count` maps (B, rows, C), whitened, and images of them with noise of variance one (B, rows)."""
    generator = torch.Generator().manual_seed(count)
    basis = 0.5 * torch.randn(images, rows, count, dtype=torch.float64, generator=generator)
    y = torch.cat([torch.ones(images, 1), torch.randn(images, count - 1, generator=generator)], 1).double()
    a = 1 + CONTRAST_SD * torch.randn(images, 1, generator=generator).double()
    noise = torch.randn(images, rows, dtype=torch.float64, generator=generator)
    return basis, (basis @ (a * y)[..., None])[..., 0] + noise


def seen(basis: Tensor, image: Tensor) -> Seen:
    projection = (basis.mT @ image[..., None])[..., 0]
    return Seen(basis.mT @ basis, projection, -0.5 * image.square().sum(-1))


def double(coefficients: Coefficients) -> Coefficients:
    return coefficients.double()


def over_contrast(nodes: int = 200) -> tuple[Tensor, Tensor]:
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    return torch.as_tensor(1 + CONTRAST_SD * x), torch.as_tensor(w / math.sqrt(2 * math.pi)).log()


def brute_force(basis: Tensor, image: Tensor, y: Tensor, log_weight: Tensor, z: Tensor) -> Moments:
    """Sums over contrasts and a list of y (n, C) with log weights (n,), z (n, r)."""
    a, log_a = over_contrast()
    scaled = a[:, None, None] * y  # (K, n, C)
    mean = torch.einsum("bpc,knc->bknp", basis, scaled)
    log_joint = -0.5 * (image[:, None, None] - mean).square().sum(-1) + log_a[:, None] + log_weight
    evidence = log_joint.flatten(1).logsumexp(1)
    w = (log_joint - evidence[:, None, None]).exp()
    return Moments(
        y=torch.einsum("bkn,knc->bc", w, scaled),
        yy=torch.einsum("bkn,knc,knd->bcd", w, scaled, scaled),
        z=torch.einsum("bkn,nr->br", w, z),
        zz=torch.einsum("bkn,nr,ns->brs", w, z, z),
        a=torch.einsum("bkn,k->b", w, a),
        aa=torch.einsum("bkn,k->b", w, a.square()),
        weight=w.sum(1),
        evidence=evidence,
    )


@pytest.mark.parametrize("rank", [1, 2])
def test_linear_moments_are_those_of_quadrature(rank: int) -> None:
    basis, image = columns(1 + rank)
    x, w = np.polynomial.hermite_e.hermegauss(60)
    z = torch.cartesian_prod(*[torch.as_tensor(x)] * rank).reshape(-1, rank)
    each = torch.as_tensor(w / math.sqrt(2 * math.pi)).log()
    log_weight = torch.cartesian_prod(*[each] * rank).reshape(-1, rank).sum(-1)
    expected = brute_force(basis, image, torch.cat([torch.ones(len(z), 1).double(), z], 1), log_weight, z)
    found = double(LinearCoefficients(CONTRAST_SD)).moments(seen(basis, image))
    torch.testing.assert_close(found.evidence, expected.evidence, rtol=0, atol=2e-3)
    for name in ("y", "yy", "z", "zz", "a", "aa"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=5e-3, atol=5e-3)


def test_without_contrast_the_evidence_is_that_of_the_low_rank_gaussian() -> None:
    basis, image = columns(4, rows=30)
    found = double(LinearCoefficients(0.0)).moments(seen(basis, image))
    pairs = basis.unflatten(1, (15, 2))
    gaussian = LowRankFourier(pairs[..., 0], pairs[..., 1:], torch.ones(1, 1, 1).double())
    log_prob = gaussian.log_prob(image.unflatten(1, (15, 2)))
    torch.testing.assert_close(found.evidence - 15 * math.log(2 * math.pi), log_prob)
    mean, covariance = gaussian.posterior(image.unflatten(1, (15, 2)))
    torch.testing.assert_close(found.z, mean)
    torch.testing.assert_close(found.z_cov, covariance)


def curved(count: int = 60, most: int = 4) -> CurvedCoefficients:
    angle = torch.linspace(0, 2.5, count).double()
    points = torch.stack([angle.cos(), angle.sin()], 1)
    return CurvedCoefficients.through(points, 10 * torch.eye(2).double(), CONTRAST_SD, most)


def test_features_are_whitened_and_reach_beyond_their_points() -> None:
    made = curved()
    phi = made.features[:, 1:]
    torch.testing.assert_close(phi.T @ phi / len(phi), torch.eye(phi.shape[1]).double())
    torch.testing.assert_close(phi.mean(0), torch.zeros(phi.shape[1]).double(), rtol=0, atol=1e-8)
    torch.testing.assert_close(made.at(made.points), made.features, rtol=1e-6, atol=1e-6)
    between = 0.5 * (made.points[10] + made.points[11])
    torch.testing.assert_close(made.at(between), 0.5 * (made.features[10] + made.features[11]), rtol=0, atol=0.02)


def test_curved_moments_are_sums_over_points_and_contrasts() -> None:
    made = curved()
    basis, image = columns(made.features.shape[1])
    expected = brute_force(basis, image, made.features, made.log_weight, made.points)
    found = made.moments(seen(basis, image))
    for name in ("evidence", "y", "yy", "z", "zz", "a", "aa", "weight"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-8)


def test_a_family_without_motion_has_one_feature() -> None:
    made = CurvedCoefficients.through(torch.randn(20, 2), torch.zeros(2, 2), 0.1)
    assert made.features.shape == (20, 1)
    assert bool((made.at(torch.randn(3, 2)) == 1).all())


def test_learning_takes_the_contrast_from_its_moments() -> None:
    made = double(LinearCoefficients(0.1))
    basis, image = columns(2, images=400, rows=300)
    for _ in range(30):
        moments = made.moments(seen(basis, image))
        made.learn(moments.total().over(400))
    assert float(made.contrast_sd) == pytest.approx(CONTRAST_SD, rel=0.15)
    still = LinearCoefficients(0.0)
    still.learn(moments.total().over(400))
    assert float(still.contrast_sd) == 0


def test_the_first_maps_alone() -> None:
    made = curved()
    basis, image = columns(made.features.shape[1])
    fewer = made.first(2)
    assert fewer.features.shape[1] == 3
    assert made.features.shape[1] == 5
    shorter = fewer.moments(seen(basis[..., :3], image))
    torch.testing.assert_close(shorter.evidence, fewer.moments(seen(basis, image).first(2)).evidence)


def test_the_prior_of_contrast_is_normal_about_one() -> None:
    """With nothing seen, the posterior is the prior and the evidence nothing."""
    empty = Seen(torch.zeros(1, 3, 3).double(), torch.zeros(1, 3).double(), torch.zeros(1).double())
    found = double(LinearCoefficients(CONTRAST_SD)).moments(empty)
    torch.testing.assert_close(found.evidence, torch.zeros(1).double(), rtol=0, atol=1e-6)
    prior = dist.Normal(1.0, CONTRAST_SD)
    assert float(found.a) == pytest.approx(float(prior.mean))
    assert float(found.aa - found.a.square()) == pytest.approx(float(prior.variance), rel=1e-3)
    torch.testing.assert_close(found.z_cov[0], torch.eye(2).double())


def test_draws_do_not_mind_the_rounding_of_a_gram_matrix() -> None:
    basis, image = columns(3)
    exact = seen(basis, image)
    rounded = replace(exact, gram=exact.gram + 1e-4 * torch.randn(3, 3).triu(1).double())
    double(LinearCoefficients(CONTRAST_SD)).sample(rounded)
