"""Tomograms of RELION 5 and Warp: how each tilt was taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pyro_cryo.data.stack import locate
from pyro_cryo.data.star import numbers, read_star

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Tomogram:
    """T tilts.

    projection: (T, 3, 3) tomogram axes to view axes
    tilts:      (T, 5) defocus U, V (angstrom, at the tomogram's centre), angle (degree), CTF scale, exposure before the
                tilt (electrons an A^2)
    apix:       angstrom a pixel of the tilt series
    size:       (3,) x, y, z in such pixels
    hand:       sign of the depth in the defocus
    microscope: rlnVoltage and its like, as far as the table of tomograms has them
    """

    projection: np.ndarray
    tilts: np.ndarray
    apix: float
    size: np.ndarray
    hand: float
    microscope: dict[str, float]


def find_tomograms(particles: Path) -> Path:
    """The tomograms of a table of particles that was opened by itself: a file beside it of the usual names."""
    stem = particles.name.removesuffix(".star").removesuffix("_particles").removesuffix("particles")
    for name in (f"{stem}_tomograms.star", f"{stem}tomograms.star", "tomograms.star"):
        if (particles.parent / name).is_file():
            return particles.parent / name
    raise FileNotFoundError(
        f"{particles} is of a tilt series and no tomograms.star lies beside it; open its optimisation_set.star"
    )


def read_tomograms(path: Path, names: Sequence[str], optics: pd.DataFrame, datadir: Path | None) -> dict[str, Tomogram]:
    """The tomograms `names` of a tomograms.star; `optics` is that of the particles."""
    blocks = read_star(path)
    table = blocks.get("global")
    if table is None or isinstance(table, dict) or "rlnTomoName" not in table:
        raise ValueError(f"{path} has no data_global with rlnTomoName; give a tomograms.star")
    rows = {str(name): row for row, name in enumerate(table["rlnTomoName"])}
    missing = [name for name in names if name not in rows]
    if missing:
        raise ValueError(
            f"{path} has no tomogram {missing[0]}; give the tomograms that the particles were extracted from"
        )
    tomograms = {}
    for name in names:
        row = table.iloc[[rows[name]]]
        tilts = blocks.get(name)
        if tilts is None and "rlnTomoTiltSeriesStarFile" in row:
            where = locate(str(row["rlnTomoTiltSeriesStarFile"].iloc[0]), path.parent, datadir)
            tilts = next(iter(read_star(where).values()))
        if tilts is None or isinstance(tilts, dict):
            raise ValueError(f"{path} has no data_{name} with its tilts; export the tomograms again")
        tomograms[name] = _tomogram(row, tilts, optics, path)
    return tomograms


def _tomogram(row: pd.DataFrame, tilts: pd.DataFrame, optics: pd.DataFrame, path: Path) -> Tomogram:
    def once(name: str, default: float | None = None) -> float:
        source = row if name in row or name not in optics else optics
        return float(numbers(source, name, path, default)[0])

    exposure = numbers(tilts, "rlnMicrographPreExposure", path, default=0)
    scale = numbers(tilts, "rlnCtfScalefactor", path, default=1)
    defocus = [numbers(tilts, name, path) for name in ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle")]
    microscope = [n for n in ("rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast") if n in row]
    return Tomogram(
        projection=_projection(tilts, path),
        tilts=np.column_stack([*defocus, scale, exposure]),
        apix=once("rlnTomoTiltSeriesPixelSize"),
        size=np.array([once(f"rlnTomoSize{axis}") for axis in "XYZ"]),
        hand=once("rlnTomoHand", 1.0),
        microscope={name: once(name) for name in microscope},
    )


def _projection(tilts: pd.DataFrame, path: Path) -> np.ndarray:
    """(T, 3, 3): rlnTomoProjX, Y, Z of Warp and RELION 4, or Rz(ZRot) Ry(YTilt) Rx(XTilt) of RELION 5."""
    if "rlnTomoProjX" in tilts:
        try:
            matrix = np.stack([_vectors(tilts[f"rlnTomoProj{axis}"])[:, :3] for axis in "XYZ"], 1)
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{path}: rlnTomoProjX, Y, Z are not matrices ({error}); export the tomograms again"
            ) from None
    else:
        from scipy.spatial.transform import Rotation

        angles = [numbers(tilts, name, path) for name in ("rlnTomoXTilt", "rlnTomoYTilt", "rlnTomoZRot")]
        matrix = Rotation.from_euler("xyz", np.column_stack(angles), degrees=True).as_matrix()
    if np.abs(matrix @ matrix.transpose(0, 2, 1) - np.eye(3)).max() > 1e-2:
        raise ValueError(f"{path}: rlnTomoProjX, Y, Z are not rotations; export the tomograms again")
    return matrix


def _vectors(column: pd.Series) -> np.ndarray:
    return np.array([str(text).strip("[]").split(",") for text in column], dtype=np.float64)
