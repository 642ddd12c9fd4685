"""Three-dimensional maps in MRC files, in and out.

A map's array is z-y-x and its centre voxel is D // 2. Files are written with NXSTART and ORIGIN zero, as RELION and
cryoSPARC write theirs: viewers then place the first voxel at 0 and the centre voxel at D // 2 * apix, half the
field of view. So maps of one data set lie on top of each other in ChimeraX whatever program made them, and a map
from Fourier-cropped images (another D, the same D * apix) lies on top of the full-sized one too.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def read_map(path: str | Path, apix: float | None = None) -> tuple[Tensor, float]:
    """A map as float32 (D, D, D), z-y-x, and its voxel size in angstrom.

    Takes .mrc, .map and .ccp4, also gzipped. `apix` overrides the header, and is needed where the header has none.

    Raises FileNotFoundError where there is no file, ValueError where it is no MRC map, not a cube of an even number
    of voxels, or without a usable voxel size.
    """
    import mrcfile

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"map {path} does not exist; check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sloppy headers are common; what is used of them is checked below
            with mrcfile.open(path, permissive=True) as file:
                data = None if file.data is None else np.array(file.data)
                header, voxel = file.header, file.voxel_size
                axes = [int(header[name]) for name in ("maps", "mapr", "mapc")] if header is not None else []
                sizes = [float(voxel[name]) for name in "xyz"] if voxel is not None else []
    except (ValueError, OSError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as an MRC map ({_first_line(error)}); give a .mrc file") from None
    if data is None or data.size == 0:
        raise ValueError(f"{path} is not an MRC map, or is truncated; give a complete .mrc file")
    if data.ndim != 3 or len(set(data.shape)) != 1:
        raise ValueError(f"{path} holds {_by(data.shape)} voxels, not a cube; pad or crop it to a cube")
    if data.shape[0] % 2 or data.shape[0] < 4:
        raise ValueError(f"{path} has a box of {data.shape[0]}, not an even number; pad or crop it by one voxel")
    if not np.isrealobj(data):
        raise ValueError(f"{path} holds complex values (a transform); give the real-space map")
    if sorted(axes) == [1, 2, 3]:  # axes[i] names the axis, 1 x to 3 z, that array dimension i runs along
        data = data.transpose([axes.index(3), axes.index(2), axes.index(1)])
    volume = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
    if not bool(torch.isfinite(volume).all()):
        raise ValueError(f"{path} holds voxels that are not finite; mend the map")
    return volume, float(apix) if apix is not None else _voxel_size(path, sizes)


def write_map(path: str | Path, volume: Tensor, apix: float) -> None:
    """Write (D, D, D), z-y-x, as a float32 MRC map of `apix` angstrom a voxel, origin 0 (see the module).

    The file appears whole or not at all: it is written beside its place and moved there. The same map gives the same
    bytes.
    """
    import mrcfile

    path = Path(path)
    if volume.dim() != 3 or len(set(volume.shape)) != 1:
        raise ValueError(f"{path}: a map of {_by(volume.shape)} voxels is not a cube; write one cube a file")
    if not apix > 0:
        raise ValueError(f"{path}: voxel size {apix} is not positive; give angstrom a voxel")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with mrcfile.new(temporary, overwrite=True) as file:
            file.set_data(volume.detach().to("cpu", torch.float32).contiguous().numpy())
            file.voxel_size = apix
            file.header.label[0] = b"pyro_cryo"  # in place of the time of writing
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _voxel_size(path: Path, sizes: list[float]) -> float:
    if len(sizes) != 3 or not all(np.isfinite(s) and s > 0 for s in sizes):
        raise ValueError(f"{path} has no voxel size in its header; give apix in angstrom")
    if max(sizes) - min(sizes) > 1e-3 * max(sizes):
        raise ValueError(f"{path} has voxels of {_by(sizes)} angstrom; resample to cubic voxels or give apix")
    return float(sizes[0])


def _by(numbers: object) -> str:
    return " x ".join(f"{n:g}" for n in numbers)  # type: ignore[attr-defined]


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
