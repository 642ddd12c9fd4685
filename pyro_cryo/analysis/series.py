"""Maps at chosen values of z, written as a series."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_cryo.analysis.fsc import masked_fsc, resolution_angstrom
from pyro_cryo.analysis.latent import density_peaks, kmeans, nearest, principal_path
from pyro_cryo.analysis.maps import contour_level, guinier_bfactor, low_pass, sharpen, write_chimerax
from pyro_cryo.data.mrc_map import read_map, write_map
from pyro_cryo.inference.run import Run
from pyro_cryo.inference.state import write_arrays
from pyro_cryo.physics.fourier import flip_hand
from pyro_cryo.progress import Progress, quiet

VOLUMES = "volumes.npz"
LEVEL_MAPS = 10  # so many maps of a series give its contour level


def at_particles(run: Run, index: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """z at the posterior means of these particles: index (n,), z (n, zdim)."""
    count = len(run.latent.z)
    beyond = [i for i in index if not 0 <= i < count]
    if beyond:
        raise ValueError(f"particle {beyond[0]} is not there; the run has particles 0 to {count - 1}")
    return np.array(index), run.latent.z[index]


def at_clusters(run: Run, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """z of the particles nearest to k cluster centres."""
    clusters = kmeans(run.latent.z, k, seed)
    return clusters.nearest, run.latent.z[clusters.nearest]


def at_peaks(run: Run, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """z of the particles nearest to the highest peaks of the density of z; warns where it has fewer than `count`."""
    if count < 1:
        raise ValueError(f"{count} peaks; give 1 or more")
    particle = density_peaks(run.latent.z, seed).nearest[:count]
    if len(particle) < count:
        found = f"{len(particle)} peak{'s' if len(particle) > 1 else ''}"
        warnings.warn(f"the density of z has {found}, not {count}; so many maps are made", UserWarning, stacklevel=2)
    return particle, run.latent.z[particle]


def along_component(run: Run, component: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """z of the particles nearest to the path along a principal component (from 1), 5th to 95th percentile of scores.

    The path itself may leave the particles where their curve folds back: between its branches is nothing to be seen.
    """
    particle = nearest(run.latent.z, principal_path(run.latent.z, component, steps))
    return particle, run.latent.z[particle]


def from_file(path: Path, zdim: int) -> tuple[np.ndarray, np.ndarray]:
    """z from a text file or .npy, a row a map."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a text file or .npy with {zdim} numbers a row")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an empty file, which is an error below
            z = np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.loadtxt(path, ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path} holds no table of numbers ({error}); give {zdim} numbers a row") from error
    z = z[:, None] if z.ndim == 1 and zdim == 1 else np.atleast_2d(z)
    if z.ndim != 2 or z.shape[1] != zdim or not len(z):
        raise ValueError(f"{path} has {len(z)} rows of {z.shape[-1]} numbers; this run's z has {zdim}")
    if not np.isfinite(z).all():
        raise ValueError(f"{path} has a value that is not finite; give {zdim} numbers a row")
    return np.full(len(z), -1), z


def own_bfactor(run: Run) -> float:
    """The B factor that undoes the decay of a run's own map, up to the resolution of its half-maps, in angstrom^2."""
    names = ("map", "half1", "half2", "mask")
    paths = [] if run.folder is None else [run.folder / f"{name}.mrc" for name in names]
    if not paths or not all(path.exists() for path in paths):
        raise ValueError(
            f"no B factor can be estimated: {run.folder or 'the run'} has no half-maps; give a number, or leave it out"
        )
    volume, half1, half2, mask = (read_map(path)[0] for path in paths)
    resolution = resolution_angstrom(masked_fsc(half1, half2, mask).corrected, run.apix)
    return guinier_bfactor(volume, run.apix, resolution)


def finishing(
    apix: float, resolution_angstrom: float | None, bfactor_angstrom2: float | None, flip: bool
) -> Callable[[Tensor], Tensor]:
    """What is done to every map before it is written: low-pass, sharpening (negative B), mirror image."""

    def finish(volume: Tensor) -> Tensor:
        if resolution_angstrom is not None:
            volume = low_pass(volume, apix, resolution_angstrom)
        if bfactor_angstrom2 is not None:
            volume = sharpen(volume, apix, bfactor_angstrom2)
        return flip_hand(volume) if flip else volume

    return finish


def write_series(
    run: Run,
    out: Path,
    index: np.ndarray,
    z: np.ndarray | None,
    finish: Callable[[Tensor], Tensor],
    progress: Progress = quiet,
    volumes: Iterable[Tensor] | None = None,
) -> list[Path]:
    """One .mrc a map, volumes.npz (index, z, volumes (n, D, D, D) z-y-x) and a ChimeraX script series.cxc.

    volumes: the maps at z; default: the model's own
    """
    apix = run.apix
    points: list[np.ndarray | None] = [None] if z is None else list(z)
    maps = torch.empty(len(points), *(run.model.box,) * 3)
    made = map(run.volume, points) if volumes is None else volumes
    for row, volume in progress(enumerate(made), len(points), out.name or "maps", unit="map"):
        maps[row] = finish(volume)
    out.mkdir(parents=True, exist_ok=True)
    paths = _names(out, len(maps))
    earlier = _earlier(out)
    foreign = [path for path in paths if path.exists() and path not in earlier]
    if foreign:
        raise ValueError(f"{foreign[0]} exists and is not of an earlier series here; give another -o")
    for path in earlier:  # a longer series, which this one replaces
        path.unlink(missing_ok=True)
    for path, volume in zip(paths, maps, strict=True):
        write_map(path, volume, apix)
    table = np.zeros((1, 0)) if z is None else z
    write_arrays(out / VOLUMES, index=index, z=table, volumes=maps.numpy())
    write_chimerax(out / "series.cxc", paths, contour_level(maps[:: -(-len(maps) // LEVEL_MAPS)]))
    return paths


def _names(out: Path, count: int) -> list[Path]:
    digits = max(3, len(str(count - 1)))
    return [out / f"vol_{i:0{digits}d}.mrc" for i in range(count)]


def _earlier(out: Path) -> list[Path]:
    """The maps of the series that volumes.npz says is in the folder."""
    if not (out / VOLUMES).exists():
        return []
    with np.load(out / VOLUMES) as file:
        return _names(out, len(file["index"]))
