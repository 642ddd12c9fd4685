"""One map, and poses of which nothing is known: both from nothing but the images."""

from __future__ import annotations

from pyro_cryo.models.homogeneous import Homogeneous
from pyro_cryo.pose import AnyPose

SHIFT_SD = 0.04  # of the box, where nobody says


class AbInitio(Homogeneous):
    """V ~ shells; R_i uniform over SO(3); t_i ~ Normal(0, shift_sd).

    shift_sd_px: pixels of the model's box (default: 4% of it)

    The images determine the map up to its hand and a rotation. Any other model takes these poses by
    `model.poses = AnyPose(...)`, or by `--poses search`.
    """

    poses: AnyPose

    def __init__(
        self,
        box: int,
        shift_sd_px: float | None = None,
        symmetry: str = "C1",
        mask: str = "auto",
        noise_groups: int = 1,
    ) -> None:
        super().__init__(box, symmetry, mask, noise_groups)
        self.poses = AnyPose(SHIFT_SD * box if shift_sd_px is None else shift_sd_px)
