"""Reconstruction from files: the noise, the map, its halves and its uncertainty are what the truth says."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from pyro_cryo.analysis.fsc import fsc
from pyro_cryo.data.blobs import Complex
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import hinge, simulate
from pyro_cryo.data.star import read_star, write_star
from pyro_cryo.inference.reconstruct import (
    Reconstruction,
    half_sets,
    image_power,
    noise_floor,
    reconstruct,
    sample_rows,
    weighed,
)
from pyro_cryo.physics.fourier import half_radius, soft_disc
from pyro_cryo.physics.rotations import point_group

BOX = 32
POWER = np.linspace(3, 1, BOX // 2 + 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def molecule() -> tuple[Complex, float]:
    """Blobs 1.3 pixels wide that fill 60% of the box, whose images nothing aliases."""
    source = hinge(1)
    apix = 2 * source.radius_angstrom / (0.6 * BOX)
    return dataclasses.replace(source, sigma_angstrom=1.3 * apix), apix


def make_case(folder: Path, n_images: int = 1000, snr: float = 0.1, **more: object) -> Path:
    source, apix = molecule()
    return simulate(source, folder, n_images=n_images, box=BOX, apix=apix, snr=snr, **more)  # type: ignore[arg-type]


def true_map(star: Path) -> Tensor:
    with np.load(star.parent / "truth.npz") as truth:
        return torch.from_numpy(truth["volumes"][0])


def planted_sigma(star: Path, power: np.ndarray = POWER) -> Tensor:
    """sd of each real component by shell: white noise of a pixel's sd s has s^2 / 2, coloured by relative power."""
    with np.load(star.parent / "truth.npz") as truth:
        pixel_sd = float(truth["noise_sd"])
    k = np.fft.fftfreq(BOX, 1 / BOX)
    shell = np.sqrt(k[:, None] ** 2 + k**2).round().astype(int).clip(max=BOX // 2)
    return torch.from_numpy(pixel_sd * np.sqrt(power / power[shell].mean() / 2)).float()


@pytest.fixture(scope="module")
def star(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_case(tmp_path_factory.mktemp("case"), noise_power=POWER.tolist())


@pytest.fixture(scope="module")
def result(star: Path) -> Reconstruction:
    return reconstruct(Particles.open(star), draws=8)


def test_the_noise_of_every_shell_is_learned(star: Path, result: Reconstruction) -> None:
    ratio = (result.sigma[0] / planted_sigma(star))[1:-1]  # the last shell lies outside the disc but for its rim
    print("learned over planted sigma:", *[f"{float(r):.3f}" for r in ratio])
    assert result.sigma.shape == (1, BOX // 2 + 1)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=0.02)


def test_the_noise_alone_is_less_than_the_power_of_the_images(star: Path) -> None:
    particles = Particles.open(star)
    power = image_power(particles, 200, "cpu")[0]
    assert float((power / planted_sigma(star))[1:5].min()) > 1.05
    learned = weighed(particles, torch.eye(3)[None], seeded(), 100, "cpu")[1][0]
    assert float((power / learned)[1:5].min()) > 1.05


def test_the_map_is_the_true_one(star: Path, result: Reconstruction) -> None:
    truth = true_map(star)
    curve = fsc(result.volume, truth)
    print("FSC to the truth:", *[f"{float(c):.3f}" for c in curve])
    assert float(curve[1:6].min()) > 0.99
    assert float(curve[1:11].mean()) > 0.95  # beyond, blobs of 1.3 pixels leave next to nothing
    scale = float((result.volume * truth).sum() / truth.square().sum())
    assert scale == pytest.approx(1.0, abs=0.03)  # of the images' density, not shrunk
    assert float((result.volume - truth).norm() / truth.norm()) < 0.06


@pytest.mark.parametrize("snr", [1.0, 10.0])
def test_cleaner_images_give_a_better_map(tmp_path: Path, snr: float) -> None:
    """Also in the lowest shells, where the CTF is near zero and the map is strongest."""
    star = make_case(tmp_path, 300, snr=snr)
    result, truth = reconstruct(Particles.open(star), draws=4), true_map(star)
    error = float((result.volume - truth).norm() / truth.norm())
    print(f"relative error of the map at a signal-to-noise ratio of {snr:g}: {error:.3f}")
    assert error < 0.05
    assert float(fsc(result.volume, truth)[1:8].min()) > 0.99


def test_the_mask_holds_the_molecule(star: Path, result: Reconstruction) -> None:
    truth = true_map(star)
    assert float((truth * result.mask).sum() / truth.sum()) > 0.97
    assert float(result.mask.mean()) < 0.4


def test_half_maps_agree_less_with_each_other_than_the_map_with_the_truth(star: Path, result: Reconstruction) -> None:
    between = fsc(*result.halves)
    to_truth = fsc(result.volume, true_map(star))
    assert float(between[1:5].min()) > 0.9
    assert float(between[-3:].max()) < 0.6
    assert bool((between[1:11] < to_truth[1:11]).all())


def test_the_error_of_the_map_is_what_its_sd_says(star: Path, result: Reconstruction) -> None:
    """Inside the mask the error is the posterior's, up to what trilinear slices and a learned prior add."""
    inside = result.mask > 0.5
    ratio = ((result.volume - true_map(star)).square() / result.sd.square())[inside].mean()
    print(f"mean squared error over the posterior variance: {float(ratio):.2f}")
    assert 0.6 < float(ratio) < 1.6
    assert bool((result.sd >= 0).all())
    assert bool(torch.isfinite(result.sd).all())


def test_the_same_seed_gives_the_same_map(star: Path, result: Reconstruction) -> None:
    again = reconstruct(Particles.open(star), draws=8)
    torch.testing.assert_close(again.volume, result.volume, rtol=0, atol=0)
    torch.testing.assert_close(again.sd, result.sd, rtol=0, atol=0)


def test_masks_may_be_given_or_left_out(star: Path, result: Reconstruction) -> None:
    particles, truth = Particles.open(star), true_map(star)
    plain = reconstruct(particles, mask=None, draws=1)
    assert bool((plain.mask == 1).all())
    given = reconstruct(particles, mask=result.mask, draws=1)
    assert float(given.volume[result.mask == 0].abs().max()) == 0
    error = [float((r.volume - truth).norm()) for r in (plain, result, given)]
    assert error[1] < error[0]
    assert error[2] < error[0]


def test_a_tight_mask_and_the_density_at_its_edge_are_not_multiplied(star: Path) -> None:
    """A local rms taken within the mask falls at its soft edge already: the prior is the smaller of the two."""
    mask = soft_disc(BOX, 0.05 * BOX, 0.25 * BOX, dims=3)
    scale = reconstruct(Particles.open(star), mask=mask, draws=1).scale
    assert bool((scale <= mask).all())
    edge = (mask > 0.02) & (mask < 0.2)
    share = float((scale / mask)[edge].median())
    print(f"of the mask, at its edge: {share:.2f}")
    assert share > 0.2


def test_half_sets_of_noise_do_not_agree(tmp_path: Path) -> None:
    result = reconstruct(Particles.open(make_case(tmp_path, 600, snr=1e-7)), draws=1)
    curve = fsc(*result.halves)[2:]
    assert float(curve.mean().abs()) < 0.05
    assert float(curve[2:].abs().max()) < 0.25
    # and what is shown of a map that is not there is small beside one that the images would show
    assert float(result.signal_to_noise[2:].mean()) < 0.2


def test_half_sets_are_those_of_the_table(star: Path, tmp_path: Path) -> None:
    blocks = read_star(star)
    particles = blocks["particles"]
    assert isinstance(particles, pd.DataFrame)
    planted = np.random.default_rng(0).integers(0, 3, len(particles))
    particles["rlnRandomSubset"] = planted
    write_star(star.parent / "halves.star", blocks)
    opened = Particles.open(star.parent / "halves.star")
    found = half_sets(opened, seeded())
    known = planted > 0
    np.testing.assert_array_equal(found.numpy()[known], planted[known])
    drawn = found[~torch.from_numpy(known)]
    assert set(drawn.tolist()) == {1, 2}
    assert float(drawn.double().mean()) == pytest.approx(1.5, abs=0.1)
    torch.testing.assert_close(half_sets(opened, seeded()), found)
    # an uneven split shows in the half-maps: more images, a better map
    particles["rlnRandomSubset"] = np.where(np.arange(len(particles)) < 900, 1, 2)
    write_star(star.parent / "uneven.star", blocks)
    first, second = reconstruct(Particles.open(star.parent / "uneven.star"), draws=1).halves
    truth = true_map(star)
    assert float(fsc(first, truth)[1:12].mean()) > float(fsc(second, truth)[1:12].mean()) + 0.05


def test_images_of_one_half_set_are_halved_again(star: Path) -> None:
    particles = Particles.open(star)
    one = dataclasses.replace(
        particles, table=dataclasses.replace(particles.table, half_set=torch.ones_like(particles.half_set))
    )
    assert half_sets(one, seeded()).unique().tolist() == [1, 2]
    found = reconstruct(one)
    assert bool(torch.stack([found.volume, found.sd, *found.halves]).isfinite().all())
    assert not torch.equal(*found.halves)


def test_a_single_particle_has_a_map(star: Path) -> None:
    found = reconstruct(Particles.open(star)[:1])
    assert bool(torch.stack([found.volume, found.sd, found.scale]).isfinite().all())


def test_noise_free_images_do_not_diverge(tmp_path: Path) -> None:
    star = make_case(tmp_path, 300, snr=1e9)
    result = reconstruct(Particles.open(star), draws=1)
    truth = true_map(star)
    for field in ("volume", "sd", "tau", "sigma", "signal_to_noise", "coefficient_sd"):
        assert bool(torch.isfinite(getattr(result, field)).all()), field
    assert float(fsc(result.volume, truth)[1:11].min()) > 0.97
    assert float((result.volume - truth).norm() / truth.norm()) < 0.35
    # what is left in the lowest shells, where the CTF is near zero, counts as noise; elsewhere it is little
    power = image_power(Particles.open(star), 100, "cpu")
    assert float((result.sigma / power)[0, 3:9].max()) < 0.35


def merged(folder: Path, first: Path, second: Path) -> Path:
    """One table of two cases, each an optics group of its own."""
    tables = []
    for number, star in enumerate((first, second), 1):
        blocks = read_star(star)
        optics, rows = blocks["optics"], blocks["particles"]
        assert isinstance(optics, pd.DataFrame)
        assert isinstance(rows, pd.DataFrame)
        optics["rlnOpticsGroup"], optics["rlnOpticsGroupName"] = number, f"opticsGroup{number}"
        rows["rlnOpticsGroup"] = number
        rows["rlnImageName"] = [name.replace("@", f"@{star.parent.name}/") for name in rows["rlnImageName"]]
        tables.append((optics, rows))
    optics, rows = (pd.concat(both, ignore_index=True) for both in zip(*tables, strict=True))
    write_star(folder / "both.star", {"optics": optics, "particles": rows.sample(frac=1, random_state=0)})
    return folder / "both.star"


def test_optics_groups_have_noise_of_their_own(tmp_path: Path) -> None:
    flat = np.ones(BOX // 2 + 1)
    first = make_case(tmp_path / "a", 600, snr=0.3, noise_power=POWER.tolist())
    second = make_case(tmp_path / "b", 600, snr=0.05, noise_power=flat.tolist(), seed=1)
    particles = Particles.open(merged(tmp_path, first, second))
    assert particles.n_noise_groups == 2
    # both stacks were scaled to a variance of 1: the same molecule has another contrast in each, so look at the noise
    found = weighed(particles, torch.eye(3)[None], seeded(), 200, "cpu")[1]
    alone = weighed(Particles.open(second), torch.eye(3)[None], seeded(), 200, "cpu")[1][0]
    high = slice(BOX // 4, -1)  # where there is next to no signal
    torch.testing.assert_close((found[0] / planted_sigma(first))[high], torch.ones(8), rtol=0, atol=0.02)
    torch.testing.assert_close((found[1] / planted_sigma(second, flat))[high], torch.ones(8), rtol=0, atol=0.02)
    torch.testing.assert_close(alone[high], found[1][high], rtol=0.02, atol=0)
    assert float((found[1] / found[0])[BOX // 2 - 1]) > 1.1  # the two spectra do differ


def test_a_sample_of_each_group_is_taken_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    particles = Particles.open(merged(tmp_path, make_case(tmp_path / "a", 60), make_case(tmp_path / "b", 30, seed=1)))
    monkeypatch.setattr("pyro_cryo.inference.reconstruct.SAMPLE", 20)
    rows = sample_rows(particles, seeded())
    assert bool((rows.diff() > 0).all())
    assert torch.bincount(particles.noise_group[rows]).tolist() == [20, 20]


def test_the_noise_floor_fills_empty_shells_and_bounds_the_rest() -> None:
    sigma = torch.zeros(2, 17)
    sigma[0, 1:], sigma[0, 1], sigma[0, 9] = 2.0, 100.0, 1e-9
    floor = noise_floor(sigma)
    expected = torch.full((17,), 2.0)
    expected[1], expected[9] = 100.0, 0.2  # a tenth of what the shells beyond the first have
    torch.testing.assert_close(floor[0], expected)
    assert bool((floor[1] > 0).all())


def symmetric_molecule(apix: float) -> Complex:
    """Four copies of a few blobs about the z axis."""
    xyz = torch.randn(12, 3, generator=seeded(4)) * torch.tensor([4.0, 4.0, 5.0]) * apix
    copies = torch.cat([xyz @ element.T for element in point_group("C4")])
    return Complex(copies[None], torch.ones(1, len(copies)), torch.zeros(1, 1), 1.3 * apix)


def test_symmetry_is_worth_as_many_images(tmp_path: Path) -> None:
    source = symmetric_molecule(4.0)
    star = simulate(source, tmp_path, n_images=400, box=BOX, apix=4.0, snr=0.03)
    particles, truth = Particles.open(star), true_map(star)
    with_it = reconstruct(particles, symmetry=point_group("C4"), draws=8)
    without = reconstruct(particles, draws=8)
    curves = [fsc(r.volume, truth)[1:14].mean() for r in (with_it, without)]
    print(f"mean FSC to the truth: {float(curves[0]):.3f} with C4, {float(curves[1]):.3f} without")
    assert curves[0] > curves[1] + 0.02
    quarter = with_it.volume.clone()
    quarter[:, 1:, 1:] = with_it.volume[:, 1:, 1:].rot90(1, (1, 2))
    assert float((quarter - with_it.volume)[:, 1:, 1:].norm() / with_it.volume.norm()) < 0.02
    torch.testing.assert_close(with_it.sigma, without.sigma, rtol=0.02, atol=0)
    inside = with_it.mask > 0.5
    ratio = ((with_it.volume - truth).square() / with_it.sd.square())[inside].mean()
    print(f"mean squared error over the posterior variance with C4: {float(ratio):.2f}")
    assert 0.5 < float(ratio) < 2


def test_the_prior_falls_where_the_signal_does(result: Reconstruction) -> None:
    assert bool((result.tau[2:-1].log().diff() < 0.5).all())
    assert float(result.tau[12] / result.tau[2]) < 0.3
    assert bool((result.coefficient_sd <= result.tau * 1.0001).all())
    power = torch.fft.rfftn(result.volume).abs().square()
    assert float(power[half_radius(BOX) > BOX / 2 + 1].sum()) < 0.02 * float(power.sum())
