"""Where a particle lies, as a prior: known, about a consensus, or anywhere.

    KnownPose   R_i, t_i as the table says; nothing is sampled
    PoseAbout   R_i = exp([v]x) R0_i,  v ~ Normal(0, turn_sd^2),  t_i ~ Normal(t0_i, shift_sd^2)
    AnyPose     R_i ~ Haar measure of SO(3),                      t_i ~ Normal(0, shift_sd^2)

R0_i and t0_i are the table's consensus. A particle that is seen in several images, a tilt pair or a series, has one
rotation, that of its first view; the others are turned from it as the table says, R_iv = T_iv R_i, and each image has a
shift of its own. A spread of shifts is in pixels of the model's box; the site `translation`, as
a batch's translations, is in pixels of the image's own field of view: freq_scale times as many.

How high a particle lies along the beam shows as defocus. Where PoseAbout has a spread of it, that of image i is

    d_i ~ Normal(0, defocus_sd^2)

more than the table's, refined beside the poses (`guides.defocus`). It is no site: a model takes its mean as known.

    model = CryoDRGN(particles.box, zdim=4)
    model.poses = PoseAbout(turn_sd_deg=3.0, shift_sd_px=1.0)
    run = fit(model, particles)  # finds the poses' posteriors first
"""

from __future__ import annotations

import math
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_cryo.data.batch import Batch
from pyro_cryo.distributions.so3 import TangentNormal, UniformRotation
from pyro_cryo.distributions.views import counted


class KnownPose(nn.Module):
    """The batch's own poses."""

    arguments: ClassVar[dict[str, float]] = {}

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rotations (B, 3, 3) and translations (B, 2) in pixels."""
        return batch.rotation, batch.translation


class PoseAbout(nn.Module):
    """A Gaussian of turns and shifts about the batch's own poses; a solver may set its spreads.

    turn_sd_deg: standard deviation of a turn about each axis; the buffer turn_sd () is in radians
    shift_sd_px: standard deviation of a shift along each axis, pixels of the model's box; the buffer shift_sd ()
    defocus_sd_angstrom: standard deviation of an image's defocus about the table's, 0 where that is known; the buffer
                 defocus_sd ()
    """

    turn_sd: Tensor
    shift_sd: Tensor
    defocus_sd: Tensor

    def __init__(self, turn_sd_deg: float = 5.0, shift_sd_px: float = 2.0, defocus_sd_angstrom: float = 0.0) -> None:
        super().__init__()
        if not 0 < turn_sd_deg < math.inf:
            raise ValueError(f"turn_sd_deg is {turn_sd_deg}; expected a positive number of degrees, or use AnyPose")
        _check_shift(shift_sd_px)
        if not 0 <= defocus_sd_angstrom < math.inf:
            raise ValueError(f"defocus_sd_angstrom is {defocus_sd_angstrom}; expected angstrom, or 0 where it is known")
        self.arguments = {"turn_sd_deg": turn_sd_deg, "shift_sd_px": shift_sd_px}
        self.arguments["defocus_sd_angstrom"] = defocus_sd_angstrom
        self.register_buffer("turn_sd", torch.tensor(math.radians(turn_sd_deg)))
        self.register_buffer("shift_sd", torch.tensor(float(shift_sd_px)))
        self.register_buffer("defocus_sd", torch.tensor(float(defocus_sd_angstrom)))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sample `rotation` (n, 3, 3), of the particles, and `translation` (B, 2); give those of the images."""
        spread = self.turn_sd * torch.eye(3, device=batch.rotation.device)
        rotation = pyro.sample("rotation", TangentNormal(batch.rotation[batch.first], spread))
        return seen_from(rotation, batch), _shift_about(batch.translation, self.shift_sd, batch)


class AnyPose(nn.Module):
    """Every orientation alike, the particle near the box centre.

    shift_sd_px: standard deviation of a shift along each axis, pixels of the model's box; the buffer shift_sd ()
    maps:        that poses are searched in at once, of a model with z (of classes as many as it has)
    """

    shift_sd: Tensor

    def __init__(self, shift_sd_px: float = 2.0, maps: int = 1) -> None:
        super().__init__()
        _check_shift(shift_sd_px)
        if maps < 1:
            raise ValueError(f"maps is {maps}; expected 1 or more to search poses in")
        self.maps = maps
        self.arguments = {"shift_sd_px": shift_sd_px, "maps": maps}
        self.register_buffer("shift_sd", torch.tensor(float(shift_sd_px)))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sample `rotation` (n, 3, 3), of the particles, and `translation` (B, 2); give those of the images."""
        uniform = UniformRotation((batch.particles,), dtype=batch.image.dtype, device=batch.image.device)
        rotation = pyro.sample("rotation", uniform)
        return seen_from(rotation, batch), _shift_about(torch.zeros_like(batch.translation), self.shift_sd, batch)


def seen_from(rotation: Tensor, batch: Batch) -> Tensor:
    """Rotations of particles' first views (*batch, n, 3, 3) as those of their images: (*batch, B, 3, 3)."""
    return batch.relative @ batch.of_images(rotation, -3) if batch.several else rotation


def _check_shift(shift_sd_px: float) -> None:
    """Raise ValueError unless it is the spread of a shift."""
    if not 0 < shift_sd_px < math.inf:
        raise ValueError(f"shift_sd_px is {shift_sd_px}; expected a positive number of pixels")


def _shift_about(centre: Tensor, shift_sd: Tensor, batch: Batch) -> Tensor:
    own = (shift_sd * batch.freq_scale)[:, None]
    return pyro.sample("translation", counted(dist.Normal(centre, own).to_event(1), batch))
