"""Posteriors of poses in a file: what is written is there, and what was torn is known."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyro_cryo.guides.pose_table import PoseTable
from pyro_cryo.guides.poses import PoseModes
from pyro_cryo.physics.rotations import random_rotations

WRITER = """
import sys, torch
from pyro_cryo.guides.pose_table import PoseTable
table = PoseTable.open(sys.argv[1])
print("open", flush=True)
number = 0.0
while True:
    number += 1
    rows = torch.randint(len(table.whole), (64,))
    modes = table[rows]
    for value in modes.tensors:
        value.fill_(number)
    table[rows] = modes
    if number == 20:
        print("written", flush=True)
"""


def some(count: int, modes: int) -> PoseModes:
    generator = torch.Generator().manual_seed(0)
    return PoseModes(
        random_rotations(count * modes, generator).view(count, modes, 3, 3),
        torch.randn(count, modes, 2, generator=generator),
        torch.eye(5).expand(count, modes, 5, 5) * torch.rand(count, modes, 1, 1, generator=generator),
        torch.randn(count, modes, generator=generator).log_softmax(1),
    )


def test_rows_that_are_written_are_there_when_it_is_opened_again(tmp_path: Path) -> None:
    table, modes = PoseTable.create(tmp_path / "poses", 10, 3), some(4, 3)
    assert len(table.torn) == 10
    rows = torch.tensor([7, 1, 2, 9])
    table[rows] = modes
    again = PoseTable.open(tmp_path / "poses")
    for there, here in zip(again[rows].tensors, modes.tensors, strict=True):
        assert torch.equal(there, here)
    assert again.torn.tolist() == [0, 3, 4, 5, 6, 8]
    table[torch.tensor([0])] = modes[torch.tensor([0])]
    assert torch.equal(again.rotation[0], modes.rotation[0])  # one mapping sees what the other writes
    assert os.path.getsize(tmp_path / "poses") == 4096 + 4 * 10 * (1 + 3 * 37)


def test_what_is_read_is_a_copy(tmp_path: Path) -> None:
    table = PoseTable.create(tmp_path / "poses", 2, 1)
    table[torch.arange(2)] = some(2, 1)
    before = table.rotation.clone()
    table[torch.arange(2)].rotation.zero_()
    assert torch.equal(table.rotation, before)


def test_a_killed_writer_leaves_whole_rows_and_torn_ones(tmp_path: Path) -> None:
    """Every row that says so was written to its end; at most the rows in hand are torn."""
    count = 2000
    table = PoseTable.create(tmp_path / "poses", count, 2)
    table[torch.arange(count)] = PoseModes(*(torch.zeros_like(value) for value in table.tensors))
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "poses")], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "open\n"
    assert writer.stdout.readline() == "written\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    again = PoseTable.open(tmp_path / "poses")
    whole = again.whole == 1
    assert int((~whole).sum()) <= 64
    for value in again.tensors:
        flat = value.flatten(1)[whole]
        assert torch.equal(flat, again.log_weight[whole][:, :1].expand_as(flat))
    assert float(again.log_weight.max()) > 0


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("poses")
    with pytest.raises(ValueError, match=r"text is no table of poses; make one with PoseTable\.create"):
        PoseTable.open(tmp_path / "text")
    PoseTable.create(tmp_path / "poses", 10, 3)
    with pytest.raises(FileExistsError, match="exists; open it with"):
        PoseTable.create(tmp_path / "poses", 10, 3)
    os.truncate(tmp_path / "poses", 5000)
    with pytest.raises(ValueError, match=r"has 5000 bytes, 10 images of 3 modes take 8576; make it again"):
        PoseTable.open(tmp_path / "poses")
