"""Points of a normal with its moments, and the moments of what they are weighed by."""

from __future__ import annotations

import torch

from pyro_cryo.guides.moments import normal_rule, weighted_moments


def test_the_rule_is_exact_for_a_normal() -> None:
    points, weight = normal_rule(128, 5, 0, torch.device("cpu"))
    assert abs(float(weight.sum()) - 1) < 1e-5
    assert float((weight @ points).abs().max()) < 1e-5
    torch.testing.assert_close(points.T @ (weight[:, None] * points), torch.eye(5), atol=1e-4, rtol=0)
    other, _ = normal_rule(128, 5, 1, torch.device("cpu"))
    assert not torch.equal(points, other)
    fourth = weight @ points.pow(4)
    assert float((fourth - 3).abs().max()) < 0.5


def test_moments_are_those_of_what_points_are_weighed_by() -> None:
    """Of a skewed density, the product of log x for x ~ Gamma, near the normal; a point alone says nothing."""
    points, chance = normal_rule(4096, 2, 0, torch.device("cpu"))
    shape = torch.tensor([[2.0, 3.0], [4.0, 2.0]])  # (n, d)
    told = (shape * points[:, None] - points[:, None].exp()).sum(-1) + 0.5 * points.square().sum(1)[:, None]
    mean, covariance = weighted_moments(points, (chance.log()[:, None] + told).softmax(0))
    torch.testing.assert_close(mean, torch.special.digamma(shape), atol=0.02, rtol=0)
    exact = torch.diag_embed(torch.special.polygamma(1, shape))
    torch.testing.assert_close(covariance, exact, atol=0.03, rtol=0)
    alone = torch.zeros(len(points)).index_fill(0, torch.tensor(0), 1.0)
    mean, covariance = weighted_moments(points, alone)
    assert float(mean.norm()) < 0.15 * float(points[0].norm())
    assert 0.8 < float(covariance.diagonal().min()) < 1.0
