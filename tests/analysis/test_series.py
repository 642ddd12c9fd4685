"""Where in z maps are made, and how a series is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from pyro_cryo.analysis.latent import pca, principal_path
from pyro_cryo.analysis.maps import low_pass, sharpen
from pyro_cryo.analysis.series import (
    along_component,
    at_clusters,
    at_particles,
    at_peaks,
    finishing,
    from_file,
    own_bfactor,
    write_series,
)
from pyro_cryo.data.mrc_map import read_map, write_map
from pyro_cryo.inference.run import Latent, Run
from pyro_cryo.physics.fourier import flip_hand


@pytest.fixture(scope="module")
def run(cryodrgn_run: Path) -> Run:
    return Run.load(cryodrgn_run)


def test_at_particles_in_the_order_asked_for(run: Run) -> None:
    index, z = at_particles(run, [7, 0, 7])
    assert_array_equal(index, [7, 0, 7])
    assert_array_equal(z, run.latent.z[[7, 0, 7]])


def test_clusters_are_at_particles_and_repeat(run: Run) -> None:
    index, z = at_clusters(run, 5)
    assert len(set(index)) == 5
    assert_array_equal(z, run.latent.z[index])
    assert_array_equal(at_clusters(run, 5)[0], index)


def test_peaks_are_at_particles_and_fewer_than_asked_for_are_told(run: Run) -> None:
    rng = np.random.default_rng(0)
    z = np.float32(rng.normal(size=(600, 2)) + 8.0 * (np.arange(600)[:, None] % 3 == 0))
    planted = Run(run.model, run.source)
    planted.latent = Latent(np.arange(600), z, np.zeros((600, 2, 2)))
    index, points = at_peaks(planted, 1)
    assert index[0] % 3 > 0  # two thirds of the images
    assert_array_equal(points, z[index])
    with pytest.warns(UserWarning, match="the density of z has 2 peaks, not 5; so many maps are made"):
        index, _ = at_peaks(planted, 5)
    assert_array_equal(index % 3 == 0, [False, True])
    with pytest.raises(ValueError, match="0 peaks; give 1 or more"):
        at_peaks(planted, 0)


def test_a_component_runs_between_its_percentiles(run: Run) -> None:
    """Through the particles nearest to a path that has just the scores asked for."""
    index, z = along_component(run, 2, 5)
    assert_allclose(z, run.latent.z[index])
    parts = pca(run.latent.z)
    asked = np.linspace(*np.percentile(parts.project(run.latent.z)[:, 1], [5, 95]), 5)
    path = principal_path(run.latent.z, 2, 5)
    assert_allclose(parts.project(path)[:, 1], asked, atol=1e-5)
    assert_array_equal(index, np.linalg.norm(run.latent.z[:, None] - path, axis=-1).argmin(0))


def test_rows_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("0.5 1\n")
    assert_array_equal(from_file(tmp_path / "one.txt", 2)[1], [[0.5, 1]])
    np.save(tmp_path / "column.npy", np.arange(3.0))
    assert_array_equal(from_file(tmp_path / "column.npy", 1)[1], [[0], [1], [2]])
    np.save(tmp_path / "row.npy", np.arange(3.0))
    assert_array_equal(from_file(tmp_path / "row.npy", 3)[1], [[0, 1, 2]])
    np.save(tmp_path / "deep.npy", np.zeros((2, 2, 2)))
    (tmp_path / "none.txt").write_text("")
    for name in ("deep.npy", "none.txt"):
        with pytest.raises(ValueError, match=name):
            from_file(tmp_path / name, 2)


def test_finishing_in_this_order() -> None:
    volume = torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(finishing(2.0, None, None, False)(volume), volume)
    expected = flip_hand(sharpen(low_pass(volume, 2.0, 8.0), 2.0, -50.0))
    assert torch.equal(finishing(2.0, 8.0, -50.0, True)(volume), expected)


def test_a_series_replaces_a_longer_one_and_nothing_else(run: Run, tmp_path: Path) -> None:
    out, plain = tmp_path / "maps", finishing(run.particles.apix, None, None, False)
    write_series(run, out, *at_particles(run, [0, 1, 2]), plain)
    for name in ("vol_mine.mrc", "notes.txt"):
        (out / name).write_text("kept")
    paths = write_series(run, out, *at_particles(run, [3]), plain)
    names = {path.name for path in out.iterdir()}
    assert names == {"vol_000.mrc", "volumes.npz", "series.cxc", "vol_mine.mrc", "notes.txt"}
    assert_array_equal(read_map(paths[0])[0], run.volume(run.latent.z[3]))


def test_one_contour_level_for_the_series(run: Run, tmp_path: Path) -> None:
    write_series(run, tmp_path, *at_particles(run, [0, 1]), finishing(1.0, None, None, False))
    lines = (tmp_path / "series.cxc").read_text().splitlines()
    assert lines[0] == 'open "vol_000.mrc" "vol_001.mrc" vseries true'
    level = float(lines[1].split(" level ")[1].split()[0])
    with np.load(tmp_path / "volumes.npz") as file:
        assert (file["volumes"] > level).mean() == pytest.approx(0.03, abs=1e-3)


def write_halves(folder: Path, decay_angstrom2: float, noise: float, apix: float) -> None:
    """In place of a run's maps: white density, 1 everywhere but for its decay, and half-maps of it."""
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"apix": apix}))
    generator = torch.Generator().manual_seed(0)
    truth = sharpen(torch.randn(32, 32, 32, generator=generator), apix, decay_angstrom2)
    halves = [truth + noise * torch.randn(32, 32, 32, generator=generator) for _ in range(2)]
    maps = {"map": truth, "half1": halves[0], "half2": halves[1], "mask": torch.ones(32, 32, 32)}
    for name, volume in maps.items():
        write_map(folder / f"{name}.mrc", volume, apix)


@pytest.mark.parametrize("decay", [40.0, 90.0])
def test_the_bfactor_of_a_run_undoes_the_decay_of_its_map(
    homogeneous_run: Path, tmp_path: Path, decay: float, command
) -> None:
    folder = Path(shutil.copytree(homogeneous_run, tmp_path / "run"))
    write_halves(folder, decay, 0.01, apix=1.5)
    run = Run.load(folder)
    assert own_bfactor(run) == pytest.approx(-decay, abs=6)
    assert command("volumes", folder, "--bfactor", "auto", "-o", tmp_path / "out", "--quiet") == 0
    assert_array_equal(read_map(tmp_path / "out" / "vol_000.mrc")[0], sharpen(run.volume(), 1.5, own_bfactor(run)))


def test_no_bfactor_is_made_up(run: Run, homogeneous_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no B factor can be estimated: .*cryodrgn has no half-maps; give a number"):
        own_bfactor(run)
    folder = Path(shutil.copytree(homogeneous_run, tmp_path / "run"))
    for noise, apix in ((0.01, 6.0), (100.0, 1.5)):  # pixels too coarse, half-maps that have nothing in common
        write_halves(folder, 40.0, noise, apix)
        with pytest.raises(ValueError, match="no B factor can be fitted between 10 and"):
            own_bfactor(Run.load(folder))
