"""Which rows of a table to keep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_cryo.data.cryodrgn import read_arrays
from pyro_cryo.data.relion import particle_block
from pyro_cryo.data.star import read_star
from pyro_cryo.data.table import Table

ANY = -1  # frame of an image name that is a stack: all its frames are of one particle
Subset = str | Path | Sequence[int] | np.ndarray | Tensor


def selected(table: Table, subset: Subset | None, first: int | None) -> Tensor:
    """Rows (n,) of the particles of `subset`, in its order, and of these the first `first`.

    A tilt series keeps all images of a particle.

    subset: numbers from 0, or a file of them: .txt (one a line), .npy, .pkl; or a .star that names the images
    """
    if first is not None and first < 1:
        raise ValueError(f"first is {first}; expected 1 or more particles")
    if subset is None and first is None:
        return torch.arange(len(table))
    count = int(table.particle.max()) + 1
    if subset is None:
        wanted = torch.arange(count)
    elif isinstance(subset, str | Path) and Path(subset).suffix == ".star":
        wanted = _named_in(Path(subset), table)
    else:
        wanted = _checked(subset, count)
    if first is not None:
        wanted = wanted[:first]
    if count == len(table):
        return wanted
    rank = torch.full((count,), count)
    rank[wanted] = torch.arange(len(wanted))
    order = torch.argsort(rank[table.particle], stable=True)
    return order[: int((rank[table.particle] < count).sum())]


def _checked(subset: Subset, count: int) -> Tensor:
    where = str(subset) if isinstance(subset, str | Path) else "the subset"
    numbers = _read(Path(subset)) if isinstance(subset, str | Path) else np.asarray(subset)
    if numbers.dtype == bool:
        if numbers.shape != (count,):
            raise ValueError(f"{where} is a mask of shape {numbers.shape}; expected ({count},), one flag a particle")
        numbers = np.flatnonzero(numbers)
    if numbers.size == 0:
        raise ValueError(f"{where} selects no particle; give one number or more")
    if numbers.ndim != 1 or not np.array_equal(numbers, np.floor(numbers)):
        raise ValueError(f"{where} is not a list of whole numbers; give one number a line, counted from 0")
    outside = numbers[(numbers < 0) | (numbers >= count)]
    if len(outside):
        raise ValueError(f"{where} names particle {outside[0]:g}; expected 0 to {count - 1}")
    values, counts = np.unique(numbers, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"{where} names particle {values[counts > 1][0]:g} more than once; remove the duplicates")
    return torch.from_numpy(numbers.astype(np.int64))


def _read(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"subset {path} does not exist; check the path")
    if path.suffix == ".pkl":
        return read_arrays(path)[0]
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix == ".txt":
            return np.array([float(word) for word in path.read_text().split()])
    except (ValueError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path} is not a list of numbers ({reason}); give one number a line, counted from 0"
        ) from None
    raise ValueError(f"subset {path} has an unknown extension; expected .txt, .npy, .pkl or .star")


def _named_in(path: Path, table: Table) -> Tensor:
    """Particles whose image names a STAR file lists, in its order: frame and name of the stack must agree."""
    listed = [str(name) for name in particle_block(read_star(path), path)["rlnImageName"]]
    if len(set(listed)) < len(listed):
        raise ValueError(f"{path} names an image more than once; remove the duplicates")
    whole = list(table.files)
    for files in (whole, [Path(name).name for name in whole]):  # another program often names another folder
        images = [(files[f], int(i)) for f, i in zip(table.file, table.frame, strict=True)]
        particle_of: dict[tuple[str, int], int] = dict(zip(images, table.particle.tolist(), strict=True))
        unique = len(particle_of) == len(table)
        particle_of |= {(files[f], ANY): p for f, p in zip(table.file, table.particle.tolist(), strict=True)}
        wanted = [_split(name) for name in listed]
        if files is not whole:
            wanted = [(Path(stack).name, frame) for stack, frame in wanted]
        missing = [name for name, image in zip(listed, wanted, strict=True) if image not in particle_of]
        if unique and not missing:
            return torch.tensor(list(dict.fromkeys(particle_of[image] for image in wanted)))
    raise ValueError(f"{path} names {(missing or listed)[0]}, which is not in {table.path}; give a part of that table")


def _split(name: str) -> tuple[str, int]:
    index, at, stack = name.partition("@")
    return (stack, int(index) - 1) if at and index.isdigit() else (name, ANY)
