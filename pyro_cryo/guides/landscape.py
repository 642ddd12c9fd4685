"""The climb to the modes of poses' posteriors: what an image says near a pose, and the steps uphill.

What an image is expected to be at a pose, a `PoseLikelihood` knows: in one map, or in a family of maps with its
coefficients integrated out. Newton's method with the Gauss-Newton information climbs to the mode of an
image's posterior in a few steps; this information is the precision of the Gaussian about it (Laplace's approximation).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.guides.poses import PoseModes, PosePrior, merged, moved
from pyro_cryo.physics.fourier import HalfPlane, shift_phase
from pyro_cryo.physics.slices import GridPoints, slice_coordinates
from pyro_cryo.rows import Rows
from pyro_cryo.volumes.conjugate import noise_sd

LARGEST_TURN = 0.35  # radians, and pixels below: about what a step may be
LARGEST_SHIFT_PX = 3.0
LEAST_SHARE = 1e-3  # of a mixture, below which a mode is not climbed any more


@dataclass(frozen=True)
class Landscape(Rows):
    """log p(image | pose) at a pose of each image, less that of an empty image, with gradient and information.

    value (B,), gradient (B, 5), information (B, 5, 5) in (v, t), t in pixels of the poses
    """

    value: Tensor
    gradient: Tensor
    information: Tensor

    def __add__(self, other: Landscape) -> Landscape:
        return Landscape(*(a + b for a, b in zip(self.tensors, other.tensors, strict=True)))

    def under(self, prior: PosePrior, rotation: Tensor, translation: Tensor) -> Landscape:
        """With log p(pose), at these poses (B, 3, 3), (B, 2), up to its constant."""
        away, precision = prior.away(rotation, translation), prior.precision
        square = (away.square() * precision).sum(1)
        return Landscape(
            self.value - 0.5 * square, self.gradient - away * precision, self.information + torch.diag(precision)
        )

    def where(self, better: Tensor, other: Landscape) -> Landscape:
        """Its own values where `better` (B,), else the other's."""
        pick = [better, better[:, None], better[:, None, None]]
        return Landscape(*map(torch.where, pick, self.tensors, other.tensors))


class PoseLikelihood(Protocol):
    """What images say about their poses."""

    def at(self, batch: Batch, rotation: Tensor, translation: Tensor, px: Tensor) -> Landscape:
        """At poses (B, 3, 3), (B, 2); px (B,): pixels of the batch's `translation` in a pixel of the poses."""


@dataclass(frozen=True)
class MapLikelihood:
    """The same map for all images: its slices, and as their derivatives the slices of its gradient.

    slopes: `slices.slope_grid` of the map, on the box of the images
    sigma:  (noise groups, shells) sd of the noise
    """

    slopes: Tensor
    sigma: Tensor

    def at(self, batch: Batch, rotation: Tensor, translation: Tensor, px: Tensor) -> Landscape:
        """As `PoseLikelihood` says."""
        wave = -2j * math.pi / batch.half.box
        image, factor = whitened(batch, self.sigma, translation * px[:, None])
        points = slice_coordinates(rotation, batch.half.k, batch.freq_scale)
        read = GridPoints.of(points, self.slopes.shape[0]).read(self.slopes).unflatten(0, factor.shape)
        read = read * factor[..., None]
        along = torch.einsum("bpc,bic->bpi", wave * read[..., 1:], rotation.to(read.dtype))
        slope = turned(along * batch.freq_scale[:, None, None], wave * read[..., 0] * px[:, None], batch.half)
        columns = torch.view_as_real(slope.contiguous()).flatten(2)
        left = torch.view_as_real(image - read[..., 0]).flatten(1)
        value = 0.5 * (torch.view_as_real(image).flatten(1).square().sum(1) - left.square().sum(1))
        return Landscape(value, (columns @ left[..., None])[..., 0], columns @ columns.mT)


def whitened(batch: Batch, sigma: Tensor, translation: Tensor) -> tuple[Tensor, Tensor]:
    """Images, their shift (B, 2) undone, and the CTF, both over the noise's sd: (B, P) complex, (B, P)."""
    sd = noise_sd(batch, sigma)
    phase = shift_phase(batch.half.k, translation, batch.half.box)
    return torch.view_as_complex(batch.image) / sd * phase.conj(), batch.ctf / sd


def turned(along: Tensor, shifted: Tensor, half: HalfPlane) -> Tensor:
    """Derivatives of slices by (v, t), of real or complex values: (B, 5, P).

    along:   (B, P, 3) gradient of the transform along the view's axes
    shifted: (B, P) what a shift by one pixel multiplies by k
    """
    # A point moves with the rotation: dk = (k x v) @ R.
    kx, ky = half.k[:, 0], half.k[:, 1]
    turns = [-ky * along[..., 2], kx * along[..., 2], ky * along[..., 0] - kx * along[..., 1]]
    return torch.stack([*turns, kx * shifted, ky * shifted], 1)


def climbed(
    batch: Batch, likelihood: PoseLikelihood, modes: PoseModes, prior: PosePrior, px: Tensor, steps: int = 3
) -> tuple[PoseModes, Tensor]:
    """The modes after some steps of Newton's method, damped (Levenberg and Marquardt).

    px: (B,) pixels of the batch's `translation` in a pixel of the poses

    Modes of less than a thousandth of an image's weight stay where they are, and lose it; those that came to one peak
    are one (`merged`), the heaviest comes first. Beside them log p(image) (B,) less that of an empty image, the pose
    integrated out by Laplace's approximation at these modes.
    """
    image, mode = (modes.log_weight > math.log(LEAST_SHARE)).nonzero(as_tuple=True)
    some, own, their_px = batch[image], prior[image], px[image]
    rotation, translation = modes.rotation[image, mode], modes.translation[image, mode]
    here = likelihood.at(some, rotation, translation, their_px).under(own, rotation, translation)
    least = torch.diag(torch.tensor([LARGEST_TURN**-2.0] * 3 + [LARGEST_SHIFT_PX**-2.0] * 2, device=rotation.device))
    damping = torch.full_like(here.value, 1e-2)
    for _ in range(steps):
        held = here.information + torch.diag_embed(damping[:, None] * here.information.diagonal(dim1=1, dim2=2)) + least
        there = moved(rotation, translation, torch.linalg.solve(held, here.gradient))
        tried = likelihood.at(some, *there, their_px).under(own, *there)
        better = tried.value >= here.value
        here = tried.where(better, here)
        rotation = torch.where(better[:, None, None], there[0], rotation)
        translation = torch.where(better[:, None], there[1], translation)
        damping = torch.where(better, 0.3 * damping, 10 * damping)
    result = PoseModes(*(value.clone() for value in modes.tensors))
    result.rotation[image, mode], result.translation[image, mode] = rotation, translation
    result.precision[image, mode] = here.information
    mass = torch.full_like(modes.log_weight, -torch.inf)
    mass[image, mode] = here.value - 0.5 * torch.linalg.slogdet(here.information)[1]
    result = merged(replace(result, log_weight=mass))
    return replace(result, log_weight=result.log_weight.log_softmax(1)), result.log_weight.logsumexp(1) - prior.log_size
