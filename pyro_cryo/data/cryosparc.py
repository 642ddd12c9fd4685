"""cryoSPARC's .cs tables: numpy structured arrays, in and out.

alignments3D/pose is the rotation vector of the inverse of R, alignments3D/shift is minus the displacement in pixels of
alignments3D/psize_A, blob/sign times the pixels makes protein bright, and angles are in radians.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_cryo.data.table import OpticsGroup, Table, check_optics
from pyro_cryo.physics import rotations
from pyro_cryo.physics.ctf import CTF

ABERRATIONS = ("ctf/shift_A", "ctf/tilt_A", "ctf/trefoil_A", "ctf/tetra_A", "ctf/anisomag")
ALIGNMENTS = ("alignments3D", "alignments_class_0")


def read_array(path: str | Path) -> np.ndarray:
    """The rows of a .cs file. Raises ValueError where it is not a structured array with images."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; check the path")
    try:
        rows = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"{path} is not a numpy structured array ({str(error).splitlines()[0]}); give a .cs file"
        ) from None
    if not isinstance(rows, np.ndarray) or rows.dtype.names is None or rows.ndim != 1:
        raise ValueError(f"{path} is not a numpy structured array; give a .cs file")
    if not len(rows):
        raise ValueError(f"{path} is an empty table; give one with rows")
    for name in ("blob/path", "blob/idx", "blob/shape"):
        if name not in rows.dtype.names:
            raise ValueError(f"{path} has no column {name}; give the .cs file with the images (often the passthrough)")
    return rows


def read_particles(path: Path, ctf_given: bool) -> Table:
    """A .cs file as a Table."""
    rows = read_array(path)
    names, file = np.unique(rows["blob/path"], return_inverse=True)
    files = tuple(name.decode().lstrip(">") for name in names)
    groups, group = _groups(rows)
    rotation, shift_px = _poses(rows, np.array([g.apix for g in groups])[group])
    if rotation is not None and not bool(torch.isfinite(rotation).all()):
        raise ValueError(f"{path} has poses that are not finite; remove these rows")
    split = _column(rows, "alignments3D/split")
    _warn_of_aberrations(rows, path)
    return Table(
        path=path,
        files=files,
        file=file.reshape(-1),
        frame=rows["blob/idx"].astype(np.int64),
        groups=groups,
        group=torch.from_numpy(group),
        sign=_tensor(_column(rows, "blob/sign", 1.0)),
        rotation=rotation,
        shift_px=shift_px,
        ctf=None if ctf_given else _ctf(rows, path),
        exposure=None,
        half_set=torch.zeros(len(rows), dtype=torch.int8) if split is None else _tensor(split + 1).to(torch.int8),
        particle=torch.arange(len(rows)),
        source=rows,
    )


def _column(rows: np.ndarray, name: str, default: float | None = None) -> np.ndarray | None:
    if name in _names(rows):
        return rows[name]
    return None if default is None else np.full(len(rows), default)


def _names(rows: np.ndarray) -> tuple[str, ...]:
    return rows.dtype.names or ()


def _tensor(values: np.ndarray | None) -> Tensor:
    return torch.from_numpy(np.array(values, np.float32))


def _groups(rows: np.ndarray) -> tuple[tuple[OpticsGroup, ...], np.ndarray]:
    """Exposure groups, further split by pixel size, box and microscope."""
    keys = np.column_stack([
        np.array(_column(rows, "ctf/exp_group_id", 0.0), float),
        np.nan_to_num(np.array(_column(rows, "blob/psize_A", 0.0), float)),
        rows["blob/shape"][:, 0].astype(float),
        *(np.array(_column(rows, f"ctf/{name}", 0.0), float) for name in ("accel_kv", "cs_mm", "amp_contrast")),
    ])  # fmt: skip
    found, group = np.unique(keys, axis=0, return_inverse=True)
    return tuple(OpticsGroup(f"{k[0]:g}", float(k[1]), int(k[2])) for k in found), group.reshape(-1)


def _poses(rows: np.ndarray, apix: np.ndarray) -> tuple[Tensor | None, Tensor]:
    prefix = next((p for p in ALIGNMENTS if f"{p}/pose" in _names(rows)), None)
    if prefix is None:
        return None, torch.zeros(len(rows), 2)
    rotation = rotations.exp(torch.from_numpy(-rows[f"{prefix}/pose"].astype(np.float64))).float()
    shift = _column(rows, f"{prefix}/shift")
    if shift is None:
        return rotation, torch.zeros(len(rows), 2)
    pixel = _column(rows, f"{prefix}/psize_A")
    scale = np.ones(len(rows)) if pixel is None else np.where(apix > 0, pixel / np.where(apix > 0, apix, 1), 1)
    return rotation, _tensor(-shift * scale[:, None])


def _ctf(rows: np.ndarray, path: Path) -> CTF | None:
    if "ctf/df1_A" not in _names(rows):
        warnings.warn(
            f"{path} has no ctf/df1_A: images are taken as free of CTF (give ctf= if not)", UserWarning, stacklevel=6
        )
        return None
    for name in ("df2_A", "df_angle_rad", "accel_kv", "cs_mm", "amp_contrast"):
        if f"ctf/{name}" not in _names(rows):
            raise ValueError(f"{path} has no column ctf/{name}; give a .cs file with the whole CTF or ctf=")
    values = [
        rows["ctf/df1_A"],
        rows["ctf/df2_A"],
        np.rad2deg(rows["ctf/df_angle_rad"]),
        rows["ctf/accel_kv"],
        rows["ctf/cs_mm"],
        rows["ctf/amp_contrast"],
        np.rad2deg(np.array(_column(rows, "ctf/phase_shift_rad", 0.0))),
        _column(rows, "ctf/bfactor", 0.0),
        _column(rows, "ctf/scale", 1.0),
    ]
    ctf = CTF(*(_tensor(value) for value in values))
    if not all(bool(torch.isfinite(_tensor(value)).all()) for value in values):
        raise ValueError(f"{path} has CTF values that are not finite; remove these rows")
    check_optics(ctf, str(path))
    return ctf


def _warn_of_aberrations(rows: np.ndarray, path: Path) -> None:
    identity = np.array([1.0, 0.0, 0.0, 1.0])
    used = []
    for name in ABERRATIONS:
        values = _column(rows, name)
        if values is not None and values.any() and not (name == "ctf/anisomag" and np.allclose(values, identity)):
            used.append(name)
    if used:
        warnings.warn(f"{path}: {', '.join(used)} are not used", UserWarning, stacklevel=6)


def write_particles(path: str | Path, rows: np.ndarray, poses: tuple[Tensor, Tensor] | None) -> None:
    """Write rows (N,) of a .cs file again, `poses`: other rotations (N, 3, 3) and displacements (N, 2), stored pixels.

    Complete or not at all: a file of that name is replaced only at the end.
    """
    rows = rows.copy()
    if poses is not None:
        rotation, shift_px = poses
        prefix = next((p for p in ALIGNMENTS if f"{p}/pose" in _names(rows)), None)
        if prefix is None:
            raise ValueError("the .cs input has no alignments3D/pose to put poses in; write a STAR file instead")
        rows[f"{prefix}/pose"] = -rotations.log(rotation.double().cpu()).numpy()
        pixel = rows[f"{prefix}/psize_A"] if f"{prefix}/psize_A" in _names(rows) else rows["blob/psize_A"]
        rows[f"{prefix}/shift"] = -shift_px.cpu().numpy() * (rows["blob/psize_A"] / pixel)[:, None]
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.save(file, rows, allow_pickle=False)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
