"""Poses that are roughly known, refined: how far from the truth, beside what the true maps would leave.

    python examples/benchmarks/pose_refinement.py CASE --score SCORE.py [--model manifold] [--turn-deg 5] [--shift-px 2]
        [--seed 0] [--limit]

CASE as in homogeneous.py, with the true map of each state in truth.npz. Every image is turned by so many degrees about
an axis drawn at random and moved by so many pixels in a random direction, and the recipe is fitted with `--poses
refine`; prints the score of its poses. With --limit no recipe is fitted: poses climb in the true maps and the true
noise, and only the state of each image is not known. No method that has to find maps and noise too can be expected to
come closer. Maps between those of neighbouring states are interpolated.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from heterogeneous import call
from torch import Tensor

from pyro_cryo import Particles
from pyro_cryo.guides.poses import PoseModes, PosePrior
from pyro_cryo.inference.decoded import family_of_maps
from pyro_cryo.inference.moving import likelihood_in
from pyro_cryo.inference.pose_em import PoseEM, march
from pyro_cryo.inference.refine import STEPS, first_band
from pyro_cryo.inference.run import Run
from pyro_cryo.physics.rotations import exp

BETWEEN = 4  # maps from one true state to the next
LAST = 3  # passes in the last band


def main() -> None:
    """Move, refine, score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", type=Path)
    parser.add_argument("--score", type=Path, required=True)
    parser.add_argument("--model", default="manifold")
    parser.add_argument("--turn-deg", type=float, default=5.0)
    parser.add_argument("--shift-px", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        particles = displaced(asked)
        found = in_true_maps(asked, particles) if asked.limit else refined(asked, particles, folder)
        rotation, translation = found.best
        np.savez(folder / "poses.npz", rotation=rotation.numpy(), shift_px=translation.numpy())
        print(call(sys.executable, asked.score, asked.case / "truth.npz", "--poses", folder / "poses.npz"))


def displaced(asked: argparse.Namespace) -> Particles:
    """The particles with their poses so far from the truth."""
    particles, generator = Particles.open(asked.case / "particles.star"), torch.Generator().manual_seed(asked.seed)

    def anywhere(axes: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(len(particles), axes, generator=generator), dim=1)

    turn, shift = math.radians(asked.turn_deg) * anywhere(3), asked.shift_px * anywhere(2)
    return particles.with_poses(exp(turn) @ particles.rotation, particles.translation + shift)


def refined(asked: argparse.Namespace, particles: Particles, folder: Path) -> PoseModes:
    """What the recipe makes of them."""
    particles.write_star(folder / "displaced.star")
    how = ["--model", asked.model, "--poses", "refine", "--seed", asked.seed, "--quiet"]
    command = Path(sys.executable).with_name("pyro-cryo")
    call(command, "fit", folder / "displaced.star", "-o", folder / "run", *how)
    found = Run.load(folder / "run").poses
    assert found is not None
    return found


def in_true_maps(asked: argparse.Namespace, particles: Particles) -> PoseModes:
    """To where poses climb in the true maps."""
    with np.load(asked.case / "truth.npz") as truth:
        states, sd = torch.from_numpy(truth["volumes"]).float(), float(truth["noise_sd"]) / 2**0.5
    step = (torch.arange(BETWEEN) / BETWEEN)[:, None, None, None]
    maps = torch.cat([*(a + step * (b - a) for a, b in pairwise(states)), states[-1:]])
    sigma = torch.full((particles.n_noise_groups, particles.box // 2 + 1), sd)
    family, middle = family_of_maps(torch.arange(len(maps))[:, None].float(), maps, sigma)
    turn_sd, shift_sd = math.radians(asked.turn_deg) / 3**0.5, asked.shift_px / 2**0.5
    prior = PosePrior(particles.rotation, particles.translation, turn_sd, shift_sd)
    em = PoseEM(particles, prior, torch.eye(3)[None], sigma, torch.Generator().manual_seed(asked.seed))
    modes, likelihood = PoseModes.single(prior.rotation, prior.translation), likelihood_in(family, middle, eckart=False)
    bands = march(first_band(prior, particles.box), particles.box / 2 - 1)
    for band in [*bands, *bands[-1:] * (LAST - 1)]:
        for _ in em.climbing(torch.arange(len(particles)), modes, likelihood, particles.box, band, STEPS):
            pass
    return modes


if __name__ == "__main__":
    main()
