"""What a user can get wrong in a fit: one line with the value and the mend, nothing written or lost."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from desk import COUNT, Desk, Kind, Malicious, assert_refused

pytestmark = pytest.mark.filterwarnings("ignore:Data array contains NaN:RuntimeWarning")


def without(*names: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda table: table.drop(columns=list(names))


TABLES: dict[str, tuple[Kind, str]] = {
    "no defocus angle": (lambda d: d.fit(star=d.edit(without("rlnDefocusAngle"))), "rlnDefocusAngle"),
    "no image names": (lambda d: d.fit(star=d.edit(without("rlnImageName"))), "rlnImageName"),
    "no tilt angle": (lambda d: d.fit(star=d.edit(without("rlnAngleTilt"))), "rlnAngleTilt"),
    "no poses": (
        lambda d: d.fit(star=d.edit(without("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"))),
        "has no poses; give a cryoDRGN",
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
    "a folder": (lambda d: d.fit(star=d.star.parent), "case is a folder; give a file in it: .star"),
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
    "unknown model": (
        lambda d: d.fit("--model", "cryodragon"),
        "model 'cryodragon' is not known; expected ab_initio, circle, classes",
    ),
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
    "a spread of known poses": (
        lambda d: d.fit("--shift-sd-px", 2),
        "shift_sd_px is 2, but poses are known; leave --shift-sd-px out, or give --poses refine",
    ),
    "a spread of turns that are searched": (
        lambda d: d.fit("--poses", "search", "--turn-sd-deg", 2),
        "turn_sd_deg is 2, but poses are search; leave --turn-sd-deg out",
    ),
    "turns of no spread": (lambda d: d.fit("--poses", "refine", "--turn-sd-deg", 0), "turn_sd_deg is 0"),
    "a spread of defocus that is known": (
        lambda d: d.fit("--defocus-sd-angstrom", 200),
        "defocus_sd_angstrom is 200, but poses are known; leave --defocus-sd-angstrom out, or give --poses refine",
    ),
    "defocus of a negative spread": (
        lambda d: d.fit("--poses", "refine", "--defocus-sd-angstrom", -1),
        "defocus_sd_angstrom is -1",
    ),
    "defocus of images that have their CTF": (
        lambda d: d.fit(
            *("--poses", "refine", "--defocus-sd-angstrom", 200),
            star=d.edit(optics=lambda t: t.assign(rlnCtfDataAreCtfPremultiplied=1)),
        ),
        "were multiplied by their CTF, whose defocus then stays",
    ),
    "shifts of a negative spread": (lambda d: d.fit("--poses", "search", "--shift-sd-px", -1), "shift_sd_px is -1"),
    "poses of another kind": (lambda d: d.fit("--poses", "guess"), "guess"),
    "negative epochs": (lambda d: d.fit("--epochs", -1), "epochs is -1"),
    "empty batches": (lambda d: d.fit("--batch-size", 0), "batch_size is 0"),
    "zero learning rate": (lambda d: d.fit("--lr", 0), "learning_rate is 0"),
    "learning rate that is no number": (lambda d: d.fit("--lr", "nan"), "learning_rate is nan"),
    "a seed beyond": (lambda d: d.fit("--seed", 10**20), f"seed is {10**20}; expected 0 to"),
    "negative beta": (lambda d: d.fit("--beta", -1), "beta is -1"),
    "batches of what is solved": (
        lambda d: d.fit("--batch-size", 32),
        "batch_size is 32, but Homogeneous is solved, not descended; leave --batch-size out",
    ),
    "default of what is solved": (lambda d: d.fit("-b", 16), "batch_size is 16, but Homogeneous is solved"),
    "learning rate of what is solved": (
        lambda d: d.fit("--lr", 0.1),
        "learning_rate is 0.1, but Homogeneous is solved",
    ),
    "beta of what is solved": (lambda d: d.fit("--beta", 2), "beta is 2.0, but Homogeneous is solved"),
    "warm-up of what is solved": (lambda d: d.fit("--warmup", 0), "warmup is 0.0, but Homogeneous is solved"),
    "precision of what is solved": (lambda d: d.fit("--precision", "bf16"), "precision is bf16, but Homogeneous is"),
    "compiling what is solved": (lambda d: d.fit("--compile"), "leave --compile out"),
    "passes of what is solved": (lambda d: d.fit("--epochs", 3), "epochs is 3, but Homogeneous is solved"),
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
        lambda d: ("fit", d.toy, "-o", d.moving, "--model", "homogeneous", "--resume", "--device", "cpu"),
        "fitted with model CryoDRGN, not Homogeneous",
    ),
    "resume with other particles": (lambda d: d.resume("--first", 100), "is a fit of other particles"),
    "resume with a broken checkpoint": (
        lambda d: (d.file("cryodrgn/checkpoint.pt", b"PK\x03\x04 no checkpoint"), d.resume())[1],
        "checkpoint.pt cannot be read",
    ),
}
ALL = {
    f"{group}: {name}": case
    for group, cases in {"table": TABLES, "images": IMAGES, "model": MODELS, "settings": SETTINGS}.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", ALL)
def test_one_line_and_nothing_written(name: str, desk: Desk, capsys: pytest.CaptureFixture[str], command) -> None:
    assert_refused(desk, ALL[name], command, capsys)
