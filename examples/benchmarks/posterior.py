"""How long draws take, and whether draws of poses are calibrated, both as ArviZ gets them.

python examples/benchmarks/posterior.py particles.star --truth truth.npz [--particles 200] [--draws 500] [--first N]

Poses of the table are turned by 3 degrees and shifted by 1 pixel, and refined with one map; truth.npz has `rotation`
(N, 3, 3) and `shift_px` (N, 2). Then z is drawn from a `manifold` and from a small `cryodrgn` at the table's poses.
Prints seconds, and the share of true poses in intervals of each coordinate and in regions of all.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch

from pyro_cryo import Particles, fit
from pyro_cryo.analysis.calibration import calibration
from pyro_cryo.inference.run import Run
from pyro_cryo.model import CryoModel
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.models.manifold import Manifold
from pyro_cryo.models.uncertain_pose import UncertainPose
from pyro_cryo.physics.rotations import align_poses, exp, log


def drawn(name: str, run: Run, count: int, draws: int) -> object:
    """The posterior of some particles; prints how long it took."""
    index = np.linspace(0, run.particles.n_particles - 1, count).round().astype(int).tolist()
    began = time.monotonic()
    idata = run.posterior(index=index, draws=draws)
    k = idata.sample_stats["pareto_k"].values
    seconds = time.monotonic() - began
    print(f"{name}: {draws} draws of {count} particles in {seconds:.0f} s; k < 0.7: {(k < 0.7).mean():.2f}")
    return idata


def poses(particles: Particles, truth: Path, count: int, draws: int) -> None:
    """Refined, drawn, and held against the truth."""
    generator = torch.Generator().manual_seed(0)
    turn = math.radians(3) * torch.randn(len(particles), 3, generator=generator)
    shift = torch.randn(len(particles), 2, generator=generator)
    off = particles.with_poses(exp(turn) @ particles.rotation, particles.translation + shift)
    run = fit(UncertainPose(particles.box, 3.0, 1.0, noise_groups=particles.n_noise_groups), off)
    idata = drawn("uncertain_pose", run, count, draws)
    assert run.poses is not None
    index = torch.tensor(idata.posterior["particle"].values)  # type: ignore[attr-defined]
    with np.load(truth) as file:
        rotation, moved = (torch.from_numpy(file[name])[: len(particles)].float() for name in ("rotation", "shift_px"))
    best, its_shift = run.poses.best
    rotation = align_poses(rotation, best)[0]  # the frame of the map, and its origin, are the run's own
    origin = torch.linalg.lstsq(best[:, :2].flatten(0, 1), (its_shift - moved).flatten()[:, None]).solution
    moved = moved + (best[:, :2] @ origin)[..., 0]
    true_turn = log(rotation[index] @ best[index].mT).rad2deg()
    for name, true in (("turn", true_turn), ("translation", moved[index])):
        values = torch.from_numpy(idata.posterior[name].values[0])  # type: ignore[attr-defined]
        found = calibration(true, values)
        for level in (0.5, 0.9):
            covered = found.coverage(level)
            shares = ", ".join(f"{float(share):.3f}" for share in covered.interval)
            print(
                f"  {name}, {level:.0%}: intervals {shares}; region {float(covered.region):.3f} +- {covered.error:.3f}"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("star")
    parser.add_argument("--truth", type=Path, required=True)
    parser.add_argument("--poses", help="cryoDRGN's, in place of the table's")
    parser.add_argument("--ctf")
    parser.add_argument("--particles", type=int, default=200)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--first", type=int)
    args = parser.parse_args()
    opened = Particles.open(args.star, poses=args.poses, ctf=args.ctf, first=args.first)
    poses(opened, args.truth, args.particles, args.draws)
    kinds: dict[str, CryoModel] = {
        "manifold": Manifold(opened.box, noise_groups=opened.n_noise_groups),
        "cryodrgn": CryoDRGN(opened.box, noise_groups=opened.n_noise_groups),
    }
    for name, model in kinds.items():
        run = fit(model, opened, epochs=1 if name == "cryodrgn" else None)
        drawn(name, run, args.particles, args.draws)
