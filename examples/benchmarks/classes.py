"""3-D classification of a case with discrete states: recipe `classes`, beside k-means on the z of the default.

    python examples/benchmarks/classes.py CASE [--seeds 0 1]

CASE as in homogeneous.py. Prints the accuracy after matching labels, the adjusted Rand index (Hubert and Arabie,
J. Classification 2 (1985) 193) and the seconds of the fits.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pyro_cryo.analysis.latent import kmeans
from pyro_cryo.data.particles import Particles
from pyro_cryo.inference.fit import fit
from pyro_cryo.models.classes import Classes
from pyro_cryo.models.manifold import Manifold

Labels = NDArray[np.int64]


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    asked = parser.parse_args()
    particles = Particles.open(asked.case / "particles.star")
    with np.load(asked.case / "truth.npz") as truth:
        state = truth["state"]
    count = int(state.max()) + 1
    for seed in asked.seeds:
        began = time.monotonic()
        found = fit(Classes(particles.box, classes=count), particles, seed=seed).latent.z.argmax(1)
        between = time.monotonic()
        z = fit(Manifold(particles.box), particles, seed=seed).latent.z
        report(f"classes, seed {seed}", found, state, between - began)
        report(f"k-means on z, seed {seed}", np.asarray(kmeans(z, count).label), state, time.monotonic() - between)


def report(name: str, found: Labels, state: Labels, seconds: float) -> None:
    said = f"accuracy {accuracy(found, state):.3f}, adjusted Rand index {adjusted_rand(found, state):.3f}"
    print(f"{name}: {said}, {seconds:.0f} s", flush=True)


def shared(a: Labels, b: Labels) -> NDArray[np.float64]:
    """How many have label i in one and j in the other."""
    table = np.zeros((int(a.max()) + 1, int(b.max()) + 1))
    np.add.at(table, (a, b), 1)
    return table


def accuracy(found: Labels, state: Labels) -> float:
    from scipy.optimize import linear_sum_assignment

    table = shared(found, state)
    rows, columns = linear_sum_assignment(-table)
    return float(table[rows, columns].sum() / len(state))


def adjusted_rand(found: Labels, state: Labels) -> float:
    def pairs(counts: NDArray[np.float64]) -> float:
        return float((counts * (counts - 1)).sum() / 2)

    table = shared(found, state)
    together, one, other = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = one * other / pairs(np.array([float(len(state))]))
    return (together - expected) / ((one + other) / 2 - expected)


if __name__ == "__main__":
    main()
