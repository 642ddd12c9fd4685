"""A place to try what a user can get wrong: a small case, finished runs, and what must be said of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mrcfile
import numpy as np
import pytest

from pyro_cryo.data.star import read_star, write_star

BOX, COUNT = 16, 12


@dataclass(frozen=True)
class Desk:
    """A folder with a small case (`star`), finished runs (`still`, `moving`) and a place for output (`out`)."""

    folder: Path
    toy: Path

    @property
    def star(self) -> Path:
        return self.folder / "case" / "particles.star"

    @property
    def stack(self) -> Path:
        return self.folder / "case" / "particles.mrcs"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def npz(self) -> Path:
        return self.folder / "z.npz"

    @property
    def still(self) -> Path:
        return self.folder / "homogeneous"

    @property
    def moving(self) -> Path:
        return self.folder / "cryodrgn"

    def edit(self, rows: Callable = lambda t: t, optics: Callable = lambda t: t) -> Path:
        """The STAR file again, with other rows or optics."""
        blocks = read_star(self.star)
        write_star(self.star, {"optics": optics(blocks["optics"]), "particles": rows(blocks["particles"])})
        return self.star

    def images(self, change: Callable[[np.ndarray], np.ndarray], name: str = "particles.mrcs") -> Path:
        """The stack again, changed."""
        with mrcfile.open(self.stack) as file:
            images = np.array(file.data)
        with mrcfile.new(self.stack.with_name(name), overwrite=True) as file:
            file.set_data(change(images))
            file.voxel_size = 2.0
        return self.star

    def file(self, name: str, content: str | bytes | np.ndarray) -> Path:
        path = self.folder / name
        if isinstance(content, np.ndarray):
            np.save(path, content)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def map(self, values: np.ndarray, name: str = "map.mrc") -> Path:
        with mrcfile.new(self.folder / name, overwrite=True) as file:
            file.set_data(values.astype(np.float32))
            file.voxel_size = 2.0
        return self.folder / name

    def everything(self) -> dict[str, bytes]:
        """What lies in the folder, byte by byte."""
        paths = sorted(self.folder.rglob("*"))
        return {str(p): p.read_bytes() if p.is_file() else b"" for p in paths}

    def fit(self, *options: object, star: Path | None = None) -> tuple[object, ...]:
        """Of one map, unless told otherwise."""
        where = (star or self.star, "-o", self.out, "--device", "cpu", "--quiet")
        return "fit", *where, "--model", "homogeneous", *options

    def resume(self, *options: object, star: Path | None = None) -> tuple[object, ...]:
        """Of the run `moving`, asked for as it was, but for what follows."""
        asked = ("--model", "cryodrgn", "--zdim", 2, "--set", "width=32", "--epochs", 4, "--lr", 2e-3)
        where = ("-o", self.moving, "--device", "cpu", "--quiet", "--resume")
        return "fit", star or self.toy, *where, *asked, *options


class Malicious:
    """Unpickling it would leave a file behind."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


Kind = Callable[[Desk], tuple[object, ...]]


def assert_refused(
    desk: Desk, kind: tuple[Kind, str], command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 2, one line that says what is expected of it, and a folder as it was before."""
    build, expected = kind
    arguments = build(desk)
    before = desk.everything()
    capsys.readouterr()
    try:
        status = command(*arguments)
    except SystemExit as left:  # how argparse leaves
        status = left.code
    assert status == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if not line.startswith("pyro-cryo: warning: ")]
    assert len(errors) == 1, lines
    assert errors[0].startswith("pyro-cryo: error: ")
    assert expected in errors[0]
    assert "--debug" not in errors[0], "an error that nobody thought of"
    assert len(errors[0]) < 600
    assert desk.everything() == before
    assert not (desk.folder / "mark").exists()
