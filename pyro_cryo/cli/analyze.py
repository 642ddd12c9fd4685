"""pyro-cryo analyze"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pyro_cryo.cli.options import add_device, add_quiet, check_folder, device_of, progress_of
from pyro_cryo.cli.parser import add_command


def add_to(commands: Any) -> None:
    """The command and its arguments."""
    parser = add_command(commands, "analyze", "latent plots, clusters, motions and learning curve of a run", run)
    add = parser.add_argument
    add("run", type=Path, help="folder of a run")
    add("-o", "--out", type=Path, help="folder for plots and maps (default: RUN/analysis)")
    add("--kmeans", type=int, default=10, help="clusters of z")
    add("--steps", type=int, default=10, help="maps along each principal component")
    add("--components", type=int, default=2, help="principal components to follow")
    add("--free-energy", action="store_true", help="-log of the density of shapes, with a 90%% band; reads the images")
    add_device(parser)
    add_quiet(parser)


def run(asked: argparse.Namespace) -> None:
    """Draw what a run shows of itself."""
    from pyro_cryo.analysis import report
    from pyro_cryo.inference.run import Run

    out = asked.out or asked.run / "analysis"
    check_folder(out)
    found = Run.load(asked.run, device=device_of(asked))
    pictures = report.analyze(
        found, out, asked.kmeans, asked.steps, asked.components, asked.free_energy, progress_of(asked)
    )
    maps = " and maps" if found.model.zdim else ""
    print(f"{', '.join(path.name for path in pictures)}{maps} are in {out}")
