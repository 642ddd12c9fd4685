"""Tilt pairs and series whose poses are not known: particles seen from several sides, one z and one rotation each."""

from __future__ import annotations

from typing import Any

from pyro_cryo.models.ab_initio import SHIFT_SD
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.pose import AnyPose


class TiltPair(CryoDRGN):
    """image_iv ~ Normal(ctf_iv . shift(t_iv) . slice(V(z_i), T_iv R_i), sigma), one z_i and R_i for all images v.

    z_i ~ Normal(0, I); R_i uniform over SO(3); t_iv ~ Normal(0, shift_sd). T_iv turns the view of particle i's first
    image into that of image v; it is known, and comes with the particles: where these have several images, any model
    tells this story. Two views of a particle also tell the hand of the map.

    shift_sd_px: pixels of the model's box (default: 4% of it); other arguments as in CryoDRGN

    Source: Zhong, Bepler, Davis and Berger, ICLR 2020, section 4.2.
    """

    poses: AnyPose

    def __init__(self, box: int, zdim: int = 8, shift_sd_px: float | None = None, **arguments: Any) -> None:
        super().__init__(box, zdim, **arguments)
        self.poses = AnyPose(SHIFT_SD * box if shift_sd_px is None else shift_sd_px)
