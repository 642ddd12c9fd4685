"""A basis of maps: its combinations are those of the slices of each map."""

from __future__ import annotations

import torch

from pyro_cryo.physics.slices import fourier_grid, read_grid
from pyro_cryo.volumes.basis import VoxelBasis


def test_combinations_are_of_slices_and_broadcast() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 8, 8, 8, generator=generator)
    basis = VoxelBasis(12, 3, side=8)
    basis.set(maps)
    k = 2 * torch.randn(4, 10, 3, generator=generator).clamp(-1.5, 1.5)
    each = torch.stack([torch.view_as_real(read_grid(fourier_grid(one), k)) for one in maps]) * (12 / 8)
    for shape in ((4, 3), (5, 4, 3), (5, 1, 3)):
        coefficients = torch.randn(*shape, generator=generator)
        expected = torch.einsum("cbpr,...bc->...bpr", each, coefficients.expand(*shape[:-2], 4, 3))
        torch.testing.assert_close(basis(k, coefficients), expected, rtol=1e-4, atol=1e-5)
