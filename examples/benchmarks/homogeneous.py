"""One map with known poses: this package's `fit` beside `cryodrgn backproject_voxel`, whole commands in turn.

    python examples/benchmarks/homogeneous.py CASE --peer PEER/bin/cryodrgn --score SCORE.py [--rounds 3]

CASE holds particles.star, particles.mrcs, poses.pkl, ctf.pkl and truth.npz; SCORE.py has `masks` and `fsc`. Prints the
times of both, their ratio with and without the start of the interpreter and of the libraries that each command imports,
and the FSC to the truth.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np

OURS = "torch, pandas, scipy.ndimage, pyro_cryo.inference.fit, pyro_cryo.models.homogeneous"


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", type=Path)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--score", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    case = asked.case
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        ours = [
            Path(sys.executable).with_name("pyro-cryo"),
            "fit",
            case / "particles.star",
            "-o",
            out / "ours",
            "--model",
            "homogeneous",
            "--quiet",
        ]
        theirs = [asked.peer, "backproject_voxel", case / "particles.mrcs", "-o", out / "theirs"]
        theirs += ["--poses", case / "poses.pkl", "--ctf", case / "ctf.pkl"]
        python = asked.peer.with_name("python")
        starts = {
            "ours": [sys.executable, "-c", f"import {OURS}"],
            "peer": [python, "-c", "import cryodrgn.commands.backproject_voxel"],
        }
        times: dict[str, list[float]] = {"ours": [], "peer": [], "ours start": [], "peer start": []}
        for _ in range(asked.rounds):
            for name, command in (("ours", ours), ("peer", theirs)):
                shutil.rmtree(out / ("ours" if name == "ours" else "theirs"), ignore_errors=True)
                times[name].append(seconds(command))
                times[f"{name} start"].append(seconds(starts[name]))
        middle = {name: statistics.median(values) for name, values in times.items()}
        for name, values in times.items():
            print(f"{name:>11}: " + " ".join(f"{v:6.2f}" for v in values) + f"   median {middle[name]:.2f} s")
        print(f"whole command: {middle['peer'] / middle['ours']:.2f} times faster")
        bare = (middle["peer"] - middle["peer start"]) / (middle["ours"] - middle["ours start"])
        print(f"without start: {bare:.2f} times faster")
        compare(load(asked.score), case, out / "ours" / "map.mrc", out / "theirs" / "backproject.mrc")


def seconds(command: list[Any]) -> float:
    """Wall time of a command that must succeed."""
    began = time.monotonic()
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - began


def load(path: Path) -> Any:
    """A Python file as a module."""
    spec = importlib.util.spec_from_file_location("score", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(score: Any, case: Path, ours: Path, peer: Path) -> None:
    """FSC to the first true map, shell by shell, without and under the truth's mask."""
    with np.load(case / "truth.npz") as truth:
        states = truth["volumes"]
    target = states[0].astype(float)
    maps = [mrcfile.read(path).astype(float) for path in (ours, peer)]
    for name, mask in score.masks(states).items():
        window = 1.0 if mask is None else mask
        mine, theirs = (score.fsc(m * window, target * window) for m in maps)
        gap = (mine - theirs)[theirs > 0.143]
        print(f"{name}: mean FSC {mine.mean():.4f}, peer {theirs.mean():.4f}; worst shell {gap.min():+.4f} against it")


if __name__ == "__main__":
    main()
