"""What a user can get wrong on the command line: one line with the value and the mend, nothing written or lost."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import torch

from pyro_cryo.data.simulate import hinge, simulate
from pyro_cryo.data.star import read_star, write_star

pytestmark = pytest.mark.filterwarnings("ignore:Data array contains NaN:RuntimeWarning")

BOX, COUNT = 16, 12


@dataclass(frozen=True)
class Desk:
    """A folder with a small case (`star`), finished runs (`still`, `moving`) and a place for output (`out`)."""

    folder: Path
    toy: Path

    @property
    def star(self) -> Path:
        return self.folder / "case" / "particles.star"

    @property
    def stack(self) -> Path:
        return self.folder / "case" / "particles.mrcs"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def still(self) -> Path:
        return self.folder / "homogeneous"

    @property
    def moving(self) -> Path:
        return self.folder / "cryodrgn"

    def edit(self, rows: Callable = lambda t: t, optics: Callable = lambda t: t) -> Path:
        """The STAR file again, with other rows or optics."""
        blocks = read_star(self.star)
        write_star(self.star, {"optics": optics(blocks["optics"]), "particles": rows(blocks["particles"])})
        return self.star

    def images(self, change: Callable[[np.ndarray], np.ndarray], name: str = "particles.mrcs") -> Path:
        """The stack again, changed."""
        with mrcfile.open(self.stack) as file:
            images = np.array(file.data)
        with mrcfile.new(self.stack.with_name(name), overwrite=True) as file:
            file.set_data(change(images))
            file.voxel_size = 2.0
        return self.star

    def file(self, name: str, content: str | bytes | np.ndarray) -> Path:
        path = self.folder / name
        if isinstance(content, np.ndarray):
            np.save(path, content)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def map(self, values: np.ndarray, name: str = "map.mrc") -> Path:
        with mrcfile.new(self.folder / name, overwrite=True) as file:
            file.set_data(values.astype(np.float32))
            file.voxel_size = 2.0
        return self.folder / name

    def everything(self) -> dict[str, bytes]:
        """What lies in the folder, byte by byte."""
        paths = sorted(self.folder.rglob("*"))
        return {str(p): p.read_bytes() if p.is_file() else b"" for p in paths}

    def fit(self, *options: object, star: Path | None = None) -> tuple[object, ...]:
        return "fit", star or self.star, "-o", self.out, "--device", "cpu", "--quiet", *options

    def resume(self, *options: object, star: Path | None = None) -> tuple[object, ...]:
        """Of the run `moving`, asked for as it was, but for what follows."""
        asked = ("--model", "cryodrgn", "--zdim", 2, "--set", "width=32", "--epochs", 4, "--lr", 2e-3)
        where = ("-o", self.moving, "--device", "cpu", "--quiet", "--resume")
        return "fit", star or self.toy, *where, *asked, *options


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    simulate(hinge(), folder, n_images=COUNT, box=BOX, snr=1.0, seed=0, defocus_angstrom=(2000.0, 3000.0))
    return folder


@pytest.fixture
def desk(small: Path, toy: Path, cryodrgn_run: Path, homogeneous_run: Path, tmp_path: Path) -> Desk:
    for source, name in ((small, "case"), (cryodrgn_run, "cryodrgn"), (homogeneous_run, "homogeneous")):
        shutil.copytree(source, tmp_path / name)
    return Desk(tmp_path, toy)


def without(*names: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda table: table.drop(columns=list(names))


class Malicious:
    """Unpickling it would leave a file behind."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


Kind = Callable[[Desk], tuple[object, ...]]

TABLES: dict[str, tuple[Kind, str]] = {
    "no defocus angle": (lambda d: d.fit(star=d.edit(without("rlnDefocusAngle"))), "rlnDefocusAngle"),
    "no image names": (lambda d: d.fit(star=d.edit(without("rlnImageName"))), "rlnImageName"),
    "no tilt angle": (lambda d: d.fit(star=d.edit(without("rlnAngleTilt"))), "rlnAngleTilt"),
    "no poses": (
        lambda d: d.fit(star=d.edit(without("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"))),
        "has no poses; give poses=",
    ),
    "no stack": (lambda d: d.fit(star=d.edit(lambda t: t.assign(rlnImageName="1@gone.mrcs"))), "gone.mrcs"),
    "frame beyond the stack": (
        lambda d: d.fit(star=d.edit(lambda t: t.assign(rlnImageName="13@particles.mrcs"))),
        "row 0 is image 13 of particles.mrcs, which holds 12",
    ),
    "zero defocus": (
        lambda d: d.fit(star=d.edit(lambda t: t.assign(rlnDefocusU=0, rlnDefocusV=0))),
        "largest defocus is 0",
    ),
    "zero voltage": (lambda d: d.fit(star=d.edit(optics=lambda t: t.assign(rlnVoltage=0))), "voltage of 0 kV"),
    "zero pixel size": (
        lambda d: d.fit(star=d.edit(optics=lambda t: t.assign(rlnImagePixelSize=0))),
        "no pixel size",
    ),
    "empty file": (lambda d: d.fit(star=d.file("e.star", "")), "e.star"),
    "no rows": (lambda d: d.fit(star=d.edit(lambda t: t.iloc[:0])), "its table of particles is empty"),
    "no particles": (
        lambda d: d.fit(star=d.file("m.star", "data_micrographs\n\nloop_\n_rlnMicrographName\na.mrc\n")),
        "no table with rlnImageName (it has data_micrographs)",
    ),
    "not text": (lambda d: d.fit(star=d.file("b.star", bytes(range(256)))), "b.star"),
    "no such path": (lambda d: d.fit(star=d.folder / "none.star"), "none.star does not exist"),
    "a folder": (lambda d: d.fit(star=d.star.parent), "unknown extension ''; expected .star"),
    "unknown extension": (lambda d: d.fit(star=d.file("p.h5", "")), "unknown extension '.h5'; expected .star"),
}
IMAGES: dict[str, tuple[Kind, str]] = {
    "odd box": (lambda d: d.fit("--box", 15), "box 15 is not an even number"),
    "odd images": (
        lambda d: d.fit(star=(d.images(lambda x: x[:, 1:, 1:]), d.edit(optics=without("rlnImageSize")))[1]),
        "box 15 is odd; crop with Particles.open(..., box=14)",
    ),
    "box beyond the images": (lambda d: d.fit("--box", 18), "box 18 is larger than the images (16 pixels)"),
    "another box than the table's": (lambda d: d.fit(star=d.images(lambda x: x[:, 2:, 2:])), "rlnImageSize"),
    "images that are not square": (lambda d: d.fit(star=d.images(lambda x: x[:, 2:])), "16 x 14 pixels"),
    "two boxes": (
        lambda d: d.fit(
            star=(
                d.images(lambda x: x[:, 4:, 4:], "small.mrcs"),
                d.edit(lambda t: t.assign(rlnImageName=["1@small.mrcs", *t.rlnImageName[1:]])),
            )[1]
        ),
        "images of 12 and 16 pixels",
    ),
    "an image with NaN": (
        lambda d: d.fit(star=d.images(lambda x: np.where(np.arange(COUNT)[:, None, None] == 7, np.nan, x))),
        "image 7 (8@particles.mrcs) has pixels that are not finite",
    ),
    "a stack cut short": (
        lambda d: d.fit(star=(os.truncate(d.stack, d.stack.stat().st_size - 5), d.star)[1]),
        "particles.mrcs is truncated: 12 images need",
    ),
    "negative apix": (lambda d: d.fit("--apix", -1), "apix is -1"),
    "zero apix": (lambda d: d.fit("--apix", 0), "apix is 0"),
    "apix that is no number": (lambda d: d.fit("--apix", "fine"), "'fine'"),
    "window beyond the box": (lambda d: d.fit("--window", 1.5), "window is 1.5"),
    "no datadir": (lambda d: d.fit("--datadir", d.folder / "gone"), "gone does not exist"),
    "first of none": (lambda d: d.fit("--first", 0), "first is 0"),
    "subset beyond": (lambda d: d.fit("--subset", d.file("s.txt", "3\n12\n")), "names particle 12; expected 0 to 11"),
    "subset of none": (lambda d: d.fit("--subset", d.file("s.txt", "")), "selects no particle"),
    "no subset": (lambda d: d.fit("--subset", d.folder / "s.npy"), "s.npy does not exist"),
    "malicious pickle": (
        lambda d: d.fit("--poses-pkl", d.file("p.pkl", pickle.dumps(Malicious(d.folder / "mark")))),
        "p.pkl is not a pickle of numpy arrays (it asks for",
    ),
    "pickle of another shape": (
        lambda d: d.fit("--poses-pkl", d.file("p.pkl", pickle.dumps(np.tile(np.eye(3), (4, 1, 1))))),
        "rotations of shape (4, 3, 3); expected (12, 3, 3)",
    ),
    "CTF of another shape": (
        lambda d: d.fit("--ctf-pkl", d.file("c.pkl", pickle.dumps(np.ones((12, 8))))),
        "CTFs of shape (12, 8); expected (12, 9)",
    ),
}
WITHOUT_MODEL = "class Model:\n    pass\n"
MODELS: dict[str, tuple[Kind, str]] = {
    "unknown model": (lambda d: d.fit("--model", "cryodragon"), "model 'cryodragon' is not known; expected cryodrgn"),
    "no model file": (lambda d: d.fit("--model", d.folder / "m.py"), "m.py does not exist"),
    "model file without a model": (
        lambda d: d.fit("--model", d.file("m.py", WITHOUT_MODEL)),
        "m.py defines no subclass of pyro_cryo.model.CryoModel",
    ),
    "model file that raises": (lambda d: d.fit("--model", d.file("m.py", "1 / 0")), "ZeroDivisionError"),
    "model file that is not Python": (lambda d: d.fit("--model", d.file("m.py", "class (")), "SyntaxError"),
    "model file that leaves": (lambda d: d.fit("--model", d.file("m.py", "raise SystemExit(0)")), "SystemExit"),
    "zdim of one map": (lambda d: d.fit("--zdim", 2), "model Homogeneous has no argument zdim"),
    "unknown argument": (lambda d: d.fit("--set", "nonsense=1"), "no argument nonsense; it takes symmetry, mask"),
    "argument without a value": (lambda d: d.fit("--set", "width"), "--set width is not NAME=VALUE"),
    "argument of the data": (lambda d: d.fit("--set", "box=32"), "--set box=32: box comes from the particles"),
    "argument of another type": (
        lambda d: d.fit("--model", "cryodrgn", "--set", "width=wide"),
        "CryoDRGN cannot be built with width='wide'",
    ),
    "unknown symmetry": (lambda d: d.fit("--symmetry", "Q7"), "Q7"),
    "no mask": (lambda d: d.fit("--mask", d.folder / "gone.mrc"), "gone.mrc does not exist"),
    "mask of another box": (lambda d: d.fit("--mask", d.map(np.ones((8, 8, 8)))), "mask of 8 voxels"),
    "mask of other values": (lambda d: d.fit("--mask", d.map(np.full((16, 16, 16), 7.0))), "mask values 7 to 7"),
}
SETTINGS: dict[str, tuple[Kind, str]] = {
    "negative epochs": (lambda d: d.fit("--epochs", -1), "epochs is -1"),
    "empty batches": (lambda d: d.fit("--batch-size", 0), "batch_size is 0"),
    "zero learning rate": (lambda d: d.fit("--lr", 0), "learning_rate is 0"),
    "learning rate that is no number": (lambda d: d.fit("--lr", "nan"), "learning_rate is nan"),
    "negative beta": (lambda d: d.fit("--beta", -1), "beta is -1"),
    "no threads": (lambda d: d.fit("--threads", 0), "threads is 0"),
    "unknown device": (lambda d: d.fit("--device", "abacus"), "device 'abacus' is not known; expected cpu, cuda"),
    "a GPU that is not there": (lambda d: d.fit("--device", "cuda:97"), "device cuda:97 is not there"),
    "unknown precision": (lambda d: d.fit("--precision", "fp8"), "'fp8'"),
    "no output": (lambda d: ("fit", d.star), "-o/--out"),
    "output that is not empty": (lambda d: ("fit", d.star, "-o", d.star.parent), "case exists and is not empty"),
    "output that is a file": (lambda d: ("fit", d.star, "-o", d.star), "particles.star exists"),
    "resume where no run is": (
        lambda d: ("fit", d.star, "-o", d.star.parent, "--resume"),
        "case exists and is not empty",
    ),
    "resume with another setting": (lambda d: d.resume("--epochs", 5), "fitted with epochs 4, not 5"),
    "resume with another argument": (lambda d: d.resume("--zdim", 3), "fitted with zdim 2, not 3"),
    "resume of another model": (
        lambda d: ("fit", d.toy, "-o", d.moving, "--resume", "--device", "cpu"),
        "fitted with model CryoDRGN, not Homogeneous",
    ),
    "resume with other particles": (lambda d: d.resume("--first", 100), "is a fit of other particles"),
    "resume with a broken checkpoint": (
        lambda d: (d.file("cryodrgn/checkpoint.pt", b"PK\x03\x04 no checkpoint"), d.resume())[1],
        "checkpoint.pt cannot be read",
    ),
}
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
        lambda d: (moved(d.moving, path="/gone.star"), ("analyze", d.moving, "-o", d.out))[1],
        "/gone.star does not exist",
    ),
    "particles that have changed": (
        lambda d: (moved(d.moving, path=str(d.star)), ("analyze", d.moving, "-o", d.out))[1],
        "the particles have changed since the fit",
    ),
    "image beyond": (lambda d: ("volumes", d.moving, "--index", 0, 600, "-o", d.out), "image 600 is not there"),
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
    "component beyond": (lambda d: ("volumes", d.moving, "--path-along", 3, "-o", d.out), "component 3 of 2"),
    "no steps": (lambda d: ("volumes", d.moving, "--path-along", 1, "--steps", 0, "-o", d.out), "0 steps"),
    "low pass at nothing": (
        lambda d: ("volumes", d.moving, "--index", 0, "--low-pass", 0, "-o", d.out),
        "resolution 0.0 is not positive",
    ),
    "maps that are there": (
        lambda d: (d.file("volumes.npz", ""), ("volumes", d.moving, "--index", 0, "-o", d.folder))[1],
        "volumes.npz exists",
    ),
    "analysis of no clusters": (lambda d: ("analyze", d.moving, "--kmeans", 0, "-o", d.out), "0 clusters"),
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
        lambda d: ("simulate", "--map", d.map(np.zeros((16, 16, 16))), "--images", 4, "-o", d.out),
        "no contrast",
    ),
    "a case that is there": (lambda d: ("simulate", "--toy", "hinge", "-o", d.star.parent), "already holds particles"),
}
ALL = {
    f"{group}: {name}": case
    for group, cases in {
        "table": TABLES, "images": IMAGES, "model": MODELS, "settings": SETTINGS, "run": RUNS, "simulate": SIMULATIONS,
    }.items()
    for name, case in cases.items()
}  # fmt: skip


def moved(run: Path, **particles: object) -> None:
    """The run's record with other particles."""
    record = json.loads((run / "run.json").read_text())
    record["particles"] |= particles
    (run / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize("name", ALL)
def test_one_line_and_nothing_written(name: str, desk: Desk, capsys: pytest.CaptureFixture[str], command) -> None:
    build, expected = ALL[name]
    arguments = build(desk)
    before = desk.everything()
    capsys.readouterr()
    try:
        status = command(*arguments)
    except SystemExit as left:  # how argparse leaves
        status = left.code
    assert status == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if not line.startswith("pyro-cryo: warning: ")]
    assert len(errors) == 1, lines
    assert errors[0].startswith("pyro-cryo: error: ")
    assert expected in errors[0]
    assert "--debug" not in errors[0], "an error that nobody thought of"
    assert len(errors[0]) < 600
    assert desk.everything() == before
    assert not (desk.folder / "mark").exists()


def test_there_are_more_than_thirty_kinds() -> None:
    assert len(ALL) > 100
