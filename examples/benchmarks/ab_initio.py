"""Poses from nothing, from several random starts: how far from the truth, and in what time.

    python examples/benchmarks/ab_initio.py CASE [--seeds 10] [--box 64] [--symmetry C1] [--device cuda]

CASE holds particles.star, whose poses are not read, and truth.npz with rotation (N, 3, 3) and shift_px (N, 2). Errors
are medians, up to one rotation and the hand of the map and one shift of it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_cryo import Particles
from pyro_cryo.guides.poses import PoseModes
from pyro_cryo.inference.ab_initio import ab_initio
from pyro_cryo.physics.rotations import align_poses, angle_deg, point_group


def main() -> None:
    """One line a seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--box", type=int)
    parser.add_argument("--symmetry", default="C1")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    particles = Particles.open(asked.case / "particles.star", box=asked.box)
    with np.load(asked.case / "truth.npz") as file:
        rotation, shift_px = (torch.from_numpy(file[name]).float() for name in ("rotation", "shift_px"))
        stored = file["volumes"].shape[-1]
    shift_px = shift_px * (particles.box / stored)
    for seed in range(asked.seeds):
        began = time.monotonic()
        found = ab_initio(
            particles,
            point_group(asked.symmetry),
            generator=torch.Generator().manual_seed(seed),
            device=asked.device,
        )
        seconds = time.monotonic() - began
        degrees, pixels, hand = errors(found.modes, rotation, shift_px)
        spread = found.modes.spread
        print(
            f"seed {seed}: {degrees:.2f} degrees, {pixels:.3f} px, hand {hand}, {seconds:.0f} s; "
            f"said {float(spread.angle_deg.median()):.2f} degrees rms, {float(spread.shift_px.median()):.3f} px rms",
            flush=True,
        )


def errors(modes: PoseModes, rotation: Tensor, shift_px: Tensor) -> tuple[float, float, str]:
    """Median angle in degrees and distance in pixels of the best poses, and whether the hand is the truth's."""
    found, translation = modes.best
    aligned, flipped = align_poses(found, rotation)
    angle = angle_deg(aligned, rotation)
    good = angle <= max(float(angle.median()), 5.0)
    axes, away = aligned[:, :2], translation - shift_px
    offset = torch.linalg.lstsq(axes[good].flatten(0, 1), away[good].reshape(-1, 1)).solution
    left = (away - (axes @ offset)[..., 0]).norm(dim=1)
    return float(angle.median()), float(left.median()), "flipped" if flipped else "kept"


if __name__ == "__main__":
    main()
