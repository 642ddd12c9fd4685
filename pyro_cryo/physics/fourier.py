"""Centred Fourier transforms, the half-plane that images live on, windows and crops.

Conventions. The box D is even and its centre is pixel D // 2. Images are y-x arrays, volumes z-y-x arrays,
coordinates are (x, y, z). Images are transformed unitarily; a volume is transformed with the factor 1 / D, so
that its central slice *is* the unitary transform of its projection (Fourier slice theorem, Bracewell 1956).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class HalfPlane:
    """One half of the Fourier disc of a real D x D image, sorted by |k|.

    A real image has X(-k) = conj X(k), so the independent numbers are the P, about pi / 8 D^2, complex values with
    kx > 0, or kx = 0 and ky > 0, inside |k| < D / 2, without DC. Sorting by |k| makes every band limit a prefix.

    box:   D, even
    k:     (P, 2) integer frequencies (kx, ky) in cycles a box, float32
    shell: (P,) round(|k|), 1 .. D / 2
    index: (P,) position in the flattened (D, D / 2 + 1) array of `torch.fft.rfft2`
    sign:  (P,) (-1)^(kx + ky), which moves the origin to the centre pixel
    """

    box: int
    k: Tensor
    shell: Tensor
    index: Tensor
    sign: Tensor

    @staticmethod
    def of(box: int, device: torch.device | str = "cpu") -> HalfPlane:
        """The half-plane of a box, made once for each box and device."""
        return _half_plane(box, str(torch.device(device)))

    def __len__(self) -> int:
        return len(self.shell)

    @property
    def shells(self) -> int:
        """Length of a table indexed by shell: D / 2 + 1 (row 0, DC, is never used)."""
        return self.box // 2 + 1

    def count(self, kmax: float) -> int:
        """How many coefficients have |k| <= kmax: the prefix that a band limit keeps."""
        return _count(self.box, float(kmax))


@lru_cache(maxsize=256)
def _count(box: int, kmax: float) -> int:
    return int((_half_plane(box, "cpu").k.square().sum(-1) <= kmax**2 + 1e-6).sum())


@lru_cache(maxsize=64)
def _half_plane(box: int, device: str) -> HalfPlane:
    if box % 2 or box < 4:
        raise ValueError(f"box {box} is not an even number of at least 4; crop or pad the images")
    half = box // 2
    ky, kx = torch.meshgrid(torch.arange(-half, half), torch.arange(half + 1), indexing="ij")
    square = kx**2 + ky**2
    keep = (square < half**2) & ((kx > 0) | (ky > 0))
    kx, ky, square = kx[keep], ky[keep], square[keep]
    order = torch.argsort(square, stable=True)
    kx, ky, square = kx[order], ky[order], square[order]
    return HalfPlane(
        box=box,
        k=torch.stack([kx, ky], -1).float().to(device),
        shell=square.double().sqrt().round().long().to(device),
        index=((ky % box) * (half + 1) + kx).to(device),
        sign=(1.0 - 2.0 * ((kx + ky) % 2)).float().to(device),
    )


def image_to_half_plane(image: Tensor, half: HalfPlane) -> Tensor:
    """Unitary transform of real images (*batch, D0, D0), cropped to the half-plane of D <= D0: (*batch, P, 2).

    Cropping keeps the lowest frequencies of the box and multiplies by D / D0, which is what makes the result the
    unitary transform of the band-limited image on D pixels of the same field of view.
    """
    box = image.shape[-1]
    if image.shape[-2] != box or box % 2 or box < half.box:
        raise ValueError(f"images of {tuple(image.shape[-2:])} do not crop to an even box of {half.box}")
    spectrum = torch.fft.rfft2(image, norm="ortho").flatten(-2)
    index = half.index if box == half.box else _index_in(half, box)
    values = spectrum[..., index] * (half.sign * (half.box / box))
    return torch.view_as_real(values)


def _index_in(half: HalfPlane, box: int) -> Tensor:
    kx, ky = half.k.long().unbind(-1)
    return (ky % box) * (box // 2 + 1) + kx


def half_plane_to_image(values: Tensor, half: HalfPlane) -> Tensor:
    """Inverse of `image_to_half_plane` on the band |k| < D / 2 without DC: (*batch, P, 2) to (*batch, D, D)."""
    box = half.box
    complex_values = torch.view_as_complex(values.contiguous()) * half.sign
    spectrum = values.new_zeros((*values.shape[:-2], box * (box // 2 + 1)), dtype=complex_values.dtype)
    spectrum[..., half.index] = complex_values
    spectrum = spectrum.unflatten(-1, (box, box // 2 + 1)).clone()
    # The kx = 0 column holds both halves in rfft's layout; a c2r transform reads ky < 0 there too.
    column = spectrum[..., 1 : box // 2, 0].conj()
    spectrum[..., box // 2 + 1 :, 0] = column.flip(-1)
    return torch.fft.irfft2(spectrum, s=(box, box), norm="ortho")


def volume_to_fourier(volume: Tensor) -> Tensor:
    """Centred transform (*batch, D, D, D) -> (*batch, D, D, D // 2 + 1), kz, ky centred; factor 1 / D."""
    spectrum = torch.fft.rfftn(torch.fft.ifftshift(volume, dim=(-3, -2, -1)), dim=(-3, -2, -1))
    return torch.fft.fftshift(spectrum, dim=(-3, -2)) / volume.shape[-1]


def fourier_to_volume(spectrum: Tensor) -> Tensor:
    """Inverse of `volume_to_fourier`."""
    box = spectrum.shape[-3]
    volume = torch.fft.irfftn(torch.fft.ifftshift(spectrum * box, dim=(-3, -2)), s=(box,) * 3, dim=(-3, -2, -1))
    return torch.fft.fftshift(volume, dim=(-3, -2, -1))


def resize(volume: Tensor, box: int) -> Tensor:
    """Maps (*batch, D, D, D) on `box` voxels of the same field of view, as images cropped or padded to it show them.

    The transform is cropped or padded and multiplied by box / D, like that of images (`image_to_half_plane`).
    """
    old = volume.shape[-1]
    if box == old:
        return volume
    if not volume.numel():
        return volume.new_zeros(*volume.shape[:-3], box, box, box)
    spectrum, n = volume_to_fourier(volume), min(box, old)
    a, b = old // 2 - n // 2, box // 2 - n // 2
    new = spectrum.new_zeros(*volume.shape[:-3], box, box, box // 2 + 1)
    new[..., b : b + n, b : b + n, : n // 2 + 1] = spectrum[..., a : a + n, a : a + n, : n // 2 + 1]
    return fourier_to_volume(new) * (box / old)


def radius(box: int, dims: int, device: torch.device | str = "cpu") -> Tensor:
    """Distance from the centre pixel, in pixels: (D, D) or (D, D, D)."""
    square = (torch.arange(box, device=device, dtype=torch.float32) - box // 2).square()
    total = square
    for _ in range(dims - 1):
        total = total[..., None] + square
    return total.sqrt()


def half_radius(box: int, device: torch.device | str = "cpu") -> Tensor:
    """|k| in cycles a box on the uncentred rfftn layout of a volume: (D, D, D // 2 + 1)."""
    full = torch.fft.fftfreq(box, 1 / box, device=device)
    half = torch.fft.rfftfreq(box, 1 / box, device=device)
    return (full[:, None, None] ** 2 + full[None, :, None] ** 2 + half**2).sqrt()


def soft_disc(box: int, radius_px: float, edge_px: float, dims: int = 2, device: torch.device | str = "cpu") -> Tensor:
    """1 inside radius_px, 0 beyond radius_px + edge_px, a raised cosine between: the soft window."""
    if edge_px <= 0:
        return (radius(box, dims, device) <= radius_px).float()
    ramp = radius(box, dims, device).sub_(radius_px).div_(edge_px).clamp_(0, 1)
    return ramp.mul_(math.pi).cos_().add_(1).mul_(0.5)


def shift_phase(k: Tensor, translation_px: Tensor, box: int) -> Tensor:
    """S(t)(k) = exp(-2 pi i k.t / D), what moves an image by t: (P, 2), (*batch, 2) -> (*batch, P) complex."""
    angle = (-2 * math.pi / box) * (translation_px @ k.T)
    return torch.polar(torch.ones_like(angle), angle)


def flip_hand(volume: Tensor) -> Tensor:
    """Mirror (*batch, D, D, D) in z about the centre voxel: the other hand.

    The centre D // 2 stays in place, which takes a roll by one after the flip of an even box. A pose R of the old map
    is M R M of the new one, with M = diag(1, 1, -1).
    """
    return volume.flip(-3).roll(1, -3)


def displacement_px(volume: Tensor, reference: Tensor) -> Tensor:
    """How far a map lies from another, both (D, D, D) z-y-x: (3,) voxels along x, y, z, at most D / 2 each.

    Where their cross-correlation, over all circular shifts, is largest; between voxels by a parabola along each axis.
    """
    spectrum = torch.fft.rfftn(volume) * torch.fft.rfftn(reference).conj()
    correlation = torch.fft.irfftn(spectrum, s=volume.shape)
    peak = torch.unravel_index(correlation.argmax(), volume.shape)
    before, after = (torch.stack([correlation.roll(step, axis)[peak] for axis in range(3)]) for step in (1, -1))
    place = torch.stack(peak) + 0.5 * (after - before) / (2 * correlation[peak] - before - after)
    half = volume.shape[-1] / 2
    return ((place + half) % (2 * half) - half).flip(0)
