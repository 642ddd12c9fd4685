"""pyro-cryo simulate"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pyro_cryo.cli.options import add_quiet, progress_of
from pyro_cryo.cli.parser import add_command


def add_to(commands: Any) -> None:
    """The command and its arguments."""
    parser = add_command(commands, "simulate", "particles with known truth", run)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--toy",
        metavar="NAME",
        help="a built-in complex: hinge (an arm swings), rotor (it turns), two_arms, classes (of four) or ten_classes",
    )
    what.add_argument("--pdb", type=Path, help="an atomic model; several MODELs are several states")
    what.add_argument("--map", type=Path, nargs="+", help="one or several maps (.mrc), each a state")
    add = parser.add_argument
    add("-o", "--out", type=Path, required=True, help="folder for particles.mrcs, particles.star and truth.npz")
    add("--images", type=int, default=5000, help="how many")
    add("--box", type=int, default=64, help="pixels, even")
    add("--apix", type=float, default=None, help="angstrom a pixel (default: the molecule fills 70%% of the box)")
    add("--snr", type=float, default=0.1, help="variance of the clean images over that of the noise")
    add("--shift-px", type=float, default=None, help="sd of displacements in x and y, pixels (default: 3%% of the box)")
    add("--defocus", type=float, nargs=2, default=(10_000.0, 25_000.0), metavar="A", help="range, angstrom")
    add("--voltage", type=float, default=300.0, help="kV")
    add("--cs", type=float, default=2.7, help="spherical aberration, mm")
    add("--amplitude-contrast", type=float, default=0.1, help="fraction")
    add(
        "--tilt-deg",
        type=float,
        default=None,
        help="tilt pairs: each particle twice, the second turned so many degrees",
    )
    add("--seed", type=int, default=0, help="the same seed gives the same files")
    add("--overwrite", action="store_true", help="replace a case that is there")
    add_quiet(parser)


def run(asked: argparse.Namespace) -> None:
    """Write a case."""
    from pyro_cryo.data import simulate as simulation

    if asked.toy is not None:
        if asked.toy not in simulation.TOYS:
            raise ValueError(f"toy {asked.toy!r} is not known; expected {', '.join(simulation.TOYS)}")
        source: simulation.Source = simulation.TOYS[asked.toy]()
    else:
        source = simulation.from_pdb(asked.pdb) if asked.pdb is not None else simulation.from_maps(asked.map)
    star = simulation.simulate(
        source,
        asked.out,
        n_images=asked.images,
        box=asked.box,
        apix=asked.apix,
        snr=asked.snr,
        shift_sd_px=asked.shift_px,
        defocus_angstrom=tuple(asked.defocus),
        voltage_kv=asked.voltage,
        cs_mm=asked.cs,
        amplitude_contrast=asked.amplitude_contrast,
        tilt_deg=asked.tilt_deg,
        seed=asked.seed,
        overwrite=asked.overwrite,
        progress=progress_of(asked),
    )
    print(f"{asked.images} images of {asked.box} px, {len(source)} states: {star}")
