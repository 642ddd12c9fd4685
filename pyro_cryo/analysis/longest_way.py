"""The longest way through the particles of a latent space, and how far along it each shape lies.

A motion bends through z: no axis follows it, and a principal component folds it onto itself. Steps from particle to
near particle do follow it (Tenenbaum, de Silva and Langford, Science 290 (2000)); the longest of the shortest ways
between two particles runs from one end of the motion to the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pyro_cryo.analysis.latent import as_table, nearest

Array = NDArray[np.floating]

CLOUD = 400  # particles that steps go between
NEIGHBOURS = 10
STEPS = 120  # in the longest way, at least: gaps between particles are filled evenly


@dataclass(frozen=True)
class LongestWay:
    """Shapes about the longest way, and how far from its beginning they lie, stepping from shape to shape.

    points:   (L, zdim) the z of some particles, and between distant neighbours points on the straight line
    s:        (L,) their distances from the beginning, in the units of z
    particle: (n,) the same of all particles: of the nearest point
    """

    points: Array
    s: Array
    particle: Array


def longest_way(z: ArrayLike | Tensor, seed: int = 0) -> LongestWay:
    """Through posterior means z (n, zdim), or `CLOUD` of them at random. ValueError where all are the same.

    Steps lead between particles each of which is among the `NEIGHBOURS` nearest of the other, so that a stray one
    bridges nothing, and along the minimum spanning tree, so that every particle is reached.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import dijkstra, minimum_spanning_tree

    z = as_table(z)
    cloud = z[np.random.default_rng(seed).choice(len(z), min(CLOUD, len(z)), replace=False)]
    cloud = np.unique(cloud, axis=0)
    if len(cloud) < 3:
        raise ValueError(f"z has {len(cloud)} different values, a way leads through 3 or more: nothing moves here")
    distance = np.linalg.norm(cloud[:, None] - cloud, axis=-1)
    tree = minimum_spanning_tree(distance).toarray()
    near = distance <= np.partition(distance, min(NEIGHBOURS, len(cloud) - 1), 1)[:, [min(NEIGHBOURS, len(cloud) - 1)]]
    steps = np.where((near & near.T) | (tree > 0) | (tree.T > 0), distance, 0.0)
    ways = csr_array(steps)
    far = dijkstra(ways, indices=[0])[0]
    s = dijkstra(ways, indices=[int(far.argmax())])[0]
    points, along = _filled(cloud, s, np.argwhere(tree > 0))
    return LongestWay(points, along, along[nearest(points, z)])


def _filled(cloud: Array, s: Array, edges: NDArray[np.integer]) -> tuple[Array, Array]:
    """Points (n, zdim) at s (n,), with others evenly between the ends of edges (E, 2) more than a step apart."""
    points, along = [cloud], [s]
    for one, other in edges:
        count = int(abs(s[one] - s[other]) / (s.max() / STEPS))
        part = (np.arange(count) + 1) / (count + 1)
        points.append(cloud[one] + part[:, None] * (cloud[other] - cloud[one]))
        along.append(s[one] + part * (s[other] - s[one]))
    return np.concatenate(points), np.concatenate(along)
