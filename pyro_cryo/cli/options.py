"""Options that several commands have, and what comes of them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_cryo.progress import Bar, Progress, quiet

if TYPE_CHECKING:
    from pyro_cryo.data.particles import Particles

AS_STORED: Mapping[str, str] = {"box": "as stored", "invert": "no", "normalize": "no", "window": "no window"}
AS_THE_RUN: Mapping[str, str] = dict.fromkeys(AS_STORED, "as the run")


def add_particles(parser: argparse.ArgumentParser, defaults: Mapping[str, str]) -> None:
    """Where particles are and how their images are treated; help calls what is done unasked by `defaults`.

    An option that was not given is not in the namespace, so that each command has its own defaults.
    """
    parser.add_argument(
        "particles", type=Path, help=".star, .cs, .mrcs with --poses-pkl and --ctf-pkl, or .txt, a list of stacks"
    )
    none, flag = argparse.SUPPRESS, argparse.BooleanOptionalAction
    told = {name: f"(default: {default})" for name, default in defaults.items()}
    add = parser.add_argument_group("images").add_argument
    add("--box", type=int, default=none, help=f"Fourier-crop to this even box, pixels {told['box']}")
    add("--apix", type=float, default=none, help="angstrom a stored pixel (default: as the files say)")
    add("--datadir", type=Path, default=none, help="folder for stacks that are not where the table says")
    add("--poses-pkl", dest="poses", type=Path, default=none, help="poses from a cryoDRGN .pkl")
    add("--ctf-pkl", dest="ctf", type=Path, default=none, help="CTF from a cryoDRGN .pkl")
    add("--tilt", type=Path, default=none, help="stack of the same particles, tilted: pairs (with --tilt-deg)")
    add("--tilt-deg", type=float, default=none, help="degrees between the views of a pair, about the images' x axis")
    add("--invert", action=flag, default=none, help=f"toggle contrast, for images with dark protein {told['invert']}")
    add(
        "--normalize",
        action=flag,
        default=none,
        help=f"each image to mean 0, sd 1 outside a circle 0.9 boxes across {told['normalize']}",
    )
    add("--window", type=float, default=none, help=f"soft disc, a fraction of half the box {told['window']}")
    add("--first", type=int, default=none, help="only so many particles, from the first (default: all)")
    add(
        "--subset",
        type=Path,
        default=none,
        help="only those of a .txt or .npy of rows from 0, or of a .star (default: all)",
    )


def open_particles(asked: argparse.Namespace, **defaults: Any) -> Particles:
    """The particles that `add_particles` asks for; `defaults` are those of `Particles.open`."""
    from pyro_cryo.data.particles import Particles

    names = ("box", "apix", "datadir", "poses", "ctf", "invert", "normalize", "window", "first", "subset", "tilt")
    given = {name: getattr(asked, name) for name in (*names, "tilt_deg") if name in asked}
    return Particles.open(asked.particles, **{**defaults, **given})


def add_device(options: argparse._ActionsContainer) -> None:
    """Where to compute."""
    options.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto takes a GPU where there is one")


def device_of(asked: argparse.Namespace) -> str:
    """The device that was asked for; of "auto", a GPU where there is one."""
    import torch

    from pyro_cryo.inference.fit import check_device

    if asked.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(asked.device)
    return asked.device


def add_quiet(options: argparse._ActionsContainer) -> None:
    """Whether to show progress."""
    options.add_argument("--quiet", action="store_true", help="no progress bar")


def progress_of(asked: argparse.Namespace) -> Progress:
    """A bar, unless quiet was asked for."""
    return quiet if asked.quiet else Bar()


def check_file(path: Path, overwrite: bool) -> None:
    """Raise before the work unless a file can be written there."""
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"folder {path.parent} of {path} does not exist; make it first")
    refuse_to_overwrite(path, overwrite)


def refuse_to_overwrite(path: Path, overwrite: bool) -> None:
    """Raise where a file is that nobody said to replace, or where its folder would have to be."""
    check_folder(path.parent)
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; give another -o, or --overwrite to replace it")


def check_folder(path: Path) -> None:
    """Raise before the work where a file is in a folder's place."""
    if path.is_file():
        raise NotADirectoryError(f"{path} is a file; give a folder with -o")
