"""The exact posterior of z as a guide, for models whose images are linear in coefficients of a basis."""

from __future__ import annotations

import pyro
import torch
from torch import Tensor, nn

from pyro_cryo.data.batch import Batch
from pyro_cryo.guides.coefficients import Coefficients, Projected, Seen, images_at_once
from pyro_cryo.model import CryoModel
from pyro_cryo.volumes.basis import VoxelBasis


class ExactGuide(nn.Module):
    """q(z, contrast | image) = p(z, contrast | image), given the model's maps; it has no parameters of its own.

    But for the contrast of a linear family, whose posterior is taken for the Normal with its moments.
    """

    def __init__(self, model: CryoModel, basis: VoxelBasis, coefficients: Coefficients) -> None:
        super().__init__()
        self._parts = (model, basis, coefficients)

    def seen(self, batch: Batch) -> Seen:
        """What the images say about the coefficients, within the band of the basis."""
        model, basis, _ = self._parts
        low = batch.band(basis.count)
        return Projected.of(low, basis.grid(), model.sigma.detach(), basis.box / basis.side).seen()

    def posterior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean (B, zdim) and covariance (B, zdim, zdim) of z."""
        rows = images_at_once(self._parts[1].count, batch.image.device)
        parts = [batch[part] for part in torch.arange(len(batch), device=batch.image.device).split(rows)]
        moments = [self._parts[2].moments(self.seen(part)) for part in parts]
        return torch.cat([m.z for m in moments]), torch.cat([m.z_cov for m in moments])

    def forward(self, batch: Batch) -> None:
        """Sample `z` and `contrast`."""
        with pyro.plate("particles", batch.size, subsample=batch.index, dim=-1):
            self._parts[2].sample(self.seen(batch))
