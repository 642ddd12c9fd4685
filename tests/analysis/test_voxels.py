"""Sums over draws are those of all draws; a probability is one half where nothing differs; what is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_cryo.analysis.fsc import fsc
from pyro_cryo.analysis.plots import central_sections
from pyro_cryo.analysis.voxels import (
    FSCSpread,
    Running,
    fsc_spread,
    half_map_scatter,
    resolution_range,
    voxel_difference,
    voxel_spread,
)
from pyro_cryo.data.mrc_map import read_map
from pyro_cryo.inference.run import Run


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_mean_and_sd_are_those_of_all_draws() -> None:
    """Also where the mean is a thousand times the sd."""
    draws = 1000 + drawn(30, 8, 8, 8)
    spread = voxel_spread(iter(draws))
    assert spread.draws == 30
    torch.testing.assert_close(spread.mean, draws.double().mean(0).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(spread.sd, draws.double().std(0).float(), rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match="give 2 or more"):
        voxel_spread(draws[:1])
    with pytest.raises(ValueError, match="0 draws"):
        Running().spread()


def test_a_probability_is_one_half_where_nothing_differs() -> None:
    """Where maps are equal exactly; where they are draws of the same, about; and sure where they differ by much."""
    pairs = drawn(400, 2, 8, 8, 8)
    pairs[:, 1, 0] = pairs[:, 0, 0]
    pairs[:, 0, 1] += 10
    pairs[:, 1, 2] += 10
    found = voxel_difference(pairs)
    assert bool((found.probability[0] == 0.5).all())
    assert bool((found.sign[0] == 0).all())
    rest = found.probability[3:]
    assert float(rest.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(rest.std()) == pytest.approx(0.5 / 400**0.5, rel=0.2)  # of a share of 400
    assert bool((found.probability[1] == 1).all())
    assert bool((found.probability[2] == 0).all())
    assert bool((found.sign[1:3] == 1).all())
    torch.testing.assert_close(found.mean, (pairs[:, 0] - pairs[:, 1]).mean(0), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.sd, (pairs[:, 0] - pairs[:, 1]).std(0), rtol=1e-3, atol=0)


def test_what_two_maps_share_in_each_draw_is_no_uncertainty_of_their_difference() -> None:
    common, own = 5 * drawn(50, 1, 8, 8, 8), 0.1 * drawn(50, 2, 8, 8, 8, seed=1)
    found = voxel_difference(common + own)
    assert float(found.sd.mean()) == pytest.approx(0.1 * 2**0.5, rel=0.1)


def test_error_bars_hold_nine_draws_in_ten() -> None:
    fixed = drawn(16, 16, 16, seed=5)
    pairs = [(fixed + drawn(16, 16, 16, seed=10 + i), fixed) for i in range(40)]
    spread = fsc_spread(pairs)
    curves = torch.stack([fsc(*pair) for pair in pairs])
    torch.testing.assert_close(spread.mean, curves.mean(0))
    inside = ((curves >= spread.low) & (curves <= spread.high))[:, 1:].double().mean()
    assert float(inside) == pytest.approx(0.9, abs=0.03)
    assert float(spread.sd[2]) > 2 * float(spread.sd[7])  # of few coefficients
    with pytest.raises(ValueError, match="give 2 or more"):
        fsc_spread(pairs[:1])


def test_the_resolution_has_a_range() -> None:
    fall = torch.linspace(1, 0, 17, dtype=torch.float64)
    spread = FSCSpread(fall, 0 * fall, (fall - 0.1).clamp_min(0), (fall + 0.1).clamp_max(1), 10)
    fine, coarse = resolution_range(spread, 2.0)
    assert fine < coarse
    assert fine == pytest.approx(64 / (16 * (1 - 0.043)), rel=0.01)


def test_a_picture_of_a_probability_goes_from_0_to_1() -> None:
    volume, probability = drawn(8, 8, 8), torch.full((8, 8, 8), 0.5)
    figure = central_sections(volume, 2.0, volume.abs(), "a title", probability)
    pictures = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(pictures) == 9
    assert all(picture.get_clim() == (0.0, 1.0) for picture in pictures[6:])
    np.testing.assert_array_equal(pictures[6].get_array(), probability[4])


Command = Callable[..., int]
QUIET = ("--quiet", "--device", "cpu")


def test_half_maps_differ_as_noise_says_and_by_more_where_it_is_taken_for_weaker(homogeneous_run: Path) -> None:
    run = Run.load(homogeneous_run)
    found = half_map_scatter(run, 12)
    assert float((found.ratio - 1)[3:-1].abs().max()) < 4 * float(found.sd[3:-1].max())
    run.model.log_sigma.data -= math.log(1.5)
    again = half_map_scatter(run, 12)
    assert float((found.ratio - 1)[3:-1].abs().max()) < float((again.ratio - 1)[3:-1].abs().min())
    assert float(again.ratio[3:-1].mean()) > 1.5 * float(found.ratio[3:-1].mean())


def test_half_maps_of_what_moves_differ_by_that_too(cryodrgn_run: Path) -> None:
    with pytest.raises(ValueError, match="what moves"):
        half_map_scatter(Run.load(cryodrgn_run))


def test_the_uncertainty_of_one_map(homogeneous_run: Path, command: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ("uncertainty", homogeneous_run, "-o", out, "--draws", 6, "--keep", 2, *QUIET)
    assert command(*asked) == 0
    names = {"mean.mrc", "sd.mrc", "draw_000.mrc", "draw_001.mrc", "uncertainty.png", "fsc.tsv", "fsc.png"}
    assert {path.name for path in out.iterdir()} == names
    (mean, apix), (own, own_apix) = read_map(out / "mean.mrc"), read_map(homogeneous_run / "map.mrc")
    assert apix == pytest.approx(own_apix)
    assert float((mean - own).norm() / own.norm()) < 0.1
    sd, draw = (read_map(out / f"{name}.mrc")[0] for name in ("sd", "draw_000"))
    assert float((draw - mean).square().mean() / sd.square().mean()) == pytest.approx(1.0, abs=0.3)
    rows = np.loadtxt(out / "fsc.tsv", skiprows=1)
    assert rows.shape == (16, 6)
    assert (rows[:, 4] <= rows[:, 5]).all()
    assert command(*asked) == 2
    assert command("uncertainty", homogeneous_run, "-o", tmp_path / "other", "--index", 3, *QUIET) == 2
    assert not (tmp_path / "other").exists()


def test_the_uncertainty_of_a_network_says_that_it_is_of_z(
    cryodrgn_run: Path, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    asked = ("uncertainty", cryodrgn_run, "-o", out, "--index", 3, "--against", 9, "--draws", 5, "--keep", 0)
    assert command(*asked, *QUIET) == 0
    assert "no posterior of their own" in capsys.readouterr().out
    probability = read_map(out / "probability.mrc")[0]
    assert 0 <= float(probability.min()) <= float(probability.max()) <= 1
    assert (out / "difference.mrc").exists()
    assert command("uncertainty", cryodrgn_run, "-o", tmp_path / "other", "--against", 3, *QUIET) == 2
    assert "give --index too" in capsys.readouterr().err
