"""A coordinate network: V(k | z) as a multilayer perceptron of the frequency and z (cryoDRGN).

Hermitian by construction: a point and its mirror are the same point of a half space, read as conjugates, so that two
outputs (real, imaginary) at one point of the half-plane say what a Hartley network says with two evaluations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyro_cryo.physics.fourier import fourier_to_volume


class GaussianEncoding(nn.Module):
    """sin and cos of 2 pi k.r for random points r of real space, r ~ Normal(0, (spread D)^2) in each axis.

    A map is a sum of such waves, weighted, so its transform starts out as a linear function of these features.
    Source: Tancik et al., NeurIPS 2020; cryoDRGN's `gaussian` encoding has a spread of 0.04.
    """

    points: Tensor

    def __init__(self, count: int, spread: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("points", spread * torch.randn(3, count, generator=generator))
        self.features = 2 * count

    def forward(self, k: Tensor) -> Tensor:
        """(*batch, 3) in cycles a box -> (*batch, features)."""
        phase = (2 * math.pi) * (k @ self.points)
        return torch.cat([phase.sin(), phase.cos()], -1)


class PositionalEncoding(nn.Module):
    """The paper's encoding: sin, cos of k_j D pi (2 / D)^(2 i / D), i = 1 .. D / 2, k_j in cycles a pixel.

    Source: Zhong et al., ICLR 2020, section 3.2.
    """

    frequencies: Tensor

    def __init__(self, box: int) -> None:
        super().__init__()
        i = torch.arange(1, box // 2 + 1)
        self.register_buffer("frequencies", math.pi * (2 / box) ** (2 * i / box))
        self.features = 3 * box

    def forward(self, k: Tensor) -> Tensor:
        """(*batch, 3) in cycles a box -> (*batch, 3 D)."""
        phase = (k[..., None] * self.frequencies).flatten(-2)
        return torch.cat([phase.sin(), phase.cos()], -1)


class ResidualLayer(nn.Module):
    """relu(x + W x + b)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.linear(x))


class CoordinateMLP(nn.Module):
    """V(k | z) = amplitude(|k|) net(encoding(k), z) up to |k| = kmax, and 0 beyond.

    amplitude (D / 2 + 1,) is a buffer: how large the coefficients of each shell are expected to be, so that the
    network's own outputs are of order one at every frequency.
    """

    amplitude: Tensor

    def __init__(
        self,
        box: int,
        zdim: int,
        width: int = 256,
        layers: int = 3,
        encoding: nn.Module | None = None,
        kmax: float | None = None,
    ) -> None:
        super().__init__()
        self.box, self.zdim, self.half_precision = box, zdim, False
        self.kmax = box / 2 if kmax is None else kmax
        self.encoding = GaussianEncoding(3 * box // 2) if encoding is None else encoding
        features: int = self.encoding.features  # type: ignore[assignment]
        self.first = nn.Linear(features, width)
        self.latent = nn.Linear(zdim, width, bias=False)
        self.hidden = nn.Sequential(*[ResidualLayer(width) for _ in range(layers)])
        self.last = nn.Linear(width, 2)
        self.register_buffer("amplitude", torch.ones(box // 2 + 1))

    def get_extra_state(self) -> dict[str, float]:
        """The band limit, kept with the parameters since the data may have set it."""
        return {"kmax": self.kmax}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.kmax = state["kmax"]

    def forward(self, k: Tensor, z: Tensor) -> Tensor:
        """The transform at points (*batch, P, 3) in cycles a box for z (*batch, zdim): (*batch, P, 2)."""
        mirrored = in_lower_half(k)[..., None]
        point = torch.where(mirrored, -k, k)
        features = self.encoding(point)
        with torch.autocast(k.device.type, torch.bfloat16, enabled=self.half_precision):
            hidden = torch.relu(self.first(features) + self.latent(z)[..., None, :])
            value = self.last(self.hidden(hidden))
        value = value.float() * self._amplitude_at(k)
        conjugate = torch.cat([value[..., :1], -value[..., 1:]], -1)
        return torch.where(mirrored, conjugate, value)

    def _amplitude_at(self, k: Tensor) -> Tensor:
        radius = k.norm(dim=-1).clamp_max(self.box / 2)
        low = radius.long().clamp_max(self.box // 2 - 1)
        step = radius - low
        table = self.amplitude
        return ((table[low] * (1 - step) + table[low + 1] * step) * (radius <= self.kmax))[..., None]

    def map(self, z: Tensor) -> Tensor:
        """The maps in real space at z (*batch, zdim): (*batch, D, D, D)."""
        return half_space_map(self, z, self.box, self.kmax)


def in_lower_half(k: Tensor) -> Tensor:
    """Whether the first coordinate of k (*batch, 3) that is not zero is negative: one of each pair k, -k."""
    x, y, z = k.unbind(-1)
    leading = torch.where(x != 0, x, torch.where(y != 0, y, z))
    return leading < 0


def half_space_map(volume: nn.Module, z: Tensor, box: int, kmax: float, chunk: int = 16384) -> Tensor:
    """Evaluate a volume's transform on the lattice up to kmax, in real space: (*batch, zdim) -> (*batch, D, D, D)."""
    half = box // 2
    axis = torch.arange(-half, half, device=z.device)
    kz, ky, kx = torch.meshgrid(axis, axis, torch.arange(half + 1, device=z.device), indexing="ij")
    lattice = torch.stack([kx, ky, kz], -1).float()
    inside = lattice.norm(dim=-1) <= min(kmax, half - 1e-3)
    points = lattice[inside]
    spectrum = torch.zeros(*z.shape[:-1], *inside.shape, dtype=torch.complex64, device=z.device)
    flat = [
        torch.view_as_complex(volume(p.expand(*z.shape[:-1], *p.shape), z).contiguous()) for p in points.split(chunk)
    ]
    spectrum[..., inside] = torch.cat(flat, -1)
    return fourier_to_volume(spectrum)
