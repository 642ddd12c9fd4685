"""Mixtures that are matched to the masses and moments of posteriors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from images import blobs, observed
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.guides.pose_mixture import PoseGaussians
from pyro_cryo.guides.pose_mixture import log_density as shares
from pyro_cryo.guides.pose_moments import matched
from pyro_cryo.guides.poses import PoseModes, moved
from pyro_cryo.physics.rotations import exp, log

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "benchmarks"))
import pose_calibration

BOX, IMAGES = 16, 6


@pytest.fixture(scope="module")
def batch() -> Batch:
    return observed(blobs(BOX, 7), IMAGES, 1.0, torch.where(torch.arange(IMAGES) % 2 == 0, 1.0, 0.8))


def mixture(seed: int, batch: Batch) -> PoseModes:
    """Two peaks for each image, 40 degrees apart, of any shape."""
    generator = torch.Generator().manual_seed(seed)
    root = 0.3 * torch.randn(IMAGES, 2, 5, 5, generator=generator) + torch.eye(5)
    root = root * torch.tensor([20.0, 20, 20, 3, 3])[:, None]
    turn = exp(torch.tensor([[0.0, 0, 0], [0.5, 0.4, 0.3]]))
    shift = torch.tensor([[0.0, 0.0], [1.0, -0.5]])
    share = torch.rand(IMAGES, generator=generator) * 0.8 + 0.1
    return PoseModes(
        turn @ batch.rotation[:, None],
        (batch.translation / batch.freq_scale[:, None])[:, None] + shift,
        root @ root.mT,
        torch.stack([share, 1 - share], 1).log(),
    )


def log_density(modes: PoseModes, row: Tensor, rotation: Tensor, translation: Tensor) -> Tensor:
    """Of mixtures, at poses in their pixels: (n,)."""
    gaussians = PoseGaussians.about(modes, torch.ones(IMAGES))[row]
    return shares(gaussians, modes.log_weight.log_softmax(1)[row], rotation, translation).logsumexp(-1)


def test_a_mixture_is_found_from_another_that_is_near(batch: Batch) -> None:
    truth = mixture(0, batch)
    sd = truth.precision.diagonal(dim1=2, dim2=3).rsqrt()
    aside = 0.3 * torch.randn(IMAGES, 2, 5, generator=torch.Generator().manual_seed(1)) * sd
    modes = PoseModes(
        *moved(truth.rotation, truth.translation, aside), 1.3 * truth.precision, torch.full((IMAGES, 2), 0.5).log()
    )

    def log_ratio(some: Batch, rotation: Tensor, translation: Tensor) -> Tensor:
        return log_density(truth, some.index, rotation, translation) - log_density(
            modes, some.index, rotation, translation
        )

    for seed in range(3):
        modes = matched(modes, batch, log_ratio, seed=seed)
    torch.testing.assert_close(modes.log_weight.exp(), truth.log_weight.exp(), atol=1e-2, rtol=0)
    off = torch.cat([log(modes.rotation @ truth.rotation.mT), modes.translation - truth.translation], -1) / sd
    assert float(off.abs().max()) < 0.1  # of an sd given the other coordinates
    root = torch.linalg.cholesky(truth.precision)
    relative = root.mT @ torch.linalg.inv(modes.precision) @ root
    torch.testing.assert_close(relative, torch.eye(5).expand_as(relative), atol=0.15, rtol=0)


def test_components_of_one_peak_share_it(batch: Batch) -> None:
    """Two that lie on each other have half of it each, and a mode that is not there stays away."""
    one = PoseModes(*(value[:, :1] for value in mixture(0, batch).tensors))
    three = PoseModes(*(value.repeat(1, 3, *[1] * (value.dim() - 2)) for value in one.tensors))
    three.log_weight[:] = torch.tensor([0.0, 0.0, -torch.inf])

    def log_ratio(some: Batch, rotation: Tensor, translation: Tensor) -> Tensor:
        return log_density(one, some.index, rotation, translation) - log_density(
            three, some.index, rotation, translation
        )

    found = matched(three, batch, log_ratio)
    expected = torch.tensor([0.5, 0.5, 0.0]).expand(IMAGES, 3)
    torch.testing.assert_close(found.log_weight.exp(), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.precision[:, 0], one.precision[:, 0], rtol=0.02, atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("snr", "box", "count"), [(0.3, 32, 500), (0.1, 32, 500), (0.03, 64, 200)])
def test_regions_of_highest_density_cover_the_truth_at_their_rates(
    snr: float, box: int, count: int, tmp_path: Path
) -> None:
    """The map is given. At 0.03 images of 32 pixels leave no few peaks: their poses are hardly determined."""
    case = pose_calibration.case(snr, count, box, tmp_path / "case")
    run = pose_calibration.run_of(case, pose_calibration.modes_of(case, peaks=8))
    level, _ = pose_calibration.level_of_truth(case, run, corrected=True)
    for rate in (0.5, 0.9):
        inside = float((level <= rate).float().mean())
        assert abs(inside - rate) < 2.6 * (rate * (1 - rate) / count) ** 0.5, f"{inside} in {rate}"
