"""Poses as sample sites: q(R, t | image) is the mixture of Gaussians that a table of modes holds for the image.

    cell           ~ Categorical(softmax(log_weight))                 an auxiliary site: the model has none
    rotation       ~ TangentNormal about the cell's mode              density relative to the normalised Haar measure
    translation    ~ Normal given the turn v from the mode            v and t of one cell are correlated
    overlap        a factor 1 / q(cell | rotation, translation)

With the factor the guide's density is that of the mixture, sum_c q(c) q(R, t | c), whatever cell a pose was drawn from:
an ELBO that lacks it exceeds the evidence by up to log K where components overlap. The proposals are the guide's
alone; the model keeps p(R) p(t).

A particle that is seen in several images has one cell and one rotation, that of its first image's view, and in each
image a shift; these depend on each other only through the turn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_cryo.data.batch import Batch
from pyro_cryo.distributions.so3 import TangentNormal
from pyro_cryo.distributions.views import counted
from pyro_cryo.guides.poses import PoseModes, covariance_factor
from pyro_cryo.pose import seen_from
from pyro_cryo.rows import Rows

LEAST = -80.0  # log weight of modes that are not there: finite, and nothing in single precision


@dataclass(frozen=True)
class PoseGaussians(Rows):
    """Gaussians (*batch,) of poses (v, t), R = exp([v]x) rotation: a turn, and a shift given the turn.

    rotation (*batch, 3, 3), translation (*batch, 2): the modes
    factor:  (*batch, 5, 5) lower triangular L with the covariance L L^T, radians and pixels
    """

    rotation: Tensor
    translation: Tensor
    factor: Tensor

    @staticmethod
    def about(modes: PoseModes, px: Tensor) -> PoseGaussians:
        """The components (n, K) of modes, in pixels of which px (n,) make one of the modes'."""
        return PoseGaussians(modes.rotation, modes.translation, covariance_factor(modes.precision)).scaled(px)

    def scaled(self, px: Tensor) -> PoseGaussians:
        """Components (n, K) in pixels of which px (n,) make one of theirs."""
        unit = torch.cat([torch.ones_like(px)[:, None].expand(-1, 3), px[:, None].expand(-1, 2)], 1)
        return replace(
            self, translation=self.translation * px[:, None, None], factor=self.factor * unit[:, None, :, None]
        )

    @property
    def turn(self) -> TangentNormal:
        """The marginal of rotations."""
        return TangentNormal(self.rotation, self.factor[..., :3, :3])

    def shift(self, rotation: Tensor) -> dist.MultivariateNormal:
        """Translations given rotations (*batch, 3, 3)."""
        v = self.turn.tangent(rotation)[..., None]
        white = torch.linalg.solve_triangular(self.factor[..., :3, :3], v, upper=False)
        loc = self.translation + (self.factor[..., 3:, :3] @ white)[..., 0]
        return dist.MultivariateNormal(loc, scale_tril=self.factor[..., 3:, 3:])

    def log_prob(self, rotation: Tensor, translation: Tensor) -> Tensor:
        """Log density of poses (*batch, 3, 3), (*batch, 2) relative to the normalised Haar measure and pixels."""
        return self.turn.log_prob(rotation) + self.shift(rotation).log_prob(translation)


def log_density(gaussians: PoseGaussians, log_weight: Tensor, rotation: Tensor, translation: Tensor) -> Tensor:
    """Log of each component's share of a mixture's density at poses (*draws, n, 3, 3), (*draws, n, 2): (*draws, n, K).

    gaussians (n, K), log_weight (n, K) normalised. Its logsumexp is the mixture's log density.
    """
    return log_weight + gaussians.log_prob(rotation[..., None, :, :], translation[..., None, :])


def log_shares(
    gaussians: PoseGaussians, log_weight: Tensor, batch: Batch, rotation: Tensor, translation: Tensor
) -> Tensor:
    """The same for particles of several images: poses (*draws, B, 3, 3), (*draws, B, 2) give (*draws, n, K).

    gaussians (B, K), whose turns are one in all images of a particle, and log_weight (B, K), alike in them
    """
    if not batch.several:
        return log_density(gaussians, log_weight, rotation, translation)
    first, turned = batch.first, rotation[..., None, :, :]
    turn = gaussians[first].turn.log_prob(turned[..., first, :, :, :])
    shift = gaussians.shift(turned).log_prob(translation[..., None, :])
    return log_weight[first] + turn + batch.by_particle(shift, -2)


def normalised(log_weight: Tensor) -> Tensor:
    """Log weights (n, K) of components, finite."""
    return log_weight.log_softmax(-1).clamp_min(LEAST)


class PoseMixture(nn.Module):
    """Samples `rotation` and `translation` from the modes of each image; it has no parameters.

    modes:      of N images, a row for every `batch.index`; translations in pixels of the model's box. They are read at
                every batch. Where they lie on another device than the batch, a read waits for it.
    enumerated: TraceEnum_ELBO(max_plate_nesting=1) then sums over the cells, and the model sees poses (K, B, 3, 3);
                where z depends on the pose (`PosedGuide`) a cell is drawn. Other ELBOs draw one anyway, which as the
                weights are fixed needs no score function.
    """

    def __init__(self, modes: PoseModes, enumerated: bool = True) -> None:
        super().__init__()
        self._modes, self.enumerated = (modes,), enumerated

    @property
    def modes(self) -> PoseModes:
        """The table."""
        return self._modes[0]

    def rows(self, batch: Batch) -> PoseModes:
        """Those of a batch's images, beside them."""
        return self.modes[batch.index.to(self.modes.rotation.device)].to(batch.image.device)

    def of(self, batch: Batch) -> tuple[PoseGaussians, Tensor]:
        """The components (B, K) of a batch's images, translations as the batch has them, and log weights (B, K)."""
        modes = self.rows(batch)
        return PoseGaussians.about(modes, batch.freq_scale), normalised(modes.log_weight)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sample poses; rotation (B, 3, 3) and translation (B, 2) of the images, or (K, B, ...) where enumerated."""
        every, log_weight = self.of(batch)
        first, image = batch.first, torch.arange(len(batch), device=batch.image.device)
        how: Any = {"is_auxiliary": True, **({"enumerate": "parallel"} if self.enumerated else {})}
        with pyro.plate("particles", batch.size, subsample=batch.shown, dim=-1):
            cell = pyro.sample("cell", dist.Categorical(logits=log_weight[first]), infer=how)
            own = every[image, batch.of_images(cell, -1)]
            rotation = seen_from(pyro.sample("rotation", every[first, cell].turn), batch)
            translation = pyro.sample("translation", counted(own.shift(rotation), batch))
            shares = log_shares(every, log_weight, batch, rotation, translation).log_softmax(-1)
            own_share = shares.gather(-1, cell.expand(shares.shape[:-1])[..., None])[..., 0]
            pyro.factor("overlap", -own_share, has_rsample=True)
        return rotation, translation


class OfImages(PoseMixture):
    """Modes (B, K) of images that have the rows index (B,) in their Particles: looked at again and again."""

    def __init__(self, index: Tensor, modes: PoseModes) -> None:
        index, order = index.sort()
        super().__init__(modes[order], enumerated=False)
        self.index = index
        pixel = torch.ones_like(self.modes.rotation[:, 0, 0, 0])
        self._components = PoseGaussians.about(self.modes, pixel), normalised(self.modes.log_weight)

    def rows(self, batch: Batch) -> PoseModes:
        return self.modes[self._row(batch)]

    def of(self, batch: Batch) -> tuple[PoseGaussians, Tensor]:
        row, (gaussians, log_weight) = self._row(batch), self._components
        return gaussians[row].scaled(batch.freq_scale), log_weight[row]

    def _row(self, batch: Batch) -> Tensor:
        return torch.searchsorted(self.index, batch.index)


class PosedGuide(nn.Module):
    """q(pose | image) q(z | image, pose): a guide of z that looks at each image from the pose drawn for it.

    poses: not enumerated: the guide of z sees one pose of each image
    rest:  for example ExactGuide, which then gives p(z | image, pose)
    draws: of poses, over which `posterior` takes the moments of z
    """

    def __init__(self, poses: PoseMixture, rest: nn.Module, draws: int = 8) -> None:
        super().__init__()
        if poses.enumerated:
            raise ValueError("the poses are enumerated, but z is guessed at one pose; PoseMixture(enumerated=False)")
        if draws < 1:
            raise ValueError(f"draws is {draws}; expected at least 1")
        self.poses, self.rest, self.draws = poses, rest, draws

    def forward(self, batch: Batch) -> None:
        """Sample `rotation`, `translation` and what the other guide samples."""
        rotation, translation = self.poses(batch)
        with poutine.block(hide=["particles"]):  # the other guide's plate is the same one, and a trace has it once
            self.rest(replace(batch, rotation=rotation, translation=translation))

    def posterior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean (n, zdim) and covariance (n, zdim, zdim) of z over draws of the pose: within them and between."""
        modes, means, within = self.poses.rows(batch), [], []
        for _ in range(self.draws):
            rotation, translation = modes.drawn(images=batch)
            posed = replace(batch, rotation=rotation, translation=translation * batch.freq_scale[:, None])
            mean, covariance = self.rest.posterior(posed)  # type: ignore[operator]
            means.append(mean)
            within.append(covariance)
        mean, covariance = torch.stack(means).mean(0), torch.stack(within).mean(0)
        away = torch.stack(means) - mean
        return mean, covariance + torch.einsum("sbi,sbj->bij", away, away) / self.draws
