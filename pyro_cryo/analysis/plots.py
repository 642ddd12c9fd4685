"""Pictures of a fit. Every function returns a matplotlib Figure and needs no display.

figure = fsc_curves({"corrected": curve}, apix=1.3)
figure.savefig("fsc.png", dpi=150)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pyro_cryo.analysis.canvas import BLUE, SKY, VERMILION, as_numpy, cycle, new_figure, note, resolution_ticks
from pyro_cryo.analysis.fsc import resolution_angstrom
from pyro_cryo.analysis.latent import KMeans, as_table, pca
from pyro_cryo.guides.poses import PoseSpread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def learning_curve(records: Sequence[Mapping[str, Any]]) -> Figure:
    """The loss against the epoch, from log records with `epoch` and `loss`; other records are passed over.

    Records within an epoch may carry a fractional epoch. The loss is in nats an image. Where records have `seconds`
    (since the start), the time is written at the last point.
    """
    from matplotlib.ticker import MaxNLocator

    rows = [r for r in records if "epoch" in r and r.get("loss") is not None]
    if not rows:
        raise ValueError("no record has both epoch and loss; there is no learning curve to draw")
    epoch, loss = (np.array([float(r[name]) for r in rows]) for name in ("epoch", "loss"))
    figure, (axes,) = new_figure(1, 6.0, 3.8)
    axes.plot(epoch, loss, color=BLUE, lw=1.6, marker="o" if len(rows) <= 60 else None, ms=4)
    if len(rows) > 60:  # the first steps fall so far that they would hide the rest
        tail = loss[len(loss) // 20 :]
        pad = 0.08 * max(float(np.ptp(tail)), 1e-9 * abs(float(tail[-1])))
        axes.set_ylim(tail.min() - pad, tail.max() + pad)
    if "seconds" in rows[-1]:
        note(axes, f"{float(rows[-1]['seconds']) / 60:.1f} min", 0.97, 0.95)
    axes.set(xlabel="epoch", ylabel="loss (nats an image)", title="Learning curve")
    if float(epoch.max()) >= 2 and np.allclose(epoch, epoch.round()):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def latent_density(z: ArrayLike | Tensor, clusters: KMeans | None = None) -> Figure:
    """Where the particles lie in the latent space: (N, zdim).

    A density of the first two principal components; a histogram where zdim is 1. Cluster centres are numbered as the
    maps of these clusters are.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    z = as_table(z)
    if z.shape[1] == 1:
        return _latent_histogram(z[:, 0], clusters)
    components = pca(z)
    scores = components.project(z)[:, :2]
    figure, (axes,) = new_figure(1, 5.8, 4.9)
    norm = LogNorm() if len(z) >= 1000 else None
    bins = axes.hexbin(scores[:, 0], scores[:, 1], gridsize=_gridsize(len(z)), norm=norm, mincnt=1, cmap="viridis")
    ticks = None if norm else MaxNLocator(integer=True)
    figure.colorbar(bins, ax=axes, label="particles a bin", ticks=ticks)
    if clusters is not None:
        for number, (x, y) in enumerate(components.project(clusters.centre)[:, :2]):
            _numbered(axes, number, float(x), float(y))
    share = 100 * components.explained
    axes.set(
        xlabel=f"PC 1 ({share[0]:.0f}% of the variance)",
        ylabel=f"PC 2 ({share[1]:.0f}%)",
        title=f"Latent space, {len(z):,} particles",
    )
    return figure


def fsc_curves(
    curves: Mapping[str, Tensor],
    apix: float,
    thresholds: Sequence[float] = (0.143, 0.5),
    bands: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> Figure:
    """FSC curves (D / 2 + 1,) by name against resolution, in angstrom on a scale even in 1 / angstrom.

    The legend gives each curve's resolution at the first threshold. bands: of some, where they lie, low and high.
    """
    figure, (axes,) = new_figure(1, 6.4, 4.0)
    nyquist = 0.5 / apix
    for (name, curve), colour in zip(curves.items(), cycle(len(curves)), strict=False):
        values = curve.double().cpu()
        s = np.arange(len(values)) / (2 * (len(values) - 1) * apix)
        signal = bool(thresholds) and name != "phase-randomised"  # which has a resolution of the mask only
        resolved = resolution_angstrom(values, apix, thresholds[0]) if signal else math.nan
        label = f"{name} ({resolved:.3g} Å)" if math.isfinite(resolved) else name
        axes.plot(s, values, color=colour, lw=1.8, label=label)
        if bands and name in bands:
            low, high = (as_numpy(edge) for edge in bands[name])
            axes.fill_between(s, low, high, color=colour, alpha=0.25, lw=0)
    for threshold in thresholds:
        axes.axhline(threshold, color="0.45", lw=0.9, ls=(0, (4, 3)))
        axes.annotate(
            f"{threshold:g}", (1.01, threshold), xycoords=("axes fraction", "data"), va="center", color="0.35", size=9
        )
    axes.axhline(0, color="0.8", lw=0.8, zorder=0)
    axes.set(xlim=(0, nyquist), ylim=(-0.1, 1.05), xlabel="resolution (Å)", ylabel="Fourier shell correlation")
    ticks = resolution_ticks(apix)
    axes.set_xticks([1 / t for t in ticks], [f"{t:.3g}" for t in ticks])
    axes.legend(frameon=False, loc="lower left")
    return figure


def central_sections(
    volume: Tensor, apix: float, sd: Tensor | None = None, title: str = "", probability: Tensor | None = None
) -> Figure:
    """The sections through the centre voxel of a map (D, D, D), and below them those of its standard deviation.

    probability (D, D, D): of a difference at each voxel, below these: white at 1/2, where nothing is known of its sign.
    """
    rows = [("density", volume, "gray")] + ([("standard deviation", sd, "viridis")] if sd is not None else [])
    if probability is not None:
        rows.append(("probability", probability, "RdBu_r"))
    figure, axes = new_figure(3 * len(rows), 8.2, 2.9 * len(rows) + 0.3, columns=3)
    for row, (label, map_, colours) in enumerate(rows):
        sections = [as_numpy(s) for s in _central(map_)]
        low, high = _contrast(np.concatenate([s.ravel() for s in sections])) if row == 0 else _range(map_)
        if map_ is probability:
            low, high = 0.0, 1.0
        picture = None
        for plane, section, ax in zip(("x-y", "x-z", "y-z"), sections, axes[3 * row : 3 * row + 3], strict=True):
            picture = ax.imshow(section, origin="lower", cmap=colours, vmin=low, vmax=high)
            if row == 0:
                ax.set_title(f"{plane} section", size=10)
            _bare(ax)
        _scale_bar(axes[3 * row], len(map_), apix, "black" if map_ is probability else "white")
        assert picture is not None
        figure.colorbar(picture, ax=list(axes[3 * row : 3 * row + 3]), label=label, shrink=0.85, pad=0.015)
    if title:
        figure.suptitle(title, size=11)
    return figure


def map_series(volumes: Tensor, apix: float, labels: Sequence[str] | None = None, title: str = "") -> Figure:
    """A series of maps (S, D, D, D), say along a path: each one's projections along z and y, all on one grey scale."""
    count = len(volumes)
    if labels is not None and len(labels) != count:
        raise ValueError(f"{len(labels)} labels for {count} maps; give one each")
    blocks = math.ceil(count / 10)
    columns = math.ceil(count / blocks)
    side = max(0.95, min(2.0, 10.0 / columns))
    figure, axes = new_figure(2 * blocks * columns, side * columns + 0.5, 2 * blocks * (side + 0.12) + 0.5, columns)
    for ax in axes:
        _bare(ax)
        ax.set_visible(False)
    projections = [as_numpy(volumes.sum(1)), as_numpy(volumes.sum(2))]
    low, high = _contrast(np.concatenate([p.ravel() for p in projections]), (0.2, 99.98))
    for i in range(count):
        block, column = divmod(i, columns)
        for view, projection in enumerate(projections):
            ax = axes[(2 * block + view) * columns + column]
            ax.set_visible(True)
            ax.imshow(projection[i], origin="lower", cmap="gray", vmin=low, vmax=high)
            if view == 0:
                ax.set_title(str(i) if labels is None else labels[i], size=9)
            if column == 0:
                ax.set_ylabel("along z" if view == 0 else "along y", size=9)
    _scale_bar(axes[0], volumes.shape[-1], apix)
    if title:
        figure.suptitle(title, size=11)
    return figure


def pose_distribution(rotation: Tensor, spread: PoseSpread) -> Figure:
    """From where N particles are seen, rotation (N, 3, 3), and how unsure their poses are.

    Left the density of viewing directions, over that of a uniform distribution, on a sphere laid out with equal areas;
    right the root mean square angle and shift of each image's posterior.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.2, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1, 3, width_ratios=[2.0, 1.0, 1.0])
    sphere = figure.add_subplot(grid[0], projection="mollweide")
    longitude, latitude = (np.linspace(-half, half, n) for half, n in ((np.pi, 121), (np.pi / 2, 61)))
    density = _density_of_directions(rotation[:, 2], longitude, latitude)
    shown = sphere.pcolormesh(longitude, latitude, density, cmap="viridis", vmin=0, shading="gouraud")
    figure.colorbar(shown, ax=sphere, label="over a uniform density", shrink=0.8)
    sphere.set(xticks=[], yticks=[], title=f"Viewing directions, {len(rotation):,} images")
    for column, (values, label) in enumerate([(spread.angle_deg, "angle (degrees)"), (spread.shift_px, "shift (px)")]):
        axes = figure.add_subplot(grid[column + 1])
        axes.hist(as_numpy(values.clamp_max(3 * values.quantile(0.9))), bins=40, color=SKY, edgecolor="none")
        middle = float(values.median())
        axes.axvline(middle, color=VERMILION, lw=1.2)
        axes.set(xlabel=f"posterior rms {label}", ylabel="images" if not column else "", title=f"median {middle:.3g}")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _density_of_directions(direction: Tensor, longitude: NDArray[Any], latitude: NDArray[Any]) -> NDArray[Any]:
    """That of unit vectors (N, 3) on a grid of the sphere, over a uniform one: each as a von Mises-Fisher density."""
    direction = direction[:: -(-len(direction) // 20_000)]  # more do not show
    concentration = 25.0 * max(1.0, len(direction) / 500) ** 0.3
    cosine, sine = np.cos(latitude)[:, None], np.sin(latitude)[:, None] + 0 * longitude
    point = torch.from_numpy(np.stack([cosine * np.cos(longitude), cosine * np.sin(longitude), sine], -1))
    near = [torch.exp(concentration * (row @ direction.double().T - 1)).mean(-1) for row in point]
    return 2 * concentration * torch.stack(near).numpy()


def _latent_histogram(z: NDArray[np.floating], clusters: KMeans | None) -> Figure:
    figure, (axes,) = new_figure(1, 6.0, 3.6)
    counts, _, _ = axes.hist(z, bins=min(100, max(10, round(len(z) ** 0.5))), color=SKY, edgecolor="none")
    if clusters is not None:
        axes.set_ylim(0, 1.15 * np.max(counts))
        for number, x in enumerate(clusters.centre[:, 0]):
            axes.axvline(float(x), color=VERMILION, lw=1)
            _numbered(axes, number, float(x), 1.08 * float(np.max(counts)))
    axes.set(xlabel="z", ylabel="particles a bin", title=f"Latent coordinate, {len(z):,} particles")
    return figure


def _central(volume: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sections x-y, x-z and y-z, the first axis named running to the right."""
    c = len(volume) // 2
    return volume[c], volume[:, c], volume[:, :, c]


def _contrast(values: NDArray[np.floating], percentiles: tuple[float, float] = (0.5, 99.8)) -> tuple[float, float]:
    """Grey levels between which nearly all pixels lie; a few extreme ones do not flatten the picture."""
    low, high = (float(v) for v in np.percentile(values, percentiles))
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _range(volume: Tensor) -> tuple[float, float]:
    high = float(volume.max())
    return 0.0, high if high > 0 else 1.0


def _gridsize(count: int) -> int:
    return int(min(80, max(18, count**0.5 / 1.6)))


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _numbered(axes: Axes, number: int, x: float, y: float) -> None:
    box = {"boxstyle": "circle,pad=0.22", "fc": "white", "ec": VERMILION, "lw": 1.2}
    axes.annotate(str(number), (x, y), ha="center", va="center", size=9, bbox=box)


def _scale_bar(axes: Axes, box: int, apix: float, colour: str = "white") -> None:
    """A bar of a round length, about a quarter of the box."""
    quarter = 0.25 * box * apix
    unit = 10.0 ** math.floor(math.log10(quarter))
    length = max(n for n in (1, 2, 5) if n * unit <= quarter) * unit
    x, y = 0.05 * box, 0.06 * box
    axes.plot([x, x + length / apix], [y, y], color=colour, lw=2.5, solid_capstyle="butt")
    axes.text(x, y + 0.03 * box, f"{length:g} Å", color=colour, size=8, va="bottom")
