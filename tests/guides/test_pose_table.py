"""Posteriors of poses in a file: what was written is there, for NumPy too, and what is not asked for is not read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_cryo.guides import pose_table
from pyro_cryo.guides.pose_table import open_table, write_table
from pyro_cryo.guides.poses import PoseModes
from pyro_cryo.physics.rotations import random_rotations

READER = """
import sys, torch
from pyro_cryo.guides.pose_table import open_table

def held():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssFile"))

table = open_table(sys.argv[1])
table[torch.arange(0, 40)]
before = held()
table[torch.arange(0, 100_000, 10_000)]
print(held() - before)
"""


def some(count: int, modes: int) -> PoseModes:
    generator = torch.Generator().manual_seed(0)
    return PoseModes(
        random_rotations(count * modes, generator).view(count, modes, 3, 3),
        torch.randn(count, modes, 2, generator=generator),
        torch.eye(5).expand(count, modes, 5, 5) * torch.rand(count, modes, 1, 1, generator=generator),
        torch.randn(count, modes, generator=generator).log_softmax(1),
    )


def test_what_is_written_is_there_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pose_table, "WRITTEN", 4)
    modes, path = some(10, 3), tmp_path / "poses.npy"
    write_table(path, modes)
    rows = torch.tensor([7, 1, 2, 9])
    for there, here in zip(open_table(path)[rows].tensors, modes[rows].tensors, strict=True):
        assert torch.equal(there, here)
    for name, value in vars(modes).items():
        np.testing.assert_array_equal(np.load(path, mmap_mode="r")[name], value)
    assert os.path.getsize(path) < 4 * 10 * 3 * 37 + 1024


def test_the_file_stays_as_it_is(tmp_path: Path) -> None:
    write_table(tmp_path / "poses.npy", some(2, 1))
    open_table(tmp_path / "poses.npy").rotation.zero_()
    assert torch.equal(open_table(tmp_path / "poses.npy").rotation, some(2, 1).rotation)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the system does not say what is in memory")
def test_rows_that_are_not_asked_for_take_no_memory(tmp_path: Path) -> None:
    write_table(tmp_path / "poses.npy", some(100_000, 2))
    reader = [sys.executable, "-c", READER, str(tmp_path / "poses.npy")]
    grown = int(subprocess.run(reader, stdout=subprocess.PIPE, check=True, text=True).stdout)
    assert grown < 0.2 * os.path.getsize(tmp_path / "poses.npy") / 1024


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "poses.npy"
    for content in (b"poses", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"poses.npy is no table of poses \(.*\); remove it, and fit --resume"):
            open_table(path)
    np.save(path, np.zeros(3))
    with pytest.raises(ValueError, match=r"poses.npy is no table of poses"):
        open_table(path)
    write_table(path, some(10, 3))
    os.truncate(path, 2000)
    with pytest.raises(ValueError, match=r"poses.npy is no table of poses"):
        open_table(path)
