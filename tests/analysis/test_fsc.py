"""Fourier shell correlation agrees with what is known of the maps."""

import math

import pytest
import torch

from pyro_cryo.analysis.fsc import fsc, masked_fsc, randomise_phases, resolution_angstrom
from pyro_cryo.analysis.maps import low_pass
from pyro_cryo.physics.fourier import half_radius, soft_disc

BOX = 48


def noise(seed: int, box: int = BOX) -> torch.Tensor:
    return torch.randn(box, box, box, generator=torch.Generator().manual_seed(seed))


def molecule() -> torch.Tensor:
    """Structure inside a ball of 30% of the box's radius, with power at all frequencies."""
    return noise(100) * soft_disc(BOX, 0.3 * BOX / 2, 3, dims=3)


def test_a_map_agrees_with_itself_and_is_opposite_to_its_negative() -> None:
    volume = noise(0)
    torch.testing.assert_close(fsc(volume, 3 * volume), torch.ones(BOX // 2 + 1, dtype=torch.float64))
    torch.testing.assert_close(fsc(volume, -volume)[1:], -torch.ones(BOX // 2, dtype=torch.float64))


@pytest.mark.parametrize("snr", [0.25, 1.0, 4.0])
def test_half_maps_of_known_snr_have_its_fsc(snr: float) -> None:
    signal = noise(1)
    a, b = (signal + noise(seed) / snr**0.5 for seed in (2, 3))
    curve = fsc(a, b)
    counted = torch.arange(BOX // 2 + 1) >= 6
    assert float(curve[counted].mean()) == pytest.approx(snr / (1 + snr), abs=0.01)
    assert float((curve[counted] - snr / (1 + snr)).abs().max()) < 0.15


def test_each_shell_is_the_correlation_of_its_own_coefficients() -> None:
    a, b = noise(4, 8), noise(5, 8)
    fa, fb = (torch.fft.fftn(v.double()) for v in (a, b))
    k = torch.fft.fftfreq(8, 1 / 8)
    shell = (k[:, None, None] ** 2 + k[:, None] ** 2 + k**2).sqrt().round()
    for s in range(1, 5):
        x, y = fa[shell == s], fb[shell == s]
        expected = (x * y.conj()).sum().real / (x.abs().square().sum() * y.abs().square().sum()).sqrt()
        assert float(fsc(a, b)[s]) == pytest.approx(float(expected))


def test_an_empty_shell_does_not_correlate() -> None:
    empty = torch.zeros(8, 8, 8)
    assert fsc(empty, noise(0, 8)).tolist() == [1, 0, 0, 0, 0]


def test_resolution_is_interpolated_between_shells() -> None:
    curve = torch.tensor([1.0, 1.0, 0.5, 0.0, 0.0])  # box 8
    assert resolution_angstrom(curve, apix=2.0, threshold=0.5) == pytest.approx(16 / 2)
    assert resolution_angstrom(curve, apix=2.0, threshold=0.25) == pytest.approx(16 / 2.5)


def test_resolution_claims_neither_beyond_nyquist_nor_without_signal() -> None:
    assert resolution_angstrom(torch.ones(9), apix=1.5) == 3.0
    assert resolution_angstrom(torch.tensor([1.0, 0.1, 0.9, 0.9, 0.9]), apix=1.5) == math.inf
    with pytest.raises(ValueError, match="not finite"):
        resolution_angstrom(torch.tensor([1.0, math.nan, 0.5]), apix=1.0)


def test_random_phases_keep_amplitudes_and_low_shells() -> None:
    volume = noise(6)
    random = randomise_phases(volume, 10, torch.Generator().manual_seed(0))
    a, b = torch.fft.rfftn(volume), torch.fft.rfftn(random)
    torch.testing.assert_close(a.abs(), b.abs(), atol=1e-3, rtol=1e-3)
    kept = half_radius(BOX).round() < 10
    torch.testing.assert_close(a[kept], b[kept], atol=1e-3, rtol=1e-3)
    assert float(fsc(volume, random)[12:].abs().max()) < 0.15


def test_a_tight_mask_inflates_the_fsc_of_noise_and_the_correction_removes_it() -> None:
    signal = low_pass(molecule(), 1.0, BOX / 6, edge_shells=2)  # nothing but noise beyond shell 7
    mask = (signal > signal.std()).float()  # a jagged mask about single blobs, 3% of the box
    half1, half2 = (10 * signal + 0.2 * noise(seed) for seed in (7, 8))
    curves, noisy = masked_fsc(half1, half2, mask), slice(10, BOX // 2 - 8)
    assert curves.randomised_from == 7
    assert float(curves.unmasked[noisy].abs().max()) < 0.1
    assert float(curves.masked[noisy].mean()) > 0.3
    assert abs(float(curves.corrected[noisy].mean())) < 0.1
    assert resolution_angstrom(curves.masked, 1.0) < 0.75 * resolution_angstrom(curves.corrected, 1.0)


def test_the_correction_never_raises_the_masked_curve() -> None:
    mask = soft_disc(BOX, 6, 2, dims=3)
    half1, half2 = (molecule() + noise(seed) for seed in (9, 10))
    curves = masked_fsc(half1, half2, mask)
    assert bool((curves.corrected <= curves.masked + 1e-9).all())
    assert float(curves.corrected.sum()) < float(curves.masked.sum()) - 0.1
    low = slice(0, curves.randomised_from)
    torch.testing.assert_close(curves.corrected[low], curves.masked[low])


def test_a_wide_mask_reveals_signal_that_solvent_noise_hides() -> None:
    mask = soft_disc(BOX, 0.4 * BOX / 2, 5, dims=3)
    signal = molecule()
    half1, half2 = (signal + 0.7 * noise(seed) for seed in (11, 12))
    curves, shells = masked_fsc(half1, half2, mask), slice(8, 20)
    assert float(curves.corrected[shells].mean()) > float(curves.unmasked[shells].mean()) + 0.2


def test_maps_that_agree_everywhere_need_no_correction_and_seeds_repeat() -> None:
    volume, mask = molecule(), soft_disc(BOX, 10, 4, dims=3)
    same = masked_fsc(volume, volume, mask)
    assert same.randomised_from == BOX // 2 + 1
    torch.testing.assert_close(same.corrected, same.masked)
    noisy = noise(13), noise(14)
    assert torch.equal(masked_fsc(*noisy, mask, seed=3).corrected, masked_fsc(*noisy, mask, seed=3).corrected)
    assert not torch.equal(masked_fsc(*noisy, mask, seed=3).corrected, masked_fsc(*noisy, mask, seed=4).corrected)


def test_curves_do_not_depend_on_the_device(device: str) -> None:
    a, b = noise(15).to(device), noise(16).to(device)
    torch.testing.assert_close(fsc(a, b).cpu(), fsc(noise(15), noise(16)))
    mask = soft_disc(BOX, 12, 4, dims=3)
    found = masked_fsc(a, b, mask.to(device)).corrected.cpu()
    torch.testing.assert_close(found, masked_fsc(noise(15), noise(16), mask).corrected, atol=1e-4, rtol=1e-4)


def test_unequal_maps_are_refused() -> None:
    with pytest.raises(ValueError, match="same even box"):
        fsc(noise(0, 8), noise(0, 10))
    with pytest.raises(ValueError, match="mask"):
        masked_fsc(noise(0, 8), noise(1, 8), torch.ones(10, 10, 10))
