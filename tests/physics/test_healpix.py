"""The HEALPix map of the sphere, against the formulas of its paper."""

import math

import pytest
import torch
from torch import Tensor

from pyro_cryo.physics import healpix


def angles(vector: Tensor) -> Tensor:
    """Cosine of the colatitude, and azimuth in degrees."""
    return torch.stack([vector[..., 2], torch.rad2deg(torch.atan2(vector[..., 1], vector[..., 0])) % 360], -1)


def paper(pixel: Tensor, side: int) -> Tensor:
    """Gorski et al. 2005, section 4: ring and place in the ring of nested pixels, and their angles."""
    face, low = pixel // side**2, pixel % side**2
    x, y = (sum((low >> 2 * bit + axis & 1) << bit for bit in range(8)) for axis in (0, 1))
    row = face // 4
    ring = (row + 2) * side - (x + y) - 1
    south = ring > 3 * side
    i = torch.where(south, 4 * side - ring, ring)
    cap = i < side
    s = torch.where(cap, 1, (i - side + 1) % 2)
    quarter = i.clamp_max(side)  # pixels in a quarter of the ring
    j = ((2 * (face % 4) - row % 2 + 1) * quarter + x - y + s).double() / 2
    i = i.double()
    z = torch.where(cap, 1 - i**2 / (3 * side**2), 4 / 3 - 2 * i / (3 * side))
    azimuth = 90 / quarter.double() * (j - s / 2)
    return torch.stack([torch.where(south, -z, z), azimuth % 360], -1)


def test_centres_that_one_finds_by_hand() -> None:
    """Level 0: rings of four at z = 2/3, 0, -2/3. Level 1: face 0 is bounded by its pixels 0 (south) and 3 (north)."""
    expected = [[z, azimuth + 90.0 * k] for z, azimuth in ((2 / 3, 45), (0, 0), (-2 / 3, 45)) for k in range(4)]
    found = angles(healpix.centre(torch.arange(12), 0))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    found = angles(healpix.centre(torch.tensor([0, 1, 2, 3, 16, 44]), 1))
    expected = [[1 / 3, 45], [2 / 3, 67.5], [2 / 3, 22.5], [11 / 12, 45], [-1 / 3, 0], [-11 / 12, 315]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("level", [1, 2, 5])
def test_all_centres_are_those_of_the_paper(level: int) -> None:
    pixel = torch.arange(12 * 4**level)
    torch.testing.assert_close(angles(healpix.centre(pixel, level)), paper(pixel, 2**level), rtol=0, atol=1e-9)


@pytest.mark.parametrize("level", [0, 3, 7])
def test_centres_lie_on_rings(level: int) -> None:
    """4 n - 1 rings, of 4 pixels at the poles, then 8, ... 4 n."""
    n = 2**level
    z = healpix.centre(torch.arange(12 * n * n), level)[:, 2]
    _, size = (z * 3 * n * n).round().long().unique(return_counts=True)
    assert size.tolist() == [4 * min(i, n, 4 * n - i) for i in range(1, 4 * n)]


@pytest.mark.parametrize("level", [0, 1, 7, 12])
def test_centres_are_in_their_pixels(level: int) -> None:
    pixel = torch.randint(12 * 4**level, (20_000,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(healpix.pixel_of(healpix.centre(pixel, level), level), pixel)
    assert torch.equal(healpix.pixel_of(3 * healpix.centre(pixel, level).float(), level), pixel)


def test_the_map_of_faces_is_inverted_also_at_poles_and_seams() -> None:
    """From directions and back, in double precision; the seams of the projection are the meridians of the caps."""
    g = torch.Generator().manual_seed(1)
    vector = torch.randn(20_000, 3, dtype=torch.float64, generator=g)
    vector[:4000, :2] *= 10 ** -torch.linspace(0, 12, 4000, dtype=torch.float64)[:, None]
    vector[4000:5000, 0] = 0
    vector[5000:6000, 1] = -1e-17
    vector[0] = torch.tensor([0.0, 0.0, 1.0])
    vector[1] = torch.tensor([0.0, 0.0, -1.0])
    vector = torch.nn.functional.normalize(vector, dim=-1)
    face, x, y = healpix.face_point(vector)
    assert 0 <= int(face.min()) < int(face.max()) < 12
    assert all(float(v.min()) >= 0 and float(v.max()) < 1 for v in (x, y))
    torch.testing.assert_close(healpix.direction(face, x, y), vector, rtol=0, atol=1e-14)


def test_pixels_have_equal_areas() -> None:
    n, pixels = 100_000, 192
    vector = torch.randn(n, 3, generator=torch.Generator().manual_seed(2))
    drawn = torch.bincount(healpix.pixel_of(vector, 2), minlength=pixels)
    statistic = float(((drawn - n / pixels) ** 2 / (n / pixels)).sum())
    assert abs(statistic - (pixels - 1)) < 4 * math.sqrt(2 * (pixels - 1))
