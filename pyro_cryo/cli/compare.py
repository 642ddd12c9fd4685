"""pyro-cryo compare"""

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

OF_THE_FIT = ("first", "subset", "box", "count", "fingerprint")  # what a record says of particles beside their file


def add_to(commands: Any) -> None:
    """The command and its arguments."""
    parser = add_command(commands, "compare", "which of several runs explains particles best that none has seen", run)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="run",
        help="folders of two or more runs; with commas between, fits of one model from other seeds: the best counts. "
        "Where no particles follow they are those of the first run's file that no run has seen",
    )
    add_particles(parser, AS_THE_RUN)
    add = parser.add_argument
    add("--unseen", action="store_true", help="only those of the particles that no run was fitted to")
    add("--draws", type=int, default=100, help="of z and the like for each particle, where a model is not solved for")
    add("-o", "--out", type=Path, help=".tsv to write the table to as well")
    add("--overwrite", action="store_true", help="replace the file if it is there")
    add_device(parser)
    add_quiet(parser)


def run(asked: argparse.Namespace) -> None:
    """Print a table of runs, the best first, and what it says."""
    from pyro_cryo.analysis.compare import compare, unseen
    from pyro_cryo.inference.run import Run
    from pyro_cryo.inference.state import read_record

    if asked.draws < 1:
        raise ValueError(f"{asked.draws} draws; give 1 or more, 25 or more for k")
    if asked.out is not None:
        if asked.out.suffix != ".tsv":
            raise ValueError(f"{asked.out} is not .tsv; name the file by its format")
        check_file(asked.out, asked.overwrite)
    own = all((Path(one) / "run.json").exists() for one in str(asked.particles).split(","))  # no particles follow
    if own:
        asked.runs.append(str(asked.particles))
        asked.unseen = True
    folders, device = named(asked.runs), device_of(asked)
    runs = {name: [Run.load(folder, device=device) for folder in fits] for name, fits in folders.items()}
    first = next(iter(folders.values()))[0]
    record, box = read_record(first)["particles"], next(iter(runs.values()))[0].model.box
    treated = {name: record[name] for name in ("invert", "normalize", "window") if name in record}
    if own:
        if "path" not in record:
            raise ValueError(f"{first}/run.json does not say where its particles are; give particles after the runs")
        treated = {name: value for name, value in record.items() if name not in OF_THE_FIT}
        asked.particles = treated.pop("path")
    particles = open_particles(asked, box=box, **treated)
    if asked.unseen:
        left = unseen(runs, particles)
        if not bool(left.any()):
            raise ValueError(f"all {len(particles)} images were fitted; fit to a part of them (--first, --subset)")
        particles = particles[left]
    found = compare(runs, particles, asked.draws, progress=progress_of(asked))
    table = found.summary.rename_axis("run").reset_index()
    print(
        f"log p of {particles.n_particles} particles and how far it is below the best, nats a particle; k_bad is the "
        "share of them whose log p is uncertain"
    )
    print("\n".join([table.to_string(index=False, float_format="{:.4g}".format), found.sentence]))
    if asked.out is not None:
        table.to_csv(asked.out, sep="\t", index=False)


def named(runs: list[str]) -> dict[str, list[Path]]:
    """Folders of the fits of each model by the name of the first, or by its path where names are alike."""
    given = [[Path(folder) for folder in fits.split(",")] for fits in runs]
    each = [folder.resolve() for fits in given for folder in fits]
    if len(set(each)) < len(each):
        raise ValueError(f"{len(each)} runs and some of them the same; give each run once")
    alike = len({fits[0].resolve().name for fits in given}) < len(given)
    return {str(fits[0]) if alike else fits[0].resolve().name: fits for fits in given}
