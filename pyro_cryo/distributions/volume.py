"""A Gaussian prior on maps, with a variance for every Fourier shell."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from pyro_cryo.physics.fourier import half_radius


class ShellNormal(TorchDistribution):
    """Stationary Gaussian field on a cube: u = loc + F^-1 tau(|k|) F e with e white, variance tau^2 a coefficient.

    loc: (D, D, D) mean, default 0.
    tau: (D / 2 + 1,) standard deviation a voxel that each shell's coefficients would have alone; corners of the cube
    of frequencies, |k| > D / 2, share the last. The event is a map (D, D, D). Source: the prior of Scheres,
    J. Struct. Biol. 180 (2012), written on voxels.
    """

    arg_constraints = {"tau": constraints.positive}  # noqa: RUF012
    support = constraints.independent(constraints.real, 3)
    has_rsample = True

    def __init__(self, tau: Tensor, loc: Tensor | None = None, validate_args: bool | None = None) -> None:
        self.tau = tau
        self.loc = tau.new_zeros(()) if loc is None else loc
        self.box = 2 * (tau.shape[-1] - 1)
        super().__init__(torch.Size(), torch.Size((self.box,) * 3), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: object = None) -> ShellNormal:
        """Only the trivial expansion: a map is one draw, outside every plate."""
        if tuple(batch_shape):
            raise ValueError(f"batch shape {tuple(batch_shape)} given; the prior of a map has none")
        return self

    @property
    def mean(self) -> Tensor:
        """(D, D, D)"""
        return self.loc.expand(self.event_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Maps (*sample_shape, D, D, D)."""
        white = torch.randn(*sample_shape, *self.event_shape, dtype=self.tau.dtype, device=self.tau.device)
        return self.loc + filter_shells(white, self.tau)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of maps (*batch, D, D, D) with respect to voxels: (*batch,)."""
        tau = shell_values(self.tau, self.box)
        white = multiply_spectrum(value - self.loc, 1 / tau)
        twice = torch.full_like(tau, 2.0)  # rfft stores one of each pair k, -k ...
        twice[..., 0] = twice[..., -1] = 1.0  # ... but for kx = 0 and kx = D / 2, where it stores both
        log_det = (twice * tau.log()).sum()
        return -0.5 * white.square().sum((-3, -2, -1)) - log_det - 0.5 * self.box**3 * math.log(2 * math.pi)


def shell_values(table: Tensor, box: int) -> Tensor:
    """A table by shell (L,), spread linearly over the rfftn layout of a cube: (box, box, box / 2 + 1).

    A cube of other size than 2 (L - 1) has the same frequencies up to Nyquist: its |k| is scaled.
    """
    last = table.shape[-1] - 1
    position = (half_radius(box, table.device) * (2 * last / box)).clamp_max(last)
    low = position.floor().long().clamp_max(last - 1)
    fraction = position - low
    return table[low] * (1 - fraction) + table[low + 1] * fraction


def filter_shells(volume: Tensor, table: Tensor) -> Tensor:
    """Multiply every Fourier coefficient of maps (*batch, b, b, b) by its shell's value, table (L,)."""
    return multiply_spectrum(volume, shell_values(table, volume.shape[-1]))


def multiply_spectrum(volume: Tensor, factor: Tensor) -> Tensor:
    """Multiply the transform of maps (*batch, b, b, b) by a factor on the rfftn layout (b, b, b / 2 + 1)."""
    spectrum = torch.fft.rfftn(volume, dim=(-3, -2, -1)) * factor
    return torch.fft.irfftn(spectrum, s=volume.shape[-3:], dim=(-3, -2, -1))
