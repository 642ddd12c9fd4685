"""Do bands of a free energy cover the profile of a known population at the rate that they state?

    python examples/benchmarks/free_energy.py [--replicates 20] [--particles 3000] [--noise 0.2 0.3] [--snr 0.3 0.1]

Six populations of z along a line, each of two wells: a mixture of Gaussians of standard deviation 0.4, whose barrier is
sharper than its wells; exp(-U), U a polynomial of fourth order, with a barrier of 3 kT and of 1; mixtures of narrow
wells of unequal depth with a high barrier, of a wide well and a narrow one, and of two with the tails of a Student t of
3 degrees of freedom. `noise` is the standard deviation of what one particle says of z, on average: it varies by 30%
among particles. At each `snr` the particles are images of 32 px with CTFs, at known poses, of V0 + z U with an arm that
swings, their likelihoods those of `log_likelihoods` with these maps, and what they say of z is found and printed.

For each, over replicates of new particles: how many of all bins, of those of the wells (within 1 kT of the lowest), the
barrier (within 0.5 kT of its top) and the ends (beyond the wells, above 3 kT) lie in the band; its mean width and the
error of its median; how often the barrier's interval holds its true height; and the rms error of the barrier and of
that in a histogram of posterior means.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_cryo.analysis.free_energy import FreeEnergy, free_energy
from pyro_cryo.analysis.likelihoods import log_likelihoods
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import DensityMaps, hinge, simulate
from pyro_cryo.inference.run import Run
from pyro_cryo.models.linear_subspace import LinearSubspace

Array = NDArray[np.floating]

BINS, EACH, FINE = 30, 4, 200
SPREAD = 0.3  # of the noise among particles
STATES = 1000  # maps of equal probability that stand for a population
BOX = 32


@dataclass(frozen=True)
class Population:
    """A density on -span to span, on a fine grid: z (BINS * FINE,), probability of each."""

    name: str
    span: float
    density: Callable[[Array], Array]

    @property
    def z(self) -> Array:
        return midpoints(BINS * FINE, self.span)

    @property
    def probability(self) -> Array:
        value = self.density(self.z)
        return value / value.sum()

    @property
    def truth_kt(self) -> Array:
        """-log of the density averaged over each bin, 0 for an even one: (BINS,)."""
        return -np.log(self.probability.reshape(BINS, FINE).sum(1) * BINS)

    def draw(self, count: int, rng: np.random.Generator) -> Array:
        return rng.choice(self.z, count, p=self.probability)

    @property
    def quantiles(self) -> Array:
        """(STATES,) each in the middle of as much probability as all others."""
        return np.interp((np.arange(STATES) + 0.5) / STATES, self.probability.cumsum(), self.z)


def midpoints(count: int, span: float) -> Array:
    return span * ((2 * np.arange(count) + 1) / count - 1)


def well(z: Array, mean: float, sd: float) -> Array:
    return np.exp(-0.5 * ((z - mean) / sd) ** 2) / sd


def mixture(z: Array) -> Array:
    return 0.6 * well(z, -1, 0.4) + 0.4 * well(z, 1, 0.4)


def quartic(z: Array) -> Array:
    return np.exp(-3 * (z**2 - 1) ** 2 - 0.3 * z)


def asymmetric(z: Array) -> Array:
    return 0.75 * well(z, -0.9, 0.3) + 0.25 * well(z, 1.1, 0.3)


def shallow(z: Array) -> Array:
    return np.exp(-((z**2 - 1) ** 2) - 0.2 * z)


def unequal(z: Array) -> Array:
    return 0.5 * well(z, -0.8, 0.6) + 0.5 * well(z, 1.2, 0.25)


def tailed(z: Array) -> Array:
    return 0.55 * (1 + ((z + 1) / 0.3) ** 2 / 3) ** -2 + 0.45 * (1 + ((z - 1) / 0.3) ** 2 / 3) ** -2


POPULATIONS = (
    Population("mixture", 2.4, mixture),
    Population("quartic", 1.6, quartic),
    Population("asymmetric", 2.2, asymmetric),
    Population("shallow", 1.9, shallow),
    Population("unequal", 2.5, unequal),
    Population("tailed", 2.8, tailed),
)


def gaussian(population: Population, noise: float, count: int, seed: int) -> Array:
    """Log likelihoods (n, L) of particles that say z with Gaussian noise."""
    rng = np.random.default_rng(seed)
    sd = noise * np.exp(SPREAD * rng.normal(size=count))
    said = population.draw(count, rng) + sd * rng.normal(size=count)
    return -0.5 * ((said[:, None] - midpoints(EACH * BINS, population.span)) / sd[:, None]) ** 2


def of_images(population: Population, snr: float, count: int, replicates: int, seed: int) -> Array:
    """Log likelihoods (replicates, n, L) of images of maps that are linear in z."""
    toy, apix = hinge(3), hinge(3).apix_for(BOX, None)
    ends = [toy.volume(state, BOX, apix) for state in range(3)]
    z = torch.from_numpy(population.quantiles).float()
    maps = ends[1] + z[:, None, None, None] * 0.25 * (ends[2] - ends[0])
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        star = simulate(
            DensityMaps(maps, apix), Path(folder) / "case", n_images=count * replicates, box=BOX, snr=snr, seed=seed
        )
        with np.load(Path(folder) / "case" / "truth.npz") as truth:
            run = generating(truth["volumes"], z, float(truth["noise_sd"]))
        points = midpoints(EACH * BINS, population.span)[:, None]
        return log_likelihoods(run, Particles.open(star), points).unflatten(0, (replicates, count)).numpy()


def generating(volumes: Array, z: torch.Tensor, noise_sd: float) -> Run:
    """A run of the model that made the images, from its maps (S, D, D, D) at z (S,)."""
    first, last = torch.from_numpy(volumes[0]), torch.from_numpy(volumes[-1])
    moving = (last - first) / (z[-1] - z[0])
    model = LinearSubspace(BOX, zdim=1, contrast=0.0)
    model.consensus.set(first - z[0] * moving)
    model.volume.set(torch.stack([first - z[0] * moving, moving]))
    model.log_sigma.data.fill_(math.log(noise_sd / 2**0.5))  # of each real part
    return Run(model, lambda: Particles.open("particles.star"))


def posterior_moments(told: Array, population: Population) -> tuple[Array, Array]:
    """Means (n,) and standard deviations (n,) of z with a Normal(0, 1) prior, from log likelihoods (n, L)."""
    z = midpoints(told.shape[1], population.span)
    weight = np.exp(told - told.max(1, keepdims=True) - 0.5 * z**2)
    weight /= weight.sum(1, keepdims=True)
    mean = weight @ z
    return mean, np.sqrt(weight @ z**2 - mean**2)


def report(population: Population, label: str, matrices: Iterator[Array]) -> None:
    """A line of the table."""
    truth, points = population.truth_kt, midpoints(EACH * BINS, population.span)
    bottom = int(truth[: BINS // 2].argmin())
    other = BINS // 2 + int(truth[BINS // 2 :].argmin())
    top = bottom + int(truth[bottom:other].argmax())
    true_barrier = truth[top] - truth[bottom]
    inside, width, error, held, barrier, naive, said = [], [], [], [], [], [], []
    for seed, told in enumerate(matrices):
        found: FreeEnergy = free_energy(told, points, BINS, seed=seed)
        inside.append((found.low_kt <= truth) & (truth <= found.high_kt))
        width.append((found.high_kt - found.low_kt).mean())
        error.append(found.median_kt - truth)
        climb = found.barrier_kt(found.s[bottom], found.s[other])
        held.append(climb.low_kt <= true_barrier <= climb.high_kt)
        barrier.append(climb.median_kt - true_barrier)
        mean, sd = posterior_moments(told, population)
        counts = np.histogram(mean, BINS, (-population.span, population.span))[0]
        histogram = FreeEnergy.of(found.s, -np.log(np.maximum(counts, 0.5))[None], 0.9)
        naive.append(histogram.barrier_kt(found.s[bottom], found.s[other]).median_kt - true_barrier)
        said.append((1 / np.sqrt(np.maximum(1 / sd**2 - 1, 1e-3))).mean())
    rows = np.array(inside)
    index = np.arange(BINS)
    between = (index > bottom) & (index < other)
    places = {
        "wells": truth < truth.min() + 1,
        "barrier": between & (truth > truth[top] - 0.5),
        "ends": ~between & (truth > truth.min() + 3),
    }
    uncertain = rows.mean(1).std(ddof=1) / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
    print(
        f"{population.name}\t{label}\t{np.mean(said):.2f}\t{rows.mean():.3f} +- {uncertain:.3f}\t"
        + "\t".join(f"{rows[:, place].mean():.3f}" for place in places.values())
        + f"\t{np.mean(width):.2f}\t{np.sqrt(np.mean(np.square(error))):.2f}\t{np.mean(held):.2f}"
        + f"\t{true_barrier:.2f}\t{rms(barrier):.2f}\t{rms(naive):.2f}",
        flush=True,
    )


def rms(values: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=20)
    parser.add_argument("--particles", type=int, default=3000)
    parser.add_argument("--noise", type=float, nargs="*", default=[0.2, 0.3, 0.4])
    parser.add_argument("--snr", type=float, nargs="*", default=[0.3, 0.1])
    parser.add_argument("--seed", type=int, default=100)
    args = parser.parse_args()
    print(
        "population\tsetting\tsd of z\tin 90% band\twells\tbarrier\tends\twidth, kT\trms error\tbarrier held"
        "\tbarrier, kT\trms error\tof means"
    )
    seeds = range(args.seed, args.seed + args.replicates)
    for population in POPULATIONS:
        for noise in args.noise:
            report(population, f"noise {noise:g}", (gaussian(population, noise, args.particles, k) for k in seeds))
        for snr in args.snr:
            told = of_images(population, snr, args.particles, args.replicates, args.seed)
            report(population, f"SNR {snr:g}", iter(told))


if __name__ == "__main__":
    main()
