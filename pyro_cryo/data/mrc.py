"""Stacks of images in MRC files: the header, and frames read straight from their bytes.

An MRC file (Cheng et al., J. Struct. Biol. 192 (2015) 146) is a header of 1024 bytes, an extended header of NSYMBT
bytes and nz frames of ny x nx pixels. Many programs write sloppy headers; what can be read all the same is, and the
flaw is kept for a warning.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HEADER_BYTES = 1024
PIXELS = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}  # MRC mode: numpy type
LARGEST_SIDE = 65536


@dataclass(frozen=True)
class MrcStack:
    """Where the frames of one file lie.

    path:   the file
    frames: how many
    box:    D0, pixels of a side
    pixel:  numpy type of a pixel, with its byte order
    offset: byte at which frame 0 starts
    apix:   angstrom a pixel according to the header, 0 where it has none
    flaws:  what is wrong with the header and how it was read
    """

    path: str
    frames: int
    box: int
    pixel: np.dtype
    offset: int
    apix: float
    flaws: tuple[str, ...] = ()

    @property
    def frame_bytes(self) -> int:
        return self.box**2 * self.pixel.itemsize

    def read(self, handle: int, frames: np.ndarray) -> np.ndarray:
        """Frames (n,), ascending, of the open file `handle`: (n, D0, D0) as stored. A run of neighbours is one read."""
        out = np.empty((len(frames), self.box, self.box), self.pixel)
        view = memoryview(out.data).cast("B")
        starts = np.flatnonzero(np.diff(frames, prepend=-2) != 1)
        size = self.frame_bytes
        for first, last in zip(starts.tolist(), [*starts[1:].tolist(), len(frames)], strict=True):
            self._fill(handle, view[first * size : last * size], self.offset + int(frames[first]) * size)
        return out

    def _fill(self, handle: int, view: memoryview, position: int) -> None:
        done = 0
        while done < len(view):
            got = os.preadv(handle, [view[done:]], position + done)
            if got == 0:
                raise ValueError(f"{self.path} ended at byte {position + done} while being read; copy the stack again")
            done += got


def read_header(path: str | Path) -> MrcStack:
    """The header of a stack of square images.

    Raises FileNotFoundError where there is no file and ValueError where it is no MRC file, a mode that images are not
    stored in, not square, or shorter than its header says.
    """
    path = str(path)
    try:
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder; give an .mrcs file") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"stack {path} does not exist; check the path") from None
    if len(head) < HEADER_BYTES:
        raise ValueError(f"{path} has {size} bytes, fewer than the 1024 of an MRC header; copy the stack again")
    order, flaws = _byte_order(path, head)
    nx, ny, nz, mode = struct.unpack(order + "4i", head[:16])
    if nx != ny:
        raise ValueError(
            f"{path} holds images of {nx} x {ny} pixels, expected square ones; extract them in a square box"
        )
    pixel = np.dtype(order + PIXELS[mode])
    frame_bytes = nx * ny * pixel.itemsize
    extended = struct.unpack(order + "i", head[92:96])[0]
    if not 0 <= extended <= size - HEADER_BYTES:
        flaws.append(f"an extended header of {extended} bytes, read as 0")
        extended = 0
    frames = _count(path, nz, size - HEADER_BYTES - extended, frame_bytes, flaws)
    sampling = struct.unpack(order + "i", head[28:32])[0]
    length = struct.unpack(order + "f", head[40:44])[0]
    apix = length / sampling if sampling > 0 and np.isfinite(length) and length > 0 else 0.0
    return MrcStack(path, frames, nx, pixel, HEADER_BYTES + extended, apix, tuple(flaws))


def _byte_order(path: str, head: bytes) -> tuple[str, list[str]]:
    """The byte order in which the header makes sense, '<' or '>'; the machine stamp decides only where both do."""
    sensible = []
    for order in "<>":
        nx, ny, nz, mode = struct.unpack(order + "4i", head[:16])
        if 0 < nx <= LARGEST_SIDE and 0 < ny <= LARGEST_SIDE and nz >= 0 and 0 <= mode <= 101:
            sensible.append((order, mode))
    if not sensible:
        raise ValueError(f"{path} is not an MRC file: its header gives no sensible size; give an .mrc or .mrcs stack")
    stamp = {b"DD": "<", b"DA": "<", b"\x11\x11": ">"}.get(head[212:214])
    order, mode = next((found for found in sensible if found[0] == stamp), sensible[0])
    if mode not in PIXELS:
        raise ValueError(f"{path} has MRC mode {mode}; expected 0, 1, 2, 6 or 12: save the images as float32 (mode 2)")
    flaws = []
    if head[208:212] not in (b"MAP ", b"MAP\0"):
        flaws.append("no MAP in its header")
    if stamp != order:
        flaws.append(f"a wrong machine stamp, read as {'little' if order == '<' else 'big'}-endian")
    return order, flaws


def _count(path: str, nz: int, data_bytes: int, frame_bytes: int, flaws: list[str]) -> int:
    if data_bytes < max(nz, 1) * frame_bytes:
        raise ValueError(
            f"{path} is truncated: {max(nz, 1)} images need {max(nz, 1) * frame_bytes} bytes after the header, "
            f"it has {data_bytes}; copy the stack again"
        )
    whole, rest = divmod(data_bytes, frame_bytes)
    if whole == nz and rest == 0:
        return nz
    if rest == 0:
        flaws.append(f"nz = {nz} but {whole} images, which are read")
        return whole
    flaws.append(f"{data_bytes - nz * frame_bytes} bytes after its {nz} images, ignored")
    return nz
