"""The latent space: principal components, clusters, paths, and whether it follows a known coordinate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Array = NDArray[np.floating]
Indices = NDArray[np.integer]


@dataclass(frozen=True)
class PCA:
    """Principal components of z (N, zdim), the largest variance first.

    mean:      (zdim,)
    axes:      (zdim, zdim) unit rows; the largest entry of each is positive, so that a rerun has the same signs
    variance:  (zdim,)
    explained: (zdim,) share of the total variance
    """

    mean: Array
    axes: Array
    variance: Array
    explained: Array

    def project(self, z: ArrayLike | Tensor) -> Array:
        """Scores of points (M, zdim) along the components: (M, zdim)."""
        return (as_table(z) - self.mean) @ self.axes.T


@dataclass(frozen=True)
class KMeans:
    """K clusters of z (N, zdim), numbered along the first principal component.

    centre:  (K, zdim)
    label:   (N,) cluster of each particle
    nearest: (K,) the particle nearest to each centre: its z is one that a particle really has
    """

    centre: Array
    label: Indices
    nearest: Indices


def pca(z: ArrayLike | Tensor) -> PCA:
    """Principal components of (N, zdim), N >= 2, by singular values."""
    z = as_table(z)
    if len(z) < 2:
        raise ValueError(f"{len(z)} particle has no principal components; give at least 2")
    mean = z.mean(0)
    covariance = np.cov(z, rowvar=False).reshape(z.shape[1], z.shape[1])
    variance, vectors = np.linalg.eigh(covariance)
    variance, axes = variance[::-1].clip(min=0), vectors.T[::-1]
    axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]
    total = variance.sum()
    return PCA(mean, axes, variance, variance / total if total > 0 else np.zeros_like(variance))


def kmeans(z: ArrayLike | Tensor, k: int, seed: int = 0, restarts: int = 5) -> KMeans:
    """Lloyd's algorithm from k-means++ starts; the best of `restarts` by the sum of squared distances."""
    from scipy.cluster.vq import kmeans2

    z = as_table(z)
    distinct = len(np.unique(z, axis=0))
    if not 1 <= k <= distinct:
        raise ValueError(f"{k} clusters of {distinct} distinct particles; give 1 to {distinct}")
    rng = np.random.default_rng(seed)
    best: tuple[float, Array] | None = None
    for _ in range(restarts):
        # an empty cluster keeps its last centre; it only loses to restarts without one
        centre, _ = kmeans2(z, z[_plus_plus(z, k, rng)], iter=100, minit="matrix", missing="warn")
        cost = float(((z - centre[nearest(centre, z)]) ** 2).sum())
        if best is None or cost < best[0]:
            best = (cost, centre)
    assert best is not None
    centre = best[1][np.argsort(pca(z).project(best[1])[:, 0])] if len(z) > 1 else best[1]
    return KMeans(centre, nearest(centre, z), nearest(z, centre))


def principal_path(
    z: ArrayLike | Tensor, component: int = 1, steps: int = 10, percentiles: tuple[float, float] = (5.0, 95.0)
) -> Array:
    """Points along a principal component, through the mean: (steps, zdim).

    They run evenly between two percentiles of the particles' scores; component 1 is the one of largest variance.
    For points that particles really have take `z[nearest(z, path)]`.
    """
    components = pca(z)
    if not 1 <= component <= len(components.axes):
        raise ValueError(f"component {component} of {len(components.axes)}; components count from 1")
    if steps < 1:
        raise ValueError(f"{steps} steps; give at least 1")
    low, high = np.percentile(components.project(z)[:, component - 1], percentiles)
    amount = np.linspace(low, high, steps) if steps > 1 else np.array([0.0])
    return components.mean + amount[:, None] * components.axes[component - 1]


def nearest(z: ArrayLike | Tensor, points: ArrayLike | Tensor) -> Indices:
    """For each point (M, zdim) the particle of z (N, zdim) that lies nearest: (M,)."""
    from scipy.spatial import cKDTree

    return np.asarray(cKDTree(as_table(z)).query(as_table(points))[1])


def neighbour_r2(z: ArrayLike | Tensor, coordinate: ArrayLike | Tensor, k: int = 20) -> Array:
    """How well z (N, zdim) follows known coordinates (N,) or (N, q): R^2 of the mean of k nearest neighbours, (q,).

    1 where neighbours in z have the same coordinate, 0 or slightly below where z knows nothing of it. It is blind to
    smooth distortions of the latent space, which no method can recover.
    """
    from scipy.spatial import cKDTree

    z, y = as_table(z), as_table(coordinate)
    if len(z) != len(y):
        raise ValueError(f"{len(z)} latents and {len(y)} coordinates; give one of each a particle")
    if len(z) <= k:
        raise ValueError(f"{len(z)} particles have no {k} neighbours each; give more particles or a smaller k")
    spread = ((y - y.mean(0)) ** 2).sum(0)
    if not (spread > 0).all():
        raise ValueError("a coordinate is the same for all particles; there is nothing to follow")
    neighbours = np.asarray(cKDTree(z).query(z, k + 1)[1])[:, 1:]
    return 1 - ((y[neighbours].mean(1) - y) ** 2).sum(0) / spread


def _plus_plus(z: Array, k: int, rng: np.random.Generator) -> Indices:
    """Starting points by their squared distance to those before them (k-means++, Arthur and Vassilvitskii 2007)."""
    taken = [int(rng.integers(len(z)))]
    distance = ((z - z[taken[0]]) ** 2).sum(1)
    while len(taken) < k:
        taken.append(int(rng.choice(len(z), p=distance / distance.sum())))
        distance = np.minimum(distance, ((z - z[taken[-1]]) ** 2).sum(1))
    return np.array(taken)


def as_table(values: ArrayLike | Tensor) -> Array:
    """(N, q) float64 of an array, or of a tensor wherever it lives; (N,) counts as one column."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    table = np.asarray(values, float)
    return table[:, None] if table.ndim == 1 else table
