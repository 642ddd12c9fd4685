"""The free energy along a coordinate of shapes, -log of their density in units of kT, with its posterior.

    profile = of_run(run).free_energy                        # along the longest way through the particles
    points, s = along_path(path, 120)                        # or along a path of one's own
    profile = free_energy(log_likelihoods(run, run.particles, points), s)
    print(profile.barrier_kt(s[30], s[90]))

Images tell the density of shapes as they were frozen, in the coordinate that is given: another coordinate, that
stretches one end, has another free energy. Points are all that shapes may be. They must reach as far as the particles:
those beyond are counted at the ends. Where particles lie off a path in ways that images tell, give a cloud of points
about it, how far along each lies, and what they share of their bins, as `of_run` does.

The tolerance of these shares is wide: the most probable ones are a few atoms, of whose chance the band knows nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pyro_cryo.analysis.latent import as_table
from pyro_cryo.analysis.likelihoods import log_likelihoods
from pyro_cryo.analysis.longest_way import longest_way
from pyro_cryo.analysis.population import binned, most_probable, relative, smooth_draws
from pyro_cryo.guides.points import ClassesCoefficients
from pyro_cryo.inference.run import Run
from pyro_cryo.progress import Progress, quiet

Array = NDArray[np.floating]

FEWEST_BINS = 8
MOST = 20_000  # particles whose likelihoods at all shapes are held at once: 110 MB, and copies


@dataclass(frozen=True)
class Interval:
    """Median and credible interval of a free energy, kT."""

    median_kt: float
    low_kt: float
    high_kt: float


@dataclass(frozen=True)
class Profile:
    """The free energy along a way, and how far along it the posterior means of all particles lie: means (n,)."""

    free_energy: FreeEnergy
    means: Array


@dataclass(frozen=True)
class FreeEnergy:
    """-log p(s) on K bins of equal width, kT; 0 where p is that of a population even over all bins.

    An absolute reference: relative to its lowest bin a profile would be certain there, and less so elsewhere.

    s:               (K,) bin centres
    median_kt:       (K,)
    low_kt, high_kt: (K,) the central interval of probability `level`, at each bin
    draws_kt:        (S, K) whole profiles from the posterior
    """

    s: Array
    median_kt: Array
    low_kt: Array
    high_kt: Array
    draws_kt: Array
    level: float

    @staticmethod
    def of(s: Array, draws_kt: Array, level: float) -> FreeEnergy:
        """From draws (S, K)."""
        low, median, high = _quantiles(draws_kt, level)
        return FreeEnergy(s, median, low, high, draws_kt, level)

    def barrier_kt(self, start: float, stop: float) -> Interval:
        """How far one climbs from the well at `start` on the way to that at `stop`: the highest bin less start's.

        The interval is of probability `level`. Raises ValueError where either lies beyond the bins.
        """
        first, last = self._bin(start), self._bin(stop)
        way = self.draws_kt[:, min(first, last) : max(first, last) + 1]
        low, median, high = _quantiles(way.max(1) - self.draws_kt[:, first], self.level)
        return Interval(float(median), float(low), float(high))

    @property
    def wells(self) -> tuple[float, float] | None:
        """The two of the median profile that the highest barrier parts, the deeper first; None where there is one."""
        height, found, f = 0.0, None, self.median_kt
        for top in range(1, len(f) - 1):
            below = f < f[top]  # on either side as far as it is not higher
            left = top - 1 - np.argmin(below[top - 1 :: -1]) if not below[:top].all() else -1
            right = top + 1 + np.argmin(below[top + 1 :]) if not below[top + 1 :].all() else len(f)
            if left == top - 1 or right == top + 1:
                continue
            wells = (left + 1 + int(f[left + 1 : top].argmin()), top + 1 + int(f[top + 1 : right].argmin()))
            rise = f[top] - max(f[wells[0]], f[wells[1]])
            if rise > height:
                height, found = rise, sorted(wells, key=lambda well: f[well])
        return None if found is None else (float(self.s[found[0]]), float(self.s[found[1]]))

    def _bin(self, s: float) -> int:
        half = 0.5 * (self.s[1] - self.s[0])
        if not self.s[0] - half <= s <= self.s[-1] + half:
            raise ValueError(f"{s:g} lies beyond the bins; give {self.s[0] - half:.4g} to {self.s[-1] + half:.4g}")
        return int(np.abs(self.s - s).argmin())


def of_run(run: Run, bins: int = 30, seed: int = 0, progress: Progress = quiet, most: int = MOST) -> Profile:
    """The free energy of a run along the longest way through its particles, from their images.

    Shapes may be anywhere about the way (`analysis.longest_way`); those in one bin share it as makes the images most
    probable. A network looks at each image at all of some 500 shapes, which takes hours of large data.

    most: particles, taken at random where a run has more. The band is then as wide as so few leave it, which is right
          for the run too; of 20,000 a bin holds some 700, and is known to 0.04 kT where images tell shapes apart

    Raises ValueError of classes, between which there is no way, and unless `most` is positive.
    """
    if most < 1:
        raise ValueError(f"most is {most}; give the number of particles to look at, 1 or more")
    if isinstance(getattr(run.model, "coefficients", None), ClassesCoefficients):
        raise ValueError(
            "between classes there are no shapes; their probabilities are in log_weight of the coefficients"
        )
    way = longest_way(run.latent.z, seed)
    count = run.particles.n_particles
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].sort().values
    particles = run.particles if count <= most else run.some(chosen.tolist())
    told = log_likelihoods(run, particles, way.points, progress=progress)
    share = most_probable(told, tolerance=0.1)
    return Profile(free_energy(told, way.s, bins, share, seed=seed), way.particle)


def along_path(path: Tensor | ArrayLike, count: int) -> tuple[Array, Array]:
    """The midpoints of `count` equally long parts of a path of straight pieces, and how far along it they lie.

    path (S, zdim) -> points (count, zdim), lengths (count,), in the units of z.
    """
    corner = as_table(path)
    reached = np.concatenate([[0.0], np.linalg.norm(np.diff(corner, axis=0), axis=1).cumsum()])
    if len(corner) < 2 or reached[-1] == 0:
        raise ValueError(f"a path of {len(corner)} points and no length; give at least 2 points that differ")
    s = reached[-1] * (np.arange(count) + 0.5) / count
    return np.stack([np.interp(s, reached, column) for column in corner.T], 1), s


def free_energy(
    log_likelihood: Tensor | ArrayLike,
    coordinate: Tensor | ArrayLike,
    bins: int = 30,
    share: Tensor | ArrayLike | None = None,
    level: float = 0.9,
    seed: int = 0,
) -> FreeEnergy:
    """The free energy along a coordinate (L,) of points, from log p(images_i | z_l) (n, L) of particles.

    Bins are of equal width, from half a mean spacing before the first point to as much after the last: of evenly spaced
    points let L be a multiple of `bins`, 4 times as many say, and a spacing no wider than an image tells z. Bins may be
    narrower than that: what they are is then for the smoothness of the density to say (`analysis.population`).

    share: (L,) what points of one bin count for in it; taken as known: the band does not tell how sure it is
           (default: all alike, right where points follow one path)
    level: probability of the band at each bin
    """
    told = torch.as_tensor(log_likelihood).detach().cpu()
    along = as_table(coordinate)[:, 0]
    if told.ndim != 2 or told.shape[1] != len(along) or not len(told):
        raise ValueError(
            f"log likelihoods of shape {tuple(told.shape)} at {len(along)} points; expected (n, {len(along)})"
        )
    if not np.isfinite(along).all() or np.ptp(along) == 0:
        raise ValueError("coordinates must be finite, and not all the same; give how far along each point lies")
    if bins < FEWEST_BINS or not 0 < level < 1:
        raise ValueError(f"{bins} bins, level {level}; expected at least {FEWEST_BINS}, and between 0 and 1")
    counts = np.ones(len(along)) if share is None else as_table(share)[:, 0]
    if counts.shape != along.shape or not (counts >= 0).all():
        raise ValueError(f"shares of shape {counts.shape}; expected ({len(along)},), none negative")
    edge = _edges(along, bins)
    label = np.searchsorted(edge[1:-1], along, side="right")
    likelihood = binned(relative(told), torch.from_numpy(label), bins, torch.from_numpy(counts))
    draws = -(smooth_draws(likelihood, seed) + math.log(bins)).numpy()
    return FreeEnergy.of(0.5 * (edge[1:] + edge[:-1]), draws, level)


def _edges(along: Array, bins: int) -> Array:
    """Of bins, points being the midpoints of what they stand for: (K + 1,)."""
    pad = 0.5 * np.ptp(along) / (len(along) - 1)
    return np.linspace(along.min() - pad, along.max() + pad, bins + 1)


def _quantiles(draws: Array, level: float) -> Array:
    """The low end of the central interval, the median and the high end over the first axis: (3, ...)."""
    return np.quantile(draws, [0.5 - 0.5 * level, 0.5, 0.5 + 0.5 * level], axis=0)
