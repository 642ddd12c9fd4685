"""Pictures of whether a fit can be trusted. Every function returns a matplotlib Figure, as those of `plots` do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pyro_cryo.analysis.calibration import Calibration, simultaneous_band
from pyro_cryo.analysis.canvas import (
    BLACK,
    BLUE,
    COLOURS,
    SKY,
    VERMILION,
    as_numpy,
    cycle,
    new_figure,
    note,
    resolution_ticks,
)
from pyro_cryo.analysis.free_energy import FreeEnergy
from pyro_cryo.analysis.half_sets import HalfSets
from pyro_cryo.analysis.latent import as_table, pca
from pyro_cryo.analysis.plots import fsc_curves
from pyro_cryo.analysis.predictive import ImageFit, ResidualPower
from pyro_cryo.analysis.voxels import HalfMapScatter
from pyro_cryo.inference.importance import GOOD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_BARRIER_KT = 0.1  # that an interval must clear for two wells to be told from one


def pareto_k(k: NDArray[np.floating]) -> Figure:
    """Pareto k of particles (n,); what lies beyond 0 and 2 is gathered in the outermost bins."""
    figure, (axes,) = new_figure(1, 6.0, 3.4)
    axes.hist(np.clip(k, 0, 2), bins=list(np.linspace(0, 2, 41)), color=SKY)
    axes.axvline(GOOD, color=VERMILION, lw=1.4)
    axes.set(xlim=(0, 2), xlabel="Pareto k of the weights of a particle's draws", ylabel="particles a bin")
    note(axes, f"{100 * float((k < GOOD).mean()):.0f}% below {GOOD}", 0.97, 0.95)
    return figure


def latent_uncertainty(z: ArrayLike | Tensor, covariance: NDArray[np.floating], count: int = 30) -> Figure:
    """Posterior means of z (n, zdim), zdim at least 2, on their first two principal components, in grey.

    Ellipses hold 90% of the posterior of some particles, evenly along the first: covariance (n, zdim, zdim).
    """
    from matplotlib.patches import Ellipse

    z = as_table(z)
    components = pca(z)
    scores, axes_ = components.project(z)[:, :2], components.axes[:2]
    figure, (axes,) = new_figure(1, 5.8, 4.9)
    axes.plot(*scores.T, ".", color="0.75", ms=2, zorder=0, rasterized=True)
    order = scores[:, 0].argsort()
    for row in order[np.linspace(0, len(z) - 1, min(count, len(z))).round().astype(int)]:
        value, vector = np.linalg.eigh(axes_ @ covariance[row] @ axes_.T)
        width, height = 2 * np.sqrt(np.log(100) * value.clip(0))  # 90% of chi-square of 2 lie below log 100
        turn = math.degrees(math.atan2(vector[1, 0], vector[0, 0]))
        axes.add_patch(Ellipse(tuple(scores[row]), width, height, angle=turn, fc="none", ec=BLUE, lw=1))
        axes.plot(*scores[row], ".", color=BLUE, ms=4)
    share = 100 * components.explained
    axes.set(xlabel=f"PC 1 ({share[0]:.0f}% of the variance)", ylabel=f"PC 2 ({share[1]:.0f}%)")
    return figure


def rank_deviation(found: Mapping[str, Calibration], level: float = 0.99) -> Figure:
    """How far ranks of truths among posterior draws are from uniform: a panel for each quantity, a line a coordinate.

    The distribution function of the ranks less that of uniform ones, and the band in which all of it lies with
    probability `level`. Above 0 at the left, below at the right: posteriors that are too sure; the reverse: too unsure;
    on one side all along: shifted.
    """
    if not found:
        raise ValueError("no quantity was ranked; there is nothing to draw")
    columns = min(3, len(found))
    rows = math.ceil(len(found) / columns)
    figure, axes = new_figure(len(found), 3.6 * columns, 2.8 * rows, columns)
    for ax, (name, quantity) in zip(axes, found.items(), strict=True):
        band = simultaneous_band(len(quantity.ranks), quantity.draws, level)
        at = as_numpy(band.expected)
        lower, upper = (as_numpy(edge) - at for edge in (band.lower, band.upper))
        ax.fill_between(at, lower, upper, color="0.88", lw=0, zorder=0)
        ax.axhline(0, color="0.6", lw=0.8, zorder=1)
        below = torch.stack([(quantity.ranks <= j).double().mean(0) for j in range(quantity.draws)])
        for line, colour in zip(as_numpy(below).T, cycle(below.shape[1]), strict=True):
            ax.step(at, line - at, color=colour, lw=1.3, where="mid")
        ax.set(xlim=(0, 1), title=name, xlabel="rank over the number of draws")
    axes[0].set_ylabel("share of ranks below, less uniform")
    return figure


def residual_spectrum(found: ResidualPower, apix: float, level: float = 0.99) -> Figure:
    """What a model leaves of images, over the noise that it expects, against resolution; a line a noise group.

    The band is that of the group with the most coefficients, for all shells and groups together.
    """
    figure, (axes,) = new_figure(1, 6.4, 3.8)
    shells = found.power.shape[1]
    s = np.arange(shells) / (2 * (shells - 1) * apix)
    lower, upper = (as_numpy(edge[found.count.sum(1).argmax()]) for edge in found.band(level))
    axes.fill_between(s, lower, upper, color="0.88", lw=0, zorder=0, step="mid")
    axes.axhline(1, color="0.6", lw=0.8, zorder=1)
    for number, (power, colour) in enumerate(zip(found.power, cycle(len(found.power)), strict=True)):
        axes.plot(s, as_numpy(power), color=colour, lw=1.4, marker="o", ms=3, label=f"noise group {number}")
    axes.set(xlim=(0, 0.5 / apix), xlabel="resolution (Å)", ylabel="power of the residual over the noise")
    ticks = resolution_ticks(apix)
    axes.set_xticks([1 / t for t in ticks], [f"{t:.3g}" for t in ticks])
    if 1 < len(found.power) <= len(COLOURS):
        axes.legend(frameon=False)
    return figure


def half_map_scatter(found: HalfMapScatter, apix: float) -> Figure:
    """The power by which half-maps differ over what noise would make of it; three standard deviations by chance."""
    figure, (axes,) = new_figure(1, 6.4, 3.8)
    ratio, sd = as_numpy(found.ratio)[1:-1], 3 * as_numpy(found.sd)[1:-1]
    s = np.arange(1, len(ratio) + 1) / (2 * (len(ratio) + 1) * apix)
    axes.fill_between(s, 1 - sd, 1 + sd, color="0.88", lw=0, zorder=0, step="mid")
    axes.axhline(1, color="0.6", lw=0.8, zorder=1)
    axes.plot(s, ratio, color=BLUE, lw=1.4, marker="o", ms=3)
    axes.set(xlim=(0, 0.5 / apix), xlabel="resolution (Å)", ylabel="power of the difference over the expected")
    ticks = resolution_ticks(apix)
    axes.set_xticks([1 / t for t in ticks], [f"{t:.3g}" for t in ticks])
    return figure


def image_misfit(found: ImageFit, rate: float = 0.05) -> Figure:
    """How images fit: chi-square and the match with their means, in standard deviations, beside the standard normal.

    What lies far out is gathered in the outermost bins; the number of images that `ImageFit.junk` lists is written.
    """
    figure, axes = new_figure(2, 8.4, 3.4, columns=2)
    edges = np.linspace(-8, 8, 65)
    normal = np.exp(-0.5 * edges**2) / math.sqrt(2 * math.pi) * (edges[1] - edges[0]) * len(found.index)
    panels = [(found.z_score, "chi-square"), (found.match, "match with what is expected")]
    for ax, (score, label) in zip(axes, panels, strict=True):
        ax.hist(np.clip(score, edges[0], edges[-1]), bins=list(edges), color=SKY, edgecolor="none")
        ax.plot(edges, normal, color=VERMILION, lw=1.4)
        ax.set(yscale="log", ylim=(0.5, None), xlabel=f"{label} (standard deviations)")
    axes[0].set_ylabel("images a bin")
    note(axes[0], f"{len(found.junk(rate)):,} of {len(found.index):,} fit badly", 0.97, 0.95)
    return figure


def motion_fsc(found: HalfSets) -> Figure:
    """What two half sets share of whole maps and of motions, and what motions share at shapes matched at random.

    Thin lines are the motions at single shapes, the thick one is of all together.
    """
    figure = fsc_curves({"maps": found.maps.mean(0), "motions": found.pooled}, found.apix)
    (axes,) = figure.axes
    s = np.arange(len(found.pooled)) / (2 * (len(found.pooled) - 1) * found.apix)
    for curve in found.motion:
        axes.plot(s, curve, color=VERMILION, lw=0.7, alpha=0.4)
    axes.plot(s, found.null, color=BLACK, lw=1.2, ls=":", label="motions, shapes matched at random (95%)")
    axes.set(ylim=(-0.5, 1.05), title=f"Half sets: R² of z {found.r2[0]:.2f}, {found.r2[1]:.2f}")
    axes.legend(frameon=False, loc="lower left")
    return figure


def free_energy_profile(
    profile: FreeEnergy, means: ArrayLike | Tensor | None = None, label: str = "coordinate"
) -> Figure:
    """The free energy along a coordinate with its band, kT; the axis ends where next to no particles are.

    means: (n,) coordinates of the particles' posterior means: -log of their histogram is drawn in grey, to compare
    """
    figure, (axes,) = new_figure(1, 6.0, 3.8)
    band = f"{100 * profile.level:.3g}% at each point"
    axes.fill_between(profile.s, profile.low_kt, profile.high_kt, color=SKY, alpha=0.45, lw=0, label=band)
    axes.plot(profile.s, profile.median_kt, color=BLUE, lw=1.8, label="median")
    if means is not None:
        axes.step(
            profile.s, _counted_kt(profile, as_table(means)[:, 0]), "0.55", where="mid", lw=1.2, label="means of z"
        )
    lowest = float(profile.low_kt.min())
    highest = max(float(np.min(profile.high_kt)) + 1, min(float(profile.high_kt.max()), lowest + 12))
    pad = 0.05 * (highest - lowest)
    axes.set(
        xlabel=label,
        ylabel="free energy (kT)",
        title="Free energy; 0: all shapes alike",
        ylim=(lowest - pad, highest + 4 * pad),
    )
    axes.legend(frameon=False, loc="upper center", ncols=3)
    note(axes, barrier_told(profile), 0.97, 0.08)
    return figure


def barrier_told(profile: FreeEnergy) -> str:
    """The highest barrier between two wells, in words."""
    wells = profile.wells
    barrier = None if wells is None else profile.barrier_kt(*wells)
    if wells is None or barrier is None or barrier.low_kt < LEAST_BARRIER_KT:
        return "one well"
    span = f"{barrier.median_kt:.1f} kT ({barrier.low_kt:.1f} to {barrier.high_kt:.1f})"
    return f"barrier of {span} from {wells[0]:.2g} to {wells[1]:.2g}"


def _counted_kt(profile: FreeEnergy, coordinate: NDArray[np.floating]) -> NDArray[np.floating]:
    """-log of a histogram on the profile's bins, 0 where it is even; not a number where it is empty: (K,)."""
    half = 0.5 * (profile.s[1] - profile.s[0])
    bins, span = len(profile.s), (profile.s[0] - half, profile.s[-1] + half)
    counts = np.histogram(coordinate, bins, span)[0].astype(float)
    counts[counts == 0] = np.nan
    return -np.log(counts * bins / len(coordinate))
