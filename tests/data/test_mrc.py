"""Images come back from their bytes, whatever wrote them."""

from __future__ import annotations

import struct
from pathlib import Path

import mrcfile
import numpy as np
import pytest

from pyro_cryo.data import stack as stack_module
from pyro_cryo.data.mrc import PIXELS, read_header
from pyro_cryo.data.stack import Stack, locate, locate_all

COUNT, BOX = 7, 6


def raw_mrc(
    path: Path, mode: int = 2, order: str = "<", extended: int = 0, nz: int = COUNT, tag: bytes = b"MAP "
) -> np.ndarray:
    """A file written byte by byte, and the images in it."""
    pixel = np.dtype(order + PIXELS[mode])
    images = (np.random.default_rng(mode).normal(size=(COUNT, BOX, BOX)) * 40 + 60).astype(pixel)
    head = bytearray(1024)
    struct.pack_into(order + "4i", head, 0, BOX, BOX, nz, mode)
    struct.pack_into(order + "3i", head, 28, BOX, BOX, nz)
    struct.pack_into(order + "3f", head, 40, 1.5 * BOX, 1.5 * BOX, 1.5 * nz)
    struct.pack_into(order + "i", head, 92, extended)
    head[208:216] = tag + {"<": b"\x44\x44\0\0", ">": b"\x11\x11\0\0"}[order]
    path.write_bytes(bytes(head) + b"\x7f" * extended + images.tobytes())
    return images.astype(np.float32)


def read(path: Path, frames: list[int]) -> np.ndarray:
    stack = Stack.open([path])
    out = np.empty((len(frames), stack.files[0].box, stack.files[0].box), np.float32)
    stack.read(np.zeros(len(frames), np.int64), np.array(frames), out)
    return out


@pytest.mark.parametrize("mode", PIXELS)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("extended", [0, 320])
def test_every_mode_byte_order_and_extended_header(tmp_path: Path, mode: int, order: str, extended: int) -> None:
    images = raw_mrc(tmp_path / "a.mrcs", mode, order, extended)
    header = read_header(tmp_path / "a.mrcs")
    assert (header.frames, header.box, header.apix, header.flaws) == (COUNT, BOX, 1.5, ())
    for frames in ([0, 1, 2, 3, 4, 5, 6], [6, 0, 3], [2, 3, 2, 5, 4]):
        np.testing.assert_array_equal(read(tmp_path / "a.mrcs", frames), images[frames])


def test_agrees_with_the_mrcfile_library(tmp_path: Path, stack_writer) -> None:
    images = np.random.default_rng(0).normal(size=(5, 8, 8)).astype(np.float16)
    path = stack_writer(tmp_path / "a.mrcs", images, apix=3.25)
    assert read_header(path).apix == pytest.approx(3.25)
    np.testing.assert_array_equal(read(path, [4, 1]), mrcfile.read(path)[[4, 1]].astype(np.float32))


def test_neighbours_are_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw_mrc(tmp_path / "a.mrcs")
    calls = []
    real = stack_module.os.preadv
    monkeypatch.setattr(stack_module.os, "preadv", lambda *a: calls.append(a) or real(*a))
    read(tmp_path / "a.mrcs", [5, 0, 2, 1, 6])  # runs 0-2 and 5-6
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        (lambda b: b.__setitem__(slice(208, 212), b"\0\0\0\0"), "no MAP"),
        (lambda b: b.__setitem__(slice(212, 214), b"\0\0"), "machine stamp"),
        (lambda b: struct.pack_into("<i", b, 8, 1), "nz = 1"),
        (lambda b: b.extend(b"\0" * 10), "10 bytes after"),
        (lambda b: struct.pack_into("<i", b, 92, -5), "extended header of -5"),
    ],
)
def test_a_sloppy_header_is_read_with_a_warning(tmp_path: Path, flaw, message: str) -> None:
    path = tmp_path / "a.mrcs"
    images = raw_mrc(path)
    content = bytearray(path.read_bytes())
    flaw(content)
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=message):
        np.testing.assert_array_equal(read(path, [0, 6]), images[[0, 6]])


def test_a_wrong_stamp_does_not_decide_the_byte_order(tmp_path: Path) -> None:
    path = tmp_path / "a.mrcs"
    images = raw_mrc(path, order=">")
    content = bytearray(path.read_bytes())
    content[212:214] = b"DD"
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="big-endian"):
        np.testing.assert_array_equal(read(path, [3]), images[[3]])


def test_files_that_are_no_stacks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mrcs"
    raw_mrc(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=rf"truncated: 7 images need {7 * 144} bytes .*, it has {7 * 144 - 100}"):
        read_header(path)
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="5 bytes"):
        read_header(path)
    path.write_bytes(b"text " * 400)
    with pytest.raises(ValueError, match="not an MRC file"):
        read_header(path)
    path.write_bytes(struct.pack("<4i", 6, 6, 1, 4) + whole[16:])
    with pytest.raises(ValueError, match="mode 4"):
        read_header(path)
    path.write_bytes(struct.pack("<4i", 6, 4, 1, 2) + whole[16:])
    with pytest.raises(ValueError, match="6 x 4"):
        read_header(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_header(tmp_path / "none.mrcs")


def test_few_files_are_open_at_once(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.mrcs" for i in range(100)]
    images = [raw_mrc(path) for path in paths]
    stack = Stack.open(paths)
    file = np.repeat(np.arange(100), 2)[np.random.default_rng(0).permutation(200)]
    frame = np.random.default_rng(1).integers(0, COUNT, 200)
    out = np.empty((200, BOX, BOX), np.float32)
    stack.read(file, frame, out)
    np.testing.assert_array_equal(out, np.stack([images[f][i] for f, i in zip(file, frame, strict=True)]))
    assert len(stack._handles) == stack_module.OPEN_FILES


def test_where_stacks_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("project", "cwd", "data/sub", "flat"):
        (tmp_path / place).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")
    project, data, flat = tmp_path / "project", tmp_path / "data", tmp_path / "flat"
    with pytest.raises(FileNotFoundError, match=r"sub/a\.mrcs is not at .*datadir"):
        locate("sub/a.mrcs", project, data)
    (flat / "a.mrcs").touch()
    assert locate("sub/a.mrcs", project, flat) == flat / "a.mrcs"
    (data / "sub/a.mrcs").touch()
    assert locate("sub/a.mrcs", project, data) == data / "sub/a.mrcs"
    assert locate("/sub/a.mrcs", project, data) == data / "sub/a.mrcs"
    (tmp_path / "cwd/sub").mkdir()
    (tmp_path / "cwd/sub/a.mrcs").touch()
    assert locate("sub/a.mrcs", project, data) == Path("sub/a.mrcs")
    (project / "sub").mkdir()
    (project / "sub/a.mrcs").touch()
    assert locate("sub/a.mrcs", project, data) == project / "sub/a.mrcs"
    with pytest.raises(ValueError, match=r"x/a\.mrcs and y/a\.mrcs both fall"):
        locate_all(["x/a.mrcs", "y/a.mrcs"], tmp_path, flat)
