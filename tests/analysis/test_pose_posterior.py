"""Draws of a pose are gathered at its peaks, whatever the symmetry; the picture shows them; the command writes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pyro_cryo.analysis.pose_posterior import PosePosterior, of_particle, pose_sphere
from pyro_cryo.inference.run import Run
from pyro_cryo.physics.rotations import angle_deg, exp, point_group, random_rotations

C1 = point_group("C1")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def about(rotation: Tensor, count: int, sd_deg: float) -> Tensor:
    """Draws whose turns from a rotation (3, 3) have this standard deviation about each axis."""
    return exp(math.radians(sd_deg) * torch.randn(count, 3, generator=seeded(count))) @ rotation


def panels(figure: Figure) -> list[Axes]:
    """Without colour bars."""
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


@pytest.fixture
def places() -> Tensor:
    """Three rotations far from each other, whatever turn of D7 comes between."""
    return random_rotations(9, seeded(1))[[0, 3, 4]]


@pytest.mark.parametrize("group", ["C1", "C4", "D7"])
def test_draws_belong_to_their_peaks_whichever_equivalent_they_are(group: str, places: Tensor) -> None:
    symmetry, first = point_group(group), places[0]
    rotation = torch.cat([about(place, count, 1.0) for place, count in zip(places, (60, 300, 140), strict=True)])
    turned = rotation @ symmetry[torch.randint(len(symmetry), (500,), generator=seeded())]
    near = exp(torch.tensor([0.0, 0.01, 0.0])) @ first  # a mode that overlaps another
    modes = torch.cat([places, near[None], places[1:] @ symmetry[-1]])
    found = PosePosterior.of(turned, modes, symmetry, places[1] @ symmetry[-1])
    assert found.share.tolist() == pytest.approx([0.6, 0.28, 0.12])
    assert torch.bincount(found.peak).tolist() == [300, 140, 60]
    apart = angle_deg(found.rotation, found.peaks[found.peak])
    assert float(apart.max()) < 6
    for number in range(3):
        turn = found.turn_deg(number)
        assert float(turn.square().mean().sqrt()) == pytest.approx(1.0, abs=0.15)
    assert found.table is not None
    assert float(angle_deg(found.table, found.peaks[0])) < 1e-2
    alike = (turned[:, None] @ symmetry - found.rotation[:, None]).abs().amax((2, 3)).amin(1)
    assert float(alike.max()) < 1e-4  # still the same view


def test_the_turn_in_the_plane_is_that_of_the_image() -> None:
    start = random_rotations(1, seeded())[0]
    psi = torch.linspace(-170, 170, 41)
    twist = exp(torch.stack([0 * psi, 0 * psi, psi.deg2rad()], -1))
    swing = exp(torch.randn(41, 3, generator=seeded(1)) * torch.tensor([1.0, 1.0, 0.0]))
    found = PosePosterior.of(twist @ swing @ start, start[None], C1)
    torch.testing.assert_close(found.in_plane_deg, psi, rtol=0, atol=0.05)


def test_a_tight_posterior_is_seen_from_near_and_a_wide_one_on_the_sphere(places: Tensor) -> None:
    tight = PosePosterior.of(
        about(places[0], 400, 0.2), places[:1], C1, exp(torch.tensor([0.0, 0.002, 0.0])) @ places[0]
    )
    sphere, near = panels(pose_sphere(tight, "particle 3"))
    drawn = near.collections[0].get_offsets()
    assert len(drawn) == 400
    assert np.std(drawn) == pytest.approx(0.2, abs=0.02)
    low, high = near.get_xlim()
    assert 0.4 < high < 1.5
    assert low == -high
    (cross,) = near.lines
    np.testing.assert_allclose(cross.get_xydata(), [[0, math.degrees(0.002)]], atol=1e-3)
    assert "0.11° from peak 1" in sphere.get_title()
    longitude, latitude = np.asarray(sphere.collections[0].get_offsets()).T
    seen = np.stack([np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)], -1)
    np.testing.assert_allclose(seen, tight.rotation[:, 2], atol=1e-5)


def test_every_peak_is_numbered_and_the_heaviest_three_are_seen_from_near() -> None:
    symmetry, modes = point_group("C2"), random_rotations(5, seeded(3))
    draws = torch.cat([about(mode, 20 * (number + 1), 0.5) for number, mode in enumerate(modes)])
    sphere, *near = panels(pose_sphere(PosePosterior.of(draws, modes, symmetry)))
    assert [text.get_text() for text in sphere.texts] == ["5", "4", "3", "2", "1"]
    assert [axes.get_title().split(",")[0] for axes in near] == ["1: 33%", "2: 27%", "3: 20%"]
    for axes in near:
        assert float(axes.get_title().split()[-1].removesuffix("°")) == pytest.approx(0.5 * 3**0.5, abs=0.15)
    assert sphere.get_title() == "5 peaks"
    assert len(sphere.lines[0].get_xdata()) == len(draws)  # once more for the other view that looks alike


@pytest.fixture(scope="module")
def posed(toy: Path, command: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one map and poses about the table's."""
    out = tmp_path_factory.mktemp("posed") / "run"
    asked = ("fit", toy, "--first", 150, "--box", 16, "--poses", "refine", "--turn-sd-deg", 2, "--shift-sd-px", 0.5)
    asked = (*asked, "--model", "homogeneous", "--threads", 1, "--device", "cpu", "--quiet")
    assert command(*asked, "-o", out) == 0
    return out


def test_the_pose_of_a_particle_is_as_unsure_as_its_run_says(posed: Path) -> None:
    run = Run.load(posed)
    assert run.poses is not None
    found = of_particle(run, 12, draws=400)
    best, spread = run.poses.best[0][12], run.poses.spread.angle_deg[12]
    rms = angle_deg(found.rotation, best).square().mean().sqrt()
    assert float(rms) == pytest.approx(float(spread), rel=0.15)
    assert found.table is not None
    torch.testing.assert_close(found.table, run.source().rotation[12], rtol=0, atol=1e-4)  # type: ignore[operator]


def test_the_command_draws_the_pose_of_a_particle_beside_the_map_of_all(
    posed: Path, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("uncertainty", posed, "--draws", 3, "--keep", 0, "--device", "cpu", "--quiet")
    out = tmp_path / "sure"
    assert command(*asked, "--index", 12, "-o", out) == 0
    assert "pose.png" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "mean.mrc",
        "sd.mrc",
        "uncertainty.png",
        "fsc.tsv",
        "fsc.png",
        "pose.png",
    }
    assert command(*asked, "-o", out, "--overwrite") == 0
    assert not (out / "pose.png").exists()  # it was of another time
    assert command(*asked, "--index", 150, "-o", tmp_path / "none") == 2
    assert not (tmp_path / "none").exists()


def test_a_pose_that_is_known_has_no_posterior(homogeneous_run: Path) -> None:
    with pytest.raises(ValueError, match="are known; fit with --poses"):
        of_particle(Run.load(homogeneous_run), 3)
