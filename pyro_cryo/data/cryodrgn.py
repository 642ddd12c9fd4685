"""cryoDRGN's pickles of poses and CTFs.

poses.pkl: rotations (N, 3, 3), alone or in a tuple with translations (N, 2): minus the displacement, in fractions of
           the box.
ctf.pkl:   (N, 9): box, angstrom a pixel, defocus U, V (angstrom), angle (degree), kV, Cs (mm), amplitude contrast,
           phase shift (degree).

A pickle can run any program; these are read by an unpickler that knows numpy arrays and nothing else.
"""

from __future__ import annotations

import importlib
import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_cryo.data.table import OpticsGroup, Table, check_optics, check_rotations
from pyro_cryo.physics.ctf import CTF

CTF_COLUMNS = [
    "rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle", "rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast",
    "rlnPhaseShift", "rlnCtfBfactor", "rlnCtfScalefactor",
]  # fmt: skip
PIXEL_COLUMNS = ["rlnImagePixelSize", "rlnPixelSize", "rlnDetectorPixelSize", "rlnMagnification"]
MODULES = ("numpy.core", "numpy._core")


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding}")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and scalars, tuples, lists, strings and numbers; refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if module == "_codecs" and name == "encode":
            return _latin1
        if (module, name) in {(f"{m}.multiarray", n) for m in MODULES for n in ("_reconstruct", "scalar")}:
            return getattr(importlib.import_module("numpy._core.multiarray"), name)
        if (module, name) in {(f"{m}.numeric", "_frombuffer") for m in MODULES}:
            return getattr(importlib.import_module("numpy._core.numeric"), name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_arrays(path: str | Path) -> tuple[np.ndarray, ...]:
    """The array of a pickle, or its tuple of arrays. Raises ValueError for anything else."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; check the path")
    try:
        content = _ArrayUnpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a broken pickle raises anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a pickle of numpy arrays ({reason}); give one that cryoDRGN wrote") from None
    arrays = content if isinstance(content, tuple | list) else (content,)
    if not arrays or not all(isinstance(a, np.ndarray) and a.dtype.kind in "fiub" for a in arrays):
        raise ValueError(
            f"{path} holds a {type(content).__name__} that is not of numeric arrays; give one that cryoDRGN wrote"
        )
    return tuple(arrays)


def read_poses(path: str | Path, count: int) -> tuple[Tensor, Tensor]:
    """Rotations (N, 3, 3) and displacements (N, 2) in fractions of the box, of `count` images."""
    arrays = read_arrays(path)
    rotation = arrays[0]
    if rotation.shape != (count, 3, 3):
        raise ValueError(f"{path} has rotations of shape {rotation.shape}; expected ({count}, 3, 3), one an image")
    trans = arrays[1] if len(arrays) > 1 else np.zeros((count, 2))
    if trans.shape != (count, 2) or not np.isfinite(trans).all():
        raise ValueError(f"{path} has translations of shape {trans.shape}; expected finite ({count}, 2), one an image")
    if np.abs(trans).max() > 1:
        raise ValueError(
            f"{path} has a translation of {np.abs(trans).max():g}; expected fractions of the box: divide it by "
            "the box in pixels"
        )
    matrices = torch.from_numpy(np.array(rotation, np.float32))
    check_rotations(matrices, str(path))
    return matrices, torch.from_numpy(np.array(-trans, np.float32))


def read_ctf(path: str | Path, count: int) -> np.ndarray:
    """The (N, 9) rows of a ctf.pkl of `count` images."""
    values = read_arrays(path)[0]
    if values.shape != (count, 9):
        raise ValueError(f"{path} has CTFs of shape {values.shape}; expected ({count}, 9), one row an image")
    values = np.array(values, np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{path} has values that are not finite; parse the CTF again")
    if (values[:, :2] <= 0).any():
        raise ValueError(
            f"{path} has a box of {values[:, 0].min():g} at {values[:, 1].min():g} A; expected positive ones"
        )
    return values


def with_ctf(table: Table, values: np.ndarray, path: str | Path) -> Table:
    """The table with the optics of a ctf.pkl.

    Its boxes must be known: images were often downsampled after the CTF was written. Groups are split by pixel size and
    microscope; what the input said of the CTF and the pixel size is forgotten.
    """
    one, zero = np.ones(len(values)), np.zeros(len(values))
    fields = [*values[:, 2:].T, zero, one]
    ctf = CTF(*(torch.from_numpy(np.ascontiguousarray(field)).float() for field in fields))
    check_optics(ctf, str(path))
    optics = np.column_stack([table.group.numpy(), values[:, 0] * values[:, 1], values[:, 5:8]])
    keys, group = np.unique(optics, axis=0, return_inverse=True)
    groups: list[OpticsGroup] = []
    for number, field in keys[:, :2]:
        old = table.groups[int(number)]
        name = old.name if len(keys) == len(table.groups) else str(len(groups) + 1)
        groups.append(OpticsGroup(name, float(field) / old.box, old.box, old.premultiplied))
    source = table.source
    if source is not None and not isinstance(source, np.ndarray):
        origins = ["rlnOriginXAngst", "rlnOriginYAngst", "rlnOpticsGroup"]
        source = source.drop(columns=[n for n in CTF_COLUMNS + PIXEL_COLUMNS + origins if n in source])
    group_of_row = torch.from_numpy(group.reshape(-1))
    return replace(table, ctf=ctf, groups=tuple(groups), group=group_of_row, source=source, optics=None)
