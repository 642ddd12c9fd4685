"""The latent space: principal components, clusters, paths, and whether it follows a known coordinate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Array = NDArray[np.floating]
Indices = NDArray[np.integer]

SAMPLE = 5000  # so many particles give the density of z
LEAST_VARIANCE = 0.01  # of the largest component's: along one that varies less no peaks are told apart
SURE = 2.0  # standard errors by which the density must fall between two peaks


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


@dataclass(frozen=True)
class Peaks:
    """K peaks of the density of z (N, zdim), the highest first.

    point:   (K, zdim)
    density: (K,) relative to the highest
    nearest: (K,) the particle nearest to each: its z is one that a particle really has
    """

    point: Array
    density: Array
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


def density_peaks(z: ArrayLike | Tensor, seed: int = 0) -> Peaks:
    """All peaks of the density of z (N, zdim), a Gaussian kernel on each particle, or on `SAMPLE` of them at random.

    The kernels are as wide as Silverman's rule for the gradient of q components of variance 1 says, n^(-1 / (q + 6))
    (4 / (q + 4))^(1 / (q + 6)) (Chacon, Duong and Wand, Statistica Sinica 21 (2011)). Particles than which none within
    two widths lies in higher density climb by mean shift (Comaniciu and Meer, IEEE PAMI 24 (2002)). A summit counts
    unless a higher one can be reached from it without going down by more than chance: a bump of few particles does not.
    """
    z = as_table(z)
    parts = pca(z)
    varies = parts.variance > LEAST_VARIANCE * parts.variance[0]
    if not varies.any():
        raise ValueError(f"z is the same for all {len(z)} particles; its density has no peaks to tell apart")
    n, q = min(len(z), SAMPLE), int(varies.sum())
    width = (4 / ((q + 4) * n)) ** (1 / (q + 6)) * np.sqrt(parts.variance[varies])
    scores = parts.project(z)[:, varies] / width
    centre = scores if n == len(z) else scores[np.random.default_rng(seed).choice(len(z), n, replace=False)]
    summit = np.concatenate([_climb(start, centre) for start in _rows(_highest(centre))])
    height, _ = _density(summit, centre)
    summit = summit[np.argsort(-height, kind="stable")]
    summit = _separate(summit[~np.tril(_squared(summit, summit) < 1, -1).any(1)], centre)
    height, _ = _density(summit, centre)
    point = parts.mean + summit * width @ parts.axes[varies]
    return Peaks(point, height / height[0], nearest(scores, summit))


def principal_path(
    z: ArrayLike | Tensor, component: int = 1, steps: int = 10, percentiles: tuple[float, float] = (5.0, 95.0)
) -> Array:
    """Points along a principal component, in the midst of the particles: (steps, zdim).

    Their scores run evenly between two percentiles of the particles'; component 1 is the one of largest variance. Each
    is the mean of z given its score, over particles weighted by a Gaussian as wide as a step: a straight line where z
    is Gaussian, a bent one where the particles lie along a curve.
    For points that particles really have take `z[nearest(z, path)]`.
    """
    components = pca(z)
    if not 1 <= component <= len(components.axes):
        raise ValueError(f"component {component} of {len(components.axes)}; components count from 1")
    if steps < 1:
        raise ValueError(f"{steps} steps; give at least 1")
    scores = components.project(z)
    own = scores[:, component - 1]
    low, high = np.percentile(own, percentiles)
    amount = np.linspace(low, high, steps) if steps > 1 else np.array([0.0])
    width = max((high - low) / max(steps - 1, 10), 1e-12)
    exponent = -0.5 * ((amount[:, None] - own) / width) ** 2
    weight = np.exp(exponent - exponent.max(1, keepdims=True))
    path = weight @ scores / weight.sum(1, keepdims=True)
    path[:, component - 1] = amount
    return components.mean + path @ components.axes


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


def _rows(points: Array, most: int = 500) -> list[Array]:
    """The points in parts of bounded size."""
    return np.array_split(points, -(-len(points) // most) or 1)


def _squared(a: Array, b: Array) -> Array:
    """Squared distances of points (M, q) and (n, q): (M, n)."""
    return (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T


def _density(at: Array, centre: Array) -> tuple[Array, Array]:
    """At points (M, q), the sum of kernels of width 1 on n centres (n, q) and its standard error: (M,) each."""
    kernels = (np.exp(-0.5 * _squared(part, centre)) for part in _rows(at))
    height, square = np.concatenate([np.stack([k.sum(1), (k**2).sum(1)], 1) for k in kernels]).T
    return height, np.sqrt(square)


def _highest(centre: Array) -> Array:
    """The centres (M, q) in more density than all within two widths, and in more than chance gives a lone one."""
    height, error = _density(centre, centre)
    around = [np.where(_squared(part, centre) < 4, height, 0).max(1) for part in _rows(centre)]
    return centre[(height >= np.concatenate(around)) & ((height > SURE * error) | (height == height.max()))]


def _climb(point: Array, centre: Array) -> Array:
    """Where points (M, q) come to by mean shift."""
    for _ in range(300):
        kernel = np.exp(-0.5 * _squared(point, centre))
        moved = kernel @ centre / kernel.sum(1, keepdims=True)
        step, point = np.abs(moved - point).max(), moved
        if step < 0.01:
            break
    return point


def _separate(summit: Array, centre: Array) -> Array:
    """Those summits (M, q), the highest first, whose straight way to every higher one sinks by more than chance."""
    height, error = _density(summit, centre)
    kept = []
    for i, point in enumerate(summit):
        way = point + np.linspace(0, 1, 18)[1:-1, None, None] * (summit[:i] - point)
        along, its_error = (v.reshape(16, i) for v in _density(way.reshape(-1, len(point)), centre))
        lowest = along.argmin(0)[None]
        drop = height[i] - np.take_along_axis(along, lowest, 0)
        kept.append(bool((drop > SURE * np.hypot(error[i], np.take_along_axis(its_error, lowest, 0))).all()))
    return summit[kept]


def as_table(values: ArrayLike | Tensor) -> Array:
    """(N, q) float64 of an array, or of a tensor wherever it lives; (N,) counts as one column."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    table = np.asarray(values, float)
    return table[:, None] if table.ndim == 1 else table
