"""RELION's tables of particles (3.0, 3.1 and 5), in and out.

RELION's origin is where the box centre lies as seen from the particle, the negative of a displacement: in pixels up
to 3.0, in angstrom since. Its angles (rot, tilt, psi) are those of `physics.rotations.from_euler_deg`.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_cryo.data.star import numbers
from pyro_cryo.data.table import OpticsGroup, Table, check_optics
from pyro_cryo.physics.ctf import CTF
from pyro_cryo.physics.rotations import from_euler_deg

if TYPE_CHECKING:
    import pandas as pd

Blocks = dict[str, "pd.DataFrame | dict[str, str]"]

EULER = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]
MICROSCOPE = ["rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast"]
# Columns that bend the phases of an image in ways that are not modelled, and the value that does not.
ABERRATIONS = {
    "rlnBeamTiltX": 0.0, "rlnBeamTiltY": 0.0,
    "rlnMagMat00": 1.0, "rlnMagMat01": 0.0, "rlnMagMat10": 0.0, "rlnMagMat11": 1.0,
}  # fmt: skip
ZERNIKES = ["rlnOddZernike", "rlnEvenZernike"]


def particle_block(blocks: Blocks, path: Path) -> pd.DataFrame:
    """The table that names images. Raises ValueError where there is none or it has no rows."""
    tables = {name: block for name, block in blocks.items() if not isinstance(block, dict)}
    named = [block for block in tables.values() if "rlnImageName" in block]
    table = tables.get("particles", named[0] if named else None)
    if table is None:
        found = ", ".join(f"data_{name}" for name in blocks)
        raise ValueError(f"{path} has no table with rlnImageName (it has {found}); give a table of particles")
    if "rlnImageName" not in table:
        raise ValueError(f"{path}: its particles have no column rlnImageName; add it to the table")
    if not len(table):
        raise ValueError(f"{path}: its table of particles is empty; give a table with rows")
    return table


def read_particles(blocks: Blocks, path: Path, apix: float | None, ctf_given: bool) -> Table:
    """Single-particle rows. `apix` stands in where the file has no pixel size; `ctf_given` excuses missing optics."""
    rows = particle_block(blocks, path)
    groups, group, optics = read_optics(blocks, rows, path)
    files, file, frame = _images(rows["rlnImageName"].tolist(), path)
    pixel = np.array([g.apix for g in groups])[group]
    count = len(rows)
    return Table(
        path=path,
        files=files,
        file=file,
        frame=frame,
        groups=groups,
        group=torch.from_numpy(group),
        sign=torch.ones(count),
        rotation=read_rotation(rows, path),
        shift_px=_shift(rows, np.where(pixel == 0, apix or 0, pixel), path),
        ctf=None if ctf_given else read_ctf(rows, _expand(optics, group), path),
        exposure=_exposure(rows, path),
        half_set=read_half_set(rows, path),
        particle=_particle(rows),
        source=rows,
        optics=optics,
    )


def read_optics(
    blocks: Blocks, rows: pd.DataFrame, path: Path
) -> tuple[tuple[OpticsGroup, ...], np.ndarray, pd.DataFrame | None]:
    """Optics groups, the group of each row, and the optics table in the order of the groups (None up to 3.0)."""
    optics = blocks.get("optics")
    if optics is None or isinstance(optics, dict):
        return (*_groups_of_rows(rows, path), None)
    if "rlnOpticsGroup" not in optics or "rlnOpticsGroup" not in rows:
        raise ValueError(f"{path} has a table of optics but no column rlnOpticsGroup to find the group by; add it")
    known = numbers(optics, "rlnOpticsGroup", path).astype(np.int64)
    wanted = numbers(rows, "rlnOpticsGroup", path).astype(np.int64)
    missing = np.setdiff1d(wanted, known)
    if len(missing):
        raise ValueError(
            f"{path}: optics group {missing[0]} is not in its table of optics, which has "
            f"{', '.join(map(str, known))}; add it"
        )
    order = np.argsort(known)
    optics = optics.iloc[order].reset_index(drop=True)
    apix = _pixel_size(optics, path)
    box = numbers(optics, "rlnImageSize", path, default=0).astype(int)
    premultiplied = numbers(optics, "rlnCtfDataAreCtfPremultiplied", path, default=0)
    groups = tuple(
        OpticsGroup(str(number), float(a), int(b), bool(p))
        for number, a, b, p in zip(known[order], apix, box, premultiplied, strict=True)
    )
    return groups, np.searchsorted(known[order], wanted), optics


def _groups_of_rows(rows: pd.DataFrame, path: Path) -> tuple[tuple[OpticsGroup, ...], np.ndarray]:
    """RELION 3.0 has no optics groups: rows of one pixel size and microscope are one."""
    apix = _pixel_size(rows, path)
    microscope = [numbers(rows, name, path) for name in MICROSCOPE if name in rows]
    keys, group = np.unique(np.column_stack([np.nan_to_num(apix), *microscope]), axis=0, return_inverse=True)
    groups = tuple(OpticsGroup(str(i + 1), float(key[0]), 0) for i, key in enumerate(keys))
    return groups, group.reshape(-1)


def _pixel_size(table: pd.DataFrame, path: Path) -> np.ndarray:
    """Angstrom a stored pixel of each row, 0 where the table does not tell."""
    for name in ("rlnImagePixelSize", "rlnPixelSize"):
        if name in table:
            return numbers(table, name, path)
    if "rlnDetectorPixelSize" in table and "rlnMagnification" in table:
        magnification = numbers(table, "rlnMagnification", path)
        if (magnification <= 0).any():
            raise ValueError(f"{path}: rlnMagnification has a value of {magnification.min():g}; mend it or give apix")
        return 1e4 * numbers(table, "rlnDetectorPixelSize", path) / magnification
    return np.zeros(len(table))


def _expand(optics: pd.DataFrame | None, group: np.ndarray) -> pd.DataFrame | None:
    return None if optics is None else optics.iloc[group].reset_index(drop=True)


def _images(names: list[str], path: Path) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """`000012@stack.mrcs` as row of the list of stacks and frame from 0."""
    numbers_of: dict[str, int] = {}
    file = np.empty(len(names), np.int64)
    frame = np.empty(len(names), np.int64)
    for row, name in enumerate(names):
        index, at, stack = str(name).partition("@")
        if not at:
            index, stack = "1", index  # a file of one image
        if not index.isdigit() or index == "0" * len(index):
            raise ValueError(f"{path}: rlnImageName {name!r} of row {row}; expected 1@stack.mrcs, counted from 1")
        file[row] = numbers_of.setdefault(stack, len(numbers_of))
        frame[row] = int(index) - 1
    return tuple(numbers_of), file, frame


def read_rotation(rows: pd.DataFrame, path: Path) -> Tensor | None:
    """(N, 3, 3), or None where the table has no angles."""
    if not any(name in rows for name in EULER):
        return None
    euler = np.column_stack([numbers(rows, name, path) for name in EULER])
    return _float(from_euler_deg(euler))


def _shift(rows: pd.DataFrame, apix: np.ndarray, path: Path) -> Tensor:
    """Displacement in stored pixels (N, 2): minus the origin."""
    origin = np.zeros((len(rows), 2))
    for axis, name in enumerate(("rlnOriginX", "rlnOriginY")):
        if f"{name}Angst" in rows:
            angstrom = numbers(rows, f"{name}Angst", path)
            if angstrom.any() and (apix == 0).any():
                raise ValueError(
                    f"{path} has origins in angstrom but no pixel size; add rlnImagePixelSize or give apix"
                )
            origin[:, axis] = angstrom / np.where(apix == 0, 1, apix)
        elif name in rows:
            origin[:, axis] = numbers(rows, name, path)
    return _float(-origin)


def _float(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(values, np.float32))  # a copy: columns of pandas are read-only


def _exposure(rows: pd.DataFrame, path: Path) -> Tensor | None:
    """(N,) electrons an A^2 before each image, which rows of a tilt series tell."""
    if "rlnMicrographPreExposure" not in rows:
        return None
    return _float(numbers(rows, "rlnMicrographPreExposure", path))


def _particle(rows: pd.DataFrame) -> Tensor:
    """(N,) long: images of one rlnTomoParticleName are of one particle, others each of their own."""
    import pandas as pd

    if "rlnTomoParticleName" not in rows:
        return torch.arange(len(rows))
    return torch.from_numpy(pd.factorize(rows["rlnTomoParticleName"])[0].copy())


def read_half_set(rows: pd.DataFrame, path: Path) -> Tensor:
    """(N,) int8: rlnRandomSubset where it is 1 or 2, else 0."""
    subset = _float(numbers(rows, "rlnRandomSubset", path, default=0)).to(torch.int8)
    return torch.where((subset == 1) | (subset == 2), subset, 0)


def read_ctf(rows: pd.DataFrame, optics: pd.DataFrame | None, path: Path) -> CTF | None:
    """Optics of each row, from its own columns or those of its group; None where there is not one defocus column."""

    def column(name: str, default: float | None = None) -> np.ndarray:
        table = optics if optics is not None and name not in rows and name in optics else rows
        return numbers(table, name, path, default)

    if not any(name in rows for name in ("rlnDefocusU", "rlnDefocusV")):
        warnings.warn(
            f"{path} has no defocus: images are taken as free of CTF (give ctf= if not)", UserWarning, stacklevel=7
        )
        return None
    values = [
        column("rlnDefocusU"),
        column("rlnDefocusV"),
        column("rlnDefocusAngle"),
        *(column(name) for name in MICROSCOPE),
        column("rlnPhaseShift", 0.0),
        decaying(column("rlnCtfBfactor", 0.0), path),
        column("rlnCtfScalefactor", 1.0),
    ]
    ctf = CTF(*(_float(value) for value in values))
    check_optics(ctf, str(path))
    return ctf


def decaying(bfactor: np.ndarray, path: Path) -> np.ndarray:
    """B of exp(-B s^2 / 4). Warp and M write the exponent's sign, RELION the factor's: all negative means a decay."""
    if bfactor.min() >= 0 or bfactor.max() > 0:
        return bfactor
    warnings.warn(f"{path}: rlnCtfBfactor is negative, as Warp writes it; taken as a decay", UserWarning, stacklevel=8)
    return -bfactor


def warn_of_aberrations(table: Table) -> None:
    """One warning that names the columns which say more about the optics than is used."""
    used = []
    for source in (table.optics, table.source):
        if source is None or isinstance(source, np.ndarray):
            continue
        used += [n for n, zero in ABERRATIONS.items() if n in source and not np.allclose(source[n].astype(float), zero)]
        used += [n for n in ZERNIKES if n in source and any(c in "123456789" for v in set(source[n]) for c in str(v))]
    if used:
        warnings.warn(f"{table.path}: {', '.join(used)} are not used", UserWarning, stacklevel=4)


def in_one_stack(table: Table, stack: Path, frames: int) -> Table:
    """The rows, with images in `stack`: by frame where the table names one stack, else in the order of the rows."""
    if len(table.files) == 1:
        return replace(table, files=(os.path.abspath(stack),))
    if frames != len(table):
        raise ValueError(
            f"{stack} holds {frames} images for the {len(table)} rows of {table.path}; give the stack of these rows"
        )
    count = len(table)
    return replace(
        table, files=(os.path.abspath(stack),), file=np.zeros(count, np.int64), frame=np.arange(count, dtype=np.int64)
    )
