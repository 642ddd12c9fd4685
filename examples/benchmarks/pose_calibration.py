"""Do posteriors of poses cover the truth at the rates that they state, where the map is given?

    python examples/benchmarks/pose_calibration.py [--images 500] [--box 32] [--snr 0.3 0.1 0.03] [--peaks 8]

Images of the hinge at uniform orientations are searched, their modes climb in the true map, and the mixtures are then
matched to the masses and moments of the posteriors. For each: how often the 50% and the 90% highest-density region
holds the true pose (the region's level at the truth is the fraction of the mixture's draws that are denser than the
truth), and what the mixture loses: the evidence less the ELBO, the median angle between draws and truth.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import hinge, simulate
from pyro_cryo.guides.landscape import MapLikelihood, climbed
from pyro_cryo.guides.pose_mixture import LEAST, PoseGaussians, log_density
from pyro_cryo.guides.pose_moments import log_likelihood, matched
from pyro_cryo.guides.poses import PoseModes, PosePrior
from pyro_cryo.inference.search import Level, Search
from pyro_cryo.physics.rotations import angle_deg
from pyro_cryo.physics.slices import fourier_grid, slope_grid

SHIFT_SD = 1.0  # pixels
LEVELS = (Level(2, 3, 7.0), Level(3, 4, 10.0))
AT_ONCE = 50
DRAWS = 500


@dataclass(frozen=True)
class Case:
    """Images with their true poses and map (D, D, D), and the noise sd (1, D / 2 + 1)."""

    batch: Batch
    volume: Tensor
    sigma: Tensor


def case(snr: float, images: int, box: int, seed: int = 0) -> Case:
    """Images of one state of the hinge."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        star = simulate(
            hinge(1), Path(folder) / "case", n_images=images, box=box, snr=snr, shift_sd_px=SHIFT_SD, seed=seed
        )
        batch = Particles.open(star).batch(slice(0, images))
        with np.load(Path(folder) / "case" / "truth.npz") as truth:
            sd = float(truth["noise_sd"]) / 2**0.5  # of each real part
            return Case(batch, torch.from_numpy(truth["volumes"][0]), torch.full((1, box // 2 + 1), sd))


def anywhere(count: int) -> PosePrior:
    """The prior under which poses were drawn."""
    return PosePrior(torch.eye(3).expand(count, 3, 3), torch.zeros(count, 2), math.inf, SHIFT_SD)


@dataclass(frozen=True)
class Posteriors:
    """Of B images: mixtures after climbing and after each match, evidence (B,) and effective draws (B,) of the last."""

    steps: list[PoseModes]
    evidence: Tensor
    effective: Tensor
    left_out: Tensor


def posteriors(
    case: Case, peaks: int, levels: tuple[Level, ...] = LEVELS, beam: int = 32, matches: int = 3
) -> Posteriors:
    """Search, climb, match."""
    search = Search(case.volume, levels, 3.5 * SHIFT_SD, SHIFT_SD, torch.eye(3)[None], beam=beam, peaks=peaks)
    slopes, grid = slope_grid(case.volume), fourier_grid(case.volume)
    parts: list[list[PoseModes]] = []
    evidence, effective, left_out = [], [], []
    for rows in torch.arange(len(case.batch)).split(AT_ONCE):
        batch, prior, px = case.batch[rows], anywhere(len(rows)), case.batch.freq_scale[rows]
        found = search(batch, case.sigma)
        modes = climbed(batch, MapLikelihood(slopes, case.sigma), found.modes, prior, px, steps=8)[0]
        steps = [modes]
        for seed in range(matches):
            modes, seen = matched(batch, grid, case.sigma, modes, prior, px, seed=seed)
            steps.append(modes)
        parts.append(steps)
        evidence.append(seen.evidence)
        effective.append(seen.effective)
        left_out.append(found.left_out)
    steps = [PoseModes.of(part) for part in zip(*parts, strict=True)]
    return Posteriors(steps, torch.cat(evidence), torch.cat(effective), torch.cat(left_out))


def level_of_truth(case: Case, modes: PoseModes, generator: torch.Generator, draws: int = DRAWS) -> Tensor:
    """The mass (B,) of the smallest highest-density region that holds the truth: uniform where mixtures are right."""
    mixture = PoseGaussians.about(modes, case.batch.freq_scale)
    weight = modes.log_weight.clamp_min(LEAST)
    truth = log_density(mixture, weight, case.batch.rotation, case.batch.translation).logsumexp(-1)
    denser = torch.zeros_like(truth)
    for _ in range(draws):
        denser += log_density(mixture, weight, *modes.drawn(generator)).logsumexp(-1) > truth
    return denser / draws


def level_of_truth_resampled(case: Case, modes: PoseModes, generator: torch.Generator, draws: int = DRAWS) -> Tensor:
    """The same with the posterior's own density: draws of the mixture weighted by posterior over mixture, (B,)."""
    grid, prior, px = fourier_grid(case.volume), anywhere(len(case.batch)), case.batch.freq_scale
    mixture, weight = PoseGaussians.about(modes, torch.ones_like(px)), modes.log_weight.clamp_min(LEAST)

    def posterior(rotation: Tensor, translation: Tensor) -> Tensor:
        told = log_likelihood(case.batch, grid, case.sigma, rotation, translation, px)
        return told + prior.log_prob(rotation, translation)

    truth = posterior(case.batch.rotation, case.batch.translation / px[:, None])
    density, ratio = [], []
    for _ in range(draws):
        pose = modes.drawn(generator)
        density.append(posterior(*pose))
        ratio.append(density[-1] - log_density(mixture, weight, *pose).logsumexp(-1))
    return (torch.stack(ratio).softmax(0) * (torch.stack(density) > truth)).sum(0)


def elbo(case: Case, modes: PoseModes, generator: torch.Generator, draws: int = 50) -> Tensor:
    """E_q[log p(image, pose) - log q(pose)] less log p of an empty image: (B,)."""
    grid, prior = fourier_grid(case.volume), anywhere(len(case.batch))
    mixture = PoseGaussians.about(modes, torch.ones_like(case.batch.freq_scale))
    total = torch.zeros(len(case.batch))
    for _ in range(draws):
        pose = modes.drawn(generator)
        joint = log_likelihood(case.batch, grid, case.sigma, *pose, case.batch.freq_scale) + prior.log_prob(*pose)
        total += joint - log_density(mixture, modes.log_weight.clamp_min(LEAST), *pose).logsumexp(-1)
    return total / draws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--box", type=int, default=32)
    parser.add_argument("--snr", type=float, nargs="+", default=[0.3, 0.1, 0.03])
    parser.add_argument("--peaks", type=int, default=8)
    parser.add_argument("--beam", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("snr\tposterior\tin 50%\tin 90%\tevidence - ELBO\tmedian error, deg\teffective\tleft out")
    for snr in args.snr:
        images, generator = case(snr, args.images, args.box, args.seed), torch.Generator().manual_seed(args.seed)
        found = posteriors(images, args.peaks, beam=args.beam)
        rows = [(f"matched {number}" if number else "Laplace", modes) for number, modes in enumerate(found.steps)]
        for name, modes in rows:
            level = level_of_truth(images, modes, generator)
            gap = f"{float((found.evidence - elbo(images, modes, generator)).mean()):.3f}"
            error = float(angle_deg(modes.best[0], images.batch.rotation).median())
            print(
                f"{snr:g}\t{name}\t{rates(level)}\t{gap}\t{error:.2f}\t"
                f"{float(found.effective.mean()):.2f}\t{float(found.left_out.mean()):.3f}",
                flush=True,
            )
        level = level_of_truth_resampled(images, found.steps[-1], generator)
        print(f"{snr:g}\tresampled\t{rates(level)}", flush=True)


def rates(level: Tensor) -> str:
    """How many truths lie in 50% and in 90% regions."""
    return "\t".join(f"{float((level <= rate).float().mean()):.3f}" for rate in (0.5, 0.9))


if __name__ == "__main__":
    main()
