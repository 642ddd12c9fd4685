"""How sure a voxel is: what draws of maps from a posterior say, added up as they come, and error bars of an FSC."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyro_cryo.analysis import plots
from pyro_cryo.analysis.fsc import fsc, resolution_angstrom, shell_sum
from pyro_cryo.data.mrc_map import write_map
from pyro_cryo.inference.run import Run
from pyro_cryo.inference.state import write_atomically
from pyro_cryo.inference.volume_draws import half_map_draws, half_maps_again, volume_draws
from pyro_cryo.progress import Progress, quiet

INNER = (0.05, 0.95)  # quantiles, 90% of the draws between them


@dataclass(frozen=True)
class VoxelSpread:
    """mean and sd (D, D, D) of a map over its draws, and how many there were.

    The sd itself is known to one part in sqrt(2 draws). It is local where prior, z or images are: with mask "none" that
    of one map is nearly the same everywhere.
    """

    mean: Tensor
    sd: Tensor
    draws: int


@dataclass(frozen=True)
class VoxelDifference:
    """What draws say of a map less another, both of the same draw: mean, sd and probability (D, D, D).

    probability: P(the first has more density than the second), the share of the draws in which it has; draws in which
    both are equal count half, so that it is 1/2 where nothing differs
    """

    mean: Tensor
    sd: Tensor
    probability: Tensor
    draws: int

    @property
    def sign(self) -> Tensor:
        """How sure the sign of the difference is, two-sided: |2 P - 1|, from 0, nothing known, to 1."""
        return (2 * self.probability - 1).abs()


@dataclass(frozen=True)
class FSCSpread:
    """FSC curves (D / 2 + 1,) over draws: mean, sd, and low and high, between which 90% of the draws lie."""

    mean: Tensor
    sd: Tensor
    low: Tensor
    high: Tensor
    draws: int


@dataclass(frozen=True)
class HalfMapScatter:
    """How far apart half-maps lie, by shell (D / 2 + 1,), over how far noise of the images would part them.

    ratio: of the power of their difference, 1 where the sd of voxels says what noise does; sd: of it, by chance
    """

    ratio: Tensor
    sd: Tensor


class Running:
    """Mean and variance of maps that are seen once, one after the other.

    Source: Welford, Technometrics 4 (1962) 419.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._square = torch.zeros(())

    def add(self, volume: Tensor) -> None:
        """One more draw (D, D, D)."""
        self.count += 1
        step = volume - self._mean
        self._mean = self._mean + step / self.count
        self._square = self._square + step * (volume - self._mean)

    def spread(self) -> VoxelSpread:
        """Of the draws so far; ValueError of fewer than two."""
        if self.count < 2:
            raise ValueError(f"{self.count} draws have no spread; give 2 or more")
        return VoxelSpread(self._mean, (self._square / (self.count - 1)).sqrt(), self.count)


class RunningDifference:
    """The same of a map less another, with the share of the draws in which it is above zero."""

    def __init__(self) -> None:
        self._moments, self._above = Running(), torch.zeros(())

    def add(self, first: Tensor, second: Tensor) -> None:
        """Two maps (D, D, D) of one draw."""
        difference = first - second
        self._moments.add(difference)
        self._above = self._above + 0.5 * (1 + difference.sign())

    def difference(self) -> VoxelDifference:
        """Of the draws so far; ValueError of fewer than two."""
        spread = self._moments.spread()
        return VoxelDifference(spread.mean, spread.sd, self._above / spread.draws, spread.draws)


def voxel_spread(draws: Iterable[Tensor]) -> VoxelSpread:
    """Mean and sd of maps (D, D, D); one at a time is held.

    spread = voxel_spread(volume_draws(run, 50, index=12))
    """
    running = Running()
    for volume in draws:
        running.add(volume)
    return running.spread()


def voxel_difference(draws: Iterable[Tensor]) -> VoxelDifference:
    """Where the first of two maps differs from the second: draws (2, D, D, D), both maps of the same draw.

    difference = voxel_difference(volume_draws(run, 50, index=[12, 300]))
    """
    running = RunningDifference()
    for first, second in draws:
        running.add(first, second)
    return running.difference()


def fsc_spread(pairs: Iterable[tuple[Tensor, Tensor]]) -> FSCSpread:
    """FSC of pairs of maps, a pair a draw: a draw and a map that is given, say, or the half-maps of `half_map_draws`.

    spread = fsc_spread((volume, model_map) for volume in volume_draws(run, 50))
    """
    curves = torch.stack([fsc(first, second) for first, second in pairs])
    if len(curves) < 2:
        raise ValueError(f"{len(curves)} draws have no spread; give 2 or more")
    low, high = curves.quantile(torch.tensor(INNER, dtype=curves.dtype), 0)
    return FSCSpread(curves.mean(0), curves.std(0), low, high, len(curves))


def half_map_scatter(run: Run, draws: int = 30, seed: int = 0, progress: Progress = quiet) -> HalfMapScatter:
    """Of one map: whether its half-maps differ as its posterior says that maps of half of the images do.

    More where noise is not as the model has it, the same in all images of a group and independent; less where images
    are there twice. draws: pairs of other noise
    """
    pairs = half_maps_again(run, draws, seed, progress)
    power = torch.stack([shell_sum(torch.fft.rfftn((a - b).double()).abs().square()) for a, b in pairs])
    expected = power[1:].mean(0).clamp_min(1e-30)
    order = len(run.model.symmetry)  # type: ignore[arg-type]
    return HalfMapScatter(power[0] / expected, order**0.5 * power[1:].std(0) / expected)


def write_uncertainty(
    run: Run,
    out: Path,
    index: int | None = None,
    against: int | None = None,
    draws: int = 40,
    kept: int = 5,
    seed: int = 0,
    progress: Progress = quiet,
) -> list[Path]:
    """mean, sd and the last draws of the map of a particle as .mrc, and a picture of the first two.

    kept:    so many draws are written at most
    against: another particle: difference.mrc, the mean of the first map less the other's, and probability.mrc, that the
             first has more density at a voxel; in the picture too
    Without index, of a model that has no z.
    """
    if kept < 0:
        raise ValueError(f"{kept} draws are to be written; give 0 or more")
    particles = None if index is None else [i for i in (index, against) if i is not None]
    running, other, last = Running(), RunningDifference(), []
    for number, maps in enumerate(volume_draws(run, draws, index=particles, seed=seed, progress=progress)):
        first = maps if particles is None else maps[0]
        running.add(first)
        if against is not None:
            other.add(first, maps[1])
        if number >= draws - kept:
            last.append(first)
    spread, difference = running.spread(), None if against is None else other.difference()
    written = {"mean": spread.mean, "sd": spread.sd} | {f"draw_{i:03d}": volume for i, volume in enumerate(last)}
    if difference is not None:
        written |= {"difference": difference.mean, "probability": difference.probability}
    out.mkdir(parents=True, exist_ok=True)
    earlier = (out / name for name in ("difference.mrc", "probability.mrc", "pose.png", "fsc.tsv", "fsc.png"))
    for path in (*out.glob("draw_*.mrc"), *earlier):
        path.unlink(missing_ok=True)
    paths = [out / f"{name}.mrc" for name in written]
    for path, volume in zip(paths, written.values(), strict=True):
        write_map(path, volume, run.apix)
    probability = None if difference is None else difference.probability
    figure = plots.central_sections(spread.mean, run.apix, spread.sd, _title(index, against, draws), probability)
    figure.savefig(out / "uncertainty.png", dpi=150)
    return [*paths, out / "uncertainty.png"]


def write_fsc_spread(run: Run, out: Path, draws: int = 40, seed: int = 0, progress: Progress = quiet) -> FSCSpread:
    """The FSC of half-maps as it would come out again: fsc.tsv, mean, sd and limits of 90% by shell, and fsc.png."""
    spread = fsc_spread(half_map_draws(run, draws, seed, progress))
    box = run.model.box
    lines = ["shell\tresolution_angstrom\tmean\tsd\tlow\thigh"]
    for shell in range(1, box // 2 + 1):
        values = (spread.mean, spread.sd, spread.low, spread.high)
        numbers = "\t".join(f"{float(value[shell]):.5f}" for value in values)
        lines.append(f"{shell}\t{box * run.apix / shell:.3f}\t{numbers}")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "fsc.tsv", lambda path: path.write_text("\n".join(lines) + "\n"))
    name = "half-maps, and 90% of the draws"
    figure = plots.fsc_curves({name: spread.mean}, run.apix, bands={name: (spread.low, spread.high)})
    figure.savefig(out / "fsc.png", dpi=150)
    return spread


def resolution_range(spread: FSCSpread, apix: float, threshold: float = 0.143) -> tuple[float, float]:
    """Where the upper and the lower limit of a curve fall below the threshold, in angstrom: fine, coarse."""
    fine, coarse = (resolution_angstrom(curve, apix, threshold) for curve in (spread.high, spread.low))
    return fine, coarse


def _title(index: int | None, against: int | None, draws: int) -> str:
    whose = "" if index is None else f"particle {index}, "
    other = "" if against is None else f"; probability of more density than particle {against}'s"
    return f"{whose}mean and standard deviation of {draws} draws{other}"
