"""Fourier transforms of weighted points: their projections and their maps, by splatting on an oversampled grid.

The transform of points x_j of mass w_j is sum_j w_j exp(-2 pi i k.x_j / D). Each point is shared out among the cells
about it, linearly in each axis, on a grid `oversample` times finer than the pixels; a fast Fourier transform gives all
integer k, and division by the transform of that share, sinc(k / n)^2 an axis, undoes it (gridding, Jackson et al., IEEE
TMI 1991). Positions are in pixels from the centre of the box, (x, y[, z]); the box is periodic, which integer
frequencies cannot tell. Everything is differentiable in positions and weights.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor


def splat(position: Tensor, weight: Tensor, n: int) -> Tensor:
    """Share points (*batch, N, d), in cells from the origin, of weight (*batch, N) out on a periodic grid.

    Returns (*batch, n, ... n) with d axes, the last of them x. Each point goes to the 2^d cells about it, linearly.
    """
    batch, (count, dims) = position.shape[:-2], position.shape[-2:]
    points, share = position.reshape(-1, count, dims), weight.expand(position.shape[:-1]).reshape(-1, count)
    low = points.detach().floor()
    fraction, cell = (points - low).unbind(-1), low.long().unbind(-1)
    grids = torch.arange(len(points), device=position.device)[:, None] * n**dims
    flat = share.new_zeros(len(points) * n**dims)
    for corner in product((0, 1), repeat=dims):
        index, part = grids, share
        for axis, step in enumerate(corner):
            index = index + (cell[axis] + step) % n * n**axis
            part = part * (fraction[axis] if step else 1 - fraction[axis])
        flat.index_add_(0, index.flatten(), part.flatten())
    return flat.view(*batch, *[n] * dims)


def project_points(position_px: Tensor, weight: Tensor, k: Tensor, box: int, oversample: int = 2) -> Tensor:
    """Unitary transform of points (*batch, N, 2) of mass (*batch, N) at integer k (P, 2): complex (*batch, P).

    k is in cycles a box, kx >= 0 as on the half-plane. Points that lie at random are seen to within 2% at half Nyquist.
    """
    n = oversample * box
    spectrum = torch.fft.rfft2(splat(position_px * oversample, weight, n)).flatten(-2)
    kx, ky = k.long().unbind(-1)
    return spectrum[..., ky % n * (n // 2 + 1) + kx] / (torch.sinc(k / n).square().prod(-1) * box)


def transform_points(position_px: Tensor, weight: Tensor, box: int, oversample: int = 2) -> Tensor:
    """Points (*batch, N, 3) of mass (*batch, N) as `volume_to_fourier` has a map: (*batch, D, D, D // 2 + 1)."""
    n = oversample * box
    spectrum = torch.fft.rfftn(splat(position_px * oversample, weight, n), dim=(-3, -2, -1))
    full = torch.arange(-(box // 2), box // 2, device=weight.device)
    half = torch.arange(box // 2 + 1, device=weight.device)
    share = [torch.sinc(axis / n).square() for axis in (full, full, half)]
    kept = spectrum[..., full % n, :, :][..., full % n, :][..., half]
    return kept / (share[0][:, None, None] * share[1][:, None] * share[2] * box)
