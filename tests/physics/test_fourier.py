"""The half-plane holds what an image says, once, and transforms keep lengths, shifts and crops."""

import math

import pytest
import torch
from torch import Tensor

from pyro_cryo.physics.fourier import (
    HalfPlane,
    displacement_px,
    fourier_to_volume,
    half_plane_to_image,
    half_radius,
    image_to_half_plane,
    radius,
    resize,
    shift_phase,
    soft_disc,
    volume_to_fourier,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def waves(box: int, half: HalfPlane, coefficients: Tensor) -> Tensor:
    """Samples on `box` pixels of sum_k Re(2 c_k exp(2 pi i k.r)), r in fields of view from the centre pixel."""
    r = (torch.arange(box, dtype=torch.float64) - box // 2) / box
    k = half.k.double()
    ex = torch.exp(2j * math.pi * k[:, :1] * r)
    ey = torch.exp(2j * math.pi * k[:, 1:] * r)
    return 2 * torch.einsum("p,py,px->yx", coefficients, ey, ex).real


@pytest.mark.parametrize("box", [4, 8, 32, 64])
def test_the_half_plane_holds_one_of_each_pair_in_the_disc(box: int) -> None:
    half = HalfPlane.of(box)
    lattice = range(-box // 2, box // 2 + 1)
    disc = {(x, y) for x in lattice for y in lattice if 0 < x * x + y * y < (box / 2) ** 2}
    held = {(int(x), int(y)) for x, y in half.k}
    assert len(held) == len(half) == len(disc) / 2
    assert held | {(-x, -y) for x, y in held} == disc


def test_coefficients_are_sorted_so_that_a_band_is_a_prefix() -> None:
    half = HalfPlane.of(32)
    length = half.k.norm(dim=-1)
    assert bool((length.diff() >= 0).all())
    assert half.shell.tolist() == [round(float(k)) for k in length]
    for kmax in (1, 4.5, 5, 10, 15.9, 100):
        count = half.count(kmax)
        assert count == int((length <= kmax).sum())
        assert bool((length[:count] <= kmax).all())


def test_band_limited_images_survive_the_round_trip() -> None:
    half = HalfPlane.of(24)
    values = torch.randn(3, len(half), 2, dtype=torch.float64, generator=seeded())
    image = half_plane_to_image(values, half)
    assert image.shape == (3, 24, 24)
    torch.testing.assert_close(image_to_half_plane(image, half), values, rtol=0, atol=1e-12)
    torch.testing.assert_close(half_plane_to_image(image_to_half_plane(image, half), half), image, rtol=0, atol=1e-12)


def test_the_transform_is_unitary() -> None:
    half = HalfPlane.of(24)
    values = torch.randn(len(half), 2, dtype=torch.float64, generator=seeded())
    power = half_plane_to_image(values, half).square().sum()
    torch.testing.assert_close(power, 2 * values.square().sum())  # the other half is the conjugate
    # white noise of variance 1 gives real components of variance 1 / 2
    noise = image_to_half_plane(torch.randn(400, 24, 24, generator=seeded(1)), half)
    assert float(noise.square().mean()) == pytest.approx(0.5, rel=0.01)


def test_the_phase_origin_is_the_centre_pixel() -> None:
    half = HalfPlane.of(16)
    image = torch.zeros(16, 16, dtype=torch.float64)
    image[8, 8] = 16.0
    values = image_to_half_plane(image, half)
    torch.testing.assert_close(values[:, 0], torch.ones(len(half), dtype=torch.float64))
    torch.testing.assert_close(values[:, 1], torch.zeros(len(half), dtype=torch.float64))


def test_images_are_y_x_and_frequencies_x_y() -> None:
    half = HalfPlane.of(16)
    x = torch.arange(16) - 8
    along_x = torch.cos(2 * math.pi * 3 * x / 16).expand(16, 16)
    strongest = image_to_half_plane(along_x, half).square().sum(-1).argmax()
    assert half.k[strongest].tolist() == [3, 0]
    strongest = image_to_half_plane(along_x.T, half).square().sum(-1).argmax()
    assert half.k[strongest].tolist() == [0, 3]


def test_cropping_a_band_limited_function_samples_it_on_fewer_pixels() -> None:
    half = HalfPlane.of(16)
    re, im = torch.randn(2, len(half), dtype=torch.float64, generator=seeded())
    coefficients = torch.complex(re, im)
    fine, coarse = waves(40, half, coefficients), waves(16, half, coefficients)
    torch.testing.assert_close(image_to_half_plane(fine, half), image_to_half_plane(coarse, half))
    torch.testing.assert_close(half_plane_to_image(image_to_half_plane(fine, half), half), coarse)


def test_shift_phase_moves_an_image_by_whole_pixels_exactly() -> None:
    half = HalfPlane.of(20)
    image = torch.randn(20, 20, dtype=torch.float64, generator=seeded())
    shifts = torch.tensor([[3.0, 0.0], [0.0, -2.0], [-4.0, 7.0]], dtype=torch.float64)
    moved = torch.stack([image.roll((int(y), int(x)), (0, 1)) for x, y in shifts])
    expected = torch.view_as_complex(image_to_half_plane(moved, half))
    found = torch.view_as_complex(image_to_half_plane(image, half)) * shift_phase(half.k.double(), shifts, 20)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_volumes_survive_the_round_trip() -> None:
    volume = torch.randn(2, 12, 12, 12, dtype=torch.float64, generator=seeded())
    torch.testing.assert_close(fourier_to_volume(volume_to_fourier(volume)), volume)


def test_the_central_plane_of_a_volume_is_the_transform_of_its_projection() -> None:
    box, half = 16, HalfPlane.of(16)
    volume = torch.randn(box, box, box, dtype=torch.float64, generator=seeded())
    kx, ky = half.k.long().unbind(-1)
    spectrum = volume_to_fourier(volume)
    image = torch.view_as_complex(image_to_half_plane(volume.sum(0), half))
    torch.testing.assert_close(spectrum[box // 2, ky + box // 2, kx], image)
    image = torch.view_as_complex(image_to_half_plane(volume.sum(1), half))  # a z-x image
    torch.testing.assert_close(spectrum[ky + box // 2, box // 2, kx], image)


def test_radii_are_distances_from_the_centre_and_from_zero_frequency() -> None:
    assert radius(8, 2)[4, 4] == 0
    assert radius(8, 3)[4, 4 + 2, 4 - 3] == pytest.approx(math.sqrt(13))
    k = half_radius(8)
    assert k[0, 0, 0] == 0
    assert k[-1, 2, 3] == pytest.approx(math.sqrt(1 + 4 + 9))


def test_a_soft_disc_falls_from_one_to_zero_over_its_edge() -> None:
    disc, r = soft_disc(32, 8, 4), radius(32, 2)
    assert bool((disc[r <= 8] == 1).all())
    assert bool((disc[r >= 12] < 1e-6).all())
    assert disc[16, 16 + 10] == pytest.approx(0.5)
    assert bool((soft_disc(32, 8, 0) == (r <= 8)).all())


@pytest.mark.parametrize("box", [33, 2, 0])
def test_an_odd_or_tiny_box_is_refused(box: int) -> None:
    with pytest.raises(ValueError, match=f"box {box} is not an even number"):
        HalfPlane.of(box)


@pytest.mark.parametrize("shape", [(33, 33), (16, 16), (32, 34)])
def test_images_that_do_not_crop_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="do not crop to an even box of 32"):
        image_to_half_plane(torch.zeros(shape), HalfPlane.of(32))


@pytest.mark.parametrize("box", [12, 20])
def test_a_resized_map_is_what_resized_images_show(box: int) -> None:
    volume = torch.randn(2, 16, 16, 16, generator=seeded())
    band = HalfPlane.of(min(box, 16))
    shown = image_to_half_plane(resize(volume, box).sum(-3), HalfPlane.of(box))[:, : len(band)]
    cropped = image_to_half_plane(volume.sum(-3), band) * (max(box, 16) / 16)
    torch.testing.assert_close(shown, cropped, rtol=1e-4, atol=1e-5)


def test_no_map_is_resized_to_none() -> None:
    assert resize(torch.zeros(0, 16, 16, 16), 12).shape == (0, 12, 12, 12)


@pytest.mark.parametrize("moved", [(0.0, 0.0, 0.0), (2.0, -3.0, 1.0), (-1.3, 0.4, 2.6)])
def test_a_displaced_map_is_found_where_it_lies(moved: tuple[float, float, float]) -> None:
    """In x, y, z and to a tenth of a voxel, with noise as strong as the map."""
    axis = torch.arange(24.0) - 12
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")

    def blobs(at: tuple[float, float, float]) -> Tensor:
        centres = [(0, 0, 0), (4, 1, -2), (-3, 3, 2)]
        each = [(x - a - at[0]) ** 2 + (y - b - at[1]) ** 2 + (z - c - at[2]) ** 2 for a, b, c in centres]
        return sum(torch.exp(-square / 6) for square in each)  # type: ignore[return-value]

    noise = float(blobs(moved).std()) * torch.randn(24, 24, 24, generator=seeded())
    found = displacement_px(blobs(moved) + noise, blobs((0.0, 0.0, 0.0)))
    torch.testing.assert_close(found, torch.tensor(moved), rtol=0, atol=0.1)
