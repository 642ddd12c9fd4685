"""The whole way in one script: simulate a moving complex, fit it, look at it, compare with the truth.

python examples/demo.py OUT [--images N] [--box D]
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import numpy as np
import torch

from pyro_cryo.analysis.latent import neighbour_r2
from pyro_cryo.analysis.report import analyze
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import hinge, simulate
from pyro_cryo.inference.fit import fit
from pyro_cryo.models.homogeneous import Homogeneous
from pyro_cryo.models.manifold import Manifold
from pyro_cryo.progress import Bar

MARK = ".pyro_cryo_demo"  # in a folder that a rerun may replace


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for everything; replaced if it is an earlier demonstration")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--box", type=int, default=64)
    asked = parser.parse_args()
    started = time.monotonic()
    if asked.out.exists() and any(asked.out.iterdir()):
        if not (asked.out / MARK).exists():
            parser.error(f"{asked.out} is not empty and no earlier demonstration; give another folder")
        shutil.rmtree(asked.out)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / MARK).touch()

    star = simulate(hinge(), asked.out / "case", n_images=asked.images, box=asked.box, snr=0.1, seed=0)
    particles = Particles.open(star)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    consensus = fit(Homogeneous(particles.box), particles, asked.out / "consensus", device=device, progress=Bar())
    still = analyze(consensus, asked.out / "consensus" / "analysis")

    run = fit(Manifold(particles.box, zdim=4), particles, asked.out / "run", device=device, progress=Bar())
    pictures = analyze(run, asked.out / "run" / "analysis", clusters=6)

    with np.load(asked.out / "case" / "truth.npz") as truth:
        coordinate = truth["coordinate"]
    r2 = float(neighbour_r2(run.latent.z, coordinate)[0])
    for picture in (*still, *pictures):
        print(picture)
    print(f"the latent coordinate follows the true motion with a 20-nearest-neighbour R2 of {r2:.3f}")
    print(f"done in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
