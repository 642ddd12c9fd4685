"""What a table of particles says, whichever program wrote it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_cryo.data.batch import numbered
from pyro_cryo.physics.ctf import CTF
from pyro_cryo.physics.rotations import orthogonality_error


@dataclass(frozen=True)
class OpticsGroup:
    """Images of one pixel size and box, and with noise of their own.

    apix: angstrom a stored pixel, 0 where unknown; box: pixels of a stored image, 0 where unknown
    premultiplied: whether the images were multiplied by their CTF
    """

    name: str
    apix: float
    box: int
    premultiplied: bool = False

    @property
    def even_box(self) -> int:
        """The box that is used: an odd one loses its last row and column, which leaves the centre pixel in place."""
        return self.box - self.box % 2

    @property
    def field_angstrom(self) -> float:
        """Length of the even box."""
        return self.even_box * self.apix


@dataclass(frozen=True)
class Table:
    """N images. Poses and signs are those of DESIGN: everything that other programs define otherwise is converted.

    path:     the file that was opened
    files:    stacks as the table names them
    file:     (N,) row of `files`
    frame:    (N,) from 0
    groups:   optics groups
    group:    (N,) row of `groups`
    sign:     (N,) float32 that makes protein bright, where the table knows
    rotation: (N, 3, 3) float32, volume axes to view axes; None where the table has no poses
    shift_px: (N, 2) float32, displacement of the particle from the box centre, stored pixels, x-y
    ctf:      optics, or None where images have no CTF
    exposure: (N,) electrons an A^2 that the specimen had taken before, or None
    half_set: (N,) int8, 1 or 2, 0 where unknown
    particle: (N,) long, which particle the image shows; a tilt series has several images of one
    view:     (N, 3, 3) float32, how views of one particle lie to each other where no poses say so: R = view R_particle
    source:   the rows of the input, to be written out again: a DataFrame, a structured array or None
    optics:   the optics table of the input, or None
    """

    path: Path
    files: tuple[str, ...]
    file: np.ndarray
    frame: np.ndarray
    groups: tuple[OpticsGroup, ...]
    group: Tensor
    sign: Tensor
    rotation: Tensor | None
    shift_px: Tensor
    ctf: CTF | None
    exposure: Tensor | None
    half_set: Tensor
    particle: Tensor
    view: Tensor | None = None
    source: Any = None
    optics: Any = None

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, rows: Tensor) -> Table:
        """Rows (n,) long; files and groups keep their numbers, particles are counted anew, as they appear."""
        picked = rows.numpy()
        source = self.source
        if source is not None:
            source = source[picked] if isinstance(source, np.ndarray) else source.iloc[picked].reset_index(drop=True)
        return replace(
            self,
            file=self.file[picked],
            frame=self.frame[picked],
            group=self.group[rows],
            sign=self.sign[rows],
            rotation=None if self.rotation is None else self.rotation[rows],
            shift_px=self.shift_px[rows],
            ctf=None if self.ctf is None else self.ctf[rows],
            exposure=None if self.exposure is None else self.exposure[rows],
            half_set=self.half_set[rows],
            particle=numbered(self.particle[rows])[0],
            view=None if self.view is None else self.view[rows],
            source=source,
        )

    @staticmethod
    def bare(path: Path, files: tuple[str, ...], frames: list[int], group: OpticsGroup) -> Table:
        """All `frames` of `files` in order, with nothing known about them but one optics group."""
        count = sum(frames)
        return Table(
            path=path,
            files=files,
            file=np.repeat(np.arange(len(files)), frames),
            frame=np.concatenate([np.arange(n) for n in frames]),
            groups=(group,),
            group=torch.zeros(count, dtype=torch.long),
            sign=torch.ones(count),
            rotation=None,
            shift_px=torch.zeros(count, 2),
            ctf=None,
            exposure=None,
            half_set=torch.zeros(count, dtype=torch.int8),
            particle=torch.arange(count),
        )

    def used(self) -> Table:
        """Without the files and groups that no row names."""
        file_numbers, file = np.unique(self.file, return_inverse=True)
        group_numbers, group = torch.unique(self.group, return_inverse=True)
        return replace(
            self,
            files=tuple(self.files[i] for i in file_numbers),
            file=file,
            groups=tuple(self.groups[i] for i in group_numbers),
            group=group,
        )

    def per_group(self, values: list[float]) -> Tensor:
        """A number a group as a number an image: (N,) float32."""
        return torch.tensor(values, dtype=torch.float32)[self.group]

    def with_poses(self, rotation: Tensor, shift_px: Tensor) -> Table:
        """Other poses; the input's own pose columns are forgotten."""
        source = self.source
        if source is not None and not isinstance(source, np.ndarray):
            source = source.drop(columns=[name for name in POSE_COLUMNS if name in source])
        return replace(self, rotation=rotation.float(), shift_px=shift_px.float(), source=source)

    def with_ctf(self, ctf: CTF) -> Table:
        """Other defocus values; the input's own columns of them are forgotten."""
        source = self.source
        if source is not None and not isinstance(source, np.ndarray):
            source = source.drop(columns=[name for name in DEFOCUS_COLUMNS if name in source])
        return replace(self, ctf=ctf, source=source)


DEFOCUS_COLUMNS = ("rlnDefocusU", "rlnDefocusV")
POSE_COLUMNS = (
    "rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginX", "rlnOriginY", "rlnOriginXAngst", "rlnOriginYAngst",
)  # fmt: skip


def check_rotations(rotation: Tensor, where: str) -> None:
    """Raise ValueError unless every (N, 3, 3) is a rotation."""
    if len(rotation) and not orthogonality_error(rotation.double()) < 1e-3:
        gram = (rotation.double() @ rotation.double().mT - torch.eye(3)).abs().amax((1, 2))
        bad = ~(gram < 1e-3) | ~(torch.linalg.det(rotation.double()) > 0)
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{where}: matrix {row} is not a rotation (R R^T = 1 and det R = 1 fail for {int(bad.sum())} of "
            f"{len(rotation)}); give rotation matrices"
        )


def check_optics(ctf: CTF, where: str) -> None:
    """Raise ValueError where the optics cannot be those of a microscope."""
    kilovolts = float(ctf.voltage_kv.min())
    if not kilovolts > 0:
        raise ValueError(f"{where}: a voltage of {kilovolts:g} kV; expected 100 to 300, mend the table or give ctf=")
    defocus = float(torch.maximum(ctf.defocus_u_angstrom, ctf.defocus_v_angstrom).max())
    if defocus < 100 and not bool(ctf.phase_shift_deg.any()):
        raise ValueError(
            f"{where}: the largest defocus is {defocus:g}; expected angstrom of underfocus, some 5000 to "
            "50000: mend the table or give ctf="
        )
    contrast = ctf.amplitude_contrast
    if not bool(((contrast >= 0) & (contrast <= 1)).all()):
        raise ValueError(
            f"{where}: an amplitude contrast of {float(contrast.max()):g}; expected a fraction, usually 0.1"
        )
