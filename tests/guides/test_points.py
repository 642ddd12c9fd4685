"""Points of z: classes in features of their own, and where points are best put given what images say."""

import math

import pytest
import torch
from torch import Tensor

from pyro_cryo.guides.coefficients import Moments, Seen
from pyro_cryo.guides.points import ClassesCoefficients, fit_points, merge_points, point_evidence, scaled

RANK = 3


def seen_of(points: Tensor, label: Tensor, noise: float = 0.5, rows: int = 40) -> Seen:
    """What images (1, points[label]) of random slices say, each with noise."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.randn(len(label), rows, 1 + points.shape[1], generator=generator) / noise / rows**0.5
    y = torch.cat([torch.ones(len(label), 1), points[label]], 1)
    image = (basis @ y[..., None])[..., 0] + torch.randn(len(label), rows, generator=generator)
    return Seen(basis.mT @ basis, (basis.mT @ image[..., None])[..., 0], -0.5 * image.square().sum(1))


@pytest.fixture(scope="module")
def four() -> tuple[Tensor, Tensor, Seen]:
    """Four points, of which one has half of 800 images, and what these say."""
    points = 2.5 * torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    share = torch.tensor([0.5, 0.2, 0.2, 0.1])
    label = torch.multinomial(share, 800, replacement=True, generator=torch.Generator().manual_seed(0))
    return points, label, seen_of(points, label)


def test_points_are_found_with_their_weights(four: tuple[Tensor, Tensor, Seen]) -> None:
    points, label, seen = four
    found, log_weight = fit_points(seen, 4, 5, torch.Generator().manual_seed(0))
    distance, nearest = torch.cdist(points, found).min(1)
    assert sorted(nearest.tolist()) == [0, 1, 2, 3]
    assert float(distance.max()) < 0.4
    torch.testing.assert_close(log_weight.exp()[nearest], label.bincount() / len(label), atol=0.02, rtol=0)


def test_merging_leaves_the_points_that_images_tell_apart(four: tuple[Tensor, Tensor, Seen]) -> None:
    points, label, seen = four
    more, log_weight = fit_points(seen, 9, 5, torch.Generator().manual_seed(0))
    before = more.clone()
    found, merged = merge_points(seen, more, log_weight, 4)
    assert found.shape == (4, RANK)
    assert len(more) == 9
    assert torch.equal(more, before)
    distance, nearest = torch.cdist(points, found).min(1)
    assert float(distance.max()) < 0.4
    torch.testing.assert_close(merged.exp()[nearest], label.bincount() / len(label), atol=0.02, rtol=0)


def test_the_evidence_prefers_where_the_points_are(four: tuple[Tensor, Tensor, Seen]) -> None:
    points, label, seen = four
    log_weight = (label.bincount() / len(label)).log()
    right = point_evidence(seen, points, log_weight)
    for wrong in (0.8 * points, -points, points.roll(1, 0)):
        assert float(right.mean()) > float(point_evidence(seen, wrong, log_weight).mean())


def test_an_image_of_twice_the_contrast_says_the_same_when_scaled(four: tuple[Tensor, Tensor, Seen]) -> None:
    seen = four[2]
    twice = Seen(seen.gram, 2 * seen.projection, seen.empty)  # x = 2 y: of y, the precision is four times as large
    told = scaled(twice, torch.full((len(seen.empty),), 2.0))
    torch.testing.assert_close(
        torch.linalg.solve(told.gram, told.projection),
        torch.linalg.solve(seen.gram, seen.projection),
        rtol=1e-3,
        atol=1e-3,
    )


def test_classes_in_other_features_are_the_same_classes(four: tuple[Tensor, Tensor, Seen]) -> None:
    """Turned features with maps turned back leave every posterior as it was."""
    points, _, seen = four
    made = ClassesCoefficients(4, 0.0)
    made.features = torch.cat([torch.ones(4, 1), points], 1)
    before = made.moments(seen)
    mean: Moments = before.total().over(len(seen.empty))
    made.learn(mean)
    middle, covariance = made.spread(mean)
    torch.testing.assert_close(middle, made.log_weight.exp() @ points)
    undo = torch.linalg.inv(torch.linalg.cholesky(covariance))
    y = torch.block_diag(torch.ones(1, 1), torch.linalg.inv(undo))
    y[1:, 0] = middle  # (1, new) -> (1, old)
    turned = Seen(y.T @ seen.gram @ y, seen.projection @ y, seen.empty)
    expected = made.moments(seen)
    made.turned(middle, undo)
    found = made.moments(turned)
    torch.testing.assert_close(found.weight, expected.weight, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(made.spread(mean)[1], torch.eye(RANK), atol=1e-4, rtol=0)
    torch.testing.assert_close(made.at(torch.eye(4)), made.features)


def test_classes_begin_alike() -> None:
    made = ClassesCoefficients(3, 0.1)
    torch.testing.assert_close(made.log_weight, torch.full((3,), -math.log(3)))
    assert torch.linalg.matrix_rank(made.features) == 3
