"""Filters do to each frequency what they say, and the hand and the contour level are right."""

import math
from pathlib import Path

import pytest
import torch

from pyro_cryo.analysis.fsc import fsc, shell_sum
from pyro_cryo.analysis.maps import (
    contour_level,
    fsc_weight,
    guinier_bfactor,
    low_pass,
    sharpen,
    write_chimerax,
)
from pyro_cryo.data.simulate import hinge
from pyro_cryo.physics.fourier import flip_hand, half_radius
from pyro_cryo.physics.rotations import random_rotations

BOX, APIX = 64, 1.25


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(seed))


def gain(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Amplitude of each shell over what it was: (D / 2 + 1,)."""
    power = [shell_sum(torch.fft.rfftn(v.double()).abs().square()) for v in (after, before)]
    return (power[0] / power[1]).sqrt()


def test_low_pass_is_one_below_half_at_and_zero_beyond_the_resolution() -> None:
    volume, shell = noise(), 16
    ratio = gain(low_pass(volume, APIX, BOX * APIX / shell, edge_shells=6), volume)
    torch.testing.assert_close(ratio[:13], torch.ones(13, dtype=torch.float64), atol=1e-4, rtol=0)
    assert float(ratio[shell]) == pytest.approx(0.5, abs=0.02)
    assert float(ratio[20:].max()) < 1e-5
    assert bool((ratio[1:].diff() < 1e-4).all())


def test_low_pass_keeps_the_mean_and_refuses_no_resolution() -> None:
    volume = noise() + 3
    assert float(low_pass(volume, APIX, 10.0).mean()) == pytest.approx(float(volume.mean()), rel=1e-4)
    with pytest.raises(ValueError, match="resolution 0"):
        low_pass(volume, APIX, 0.0)


@pytest.mark.parametrize("planted", [80.0, 250.0])
def test_the_guinier_fit_finds_a_planted_decay_and_sharpening_undoes_it(planted: float) -> None:
    flat = noise(1)
    decayed = sharpen(flat, APIX, planted)
    found = guinier_bfactor(decayed, APIX, resolution_angstrom=2.6)
    assert found == pytest.approx(-planted, abs=3)
    mended = sharpen(decayed, APIX, found)
    fitted = slice(9, 30)
    torch.testing.assert_close(gain(mended, flat)[fitted], torch.ones(21, dtype=torch.float64), atol=0.06, rtol=0)


def test_no_b_factor_is_fitted_to_too_few_shells() -> None:
    with pytest.raises(ValueError, match="no B factor can be fitted between 10 and 9"):
        guinier_bfactor(noise(), APIX, resolution_angstrom=9.0)


def test_fsc_weighting_is_the_best_filter_of_noisy_half_maps() -> None:
    k = half_radius(BOX)
    truth = torch.fft.irfftn(torch.fft.rfftn(noise(2)) * torch.exp(-k / 8), s=(BOX,) * 3)
    half1, half2 = (truth + 0.05 * noise(seed) for seed in (3, 4))
    full, curve = (half1 + half2) / 2, fsc(half1, half2)
    weighted = fsc_weight(full, curve)
    cref = (2 * curve.clamp(0, 1) / (1 + curve.clamp(0, 1))).sqrt()
    torch.testing.assert_close(gain(weighted, full)[1:], cref[1:], atol=1e-3, rtol=1e-3)
    # Cref estimates the correlation of the full map with the truth, shell by shell
    assert float((fsc(full, truth) - cref)[1:].abs().mean()) < 0.08
    assert float((weighted - truth).norm()) < float((full - truth).norm())
    with pytest.raises(ValueError, match="20 shells for a box of 64; give 33"):
        fsc_weight(full, curve[:20])


def test_the_hand_flips_about_the_centre_voxel_and_back() -> None:
    volume = noise(5)
    flipped = flip_hand(volume)
    c = BOX // 2
    assert torch.equal(flip_hand(flipped), volume)
    assert torch.equal(flipped[c], volume[c])
    assert torch.equal(flipped[c + 7], volume[c - 7])


def test_a_flipped_map_gives_the_projections_of_mirrored_poses() -> None:
    source, box = hinge(1), 32
    apix = source.apix_for(box, None)
    mirror = torch.diag(torch.tensor([1.0, 1.0, -1.0]))
    mirrored = type(source)(source.xyz @ mirror, source.weight, source.coordinate, source.sigma_angstrom)
    flipped = flip_hand(source.volume(0, box, apix))
    torch.testing.assert_close(flipped[1:], mirrored.volume(0, box, apix)[1:], atol=1e-5, rtol=1e-4)
    rotation = random_rotations(3, torch.Generator().manual_seed(0))
    shift = torch.zeros(3, 2)
    torch.testing.assert_close(
        mirrored.projector(0, box, apix)(mirror @ rotation @ mirror, shift),
        source.projector(0, box, apix)(rotation, shift),
        atol=1e-4,
        rtol=1e-4,
    )


def test_the_contour_level_encloses_the_stated_share_of_voxels() -> None:
    volumes = torch.stack([noise(6), 2 * noise(7)])
    for share in (0.01, 0.2):
        level = contour_level(volumes, share)
        assert float((volumes > level).float().mean()) == pytest.approx(share, rel=1e-3)
    with pytest.raises(ValueError, match="volume fraction 3"):
        contour_level(volumes, 3.0)


def test_the_chimerax_script_opens_every_map_at_one_level(tmp_path: Path) -> None:
    maps = [tmp_path / "maps" / f"state {i}.mrc" for i in range(3)]
    write_chimerax(tmp_path / "show.cxc", maps, level=0.1234)
    lines = (tmp_path / "show.cxc").read_text().splitlines()
    assert lines[0] == 'open "maps/state 0.mrc" "maps/state 1.mrc" "maps/state 2.mrc" vseries true'
    assert [line for line in lines if "level" in line] == [lines[1]]
    assert "level 0.1234" in lines[1]
    assert not any(line.startswith("save") for line in lines)
    write_chimerax(tmp_path / "one.cxc", maps[:1], level=math.pi)
    assert "vseries" not in (tmp_path / "one.cxc").read_text()
    with pytest.raises(ValueError, match="no maps"):
        write_chimerax(tmp_path / "none.cxc", [], 1.0)
