"""The exact posterior of z as a guide, for models whose images are linear in coefficients of a basis."""

from __future__ import annotations

import pyro
from torch import Tensor, nn

from pyro_cryo.data.batch import Batch
from pyro_cryo.guides.coefficients import Coefficients, Projected, Seen
from pyro_cryo.model import CryoModel
from pyro_cryo.volumes.basis import VoxelBasis


class ExactGuide(nn.Module):
    """q(z, contrast | image) = p(z, contrast | image), given the model's maps. It has no parameters of its own."""

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
        moments = self._parts[2].moments(self.seen(batch))
        return moments.z, moments.z_cov

    def forward(self, batch: Batch) -> None:
        """Sample `z` and `contrast`."""
        with pyro.plate("particles", batch.size, subsample=batch.index, dim=-1):
            self._parts[2].sample(self.seen(batch))
