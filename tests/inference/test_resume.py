"""A fit that was stopped goes on as if it had not been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyro_cryo.inference import fit as fit_module
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.run import Run


class Stopped(Exception):
    """As if by a kill."""


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same(first: dict, second: dict) -> None:
    for part in ("model", "guide"):
        assert first[part].keys() == second[part].keys()
        for name, value in first[part].items():
            equal = torch.equal(value, second[part][name]) if isinstance(value, Tensor) else value == second[part][name]
            assert equal, f"{part} {name}"
    assert first["step"] == second["step"]
    assert [r["loss"] for r in first["records"]] == [r["loss"] for r in second["records"]]


@pytest.mark.parametrize("stop", [0, 1, 5, 7, 14])
def test_within_a_pass_and_between(stop: int, particles, small_model, tmp_path: Path, monkeypatch) -> None:
    asked = {"epochs": 3, "save_every_s": 0.0}
    fit(small_model(), particles, tmp_path / "whole", **asked)
    step = fit_module._Loop._step

    def stops(self, batch):
        if self.step == stop:
            raise Stopped
        return step(self, batch)

    monkeypatch.setattr(fit_module._Loop, "_step", stops)
    with pytest.raises(Stopped):
        fit(small_model(), particles, tmp_path / "parts", **asked)
    monkeypatch.undo()
    assert checkpoint(tmp_path / "parts")["step"] == stop
    assert not (tmp_path / "parts" / "latent.npz").exists()
    torch.rand(7)  # whatever was drawn meanwhile
    run = fit(small_model(seed=9), particles, tmp_path / "parts", resume=True, **asked)
    assert_same(checkpoint(tmp_path / "parts"), checkpoint(tmp_path / "whole"))
    assert torch.equal(torch.from_numpy(run.latent.z), torch.from_numpy(Run.load(tmp_path / "whole").latent.z))
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    assert len(logs[0]) == len(logs[1]) == 3


def test_while_the_consensus_is_solved_for(particles, small_model, tmp_path: Path, monkeypatch) -> None:
    fit(small_model(), particles, tmp_path / "whole", epochs=1)

    def stops(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pyro_cryo.models.cryodrgn.reconstruct", stops)
    with pytest.raises(KeyboardInterrupt):
        fit(small_model(), particles, tmp_path / "parts", epochs=1)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["run.json"]
    fit(small_model(), particles, tmp_path / "parts", epochs=1, resume=True)
    assert_same(checkpoint(tmp_path / "parts"), checkpoint(tmp_path / "whole"))


def test_where_and_how_may_change_but_not_what(particles, small_model, tmp_path: Path) -> None:
    fit(small_model(), particles, tmp_path / "run", epochs=1)
    again = fit(small_model(), particles, tmp_path / "run", epochs=1, resume=True, save_every_s=7.0)
    assert len(again.records) == 1
    for change, message in (({"seed": 1}, "fitted with seed 0, not 1"), ({"beta": 2.0}, "fitted with beta 1.0")):
        with pytest.raises(ValueError, match=message):
            fit(small_model(), particles, tmp_path / "run", resume=True, **{"epochs": 1, **change})
    with pytest.raises(ValueError, match="fitted with width 16, not 8; resume as it was"):
        fit(small_model(width=8), particles, tmp_path / "run", epochs=1, resume=True)
    with pytest.raises(ValueError, match="a fit of other particles"):
        fit(small_model(), particles[:40], tmp_path / "run", epochs=1, resume=True)


def test_after_kill_9(toy: Path, cryodrgn_run: Path, cryodrgn_options, tmp_path: Path, command) -> None:
    out = tmp_path / "run"
    asked = [str(word) for word in ("fit", toy, "-o", out, *cryodrgn_options)]
    process = subprocess.Popen([sys.executable, "-m", "pyro_cryo.cli", *asked, "--save-every-s", "0.05"])
    deadline = time.monotonic() + 60
    log = out / "log.jsonl"
    while time.monotonic() < deadline and process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.01)
    time.sleep(0.15)  # some way into the second pass
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not checkpoint(out)["finished"]
    assert 38 <= checkpoint(out)["step"] < 4 * 38
    assert command(*asked, "--resume") == 0
    assert_same(checkpoint(out), checkpoint(cryodrgn_run))
    assert (out / "latent.npz").read_bytes() == (cryodrgn_run / "latent.npz").read_bytes()
