"""Pictures of whether a fit can be trusted. Every function returns a matplotlib Figure, as those of `plots` do."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pyro_cryo.analysis.latent import as_table, pca
from pyro_cryo.analysis.plots import BLUE, SKY, VERMILION, _figure, _note
from pyro_cryo.inference.importance import GOOD

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def pareto_k(k: NDArray[np.floating]) -> Figure:
    """Pareto k of particles (n,); what lies beyond 0 and 2 is gathered in the outermost bins."""
    figure, (axes,) = _figure(1, 6.0, 3.4)
    axes.hist(np.clip(k, 0, 2), bins=list(np.linspace(0, 2, 41)), color=SKY)
    axes.axvline(GOOD, color=VERMILION, lw=1.4)
    axes.set(xlim=(0, 2), xlabel="Pareto k of the weights of a particle's draws", ylabel="particles a bin")
    _note(axes, f"{100 * float((k < GOOD).mean()):.0f}% below {GOOD}", 0.97, 0.95)
    return figure


def latent_uncertainty(z: ArrayLike | Tensor, covariance: NDArray[np.floating], count: int = 30) -> Figure:
    """Posterior means of z (n, zdim), zdim at least 2, on their first two principal components, in grey.

    Ellipses hold 90% of the posterior of some particles, evenly along the first: covariance (n, zdim, zdim).
    """
    from matplotlib.patches import Ellipse

    z = as_table(z)
    components = pca(z)
    scores, axes_ = components.project(z)[:, :2], components.axes[:2]
    figure, (axes,) = _figure(1, 5.8, 4.9)
    axes.plot(*scores.T, ".", color="0.75", ms=2, zorder=0, rasterized=True)
    order = scores[:, 0].argsort()
    for row in order[np.linspace(0, len(z) - 1, min(count, len(z))).round().astype(int)]:
        value, vector = np.linalg.eigh(axes_ @ covariance[row] @ axes_.T)
        width, height = 2 * np.sqrt(
            np.log(100) * value.clip(0)
        )  # chi-square of 2 degrees of freedom: 90% below 2 log 10
        turn = math.degrees(math.atan2(vector[1, 0], vector[0, 0]))
        axes.add_patch(Ellipse(tuple(scores[row]), width, height, angle=turn, fc="none", ec=BLUE, lw=1))
        axes.plot(*scores[row], ".", color=BLUE, ms=4)
    share = 100 * components.explained
    axes.set(xlabel=f"PC 1 ({share[0]:.0f}% of the variance)", ylabel=f"PC 2 ({share[1]:.0f}%)")
    return figure
