"""Amortised inference of z: a network from the images of a particle to q(z | images)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_cryo.data.batch import Batch
from pyro_cryo.model import CryoModel
from pyro_cryo.physics.fourier import HalfPlane, shift_phase
from pyro_cryo.physics.slices import add_to_grid, slice_coordinates
from pyro_cryo.volumes.conjugate import noise_sd
from pyro_cryo.volumes.mlp import ResidualLayer

Expectation = Callable[[Batch], tuple[Tensor, Tensor]]


class Encoder(nn.Module, ABC):
    """q(z | images) = Normal(loc, sd) of a particle, both from a multilayer perceptron of `features(batch)`.

    The model is kept aside, not registered: its parameters are its own.
    """

    def __init__(self, model: CryoModel, inputs: int, width: int = 256, layers: int = 3) -> None:
        super().__init__()
        self.half_precision = False
        self._model = (model,)
        zdim = model.zdim
        self.net = nn.Sequential(
            nn.Linear(inputs, width),
            nn.ReLU(),
            *[ResidualLayer(width) for _ in range(layers)],
            nn.Linear(width, 2 * zdim),
        )

    @property
    def model(self) -> CryoModel:
        """The model whose z this guesses."""
        return self._model[0]

    @abstractmethod
    def features(self, batch: Batch) -> Tensor:
        """What the network sees of each particle: (n, inputs)."""

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z | images): (n, zdim) each."""
        return self.moments_of(self.features(batch))

    def moments_of(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Those at features (*batch, inputs)."""
        with torch.autocast(features.device.type, torch.bfloat16, enabled=self.half_precision):
            out = self.net(features)
        loc, log_sd = out.float().chunk(2, -1)
        return loc, torch.exp(log_sd.clamp(-10, 3))

    def posterior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean (n, zdim) and covariance (n, zdim, zdim) of q(z | images)."""
        loc, sd = self.moments(batch)
        return loc, torch.diag_embed(sd.square())

    def distribution(self, batch: Batch) -> TorchDistributionMixin:
        """q(z | images), of batch shape (n,)."""
        loc, sd = self.moments(batch)
        return dist.Normal(loc, sd).to_event(1)

    def forward(self, batch: Batch) -> None:
        """Sample `z`."""
        q = self.distribution(batch)
        with pyro.plate("particles", batch.size, subsample=batch.shown, dim=-1), poutine.scale(scale=self.model.beta):
            pyro.sample("z", q)


class FrameEncoder(Encoder):
    """Sees the image from the molecule: what a consensus map leaves of it, laid back into the volume's frame.

    The residual of the consensus, whitened, its shift undone and weighted by the CTF, is added to a small 3-D Fourier
    grid at k @ R. A motion of the molecule then looks alike from every side, and the posterior mean of a linear model
    is a linear function of these numbers. All images of a particle are added to its grid, over the square root of how
    many they are, so that noise in it is as large as that of one. Needs known poses.

    expected: gives the images (B, P, 2) of the consensus and how large a slice's coefficients are, (P,)
    reach:    cycles a box up to which the image is seen
    """

    def __init__(
        self, model: CryoModel, expected: Expectation, reach: int = 10, width: int = 256, layers: int = 3
    ) -> None:
        reach = min(reach, model.box // 2 - 1)
        side = 2 * (reach + 1)
        super().__init__(model, side**2 * (side // 2 + 1) * 2, width, layers)
        self.side, self.count = side, HalfPlane.of(model.box).count(reach)
        self._expected = (expected,)

    def features(self, batch: Batch) -> Tensor:
        """The back-projected residual: (n, 2 x grid)."""
        low = batch.band(self.count)
        with torch.no_grad():
            consensus, amplitude = self._expected[0](low)
            residual = torch.view_as_complex((low.image - consensus).contiguous())
            sd = noise_sd(low, self.model.sigma)
            strength = low.ctf * amplitude / sd
            score = residual * shift_phase(low.half.k, low.translation, low.half.box).conj()
            score = score * (strength / (1 + strength.square()).sqrt() / sd)
            points = slice_coordinates(low.rotation, low.half.k, low.freq_scale)
            grid = torch.zeros(
                len(batch), self.side, self.side, self.side // 2 + 1, dtype=score.dtype, device=score.device
            )
            add_to_grid(grid, points, score, oversample=1)
            if batch.several:
                grid = batch.by_particle(grid) * batch.views.rsqrt()[:, None, None, None]
            return torch.view_as_real(grid).flatten(1)


class ImageEncoder(Encoder):
    """Sees the image as it is, whitened by the noise, up to `reach` cycles a box: cryoDRGN's encoder.

    It does not know from where an image was taken, so images of a particle cannot be added up: the network sees each,
    and q(z | images) is the product of what it says of them, 1 / sd^2 their sum and loc their mean by 1 / sd^2.
    """

    def __init__(self, model: CryoModel, reach: float | None = None, width: int = 256, layers: int = 3) -> None:
        count = HalfPlane.of(model.box).count(model.box / 2 if reach is None else reach)
        super().__init__(model, 2 * count, width, layers)
        self.count = count

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        loc, sd = super().moments(batch)
        if not batch.several:
            return loc, sd
        precision = batch.by_particle(sd.square().reciprocal())
        return batch.by_particle(loc / sd.square()) / precision, precision.rsqrt()

    def features(self, batch: Batch) -> Tensor:
        """The whitened coefficients of each image: (B, 2 x count)."""
        low = batch.band(self.count)
        return (low.image / noise_sd(low, self.model.sigma.detach())[..., None]).flatten(1)
