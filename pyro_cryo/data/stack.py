"""Images on disk, read when they are asked for."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pyro_cryo.data.mrc import MrcStack, read_header

OPEN_FILES = 64  # data sets have thousands of stacks, a process some 1,000 handles


class Stack:
    """Frames of many files. Nothing is mapped into memory; reading is safe from several threads.

    files: the headers of the files, in the order in which the table counts them
    """

    def __init__(self, files: Sequence[MrcStack]):
        self.files = tuple(files)
        self._handles: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _close_all, self._handles)

    @staticmethod
    def open(paths: Sequence[str | Path]) -> Stack:
        """Read the headers; one warning names what is sloppy in them."""
        files = [read_header(path) for path in paths]
        flawed = [file for file in files if file.flaws]
        if flawed:
            others = f" (and {len(flawed) - 1} other stacks have flaws)" if len(flawed) > 1 else ""
            warnings.warn(f"{flawed[0].path} has {', '.join(flawed[0].flaws)}{others}", UserWarning, stacklevel=4)
        return Stack(files)

    def read(self, file: np.ndarray, frame: np.ndarray, out: np.ndarray) -> None:
        """Frames `frame` (n,) of files `file` (n,), which have one box D0, into `out` (n, D0, D0) float32.

        They are read in the order in which they lie on disk, so that neighbours cost one read.
        """
        order = np.lexsort((frame, file))
        sorted_file, sorted_frame = file[order], frame[order]
        starts = np.flatnonzero(np.diff(sorted_file, prepend=-1))
        for first, last in zip(starts.tolist(), [*starts[1:].tolist(), len(order)], strict=True):
            number = int(sorted_file[first])
            with self._lock:
                frames = self.files[number].read(self._handle(number), sorted_frame[first:last])
            out[order[first:last]] = frames

    def _handle(self, number: int) -> int:
        handle = self._handles.pop(number, None)
        if handle is None:
            if len(self._handles) >= OPEN_FILES:
                os.close(self._handles.popitem(last=False)[1])
            handle = os.open(self.files[number].path, os.O_RDONLY)
        self._handles[number] = handle
        return handle


def _close_all(handles: OrderedDict[int, int]) -> None:
    while handles:
        os.close(handles.popitem()[1])


def locate(name: str, folder: Path, datadir: Path | None) -> Path:
    """The file that a table in `folder` calls `name`.

    Tried in this order: relative to the table's folder, to the working directory, `datadir` with the whole relative
    path, `datadir` with the file's own name.
    """
    given = Path(name)
    tries = [folder / given, given]
    if datadir is not None:
        tries += [datadir / given.relative_to(given.anchor), datadir / given.name]
    for path in tries:
        if path.is_file():
            return path
    looked = ", ".join(dict.fromkeys(str(path) for path in tries))
    raise FileNotFoundError(f"{name} is not at {looked}; give the folder that holds it as datadir")


def locate_all(names: Sequence[str], folder: Path, datadir: Path | None) -> list[Path]:
    """`locate` for every stack of a table; two names may not fall on one file."""
    paths = [locate(name, folder, datadir) for name in names]
    seen: dict[str, str] = {}
    for name, path in zip(names, paths, strict=True):
        other = seen.setdefault(os.path.abspath(path), name)
        if os.path.normpath(other) != os.path.normpath(name):
            raise ValueError(f"stacks {other} and {name} both fall on {path}; give a datadir with the table's folders")
    return paths
