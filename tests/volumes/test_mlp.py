"""The coordinate network is the transform of real maps, within its band, in the stated encodings."""

import math

import pytest
import torch
from torch import nn

from pyro_cryo.physics.fourier import HalfPlane, half_radius, image_to_half_plane
from pyro_cryo.physics.rotations import random_rotations
from pyro_cryo.physics.slices import slice_coordinates
from pyro_cryo.volumes.mlp import CoordinateMLP, GaussianEncoding, PositionalEncoding, in_lower_half


def network(box: int = 12, encoding: nn.Module | None = None, kmax: float | None = None) -> CoordinateMLP:
    torch.manual_seed(0)
    return CoordinateMLP(box, 3, width=32, layers=2, encoding=encoding, kmax=kmax)


def views(box: int, count: int = 4) -> torch.Tensor:
    return slice_coordinates(random_rotations(count, torch.Generator().manual_seed(1)), HalfPlane.of(box).k)


@pytest.mark.parametrize("encoding", [None, PositionalEncoding(12)])
def test_the_transform_is_hermitian(encoding: nn.Module | None) -> None:
    volume, k = network(encoding=encoding), views(12)
    k[0, :10, 0] = 0
    k[0, :4, 1] = 0
    z = torch.randn(4, 3)
    there, mirrored = volume(k, z), volume(-k, z)
    assert float(there.detach().abs().max()) > 0.01
    torch.testing.assert_close(mirrored, there * torch.tensor([1.0, -1.0]), rtol=0, atol=0)


def test_one_of_each_pair_lies_in_the_lower_half() -> None:
    k = torch.randn(200, 3)
    k[:50, 0] = 0
    k[:20, 1] = 0
    assert bool((in_lower_half(k) ^ in_lower_half(-k)).all())
    assert not bool(in_lower_half(torch.zeros(1, 3)))


@pytest.mark.parametrize("box", [12, 16])
def test_the_map_has_the_networks_transform(box: int) -> None:
    """The projections of map(z) along the axes are the network's values in the three lattice planes."""
    volume, half = network(box), HalfPlane.of(box)
    z = torch.randn(2, 3)
    with torch.no_grad():
        maps = volume.map(z)
        assert maps.shape == (2, box, box, box)
        axes = torch.stack([torch.eye(3), torch.eye(3)[[1, 2, 0]]])  # along z; and along x, with y to the right, z up
        expected = volume(slice_coordinates(axes, half.k), z)
    projections = torch.stack([maps[0].sum(0), maps[1].sum(2)])
    torch.testing.assert_close(image_to_half_plane(projections, half), expected, rtol=0, atol=1e-5)


def test_beyond_the_band_limit_there_is_nothing() -> None:
    volume, k = network(16, kmax=5), views(16)
    value = volume(k, torch.randn(4, 3)).detach()
    length = k.norm(dim=-1)
    assert float(value[length > 5 + 1e-4].abs().max()) == 0
    assert float(value[length < 5 - 1e-4].square().sum(-1).min()) > 0
    spectrum = torch.fft.rfftn(volume.map(torch.randn(3))).abs().detach()
    assert float(spectrum[half_radius(16) > 5.01].max()) < 1e-4 * float(spectrum.max())
    reloaded = network(16)
    reloaded.load_state_dict(volume.state_dict())
    assert reloaded.kmax == 5


def test_the_amplitude_sets_the_size_of_each_shell() -> None:
    volume, k = network(16), views(16)
    z = torch.randn(4, 3)
    before = volume(k, z)
    volume.amplitude.copy_(torch.arange(9.0) ** 2)
    length = k.norm(dim=-1, keepdim=True)
    low = length.floor()
    table = low**2 + (2 * low + 1) * (length - low)  # linear between the squares
    torch.testing.assert_close(volume(k, z), before * table, rtol=1e-4, atol=1e-4)


def test_z_moves_the_map_and_gradients_reach_every_parameter() -> None:
    volume, k = network(), views(12)
    z = torch.randn(4, 3, requires_grad=True)
    assert float((volume(k, z) - volume(k, z + 1)).abs().max()) > 1e-3
    volume(k, z).square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in volume.parameters())
    assert float(z.grad.abs().max()) > 0


def test_the_positional_encoding_is_the_papers() -> None:
    """pe^(2i)(k_j) = sin(k_j D pi (2 / D)^(2i / D)), pe^(2i + 1)(k_j) = cos(same), i = 1 .. D / 2."""
    box, k = 16, torch.tensor([[3.0, -5.0, 2.5]])  # cycles a box
    features = PositionalEncoding(box)(k)[0]
    assert features.shape == (3 * box,)
    for j in range(3):
        for i in range(1, box // 2 + 1):
            phase = (float(k[0, j]) / box) * box * math.pi * (2 / box) ** (2 * i / box)
            assert float(features[j * box // 2 + i - 1]) == pytest.approx(math.sin(phase), abs=1e-5)
            assert float(features[3 * box // 2 + j * box // 2 + i - 1]) == pytest.approx(math.cos(phase), abs=1e-5)
    # the fastest wave, i = 1, and the slowest, i = D / 2, by hand: pi (1 / 8)^(1 / 8) k and pi k / 8
    assert float(features[0]) == pytest.approx(math.sin(3 * 2.422481), abs=1e-4)
    assert float(features[7]) == pytest.approx(math.sin(3 * math.pi / 8), abs=1e-5)


def test_the_gaussian_encoding_holds_waves_of_points_inside_the_molecule() -> None:
    encoding = GaussianEncoding(4000, spread=0.1)
    assert encoding.features == 8000
    torch.testing.assert_close(encoding.points.std(1), torch.full((3,), 0.1), rtol=0.05, atol=0)
    k = torch.tensor([[1.0, 2.0, -3.0], [4.0, 0.0, 1.0]])
    sine, cosine = encoding(k).chunk(2, -1)
    torch.testing.assert_close(sine.square() + cosine.square(), torch.ones(2, 4000))
    # the mean of the waves is the transform of the points' Gaussian
    expected = torch.exp(-0.5 * (2 * math.pi * 0.1) ** 2 * k.square().sum(-1))
    torch.testing.assert_close(cosine.mean(-1), expected, rtol=0, atol=0.04)
    torch.testing.assert_close(GaussianEncoding(10, seed=3).points, GaussianEncoding(10, seed=3).points)
