"""What images say about their poses where they show a family of maps.

With y the coefficients of an image in a basis of maps, E their posterior moments at a pose, the gradient of
log p(image | pose), y integrated out, is that of log p(image | pose, y) averaged over the posterior of y, whatever its
prior. In a basis that needs E[y] and E[y y'] alone. The information is that of the mean of y less what y explains of
it: the Schur complement of y. Images of one particle have one y, which they tell together; of the information that
leaves out what y lets one image say of another's pose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.guides.coefficients import Coefficients, Seen
from pyro_cryo.guides.landscape import Landscape, MapLikelihood, turned, whitened
from pyro_cryo.physics.slices import GridPoints, slice_coordinates

EXPLAINED = 0.99  # at most, of a direction of the slices


@dataclass(frozen=True)
class FamilyLikelihood:
    """Maps that are linear in coefficients, up to the band of the basis; beyond it one map.

    slopes:       (n, n, n / 2 + 1, 4 C) `slices.slope_grid` of C maps, channel by channel: V, x V, y V and z V of all
    coefficients: their posterior, given what images say
    sigma:        (noise groups, shells) sd of the noise
    scale:        of the maps, to that of the images
    count:        coefficients of an image within the basis' band
    beyond:       the map that is seen beyond
    """

    slopes: Tensor
    coefficients: Coefficients
    sigma: Tensor
    scale: float
    count: int
    beyond: MapLikelihood

    def at(self, batch: Batch, rotation: Tensor, translation: Tensor, px: Tensor) -> Landscape:
        """As `PoseLikelihood` says, y integrated out."""
        low, high = batch.band(self.count), batch.beyond(self.count)
        within = self._within(low, rotation, translation, px)
        return within if not len(high.half) else within + self.beyond.at(high, rotation, translation, px)

    def _within(self, batch: Batch, rotation: Tensor, translation: Tensor, px: Tensor) -> Landscape:
        wave, voxel = (-2j * math.pi / box for box in (batch.half.box, self.slopes.shape[0] // 2))
        image, factor = whitened(batch, self.sigma, translation * px[:, None])
        points = GridPoints.of(slice_coordinates(rotation, batch.half.k, batch.freq_scale), self.slopes.shape[0])
        read = points.read(self.slopes).unflatten(0, factor.shape).unflatten(-1, (4, -1))
        read = read * (self.scale * factor)[..., None, None]
        slices = read[..., 0, :]
        parts = torch.view_as_real(slices).transpose(-1, -2).flatten(1, 2)
        seen = Seen.beside(parts, torch.view_as_real(image).flatten(1), torch.zeros_like(factor[:, 0]))
        seen = seen.by_particle(batch)
        moments = self.coefficients.moments(seen)
        y, yy, gram = (batch.of_images(value) for value in (moments.y, moments.yy, seen.gram))
        weight = y.to(read.dtype)

        def by_pose(volume_axes: Tensor, shifted: Tensor) -> Tensor:
            along = torch.einsum("bpc,bic->bpi", volume_axes, rotation.to(volume_axes.dtype))
            return turned(along * batch.freq_scale[:, None, None], shifted * px[:, None], batch.half)

        slope = by_pose(
            voxel * torch.einsum("bpac,bc->bpa", read[..., 1:, :], weight),
            wave * torch.einsum("bpc,bc->bp", slices, weight),
        )
        columns = torch.view_as_real(slope.contiguous()).flatten(2)
        left = image[..., None] * weight[:, None] - slices @ yy.to(read.dtype)
        gained = [(read[..., a, :].conj() * left).sum(-1) for a in range(4)]
        by_axis = torch.stack([(voxel.conjugate() * gain).real for gain in gained[1:]], -1)
        gradient = by_pose(by_axis, (wave.conjugate() * gained[0]).real).sum(-1)
        cross = columns @ parts
        information = columns @ columns.mT - _explained(cross, yy - y[:, :, None] * y[:, None], gram)
        return Landscape(moments.evidence, gradient, information)


def _explained(cross: Tensor, covariance: Tensor, gram: Tensor) -> Tensor:
    """What y explains of the slopes: (B, 5, 5), from cross (B, 5, C) = slopes . slices.

    It is cross covariance cross', were the covariance no more than what the images alone leave, 1 / gram; where the
    posterior of y has several modes it is.
    """
    floor = 1e-4 * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-12
    root = torch.linalg.cholesky(gram + floor * torch.eye(gram.shape[1], device=gram.device))
    share, turn = torch.linalg.eigh(root.mT @ covariance @ root)
    part = turn.mT @ torch.linalg.solve_triangular(root, cross.mT, upper=False)
    return part.mT @ (share.clamp(0, EXPLAINED)[..., None] * part)
