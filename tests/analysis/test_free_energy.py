"""The free energy of a run: of as many of its particles as are asked for, whatever their number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_cryo.analysis import free_energy
from pyro_cryo.analysis.check_plots import barrier_told
from pyro_cryo.data.particles import Particles
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.run import Run
from pyro_cryo.models.linear_subspace import LinearSubspace


@pytest.fixture(scope="module")
def run(toy: Path) -> Run:
    return fit(LinearSubspace(16, zdim=1, contrast=0.0), Particles.open(toy, box=16))


def test_some_particles_at_random_say_the_same_less_surely(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def counted(run: Run, particles: Particles, *rest: object, **settings: object) -> torch.Tensor:
        seen.append(particles)
        return log_likelihoods(run, particles, *rest, **settings)  # type: ignore[arg-type]

    log_likelihoods = free_energy.log_likelihoods
    monkeypatch.setattr(free_energy, "log_likelihoods", counted)
    every = free_energy.of_run(run, bins=8)
    some, same, other = (free_energy.of_run(run, bins=8, seed=seed, most=150) for seed in (0, 0, 1))
    assert [len(particles) for particles in seen] == [600, 150, 150, 150]
    rows = seen[1].rows_in(run.particles)
    assert 200 < float(rows.double().mean()) < 400  # not the first ones: 300 +- 14
    assert rows.tolist() != seen[3].rows_in(run.particles).tolist()
    np.testing.assert_array_equal(some.free_energy.draws_kt, same.free_energy.draws_kt)
    np.testing.assert_array_equal(some.means, every.means)  # of all
    wide, narrow = (found.free_energy.high_kt - found.free_energy.low_kt for found in (some, every))
    assert 1.2 < float(np.median(wide / narrow)) < 3  # 2, were it counts alone
    apart = np.abs(some.free_energy.median_kt - every.free_energy.median_kt)
    assert float((apart < wide).mean()) > 0.7
    assert other.means.shape == (600,)
    with pytest.raises(ValueError, match="most is 0"):
        free_energy.of_run(run, most=0)


@pytest.mark.parametrize(
    ("heights", "wells", "said"),
    [
        ([3, 1, 2, 0, 4, 2, 2.5, 1, 5], (3, 7), "barrier of 4.0 kT (4.0 to 4.0) from 3 to 7"),
        ([5, 2, 0, 2, 4], None, "one well"),
        ([0, 1, 2, 3, 4], None, "one well"),
        ([4, 1, 6, 0, 5, 0.5, 7], (3, 1), "barrier of 6.0 kT (6.0 to 6.0) from 3 to 1"),
    ],
)
def test_the_highest_barrier_parts_two_wells(heights: list[float], wells: tuple[int, int] | None, said: str) -> None:
    drawn = np.array([heights, heights], dtype=float)
    profile = free_energy.FreeEnergy.of(np.arange(len(heights), dtype=float), drawn, 0.9)
    assert profile.wells == wells
    assert barrier_told(profile) == said
