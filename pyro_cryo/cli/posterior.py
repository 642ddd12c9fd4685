"""pyro-cryo posterior"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pyro_cryo.cli.options import add_device, add_quiet, check_file, device_of, progress_of
from pyro_cryo.cli.parser import add_command


def add_to(commands: Any) -> None:
    """The command and its arguments."""
    parser = add_command(commands, "posterior", "draws of z, pose, contrast and noise, for ArviZ", run)
    add = parser.add_argument
    add("run", type=Path, help="folder of a run")
    add("-o", "--out", type=Path, required=True, help=".nc to write: netCDF, which arviz.from_netcdf reads")
    add("--index", type=int, nargs="+", metavar="I", help="of these particles (default: all)")
    add("--draws", type=int, default=500, help="of each particle")
    add("--weighed", type=int, default=50, help="of the draws are weighed beside the model, for k and log p(images)")
    add("--corrected", action="store_true", help="weigh all, and pick draws by weight where that can be trusted")
    add("--semi-amortised", action="store_true", help="a Gaussian of each particle's own, begun at the encoder's")
    add(
        "--predictive",
        type=int,
        default=0,
        help="of the draws get images that the model makes of them, which are large",
    )
    add("--batch-size", type=int, help="images looked at together, which bounds the memory (default: by their size)")
    add("--seed", type=int, default=0, help="of the draws")
    add("--overwrite", action="store_true", help="replace the file if it is there")
    add_device(parser)
    add_quiet(parser)


def run(asked: argparse.Namespace) -> None:
    """Write the draws."""
    from pyro_cryo.inference.run import Run
    from pyro_cryo.inference.state import write_atomically

    if asked.out.suffix != ".nc":
        raise ValueError(f"{asked.out} is not .nc; name the file by its format")
    check_file(asked.out, asked.overwrite)
    found = Run.load(asked.run, device=device_of(asked))
    if asked.semi_amortised:
        found = found.semi_amortised()
    index = asked.index or range(found.particles.n_particles)
    drawn = found.posterior(
        None,
        asked.draws,
        index=index,
        weighed=asked.weighed,
        corrected=asked.corrected,
        predictive=asked.predictive,
        batch_size=asked.batch_size,
        seed=asked.seed,
        progress=progress_of(asked),
    )
    write_atomically(asked.out, drawn.to_netcdf)
    print(f"{asked.draws} draws of {len(index)} particles are in {asked.out}")
