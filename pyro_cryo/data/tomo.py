"""Tilt series: RELION 5 and Warp tables of particles whose images are 2-D stacks, one frame a tilt.

The projection matrix P of a tilt takes tomogram axes to view axes, the particle's angles A take volume axes to
tomogram axes: its image has rotation P A. A particle at X from the tomogram's centre lies (P X)_z further along the
beam, which changes its defocus by rlnTomoHand times that (RELION's definition of the hand).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pyro_cryo.data.mrc import read_header
from pyro_cryo.data.relion import MICROSCOPE, Blocks, particle_block, read_half_set, read_optics, read_rotation
from pyro_cryo.data.stack import locate
from pyro_cryo.data.star import numbers
from pyro_cryo.data.table import Table, check_optics
from pyro_cryo.data.tomograms import Tomogram, read_tomograms
from pyro_cryo.physics.ctf import CTF
from pyro_cryo.physics.rotations import from_euler_deg

if TYPE_CHECKING:
    import pandas as pd

AXES = "XYZ"
SUBTOMOGRAM = ["rlnTomoSubtomogramRot", "rlnTomoSubtomogramTilt", "rlnTomoSubtomogramPsi"]


def read_tilt_series(blocks: Blocks, path: Path, tomograms: Path, datadir: Path | None, ctf_given: bool) -> Table:
    """Every visible tilt image of every particle as one row."""
    rows = particle_block(blocks, path)
    groups, group, optics = read_optics(blocks, rows, path)
    if optics is None:
        raise ValueError(f"{path} is a table of a tilt series without data_optics; export it again")
    if (numbers(optics, "rlnImageDimensionality", path, default=2) == 3).any():
        raise ValueError(f"{path} holds 3-D subtomograms; extract 2-D stacks instead (RELION 5 and WarpTools can)")
    series = read_tomograms(tomograms, list(dict.fromkeys(rows["rlnTomoName"])), optics, datadir)
    tomogram = [series[name] for name in rows["rlnTomoName"]]
    visible = _visible(rows, tomogram, path)
    frames = _frames(rows, tomogram, visible, path, datadir)

    particle = np.repeat(np.arange(len(rows)), [len(tilts) for tilts in visible])
    projection = np.concatenate([t.projection[v] for t, v in zip(tomogram, visible, strict=True)])
    orientation, position, origin = _in_tomogram(rows, tomogram, optics, group, path)
    view_origin = np.einsum("nij,nj->ni", projection, origin[particle])
    depth = np.einsum("nj,nj->n", projection[:, 2], position[particle])
    apix = np.array([g.apix for g in groups])[group[particle]]
    tilts = np.concatenate([t.tilts[v] for t, v in zip(tomogram, visible, strict=True)])
    hand = np.array([t.hand for t in tomogram])[particle]
    names = rows["rlnImageName"].tolist()
    source = rows[["rlnImageName", *(n for n in ("rlnTomoParticleName", "rlnRandomSubset") if n in rows)]].iloc[
        particle
    ]
    if "rlnTomoParticleName" not in source:
        source = source.assign(rlnTomoParticleName=[f"particle/{i + 1}" for i in particle])
    microscope = [_microscope(name, optics, tomogram, group, path)[particle] for name in MICROSCOPE]
    ctf = None if ctf_given else _ctf(tilts, depth * hand, microscope, path)
    return Table(
        path=path,
        files=tuple(names),
        file=particle,
        frame=np.concatenate(frames),
        groups=groups,
        group=torch.from_numpy(group[particle]),
        sign=torch.ones(len(particle)),
        rotation=None if orientation is None else torch.from_numpy(projection @ orientation[particle]).float(),
        shift_px=torch.from_numpy(-view_origin[:, :2] / apix[:, None]).float(),
        ctf=ctf,
        exposure=torch.from_numpy(tilts[:, 4]).float(),
        half_set=read_half_set(rows, path)[torch.from_numpy(particle)],
        particle=torch.from_numpy(particle),
        source=source.reset_index(drop=True),
        optics=optics,
    )


def _visible(rows: pd.DataFrame, tomogram: list[Tomogram], path: Path) -> list[np.ndarray]:
    """Tilts of each particle that have an image: rlnTomoVisibleFrames, or all."""
    if "rlnTomoVisibleFrames" not in rows:
        return [np.arange(len(t.tilts)) for t in tomogram]
    out = []
    for row, (flags, t) in enumerate(zip(rows["rlnTomoVisibleFrames"], tomogram, strict=True)):
        seen = np.array([flag.strip() == "1" for flag in str(flags).strip("[]").split(",")])
        if len(seen) != len(t.tilts):
            raise ValueError(
                f"{path}: rlnTomoVisibleFrames of row {row} has {len(seen)} flags for {len(t.tilts)} tilts of "
                f"{rows['rlnTomoName'].iloc[row]}; give the tomograms that the particles were extracted from"
            )
        out.append(np.flatnonzero(seen))
    return out


def _frames(
    rows: pd.DataFrame, tomogram: list[Tomogram], visible: list[np.ndarray], path: Path, datadir: Path | None
) -> list[np.ndarray]:
    """Frames of the visible tilts: RELION stores these alone, Warp all tilts. The stack's length tells which."""
    for row, (t, seen) in enumerate(zip(tomogram, visible, strict=True)):
        if len(seen) == len(t.tilts):
            continue
        name = str(rows["rlnImageName"].iloc[row])
        images = read_header(locate(name, path.parent, datadir)).frames
        if images == len(t.tilts):
            return visible
        if images != len(seen):
            raise ValueError(
                f"{name} holds {images} images; expected {len(seen)} (visible tilts) or {len(t.tilts)} "
                "(all): export it again"
            )
        return [np.arange(len(v)) for v in visible]
    return visible


def _in_tomogram(
    rows: pd.DataFrame, tomogram: list[Tomogram], optics: pd.DataFrame, group: np.ndarray, path: Path
) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """Orientation (n, 3, 3) or None, position from the centre and origin (n, 3) in angstrom, of n particles."""
    rotation = read_rotation(rows, path)
    orientation = None if rotation is None else rotation.double().numpy()
    origin = np.column_stack([numbers(rows, f"rlnOrigin{axis}Angst", path, default=0) for axis in AXES])
    if all(name in rows for name in SUBTOMOGRAM):
        subtomogram = from_euler_deg(np.column_stack([numbers(rows, name, path) for name in SUBTOMOGRAM]))
        orientation = None if orientation is None else subtomogram @ orientation
        origin = np.einsum("nij,nj->ni", subtomogram, origin)
    if "rlnCenteredCoordinateXAngst" in rows:
        centred = [numbers(rows, f"rlnCenteredCoordinate{axis}Angst", path) for axis in AXES]
        return orientation, np.column_stack(centred) - origin, origin
    pixel = np.array([t.apix for t in tomogram])[:, None]
    size = np.array([t.size for t in tomogram])
    coordinate = np.column_stack([numbers(rows, f"rlnCoordinate{axis}", path) for axis in AXES])
    binning = numbers(optics, "rlnTomoSubtomogramBinning", path, default=1)[group][:, None]
    # RELION counts in pixels of the tilt series, Warp in those of the particles. A table all of whose coordinates lie
    # in the corner that the binned tomogram takes up is Warp's.
    if (coordinate * binning <= size).all():
        coordinate = coordinate * binning
    return orientation, (coordinate - size / 2) * pixel - origin, origin


def _microscope(name: str, optics: pd.DataFrame, tomogram: list[Tomogram], group: np.ndarray, path: Path) -> np.ndarray:
    if name in optics:
        return numbers(optics, name, path)[group]
    missing = [t.microscope.get(name, np.nan) for t in tomogram]
    if np.isnan(missing).any():
        raise ValueError(f"{path} and its tomograms have no column {name}; add it to data_optics")
    return np.array(missing)


def _ctf(tilts: np.ndarray, depth_angstrom: np.ndarray, microscope: list[np.ndarray], path: Path) -> CTF:
    u, v, angle, scale = tilts[:, :4].T
    zero = np.zeros(len(tilts))
    fields = [u + depth_angstrom, v + depth_angstrom, angle, *microscope, zero, zero, scale]
    ctf = CTF(*(torch.from_numpy(np.array(field, np.float32)) for field in fields))
    check_optics(ctf, str(path))
    return ctf
