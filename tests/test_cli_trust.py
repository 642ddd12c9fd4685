"""The commands that tell how sure a fit is: posterior, check, uncertainty."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from desk import Desk, Kind, assert_refused
from xarray import open_dataset

from pyro_cryo.data.mrc_map import read_map
from pyro_cryo.inference.run import Run

Command = Callable[..., int]

REFUSED: dict[str, tuple[Kind, str]] = {
    "posterior of nobody": (
        lambda d: ("posterior", d.moving, "--index", 0, 600, "-o", d.folder / "p.nc"),
        "particle 600 is asked for; the run has particles 0 to 599",
    ),
    "another format": (lambda d: ("posterior", d.moving, "-o", d.folder / "p.npz"), "is not .nc"),
    "posterior there": (lambda d: ("posterior", d.moving, "-o", d.file("p.nc", "mine")), "p.nc exists"),
    "no draws": (
        lambda d: ("posterior", d.moving, "--index", 0, "--draws", 0, "-o", d.folder / "p.nc", "--quiet"),
        "0 draws, 50 weighed, 0 with images; expected",
    ),
    "a page that is none": (lambda d: ("check", d.moving, "-o", d.folder / "page.pdf"), "is not .html"),
    "a check of one": (lambda d: ("check", d.moving, "--particles", 1), "--particles is 1; expected 25 or more"),
    "a check of no run": (lambda d: ("check", d.star.parent), "is not a run"),
    "against nothing": (lambda d: ("uncertainty", d.moving, "--against", 3, "-o", d.out), "give --index too"),
    "twice the same": (
        lambda d: ("posterior", d.moving, "--index", 3, 3, "-o", d.folder / "p.nc"),
        "particle 3 is asked for more than once",
    ),
    "too few to correct": (
        lambda d: (
            "posterior",
            d.moving,
            "--index",
            3,
            "--draws",
            9,
            "--corrected",
            "-o",
            d.folder / "p.nc",
            "--quiet",
        ),
        "9 draws have no tail",
    ),
    "one particle against itself": (
        lambda d: ("uncertainty", d.moving, "--index", 3, "--against", 3, "-o", d.out),
        "--against 3 is the particle of --index; give another",
    ),
    "a file for a folder": (
        lambda d: ("uncertainty", d.still, "-o", d.file("sure", "")),
        "sure is a file; give a folder with -o",
    ),
    "a file for the folder of pictures": (
        lambda d: ("analyze", d.still, "-o", d.file("shown", "")),
        "shown is a file; give a folder with -o",
    ),
    "a map of which": (lambda d: ("uncertainty", d.moving, "-o", d.out), "give --index"),
    "into the run": (lambda d: ("uncertainty", d.still, "-o", d.still), "is a run, whose maps would be replaced"),
    "no shapes": (lambda d: ("analyze", d.still, "-o", d.out, "--free-energy"), "has no latent coordinate z"),
    "a map of nobody": (
        lambda d: ("uncertainty", d.moving, "--index", 600, "-o", d.out, "--quiet"),
        "particle 600 is asked for",
    ),
    "a map without z": (lambda d: ("uncertainty", d.still, "--index", 0, "-o", d.out), "has no z"),
}


def test_posterior_writes_what_arviz_reads(cryodrgn_run: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "posterior.nc"
    asked = ("--index", 7, 3, "--draws", 30, "--weighed", 5, "--predictive", 2, "--device", "cpu", "--quiet")
    assert command("posterior", cryodrgn_run, "-o", out, *asked) == 0
    with open_dataset(out, group="posterior") as posterior:
        assert posterior["z"].shape == (1, 30, 2, 2)
        assert posterior["particle"].values.tolist() == [7, 3]
        run = Run.load(cryodrgn_run)
        mean = run.latent.z[[7, 3]]
        assert np.abs(posterior["z"].values[0].mean(0) - mean).max() < 1.0
    with open_dataset(out, group="posterior_predictive") as made:
        assert made["image"].dims == ("chain", "draw", "particle", "coefficient", "part")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["posterior.nc"]


def test_check_leaves_a_page_that_stands_by_itself(
    cryodrgn_run: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "check.html"
    assert command("check", cryodrgn_run, "-o", out, "--particles", 60, "--device", "cpu", "--quiet") == 0
    said = capsys.readouterr().out
    page = out.read_text()
    questions = re.findall(r"<h2>(.*?) <span", page)
    assert len(questions) >= 6
    assert all(question in said for question in questions if "&" not in question)
    assert page.count("data:image/png;base64,") >= 5
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert re.search(r"all in all: (sound|look at it|not to be trusted)", said)


def test_a_map_of_all_is_checked_too(homogeneous_run: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "check.html"
    assert command("check", homogeneous_run, "-o", out, "--particles", 40, "--device", "cpu", "--quiet") == 0
    assert "noise, as strong as it says" in out.read_text()


def test_uncertainty_of_a_network_is_of_z_alone(
    cryodrgn_run: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--index", 3, "--against", 9, "--draws", 4, "--keep", 1, "--device", "cpu", "--quiet")
    assert command("uncertainty", cryodrgn_run, "-o", tmp_path, *asked) == 0
    assert "of z alone" in capsys.readouterr().out
    names = ["difference.mrc", "draw_000.mrc", "mean.mrc", "probability.mrc", "sd.mrc", "uncertainty.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    probability = read_map(tmp_path / "probability.mrc")[0]
    assert float(probability.min()) >= 0
    assert float(probability.max()) <= 1


@pytest.mark.parametrize("name", REFUSED)
def test_one_line_and_nothing_written(name: str, desk: Desk, capsys: pytest.CaptureFixture[str], command) -> None:
    assert_refused(desk, REFUSED[name], command, capsys)
