"""Points that move: smooth fields, a template solved for, and one map seen by image, sum and lattice alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_cryo.physics.fourier import HalfPlane, fourier_to_volume, radius, volume_to_fourier
from pyro_cryo.physics.rotations import random_rotations
from pyro_cryo.physics.slices import slice_coordinates
from pyro_cryo.volumes.moving_points import MovingPoints, SmoothModes, lattice_in, lattice_radius, least_squares

BOX = 24


def blob() -> tuple[Tensor, Tensor]:
    """A lumpy map (D, D, D) and the ball about it."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.fft.rfftn(torch.randn(BOX, BOX, BOX, generator=generator))
    smooth = torch.fft.irfftn(noise * torch.exp(-0.02 * torch.fft.fftfreq(BOX, 1 / BOX)[:, None, None] ** 2))
    ball = torch.sigmoid(2 * (7 - radius(BOX, 3)))
    return (1 + smooth) * torch.sigmoid(6 - radius(BOX, 3)), ball


def bent() -> MovingPoints:
    torch.manual_seed(0)
    volume = MovingPoints(BOX, 2, 1500, modes=20, width=16, layers=1)
    volume.set(*blob())
    torch.nn.init.normal_(volume.net[-1].weight, std=0.5)
    return volume


@pytest.mark.parametrize("kmax", [4, 7])
def test_the_points_stand_for_a_map_up_to_the_band_limit(kmax: int) -> None:
    target, ball = blob()
    volume = MovingPoints(BOX, 2, 1500, kmax=kmax)
    volume.set(target, ball)
    for parameter in volume.net[-1].parameters():
        torch.nn.init.zeros_(parameter)
    near = lattice_radius(BOX, target.device) <= kmax
    expected = fourier_to_volume(volume_to_fourier(target * ball) * near)
    found = volume.map(torch.randn(2)).detach()
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_few_points_carry_low_frequencies_only() -> None:
    volume = MovingPoints(BOX, 2, 100)
    volume.set(*blob())
    assert 2 < volume.kmax < 6
    again = MovingPoints(BOX, 2, 100)
    again.load_state_dict(volume.state_dict())
    assert again.kmax == volume.kmax


def test_image_and_sum_are_of_one_molecule() -> None:
    volume, half = bent(), HalfPlane.of(BOX)
    k, z = half.k[: half.count(8)], torch.randn(3, 2)
    rotation = random_rotations(3, torch.Generator().manual_seed(1))
    scale = torch.tensor([1.0, 0.7, 1.2])
    with torch.no_grad():
        image = volume.images(z, rotation, k, scale)
        expected = volume(slice_coordinates(rotation, k, scale), z)
    assert float((image - expected).norm() / expected.norm()) < 0.01


def test_a_motion_conserves_mass() -> None:
    maps = bent().map(3 * torch.randn(4, 2)).detach()
    torch.testing.assert_close(maps.sum((1, 2, 3)), maps[:1].sum().expand(4), rtol=1e-4, atol=0)
    assert float((maps[0] - maps[1]).norm() / maps[0].norm()) > 0.05


def test_gradients_reach_masses_and_motion() -> None:
    volume, half = bent(), HalfPlane.of(BOX)
    z = torch.randn(3, 2, requires_grad=True)
    rotation = random_rotations(3, torch.Generator().manual_seed(1))
    volume.images(z, rotation, half.k[:50], torch.ones(3))[..., 0].square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in volume.parameters())
    assert float(z.grad.abs().max()) > 0


def test_fields_have_the_kernels_covariance_and_are_smooth() -> None:
    position = 10 * torch.rand(300, 3, generator=torch.Generator().manual_seed(0))
    modes = SmoothModes(300, 60)
    modes.set(position, length=6.0)
    found = modes.values @ modes.values.mT
    kernel = torch.exp(-0.5 * torch.cdist(position, position).square() / 6.0**2)
    assert float((found - kernel).square().mean().sqrt()) < 0.05
    size = modes.values.square().sum(0)
    assert bool((size[:-1] >= size[1:] - 1e-3).all())


@pytest.mark.parametrize("count", [60, 1000, 9000])
def test_a_lattice_fills_a_region(count: int) -> None:
    _, ball = blob()
    points, spacing = lattice_in(ball, count)
    assert points.shape == (count, 3)
    assert len(points.unique(dim=0)) == count
    assert count * spacing**3 == pytest.approx(float((ball > 0.5 * ball.max()).sum()), rel=1e-5)
    assert 7 - spacing < float(points.norm(dim=-1).max()) < 7 + spacing
    assert float(points.mean(0).abs().max()) < spacing
    with pytest.raises(ValueError, match="leaves nothing of the consensus"):
        lattice_in(torch.zeros(BOX, BOX, BOX), count)


def test_least_squares_are_those_of_the_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix, target = torch.randn(12, 5, generator=generator), torch.randn(12, generator=generator)
    expected = torch.linalg.lstsq(matrix, target[:, None]).solution[:, 0]
    torch.testing.assert_close(least_squares(lambda x: matrix @ x, target, 5, 8), expected, rtol=1e-3, atol=1e-4)
