"""Components, clusters and neighbours of latents whose structure was planted."""

import numpy as np
import pytest
import torch

from pyro_cryo.analysis.latent import SAMPLE, density_peaks, kmeans, nearest, neighbour_r2, pca, principal_path


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


def planted_peaks(seed: int, counts: tuple[int, ...] = (1000, 2000, 500)) -> tuple[np.ndarray, np.ndarray]:
    """Blobs of one width and these many particles, 6 widths apart or more, and where their centres are."""
    rng = np.random.default_rng(seed)
    centre = np.array([[0.0, 0.0], [9.0, 0.0], [3.0, 6.0]])[: len(counts)]
    z = np.repeat(centre, counts, axis=0) + rng.normal(size=(sum(counts), 2))
    return rng.permutation(z), centre


def test_peaks_are_where_most_particles_lie_the_highest_first() -> None:
    z, centre = planted_peaks(0)
    found = density_peaks(z)
    np.testing.assert_allclose(found.point, centre[[1, 0, 2]], atol=0.3)
    np.testing.assert_allclose(found.density, [1, 0.5, 0.25], atol=0.08)
    assert np.linalg.norm(z[found.nearest] - found.point, axis=1).max() < 0.2
    np.testing.assert_array_equal(density_peaks(torch.from_numpy(z)).nearest, found.nearest)


def test_peaks_do_not_depend_on_the_units_of_z_or_on_what_hardly_varies() -> None:
    z, _ = planted_peaks(1)
    rng = np.random.default_rng(2)
    turned = z * [4.0, 1.0] @ np.linalg.qr(rng.normal(size=(2, 2)))[0] + [5.0, -3.0]
    np.testing.assert_array_equal(density_peaks(turned).nearest, density_peaks(z).nearest)
    wider = np.column_stack([z, 0.01 * rng.normal(size=(len(z), 6))])  # as of components that the data say nothing of
    np.testing.assert_allclose(density_peaks(wider).point[:, :2], density_peaks(z).point, atol=0.05)


@pytest.mark.parametrize("shape", ["gaussian", "even", "bent", "few"])
def test_chance_makes_no_peaks(shape: str) -> None:
    for seed in range(8):
        rng = np.random.default_rng(seed)
        t = rng.uniform(-1, 1, size=2000)
        z = {
            "gaussian": rng.normal(size=(2000, 3)),
            "even": rng.uniform(size=(2000, 2)),
            "bent": np.stack([2 * t, 2 * t**2], 1) + 0.1 * rng.normal(size=(2000, 2)),
            "few": rng.normal(size=(8, 2)),
        }[shape]
        assert len(density_peaks(z).nearest) == 1


def test_two_states_that_overlap_are_one_peak_until_they_part() -> None:
    rng = np.random.default_rng(3)
    blob = rng.normal(size=(4000, 1))
    for apart, count in ((1.5, 1), (6.0, 2)):
        z = blob + apart * (np.arange(4000)[:, None] % 2)
        assert len(density_peaks(z).nearest) == count


def test_peaks_of_many_particles_come_from_some_of_them() -> None:
    z, centre = planted_peaks(4, (20 * SAMPLE, 5 * SAMPLE, 15 * SAMPLE))
    found = density_peaks(z, seed=1)
    np.testing.assert_allclose(found.point, centre[[0, 2, 1]], atol=0.3)
    assert np.linalg.norm(z[found.nearest] - found.point, axis=1).max() < 0.03  # of all particles, not of the sample
    np.testing.assert_array_equal(density_peaks(z, seed=1).nearest, found.nearest)


def test_z_that_is_everywhere_the_same_has_no_peaks() -> None:
    with pytest.raises(ValueError, match="z is the same for all 9 particles"):
        density_peaks(np.ones((9, 2)))


def test_a_path_runs_between_percentiles_through_the_mean() -> None:
    rng = np.random.default_rng(3)
    z = rng.normal(size=(5000, 2)) * [4.0, 1.0] + [10.0, 20.0]
    path = principal_path(z, component=1, steps=11)
    np.testing.assert_allclose(path[5], z.mean(0), atol=0.2)
    scores = pca(z).project(path)
    np.testing.assert_allclose(scores[:, 1], 0, atol=0.2)
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


def test_a_path_follows_a_curve() -> None:
    rng = np.random.default_rng(6)
    angle = rng.uniform(0, np.pi, 4000)
    z = np.stack([3 * np.cos(angle), np.sin(angle)], 1) + 0.02 * rng.normal(size=(4000, 2))
    path = principal_path(z, component=1, steps=9)
    off = np.abs(np.hypot(path[:, 0] / 3, path[:, 1]) - 1)
    assert off.max() < 0.1  # the straight line through the mean is off by up to 0.4
