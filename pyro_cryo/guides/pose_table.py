"""Posteriors of poses in a file, whose rows are read where they are asked for, whatever their number.

The file is NumPy's own, a structured array (N,) with the fields of `PoseModes` in float32; any program reads it:

    np.load("run/poses.npy", mmap_mode="r")["rotation"]  # (N, K, 3, 3)

It is mapped: what is not asked for takes no memory, and the row of an image is one piece of the file.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from pyro_cryo.guides.poses import PoseModes

WRITTEN = 1 << 16  # rows at a time
SHAPES = {"rotation": (3, 3), "translation": (2,), "precision": (5, 5), "log_weight": ()}


def write_table(path: Path, modes: PoseModes) -> None:
    """A table of the modes of N images at a path, which is replaced."""
    count, peaks = modes.log_weight.shape
    row = np.dtype([(field.name, "<f4", (peaks, *SHAPES[field.name])) for field in fields(PoseModes)])
    table = np.lib.format.open_memmap(path, "w+", row, (count,))
    for start in range(0, count, WRITTEN):
        rows = slice(start, start + WRITTEN)
        for name, value in vars(modes[rows]).items():
            table[name][rows] = value.cpu().numpy()
    table.flush()


def open_table(path: Path) -> PoseModes:
    """The modes in a table: mapped, so that what is changed in them does not come back to the file.

    Raises ValueError where the file is no such table.
    """
    try:
        table = np.load(path, mmap_mode="c")
        return PoseModes(*(torch.from_numpy(table[field.name]) for field in fields(PoseModes)))
    except (ValueError, EOFError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} is no table of poses ({reason}); remove it, and fit --resume finds them anew"
        ) from error
