"""Where one particle may lie: draws of its rotation, gathered at the peaks of their distribution, and their picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_cryo.analysis.canvas import COLOURS, as_numpy
from pyro_cryo.inference.run import Run
from pyro_cryo.physics.rotations import angle_deg, log, matrix_to_quaternion
from pyro_cryo.pose import PoseAbout

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OVERLAP = 2.0  # rms angles of a peak: another that is nearer is a part of it
SHOWN = 3  # peaks seen from near


@dataclass(frozen=True)
class PosePosterior:
    """S draws of a particle's rotation, volume axes to view axes, at K peaks, the one with most draws first.

    rotation: (S, 3, 3); of a symmetric map, of all R S that look alike, the one nearest to a peak
    peak:     (S,) number of that peak
    peaks:    (K, 3, 3)
    symmetry: (G, 3, 3) point group of the map, the identity first
    table:    (3, 3) where a table has the particle, of those alike the nearest to the first peak; None without a table
    """

    rotation: Tensor
    peak: Tensor
    peaks: Tensor
    symmetry: Tensor
    table: Tensor | None = None

    @staticmethod
    def of(rotation: Tensor, modes: Tensor, symmetry: Tensor, table: Tensor | None = None) -> PosePosterior:
        """From draws (S, 3, 3) and where peaks may be (K, 3, 3); of those that overlap, or look alike, one is left."""
        away = _away(rotation, modes, symmetry).amin(-1)
        nearest = away.argmin(1)
        kept: list[int] = []
        rms: list[float] = []
        for mode in torch.bincount(nearest).argsort(descending=True).tolist():
            own = away[nearest == mode, mode]
            apart = _away(modes[[mode]], modes[kept], symmetry).amin(-1)[0].tolist()
            if len(own) and all(far > OVERLAP * wide for far, wide in zip(apart, rms, strict=True)):
                kept.append(mode)
                rms.append(float(own.square().mean().sqrt()))
        nearest = _away(rotation, modes[kept], symmetry).amin(-1).argmin(1)
        order = torch.bincount(nearest, minlength=len(kept)).argsort(descending=True)
        peaks, peak = modes[kept][order], order.argsort()[nearest]
        if table is not None:
            table = _alike(table[None], peaks[:1], symmetry)[0]
        return PosePosterior(_alike(rotation, peaks[peak], symmetry), peak, peaks, symmetry, table)

    @property
    def share(self) -> Tensor:
        """(K,) of the draws at each peak."""
        return torch.bincount(self.peak, minlength=len(self.peaks)) / len(self.peak)

    def turn_deg(self, peak: int) -> Tensor:
        """Of the draws at a peak, rotation vectors from it about the view's x, its y and the line of sight: (s, 3)."""
        return log(self.rotation[self.peak == peak] @ self.peaks[peak].mT).rad2deg()

    @property
    def in_plane_deg(self) -> Tensor:
        """(S,) how far each draw is turned about its line of sight, the first peak having been tilted to it.

        R = twist swing R_1, the swing about an axis in the image's plane; from -180 to 180.
        """
        q = matrix_to_quaternion(self.rotation @ self.peaks[0].mT)
        return 2 * torch.atan(q[:, 2] / q[:, 3]).rad2deg()


def of_particle(run: Run, index: int, draws: int = 500, seed: int = 0) -> PosePosterior:
    """The pose of a run's own particle, in draws of its guide; that of its first image, where it has several.

    Draws of `run.posterior(..., corrected=True)` go to `PosePosterior.of`. Raises ValueError where poses are known.
    """
    if run.poses is None:
        raise ValueError(f"the poses of this {type(run.model).__name__} are known; fit with --poses refine or search")
    particle = run.some([index])
    modes = run.poses[run.particles.images_of(torch.tensor([index]))[:1].repeat(draws)]
    rotation, _ = modes.drawn(torch.Generator().manual_seed(seed))
    symmetry = getattr(run.model, "symmetry", torch.eye(3)[None]).cpu()
    table = None
    if isinstance(run.model.poses, PoseAbout):
        table = next(run.batches(particle, len(particle))).rotation[0].cpu()
    return PosePosterior.of(rotation, modes.rotation[0, modes.log_weight[0].isfinite()], symmetry, table)


def pose_sphere(found: PosePosterior, title: str = "") -> Figure:
    """Viewing directions on a sphere laid out with equal areas, and the peaks with most draws from near, in degrees.

    On the sphere the colour is the turn in the image's plane; small and grey are views of a symmetric map that look
    alike. From near a point is the turn from the peak, (tilt about the view's x axis, about its y axis), its colour
    that about the line of sight. A cross is where the table has the particle.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    near = min(SHOWN, len(found.peaks))
    figure = Figure(figsize=(6.0 + 2.8 * near, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1, 1 + near, width_ratios=[2.2] + near * [1.0])
    _draw_sphere(figure.add_subplot(grid[0], projection="mollweide"), found)
    for number in range(near):
        _draw_peak(figure.add_subplot(grid[1 + number]), found, number)
    if title:
        figure.suptitle(title, size=11)
    return figure


def write_pose(run: Run, out: Path, index: int, seed: int = 0) -> Path:
    """pose.png, the pose of a particle."""
    figure = pose_sphere(of_particle(run, index, seed=seed), f"particle {index}, where it may lie")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "pose.png", dpi=150)
    return out / "pose.png"


def _draw_sphere(axes: Axes, found: PosePosterior) -> None:
    longitude, latitude = (np.radians(np.arange(low, high + 1, 30)) for low, high in ((-150, 150), (-60, 60)))
    axes.set(xticks=longitude, yticks=latitude, xticklabels=[], yticklabels=[])
    axes.grid(color="0.85", lw=0.6)
    axes.set_axisbelow(True)
    alike = found.rotation[:, None] @ found.symmetry[1:]
    axes.plot(*_on_sphere(alike.flatten(0, 1)), ".", color="0.7", ms=1.5, rasterized=True)
    x, y = _on_sphere(found.rotation)
    colour = as_numpy(found.in_plane_deg)
    shown = axes.scatter(x, y, s=9, c=colour, cmap="twilight", vmin=-180, vmax=180, zorder=3)
    axes.figure.colorbar(
        shown, ax=axes, label="turn in the plane (°)", ticks=[-180, -90, 0, 90, 180], location="bottom", shrink=0.5
    )
    for number in reversed(range(len(found.peaks))):
        ring = COLOURS[number % len(COLOURS)]
        ((x, y),) = zip(*_on_sphere(found.peaks[[number]]), strict=True)
        axes.plot(x, y, "o", mfc="none", mec=ring, ms=15, mew=1.5, zorder=4)
        beside = (13 if x < 2 else -13, 8)  # inside the sphere
        axes.annotate(str(number + 1), (x, y), beside, textcoords="offset points", color=ring, size=10, ha="center")
    said = f"{len(found.peaks)} peaks" if len(found.peaks) > 1 else "viewing directions"
    if found.table is not None:
        axes.plot(*_on_sphere(found.table[None]), "x", color="black", ms=7, mew=1.5, zorder=5)
        said += f"; the table is {float(angle_deg(found.table, found.peaks[0])):.2g}° from peak 1"
    axes.set_title(said, size=10)


def _draw_peak(axes: Axes, found: PosePosterior, number: int) -> None:
    turn = found.turn_deg(number)
    rms = float(turn.square().sum(-1).mean().sqrt())
    reach = 1.15 * float(turn[:, :2].abs().max().clamp_min(1e-3))
    x, y, along = as_numpy(turn).T
    shown = axes.scatter(x, y, s=9, c=along, cmap="viridis", zorder=3)
    axes.figure.colorbar(shown, ax=axes, label="about the line of sight (°)", location="bottom", shrink=0.9)
    if found.table is not None:
        x, y, along = as_numpy(log(found.table @ found.peaks[number].mT).rad2deg())
        axes.plot(x, y, "x", color="black", ms=7, mew=1.5, zorder=5)
    ring = COLOURS[number % len(COLOURS)]
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="about x (°)", ylabel="about y (°)")
    axes.set_title(f"{number + 1}: {100 * float(found.share[number]):.0f}%, rms {rms:.2g}°", size=10, color=ring)
    axes.spines[["top", "right"]].set_visible(False)


def _on_sphere(rotation: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Longitude and latitude (n,), radians, of the directions from which rotations (n, 3, 3) see the map."""
    x, y, z = as_numpy(rotation[:, 2]).T
    return np.arctan2(y, x), np.arcsin(z.clip(-1, 1))


def _away(rotation: Tensor, others: Tensor, symmetry: Tensor) -> Tensor:
    """Degrees from what looks like rotations (n, 3, 3) to others (K, 3, 3): (n, K, G)."""
    return angle_deg((rotation[:, None] @ symmetry)[:, None], others[:, None])


def _alike(rotation: Tensor, others: Tensor, symmetry: Tensor) -> Tensor:
    """Of all that looks like rotations (n, 3, 3) the nearest to others (n, 3, 3), or to one (1, 3, 3)."""
    every = rotation[:, None] @ symmetry
    best = angle_deg(every, others[:, None]).argmin(1)
    return every[torch.arange(len(every)), best]
