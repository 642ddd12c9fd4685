"""What a user can get wrong in the commands around a fit: one line, and nothing written or lost."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from desk import Desk, Kind, Malicious, assert_refused


def moved(run: Path, **particles: object) -> None:
    """The run's record with other particles."""
    record = json.loads((run / "run.json").read_text())
    record["particles"] |= particles
    (run / "run.json").write_text(json.dumps(record))


RUNS: dict[str, tuple[Kind, str]] = {
    "no run": (lambda d: ("volumes", d.star.parent, "-o", d.out), "case is not a run: it has no run.json"),
    "no folder": (lambda d: ("analyze", d.folder / "gone"), "gone is not a run"),
    "a record that is not JSON": (
        lambda d: (d.file("cryodrgn/run.json", "{"), ("volumes", d.moving, "--index", 0, "-o", d.out))[1],
        "run.json is not JSON",
    ),
    "a record of something else": (
        lambda d: (d.file("cryodrgn/run.json", "{}"), ("volumes", d.moving, "--index", 0, "-o", d.out))[1],
        "run.json says nothing of model",
    ),
    "a checkpoint cut short": (
        lambda d: (os.truncate(d.moving / "checkpoint.pt", 9999), ("volumes", d.moving, "--index", 0, "-o", d.out))[1],
        "checkpoint.pt cannot be read",
    ),
    "a malicious checkpoint": (
        lambda d: (
            torch.save(Malicious(d.folder / "mark"), d.moving / "checkpoint.pt"),
            ("volumes", d.moving, "--index", 0, "-o", d.out),
        )[1],
        "checkpoint.pt cannot be read",
    ),
    "a checkpoint of another model": (
        lambda d: (
            shutil.copy(d.still / "checkpoint.pt", d.moving / "checkpoint.pt"),
            ("volumes", d.moving, "--index", 0, "-o", d.out),
        )[1],
        "does not fit CryoDRGN",
    ),
    "particles that have gone": (
        lambda d: (
            moved(d.moving, path="/gone.star"),
            ("select", d.moving, "--cluster", 0, "-o", d.folder / "kept.star"),
        )[1],
        "is a fit of /gone.star, which is not there; put it back",
    ),
    "particles that have changed": (
        lambda d: (
            moved(d.moving, path=str(d.star)),
            ("select", d.moving, "--cluster", 0, "-o", d.folder / "kept.star"),
        )[1],
        "the particles have changed since the fit",
    ),
    "image beyond": (lambda d: ("volumes", d.moving, "--index", 0, 600, "-o", d.out), "particle 600 is not there"),
    "negative image": (lambda d: ("volumes", d.moving, "--index", -1, "-o", d.out), "-1"),
    "which maps": (lambda d: ("volumes", d.moving, "-o", d.out), "which maps? give --index"),
    "two choices of maps": (lambda d: ("volumes", d.moving, "--index", 0, "--kmeans", 2, "-o", d.out), "--kmeans"),
    "z of one map": (lambda d: ("volumes", d.still, "--index", 0, "-o", d.out), "a fit of one map, without z"),
    "no z": (lambda d: ("volumes", d.moving, "--z-values", d.folder / "z.txt", "-o", d.out), "z.txt does not exist"),
    "z of another dimension": (
        lambda d: ("volumes", d.moving, "--z-values", d.file("z.txt", "1 2 3\n"), "-o", d.out),
        "rows of 3 numbers; this run's z has 2",
    ),
    "z that is no number": (
        lambda d: ("volumes", d.moving, "--z-values", d.file("z.txt", "1 two\n"), "-o", d.out),
        "z.txt holds no table of numbers",
    ),
    "z that is not finite": (
        lambda d: ("volumes", d.moving, "--z-values", d.file("z.npy", np.full((2, 2), np.nan)), "-o", d.out),
        "z.npy has a value that is not finite",
    ),
    "no clusters": (lambda d: ("volumes", d.moving, "--kmeans", 0, "-o", d.out), "0 clusters"),
    "no peaks": (lambda d: ("volumes", d.moving, "--peaks", 0, "-o", d.out), "0 peaks; give 1 or more"),
    "peaks of one map": (lambda d: ("volumes", d.still, "--peaks", 2, "-o", d.out), "a fit of one map, without z"),
    "peaks of z that does not vary": (
        lambda d: (
            np.savez(d.moving / "latent.npz", index=np.arange(9), z=np.ones((9, 2)), z_cov=np.zeros((9, 2, 2))),
            ("volumes", d.moving, "--peaks", 2, "-o", d.out),
        )[1],
        "z is the same for all 9 particles",
    ),
    "component beyond": (lambda d: ("volumes", d.moving, "--path-along", 3, "-o", d.out), "component 3 of 2"),
    "no steps": (lambda d: ("volumes", d.moving, "--path-along", 1, "--steps", 0, "-o", d.out), "0 steps"),
    "low pass at nothing": (
        lambda d: ("volumes", d.moving, "--index", 0, "--low-pass", 0, "-o", d.out, "--quiet"),
        "resolution 0.0 is not positive",
    ),
    "B factor that is no number": (
        lambda d: ("volumes", d.moving, "--index", 0, "--bfactor", "sharp", "-o", d.out),
        "'sharp' is neither auto nor a number of angstrom^2",
    ),
    "B factor without half-maps": (
        lambda d: ("volumes", d.moving, "--index", 0, "--bfactor", "auto", "-o", d.out),
        "no B factor can be estimated: ",
    ),
    "B factor of coarse pixels": (
        lambda d: ("volumes", d.still, "--bfactor", "auto", "-o", d.out),
        "no B factor can be fitted between 10 and",
    ),
    "maps that are there": (
        lambda d: (d.file("volumes.npz", ""), ("volumes", d.moving, "--index", 0, "-o", d.folder))[1],
        "volumes.npz exists",
    ),
    "analysis of no clusters": (lambda d: ("analyze", d.moving, "--kmeans", 0, "-o", d.out), "0 clusters"),
    "analysis of too many clusters": (lambda d: ("analyze", d.moving, "--kmeans", 101, "-o", d.out), "101 clusters"),
    "analysis without a step": (lambda d: ("analyze", d.moving, "--steps", 0, "-o", d.out), "0 steps"),
    "analysis of a map that is not finished": (
        lambda d: ((d.still / "map.mrc").unlink(), ("analyze", d.still, "-o", d.out))[1],
        "has no map.mrc yet",
    ),
    "cluster beyond": (
        lambda d: ("select", d.moving, "--cluster", 9, "--kmeans", 4, "-o", d.folder / "k.star"),
        "cluster 9 is not there; clusters are 0 to 3",
    ),
    "clusters of one map": (
        lambda d: ("select", d.still, "--cluster", 0, "-o", d.folder / "k.star"),
        "Homogeneous has no latent coordinate z",
    ),
    "selection to another format": (
        lambda d: ("select", d.moving, "--cluster", 0, "-o", d.folder / "k.csv"),
        "k.csv is neither .star nor .cs",
    ),
    "selection to .cs of a STAR file": (
        lambda d: ("select", d.moving, "--cluster", 0, "-o", d.folder / "k.cs"),
        "not a .cs file",
    ),
    "selection beyond": (
        lambda d: ("select", d.moving, "--index", d.file("i.txt", "600"), "-o", d.folder / "k.star"),
        "i.txt names particle 600",
    ),
    "selection that is there": (
        lambda d: ("select", d.moving, "--cluster", 0, "-o", d.file("k.star", "mine")),
        "k.star exists; give another -o, or --overwrite",
    ),
    "selection to no folder": (
        lambda d: ("select", d.moving, "--cluster", 0, "-o", d.folder / "gone" / "k.star"),
        "gone/k.star does not exist; make it first",
    ),
}
ENCODINGS: dict[str, tuple[Kind, str]] = {
    "no run": (lambda d: ("encode", d.star.parent, d.toy, "-o", d.npz), "case is not a run: it has no run.json"),
    "a run of one map": (
        lambda d: ("encode", d.still, d.toy, "-o", d.npz),
        "Homogeneous has no latent coordinate z; fit a heterogeneous model",
    ),
    "no particles": (
        lambda d: ("encode", d.moving, d.folder / "none.star", "-o", d.npz),
        "none.star does not exist; check the path",
    ),
    "particles without poses": (
        lambda d: ("encode", d.moving, d.toy.with_suffix(".mrcs"), "-o", d.npz, "--quiet"),
        "particles.mrcs has no poses; give a cryoDRGN .pkl of poses",
    ),
    "smaller images": (
        lambda d: ("encode", d.moving, d.star, "-o", d.npz),
        "box 32 is larger than the images (16 pixels)",
    ),
    "another box": (
        lambda d: ("encode", d.moving, d.toy, "--box", 16, "-o", d.npz),
        "particles of 16 px, the run has 32",
    ),
    "another pixel size": (
        lambda d: ("encode", d.moving, d.toy, "--apix", 3, "-o", d.npz),
        "particles of 3 A a pixel, the run has 7.02",
    ),
    "another format": (
        lambda d: ("encode", d.moving, d.toy, "-o", d.folder / "z.csv"),
        "z.csv is not .npz; name the file by its format",
    ),
    "a file that is there": (
        lambda d: ("encode", d.moving, d.toy, "-o", d.file("z.npz", "mine")),
        "z.npz exists; give another -o, or --overwrite",
    ),
    "to no folder": (
        lambda d: ("encode", d.moving, d.toy, "-o", d.folder / "gone" / "z.npz"),
        "gone/z.npz does not exist; make it first",
    ),
}
COMPARISONS: dict[str, tuple[Kind, str]] = {
    "one run": (lambda d: ("compare", d.still, d.toy), "1 model is given; a comparison needs runs of two or more"),
    "a run twice among fits of a model": (
        lambda d: ("compare", f"{d.still},{d.moving}", d.still, d.toy),
        "3 runs and some of them the same",
    ),
    "a run twice": (lambda d: ("compare", d.still, d.still, d.toy), "2 runs and some of them the same"),
    "no run": (lambda d: ("compare", d.still, d.star.parent, d.toy), "case is not a run: it has no run.json"),
    "no particles": (lambda d: ("compare", d.still, d.moving), "images were fitted; fit to a part of them"),
    "particles that were fitted": (
        lambda d: ("compare", d.still, d.moving, d.toy, "--first", 50, "--quiet"),
        "50 of 50 images were fitted by homogeneous, which favours what overfits; hold some out: fit to a part",
    ),
    "none that was not": (
        lambda d: ("compare", d.still, d.moving, d.toy, "--unseen", "--quiet"),
        "all 600 images were fitted; fit to a part of them",
    ),
    "another box": (
        lambda d: ("compare", d.still, d.moving, d.toy, "--box", 16),
        "homogeneous was fitted with box 32, the particles have 16",
    ),
    "images inverted": (
        lambda d: ("compare", d.still, d.moving, d.toy, "--invert"),
        "homogeneous was fitted with invert False, the particles have True",
    ),
    "no draws": (lambda d: ("compare", d.still, d.moving, d.toy, "--draws", 0), "0 draws; give 1 or more"),
    "another format": (
        lambda d: ("compare", d.still, d.moving, d.toy, "-o", d.folder / "t.csv"),
        "t.csv is not .tsv; name the file by its format",
    ),
    "a file that is there": (
        lambda d: ("compare", d.still, d.moving, d.toy, "-o", d.file("t.tsv", "mine")),
        "t.tsv exists; give another -o, or --overwrite",
    ),
}
SIMULATIONS: dict[str, tuple[Kind, str]] = {
    "odd box": (lambda d: ("simulate", "--toy", "hinge", "--box", 15, "-o", d.out), "box 15"),
    "no signal": (lambda d: ("simulate", "--toy", "hinge", "--snr", 0, "-o", d.out), "snr 0.0 is not positive"),
    "no images": (lambda d: ("simulate", "--toy", "hinge", "--images", 0, "-o", d.out), "0 images"),
    "unknown toy": (lambda d: ("simulate", "--toy", "lego", "-o", d.out), "toy 'lego' is not known; expected hinge"),
    "no source": (lambda d: ("simulate", "-o", d.out), "--toy --pdb --map"),
    "defocus backwards": (
        lambda d: ("simulate", "--toy", "hinge", "--defocus", 2e4, 1e4, "-o", d.out),
        "defocus range 20000 to 10000",
    ),
    "negative pixel size": (
        lambda d: ("simulate", "--toy", "hinge", "--apix", -2, "--images", 4, "-o", d.out),
        "-2",
    ),
    "no voltage": (
        lambda d: ("simulate", "--toy", "hinge", "--voltage", 0, "--images", 4, "-o", d.out),
        "voltage of 0 kV",
    ),
    "no atoms": (lambda d: ("simulate", "--pdb", d.file("x.pdb", "REMARK\n"), "-o", d.out), "x.pdb has no CA or P"),
    "no such atoms": (lambda d: ("simulate", "--pdb", d.folder / "x.pdb", "-o", d.out), "x.pdb does not exist"),
    "a map that is none": (lambda d: ("simulate", "--map", d.file("x.mrc", "no map"), "-o", d.out), "x.mrc"),
    "maps of two boxes": (
        lambda d: ("simulate", "--map", d.map(np.ones((8, 8, 8))), d.map(np.ones((12, 12, 12)), "b.mrc"), "-o", d.out),
        "b.mrc has 12 voxels",
    ),
    "a map of nothing": (
        lambda d: ("simulate", "--map", d.map(np.zeros((16, 16, 16))), "--images", 4, "-o", d.out, "--quiet"),
        "no contrast",
    ),
    "a case that is there": (lambda d: ("simulate", "--toy", "hinge", "-o", d.star.parent), "already holds particles"),
}
ALL = {
    f"{group}: {name}": case
    for group, cases in {"run": RUNS, "encode": ENCODINGS, "compare": COMPARISONS, "simulate": SIMULATIONS}.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", ALL)
def test_one_line_and_nothing_written(name: str, desk: Desk, capsys: pytest.CaptureFixture[str], command) -> None:
    assert_refused(desk, ALL[name], command, capsys)
