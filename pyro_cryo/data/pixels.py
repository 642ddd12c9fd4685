"""From stored pixels to coefficients on the half-plane."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pyro_cryo.physics.fourier import HalfPlane, image_to_half_plane, radius, soft_disc

CACHE_BYTES = 1 << 20
BACKGROUND_RADIUS = 0.9  # of half the box: normalisation looks at the pixels outside


@dataclass(frozen=True)
class Pixels:
    """Stored images of B rows, one part a box size: positions (n,) long and images (n, D0, D0) float32, on the CPU."""

    parts: tuple[tuple[Tensor, Tensor], ...]

    def __getitem__(self, window: slice) -> Pixels:
        """Images of the positions [start, stop), counted from 0 again."""
        parts = []
        for position, images in self.parts:
            if len(self.parts) == 1:
                parts.append((position[window] - window.start, images[window]))
                continue
            inside = (position >= window.start) & (position < window.stop)
            if bool(inside.any()):
                parts.append((position[inside] - window.start, images[inside]))
        return Pixels(tuple(parts))

    def to_half_plane(self, half: HalfPlane, factor: Tensor, normalize: bool, window: float | None) -> Tensor:
        """Coefficients (B, P, 2) on the device of `half`, times `factor` (B,)."""
        device = half.k.device
        out = torch.empty(len(factor), len(half), 2, device=device)
        for position, images in self.parts:
            sent = images.to(device, non_blocking=True)
            for chunk in chunks(len(images), images.shape[-1] ** 2, device):
                rows = chunk if len(self.parts) == 1 else position[chunk].to(device, non_blocking=True)
                out[rows] = _transform(sent[chunk], half, factor[rows], normalize, window)
        return out


def chunks(count: int, floats: int, device: torch.device) -> list[slice]:
    """Rows of `floats` numbers each in pieces that stay in a CPU's cache; one piece elsewhere."""
    size = max(1, CACHE_BYTES // (4 * floats)) if device.type == "cpu" else count
    return [slice(first, first + size) for first in range(0, count, size)]


def _transform(images: Tensor, half: HalfPlane, factor: Tensor, normalize: bool, window: float | None) -> Tensor:
    box = images.shape[-1]
    if box % 2:  # the centre pixel D0 // 2 is the same without the last row and column
        images = images[:, : box - 1, : box - 1]
    if normalize:
        images = _normalized(images)
    if window is not None:
        images = _windowed(images, window)
    return image_to_half_plane(images, half).mul_(factor[:, None, None])


def _normalized(images: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 of the pixels outside a circle."""
    box = images.shape[-1]
    background = images.flatten(-2)[:, _outside(box, str(images.device))]
    sd, mean = torch.std_mean(background, dim=-1)
    sd = torch.where(sd > 0, sd, torch.ones_like(sd))
    return (images - mean[:, None, None]) / sd[:, None, None]


@lru_cache(maxsize=16)
def _outside(box: int, device: str) -> Tensor:
    return (radius(box, 2) > BACKGROUND_RADIUS * box / 2).flatten().nonzero().squeeze(-1).to(device)


def _windowed(images: Tensor, window: float) -> Tensor:
    """Times the soft disc. The mean inside goes first, else the disc's own transform leaks into the lowest shells."""
    disc = _disc(images.shape[-1], window, str(images.device))
    mean = (images * disc).sum((-2, -1), keepdim=True) / disc.sum()
    return (images - mean) * disc


def window_power(box: int, window: float | None) -> float:
    """Mean of the squared window over the box; 1 without one."""
    return 1.0 if window is None else float(_disc(box, window, "cpu").square().mean())


@lru_cache(maxsize=16)
def _disc(box: int, window: float, device: str) -> Tensor:
    """1 inside `window` times half the box, 0 at its edge."""
    return soft_disc(box, window * box / 2, (1 - window) * box / 2, device=device)
