"""pyro-cryo select"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pyro_cryo.cli.options import check_file
from pyro_cryo.cli.parser import add_command


def add_to(commands: Any) -> None:
    """The command and its arguments."""
    parser = add_command(commands, "select", "write the particles of a cluster or a list as STAR or .cs", run)
    add = parser.add_argument
    add("run", type=Path, help="folder of a run")
    add("-o", "--out", type=Path, required=True, help="file to write: .star, or .cs where the input was one")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--cluster", type=int, nargs="+", metavar="C", help="of these k-means clusters, from 0")
    which.add_argument(
        "--index", type=Path, metavar="FILE", help="particles in a .txt or .npy file, from 0, or a .star"
    )
    add("--kmeans", type=int, help="count this many clusters anew (default: those of the last `analyze`, else 10)")
    add("--overwrite", action="store_true", help="replace the file if it is there")


def run(asked: argparse.Namespace) -> None:
    """Write some of a run's particles."""
    import numpy as np
    import torch

    from pyro_cryo.analysis.latent import kmeans
    from pyro_cryo.analysis.report import CLUSTERS
    from pyro_cryo.inference.run import Run

    if asked.out.suffix not in (".star", ".cs"):
        raise ValueError(f"{asked.out} is neither .star nor .cs; name the file by its format")
    check_file(asked.out, asked.overwrite)
    found = Run.load(asked.run)
    if asked.cluster is not None:
        analysed = asked.run / "analysis" / CLUSTERS
        if asked.kmeans is None and analysed.exists():
            label = np.loadtxt(analysed, dtype=int, ndmin=2)[:, 1]
        else:
            label = kmeans(found.latent.z, asked.kmeans or 10).label
        beyond = [c for c in asked.cluster if not 0 <= c <= label.max()]
        if beyond:
            raise ValueError(f"cluster {beyond[0]} is not there; clusters are 0 to {label.max()}")
        rows = found.particles.images_of(torch.from_numpy(np.flatnonzero(np.isin(label, asked.cluster))))
        print(f"of {label.max() + 1} clusters: {' '.join(str(c) for c in asked.cluster)}")
    else:
        from pyro_cryo.data.selection import selected

        rows = selected(found.particles.table, asked.index, None)
    kept = found.particles[rows]
    kept.write_star(asked.out) if asked.out.suffix == ".star" else kept.write_cs(asked.out)
    print(f"{kept.n_particles} of {found.particles.n_particles} particles are in {asked.out}")
