"""The recipes that integrate z out: the guide is the exact posterior of the story, and a run keeps what it found."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_cryo.analysis.latent import neighbour_r2
from pyro_cryo.data.mrc_map import write_map
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import hinge, simulate
from pyro_cryo.distributions import LowRankFourier
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.run import Run
from pyro_cryo.model import form_image
from pyro_cryo.models.linear_subspace import LinearSubspace
from pyro_cryo.models.manifold import Manifold
from pyro_cryo.physics.fourier import radius
from pyro_cryo.physics.slices import slice_coordinates
from pyro_cryo.volumes.conjugate import noise_sd

BOX = 24
KINDS = {"linear_subspace": LinearSubspace, "manifold": Manifold}


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> Particles:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        star = simulate(hinge(21), tmp_path_factory.mktemp("case"), n_images=700, box=BOX, snr=0.5, seed=3)
        return Particles.open(star)


@pytest.fixture(scope="module", params=list(KINDS))
def run(request: pytest.FixtureRequest, particles: Particles, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Contrast is held: then the guide is the posterior to the last digit."""
    few = {"points": 120, "features": 8} if request.param == "manifold" else {}
    model = KINDS[request.param](BOX, zdim=4, contrast=0.0, **few)
    return fit(model, particles, tmp_path_factory.mktemp("runs") / request.param)


def log_evidence(run: Run, particles: Particles) -> torch.Tensor:
    """log p(image) of the first fifty, z integrated out, all frequencies."""
    batch = particles.batch(slice(0, 50))
    model, guide = run.model, run.guide
    assert isinstance(model, LinearSubspace)
    inside = model.coefficients.moments(guide.seen(batch)).evidence  # type: ignore[union-attr, operator]
    count = model.volume.count
    points = slice_coordinates(batch.rotation, batch.half.k, batch.freq_scale)
    beyond = form_image(model.consensus(points), batch.translation, batch)[:, count:]
    sd = noise_sd(batch, model.sigma)[:, count:, None]
    outside = (-0.5 * ((batch.image[:, count:] - beyond) / sd).square() - sd.log()).sum((1, 2))
    return inside + outside - len(batch.half) * math.log(2 * math.pi)


def test_the_elbo_is_the_evidence(run: Run, particles: Particles) -> None:
    """The guide leaves no gap: every draw of it gives log p(image)."""
    batch = particles.batch(slice(0, 50))
    with torch.no_grad():
        expected = float(log_evidence(run, particles).sum())
        for seed in range(3):
            pyro.set_rng_seed(seed)
            found = -Trace_ELBO().loss(run.model, run.guide, batch)
            assert found == pytest.approx(expected, abs=0.05)


def test_the_story_of_the_linear_model_is_the_low_rank_gaussian(run: Run, particles: Particles) -> None:
    model = run.model
    if isinstance(model, Manifold):
        pytest.skip("its images are a mixture")
    assert isinstance(model, LinearSubspace)
    batch, count = particles.batch(slice(0, 50)), model.volume.count
    low = batch.band(count)
    points = slice_coordinates(low.rotation, low.half.k, low.freq_scale)
    with torch.no_grad():
        slices = [model.volume(points, one.expand(len(low), -1)) for one in torch.eye(1 + model.zdim)]
        images = torch.stack([form_image(s, low.translation, low) for s in slices], -1)
        sd = noise_sd(low, model.sigma)[..., None]
        low_rank = LowRankFourier(images[..., 0], images[..., 1:], sd)
        mean, covariance = low_rank.posterior(low.image)
        z, z_cov = run.guide.posterior(batch)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(z, mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(z_cov, covariance, rtol=1e-3, atol=1e-4)


def test_the_latent_coordinate_follows_the_motion(run: Run, particles: Particles) -> None:
    with np.load(particles.table.path.parent / "truth.npz") as truth:
        assert neighbour_r2(run.latent.z, truth["coordinate"])[0] > 0.9


def test_a_run_keeps_rank_band_and_features(run: Run) -> None:
    assert run.folder is not None
    again = Run.load(run.folder)
    assert again.model.zdim == run.model.zdim == run.latent.z.shape[1]
    torch.testing.assert_close(again.volume(run.latent.z[:3]), run.volume(run.latent.z[:3]))
    torch.testing.assert_close(torch.tensor(again.encode(run.particles[:20]).z), torch.tensor(run.latent.z[:20]))
    assert {"map.mrc", "half1.mrc", "fsc.tsv", "latent.npz"} <= {path.name for path in run.folder.iterdir()}


def test_contrast_is_inferred(particles: Particles) -> None:
    """Images made weaker and stronger: their contrast is learned, and z is not spent on it."""
    model = LinearSubspace(BOX, zdim=3, kmax=6)
    varied = 1 + 0.25 * torch.randn(len(particles), generator=torch.Generator().manual_seed(0))
    table = particles.table
    images = type(particles)(type(table)(**{**vars(table), "sign": varied}), particles.stack, particles.box)
    run = fit(model, images)
    assert float(run.model.coefficients.contrast_sd) > 0.05  # type: ignore[union-attr, arg-type]
    batch = images.batch(slice(0, 300))
    moments = run.model.coefficients.moments(run.guide.seen(batch))  # type: ignore[union-attr, operator]
    assert float(torch.corrcoef(torch.stack([moments.a, varied[:300]]))[0, 1]) > 0.8
    still = max(abs(float(torch.corrcoef(torch.stack([z, varied[:300]]))[0, 1])) for z in moments.z.T)
    assert still < 0.3


def test_motion_stays_in_the_focus_mask(particles: Particles, tmp_path: Path) -> None:
    ball = (radius(BOX, 3) < 4).float().roll(4, -1)
    write_map(tmp_path / "focus.mrc", ball, particles.apix)
    run = fit(LinearSubspace(BOX, zdim=2, kmax=8, focus=str(tmp_path / "focus.mrc")), particles)
    moving = run.model.volume.map(torch.eye(1 + run.model.zdim)[1])  # type: ignore[operator]
    share = float((moving.square() * (radius(BOX, 3).roll(4, -1) < 7)).sum() / moving.square().sum())
    assert share > 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"zdim": 0}, "zdim 0"), ({"contrast": -1.0}, "contrast -1"), ({"symmetry": "Q3"}, "point group")],
)
def test_what_cannot_be_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearSubspace(BOX, **arguments)


def test_another_story_is_not_solved(particles: Particles) -> None:
    class Heavy(LinearSubspace):
        def noise(self, mean: torch.Tensor, sigma: torch.Tensor) -> pyro.distributions.StudentT:
            return pyro.distributions.StudentT(4.0, mean, sigma)

    with pytest.raises(ValueError, match="Heavy overrides noise, but LinearSubspace is solved"):
        fit(Heavy(BOX), particles)


def test_a_model_fits_other_particles_anew(particles: Particles) -> None:
    """What a first fit found is no limit of the next."""
    model = LinearSubspace(BOX, zdim=3, contrast=0.0)
    fit(model, particles[:40])
    first = model.zdim
    again = fit(model, particles)
    assert again.model.zdim > first
