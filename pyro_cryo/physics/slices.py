"""Central slices of a volume by trilinear interpolation of its oversampled Fourier grid, and the adjoint.

The Fourier transform of a D^3 volume is sampled `oversample` times finer by zero padding to n = oversample D, and
read between its samples by trilinear interpolation. Interpolating in Fourier space multiplies the volume by
sinc(x / n)^2 sinc(y / n)^2 sinc(z / n)^2; dividing by that first (gridding correction, Jackson et al., IEEE TMI
1991) leaves an error of 1.3% inside half Nyquist for an object that fills 70% of the box, at oversample = 2.

A grid is the rfftn layout (n, n, n / 2 + 1), z-y-x, not centred, with the phase origin at the centre voxel; a
trailing channel axis carries the components of a basis. Points with kx < 0 are read at -k and conjugated.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

CONVOLVED_BYTES = 2 << 20  # of the padded columns that a CPU convolves at a time


def slice_coordinates(rotation: Tensor, k: Tensor, scale: Tensor | None = None) -> Tensor:
    """Where a view's frequencies lie in the volume, k @ R: (*batch, 3, 3), (P, 2) -> (*batch, P, 3), cycles a box.

    scale (*batch,) multiplies the coordinates: (D apix) of the volume over (D apix) of the image.
    """
    coordinates = k @ rotation[..., :2, :]
    return coordinates if scale is None else coordinates * scale[..., None, None]


def fourier_grid(volume: Tensor, oversample: int = 2) -> Tensor:
    """The oversampled grid of real volumes: (D, D, D) -> (n, n, n / 2 + 1) or (C, D, D, D) -> (n, n, n / 2 + 1, C)."""
    grid = _grids(volume, oversample)
    return grid if volume.dim() == 3 else grid.movedim(0, -1).contiguous()


def channel_grid(volumes: Tensor, oversample: int = 2) -> Tensor:
    """The same of C volumes, the real parts of all beside each other: (C, D, D, D) -> (n, n, n / 2 + 1, 2, C) real."""
    return torch.view_as_real(_grids(volumes, oversample)).movedim(0, -1).contiguous()


def _grids(volume: Tensor, oversample: int) -> Tensor:
    """(*batch, D, D, D) -> (*batch, n, n, n / 2 + 1)."""
    box = volume.shape[-1]
    n = oversample * box
    corrected = volume / gridding_sinc(box, n, volume.device)
    return torch.fft.rfftn(_pad_at_origin(corrected, n), dim=(-3, -2, -1)) / box


def slope_grid(volume: Tensor, oversample: int = 2) -> Tensor:
    """The oversampled grids of a map V and of x V, y V, z V, voxels from the centre: (D, D, D) -> (n, n, n / 2 + 1, 4).

    -2 pi i / D times the last three, once they are read, is the gradient of the first by kx, ky, kz in cycles a box.
    """
    axis = torch.arange(volume.shape[-1], device=volume.device) - volume.shape[-1] // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    return fourier_grid(torch.stack([volume, x * volume, y * volume, z * volume]), oversample)


def fourier_grid_adjoint(grid: Tensor, box: int) -> Tensor:
    """The adjoint of `fourier_grid` under Re <., .>: (n, n, n / 2 + 1) -> (D, D, D)."""
    n = grid.shape[0]
    # irfftn counts the entries with 0 < kx < n / 2 twice; the adjoint counts each stored entry once.
    weight = torch.full((n // 2 + 1,), 0.5, device=grid.device)
    weight[0] = weight[-1] = 1.0
    volume = torch.fft.irfftn(grid * weight, s=(n, n, n)) * (n**3 / box)
    return _crop_at_origin(volume, box) / gridding_sinc(box, n, grid.device)


def read_grid(grid: Tensor, coordinates: Tensor, oversample: int = 2) -> Tensor:
    """The grid at points (*batch, M, 3) in cycles a box: complex (*batch, M), or (*batch, M, C) with channels.

    Points beyond the grid's own band read as zero. Differentiable in the grid and the coordinates.
    """
    flat = grid.flatten(0, 2)
    points = coordinates.reshape(-1, 3)
    value = flat.new_zeros((len(points), *flat.shape[1:]))
    flip = points[:, 0] < 0
    for index, weight in _corners(points, flip, grid.shape[0], oversample):
        value = value + flat.index_select(0, index) * (weight[:, None] if flat.dim() == 2 else weight)
    value = torch.where(flip[:, None] if flat.dim() == 2 else flip, value.conj(), value)
    return value.reshape(*coordinates.shape[:-1], *flat.shape[1:])


def add_to_grid(
    grid: Tensor,
    coordinates: Tensor,
    value: Tensor,
    oversample: int = 2,
    also: tuple[Tensor, Tensor] | None = None,
) -> None:
    """The adjoint of `read_grid`, added in place: complex values (*batch, M) at points (*batch, M, 3).

    A real grid takes real values: what each point weighs. A grid (B, n, n, n / 2 + 1) takes the points of each of the
    B elements of a batch to its own. `also` is another grid of that shape and its values at the same points.
    """
    flat, points = grid.view(-1), coordinates.reshape(-1, 3)
    own = None
    if grid.dim() == 4:
        each = torch.arange(len(grid), device=grid.device) * grid[0].numel()
        own = each.repeat_interleave(len(points) // len(grid))
    flip = points[:, 0] < 0
    pairs = [(flat, value.reshape(-1))] + ([] if also is None else [(also[0].view(-1), also[1].reshape(-1))])
    pairs = [(g, torch.where(flip, v.conj(), v) if v.is_complex() else v) for g, v in pairs]
    for index, weight in _corners(points, flip, grid.shape[-3], oversample):
        for target, values in pairs:
            target.index_add_(0, index if own is None else index + own, values * weight)


@dataclass(frozen=True)
class GridPoints:
    """Where M points lie on a grid, worked out once for many maps: the basis of a family.

    cell, weight: (M, 8) the grid points about each point
    mirrored:     (M,) which points are read at -k and conjugated; None where none is
    """

    cell: Tensor
    weight: Tensor
    mirrored: Tensor | None

    @staticmethod
    def of(coordinates: Tensor, n: int, oversample: int = 2) -> GridPoints:
        """Points (*batch, M, 3) in cycles a box on grids (n, n, n / 2 + 1)."""
        points = coordinates.reshape(-1, 3)
        mirrored = points[:, 0] < 0
        cell = weight = None
        for number, (index, share) in enumerate(_corners(points, mirrored, n, oversample)):
            if cell is None or weight is None:
                cell, weight = index.new_empty(len(points), 8), share.new_empty(len(points), 8)
            cell[:, number], weight[:, number] = index, share
        assert cell is not None
        assert weight is not None
        return GridPoints(cell, weight, mirrored)

    def read(self, grid: Tensor) -> Tensor:
        """`read_grid` of channels, a grid (n, n, n / 2 + 1, C): complex (M, C)."""
        values = torch.view_as_complex(self._sums(torch.view_as_real(grid), self.weight))
        return values if self.mirrored is None else torch.where(self.mirrored[:, None], values.conj(), values)

    def columns(self, grid: Tensor, factor: Tensor | None = None) -> Tensor:
        """A `channel_grid` of C maps at the points, times a factor (M,): real parts, imaginary parts (M, 2, C).

        As they stand on the grid: `mirrored` ones are the conjugates of what is at the points. Products with values
        that are conjugated there too (`as_on_grid`) are the same.
        """
        return self._sums(grid, self.weight if factor is None else self.weight * factor[:, None])

    def as_on_grid(self, values: Tensor) -> Tensor:
        """Complex values (M,) at the points, conjugated where these are mirrored; and back."""
        return values if self.mirrored is None else torch.where(self.mirrored, values.conj(), values)

    def _sums(self, grid: Tensor, weight: Tensor) -> Tensor:
        """Weighted sums over each point's cells of a real grid (n, n, n / 2 + 1, *event): (M, *event)."""
        # That is what an embedding bag is, and its kernel is several times faster than gathers.
        rows = grid.flatten(0, 2)
        sums = torch.nn.functional.embedding_bag(self.cell, rows.flatten(1), per_sample_weights=weight, mode="sum")
        return sums.unflatten(1, rows.shape[1:])

    def add(self, grids: Tensor, values: Tensor) -> None:
        """`add_to_grid` of complex or real values (C, M) to grids (C, n, n, n / 2 + 1), in place."""
        if values.is_complex():
            values = self.as_on_grid(values)
        flat, cells = grids.flatten(1), self._cells

        def one(channel: int) -> None:
            flat[channel].scatter_add_(0, cells, (values[channel][:, None] * self.weight).flatten())

        if grids.device.type != "cpu" or len(grids) == 1:
            for channel in range(len(grids)):
                one(channel)
            return
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # scattering is serial: a channel a thread
            list(pool.map(one, range(len(grids))))

    @cached_property
    def _cells(self) -> Tensor:
        """(8 M,) point by point: half of its corners are neighbours on the grid."""
        return self.cell.flatten().long()


def _corners(points: Tensor, flip: Tensor, n: int, oversample: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Flat index and weight of the eight grid points about each point."""
    row = n // 2 + 1
    index = torch.int32 if n * n * row < 2**31 else torch.int64
    position = torch.where(flip, -points.T, points.T) * oversample  # a coordinate a row: each is read as one run
    base = position.detach().floor()
    fx, fy, fz = position - base
    inside = (position.detach().abs() < n // 2).all(0)
    x, y, z = base.clamp_(-(n // 2), n // 2 - 1).to(index)
    x = x.clamp_min(0)
    ys, zs = _wrapped(y, n, row), _wrapped(z, n, n * row)
    wy, wz = (1 - fy, fy), ((1 - fz) * inside, fz * inside)
    for i in (0, 1):
        for j in (0, 1):
            near = zs[i] + ys[j] + x
            both = wz[i] * wy[j]
            far = both * fx
            yield near, both - far
            yield near + 1, far


def _wrapped(low: Tensor, n: int, stride: int) -> tuple[Tensor, Tensor]:
    """Where frequencies `low` and low + 1 stand along an axis of n, in FFT order."""
    first = torch.where(low < 0, low + n, low)
    return first * stride, torch.where(first == n - 1, 0, first + 1) * stride


def gridding_sinc(box: int, n: int, device: torch.device | str = "cpu") -> Tensor:
    """What trilinear interpolation on an n grid multiplies a volume by: (D, D, D), centred."""
    sinc = torch.sinc((torch.arange(box, device=device) - box // 2) / n) ** 2
    return sinc[:, None, None] * sinc[:, None] * sinc


def toeplitz_kernel(weight: Tensor, box: int) -> Tensor:
    """K with (A^H W A V)(r) = sum_r' K(r - r') V(r'), from the gridded weights of all points (n, n, n / 2 + 1).

    A is the slice operator and W the real weight of each point: (n, n, n), lags from 0 in FFT order. The normal
    operator of any set of slices is a convolution (Wajer and Pruessmann 2001); gridding the weights costs one pass.
    """
    n = weight.shape[0]
    half = torch.full((n // 2 + 1,), 0.5, device=weight.device)
    half[0] = half[-1] = 1.0
    kernel = torch.fft.irfftn((weight * half).to(torch.complex64), s=(n, n, n)) * (n**3 / box**2)
    sinc = torch.sinc(torch.fft.fftfreq(n, device=weight.device)) ** 2
    return kernel.div_(sinc[:, None, None]).div_(sinc[:, None]).div_(sinc)


def crop_kernel(kernel: Tensor, box: int) -> Tensor:
    """The lags that a cube of `box` voxels needs: (n, n, n) -> (2 box, 2 box, 2 box)."""
    if len(kernel) == 2 * box:
        return kernel
    return torch.fft.ifftshift(_centre_crop(torch.fft.fftshift(kernel), 2 * box))


def convolve(spectrum: Tensor, volume: Tensor) -> Tensor:
    """Apply a Toeplitz kernel, given as its rfftn (2b, 2b, b + 1), to volumes (*batch, b, b, b)."""
    b = volume.shape[-1]
    # One axis at a time, padding as late and cropping as early as can be: half the work of a whole padded transform.
    # And some kx at a time: what is padded stays in the processor's cache, and four times smaller than the spectrum.
    padded = torch.fft.rfft(volume, n=2 * b, dim=-1)
    parts = min(-(-8 * spectrum.numel() // CONVOLVED_BYTES), b // 8 + 1) if padded.device.type == "cpu" else 1
    for part, factor in zip(padded.tensor_split(parts, -1), spectrum.tensor_split(parts, -1), strict=True):
        whole = torch.fft.fft(torch.fft.fft(part, n=2 * b, dim=-2), n=2 * b, dim=-3).mul_(factor)
        part.copy_(torch.fft.ifft(torch.fft.ifft(whole, dim=-3)[..., :b, :, :], dim=-2)[..., :b, :])
    return torch.fft.irfft(padded, n=2 * b, dim=-1)[..., :b]


def _pad_at_origin(volume: Tensor, n: int) -> Tensor:
    """Zero pad to n and move the centre voxel to index 0."""
    box = volume.shape[-1]
    padded = volume.new_zeros((*volume.shape[:-3], n, n, n))
    padded[..., :box, :box, :box] = volume
    return padded.roll((-(box // 2),) * 3, (-3, -2, -1))


def _crop_at_origin(volume: Tensor, box: int) -> Tensor:
    """The adjoint of `_pad_at_origin`."""
    return volume.roll((box // 2,) * 3, (-3, -2, -1))[..., :box, :box, :box]


def _centre_crop(volume: Tensor, size: int) -> Tensor:
    a = volume.shape[-1] // 2 - size // 2
    return volume[..., a : a + size, a : a + size, a : a + size]
