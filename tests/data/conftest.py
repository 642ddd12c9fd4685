"""Small stacks and tables to open."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from pyro_cryo.data.batch import Batch
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
        "rlnOpticsGroup": [1], "rlnOpticsGroupName": ["opticsGroup1"], "rlnVoltage": [300.0],
        "rlnSphericalAberration": [2.7], "rlnAmplitudeContrast": [0.1], "rlnImagePixelSize": [apix],
        "rlnImageSize": [box], "rlnImageDimensionality": [2],
    })  # fmt: skip


def particle_table(count: int, stack: str = "particles.mrcs") -> pd.DataFrame:
    rng = np.random.default_rng(1)
    return pd.DataFrame({
        "rlnImageName": [f"{i + 1:06d}@{stack}" for i in range(count)],
        "rlnAngleRot": rng.uniform(-180, 180, count), "rlnAngleTilt": rng.uniform(1, 179, count),
        "rlnAnglePsi": rng.uniform(-180, 180, count),
        "rlnOriginXAngst": rng.normal(0, 3, count), "rlnOriginYAngst": rng.normal(0, 3, count),
        "rlnDefocusU": rng.uniform(2500, 3000, count), "rlnDefocusV": rng.uniform(2000, 2500, count),
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


def backprojected(batch: Batch, rotation: Tensor) -> Tensor:
    """A crude map (D, D, D): trilinear insertion, weighted least squares a Fourier voxel."""
    box, k = batch.half.box, batch.half.k
    weight = 1.0 if batch.noise_scale is None else 1 / batch.noise_scale.square()
    angle = 2 * math.pi / box * (batch.translation @ k.T)
    values = torch.view_as_complex(batch.image.contiguous()) * torch.polar(torch.ones_like(angle), angle)
    total, norm = torch.zeros(box**3, dtype=torch.complex64), torch.zeros(box**3)
    points = torch.cat([k, torch.zeros(len(k), 1)], -1) @ rotation
    for sign, value in ((1, values), (-1, values.conj())):
        grid = sign * points + box // 2
        corner, fraction = grid.floor(), grid - grid.floor()
        for c in range(8):
            offset = torch.tensor([c & 1, c >> 1 & 1, c >> 2 & 1])
            share = torch.where(offset.bool(), fraction, 1 - fraction).prod(-1)
            at = (corner + offset).long()
            inside = ((at >= 0) & (at < box)).all(-1)
            index = ((at[..., 2] * box + at[..., 1]) * box + at[..., 0])[inside]
            total.index_add_(0, index, (share * value * batch.ctf * weight)[inside])
            norm.index_add_(0, index, (share * batch.ctf.square() * weight)[inside])
    spectrum = (total / (norm + 0.1 * norm.mean())).reshape(box, box, box)
    return torch.fft.fftshift(torch.fft.ifftn(torch.fft.ifftshift(spectrum))).real


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.fixture
def new_case() -> type[Case]:
    return Case


@pytest.fixture
def stack_writer() -> Callable[..., Path]:
    return write_stack


@pytest.fixture(scope="session")
def backproject() -> Callable[[Batch, Tensor], Tensor]:
    return backprojected
