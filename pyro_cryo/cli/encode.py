"""pyro-cryo encode"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pyro_cryo.cli.options import (
    AS_THE_RUN,
    add_device,
    add_particles,
    add_quiet,
    check_file,
    device_of,
    open_particles,
    progress_of,
)
from pyro_cryo.cli.parser import add_command


def add_to(commands: Any) -> None:
    """The command and its arguments."""
    parser = add_command(commands, "encode", "posterior of z for particles that the fit of a run has not seen", run)
    parser.add_argument("run", type=Path, help="folder of a run with z")
    add_particles(parser, AS_THE_RUN)
    add = parser.add_argument
    add("-o", "--out", type=Path, required=True, help=".npz to write: index, z and z_cov, as in a run's latent.npz")
    add("--overwrite", action="store_true", help="replace the file if it is there")
    add_device(parser)
    add_quiet(parser)


def run(asked: argparse.Namespace) -> None:
    """Write the latents of other particles."""
    from pyro_cryo.inference.run import Run
    from pyro_cryo.inference.state import read_record

    if asked.out.suffix != ".npz":
        raise ValueError(f"{asked.out} is not .npz; name the file by its format")
    check_file(asked.out, asked.overwrite)
    fitted = Run.load(asked.run, device=device_of(asked))
    record = read_record(asked.run)["particles"]
    treated = {name: record[name] for name in ("invert", "normalize", "window") if name in record}
    particles = open_particles(asked, box=fitted.model.box, **treated)
    fitted.encode(particles, progress=progress_of(asked)).write(asked.out)
    print(f"z of {particles.n_particles} particles is in {asked.out}")
