"""Small stacks and tables to open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest

from pyro_cryo.data.star import write_star

Edit = Callable[[pd.DataFrame], pd.DataFrame]


def write_stack(path: Path, images: np.ndarray, apix: float = 2.0) -> Path:
    """An .mrcs file by another hand than the reader's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mrcfile.new(path, overwrite=True) as file:
        file.set_data(images)
        file.voxel_size = apix
    return path


def optics_table(apix: float = 2.0, box: int = 16) -> pd.DataFrame:
    return pd.DataFrame({
        "rlnOpticsGroup": [1], "rlnOpticsGroupName": ["opticsGroup1"], "rlnVoltage": [300.0], "rlnSphericalAberration": [2.7],
        "rlnAmplitudeContrast": [0.1], "rlnImagePixelSize": [apix], "rlnImageSize": [box], "rlnImageDimensionality": [2],
    })  # fmt: skip


def particle_table(count: int, stack: str = "particles.mrcs") -> pd.DataFrame:
    rng = np.random.default_rng(1)
    return pd.DataFrame({
        "rlnImageName": [f"{i + 1:06d}@{stack}" for i in range(count)],
        "rlnAngleRot": rng.uniform(-180, 180, count), "rlnAngleTilt": rng.uniform(1, 179, count),
        "rlnAnglePsi": rng.uniform(-180, 180, count),
        "rlnOriginXAngst": rng.normal(0, 3, count), "rlnOriginYAngst": rng.normal(0, 3, count),
        "rlnDefocusU": rng.uniform(8000, 9000, count), "rlnDefocusV": rng.uniform(7000, 8000, count),
        "rlnDefocusAngle": rng.uniform(0, 180, count), "rlnOpticsGroup": 1,
        "rlnRandomSubset": np.arange(count) % 2 + 1, "rlnMicrographName": "a micrograph.mrc",
    })  # fmt: skip


class Case:
    """A folder with a stack of noise and its RELION 3.1 table; `star` writes the table again with edits."""

    def __init__(self, folder: Path, count: int = 6, box: int = 16):
        self.folder, self.count, self.box = folder, count, box
        self.images = np.random.default_rng(0).normal(size=(count, box, box)).astype(np.float32)
        write_stack(folder / "particles.mrcs", self.images)

    def star(self, rows: Edit = lambda t: t, optics: Edit = lambda t: t, name: str = "particles.star") -> Path:
        path = self.folder / name
        blocks = {"optics": optics(optics_table(box=self.box)), "particles": rows(particle_table(self.count))}
        write_star(path, blocks)
        return path


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.fixture
def new_case() -> type[Case]:
    return Case


@pytest.fixture
def stack_writer() -> Callable[..., Path]:
    return write_stack
