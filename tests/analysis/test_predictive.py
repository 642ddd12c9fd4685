"""What a model leaves of images is white where model and noise are right; junk stands out."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from images import Given
from torch import Tensor

from pyro_cryo.analysis.predictive import ResidualPower, image_fit, residual_power
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import hinge, simulate
from pyro_cryo.distributions.image import StudentImage
from pyro_cryo.inference.run import Run
from pyro_cryo.models.linear_subspace import LinearSubspace
from pyro_cryo.pose import KnownPose

BOX, COUNT = 32, 300
STRONG, EMPTY, OTHER = slice(0, 10), slice(10, 20), slice(20, 30)


@pytest.fixture(scope="module")
def star(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images at SNR 1, the first of them junk: of 1.3 times the noise, of noise alone, of other particles."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = tmp_path_factory.mktemp("predictive") / "case"
        path = simulate(hinge(1), folder, n_images=COUNT, box=BOX, snr=1.0, seed=0)
    rng = np.random.default_rng(0)
    with np.load(folder / "truth.npz") as truth:
        sd = float(truth["noise_sd"])
    with mrcfile.open(folder / "particles.mrcs", mode="r+") as stack:
        extra = (1.3**2 - 1) ** 0.5 * sd
        stack.data[STRONG] += extra * rng.standard_normal((10, BOX, BOX), dtype=np.float32)
        stack.data[EMPTY] = sd * rng.standard_normal((10, BOX, BOX), dtype=np.float32)
        stack.data[OTHER] = stack.data[OTHER][::-1].copy()
    return path


@pytest.fixture(scope="module")
def run(star: Path) -> Run:
    """The true map with a little motion about it, and the true noise."""
    particles = Particles.open(star)
    with np.load(star.parent / "truth.npz") as truth:
        volume, sd = torch.from_numpy(truth["volumes"][0]), float(truth["noise_sd"])
    model = LinearSubspace(BOX, zdim=2, contrast=0.1)
    model.consensus.set(volume)
    model.coefficients.contrast_sd.fill_(1e-3)
    model.volume.set(torch.stack([volume, 0.01 * volume.roll(2, 0), 0.01 * volume.roll(2, 1)]))
    model.log_sigma.data.fill_(math.log(sd / 2**0.5))
    return Run(model, particles, guide=model.make_guide())


def test_the_residual_is_the_noise(run: Run) -> None:
    found = residual_power(run, run.particles[30:])
    assert found.power.shape == (1, BOX // 2 + 1)
    shells = torch.bincount(run.particles.half.shell, minlength=BOX // 2 + 1)
    assert found.count[0].tolist() == (270 * shells).tolist()
    low, high = found.band(0.999)
    assert bool(((found.power >= low) & (found.power <= high))[0, 1:].all())
    assert bool(found.power[0, 0].isnan())
    assert float((high - low)[0, 8]) < 0.12


def test_a_shell_of_other_noise_is_found(run: Run) -> None:
    model = LinearSubspace(BOX, zdim=2, contrast=0.1)
    model.load_state_dict(run.model.state_dict())
    model.log_sigma.data[0, 5] += 0.5 * math.log(1.25)
    found = residual_power(Run(model, run.particles, guide=model.make_guide()), run.particles[30:])
    low, high = found.band(0.999)
    outside = ((found.power < low) | (found.power > high))[0]
    assert outside.nonzero().flatten().tolist() == [5]
    assert float(found.power[0, 5]) == pytest.approx(0.8, abs=0.05)


def test_a_band_has_its_level() -> None:
    """All 20 shells of 50 coefficients together."""
    generator = torch.Generator().manual_seed(0)
    power = torch.randn(500, 20, 100, generator=generator).square().mean(-1)
    low, high = ResidualPower(power[:1], torch.full((1, 20), 50.0)).band(0.9)
    inside = ((power >= low) & (power <= high)).all(1).double().mean()
    assert float(inside) == pytest.approx(0.9, abs=0.05)
    with pytest.raises(ValueError, match="level is 1;"):
        ResidualPower(power[:1], torch.full((1, 20), 50.0)).band(1)


def test_junk_is_found_and_little_else(run: Run) -> None:
    found = image_fit(run, run.particles)
    assert found.index.tolist() == list(range(COUNT))
    assert found.degrees == 2 * len(run.particles.half)
    assert np.median(found.p_value[STRONG]) < 1e-6 < found.p_value[30:].min()
    assert np.median(found.match_p_value[EMPTY]) < 1e-6 < found.match_p_value[30:].min()
    assert np.median(found.match_p_value[OTHER]) < 1e-3
    junk = found.junk(0.05)
    assert len(np.intersect1d(junk, np.arange(30))) >= 25
    assert (junk >= 30).sum() <= 4


def test_sound_images_score_as_standard_normals(run: Run) -> None:
    found = image_fit(run, run.particles[30:])
    for score in (found.z_score, found.match):
        assert abs(score.mean()) < 4 / 270**0.5
        assert score.std() == pytest.approx(1, abs=0.15)
    assert np.quantile(found.p_value, 0.1) == pytest.approx(0.1, abs=0.08)


def test_noise_that_a_window_correlates_widens_the_scores(run: Run, star: Path) -> None:
    windowed = Particles.open(star, window=0.6)[30:]
    model = LinearSubspace(BOX, zdim=2, contrast=0.1)
    model.load_state_dict(run.model.state_dict())
    own = Run(model, windowed, guide=model.make_guide())
    for seed in range(3):
        model.log_sigma.data += 0.5 * residual_power(own, windowed, seed).power.nan_to_num(1.0).log()
    found = image_fit(own, windowed)
    assert abs(found.z_score.mean()) < 0.3
    assert found.z_score.std() > 1.3


def test_views_of_a_particle_are_images_each(run: Run) -> None:
    pairs = run.particles[30:]
    pairs = replace(pairs, table=replace(pairs.table, particle=torch.arange(270) // 2))
    found = image_fit(run, pairs)
    assert len(found.index) == 270
    assert abs(found.z_score.mean()) < 4 / 270**0.5


class HeavyTails(Given):
    """Of variance 2 sigma^2."""

    def noise(self, mean: Tensor, sigma: Tensor) -> StudentImage:
        return StudentImage(torch.tensor(4.0), mean, sigma)


def test_noise_of_heavier_tails_has_a_variance_too(run: Run) -> None:
    assert isinstance(run.model, LinearSubspace)
    model = HeavyTails(run.model.consensus.voxels, float(run.model.sigma.detach().mean()), 1.0)
    model.poses = KnownPose()
    found = residual_power(Run(model, run.particles, guide=model.make_guide()), run.particles[30:])
    torch.testing.assert_close(found.power[0, 4:], torch.full((BOX // 2 - 3,), 0.5), rtol=0.1, atol=0)
