"""Do posteriors of poses cover the truth at the rates that they state, where the map is given?

    python examples/benchmarks/pose_calibration.py [--images 500] [--box 32] [--snr 0.3 0.1 0.03] [--peaks 24]

Images of the hinge at uniform orientations are searched, and their modes climb in the true map. Draws are those that
`Run.posterior` gives ArviZ: of Laplace's approximation, with which a fit ends, and with `corrected=True` of mixtures
that are matched to the posteriors' masses and moments, picked by their weights beside the model. For each: how often
the 50% and the 90% highest-density region holds the true pose (the region's level at the truth is the fraction of the
draws at which their own density is higher), the median angle between the best pose and the truth, the share of images
whose Pareto k is below 0.7, and what q loses, the evidence less the ELBO.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import hinge, simulate
from pyro_cryo.guides.landscape import MapLikelihood, climbed
from pyro_cryo.guides.pose_mixture import PosedGuide, log_density
from pyro_cryo.guides.poses import PoseModes, PosePrior
from pyro_cryo.inference import draws
from pyro_cryo.inference.importance import GOOD
from pyro_cryo.inference.run import Run, guide_of
from pyro_cryo.inference.search import Level, Search
from pyro_cryo.model import CryoModel
from pyro_cryo.physics.rotations import angle_deg
from pyro_cryo.physics.slices import slope_grid
from pyro_cryo.pose import AnyPose
from pyro_cryo.volumes.grid import VoxelGrid

SHIFT_SD = 1.0  # pixels
LEVELS = (Level(2, 3, 7.0), Level(3, 4, 10.0))
AT_ONCE = 50
DRAWS = 200


class Given(CryoModel):
    """A map (D, D, D) and a noise sd that are known, images from anywhere."""

    def __init__(self, volume: Tensor, sigma: float) -> None:
        super().__init__(len(volume))
        self.volume = VoxelGrid(self.box)
        self.volume.set(volume)
        self.log_sigma.data.fill_(math.log(sigma))
        self.poses = AnyPose(SHIFT_SD)


@dataclass(frozen=True)
class Case:
    """Images with their true poses, all of them in a batch; their map (D, D, D), and the noise sd."""

    particles: Particles
    batch: Batch
    volume: Tensor
    sd: float

    @property
    def sigma(self) -> Tensor:
        """(1, D / 2 + 1)"""
        return torch.full((1, self.particles.box // 2 + 1), self.sd)


def case(snr: float, images: int, box: int, folder: Path, seed: int = 0) -> Case:
    """Images of one state of the hinge, in a folder."""
    star = simulate(hinge(1), folder, n_images=images, box=box, snr=snr, shift_sd_px=SHIFT_SD, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        particles = Particles.open(star)
    with np.load(folder / "truth.npz") as truth:
        sd = float(truth["noise_sd"]) / 2**0.5  # of each real part
        return Case(particles, particles.batch(slice(None)), torch.from_numpy(truth["volumes"][0]), sd)


def anywhere(count: int) -> PosePrior:
    """The prior under which poses were drawn."""
    return PosePrior(torch.eye(3).expand(count, 3, 3), torch.zeros(count, 2), math.inf, SHIFT_SD)


def modes_of(case: Case, peaks: int, beam: int = 32) -> PoseModes:
    """Search and climb."""
    search = Search(case.volume, LEVELS, 3.5 * SHIFT_SD, SHIFT_SD, torch.eye(3)[None], beam=beam, peaks=peaks)
    likelihood, parts = MapLikelihood(slope_grid(case.volume), case.sigma), []
    for rows in torch.arange(len(case.batch)).split(AT_ONCE):
        batch, prior, px = case.batch[rows], anywhere(len(rows)), case.batch.freq_scale[rows]
        found = search(batch, case.sigma)
        parts.append(climbed(batch, likelihood, found.modes, prior, px, steps=8)[0])
    return PoseModes.of(parts)


def run_of(case: Case, modes: PoseModes) -> Run:
    """A run that has the true map, and these posteriors of the poses."""
    model = Given(case.volume, case.sd)
    return Run(model, case.particles, guide=guide_of(model, modes), poses=modes)


def level_of_truth(case: Case, run: Run, corrected: bool = False, seed: int = 0) -> tuple[Tensor, Any]:
    """The mass (n,) of the smallest highest-density region that holds the truth, and the draws that say so.

    It is uniform where draws are the posterior's. The density is q's, of corrected draws the posterior's.
    """
    told = run.posterior(draws=DRAWS, weighed=DRAWS, corrected=corrected, seed=seed)
    density = _joint if corrected else _guessed
    rotation, translation = (drawn(told, "posterior", name) for name in ("rotation", "translation"))
    truth = density(run, case.batch, case.batch.rotation[None], case.batch.translation[None])
    return (density(run, case.batch, rotation, translation) > truth).double().mean(0), told


def drawn(told: Any, group: str, name: str) -> Tensor:
    """A variable of ArviZ's one chain: (S, n, ...)."""
    return torch.from_numpy(told[group][name].values[0])


def _guessed(run: Run, batch: Batch, rotation: Tensor, translation: Tensor) -> Tensor:
    """log q of poses (S, n, 3, 3), (S, n, 2): (S, n)."""
    assert isinstance(run.guide, PosedGuide)
    mixture = run.guide.poses.of(batch)
    return torch.stack([log_density(*mixture, *pose).logsumexp(-1) for pose in zip(rotation, translation, strict=True)])


def _joint(run: Run, batch: Batch, rotation: Tensor, translation: Tensor) -> Tensor:
    """log p(image, pose) at poses (S, n, 3, 3), (S, n, 2): (S, n)."""
    with torch.no_grad():
        given = [{"rotation": turn, "translation": shift} for turn, shift in zip(rotation, translation, strict=True)]
        traces = [draws.trace_of(poutine.condition(run.model, one), batch) for one in given]
        return torch.stack([draws.log_density(trace, batch) for trace in traces])


def rates(level: Tensor) -> str:
    """How many truths lie in 50% and in 90% regions."""
    return "\t".join(f"{float((level <= rate).double().mean()):.3f}" for rate in (0.5, 0.9))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--box", type=int, default=32)
    parser.add_argument("--snr", type=float, nargs="+", default=[0.3, 0.1, 0.03])
    parser.add_argument("--peaks", type=int, default=24)
    parser.add_argument("--beam", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print("snr\tdraws\tin 50%\tin 90%\tmedian error, deg\tk below 0.7\tevidence - ELBO")
    for snr in asked.snr:
        with tempfile.TemporaryDirectory() as folder:
            images = case(snr, asked.images, asked.box, Path(folder) / "case", asked.seed)
            modes = modes_of(images, asked.peaks, asked.beam)
            for corrected in (False, True):
                level, told = level_of_truth(images, run_of(images, modes), corrected, asked.seed)
                error = float(angle_deg(modes.best[0], images.batch.rotation).median())
                stats = told["sample_stats"]
                good = float((stats["pareto_k"].values < GOOD).mean())
                lost = stats["log_evidence"].values - drawn(told, "sample_stats", "log_weight").mean(0).numpy()
                nats = "" if corrected else f"{float(lost.mean()):.3f}"
                name = "corrected" if corrected else "Laplace"
                print(f"{snr:g}\t{name}\t{rates(level)}\t{error:.2f}\t{good:.3f}\t{nats}", flush=True)


if __name__ == "__main__":
    main()
