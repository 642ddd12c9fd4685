"""One map, and poses that are only about where a table says: a posterior of each, the spread of the table learned."""

from __future__ import annotations

from pyro_cryo.models.homogeneous import Homogeneous
from pyro_cryo.pose import PoseAbout


class UncertainPose(Homogeneous):
    """V ~ shells; R_i = exp(v_i) R0_i, v_i ~ Normal(0, turn_sd); t_i ~ Normal(t0_i, shift_sd); R0_i, t0_i of the table.

    turn_sd_deg, shift_sd_px: the spreads to begin with, then learned; pixels of the model's box
    defocus_sd_angstrom: above 0, that of each image's defocus about the table's, which is then refined too

    Any other model takes these poses by `model.poses = PoseAbout(...)`, or by `--poses refine`.
    """

    poses: PoseAbout

    def __init__(
        self,
        box: int,
        turn_sd_deg: float = 5.0,
        shift_sd_px: float = 2.0,
        defocus_sd_angstrom: float = 0.0,
        symmetry: str = "C1",
        mask: str = "auto",
        noise_groups: int = 1,
    ) -> None:
        super().__init__(box, symmetry, mask, noise_groups)
        self.poses = PoseAbout(turn_sd_deg, shift_sd_px, defocus_sd_angstrom)
