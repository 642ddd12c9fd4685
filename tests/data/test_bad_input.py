"""What a user can get wrong: one line that names the value and the mend, before anything is computed."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_cryo.data.particles import Particles
from pyro_cryo.data.star import write_star
from pyro_cryo.physics.rotations import random_rotations

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def refused(path: Path, message: str, error: type[Exception] = ValueError, **options: object) -> None:
    with pytest.raises(error, match=message) as caught:
        list(Particles.open(path, **options).batches(4))
    assert "\n" not in str(caught.value)


def without(*names: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda table: table.drop(columns=list(names))


ROWS = {
    "no image names": (without("rlnImageName"), "no table with rlnImageName|no column rlnImageName"),
    "no defocus V": (without("rlnDefocusV"), "no column rlnDefocusV"),
    "no defocus angle": (without("rlnDefocusAngle"), "no column rlnDefocusAngle"),
    "no tilt angle": (without("rlnAngleTilt"), "no column rlnAngleTilt"),
    "no optics group": (without("rlnOpticsGroup"), "no column rlnOpticsGroup"),
    "unknown optics group": (lambda t: t.assign(rlnOpticsGroup=9), "optics group 9 is not in its table .* has 1"),
    "no rows": (lambda t: t.iloc[:0], "its table of particles is empty"),
    "zero defocus": (lambda t: t.assign(rlnDefocusU=0.0, rlnDefocusV=0.0), "largest defocus is 0; expected angstrom"),
    "negative defocus": (lambda t: t.assign(rlnDefocusU=-9e3, rlnDefocusV=-9e3), "largest defocus is -9000"),
    "defocus in micrometres": (
        lambda t: t.assign(rlnDefocusU=1.5, rlnDefocusV=1.4),
        "defocus is 1.5; expected angstrom",
    ),
    "text in a column": (lambda t: t.assign(rlnDefocusU="high"), "rlnDefocusU of row 0 is 'high', expected a number"),
    "nan in a column": (lambda t: t.assign(rlnAngleRot=np.nan), "rlnAngleRot of row 0 is 'nan', expected a number"),
    "image 0": (lambda t: t.assign(rlnImageName="0@particles.mrcs"), "'0@particles.mrcs' of row 0; expected 1@"),
    "no image number": (lambda t: t.assign(rlnImageName="x@particles.mrcs"), "'x@particles.mrcs' of row 0"),
    "image beyond the stack": (
        lambda t: t.assign(rlnImageName=[*t.rlnImageName[:-1], "7@particles.mrcs"]),
        "row 5 is image 7 of particles.mrcs, which holds 6",
    ),
}
OPTICS = {
    "no voltage": (without("rlnVoltage"), "no column rlnVoltage"),
    "no Cs": (without("rlnSphericalAberration"), "no column rlnSphericalAberration"),
    "no amplitude contrast": (without("rlnAmplitudeContrast"), "no column rlnAmplitudeContrast"),
    "zero voltage": (lambda t: t.assign(rlnVoltage=0.0), "voltage of 0 kV"),
    "contrast in percent": (
        lambda t: t.assign(rlnAmplitudeContrast=10.0),
        "amplitude contrast of 10; expected a fraction",
    ),
    "no pixel size": (without("rlnImagePixelSize"), "no pixel size; .*give apix"),
    "zero pixel size": (lambda t: t.assign(rlnImagePixelSize=0.0), "no pixel size"),
    "negative pixel size": (lambda t: t.assign(rlnImagePixelSize=-1.0), "pixel size of -1 A; give its pixel size"),
    "another box": (lambda t: t.assign(rlnImageSize=32), "says 32 pixels .* its images have 16; mend rlnImageSize"),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows(case, name: str) -> None:
    edit, message = ROWS[name]
    refused(case.star(edit), message)


@pytest.mark.parametrize("name", OPTICS)
def test_optics(case, name: str) -> None:
    edit, message = OPTICS[name]
    refused(case.star(optics=edit), message)


def test_paths(case, tmp_path: Path) -> None:
    path = case.star()
    refused(tmp_path / "none.star", "none.star does not exist", FileNotFoundError)
    (tmp_path / "a.xyz").touch()
    refused(tmp_path / "a.xyz", "unknown extension '.xyz'; expected .star, .cs, .mrcs")
    refused(path, "datadir nowhere does not exist", FileNotFoundError, datadir="nowhere")
    refused(
        case.star(lambda t: t.assign(rlnImageName="1@gone.mrcs")), "gone.mrcs is not at .*datadir", FileNotFoundError
    )
    (tmp_path / "empty.star").touch()
    refused(tmp_path / "empty.star", "no data_ block")
    (tmp_path / "empty.txt").write_text("\n")
    refused(tmp_path / "empty.txt", "lists no stack; give one path a line")
    write_star(tmp_path / "mics.star", {"micrographs": pd.DataFrame({"rlnMicrographName": ["a"]})})
    refused(tmp_path / "mics.star", r"no table with rlnImageName \(it has data_micrographs\)")


def test_stacks(case, stack_writer) -> None:
    path, stack = case.star(), case.folder / "particles.mrcs"
    whole = stack.read_bytes()
    stack.write_bytes(whole[:-1])
    refused(path, "particles.mrcs is truncated: 6 images need 6144 bytes after the header, it has 6143")
    stack.write_bytes(b"no stack")
    refused(path, "8 bytes, fewer than the 1024")
    stack_writer(stack, case.images[:, :, :15].copy())
    refused(path, "15 x 16 pixels, expected square ones")
    stack_writer(stack, np.where(np.arange(6)[:, None, None] == 4, np.inf, case.images).astype(np.float32))
    refused(path, r"image 4 \(5@particles.mrcs\) has pixels that are not finite")


def test_a_stack_cut_short_after_opening(case) -> None:
    particles = Particles.open(case.star())
    os.truncate(case.folder / "particles.mrcs", 3000)
    with pytest.raises(ValueError, match="ended at byte 3000 while being read"):
        particles.batch(slice(None))


def test_boxes(case, tmp_path: Path, stack_writer) -> None:
    path = case.star()
    refused(path, r"box 15 is not an even number of at least 4; crop with Particles.open\(..., box=14\)", box=15)
    refused(path, r"box 18 is larger than the images \(16 pixels\); give box=16 or less", box=18)
    refused(path, "box 2 is not an even number", box=2)
    stack_writer(tmp_path / "small.mrcs", np.zeros((3, 8, 8), np.float32))
    mixed = case.star(lambda t: t.assign(rlnImageName=[*t.rlnImageName[:3], *(f"{i}@small.mrcs" for i in (1, 2, 3))]))
    refused(mixed, "optics group 1 has images of 8 and 16 pixels; expected one box a group")
    refused(path, "small.mrcs holds 3 images|image 4 of particles.mrcs, which holds 3", datadir=tmp_path / "small.mrcs")


def test_numbers_given(case) -> None:
    path = case.star()
    refused(path, "apix is 0; expected", apix=0.0)
    refused(path, "window is 1.5; expected a fraction", window=1.5)
    refused(path, "first is 0; expected 1 or more", first=0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        next(Particles.open(path).batches(0))


def test_subsets(case, tmp_path: Path) -> None:
    path = case.star()
    refused(path, "the subset names particle 6; expected 0 to 5", subset=[0, 6])
    refused(path, "names particle -1; expected 0 to 5", subset=[-1])
    refused(path, "selects no particle", subset=[])
    refused(path, "names particle 2 more than once", subset=[2, 1, 2])
    refused(path, "not a list of whole numbers", subset=[0.5])
    refused(path, r"a mask of shape \(3,\); expected \(6,\)", subset=np.ones(3, bool))
    refused(path, "none.txt does not exist", FileNotFoundError, subset=tmp_path / "none.txt")
    (tmp_path / "s.txt").write_text("1 2 three")
    refused(path, r"s.txt is not a list of numbers \(could not convert", subset=tmp_path / "s.txt")
    (tmp_path / "s.csv").write_text("1")
    refused(path, "s.csv has an unknown extension; expected .txt", subset=tmp_path / "s.csv")
    Particles.open(path).write_star(tmp_path / "t.star")
    other = case.star(lambda t: t.iloc[:3], name="three.star")
    refused(other, "names 000004@particles.mrcs, which is not in", subset=tmp_path / "t.star")


class Malicious:
    """Unpickling it would leave a file behind."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


def test_pickles(case, tmp_path: Path) -> None:
    path, pkl = case.star(), tmp_path / "p.pkl"
    rotation = random_rotations(6).numpy()
    shift = np.zeros((6, 2))
    ctf = np.tile([16, 2.0, 2900, 2800, 30, 300, 2.7, 0.1, 0.0], (6, 1))

    def write(content: object) -> Path:
        pkl.write_bytes(pickle.dumps(content))
        return pkl

    refused(path, "none.pkl does not exist", FileNotFoundError, poses=tmp_path / "none.pkl")
    for content in (
        Malicious(tmp_path / "mark"),
        (rotation, Malicious(tmp_path / "mark")),
        torch.eye(3),
        np.array([print]),
    ):
        refused(path, r"p.pkl is not a pickle of numpy arrays \(it asks for", poses=write(content))
        refused(path, "p.pkl is not a pickle of numpy arrays", ctf=pkl)
        refused(path, "p.pkl is not a pickle of numpy arrays", subset=pkl)
    assert not (tmp_path / "mark").exists()
    pkl.write_bytes(b"no pickle")
    refused(path, "p.pkl is not a pickle of numpy arrays", poses=pkl)
    refused(path, "holds a dict", poses=write({"a": 1}))
    refused(path, r"rotations of shape \(5, 3, 3\); expected \(6, 3, 3\)", poses=write((rotation[:5], shift[:5])))
    refused(path, r"translations of shape \(6, 3\)", poses=write((rotation, np.zeros((6, 3)))))
    refused(path, "translation of 5; expected fractions of the box", poses=write((rotation, shift + 5)))
    refused(path, "matrix 0 is not a rotation", poses=write((2 * rotation, shift)))
    refused(
        path,
        "matrix 2 is not a rotation",
        poses=write((rotation * np.where(np.arange(6) == 2, -1, 1)[:, None, None], shift)),
    )
    refused(path, "matrix 0 is not a rotation", poses=write((rotation * np.nan, shift)))
    refused(path, r"CTFs of shape \(6, 8\); expected \(6, 9\)", ctf=write(ctf[:, :8]))
    refused(path, "box of 16 at 0 A; expected positive", ctf=write(ctf * (np.arange(9) != 1)))
    refused(path, "voltage of 0 kV", ctf=write(ctf * (np.arange(9) != 5)))
    refused(path, "values that are not finite", ctf=write(ctf * np.nan))


def test_pickles_of_every_protocol_are_read(case, tmp_path: Path) -> None:
    rotation, shift = random_rotations(6).numpy(), np.random.default_rng(0).uniform(-0.1, 0.1, (6, 2))
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for content in ((rotation, shift), [rotation.astype(np.float64), shift], (np.asfortranarray(rotation), shift)):
            (tmp_path / "p.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
            particles = Particles.open(case.star(), poses=tmp_path / "p.pkl")
            np.testing.assert_allclose(particles.rotation, rotation, atol=1e-6)
            np.testing.assert_allclose(particles.translation, -16 * shift, atol=1e-5)


def test_cs_files(tmp_path: Path, shared: Path) -> None:
    path = tmp_path / "a.cs"
    path.write_text("no table")
    refused(path, "a.cs is not a numpy structured array")
    for content, message in (
        (np.zeros(4), "not a numpy structured array"),
        (np.zeros(0, [("blob/path", "S5")]), "empty table"),
        (np.zeros(4, [("uid", "u8")]), "no column blob/path; give the .cs file with the images"),
        (np.array([{}], dtype=object), "not a numpy structured array"),
    ):
        with open(path, "wb") as file:
            np.save(file, content, allow_pickle=True)
        refused(path, message)
    refused(
        shared / "data/tables/cryosparc_P12_J24_001_particles.cs",
        "particles.mrc is not at .*datadir",
        FileNotFoundError,
    )


def test_only_a_cs_input_becomes_a_cs(case, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a \.cs file, so its rows have no uid; write a \.star"):
        Particles.open(case.star()).write_cs(tmp_path / "out.cs")


def test_columns_that_would_matter_are_named(case) -> None:
    path = case.star(
        optics=lambda t: t.assign(rlnBeamTiltX=0.3, rlnBeamTiltY=0.0, rlnMagMat00=1.0, rlnOddZernike="[0,0.2]")
    )
    with pytest.warns(UserWarning, match="rlnBeamTiltX, rlnOddZernike are not used"):
        Particles.open(path)


def test_the_resolution_at_which_the_ctf_aliases_is_named(case) -> None:
    from pyro_cryo.physics.ctf import aliasing_angstrom

    path = case.star(lambda t: t.assign(rlnDefocusU=9000.0))
    with pytest.warns(UserWarning, match=r"aliases beyond .* A in a box of 32 A") as caught:
        particles = Particles.open(path)
    expected = aliasing_angstrom(particles.ctf, 2.0, 16)
    assert f"beyond {expected:.1f} A" in str(caught[0].message)
