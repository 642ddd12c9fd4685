"""Mixtures that are matched to the masses and moments of posteriors."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from images import blobs, observed
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.guides.landscape import MapLikelihood, climbed
from pyro_cryo.guides.pose_moments import log_likelihood, matched
from pyro_cryo.guides.poses import PoseModes, PosePrior
from pyro_cryo.physics.slices import fourier_grid, slope_grid

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "benchmarks"))
import pose_calibration

BOX, IMAGES, SIGMA = 24, 40, 0.5


@pytest.fixture(scope="module")
def volume() -> Tensor:
    return blobs(BOX, 11)


@pytest.fixture(scope="module")
def batch(volume: Tensor) -> Batch:
    return observed(volume, IMAGES, SIGMA, torch.where(torch.arange(IMAGES) % 3 == 0, 1.0, 0.9))


@pytest.fixture(scope="module")
def sigma() -> Tensor:
    return torch.full((1, BOX // 2 + 1), SIGMA)


def anywhere() -> PosePrior:
    return PosePrior(torch.eye(3).expand(IMAGES, 3, 3), torch.zeros(IMAGES, 2), math.inf, 2.0)


@pytest.fixture(scope="module")
def laplace(volume: Tensor, batch: Batch, sigma: Tensor) -> PoseModes:
    start = PoseModes(
        batch.rotation[:, None],
        (batch.translation / batch.freq_scale[:, None])[:, None],
        torch.eye(5).expand(IMAGES, 1, 5, 5),
        torch.zeros(IMAGES, 1),
    )
    return climbed(batch, MapLikelihood(slope_grid(volume), sigma), start, anywhere(), batch.freq_scale, steps=8)[0]


def test_the_likelihood_is_the_landscapes(volume: Tensor, batch: Batch, sigma: Tensor, laplace: PoseModes) -> None:
    pose = laplace.best
    flat = replace(anywhere(), shift_sd=1e6)
    here = MapLikelihood(slope_grid(volume), sigma).at(batch, *pose, batch.freq_scale).under(flat, batch, *pose)
    value = log_likelihood(batch, fourier_grid(volume), sigma, *pose, batch.freq_scale)
    torch.testing.assert_close(value, here.value, atol=0.05, rtol=1e-4)


def test_draws_count_more_after_each_match(volume: Tensor, batch: Batch, sigma: Tensor, laplace: PoseModes) -> None:
    """What is drawn comes nearer to the posterior; its evidence does not depend on what it was drawn from."""
    modes, effective, evidence = laplace, [], []
    for seed in range(4):
        modes, seen = matched(batch, fourier_grid(volume), sigma, modes, anywhere(), batch.freq_scale, seed=seed)
        effective.append(float(seen.effective.mean()))
        evidence.append(seen.evidence)
    assert effective[-1] > 0.9
    assert effective[0] < effective[-1]
    assert float((evidence[0] - evidence[-1]).abs().mean()) < 0.1
    assert abs(float((evidence[0] - evidence[-1]).mean())) < 0.03
    assert float((evidence[2] - evidence[3]).abs().mean()) < 0.03


def test_components_of_one_peak_share_it(volume: Tensor, batch: Batch, sigma: Tensor, laplace: PoseModes) -> None:
    """Two that lie on each other have the evidence of one, half of it each."""
    two = PoseModes(*(value.repeat(1, 2, *[1] * (value.dim() - 2)) for value in laplace.tensors))
    grid, px = fourier_grid(volume), batch.freq_scale
    _, alone = matched(batch, grid, sigma, laplace, anywhere(), px)
    both, seen = matched(batch, grid, sigma, two, anywhere(), px)
    torch.testing.assert_close(seen.evidence, alone.evidence, atol=1e-2, rtol=0)
    torch.testing.assert_close(both.log_weight.exp(), torch.full((IMAGES, 2), 0.5), atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("snr", "box", "count"), [(0.3, 32, 500), (0.1, 32, 500), (0.03, 64, 200)])
def test_regions_of_highest_density_cover_the_truth_at_their_rates(
    snr: float, box: int, count: int, tmp_path: Path
) -> None:
    """The map is given. At 0.03 images of 32 pixels leave no few peaks: their poses are hardly determined."""
    case = pose_calibration.case(snr, count, box, tmp_path / "case")
    _, mixture = pose_calibration.modes_of(case, peaks=8)
    level, _ = pose_calibration.level_of_truth(case, pose_calibration.run_of(case, mixture))
    for rate in (0.5, 0.9):
        inside = float((level <= rate).float().mean())
        assert abs(inside - rate) < 2.6 * (rate * (1 - rate) / count) ** 0.5, f"{inside} in {rate}"
