"""pyro-cryo volumes"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pyro_cryo.cli.options import add_device, add_quiet, device_of, progress_of, refuse_to_overwrite
from pyro_cryo.cli.parser import add_command

CHOICES = ("index", "kmeans", "peaks", "z_values", "path_along")


def add_to(commands: Any) -> None:
    """The command and its arguments."""
    parser = add_command(commands, "volumes", "write maps of a run, at chosen latent coordinates", run)
    add = parser.add_argument
    add("run", type=Path, help="folder of a run")
    add("-o", "--out", type=Path, required=True, help="folder for the maps")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--index", type=int, nargs="+", metavar="I", help="at the posterior means of z of these particles"
    )
    where.add_argument("--kmeans", type=int, metavar="K", help="at the particles nearest to K cluster centres")
    where.add_argument("--peaks", type=int, metavar="N", help="at the particles nearest to the N highest peaks of z")
    where.add_argument("--z-values", type=Path, metavar="FILE", help="at the rows of a text file or .npy")
    where.add_argument("--path-along", type=int, metavar="PC", help="along a principal component of z, from 1")
    add("--steps", type=int, default=10, help="maps along --path-along")
    add(
        "--local",
        action="store_true",
        help="let the images near each z correct its map, in every shell where other images confirm it; reads them all",
    )
    add("--low-pass", type=float, metavar="A", help="low-pass at so many angstrom")
    add(
        "--bfactor",
        type=_bfactor,
        metavar="A2",
        help="multiply by exp(-B s^2 / 4); a negative B sharpens, auto undoes the decay of the run's own map",
    )
    add("--flip", action="store_true", help="write mirror images, the other hand")
    add("--overwrite", action="store_true", help="replace an earlier series")
    add_device(parser)
    add_quiet(parser)


def run(asked: argparse.Namespace) -> None:
    """Write a series of maps."""
    import numpy as np

    from pyro_cryo.analysis import series
    from pyro_cryo.analysis.local import local_maps
    from pyro_cryo.inference.run import Run

    refuse_to_overwrite(asked.out / series.VOLUMES, asked.overwrite)
    found = Run.load(asked.run, device=device_of(asked))
    index: Any = np.array([-1])
    z: Any = None
    if found.model.zdim:
        index, z = _points(asked, found)
    elif asked.local or any(getattr(asked, choice) is not None for choice in CHOICES):
        raise ValueError(f"{asked.run} is a fit of one map, without z; leave --local and the choice of z out")
    bfactor = asked.bfactor
    if bfactor == "auto":
        bfactor = series.own_bfactor(found)
        print(f"B factor: {bfactor:.0f} A^2")
    finish = series.finishing(found.apix, asked.low_pass, bfactor, asked.flip)
    progress = progress_of(asked)
    volumes = local_maps(found, z, progress=progress) if asked.local else None
    paths = series.write_series(found, asked.out, index, z, finish, progress, volumes)
    print(f"{len(paths)} maps, {series.VOLUMES} and series.cxc are in {asked.out}")


def _points(asked: argparse.Namespace, found: Any) -> tuple[Any, Any]:
    from pyro_cryo.analysis import series

    if asked.index is not None:
        return series.at_particles(found, asked.index)
    if asked.kmeans is not None:
        return series.at_clusters(found, asked.kmeans)
    if asked.peaks is not None:
        return series.at_peaks(found, asked.peaks)
    if asked.z_values is not None:
        return series.from_file(asked.z_values, found.model.zdim)
    if asked.path_along is not None:
        return series.along_component(found, asked.path_along, asked.steps)
    raise ValueError("which maps? give --index, --kmeans, --peaks, --z-values or --path-along")


def _bfactor(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number of angstrom^2") from None
