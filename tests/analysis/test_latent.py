"""Components, clusters and neighbours of latents whose structure was planted."""

import numpy as np
import pytest
import torch

from pyro_cryo.analysis.latent import kmeans, nearest, neighbour_r2, pca, principal_path


def planted_clusters(k: int = 4, each: int = 50) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    centre = 10 * rng.permutation(np.eye(k, 6) + np.arange(k)[:, None])
    label = np.repeat(np.arange(k), each)
    return centre[label] + 0.1 * rng.normal(size=(k * each, 6)), label


def test_pca_finds_planted_axes_and_variances() -> None:
    rng = np.random.default_rng(1)
    axes, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    z = rng.normal(size=(20_000, 3)) * [3.0, 1.0, 0.2] @ axes.T + [5.0, -2.0, 1.0]
    found = pca(z)
    np.testing.assert_allclose(found.variance, [9, 1, 0.04], rtol=0.05)
    np.testing.assert_allclose(found.explained, np.array([9, 1, 0.04]) / 10.04, atol=0.01)
    np.testing.assert_allclose(np.abs(found.axes @ axes), np.eye(3), atol=0.03)
    np.testing.assert_allclose(found.axes @ found.axes.T, np.eye(3), atol=1e-9)
    scores = found.project(z)
    np.testing.assert_allclose(scores.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(scores.var(0, ddof=1), found.variance)


def test_pca_takes_tensors_and_its_signs_do_not_depend_on_the_order() -> None:
    z = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(pca(z).axes, pca(z.flip(0)).axes, atol=1e-6)
    np.testing.assert_allclose(pca(z[:, 0]).explained, [1.0])
    with pytest.raises(ValueError, match="1 particle has no principal"):
        pca(z[:1])


def test_kmeans_recovers_planted_clusters_numbered_along_the_first_component() -> None:
    z, label = planted_clusters()
    found = kmeans(z, 4, seed=3)
    pairs = set(zip(found.label.tolist(), label.tolist(), strict=True))
    assert len(pairs) == 4  # one found cluster for each planted one
    for j in range(4):
        members = z[found.label == j]
        np.testing.assert_allclose(found.centre[j], members.mean(0), atol=1e-6)
        assert found.label[found.nearest[j]] == j
        distance = np.linalg.norm(z - found.centre[j], axis=1)
        assert distance[found.nearest[j]] == distance.min()
    along = pca(z).project(found.centre)[:, 0]
    assert (np.diff(along) > 0).all()


def test_kmeans_repeats_with_its_seed_and_refuses_too_many_clusters() -> None:
    z = np.random.default_rng(2).normal(size=(300, 3))
    np.testing.assert_array_equal(kmeans(z, 7, seed=1).label, kmeans(z, 7, seed=1).label)
    assert set(kmeans(z, 7, seed=1).label) == set(range(7))
    with pytest.raises(ValueError, match="5 clusters of 2 distinct particles"):
        kmeans(np.repeat([[0.0], [1.0]], 10, axis=0), 5)


def test_a_path_runs_between_percentiles_through_the_mean() -> None:
    rng = np.random.default_rng(3)
    z = rng.normal(size=(5000, 2)) * [4.0, 1.0] + [10.0, 20.0]
    path = principal_path(z, component=1, steps=11)
    np.testing.assert_allclose(path[5], z.mean(0), atol=0.2)
    scores = pca(z).project(path)
    np.testing.assert_allclose(scores[:, 1], 0, atol=1e-9)
    np.testing.assert_allclose(scores[[0, -1], 0], np.percentile(pca(z).project(z)[:, 0], [5, 95]))
    np.testing.assert_allclose(np.diff(scores[:, 0], 2), 0, atol=1e-9)
    real = z[nearest(z, path)]
    assert np.linalg.norm(real - path, axis=1).max() < 0.3
    with pytest.raises(ValueError, match="component 3 of 2"):
        principal_path(z, component=3)


def test_neighbour_r2_is_one_for_the_coordinate_itself_and_zero_for_chance() -> None:
    rng = np.random.default_rng(4)
    y = rng.uniform(size=4000)
    bent = np.stack([np.cos(3 * y), np.sin(3 * y)], 1)  # any smooth curve will do
    assert neighbour_r2(bent, y)[0] > 0.999
    assert neighbour_r2(rng.normal(size=(4000, 3)), y)[0] == pytest.approx(-1 / 20, abs=0.03)


def test_neighbour_r2_of_a_noisy_coordinate_is_that_of_its_posterior_mean() -> None:
    rng = np.random.default_rng(5)
    y = rng.normal(size=(20_000, 1))
    for noise in (0.5, 1.0):
        z = y + noise * rng.normal(size=y.shape)
        # the variance left is that of y given z, 1 - r^2, and a 20th of it from averaging 20 neighbours
        best = 1 / (1 + noise**2)
        assert neighbour_r2(z, y)[0] == pytest.approx(1 - 1.05 * (1 - best), abs=0.015)


def test_neighbour_r2_refuses_what_cannot_be_followed() -> None:
    with pytest.raises(ValueError, match="10 particles have no 20 neighbours"):
        neighbour_r2(np.zeros((10, 2)), np.arange(10))
    with pytest.raises(ValueError, match="30 latents and 29"):
        neighbour_r2(np.zeros((30, 2)), np.arange(29))
    with pytest.raises(ValueError, match="nothing to follow"):
        neighbour_r2(np.random.default_rng(0).normal(size=(30, 2)), np.ones(30))
