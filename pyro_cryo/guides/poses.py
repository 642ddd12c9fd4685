"""Posteriors and priors of poses: a mixture of Gaussians for every image.

Near a pose (R_0, t_0) another is (v, t), R = exp([v]x) R_0: v a turn in radians about the view's axes, of which the
third is the line of sight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.distributions.so3 import TangentNormal
from pyro_cryo.physics.rotations import exp, log
from pyro_cryo.pose import AnyPose, PoseAbout
from pyro_cryo.rows import Rows


@dataclass(frozen=True)
class PoseModes(Rows):
    """Posteriors of the poses of n images, each a mixture of K Gaussians in (v, t).

    rotation:    (n, K, 3, 3) modes, volume axes to view axes
    translation: (n, K, 2) pixels
    precision:   (n, K, 5, 5) of v, radians, and t, pixels
    log_weight:  (n, K), normalised; minus infinity where an image has fewer modes
    """

    rotation: Tensor
    translation: Tensor
    precision: Tensor
    log_weight: Tensor

    @staticmethod
    def single(rotation: Tensor, translation: Tensor) -> PoseModes:
        """One mode for each image, at poses (n, 3, 3), (n, 2), of precision 1."""
        n = len(rotation)
        return PoseModes(
            rotation[:, None].clone(), translation[:, None].clone(), torch.eye(5).repeat(n, 1, 1, 1), torch.zeros(n, 1)
        )

    def copy(self) -> PoseModes:
        """The same, to be climbed from."""
        return PoseModes(*(value.clone() for value in self.tensors))

    @property
    def best(self) -> tuple[Tensor, Tensor]:
        """Rotation (n, 3, 3) and translation (n, 2) of the heaviest mode of each image."""
        return self.at(self.log_weight.argmax(1))

    def at(self, mode: Tensor) -> tuple[Tensor, Tensor]:
        """Rotation and translation of one mode (n,) of each image."""
        image = torch.arange(len(mode), device=mode.device)
        return self.rotation[image, mode], self.translation[image, mode]

    @property
    def spread(self) -> PoseSpread:
        """How unsure the poses are."""
        rotation, translation = self.best
        weight, covariance = self.log_weight.exp(), torch.linalg.inv(self.precision)
        variance = torch.diagonal(covariance, dim1=2, dim2=3)
        turn = log(self.rotation @ rotation[:, None].mT).square().sum(-1) + variance[..., :3].sum(-1)
        shift = (self.translation - translation[:, None]).square().sum(-1) + variance[..., 3:].sum(-1)
        own = 0.5 * (5 * (1 + math.log(2 * math.pi)) - torch.linalg.slogdet(self.precision)[1])
        entropy = (weight * own).sum(1) - torch.special.xlogy(weight, weight).sum(1)
        return PoseSpread((weight * turn).sum(1).sqrt().rad2deg(), (weight * shift).sum(1).sqrt(), entropy)

    def drawn(
        self, generator: torch.Generator | None = None, images: Batch | Particles | None = None
    ) -> tuple[Tensor, Tensor]:
        """One draw of each image's pose: rotation (n, 3, 3), translation (n, 2).

        generator: on the CPU
        images:    what the rows are of: those of one particle are turned together
        """
        count, device = len(self.log_weight), self.log_weight.device
        chance, white = torch.rand(count, generator=generator), torch.randn(count, 5, generator=generator)
        return self.placed(chance.to(device), white.to(device), images)

    def placed(self, chance: Tensor, white: Tensor, images: Batch | Particles | None = None) -> tuple[Tensor, Tensor]:
        """The poses that numbers (n,) from 0 to 1 and standard normal ones (n, 5) make draws of."""
        if images is not None and images.several:
            chance = images.of_images(chance[images.first])
        share = self.log_weight.exp().cumsum(1)
        mode = (share <= chance[:, None] * share[:, -1:]).sum(1)
        factor = covariance_factor(self.precision[torch.arange(len(mode), device=mode.device), mode])
        if images is not None and images.several:
            turn = factor[:, :3, :3] @ white[:, :3, None]
            theirs = images.relative @ images.of_images(turn[images.first])
            own = torch.linalg.solve_triangular(factor[:, :3, :3], theirs, upper=False)[..., 0]
            white = torch.cat([own, white[:, 3:]], 1)
        return moved(*self.at(mode), (factor @ white[..., None])[..., 0])


@dataclass(frozen=True)
class PoseSpread(Rows):
    """How unsure the poses of n images are.

    angle_deg: (n,) root mean square angle between a rotation of the posterior and the best one
    shift_px:  (n,) root mean square distance of translations, pixels
    entropy:   (n,) of the posterior, nats; densities in (v, t), cubic radians times square pixels. That of a mixture is
               taken as if its components did not overlap
    """

    angle_deg: Tensor
    shift_px: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class PosePrior:
    """p(R) p(t) of n images: a Gaussian of (v, t) about a pose, or any rotation alike.

    rotation (n, 3, 3), translation (n, 2) pixels: its centre
    turn_sd: radians about each axis, infinite for the uniform distribution; shift_sd: pixels along each axis
    defocus_sd: angstrom about the table's, to begin with; 0 where that is known
    """

    rotation: Tensor
    translation: Tensor
    turn_sd: float
    shift_sd: float
    defocus_sd: float = 0.0

    def __getitem__(self, rows: Tensor) -> PosePrior:
        """Those of some images."""
        return replace(self, rotation=self.rotation[rows], translation=self.translation[rows])

    def to(self, device: torch.device | str) -> PosePrior:
        """The same on another device."""
        return replace(self, rotation=self.rotation.to(device), translation=self.translation.to(device))

    def log_size(self, views: Tensor) -> Tensor:
        """log of what a Gaussian's mass, exp(peak) / sqrt(det precision), is to be divided by for p(R) p(t): (n,).

        views: (n,) images of each particle, each with a shift

        Both densities then have the same 2 pi's, but for uniform rotations, of density 1 / (8 pi^2) a cubic radian.
        """
        uniform = math.log(8 * math.pi**2) - 1.5 * math.log(2 * math.pi)
        turn = 3 * math.log(self.turn_sd) if math.isfinite(self.turn_sd) else uniform
        return turn + 2 * math.log(self.shift_sd) * views

    @property
    def precision(self) -> Tensor:
        """(5,)"""
        return torch.tensor([self.turn_sd**-2.0] * 3 + [self.shift_sd**-2.0] * 2, device=self.rotation.device)

    def learned(self, modes: PoseModes) -> PosePrior:
        """With the spread that posteriors of the images' poses have about its centre, their own included.

        Rotations that are uniform stay so.
        """
        centre = replace(self, rotation=self.rotation[:, None], translation=self.translation[:, None])
        away = centre.away(modes.rotation, modes.translation)
        square = away.square() + torch.diagonal(torch.linalg.inv(modes.precision), dim1=2, dim2=3)
        mean = (modes.log_weight.exp()[..., None] * square).sum(1).mean(0)
        turn_sd = float(mean[:3].mean().sqrt()) if math.isfinite(self.turn_sd) else self.turn_sd
        return replace(self, turn_sd=turn_sd, shift_sd=float(mean[3:].mean().sqrt()))

    def log_prob(self, rotation: Tensor, translation: Tensor) -> Tensor:
        """Log density of poses (*draws, n, 3, 3), (*draws, n, 2), relative to normalised Haar measure and pixels."""
        shift = (translation - self.translation) / self.shift_sd
        result = -0.5 * shift.square().sum(-1) - 2 * math.log(self.shift_sd) - math.log(2 * math.pi)
        if math.isfinite(self.turn_sd):
            spread = self.turn_sd * torch.eye(3, device=rotation.device)
            result = result + TangentNormal(self.rotation, spread, validate_args=False).log_prob(rotation)
        return result

    def away(self, rotation: Tensor, translation: Tensor) -> Tensor:
        """Where poses lie from its centre: (n, 5)."""
        return torch.cat([log(rotation @ self.rotation.mT), translation - self.translation], -1)


def prior_of(poses: nn.Module, particles: Particles) -> PosePrior:
    """p(R) p(t) of all particles under a model's prior of poses, translations in pixels of the model's box.

    Raises TypeError where the prior is neither of the two that are solved for.
    """
    if isinstance(poses, PoseAbout):
        spread = float(poses.turn_sd), float(poses.shift_sd), float(poses.defocus_sd)
        return PosePrior(particles.rotation, particles.translation, *spread)
    if not isinstance(poses, AnyPose):
        raise TypeError(
            f"posteriors under poses of {type(poses).__name__} cannot be found; derive it from PoseAbout or AnyPose"
        )
    count = len(particles)
    return PosePrior(torch.eye(3).expand(count, 3, 3), torch.zeros(count, 2), math.inf, float(poses.shift_sd))


def merged(modes: PoseModes, batch: Batch | None = None) -> PoseModes:
    """Modes that climbed to one peak as one: those within a standard deviation of a heavier one are left out.

    batch: the images, where particles have several: their modes are one if they are in each image

    Their weight is not that one's, which counts the whole peak already: weights need not be normalised, and those of
    the modes that stay are as they were. The heaviest comes first.
    """
    order = modes.log_weight.argsort(1, descending=True)
    sorted_ = modes[torch.arange(len(order), device=order.device)[:, None], order]
    weight = sorted_.log_weight.clone()
    for j in range(1, weight.shape[1]):
        turn = log(sorted_.rotation[:, j : j + 1] @ sorted_.rotation[:, :j].mT)
        away = torch.cat([turn, sorted_.translation[:, j : j + 1] - sorted_.translation[:, :j]], -1)
        distance = torch.einsum("nki,nkij,nkj->nk", away, sorted_.precision[:, :j], away)
        same = (distance < 1) & weight[:, :j].isfinite()
        if batch is not None:
            same = batch.of_images(batch.by_particle((~same).long()) == 0)
        weight[:, j] = weight[:, j].masked_fill(same.any(1), -torch.inf)
    return replace(sorted_, log_weight=weight)


def covariance_factor(precision: Tensor) -> Tensor:
    """L, lower triangular, with the covariance L L^T, of precisions (*batch, 5, 5)."""
    # P = U U^T with U upper triangular gives L = U^-T: no inverse of P.
    lower = torch.linalg.cholesky_ex(precision.flip(-1, -2).double())[0]
    eye = torch.eye(5, dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower.flip(-1, -2), eye, upper=True).mT.to(precision.dtype)


def moved(rotation: Tensor, translation: Tensor, away: Tensor) -> tuple[Tensor, Tensor]:
    """Poses (*batch, 3, 3), (*batch, 2) moved by (v, t) (*batch, 5)."""
    return exp(away[..., :3]) @ rotation, translation + away[..., 3:]
