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
    """q(z, contrast | images) = p(z, contrast | images), given the model's maps; it has no parameters of its own.

    But for the contrast of a linear family, whose posterior is taken for the Normal with its moments.
    """

    def __init__(self, model: CryoModel, basis: VoxelBasis, coefficients: Coefficients) -> None:
        super().__init__()
        self._parts = (model, basis, coefficients)

    @property
    def family(self) -> tuple[VoxelBasis, Coefficients]:
        """The maps and the coefficients that combine them."""
        return self._parts[1:]

    def seen(self, batch: Batch) -> Seen:
        """What the images of each particle say about its coefficients (n,), within the band of the basis."""
        model, basis, _ = self._parts
        low, sigma = batch.band(basis.count), model.sigma.detach()
        threads = torch.get_num_threads() if sigma.device.type == "cpu" else 1  # each of a CPU has a cache
        at_once = threads * images_at_once(basis.count, sigma.device)
        rows = torch.arange(len(batch), device=sigma.device).split(at_once)
        parts = [low] if len(rows) == 1 else (low[part] for part in rows)
        said = (Projected.of(part, basis.grid(), sigma, basis.box / basis.side).seen() for part in parts)
        return Seen.of(said).by_particle(batch)

    def posterior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean (n, zdim) and covariance (n, zdim, zdim) of z."""
        moments = self._parts[2].moments(self.seen(batch))
        return moments.z, moments.z_cov

    def forward(self, batch: Batch) -> None:
        """Sample `z` and `contrast`."""
        with pyro.plate("particles", batch.size, subsample=batch.shown, dim=-1):
            self._parts[2].sample(self.seen(batch))
