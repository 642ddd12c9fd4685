"""A family of maps: a recipe of this package beside one pass of `cryodrgn train_vae`.

    python examples/benchmarks/heterogeneous.py CASE --score SCORE.py [--model cryodrgn] [--epochs 20]
        [--peer PEER/bin/cryodrgn]

CASE as in homogeneous.py. Prints the wall time of the fit, images a second over its passes (of `manifold` and other
recipes that are solved, which make passes of different kinds: all images over the whole time), the scores of every
hundredth image's map and of the latent coordinate, and with --peer the images a second of one pass of the peer at
the sizes of the recipe `cryodrgn`, in the same run.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pyro_cryo.data.particles import Particles


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", type=Path)
    parser.add_argument("--score", type=Path, required=True)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--model", default="manifold")
    parser.add_argument("--epochs", type=int, help="of a recipe that is descended to")
    parser.add_argument("--zdim", type=int, default=8)
    parser.add_argument("--peer-zdim", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", action="append", default=[])
    asked = parser.parse_args()
    count = len(Particles.open(asked.case / "particles.star"))
    ours = [one_fit(asked, seed, count) for seed in asked.seeds]
    if asked.peer is not None:
        peer = peer_speed(asked, count)
        print(f"images a second: {ours[-1]:.0f} here, {peer:.1f} the peer: {ours[-1] / peer:.1f} times faster")


def one_fit(asked: argparse.Namespace, seed: int, count: int) -> float:
    """Fit, score; images a second over the passes."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = Path(sys.executable).with_name("pyro-cryo")
        options = ["--model", asked.model, "--zdim", asked.zdim, "--seed", seed, "--quiet"]
        options += [] if asked.epochs is None else ["--epochs", asked.epochs]
        options += [word for setting in asked.set for word in ("--set", setting)]
        began = time.monotonic()
        call(command, "fit", asked.case / "particles.star", "-o", run, *options)
        wall = time.monotonic() - began
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        rate = count * len(log) / log[-1]["seconds"]
        call(command, "volumes", run, "-o", Path(folder) / "maps", "--index", *range(0, count, 100))
        files = ["--volumes", Path(folder) / "maps" / "volumes.npz", "--latent", run / "latent.npz"]
        print(f"seed {seed}: {wall:.0f} s whole, {rate:.0f} images/s")
        print(call(sys.executable, asked.score, asked.case / "truth.npz", *files), flush=True)
    return rate


def peer_speed(asked: argparse.Namespace, count: int) -> float:
    """Images a second of one pass of the peer, as it reports the pass itself."""
    with tempfile.TemporaryDirectory() as folder:
        case = asked.case
        text = call(
            asked.peer, "train_vae", case / "particles.mrcs", "--poses", case / "poses.pkl", "--ctf", case / "ctf.pkl",
            "--zdim", asked.peer_zdim, "-n", 1, "--enc-dim", 256, "--dec-dim", 256, "--no-analysis", "-o", folder,
        )  # fmt: skip
    took = re.findall(r"Finished in (\d+):(\d+):([\d.]+)", text)
    hours, minutes, seconds = took[0]
    return count / (3600 * int(hours) + 60 * int(minutes) + float(seconds))


def call(*words: object) -> str:
    """Run a command that must succeed; what it printed."""
    done = subprocess.run(
        [str(word) for word in words], check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return done.stdout


if __name__ == "__main__":
    main()
