"""The climb to the modes of poses' posteriors: what an image says near a pose, and the steps uphill.

What an image is expected to be at a pose, a `PoseLikelihood` knows: in one map, or in a family of maps with its
coefficients integrated out. Newton's method with the Gauss-Newton information climbs to the mode of an
image's posterior in a few steps; this information is the precision of the Gaussian about it (Laplace's approximation).

The images of one particle turn together and are shifted each on its own, so that its information is an arrow: a block
of the turn, one of each shift, and what is between turn and shifts. Steps and Laplace's approximation eliminate shifts.
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
from pyro_cryo.volumes.conjugate import noise_sd

LARGEST_TURN = 0.35  # radians, and pixels below: about what a step may be
LARGEST_SHIFT_PX = 3.0
LEAST_SHARE = 1e-3  # of a mixture, below which a mode is not climbed any more


@dataclass(frozen=True)
class Landscape:
    """log p(images | poses) of n particles at a pose of each of B images, less that of empty images, and its slopes.

    value (n,); gradient (B, 5) and information (B, 5, 5) of each image in (v, t), t in pixels of the poses. Those of a
    particle are sums over its images, their turns as one
    """

    value: Tensor
    gradient: Tensor
    information: Tensor

    def __add__(self, other: Landscape) -> Landscape:
        return Landscape(self.value + other.value, self.gradient + other.gradient, self.information + other.information)

    def under(self, prior: PosePrior, batch: Batch, rotation: Tensor, translation: Tensor) -> Landscape:
        """With log p(pose), at these poses (B, 3, 3), (B, 2), up to its constant; a particle turns once."""
        away, precision = prior.away(rotation, translation), prior.precision.expand(len(batch), 5)
        if batch.several:
            precision = torch.cat([precision[:, :3] * _leads(batch), precision[:, 3:]], 1)
        square = (away.square() * precision).sum(1)
        return Landscape(
            self.value - 0.5 * batch.by_particle(square),
            self.gradient - away * precision,
            self.information + torch.diag_embed(precision),
        )

    def where(self, better: Tensor, other: Landscape, batch: Batch) -> Landscape:
        """Its own values where `better` (n,), else the other's."""
        image = batch.of_images(better)
        return Landscape(
            torch.where(better, self.value, other.value),
            torch.where(image[:, None], self.gradient, other.gradient),
            torch.where(image[:, None, None], self.information, other.information),
        )


def _leads(batch: Batch) -> Tensor:
    """(B, 1): 1 for the first image of a particle, 0 for the others."""
    lead = torch.zeros(len(batch), 1, device=batch.image.device)
    lead[batch.first] = 1
    return lead


@dataclass(frozen=True)
class _Arrow:
    """Information of particles' turns and of their images' shifts, these eliminated.

    turn (n, 3, 3), of the first image's view; cross (B, 3, 2) between it and the shifts; shift (B, 2, 2)
    """

    turn: Tensor
    cross: Tensor
    shift: Tensor

    @staticmethod
    def of(information: Tensor, batch: Batch, relative: Tensor) -> _Arrow:
        """From each image's own (B, 5, 5), in its view's axes; relative (B, 3, 3)."""
        shift = information[:, 3:, 3:]
        own_cross = information[:, :3, 3:]
        own = information[:, :3, :3] - own_cross @ torch.linalg.solve(shift, own_cross.mT)
        return _Arrow(batch.by_particle(relative.mT @ own @ relative), relative.mT @ own_cross, shift)

    def solve(self, gradient: Tensor, batch: Batch, relative: Tensor) -> Tensor:
        """(B, 5), each image's turn in its view's axes: the inverse times the particles' gradient, of (B, 5)."""
        own, shifts = gradient[:, :3, None], gradient[:, 3:, None]
        own = relative.mT @ own - self.cross @ torch.linalg.solve(self.shift, shifts)
        turn = batch.of_images(torch.linalg.solve(self.turn, batch.by_particle(own)))
        shift = torch.linalg.solve(self.shift, shifts - self.cross.mT @ turn)
        return torch.cat([relative @ turn, shift], 1)[..., 0]

    def log_det(self, batch: Batch) -> Tensor:
        """(n,)"""
        return torch.linalg.slogdet(self.turn)[1] + batch.by_particle(torch.linalg.slogdet(self.shift)[1])

    def precision(self, batch: Batch, relative: Tensor) -> Tensor:
        """Of each image's own turn and shift, what the particle's other images say included: (B, 5, 5)."""
        cross = relative @ self.cross
        turn = relative @ batch.of_images(self.turn) @ relative.mT
        turn = turn + cross @ torch.linalg.solve(self.shift, cross.mT)
        return torch.cat([torch.cat([turn, cross], 2), torch.cat([cross.mT, self.shift], 2)], 1)


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
        return Landscape(batch.by_particle(value), (columns @ left[..., None])[..., 0], columns @ columns.mT)


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

    modes: of the images; those of one particle have the same weights, and rotations that go together
    px:    (B,) pixels of the batch's `translation` in a pixel of the poses

    Modes of less than a thousandth of an image's weight stay where they are, and lose it; those that came to one peak
    are one (`merged`), the heaviest comes first. Beside them log p(images) (n,) of each particle less that of empty
    images, the pose integrated out by Laplace's approximation at these modes.
    """
    image, mode = (modes.log_weight > math.log(LEAST_SHARE)).nonzero(as_tuple=True)
    some, own, their_px = batch.copies(image, mode), prior[image], px[image]
    rotation, translation = modes.rotation[image, mode], modes.translation[image, mode]
    relative = some.relative
    here = likelihood.at(some, rotation, translation, their_px).under(own, some, rotation, translation)
    least = torch.tensor([LARGEST_TURN**-2.0] * 3 + [LARGEST_SHIFT_PX**-2.0] * 2, device=rotation.device)
    damping = torch.full_like(here.value, 1e-2)
    for _ in range(steps):
        more = some.of_images(damping)[:, None] * here.information.diagonal(dim1=1, dim2=2) + least
        step = _Arrow.of(here.information + torch.diag_embed(more), some, relative).solve(here.gradient, some, relative)
        there = moved(rotation, translation, step)
        tried = likelihood.at(some, *there, their_px).under(own, some, *there)
        better = tried.value >= here.value
        here, theirs = tried.where(better, here, some), some.of_images(better)
        rotation = torch.where(theirs[:, None, None], there[0], rotation)
        translation = torch.where(theirs[:, None], there[1], translation)
        damping = torch.where(better, 0.3 * damping, 10 * damping)
    end = _Arrow.of(here.information, some, relative)
    result = PoseModes(*(value.clone() for value in modes.tensors))
    result.rotation[image, mode], result.translation[image, mode] = rotation, translation
    result.precision[image, mode] = end.precision(some, relative)
    mass = torch.full_like(modes.log_weight, -torch.inf)
    mass[image, mode] = some.of_images(here.value - 0.5 * end.log_det(some))
    result = merged(replace(result, log_weight=mass), batch)
    evidence = result.log_weight.logsumexp(1)[batch.first] - prior.log_size(batch.views)
    return replace(result, log_weight=result.log_weight.log_softmax(1)), evidence
