"""Every recipe on data simulated from its own story, beside the recipe that lacks its sentence.

    python examples/benchmarks/zoo.py [--seeds 0 1 2 3 4] [--only mixture circle ...]

For each recipe and seed: what it recovers of what it assumes, and by how much the images that were not fitted (a
quarter) are more probable under it than under the recipe it is compared with, in nats an image, with the standard error
over the images.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from classes import accuracy
from torch import Tensor

from pyro_cryo.analysis.evidence import log_evidence
from pyro_cryo.data.blobs import Complex
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import classes, hinge, rotor, simulate
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.run import Run
from pyro_cryo.model import CryoModel
from pyro_cryo.models.circle import Circle
from pyro_cryo.models.classes import Classes
from pyro_cryo.models.contrast import Contrast
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.models.deformation import Deformation
from pyro_cryo.models.flow import Flow
from pyro_cryo.models.linear_subspace import LinearSubspace
from pyro_cryo.models.mixture import Mixture
from pyro_cryo.models.optics_noise import OpticsNoise
from pyro_cryo.models.robust_noise import RobustNoise
from pyro_cryo.models.vamp import Vamp

BOX = 24
IMAGES = 1600
MAJOR = 0.7  # the share of one of two states
JUNK = 0.15  # the share of images whose noise is JUNK_NOISE times the others'
JUNK_NOISE = 2.0
CONTRAST_SD = 0.3
MICROGRAPHS = 120
SIZE: dict[str, Any] = {"width": 48, "layers": 2}


@dataclass(frozen=True)
class Case:
    """Images, and for each what is to be found out: state (N,) or what a function made of the images, a number each."""

    particles: Particles
    truth: Tensor

    def part(self, rows: Tensor) -> Case:
        return Case(self.particles[rows], self.truth[rows])


@dataclass(frozen=True)
class Trial:
    """A recipe, the one it is compared with, data of its story and what it should find: (name, found, truth)."""

    simulated: Callable[[Path, int], Case]
    recipe: Callable[[], CryoModel]
    without: Callable[[], CryoModel]
    found: Callable[[Run, Case], list[tuple[str, float, float]]]
    epochs: int = 20


def simulated(source: Complex, folder: Path, seed: int, snr: float = 1.0) -> Case:
    """Images of all states, as many of each."""
    star = simulate(source, folder, n_images=IMAGES, box=BOX, snr=snr, seed=seed)
    with np.load(folder / "truth.npz") as truth:
        return Case(Particles.open(star), torch.from_numpy(truth["state"]))


def two_states(folder: Path, seed: int) -> Case:
    """Two ends of a swing, one in MAJOR of the images."""
    case = simulated(hinge(2), folder, seed)
    first, second = ((case.truth == k).nonzero().flatten() for k in (0, 1))
    kept = torch.cat([first, second[: int(len(first) * (1 - MAJOR) / MAJOR)]]).sort().values
    return case.part(kept)


def with_junk(folder: Path, seed: int) -> Case:
    """Images of which some were scaled up, noise and all, and lost their contrast to the others by normalisation."""
    case = simulated(hinge(11), folder, seed)
    junk = torch.rand(len(case.truth), generator=torch.Generator().manual_seed(seed)) < JUNK
    return Case(scaled(case.particles, torch.where(junk, JUNK_NOISE, 1.0)), junk)


def with_contrast(folder: Path, seed: int) -> Case:
    """Images, each times a number of its own."""
    case = simulated(hinge(11), folder, seed)
    contrast = torch.exp(CONTRAST_SD * torch.randn(len(case.truth), generator=torch.Generator().manual_seed(seed)))
    return Case(scaled(case.particles, contrast), contrast)


def of_micrographs(folder: Path, seed: int) -> Case:
    """Images of many optics groups, each of few images, whose noise is the same."""
    case = simulated(hinge(11), folder, seed)
    table = case.particles.table
    group = torch.arange(len(case.truth)) % MICROGRAPHS
    return Case(replace(case.particles, table=replace(table, group=group, groups=table.groups * MICROGRAPHS)), group)


def scaled(particles: Particles, factor: Tensor) -> Particles:
    return replace(particles, table=replace(particles.table, sign=particles.table.sign * factor))


# ------------------------------------------------------------------------------------------ what the recipes find
def share_of_major(run: Run, case: Case) -> list[tuple[str, float, float]]:
    """The share of the population nearer to where the images of the major state are."""
    z = torch.from_numpy(run.latent.z)
    centre = torch.stack([z[case.truth == k].mean(0) for k in (0, 1)])
    drawn = population(run, 20_000)
    major = torch.cdist(drawn, centre).argmin(1) == 0
    return [("weight", float(major.float().mean()), float((case.truth == 0).float().mean()))]


def population(run: Run, count: int) -> Tensor:
    """z drawn from the model's prior: (count, zdim)."""
    with torch.no_grad(), pyro.plate("particles", count):
        z = run.model.latent()
    assert z is not None
    return z


def weight_of_major(run: Run, case: Case) -> list[tuple[str, float, float]]:
    model = run.model
    assert isinstance(model, Mixture)
    weight = model.log_weight.detach().softmax(0)
    return [("weight", float(weight.max()), float((case.truth == 0).float().mean()))]


def on_a_circle(run: Run, case: Case) -> list[tuple[str, float, float]]:
    """How often the mean z of the states goes around the circle in one turn of the rotor, and how many images are
    within 30 degrees of their state's.
    """
    angle = torch.from_numpy(np.arctan2(run.latent.z[:, 1], run.latent.z[:, 0]))
    on = torch.polar(torch.ones_like(angle), angle)
    total = torch.zeros(int(case.truth.max()) + 1, dtype=on.dtype).index_add_(0, case.truth, on)
    turns = float((total.roll(-1) * total.conj()).angle().sum()) / (2 * np.pi)
    near = (on * total[case.truth].conj()).angle().abs() < np.pi / 6
    return [("turns", abs(turns), 1.0), ("near their state", float(near.float().mean()), 1.0)]


def along_the_swing(run: Run, case: Case) -> list[tuple[str, float, float]]:
    """Rank correlation of z and the angle, the sense of z being nobody's."""
    from scipy.stats import spearmanr

    return [("rank correlation", abs(float(spearmanr(run.latent.z[:, 0], case.truth.numpy())[0])), 1.0)]


def noise_found(run: Run, case: Case) -> list[tuple[str, float, float]]:
    """How far the micrographs' noise is apart, rms of log sigma: it is one spectrum."""
    log_sigma = run.model.log_sigma.detach()[:, 1 : BOX // 2]
    return [("rms between micrographs", float((log_sigma - log_sigma.mean(0)).square().mean().sqrt()), 0.0)]


def labels(run: Run, case: Case) -> list[tuple[str, float, float]]:
    return [("accuracy", accuracy(run.latent.z.argmax(1), case.truth.numpy()), 1.0)]


def junk_found(run: Run, case: Case) -> list[tuple[str, float, float]]:
    """The share of images of less than half the usual weight, and how many of the junk are among them."""
    model = run.model
    assert isinstance(model, RobustNoise)
    z = torch.from_numpy(run.latent.z)
    with torch.no_grad():
        weight = torch.cat([model.weight(b, z[b.index]) for b in run.particles.batches(64)])
    few = weight < 0.5 * weight.median()
    return [
        ("share of junk", float(few.float().mean()), float(case.truth.float().mean())),
        ("of the junk found", float(few[case.truth].float().mean()), 1.0),
    ]


def contrast_found(run: Run, case: Case) -> list[tuple[str, float, float]]:
    model = run.model
    assert isinstance(model, Contrast)
    with torch.no_grad():
        guess = torch.cat([run.guide.contrast(b).mean for b in run.particles.batches(64)])  # type: ignore[union-attr, operator]
    correlation = float(torch.corrcoef(torch.stack([guess.log(), case.truth.log()]))[0, 1])
    return [("sd", float(model.log_s.exp()), float(case.truth.log().std())), ("correlation", correlation, 1.0)]


def one_gaussian() -> CryoDRGN:
    return CryoDRGN(BOX, zdim=1, **SIZE)


TRIALS = {
    "mixture": Trial(two_states, lambda: Mixture(BOX, zdim=1, states=2, **SIZE), one_gaussian, weight_of_major, 40),
    "flow": Trial(two_states, lambda: Flow(BOX, zdim=1, **SIZE), one_gaussian, share_of_major, 40),
    "vamp": Trial(two_states, lambda: Vamp(BOX, zdim=1, **SIZE), one_gaussian, share_of_major, 40),
    "circle": Trial(
        lambda folder, seed: simulated(rotor(), folder, seed),
        lambda: Circle(BOX, **SIZE),
        lambda: CryoDRGN(BOX, zdim=2, **SIZE),
        on_a_circle,
    ),
    "classes": Trial(
        lambda folder, seed: simulated(classes(), folder, seed),
        lambda: Classes(BOX, classes=4),
        lambda: LinearSubspace(BOX),
        labels,
        epochs=0,
    ),
    "robust_noise": Trial(with_junk, lambda: RobustNoise(BOX, zdim=1, **SIZE), one_gaussian, junk_found),
    "deformation": Trial(
        lambda folder, seed: simulated(hinge(), folder, seed, snr=0.3),
        lambda: Deformation(BOX, zdim=1, points=1024, **SIZE),
        one_gaussian,
        along_the_swing,
    ),
    "optics_noise": Trial(
        of_micrographs,
        lambda: OpticsNoise(BOX, zdim=1, noise_groups=MICROGRAPHS, **SIZE),
        lambda: CryoDRGN(BOX, zdim=1, noise_groups=MICROGRAPHS, **SIZE),
        noise_found,
    ),
    "contrast": Trial(with_contrast, lambda: Contrast(BOX, zdim=1, **SIZE), one_gaussian, contrast_found),
}


def one_trial(trial: Trial, seed: int) -> tuple[list[tuple[str, float, float]], Tensor]:
    """What the recipe found, and the gain in log p of every image held out: (H,)."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = trial.simulated(Path(folder) / "case", seed)
        held = torch.randperm(len(case.truth), generator=torch.Generator().manual_seed(seed)) % 4 == 0
        train, test = (case.part(rows.nonzero().flatten()) for rows in (~held, held))
        evidence = []
        found: list[tuple[str, float, float]] = []
        for made in (trial.recipe, trial.without):
            torch.manual_seed(seed)
            model = made()
            epochs = trial.epochs if model.epochs else None
            run = fit(model, train.particles, epochs=epochs, seed=seed, learning_rate=2e-3)
            found = found or trial.found(run, train)
            evidence.append(log_evidence(run, test.particles))
    return found, evidence[0] - evidence[1]


def main() -> None:
    """Run the trials and print what they find."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", nargs="+", choices=list(TRIALS), default=list(TRIALS))
    asked = parser.parse_args()
    for name in asked.only:
        for seed in asked.seeds:
            found, gain = one_trial(TRIALS[name], seed)
            said = ", ".join(f"{what} {value:.3f} (truth {truth:.3f})" for what, value, truth in found)
            error = float(gain.std()) / len(gain) ** 0.5
            print(f"{name}, seed {seed}: {said}; held out {float(gain.mean()):+.2f} +- {error:.2f} nats", flush=True)


if __name__ == "__main__":
    main()
