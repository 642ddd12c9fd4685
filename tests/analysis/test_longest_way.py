"""The way follows a motion that bends, from end to end, over gaps."""

import numpy as np
import pytest

from pyro_cryo.analysis.longest_way import STEPS, longest_way


def arc(rng: np.random.Generator, angle: np.ndarray) -> np.ndarray:
    """Points about three quarters of a circle in five dimensions."""
    z = np.zeros((len(angle), 5))
    z[:, 0], z[:, 1] = 3 * np.cos(angle), 3 * np.sin(angle)
    return z + 0.1 * rng.normal(size=z.shape)


def test_it_runs_along_an_arc() -> None:
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 1.5 * np.pi, 1000)
    way = longest_way(arc(rng, angle))
    assert abs(np.corrcoef(way.particle, angle)[0, 1]) > 0.99
    assert 3 * 1.5 * np.pi < way.s.max() < 1.5 * 3 * 1.5 * np.pi


def test_stray_particles_bridge_nothing() -> None:
    rng = np.random.default_rng(2)
    angle = rng.uniform(0, 1.5 * np.pi, 400)
    z = arc(rng, angle)
    stray = 4
    z[:stray, :2] = np.linspace(0.3, 0.7, stray)[:, None] * z[angle.argmin(), :2]  # into the middle of the arc
    z[:stray, :2] += np.linspace(0.7, 0.3, stray)[:, None] * z[angle.argmax(), :2]
    way = longest_way(z)
    assert abs(np.corrcoef(way.particle[stray:], angle[stray:])[0, 1]) > 0.98


def test_gaps_are_bridged_so_that_every_part_of_the_way_has_points() -> None:
    rng = np.random.default_rng(1)
    angle = np.concatenate([rng.uniform(0, 0.5, 300), rng.uniform(2.5, 3.0, 300)])
    way = longest_way(arc(rng, angle))
    counts = np.histogram(way.s, STEPS // 4, (0, way.s.max()))[0]
    assert counts.min() >= 1


def test_particles_that_are_all_alike_have_no_way() -> None:
    with pytest.raises(ValueError, match="1 different values"):
        longest_way(np.zeros((10, 2)))
