"""Every command, as it is typed."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from pyro_cryo.analysis.latent import kmeans, nearest, principal_path
from pyro_cryo.cli import build_parser
from pyro_cryo.cli.fit import DESCENT
from pyro_cryo.data.mrc_map import read_map
from pyro_cryo.data.particles import Particles
from pyro_cryo.inference.fit import Settings
from pyro_cryo.inference.run import Run
from pyro_cryo.recipes import recipes

Command = Callable[..., int]

OWN_MODEL = '''
import pyro
import pyro.distributions as dist
from pyro_cryo.models.cryodrgn import CryoDRGN

class Narrow(CryoDRGN):
    """z ~ Normal(0, spread^2)."""

    def __init__(self, box, zdim=2, spread=0.01, noise_groups=1):
        super().__init__(box, zdim, width=16, layers=1, noise_groups=noise_groups)
        self.spread = spread

    def latent(self):
        return pyro.sample("z", dist.Normal(self.log_sigma.new_zeros(self.zdim), self.spread).to_event(1))
'''


def options(*arguments: object) -> tuple[object, ...]:
    return *arguments, "--threads", 1, "--device", "cpu", "--quiet"


# -------------------------------------------------------------------------------------------------------------- fit
def test_fit_homogeneous_leaves_maps_and_their_record(toy: Path, homogeneous_run: Path) -> None:
    particles = Particles.open(toy)
    record = json.loads((homogeneous_run / "run.json").read_text())
    assert record["model"] == {"module": "pyro_cryo.models.homogeneous", "class": "Homogeneous"}
    assert record["arguments"] == {"box": 32, "symmetry": "C1", "mask": "auto", "noise_groups": 1}
    assert record["particles"] == {"path": str(toy), "count": 600, "fingerprint": particles.fingerprint()}
    assert record["settings"]["seed"] == 0
    assert record["versions"]["torch"] == torch.__version__
    for name in ("map", "sd", "half1", "half2", "mask"):
        with mrcfile.open(homogeneous_run / f"{name}.mrc") as file:
            assert file.data.shape == (32, 32, 32)
            assert_allclose(float(file.voxel_size.x), particles.apix, rtol=1e-5)
            assert tuple(float(file.header.origin[axis]) for axis in "xyz") == (0, 0, 0)
    sd, mask = (read_map(homogeneous_run / f"{name}.mrc")[0] for name in ("sd", "mask"))
    assert float(sd[mask > 0.5].min()) > 0
    columns = (homogeneous_run / "fsc.tsv").read_text().splitlines()
    assert columns[0].split("\t")[:3] == ["shell", "resolution_angstrom", "unmasked"]
    assert len(columns) == 1 + 16
    resolution, first = np.loadtxt(columns[1:], usecols=(1, 2)).T
    assert_allclose(resolution, 32 * particles.apix / np.arange(1, 17), rtol=1e-3)
    assert first[0] > 0.99
    state = torch.load(homogeneous_run / "checkpoint.pt", weights_only=True)
    assert state["finished"] is True


def test_fit_refines_poses_and_goes_on_from_its_table(
    toy: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("fit", toy, "--first", 150, "--box", 16, "--poses", "refine", "--turn-sd-deg", 2, "--shift-sd-px", 0.5)
    asked = (*asked, "--defocus-sd-angstrom", 300)
    out = tmp_path / "run"
    assert command(*options(*asked, "-o", out, "--model", "homogeneous")) == 0
    assert "defocus off by" in capsys.readouterr().out
    record = json.loads((out / "run.json").read_text())
    assert record["poses"]["class"] == "PoseAbout"
    assert record["poses"]["arguments"] == {"turn_sd_deg": 2.0, "shift_sd_px": 0.5, "defocus_sd_angstrom": 300.0}
    refined = Particles.open(out / "particles.star")
    before = Particles.open(toy, first=150)
    turned = (refined.rotation @ before.rotation.mT).diagonal(dim1=1, dim2=2).sum(1)
    assert 0 < float((3 - turned).mean()) < 0.1
    again = ("fit", out / "particles.star", "-o", tmp_path / "next", "--model", "homogeneous", "--box", 16)
    assert command(*options(*again)) == 0
    assert Particles.open(tmp_path / "next" / "particles.star").has_poses


def test_fit_homogeneous_finds_the_average_of_the_truth(toy: Path, homogeneous_run: Path) -> None:
    with np.load(toy.parent / "truth.npz") as truth:
        average = truth["volumes"][truth["state"]].mean(0)
    volume = read_map(homogeneous_run / "map.mrc")[0].numpy()
    centred = average - average.mean(), volume - volume.mean()
    assert float((centred[0] * centred[1]).sum() / np.prod([np.linalg.norm(c) for c in centred])) > 0.95


def test_fit_returns_the_particles_with_the_same_poses(toy: Path, homogeneous_run: Path, cryodrgn_run: Path) -> None:
    before = Particles.open(toy)
    for run in (homogeneous_run, cryodrgn_run):
        after = Particles.open(run / "particles.star")
        assert_allclose(after.rotation, before.rotation, atol=1e-5)
        assert_allclose(after.translation, before.translation, atol=1e-4)
        assert after.apix == pytest.approx(before.apix, rel=1e-6)
        assert_array_equal(after.batch(slice(0, 2)).image, before.batch(slice(0, 2)).image)


def test_fit_cryodrgn_leaves_latents_and_a_log(cryodrgn_run: Path) -> None:
    with np.load(cryodrgn_run / "latent.npz") as latent:
        assert set(latent) == {"index", "z", "z_cov"}
        assert_array_equal(latent["index"], np.arange(600))
        assert latent["z"].shape == (600, 2)
        assert latent["z_cov"].shape == (600, 2, 2)
        assert (np.linalg.eigvalsh(latent["z_cov"]) > 0).all()
    log = [json.loads(line) for line in (cryodrgn_run / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [1, 2, 3, 4]
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[-1]["images_per_second"] > 0
    record = json.loads((cryodrgn_run / "run.json").read_text())
    assert record["arguments"]["width"] == 32
    assert record["settings"]["epochs"] == 4


def test_fit_of_the_users_own_model(toy: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "narrow.py").write_text(OWN_MODEL)
    small = ("--first", 200, "--epochs", 2, "--set", "spread=0.02", "--zdim", 3)
    assert command("fit", toy, "-o", tmp_path / "run", *options("--model", tmp_path / "narrow.py", *small)) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["model"]["file"], record["model"]["class"]) == (str(tmp_path / "narrow.py"), "Narrow")
    assert (record["arguments"]["spread"], record["arguments"]["zdim"]) == (0.02, 3)
    run = Run.load(tmp_path / "run")
    assert type(run.model).__name__ == "Narrow"
    assert run.latent.z.shape == (200, 3)
    # under a prior fifty times narrower z stays close to 0
    assert command("fit", toy, "-o", tmp_path / "wide", *options("--model", tmp_path / "narrow.py", *small[:-4])) == 0
    assert np.abs(run.latent.z).mean() < 0.2


def test_fit_of_some_images_in_a_smaller_box(toy: Path, tmp_path: Path, command: Command) -> None:
    rows = np.arange(0, 600, 3)
    np.save(tmp_path / "rows.npy", rows)
    asked = (
        "--model",
        "homogeneous",
        "--box",
        24,
        "--subset",
        tmp_path / "rows.npy",
        "--first",
        150,
        "--window",
        0.9,
        "--normalize",
    )
    assert command("fit", toy, "-o", tmp_path / "run", *options(*asked)) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())["particles"]
    assert record["count"] == 150
    assert (record["box"], record["first"], record["window"], record["normalize"]) == (24, 150, 0.9, True)
    volume, apix = read_map(tmp_path / "run" / "map.mrc")
    whole = Particles.open(toy)
    assert volume.shape == (24, 24, 24)
    assert apix == pytest.approx(whole.apix * 32 / 24, rel=1e-5)
    kept = Particles.open(tmp_path / "run" / "particles.star")
    assert_allclose(kept.rotation, whole.rotation[rows[:150]], atol=1e-5)


def test_inverted_images_give_the_negative_map(toy: Path, tmp_path: Path, homogeneous_run: Path, command) -> None:
    assert (
        command("fit", toy, "-o", tmp_path / "run", *options("--model", "homogeneous", "--invert", "--mask", "none"))
        == 0
    )
    dark, bright = (read_map(folder / "map.mrc")[0] for folder in (tmp_path / "run", homogeneous_run))
    assert float((dark * bright).sum() / (dark.norm() * bright.norm())) < -0.95
    assert float(read_map(tmp_path / "run" / "mask.mrc")[0].min()) == 1


def test_a_map_with_symmetry_has_it(toy: Path, tmp_path: Path, command: Command) -> None:
    assert (
        command(
            "fit", toy, "-o", tmp_path / "run", *options("--model", "homogeneous", "--symmetry", "C2", "--mask", "none")
        )
        == 0
    )
    volume = read_map(tmp_path / "run" / "map.mrc")[0][1:, 1:, 1:]
    assert float((volume.flip(-1, -2) - volume).norm() / volume.norm()) < 0.05
    assert float((volume.flip(-1, -3) - volume).norm() / volume.norm()) > 0.2  # about no other axis


def test_a_run_folder_is_resumed_or_refused(toy: Path, tmp_path: Path, command: Command) -> None:
    asked = options("--model", "homogeneous", "--first", 100, "--mask", "none")
    assert command("fit", toy, "-o", tmp_path / "run", *asked, "--resume") == 0  # nothing there: it starts
    written = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert command("fit", toy, "-o", tmp_path / "run", *asked) == 2
    assert command("fit", toy, "-o", tmp_path / "run", *asked, "--resume") == 0  # finished: nothing to do
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


# ---------------------------------------------------------------------------------------------------------- volumes
def series(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "volumes.npz") as file:
        return dict(file)


def test_volumes_at_particles(cryodrgn_run: Path, tmp_path: Path, command: Command) -> None:
    assert command("volumes", cryodrgn_run, "--index", 0, 100, 5, "-o", tmp_path / "out") == 0
    found, run = series(tmp_path / "out"), Run.load(cryodrgn_run)
    assert set(found) == {"index", "z", "volumes"}
    assert_array_equal(found["index"], [0, 100, 5])
    assert_array_equal(found["z"], run.latent.z[[0, 100, 5]])
    assert_array_equal(found["volumes"], run.volume(run.latent.z[[0, 100, 5]]))
    files = sorted((tmp_path / "out").glob("*.mrc"))
    assert [path.name for path in files] == ["vol_000.mrc", "vol_001.mrc", "vol_002.mrc"]
    for path, volume in zip(files, found["volumes"], strict=True):
        stored, apix = read_map(path)
        assert_array_equal(stored, volume)
        assert apix == pytest.approx(run.particles.apix, rel=1e-5)
    script = (tmp_path / "out" / "series.cxc").read_text()
    assert all(path.name in script for path in files)


def test_volumes_at_clusters_and_along_a_component(cryodrgn_run: Path, tmp_path: Path, command: Command) -> None:
    z = Run.load(cryodrgn_run).latent.z
    assert command("volumes", cryodrgn_run, "--kmeans", 4, "-o", tmp_path / "k") == 0
    found = series(tmp_path / "k")
    assert_array_equal(found["index"], kmeans(z, 4).nearest)
    assert_array_equal(found["z"], z[found["index"]])
    assert command("volumes", cryodrgn_run, "--path-along", 1, "--steps", 3, "-o", tmp_path / "p") == 0
    found = series(tmp_path / "p")
    assert_array_equal(found["index"], nearest(z, principal_path(z, 1, 3)))
    assert_array_equal(found["z"], z[found["index"]])
    assert found["volumes"].shape == (3, 32, 32, 32)


def test_volumes_at_given_values(cryodrgn_run: Path, tmp_path: Path, command: Command) -> None:
    points = np.array([[0.5, -1.0], [0.0, 2.0]])
    np.savetxt(tmp_path / "z.txt", points)
    np.save(tmp_path / "z.npy", points)
    for name in ("z.txt", "z.npy"):
        assert command("volumes", cryodrgn_run, "--z-values", tmp_path / name, "-o", tmp_path / name[2:]) == 0
        assert_array_equal(series(tmp_path / name[2:])["z"], points)
    assert_array_equal(series(tmp_path / "txt")["volumes"], series(tmp_path / "npy")["volumes"])


def test_volumes_filtered_and_mirrored(cryodrgn_run: Path, tmp_path: Path, command: Command) -> None:
    apix = Run.load(cryodrgn_run).particles.apix
    asked = {"plain": (), "smooth": ("--low-pass", 8 * apix), "flip": ("--flip",), "sharp": ("--bfactor", -500)}
    found = {}
    for name, how in asked.items():
        assert command("volumes", cryodrgn_run, "--index", 3, *how, "-o", tmp_path / name) == 0
        found[name] = torch.from_numpy(series(tmp_path / name)["volumes"][0])
    power = {name: torch.fft.fftn(volume).abs() for name, volume in found.items()}
    assert float(power["smooth"][10, 0, 0]) < 1e-3 * float(power["plain"][10, 0, 0])
    assert_allclose(power["smooth"][1, 0, 0], power["plain"][1, 0, 0], rtol=1e-3)
    assert_array_equal(found["flip"][1:], found["plain"][1:].flip(0))
    assert float(power["sharp"][8, 0, 0]) > 1.05 * float(power["plain"][8, 0, 0])


def test_volumes_are_replaced_only_when_asked(cryodrgn_run: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out"
    assert command("volumes", cryodrgn_run, "--index", 0, 1, "-o", out) == 0
    assert command("volumes", cryodrgn_run, "--index", 2, "-o", out) == 2
    assert_array_equal(series(out)["index"], [0, 1])
    assert command("volumes", cryodrgn_run, "--index", 2, "-o", out, "--overwrite") == 0
    assert [path.name for path in out.glob("*.mrc")] == ["vol_000.mrc"]


def test_the_one_map_of_a_homogeneous_run(homogeneous_run: Path, tmp_path: Path, command: Command) -> None:
    assert command("volumes", homogeneous_run, "-o", tmp_path / "out") == 0
    found = series(tmp_path / "out")
    assert found["z"].shape == (1, 0)
    assert_array_equal(found["volumes"][0], read_map(homogeneous_run / "map.mrc")[0])


def test_volumes_at_peaks(cryodrgn_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command) -> None:
    run = Path(shutil.copytree(cryodrgn_run, tmp_path / "run"))
    near = np.arange(600) % 3 > 0  # the state of most images
    z = np.float32(np.where(near[:, None], [0.0, 0.0], [5.0, 3.0]) + np.random.default_rng(0).normal(size=(600, 2)) / 2)
    np.savez(run / "latent.npz", index=np.arange(600), z=z, z_cov=np.zeros((600, 2, 2)))
    assert command("volumes", run, "--peaks", 1, "-o", tmp_path / "one", "--quiet") == 0
    assert near[series(tmp_path / "one")["index"]].tolist() == [True]
    assert capsys.readouterr().err == ""
    assert command("volumes", run, "--peaks", 9, "-o", tmp_path / "nine", "--quiet") == 0
    found, said = series(tmp_path / "nine"), capsys.readouterr()
    assert near[found["index"]].tolist() == [True, False]
    assert_array_equal(found["z"], z[found["index"]])
    assert said.err == "pyro-cryo: warning: the density of z has 2 peaks, not 9; so many maps are made\n"
    assert said.out.startswith("2 maps")


# ----------------------------------------------------------------------------------------------------------- encode
def latents(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def test_encoded_particles_have_the_z_that_the_fit_gives_them(
    toy: Path, cryodrgn_run: Path, tmp_path: Path, command: Command
) -> None:
    assert command("encode", cryodrgn_run, toy, "-o", tmp_path / "all.npz", "--quiet") == 0
    found, fitted = latents(tmp_path / "all.npz"), latents(cryodrgn_run / "latent.npz")
    assert set(found) == set(fitted)
    for name in fitted:
        assert_allclose(found[name], fitted[name], atol=1e-5)
    np.save(tmp_path / "rows.npy", [7, 300, 5])
    some = ("encode", cryodrgn_run, toy, "--subset", tmp_path / "rows.npy", "-o", tmp_path / "some.npz", "--quiet")
    assert command(*some) == 0
    assert_array_equal(latents(tmp_path / "some.npz")["index"], [0, 1, 2])
    assert_allclose(latents(tmp_path / "some.npz")["z"], fitted["z"][[7, 300, 5]], atol=1e-5)
    assert command(*some) == 2  # it exists
    assert command(*some, "--first", 2, "--overwrite") == 0
    assert len(latents(tmp_path / "some.npz")["z"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.npz", "rows.npy", "some.npz"]


def test_images_are_encoded_as_the_run_treated_its_own(toy: Path, tmp_path: Path, command: Command) -> None:
    small = ("--model", "cryodrgn", "--zdim", 2, "--set", "width=16", "--epochs", 1, "--first", 60)
    treated = ("--box", 24, "--window", 0.9, "--normalize", "--invert")
    assert command("fit", toy, "-o", tmp_path / "run", *options(*small, *treated)) == 0
    asked = ("encode", tmp_path / "run", toy, "--first", 60, "--quiet")
    fitted = latents(tmp_path / "run" / "latent.npz")["z"]
    assert command(*asked, "-o", tmp_path / "same.npz") == 0
    assert_allclose(latents(tmp_path / "same.npz")["z"], fitted, atol=1e-5)
    for other in (("--no-invert",), ("--no-normalize",), ("--window", 0.5)):
        assert command(*asked, *other, "-o", tmp_path / "other.npz", "--overwrite") == 0
        assert np.abs(latents(tmp_path / "other.npz")["z"] - fitted).max() > 1e-4


# ---------------------------------------------------------------------------------------------------------- compare
def test_runs_are_compared_on_particles_that_none_has_seen(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: Command
) -> None:
    small = ("--first", 300, "--box", 16, "--window", 0.9)
    for name, model in (("still", "homogeneous"), ("moving", "linear_subspace")):
        assert command("fit", toy, "-o", tmp_path / name, *options("--model", model, *small)) == 0
    runs = (tmp_path / "still", tmp_path / "moving")
    capsys.readouterr()
    assert command("compare", *runs, toy, "--unseen", "-o", tmp_path / "table.tsv", "--quiet") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert command("compare", *runs, "--quiet") == 0  # on what the first run's file has beyond
    assert capsys.readouterr().out == printed.out
    assert printed.out.startswith("log p of 300 particles")
    assert "moving explains the 300 particles best" in printed.out
    table = np.genfromtxt(tmp_path / "table.tsv", names=True, dtype=None, delimiter="\t", encoding="utf-8")
    assert table.dtype.names == ("run", "log_p", "below", "error", "k_bad", "weight")
    assert table["run"].tolist() == ["moving", "still"]
    assert table["below"][1] == pytest.approx(table["log_p"][0] - table["log_p"][1], abs=1e-3)
    np.save(tmp_path / "rows.npy", np.arange(300, 600))
    assert command("compare", *runs, toy, "--subset", tmp_path / "rows.npy") == 0
    again = capsys.readouterr()
    assert again.out == printed.out
    assert "evidence: 100%" in again.err
    shutil.copytree(runs[1], tmp_path / "again")
    assert command("compare", f"{runs[0]},{tmp_path / 'again'}", runs[1], toy, "--unseen", "--quiet") == 0
    assert "no clear winner" in capsys.readouterr().out  # the better fit of `still` is the other's
    assert command("compare", *runs, toy, "--quiet") == 2
    assert "300 of 600 images were fitted by still" in capsys.readouterr().err
    assert command("compare", *runs, toy, "--unseen", "--window", 0.8, "--quiet") == 2
    assert "still was fitted with window 0.9, the particles have 0.8" in capsys.readouterr().err
    assert command("fit", toy, "-o", tmp_path / "plain", *options("--model", "homogeneous", *small[:4])) == 0
    assert command("compare", runs[1], tmp_path / "plain", toy, "--unseen", "--quiet") == 2
    assert "moving was fitted with window 0.9 and plain with None" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- analyze, select
def test_analyze_both_kinds(cryodrgn_run: Path, homogeneous_run: Path, tmp_path: Path, command: Command) -> None:
    small = ("--kmeans", 3, "--steps", 3, "--components", 2)
    assert command("analyze", cryodrgn_run, "-o", tmp_path / "z", *small) == 0
    pictures = {path.name for path in (tmp_path / "z").glob("*.png")}
    assert pictures == {"learning_curve.png", "latent.png", "kmeans.png", "pc1.png", "pc2.png"}
    assert series(tmp_path / "z" / "kmeans3")["volumes"].shape == (3, 32, 32, 32)
    assert series(tmp_path / "z" / "pc2")["volumes"].shape == (3, 32, 32, 32)
    assert command("analyze", homogeneous_run, "-o", tmp_path / "map") == 0
    assert {path.name for path in (tmp_path / "map").iterdir()} == {"map.png", "fsc.png"}


def test_selected_particles_return_as_star(cryodrgn_run: Path, toy: Path, tmp_path: Path, command: Command) -> None:
    whole = Particles.open(toy)
    label = kmeans(Run.load(cryodrgn_run).latent.z, 5).label
    kept = tmp_path / "kept.star"
    assert command("select", cryodrgn_run, "--cluster", 1, 3, "--kmeans", 5, "-o", kept) == 0
    rows = np.flatnonzero(np.isin(label, [1, 3]))
    assert_allclose(Particles.open(kept).rotation, whole.rotation[rows], atol=1e-5)
    (tmp_path / "rows.txt").write_text("7\n3\n")
    assert command("select", cryodrgn_run, "--index", tmp_path / "rows.txt", "-o", kept) == 2  # it exists
    assert command("select", cryodrgn_run, "--index", tmp_path / "rows.txt", "-o", kept, "--overwrite") == 0
    assert_array_equal(Particles.open(kept).batch(slice(None)).image, whole.batch([7, 3]).image)


def test_selected_particles_return_as_cs(toy: Path, tmp_path: Path, command: Command) -> None:
    rows = cs_table(Particles.open(toy), toy.parent / "particles.mrcs")
    with (tmp_path / "in.cs").open("wb") as file:
        np.save(file, rows)
    assert (
        command("fit", tmp_path / "in.cs", "-o", tmp_path / "run", *options("--model", "homogeneous", "--first", 100))
        == 0
    )
    np.save(tmp_path / "rows.npy", [2, 50])
    assert command("select", tmp_path / "run", "--index", tmp_path / "rows.npy", "-o", tmp_path / "out.cs") == 0
    assert_array_equal(np.load(tmp_path / "out.cs")["uid"], rows["uid"][[2, 50]])


def cs_table(particles: Particles, stack: Path) -> np.ndarray:
    """The particles as cryoSPARC has them."""
    from scipy.spatial.transform import Rotation

    ctf, count = particles.ctf, len(particles)
    assert ctf is not None
    columns: dict[str, np.ndarray] = {
        "uid": np.arange(count, dtype=np.uint64) + 10**12,
        "blob/path": np.full(count, str(stack).encode()),
        "blob/idx": np.arange(count, dtype=np.uint32),
        "blob/shape": np.full((count, 2), particles.box, np.uint32),
        "blob/psize_A": np.full(count, particles.apix, np.float32),
        "blob/sign": np.ones(count, np.float32),
        "alignments3D/pose": Rotation.from_matrix(particles.rotation.numpy()).as_rotvec().astype(np.float32),
        "alignments3D/shift": -particles.translation.numpy(),
        "alignments3D/psize_A": np.full(count, particles.apix, np.float32),
        "ctf/accel_kv": ctf.voltage_kv.numpy(),
        "ctf/cs_mm": ctf.cs_mm.numpy(),
        "ctf/amp_contrast": ctf.amplitude_contrast.numpy(),
        "ctf/df1_A": ctf.defocus_u_angstrom.numpy(),
        "ctf/df2_A": ctf.defocus_v_angstrom.numpy(),
        "ctf/df_angle_rad": np.deg2rad(ctf.defocus_angle_deg.numpy()),
        "ctf/phase_shift_rad": np.zeros(count, np.float32),
    }
    table = np.empty(count, [(name, values.dtype, values.shape[1:]) for name, values in columns.items()])
    for name, values in columns.items():
        table[name] = values
    return table


# --------------------------------------------------------------------------------------------------------- simulate
def test_simulated_cases_open(tmp_path: Path, homogeneous_run: Path, command: Command) -> None:
    atoms = [f"ATOM  {i:5d}  CA  ALA A{i:4d}    {3.8 * i:8.3f}{i % 3 * 4.0:8.3f}{0.0:8.3f}" for i in range(1, 30)]
    (tmp_path / "x.pdb").write_text("\n".join(atoms) + "\n")
    small = ("--images", 6, "--box", 24, "--seed", 1, "--snr", 10)
    sources = {
        "toy": ("--toy", "classes"),
        "pdb": ("--pdb", tmp_path / "x.pdb"),
        "map": ("--map", homogeneous_run / "map.mrc"),
    }
    for name, source in sources.items():
        assert command("simulate", *source, *small, "-o", tmp_path / name) == 0
        particles = Particles.open(tmp_path / name / "particles.star")
        assert (len(particles), particles.box) == (6, 24)
        with np.load(tmp_path / name / "truth.npz") as truth:
            assert_allclose(particles.rotation, truth["rotation"], atol=1e-5)
            assert_allclose(particles.translation, truth["shift_px"], atol=1e-4)
    assert command("simulate", "--toy", "hinge", *small, "-o", tmp_path / "toy") == 2  # a case is there
    assert command("simulate", "--toy", "hinge", *small, "-o", tmp_path / "toy", "--overwrite") == 0


# ------------------------------------------------------------------------------------------------- help, processes
def subcommands() -> dict[str, argparse.ArgumentParser]:
    (group,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return group.choices


@pytest.mark.parametrize("name", ["fit", "volumes", "compare", "encode", "analyze", "select", "simulate"])
def test_help_tells_every_option_with_its_default(name: str, capsys: pytest.CaptureFixture[str], command) -> None:
    assert name in subcommands()
    with pytest.raises(SystemExit) as left:
        command(name, "--help")
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("(default") == len(set(text.split("(default"))) - 1 or "(default: all)" in text
    for action in subcommands()[name]._actions:
        assert action.help
        assert all(option in text for option in action.option_strings)
        if isinstance(action.default, int | float | str) and not isinstance(action.default, bool):
            default = action.default
            assert default == argparse.SUPPRESS or "(default" in action.help or f"(default: {default})" in text
    assert "SUPPRESS" not in text
    assert "None" not in text


def test_help_tells_the_defaults_of_the_settings() -> None:
    told = {action.dest: str(action.help) for action in subcommands()["fit"]._actions}
    for name in DESCENT:
        default = getattr(Settings, name)
        assert told[name].endswith(f"(default: {default})") or default is False


@pytest.mark.parametrize("name", ["volumes", "encode", "analyze", "simulate"])
def test_a_bar_shows_how_far_it_is_unless_quiet(
    name: str, toy: Path, cryodrgn_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: Command
) -> None:
    asked, bar = {
        "volumes": (("volumes", cryodrgn_run, "--index", 0, 1, "-o", tmp_path / "out"), "out: 100%"),
        "encode": (("encode", cryodrgn_run, toy, "-o", tmp_path / "out.npz"), "encode: 100%"),
        "analyze": (("analyze", cryodrgn_run, "--steps", 2, "--kmeans", 2, "-o", tmp_path / "out"), "pc2: 100%"),
        "simulate": (("simulate", "--toy", "hinge", "--images", 2, "--box", 8, "-o", tmp_path / "out"), "noise: 100%"),
    }[name]
    again = ("--overwrite",) if name != "analyze" else ()
    assert command(*asked) == 0
    assert bar in capsys.readouterr().err
    assert command(*asked, *again, "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_help_names_every_recipe(capsys: pytest.CaptureFixture[str], command: Command) -> None:
    with pytest.raises(SystemExit):
        command("fit", "--help")
    text = capsys.readouterr().out
    assert recipes()
    assert all(name in text for name in recipes())


def test_as_a_process(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        asked = [sys.executable, "-m", "pyro_cryo.cli", *arguments]
        return subprocess.run(asked, capture_output=True, text=True, check=False)

    version = run("--version")
    assert (version.returncode, version.stdout.split()[0]) == (0, "pyro-cryo")
    wrong = run("fit", str(tmp_path / "none.star"), "-o", str(tmp_path / "run"))
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == f"pyro-cryo: error: {tmp_path}/none.star does not exist; check the path\n"


def test_help_loads_nothing_heavy() -> None:
    check = (
        "import sys, pyro_cryo.cli as c; c.build_parser().format_help();"
        "print([m for m in ('torch', 'pandas', 'matplotlib', 'scipy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_debug_shows_the_traceback(tmp_path: Path, command: Command) -> None:
    with pytest.raises(FileNotFoundError):
        command("fit", tmp_path / "none.star", "-o", tmp_path / "run", "--debug")


def test_arguments_that_a_recipe_hands_on(toy: Path, tmp_path: Path, command: Command) -> None:
    asked = ("--model", "mixture", "--zdim", 1, "--set", "states=3", "--set", "width=8", "--mask", "none")
    assert command("fit", toy, "-o", tmp_path / "run", *options(*asked, "--epochs", 1, "--first", 40)) == 0
    arguments = json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]
    assert (arguments["states"], arguments["width"], arguments["mask"]) == (3, 8, "none")
    assert Run.load(tmp_path / "run").model.centre.shape == (3, 1)
