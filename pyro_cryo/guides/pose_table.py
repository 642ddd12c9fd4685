"""Posteriors of poses in a file: a table of modes whose rows are changed in place, whatever their number.

A file is a header of 4096 bytes, text in JSON, and then these arrays of float32 in the machine's own order, N images of
K modes: whole (N,), rotation (N, K, 3, 3), translation (N, K, 2), precision (N, K, 5, 5), log_weight (N, K). The file
is mapped: rows that are not touched are not read, and what is written is the system's to keep, also where the process
is killed. A row that is being written has whole = 0 until its last number stands, so that a run that was killed knows
its torn rows (`torn`) and begins them anew. That holds for a process that dies; where the machine itself stops, what it
had not written to its disk is lost in no order, and a table is begun anew.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from pyro_cryo.guides.poses import PoseModes

HEADER = 4096
FORMAT = "pyro_cryo poses 1"


@dataclass(frozen=True)
class PoseTable(PoseModes):
    """The modes of N images, mapped to a file.

    whole: (N,) 1 where a row was written to its end, 0 where it never was or the writer was killed on the way

    table[rows] is a copy, table[rows] = modes writes; everything else that takes a PoseModes takes the table.
    """

    whole: Tensor

    @staticmethod
    def create(path: str | Path, count: int, modes: int) -> PoseTable:
        """A new table of `count` images with `modes` modes each, nothing in it; FileExistsError where the path exists.

        The file takes its name when its header stands.
        """
        path = Path(path)
        if count < 1 or modes < 1:
            raise ValueError(f"a table of {count} images with {modes} modes; expected at least 1 of each")
        if path.exists():
            raise FileExistsError(f"{path} exists; open it with PoseTable.open, or give another path")
        header = json.dumps({"format": FORMAT, "images": count, "modes": modes}).encode()
        unnamed = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with unnamed.open("wb") as file:
            file.write(header.ljust(HEADER))
            file.truncate(_bytes(count, modes))
        os.replace(unnamed, path)
        return PoseTable.open(path)

    @staticmethod
    def open(path: str | Path) -> PoseTable:
        """The table in a file; ValueError where it is none, or not as long as it says."""
        path = Path(path)
        with path.open("rb") as file:
            start = file.read(HEADER)
        try:
            header = json.loads(start)
            known, count, modes = header["format"], int(header["images"]), int(header["modes"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no table of poses; make one with PoseTable.create") from error
        if known != FORMAT:
            raise ValueError(f"{path} has the format {known!r}; expected {FORMAT!r}: search the poses again")
        size, expected = path.stat().st_size, _bytes(count, modes)
        if size != expected:
            raise ValueError(f"{path} has {size} bytes, {count} images of {modes} modes take {expected}; make it again")
        numbers = torch.from_file(str(path), shared=True, size=size // 4, dtype=torch.float32)[HEADER // 4 :]
        shapes = _shapes(count, modes)
        parts = numbers.split([math.prod(shape) for shape in shapes])
        whole, rotation, translation, precision, weight = map(Tensor.view, parts, shapes)
        return PoseTable(rotation, translation, precision, weight, whole)

    @property
    def torn(self) -> Tensor:
        """Rows (n,) that do not stand: never written, or half."""
        return (self.whole != 1).nonzero()[:, 0]

    @property
    def tensors(self) -> list[Tensor]:
        """The fields of the modes."""
        return [getattr(self, field.name) for field in fields(PoseModes)]

    def __getitem__(self, rows: Tensor) -> PoseModes:  # type: ignore[override]
        return PoseModes(*(value[rows] for value in self.tensors))

    def __setitem__(self, rows: Tensor, other: PoseModes) -> None:
        self.whole[rows] = 0
        super().__setitem__(rows, other)
        self.whole[rows] = 1

    def to(self, device: torch.device | str) -> PoseModes:  # type: ignore[override]
        """All modes on another device: what is changed there does not come back."""
        return PoseModes(*(value.to(device) for value in self.tensors))


def _shapes(count: int, modes: int) -> list[tuple[int, ...]]:
    return [(count,), *((count, modes, *rest) for rest in ((3, 3), (2,), (5, 5), ()))]


def _bytes(count: int, modes: int) -> int:
    return HEADER + 4 * sum(math.prod(shape) for shape in _shapes(count, modes))
