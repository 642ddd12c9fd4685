"""What pictures are drawn on and with: figures without a display, colours, ticks.

Colours are Okabe and Ito's, which the colour-blind tell apart; grey values and viridis carry densities.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, YELLOW, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000",
)  # fmt: skip
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)


def new_figure(count: int, width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure on the Agg canvas, without pyplot's global state; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(math.ceil(count / columns), columns, i + 1) for i in range(count)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def as_numpy(values: Tensor) -> NDArray[Any]:
    """In single precision, from wherever it is."""
    return values.detach().to("cpu", torch.float32).numpy()


def resolution_ticks(apix: float) -> list[float]:
    """Nyquist and round resolutions in angstrom, at least a tenth of the axis apart in 1 / angstrom."""
    nyquist, ticks = 2 * apix, [2 * apix]
    for size in (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 80, 100, 200, 500):
        if size > nyquist and 1 / ticks[-1] - 1 / size > 0.1 / nyquist and 1 / size > 0.05 / nyquist:
            ticks.append(float(size))
    return ticks


def cycle(count: int) -> list[str]:
    """So many colours, again and again."""
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def note(axes: Axes, text: str, x: float, y: float) -> None:
    """A remark whose upper right corner is at x, y of the axes, 0 to 1."""
    axes.annotate(text, (x, y), xycoords="axes fraction", ha="right", va="top", size=9, color="0.3")
