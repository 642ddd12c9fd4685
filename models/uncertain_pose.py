"""One map, and poses that are only about where a table says: both get posteriors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.pose_mixture import PoseMixture
from pyro_cryo.guides.poses import PoseModes, prior_of
from pyro_cryo.inference.pose_em import PoseEM, Solved
from pyro_cryo.models.homogeneous import Homogeneous
from pyro_cryo.pose import PoseAbout
from pyro_cryo.progress import Progress, quiet

FIRST = 8.0  # cycles a box, in which poses are compared first
GROWTH = 1.4  # of the band from pass to pass
PASSES = 4  # in a band
STEPS = 3  # of Newton's method, a pass


class UncertainPose(Homogeneous):
    """V ~ shells; R_i = exp(v_i) R0_i, v_i ~ Normal(0, turn_sd); t_i ~ Normal(t0_i, shift_sd); R0_i, t0_i of the table.

    turn_sd_deg, shift_sd_px: the spreads to begin with, then learned; pixels of the model's box
    """

    poses: PoseAbout

    def __init__(
        self,
        box: int,
        turn_sd_deg: float = 5.0,
        shift_sd_px: float = 2.0,
        symmetry: str = "C1",
        mask: str = "auto",
        noise_groups: int = 1,
    ) -> None:
        super().__init__(box, symmetry, mask, noise_groups)
        self.poses = PoseAbout(turn_sd_deg, shift_sd_px)
        self.modes: PoseModes | None = None

    def get_extra_state(self) -> dict[str, Any]:
        """The posteriors of the poses."""
        return {"modes": None if self.modes is None else self.modes.tensors}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.modes = None if state["modes"] is None else PoseModes(*state["modes"])

    def make_guide(self) -> nn.Module:
        if self.modes is None:
            raise ValueError("UncertainPose has no posterior of poses yet; fit it, or set model.modes")
        return MapAndPoses(super().make_guide(), PoseMixture(self.modes.to(self.tau.device)))

    def prepare(self, particles: Particles, seed: int = 0, progress: Progress = quiet) -> None:
        generator = torch.Generator().manual_seed(seed)
        found = self.solved(particles, generator, progress)
        em = PoseEM(particles, prior_of(self.poses, particles), self.symmetry, found.sigma, generator, progress)
        modes = at_table(particles)
        everyone, known = torch.arange(len(particles)), Solved(found.volume, torch.zeros_like(found.tau))
        for band in bands(self.box / 2 - 1):
            known, evidence = em.climb(everyone, modes, known.on(self.box), band, STEPS)
            away = em.prior.away(*modes.drawn(generator))
            self.poses.turn_sd.copy_(away[:, :3].square().mean().sqrt())
            self.poses.shift_sd.copy_(away[:, 3:].square().mean().sqrt())
            em.prior = prior_of(self.poses, particles)
            spread = math.degrees(float(self.poses.turn_sd)), float(self.poses.shift_sd)
            progress.note(f"poses to {band:.0f}: {spread[0]:.2f} deg, {spread[1]:.2f} px, log evidence {evidence:.2f}")
        self.take(self.solved(particles.with_poses(*modes.drawn(generator)), generator, progress))
        self.modes = modes


class MapAndPoses(nn.Module):
    """q(V) q(poses)."""

    def __init__(self, volume: nn.Module, poses: PoseMixture) -> None:
        super().__init__()
        self.volume, self.poses = volume, poses

    def forward(self, batch: Batch) -> None:
        """Sample `volume`, `rotation` and `translation`."""
        self.volume(batch)
        self.poses(batch)


def at_table(particles: Particles) -> PoseModes:
    """One mode an image, where its table says."""
    count = len(particles)
    precision: Tensor = torch.eye(5).expand(count, 1, 5, 5).clone()
    rotation, translation = particles.rotation.clone(), particles.translation.clone()
    return PoseModes(rotation[:, None], translation[:, None], precision, torch.zeros(count, 1))


def bands(finest: float) -> list[float]:
    """Cycles a box in which poses are compared, pass by pass."""
    found = [min(FIRST, finest)]
    while found[-1] < finest:
        found.append(min(GROWTH * found[-1], finest))
    return [band for band in found for _ in range(PASSES)]
