"""Any table as RELION 3.1 writes it: optics and particles."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pyro_cryo.data.relion import EULER
from pyro_cryo.data.table import Table
from pyro_cryo.physics.rotations import to_euler_deg

if TYPE_CHECKING:
    import pandas as pd

    from pyro_cryo.physics.ctf import CTF

# Columns of 3.0 that stand in the table of optics, or in angstrom, since 3.1.
OUTDATED = [
    "rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast", "rlnMagnification", "rlnDetectorPixelSize",
    "rlnPixelSize", "rlnImagePixelSize", "rlnOriginX", "rlnOriginY",
]  # fmt: skip


def to_blocks(
    table: Table, stacks: Sequence[str], folder: Path, poses: tuple[Tensor, Tensor] | None, extra: Mapping[str, Any]
) -> dict[str, pd.DataFrame]:
    """Blocks of a STAR file in `folder`.

    stacks: where the table's files are; they are named relative to the folder
    poses:  rotations (N, 3, 3) and displacements in stored pixels (N, 2) to write instead of the table's own
    extra:  further columns (N,) by name
    """
    import pandas as pd

    source = table.source
    rows = pd.DataFrame(index=range(len(table))) if source is None or isinstance(source, np.ndarray) else source.copy()
    names = [os.path.relpath(stack, folder) for stack in stacks]
    rows["rlnImageName"] = [f"{i + 1:06d}@{names[f]}" for f, i in zip(table.file, table.frame, strict=True)]
    rows["rlnOpticsGroup"] = _group_numbers(table)[table.group.numpy()]
    if poses is not None:
        _put(rows, _pose_columns(table, *poses))
    elif table.rotation is not None:
        _fill(rows, _pose_columns(table, table.rotation, table.shift_px))
    if table.ctf is not None:
        _fill(rows, _ctf_columns(table.ctf))
    if table.exposure is not None:
        _fill(rows, {"rlnMicrographPreExposure": table.exposure.numpy()})
    if table.half_set.any():
        _fill(rows, {"rlnRandomSubset": table.half_set.numpy()})
    for name, values in extra.items():
        if np.shape(values) != (len(table),):
            raise ValueError(f"column {name} has shape {np.shape(values)}; expected ({len(table)},), one value a row")
        rows[name] = np.asarray(values)
    outdated = [name for name in OUTDATED if name in rows]
    return {"optics": _optics(table), "particles": rows.drop(columns=outdated)}


def _fill(rows: pd.DataFrame, columns: Mapping[str, np.ndarray]) -> None:
    _put(rows, {name: values for name, values in columns.items() if name not in rows})


def _put(rows: pd.DataFrame, columns: Mapping[str, np.ndarray]) -> None:
    for name, values in columns.items():
        rows[name] = values


def _pose_columns(table: Table, rotation: Tensor, shift_px: Tensor) -> dict[str, np.ndarray]:
    euler = to_euler_deg(rotation.double().cpu().numpy())
    apix = np.array([group.apix for group in table.groups])[table.group.numpy()]
    origin = -shift_px.double().cpu().numpy() * apix[:, None]
    return {
        **{name: euler[:, i] for i, name in enumerate(EULER)},
        "rlnOriginXAngst": origin[:, 0],
        "rlnOriginYAngst": origin[:, 1],
    }


def _ctf_columns(ctf: CTF) -> dict[str, np.ndarray]:
    return {
        "rlnDefocusU": ctf.defocus_u_angstrom.numpy(),
        "rlnDefocusV": ctf.defocus_v_angstrom.numpy(),
        "rlnDefocusAngle": ctf.defocus_angle_deg.numpy(),
        "rlnPhaseShift": ctf.phase_shift_deg.numpy(),
        "rlnCtfBfactor": ctf.bfactor_angstrom2.numpy(),
        "rlnCtfScalefactor": ctf.scale.numpy(),
    }


def _group_numbers(table: Table) -> np.ndarray:
    """RELION's numbers of the groups: their own names where the input was RELION's, else 1, 2, ..."""
    if table.optics is not None:
        return np.array([int(group.name) for group in table.groups])
    return np.arange(1, len(table.groups) + 1)


def _optics(table: Table) -> pd.DataFrame:
    import pandas as pd

    numbers = _group_numbers(table)
    if table.optics is not None:
        optics = table.optics[table.optics["rlnOpticsGroup"].isin(numbers)].reset_index(drop=True)
    else:
        optics = pd.DataFrame({"rlnOpticsGroup": numbers, "rlnOpticsGroupName": [f"opticsGroup{n}" for n in numbers]})
    if table.ctf is not None:
        first = np.array([int((table.group == g).nonzero()[0]) for g in range(len(table.groups))])
        _fill(
            optics,
            {
                "rlnVoltage": table.ctf.voltage_kv.numpy()[first],
                "rlnSphericalAberration": table.ctf.cs_mm.numpy()[first],
                "rlnAmplitudeContrast": table.ctf.amplitude_contrast.numpy()[first],
            },
        )
    columns = {
        "rlnImagePixelSize": np.array([group.apix for group in table.groups]),
        "rlnImageSize": np.array([group.box for group in table.groups]),
        "rlnImageDimensionality": np.full(len(numbers), 2),
    }
    if any(group.premultiplied for group in table.groups):
        columns["rlnCtfDataAreCtfPremultiplied"] = np.array([int(group.premultiplied) for group in table.groups])
    _put(optics, columns)
    return optics
