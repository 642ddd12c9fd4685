"""Tilt pairs as two stacks: the particles, and the same ones in the same order with the specimen tilted.

The view of the second image of a particle is that of its first turned by the tilt angle about the x axis of the images,
`physics.rotations.tilt`, as cryoDRGN has it. Poses and CTF that are given for the first stack alone hold for both: the
second image's pose is that of the first, tilted, with the same shift.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pyro_cryo.data.table import Table
from pyro_cryo.physics.rotations import tilt


def paired(first: Table, second: Table, tilt_deg: float) -> Table:
    """The images of two tables, all the first ones before all the second ones, as pairs.

    Raises ValueError where they are no pairs, or are more than stacks.
    """
    count = len(first)
    if not np.isfinite(tilt_deg):
        raise ValueError(f"tilt_deg is {tilt_deg}; expected degrees, for example 45")
    for table in (first, second):
        if table.source is not None:
            raise ValueError(
                f"{table.path} is a table; tilt pairs are two stacks (.mrcs, .mrc or .txt): in a table "
                "rlnTomoParticleName says which images show one particle"
            )
    if len(second) != count:
        raise ValueError(
            f"{second.path} has {len(second)} images and {first.path} {count}; expected the same particles in both"
        )
    if first.groups[0].apix != second.groups[0].apix:
        pixels = " and ".join(f"{table.groups[0].apix:g}" for table in (first, second))
        raise ValueError(f"{first.path} and {second.path} have pixels of {pixels} A; give stacks of one pixel size")
    files = (*first.files, *second.files)
    pair = Table.bare(first.path, files, [0] * len(files), first.groups[0])
    return replace(
        pair,
        file=np.concatenate([first.file, second.file + len(first.files)]),
        frame=np.concatenate([first.frame, second.frame]),
        group=torch.cat([first.group, second.group]),
        sign=torch.cat([first.sign, second.sign]),
        shift_px=torch.zeros(2 * count, 2),
        half_set=torch.cat([first.half_set, second.half_set]),
        particle=torch.arange(count).repeat(2),
        view=torch.stack([torch.eye(3), tilt(tilt_deg)]).repeat_interleave(count, 0),
    )


def of_both(rotation: Tensor, shift: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
    """Poses (n, 3, 3), (n, 2) of the first images as those of both, of `view` (2n, 3, 3)."""
    return view @ rotation.repeat(2, 1, 1), shift.repeat(2, 1)
