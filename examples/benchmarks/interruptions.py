"""Kill a fit at random moments, resume it each time, and compare with a fit that nobody disturbed.

    python examples/benchmarks/interruptions.py particles.star [--kills 10]

Prints how many tensors of model and guide differ at the end; on a CPU with one seed and thread count, none may.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("particles", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=30)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        calm, disturbed = Path(folder) / "calm", Path(folder) / "disturbed"
        command = [str(Path(sys.executable).with_name("pyro-cryo")), "fit", str(asked.particles), "--model", "cryodrgn"]
        command += ["--zdim", "2", "--epochs", str(asked.epochs), "--first", "400", "--box", "32", "--threads", "1"]
        command += ["--save-every-s", "1", "--set", "width=64", "--quiet", "--resume"]
        began = time.monotonic()
        subprocess.run([*command, "-o", str(calm)], check=True)
        whole = time.monotonic() - began
        kills = disturb([*command, "-o", str(disturbed)], asked.kills, whole)
        a, b = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (calm, disturbed))
        names = [
            (part, name) for part in ("model", "guide") for name, value in a[part].items() if torch.is_tensor(value)
        ]
        differ = [name for part, name in names if not torch.equal(a[part][name], b[part][name])]
        print(f"{kills} kills, {a['step']} steps: {len(differ)} of {len(names)} tensors differ")


def disturb(command: list[str], kills: int, whole: float) -> int:
    """Start the command, kill it at a random moment, again and again, then let it end; how often it was killed."""
    moments = random.Random(0)
    done = 0
    while done < kills:
        process = subprocess.Popen(command)
        try:
            process.wait(timeout=moments.uniform(0.1, 0.25) * whole)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            done += 1
    subprocess.run(command, check=True)
    return done


if __name__ == "__main__":
    main()
