"""Opening: from a path to a table and its stacks, checked against each other."""

from __future__ import annotations

import warnings
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_cryo.data import cryodrgn, cryosparc
from pyro_cryo.data.mrc import read_header
from pyro_cryo.data.relion import in_one_stack, particle_block, read_particles, warn_of_aberrations
from pyro_cryo.data.selection import Subset, selected
from pyro_cryo.data.stack import Stack, locate, locate_all
from pyro_cryo.data.star import read_star
from pyro_cryo.data.table import OpticsGroup, Table
from pyro_cryo.data.tilt_pairs import of_both, paired
from pyro_cryo.data.tomo import read_tilt_series
from pyro_cryo.data.tomograms import find_tomograms
from pyro_cryo.physics.ctf import CTF, aliasing_angstrom

EXTENSIONS = ".star, .cs, .mrcs, .mrc or .txt"
PIXEL_COLUMNS = ["rlnOriginXAngst", "rlnOriginYAngst", *cryodrgn.PIXEL_COLUMNS]


def opened(
    path: Path,
    *,
    box: int | None,
    apix: float | None,
    datadir: Path | None,
    first: int | None,
    subset: Subset | None,
    poses: str | Path | None,
    ctf: str | Path | None,
    tilt: str | Path | None,
    tilt_deg: float | None,
) -> tuple[Table, Stack, int]:
    """The chosen rows, the stacks that they name, and the model's box. See `Particles.open`."""
    if apix is not None and not 0 < apix < float("inf"):
        raise ValueError(f"apix is {apix:g}; expected angstrom a stored pixel, above 0")
    if datadir is not None and not datadir.exists():
        raise FileNotFoundError(f"datadir {datadir} does not exist; give the folder of the stacks")
    if (tilt is None) != (tilt_deg is None):
        raise ValueError(f"tilt is {tilt} and tilt_deg {tilt_deg}; tilt pairs need the second stack and the angle")
    table = read_table(path, datadir, apix, ctf is not None)
    count = len(table)
    if tilt is not None and tilt_deg is not None:
        table = paired(table, read_table(Path(tilt), datadir, apix, ctf is not None), tilt_deg)
    whole = len(table)
    given_poses = None if poses is None else cryodrgn.read_poses(poses, count)
    given_ctf = None if ctf is None else cryodrgn.read_ctf(ctf, count)
    if table.view is not None:
        given_poses = None if given_poses is None else of_both(*given_poses, table.view)
        given_ctf = None if given_ctf is None else np.concatenate([given_ctf, given_ctf])
    rows = selected(table, subset, first)
    table = (table if len(rows) == whole and subset is None else table[rows]).used()

    stack = Stack.open(locate_all(table.files, path.parent, datadir if datadir is None or datadir.is_dir() else None))
    table = _with_boxes(table, stack)
    if given_ctf is not None and ctf is not None:
        table = cryodrgn.with_ctf(table, given_ctf[rows.numpy()], ctf)
    if apix is not None:
        table = _with_apix(table, apix)
    for group in table.groups:
        if not 0 < group.apix < float("inf"):
            said = f"a pixel size of {group.apix:g} A" if group.apix else "no pixel size (or 0)"
            raise ValueError(f"{path} has {said}; give its pixel size (apix), angstrom a stored pixel")
    if given_poses is not None:
        boxes = table.per_group([float(group.box) for group in table.groups])
        table = table.with_poses(given_poses[0][rows], given_poses[1][rows] * boxes[:, None])
    if table.ctf is None and any(group.premultiplied for group in table.groups):
        raise ValueError(f"{path} has CTF-premultiplied images but no CTF; add its columns or give ctf=")
    size = _model_box(table, box)
    warn_of_aberrations(table)
    _warn_of_aliasing(table, size)
    if bool((table.particle.diff() < 0).any()):  # images of a particle stand together
        table = table[table.particle.argsort(stable=True)]
    return table, stack, size


def read_table(path: Path, datadir: Path | None, apix: float | None, ctf_given: bool) -> Table:
    """Every row of a table, or every image of stacks."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; check the path")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file in it: {EXTENSIONS}")
    match path.suffix.lower():
        case ".star":
            table = _read_star(path, datadir, apix, ctf_given)
        case ".cs":
            table = cryosparc.read_particles(path, ctf_given)
        case ".mrcs" | ".mrc":
            table = _of_stacks(path, [str(path.resolve())], path.parent, None, ctf_given)
        case ".txt":
            lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
            names = [line for line in lines if line and not line.startswith("#")]
            if not names:
                raise ValueError(f"{path} lists no stack; give one path a line")
            table = _of_stacks(path, names, path.parent, datadir, ctf_given)
        case suffix:
            raise ValueError(f"{path} has the unknown extension {suffix!r}; expected {EXTENSIONS}")
    if datadir is not None and datadir.is_file():
        table = in_one_stack(table, datadir, read_header(datadir).frames)
    return table


def _read_star(path: Path, datadir: Path | None, apix: float | None, ctf_given: bool) -> Table:
    folder = datadir if datadir is None or datadir.is_dir() else datadir.parent
    blocks = read_star(path)
    tomograms = None
    for block in list(blocks.values()):
        if isinstance(block, dict) and "rlnTomoParticlesFile" in block:
            tomograms = locate(block.get("rlnTomoTomogramsFile", ""), path.parent, folder)
            path = locate(block["rlnTomoParticlesFile"], path.parent, folder)
            blocks = read_star(path)
    if "rlnTomoName" in particle_block(blocks, path):
        return read_tilt_series(blocks, path, tomograms or find_tomograms(path), folder, ctf_given)
    return read_particles(blocks, path, apix, ctf_given)


def _of_stacks(path: Path, names: list[str], folder: Path, datadir: Path | None, ctf_given: bool) -> Table:
    """Images without a table."""
    headers = [read_header(where) for where in locate_all(names, folder, datadir)]
    known = {header.apix for header in headers if header.apix > 0}
    apix = known.pop() if len(known) == 1 else 0.0
    if not ctf_given:
        warnings.warn(
            f"{path} has no CTF: images are taken as free of it (give ctf= if not)", UserWarning, stacklevel=5
        )
    return Table.bare(path, tuple(names), [header.frames for header in headers], OpticsGroup("1", apix, 0))


def _with_boxes(table: Table, stack: Stack) -> Table:
    """The table with the boxes of its stacks, which must agree with it."""
    frames = np.array([file.frames for file in stack.files])
    beyond = np.flatnonzero((table.frame >= frames[table.file]) | (table.frame < 0))
    if len(beyond):
        row = beyond[0]
        name, count = table.files[table.file[row]], frames[table.file[row]]
        raise ValueError(
            f"{table.path}: row {row} is image {table.frame[row] + 1} of {name}, which holds {count}; "
            "give the right stack"
        )
    boxes = np.array([file.box for file in stack.files])[table.file]
    groups = []
    for number, group in enumerate(table.groups):
        found = np.unique(boxes[table.group.numpy() == number])
        if len(found) > 1:
            sizes = " and ".join(map(str, found))
            raise ValueError(
                f"{table.path}: optics group {group.name} has images of {sizes} pixels; expected one box a group: "
                "give each box an optics group"
            )
        if group.box not in (0, int(found[0])):
            raise ValueError(
                f"{table.path}: optics group {group.name} says {group.box} pixels (rlnImageSize), its images have "
                f"{found[0]}; mend rlnImageSize and rlnImagePixelSize"
            )
        groups.append(replace(group, box=int(found[0])))
    return replace(table, groups=tuple(groups))


def _with_apix(table: Table, apix: float) -> Table:
    """Other pixel sizes. Displacements in pixels stay; the input's own columns in angstrom are forgotten."""
    groups = tuple(replace(group, apix=apix) for group in table.groups)
    source = table.source
    if source is not None and not isinstance(source, np.ndarray):
        source = source.drop(columns=[name for name in PIXEL_COLUMNS if name in source])
    return replace(table, groups=groups, source=source)


def _model_box(table: Table, box: int | None) -> int:
    boxes = [group.box for group in table.groups]
    even = [group.even_box for group in table.groups]
    if box is None:
        if min(boxes) % 2:
            raise ValueError(f"box {min(boxes)} is odd; crop with Particles.open(..., box={min(even)})")
        box = min(boxes)
    if box % 2 or box < 4:
        raise ValueError(
            f"box {box} is not an even number of at least 4; crop with Particles.open(..., box={max(4, box - box % 2)})"
        )
    if box > min(even):
        raise ValueError(f"box {box} is larger than the images ({min(boxes)} pixels); give box={min(even)} or less")
    return box


def _warn_of_aliasing(table: Table, box: int) -> None:
    if table.ctf is None:
        return
    coarsest = 0.0
    for number, group in enumerate(table.groups):
        coarsest = max(
            coarsest, aliasing_angstrom(_strongest(table.ctf, table.group == number), group.field_angstrom / box, box)
        )
    if coarsest > 0:
        field = min(group.field_angstrom for group in table.groups)
        warnings.warn(
            f"{table.path}: the CTF aliases beyond {coarsest:.1f} A in a box of {field:.0f} A; "
            "extract the images in a larger box",
            UserWarning,
            stacklevel=4,
        )


def _strongest(ctf: CTF, rows: Tensor) -> CTF:
    """One image a microscope, with the largest defocus of its images: its phase turns the fastest."""
    picked = ctf[rows]
    defocus = torch.maximum(picked.defocus_u_angstrom.abs(), picked.defocus_v_angstrom.abs())
    microscopes, member = torch.unique(torch.stack([picked.voltage_kv, picked.cs_mm], -1), dim=0, return_inverse=True)
    largest = torch.zeros(len(microscopes)).scatter_reduce(0, member, defocus, "amax")
    values = {f.name: torch.zeros(len(microscopes)) for f in fields(CTF)}
    values |= {"defocus_u_angstrom": largest, "defocus_v_angstrom": largest}
    return CTF(**{**values, "voltage_kv": microscopes[:, 0], "cs_mm": microscopes[:, 1]})
