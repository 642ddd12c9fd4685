"""Central slices: against analytic projections, against rotated maps, and the adjoint against the inner product."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from pyro_cryo.data.blobs import Complex, hinge
from pyro_cryo.physics.fourier import HalfPlane, image_to_half_plane, radius
from pyro_cryo.physics.rotations import exp, random_rotations
from pyro_cryo.physics.slices import (
    GridPoints,
    add_to_grid,
    convolve,
    crop_kernel,
    fourier_grid,
    fourier_grid_adjoint,
    read_grid,
    slice_coordinates,
    toeplitz_kernel,
)

BOX = 48


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def real_inner(a: Tensor, b: Tensor) -> float:
    return float((a * b.conj()).real.sum())


def points_in_ball(count: int, reach: float, dtype: torch.dtype = torch.float64) -> Tensor:
    cube = 2 * torch.rand(4 * count, 3, dtype=dtype, generator=seeded(5)) - 1
    return reach * cube[cube.norm(dim=-1) < 1][:count]


def blobs() -> tuple[Complex, float]:
    """A molecule of Gaussian blobs, 1.3 pixels wide, that fills 70% of the box."""
    source = hinge(1)
    apix = source.apix_for(BOX, None)
    return dataclasses.replace(source, sigma_angstrom=1.3 * apix), apix


def analytic_slices(source: Complex, apix: float, rotation: Tensor, k: Tensor) -> Tensor:
    """The unitary transform of the molecule's projections at k (P, 2), cycles a box: (B, P).

    A blob w exp(-d^2 / 2 s^2) at x has the transform w (2 pi)^(3/2) s^3 exp(-2 pi^2 s^2 k^2) exp(-2 pi i k.x).
    """
    sigma, xy = source.sigma_angstrom / apix, (source.xyz[0] / apix @ rotation[:, :2].mT).double()
    phase = torch.exp(-2j * math.pi / BOX * torch.einsum("pj,baj->bpa", k.double(), xy))
    height = (
        (2 * math.pi) ** 1.5 * sigma**3 * torch.exp(-2 * (math.pi * sigma / BOX) ** 2 * k.double().square().sum(-1))
    )
    return height * (phase @ source.weight[0].to(phase.dtype)) / BOX


def slice_error(oversample: int, rotation: Tensor) -> float:
    source, apix = blobs()
    half = HalfPlane.of(BOX)
    k = half.k[: half.count(BOX / 4)]
    found = read_grid(fourier_grid(source.volume(0, BOX, apix), oversample), slice_coordinates(rotation, k), oversample)
    expected = analytic_slices(source, apix, rotation, k)
    return float((found - expected).abs().norm() / expected.abs().norm())


def test_a_slice_is_the_transform_of_the_analytic_projection() -> None:
    rotation = random_rotations(8, seeded())
    plain, oversampled = slice_error(1, rotation), slice_error(2, rotation)
    print(f"relative error inside half Nyquist: {oversampled:.4f} at oversample 2, {plain:.4f} without")
    assert oversampled <= 0.02
    assert plain > 2 * oversampled


def test_a_slice_along_an_axis_is_the_projection_at_every_frequency() -> None:
    volume = torch.randn(16, 16, 16, generator=seeded()) * (radius(16, 3) < 6)
    half, grid = HalfPlane.of(16), fourier_grid(volume)
    gridding = torch.sinc((torch.arange(16) - 8) / 32) ** 2  # on the lattice nothing is interpolated
    corrected = volume / (gridding[:, None, None] * gridding[:, None] * gridding)
    found = read_grid(grid, slice_coordinates(torch.eye(3), half.k))
    torch.testing.assert_close(
        torch.view_as_real(found), image_to_half_plane(corrected.sum(0), half), atol=1e-5, rtol=0
    )


def test_rotating_the_map_is_rotating_the_pose() -> None:
    """The map turned by Q is V(Q^T r); seen with R it is V seen with R Q."""
    source, apix = blobs()
    turn = exp(torch.tensor([0.7, -0.4, 1.1]))
    turned = dataclasses.replace(source, xyz=source.xyz @ turn.T)
    rotation, half = random_rotations(4, seeded(1)), HalfPlane.of(BOX)
    k = half.k[: half.count(BOX / 4)]
    found = read_grid(fourier_grid(turned.volume(0, BOX, apix)), slice_coordinates(rotation, k))
    expected = read_grid(fourier_grid(source.volume(0, BOX, apix)), slice_coordinates(rotation @ turn, k))
    assert (found - expected).abs().norm() < 0.03 * expected.abs().norm()
    wrong = read_grid(fourier_grid(source.volume(0, BOX, apix)), slice_coordinates(rotation @ turn.T, k))
    assert (found - wrong).abs().norm() > 0.3 * expected.abs().norm()


def test_turning_the_lattice_is_turning_the_pose_exactly() -> None:
    volume = torch.randn(16, 16, 16, generator=seeded())
    cycle = torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]])  # takes (x, y, z) to (y, z, x)
    turned = volume.permute(2, 0, 1)  # turned[z, y, x] = volume at Q^T (x, y, z) = (z, x, y)
    rotation, half = random_rotations(3, seeded(1)), HalfPlane.of(16)
    found = read_grid(fourier_grid(turned), slice_coordinates(rotation, half.k))
    expected = read_grid(fourier_grid(volume), slice_coordinates(rotation @ cycle, half.k))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_slice_coordinates_lie_in_the_plane_across_the_view() -> None:
    rotation, half = random_rotations(5, seeded(2)), HalfPlane.of(16)
    points = slice_coordinates(rotation, half.k)
    torch.testing.assert_close(points.norm(dim=-1), half.k.norm(dim=-1).expand(5, -1))
    assert float((points @ rotation[:, 2, :, None]).abs().max()) < 1e-5
    scale = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5])
    torch.testing.assert_close(slice_coordinates(rotation, half.k, scale), points * scale[:, None, None])


def test_reads_are_hermitian() -> None:
    grid = fourier_grid(torch.randn(12, 12, 12, dtype=torch.float64, generator=seeded()))
    points = points_in_ball(500, 5.9)
    points[:100, 0] = 0
    points[:20, 1] = 0
    torch.testing.assert_close(read_grid(grid, -points), read_grid(grid, points).conj(), rtol=0, atol=1e-12)


def test_points_beyond_the_grid_read_as_zero_and_add_nothing() -> None:
    grid = fourier_grid(torch.randn(8, 8, 8, generator=seeded()))
    points = torch.tensor([[8.5, 0, 0], [0, -9.0, 1], [1, 2, 30.0]])
    assert read_grid(grid, points).abs().max() == 0
    empty = torch.zeros_like(grid)
    add_to_grid(empty, points, torch.ones(3, dtype=grid.dtype))
    assert empty.abs().max() == 0


@pytest.mark.parametrize("oversample", [1, 2])
def test_adding_is_the_adjoint_of_reading(oversample: int) -> None:
    n = 12 * oversample
    shape = (n, n, n // 2 + 1)
    grid = torch.complex(torch.randn(shape, generator=seeded()), torch.randn(shape, generator=seeded(1)))
    points = points_in_ball(400, 5.9, torch.float32)
    points[:40, 0] = 0
    value = torch.complex(torch.randn(400, generator=seeded(2)), torch.randn(400, generator=seeded(3)))
    added = torch.zeros_like(grid)
    add_to_grid(added, points.view(4, 100, 3), value.view(4, 100), oversample)
    left, right = real_inner(read_grid(grid, points, oversample), value), real_inner(grid, added)
    size = float(read_grid(grid, points, oversample).abs().norm() * value.abs().norm())
    assert abs(left - right) < 1e-5 * min(abs(left), size)


@pytest.mark.parametrize("oversample", [1, 2, 3])
def test_the_volume_of_a_grid_is_the_adjoint_of_the_grid_of_a_volume(oversample: int) -> None:
    volume = torch.randn(10, 10, 10, generator=seeded())
    found = fourier_grid(volume, oversample)
    grid = torch.complex(torch.randn(found.shape, generator=seeded(1)), torch.randn(found.shape, generator=seeded(2)))
    left, right = real_inner(found, grid), float((volume * fourier_grid_adjoint(grid, 10)).sum())
    assert abs(left - right) < 1e-5 * abs(left)


def test_the_whole_slice_operator_has_its_adjoint() -> None:
    """<A V, X> = <V, A* X> for slices of many views."""
    half, rotation = HalfPlane.of(16), random_rotations(30, seeded(1))
    volume = torch.randn(16, 16, 16, generator=seeded())
    points = slice_coordinates(rotation, half.k)
    image = torch.view_as_complex(torch.randn(30, len(half), 2, generator=seeded(2)))
    grid = fourier_grid(volume)
    gathered = torch.zeros_like(grid)
    add_to_grid(gathered, points, image)
    left = real_inner(read_grid(grid, points), image)
    right = float((volume * fourier_grid_adjoint(gathered, 16)).sum())
    assert abs(left - right) < 1e-5 * abs(left)


def test_a_real_grid_collects_what_points_weigh() -> None:
    points, weight = points_in_ball(200, 4.9, torch.float32), torch.rand(200, generator=seeded())
    grid, complex_grid = torch.zeros(20, 20, 11), torch.zeros(20, 20, 11, dtype=torch.complex64)
    add_to_grid(grid, points, weight)
    add_to_grid(complex_grid, points, weight.to(torch.complex64))
    torch.testing.assert_close(grid, complex_grid.real)
    torch.testing.assert_close(grid.sum(), weight.sum())


def test_images_of_a_batch_fill_their_own_grids() -> None:
    points = points_in_ball(90, 3.9, torch.float32).view(3, 30, 3)
    value = torch.view_as_complex(torch.randn(3, 30, 2, generator=seeded()))
    together = torch.zeros(3, 8, 8, 5, dtype=torch.complex64)
    add_to_grid(together, points, value, oversample=1)
    for i in range(3):
        alone = torch.zeros(8, 8, 5, dtype=torch.complex64)
        add_to_grid(alone, points[i], value[i], oversample=1)
        torch.testing.assert_close(together[i], alone)


def test_channels_read_as_one_by_one() -> None:
    volumes = torch.randn(3, 8, 8, 8, generator=seeded())
    points = points_in_ball(60, 3.9, torch.float32).view(2, 30, 3)
    together = read_grid(fourier_grid(volumes), points)
    assert together.shape == (2, 30, 3)
    for c in range(3):
        torch.testing.assert_close(together[..., c], read_grid(fourier_grid(volumes[c]), points))


def test_grid_points_read_and_add_like_the_functions(device: str) -> None:
    box, channels = 16, 3
    points = points_in_ball(200, box / 2, torch.float32).to(device)
    grid = fourier_grid(torch.randn(channels, box, box, box, generator=seeded())).to(device)
    where = GridPoints.of(points, grid.shape[0])
    torch.testing.assert_close(where.read(grid), read_grid(grid, points))
    factor = torch.rand(len(points), generator=seeded(2)).to(device)
    columns = where.columns(torch.view_as_real(grid).transpose(-1, -2).contiguous(), factor)
    found = torch.view_as_complex(columns.transpose(1, 2).contiguous())
    expected = read_grid(grid, points) * factor[:, None]
    torch.testing.assert_close(torch.stack([where.as_on_grid(one) for one in found.T], -1), expected)
    values = torch.randn(channels, len(points), dtype=torch.complex64, generator=seeded(1)).to(device)
    found = torch.zeros_like(grid.movedim(-1, 0)).contiguous()
    where.add(found, values)
    expected = torch.zeros_like(found)
    for one, value in zip(expected, values, strict=True):
        add_to_grid(one, points, value)
    torch.testing.assert_close(found, expected)
    weights = torch.zeros(1, *grid.shape[:3], device=device)
    where.add(weights, torch.ones(1, len(points), device=device))
    expected_weight = torch.zeros_like(weights[0])
    add_to_grid(expected_weight, points, torch.ones(len(points), device=device))
    torch.testing.assert_close(weights[0], expected_weight)


def test_convolving_in_parts_is_convolving_at_once() -> None:
    box = 40  # large enough for several parts
    spectrum, volume = torch.rand(2 * box, 2 * box, box + 1), torch.randn(2, box, box, box, generator=seeded())
    padded = torch.fft.rfftn(volume, s=(2 * box,) * 3, dim=(1, 2, 3))
    whole = torch.fft.irfftn(padded * spectrum, s=(2 * box,) * 3, dim=(1, 2, 3))[:, :box, :box, :box]
    torch.testing.assert_close(convolve(spectrum, volume), whole, rtol=1e-4, atol=1e-4)


def test_the_toeplitz_kernel_is_the_normal_operator() -> None:
    box, half, rotation = 24, HalfPlane.of(24), random_rotations(60, seeded(1))
    volume = torch.randn(box, box, box, generator=seeded()) * (radius(box, 3) < 0.35 * box)
    points = slice_coordinates(rotation, half.k)
    weight = torch.rand(points.shape[:-1], generator=seeded(2))
    grid = fourier_grid(volume)
    gathered, weights = torch.zeros_like(grid), torch.zeros(grid.shape)
    add_to_grid(gathered, points, weight * read_grid(grid, points))
    add_to_grid(weights, points, weight)
    expected = fourier_grid_adjoint(gathered, box)
    spectrum = torch.fft.rfftn(crop_kernel(toeplitz_kernel(weights, box), box))
    ball = radius(box, 3) < 0.35 * box
    found = convolve(spectrum, volume)
    assert (found - expected)[ball].norm() < 0.03 * expected[ball].norm()
    two = convolve(spectrum, torch.stack([volume, 2 * volume]))
    torch.testing.assert_close(two[1], 2 * found)


def test_gradients_agree_with_finite_differences() -> None:
    shape = (8, 8, 5)
    grid = torch.complex(
        torch.randn(shape, dtype=torch.float64, generator=seeded()),
        torch.randn(shape, dtype=torch.float64, generator=seeded(1)),
    ).requires_grad_()
    points = points_in_ball(6, 1.9).requires_grad_()
    assert torch.autograd.gradcheck(read_grid, (grid, points))
    channels = torch.stack([grid, 2j * grid], -1).detach().requires_grad_()
    assert torch.autograd.gradcheck(read_grid, (channels, points))
    volume = torch.randn(4, 4, 4, dtype=torch.float64, generator=seeded(2)).requires_grad_()
    assert torch.autograd.gradcheck(fourier_grid, (volume,))
