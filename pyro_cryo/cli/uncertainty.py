"""pyro-cryo uncertainty"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pyro_cryo.cli.options import add_device, add_quiet, device_of, progress_of, refuse_to_overwrite
from pyro_cryo.cli.parser import add_command


def add_to(commands: Any) -> None:
    """The command and its arguments."""
    parser = add_command(commands, "uncertainty", "how sure each voxel of a map is: draws from its posterior", run)
    add = parser.add_argument
    add("run", type=Path, help="folder of a run")
    add("-o", "--out", type=Path, required=True, help="folder for the maps")
    add(
        "--index",
        type=int,
        metavar="I",
        help="of the map of this particle, z as unsure as its images leave it; and its pose",
    )
    add("--against", type=int, metavar="J", help="and the probability, voxel by voxel, that it exceeds this particle's")
    add(
        "--draws",
        type=int,
        default=40,
        help="maps drawn; of a family, or where poses were found, each takes a pass over the images",
    )
    add("--keep", type=int, default=5, help="of these, how many are written")
    add("--seed", type=int, default=0, help="of the draws")
    add("--overwrite", action="store_true", help="replace earlier maps")
    add_device(parser)
    add_quiet(parser)


def run(asked: argparse.Namespace) -> None:
    """Write mean, sd and draws; of one map the spread of its FSC too, of a particle whose pose was found that."""
    from pyro_cryo.analysis.pose_posterior import write_pose
    from pyro_cryo.analysis.voxels import resolution_range, write_fsc_spread, write_uncertainty
    from pyro_cryo.inference.run import Run
    from pyro_cryo.inference.volume_draws import maps_have_posterior

    if asked.against is not None and asked.index is None:
        raise ValueError(f"--against {asked.against} has nothing to be held against; give --index too")
    if asked.against is not None and asked.against == asked.index:
        raise ValueError(f"--against {asked.against} is the particle of --index; give another")
    if (asked.out / "run.json").exists():
        raise ValueError(f"{asked.out} is a run, whose maps would be replaced; give another folder")
    refuse_to_overwrite(asked.out / "mean.mrc", asked.overwrite)
    found = Run.load(asked.run, device=device_of(asked))
    if found.model.zdim and asked.index is None:
        raise ValueError(f"{type(found.model).__name__} has a map for every particle; give --index")
    progress, index = progress_of(asked), asked.index
    posed = index is not None and found.poses is not None
    if posed:
        found.some([index])  # or nothing is drawn
        if found.model.zdim == 0 and asked.against is None:
            index = None  # the map is that of all; its pose is its own
    paths = write_uncertainty(found, asked.out, index, asked.against, asked.draws, asked.keep, asked.seed, progress)
    if posed:
        pose = write_pose(found, asked.out, asked.index, asked.seed)
        print(f"where particle {asked.index} may lie is in {pose.name}")
    if not maps_have_posterior(found):
        print(f"{type(found.model).__name__} maps have no posterior of their own: this spread is of z alone")
    if found.model.zdim == 0:
        spread = write_fsc_spread(found, asked.out, asked.draws, asked.seed, progress)
        fine, coarse = resolution_range(spread, found.apix)
        where = "" if found.poses is None else ", all at the best poses"
        print(f"half-maps of other noise would agree to {fine:.3g} to {coarse:.3g} A (90%{where}): fsc.tsv, fsc.png")
        if getattr(found.model, "mask", None) == "none":
            print("with mask none the prior is the same everywhere: the sd is nearly flat")
    print(f"{len(paths) - 1} maps and {paths[-1].name} are in {asked.out}")
