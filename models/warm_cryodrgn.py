"""cryoDRGN begun at a solved linear subspace: the network adds what is not linear in z. Poses are known."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.coefficients import LinearCoefficients
from pyro_cryo.guides.encoder import FrameEncoder
from pyro_cryo.guides.exact import ExactGuide
from pyro_cryo.inference.family import FamilySolver, motion_side, with_band
from pyro_cryo.inference.reconstruct import Reconstruction
from pyro_cryo.model import Density
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.physics.fourier import resize
from pyro_cryo.progress import Progress
from pyro_cryo.volumes.basis import VoxelBasis
from pyro_cryo.volumes.conjugate import shell_power


class WarmCryoDRGN(CryoDRGN):
    """V(k | z) = V0(k) + sum_j z_j U_j(k) + net(k, z), z ~ Normal(0, I).

    V0 and U_j are the images' linear subspace, solved for with contrasts of 1. The network's last layer begins at zero,
    and so does what the encoder adds to the exact posterior of the linear model; U_j that the images do not support are
    zero. Arguments as in CryoDRGN.
    """

    epochs = 5
    basis: VoxelBasis

    def __init__(self, box: int, zdim: int = 8, **arguments: Any) -> None:
        super().__init__(box, zdim, **arguments)
        self.basis = VoxelBasis(box, 1 + zdim)
        self.linear = LinearCoefficients(0.0)
        _silence(self.volume.last)

    def density(self) -> Density:
        def at(points: Tensor, z: Tensor | None) -> Tensor:
            assert z is not None
            linear, count = self.basis(points, _moving(z)), self.reached(self.volume.kmax)
            bent = linear[..., :count, :] + self.volume(points[..., :count, :], z)
            return torch.cat([bent, linear[..., count:, :]], -2)

        return at

    @property
    def reach(self) -> float:
        return max(self.volume.kmax, self.basis.side / 2)

    def make_guide(self) -> nn.Module:
        return CorrectedPosterior(self)

    def begin(self, start: Reconstruction, particles: Particles, seed: int, progress: Progress) -> None:
        super().begin(start, particles, seed, progress)
        generator = torch.Generator().manual_seed(seed)
        solver = FamilySolver(particles, start, self.symmetry, None, generator, progress)
        family = solver.subspace(self.zdim, motion_side(start, self.kmax), 0.0)
        family.warn_if_still()
        self.basis.set(torch.cat([family.maps, family.maps.new_zeros(self.zdim - family.zdim, *family.maps.shape[1:])]))
        moving = self.zdim * shell_power(resize(self.basis.components[1:], self.box), self.box // 2 + 1)
        self.volume.amplitude.copy_((self.box * moving).sqrt())
        self.consensus.set(with_band(start.volume, family.maps[0]))
        self.log_sigma.data.copy_(family.sigma.log())

    def map(self, z: Tensor | None = None) -> Tensor:
        assert z is not None
        return super().map(z) + self.mask * self.basis.map(_moving(z))


class CorrectedPosterior(FrameEncoder):
    """q(z | image) = Normal(m + L delta, L diag(s^2) L'): m, L L' mean and covariance of the linear model's posterior.

    delta and log s come from the network and begin at zero.
    """

    def __init__(self, model: WarmCryoDRGN) -> None:
        super().__init__(model, model.expected, width=model.width, layers=model.layers)
        self.exact = ExactGuide(model, model.basis, model.linear)
        _silence(self.net[-1])

    def corrected(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean (B, zdim) and Cholesky factor (B, zdim, zdim)."""
        with torch.no_grad():
            mean, covariance = self.exact.posterior(batch)
            root = torch.linalg.cholesky(covariance)
        delta, sd = self.moments(batch)
        return mean + (root @ delta[..., None])[..., 0], root * sd[..., None, :]

    def posterior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        mean, root = self.corrected(batch)
        return mean, root @ root.mT

    def distribution(self, batch: Batch) -> TorchDistributionMixin:
        mean, root = self.corrected(batch)
        return dist.MultivariateNormal(mean, scale_tril=root)


def _silence(last: nn.Module) -> None:
    """Let a layer's outputs begin at zero."""
    for parameter in last.parameters():
        nn.init.zeros_(parameter)


def _moving(z: Tensor) -> Tensor:
    """Coefficients (*batch, 1 + zdim) of what a basis adds to a consensus that has its first map already."""
    return torch.cat([torch.zeros_like(z[..., :1]), z], -1)
