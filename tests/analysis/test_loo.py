"""Leaving a particle out by weights is leaving it out; log p under a draw of maps is the model's own."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_cryo.analysis.evidence import log_evidence
from pyro_cryo.analysis.loo import _Posed, left_out, loo
from pyro_cryo.data.density_maps import DensityMaps
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import simulate
from pyro_cryo.distributions.volume import filter_shells
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.map_draws import FamilyDraw, StillDraw, still_draws
from pyro_cryo.inference.run import Run
from pyro_cryo.model import CryoModel, form_image, noise_of
from pyro_cryo.models.homogeneous import Homogeneous
from pyro_cryo.models.linear_subspace import LinearSubspace
from pyro_cryo.models.manifold import Manifold
from pyro_cryo.physics.fourier import soft_disc
from pyro_cryo.physics.slices import convolve, fourier_grid, read_grid, slice_coordinates
from pyro_cryo.pose import PoseAbout
from pyro_cryo.volumes.conjugate import NormalEquations
from pyro_cryo.volumes.prior import MapPrior
from tests.images import hinge_images

C1 = torch.eye(3)[None]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def of(elpd: Any) -> tuple[np.ndarray, np.ndarray, float]:
    """log p and k of each particle and p_loo, of either generation of ArviZ."""
    each, p = (elpd.elpd_i, elpd.p) if hasattr(elpd, "elpd_i") else (elpd["loo_i"], elpd["p_loo"])
    return each.values, elpd.pareto_k.values, float(p)


def regression(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """x (n, p) and y (n,) = x beta + noise, all standard normal but row 7, far out and off; in double precision."""
    generator = seeded(seed)
    x = torch.randn(count, size, generator=generator).double()
    x[7] *= 12
    y = x @ torch.randn(size, generator=generator).double() + torch.randn(count, generator=generator)
    y[7] += 5
    return x, y


@pytest.mark.parametrize("seed", [0, 10])
def test_weights_leave_out_what_a_refit_does(seed: int) -> None:
    """Bayesian linear regression, where p(y_i | y_-i) is a closed form; a row that tells most has the largest k."""
    x, y = regression(60, 4, seed)
    exact = []
    for row in range(60):
        others = torch.arange(60) != row
        precision = torch.eye(4).double() + x[others].T @ x[others]
        mean = torch.linalg.solve(precision, x[others].T @ y[others])
        variance = 1 + x[row] @ torch.linalg.solve(precision, x[row])
        exact.append(torch.distributions.Normal(x[row] @ mean, variance.sqrt()).log_prob(y[row]))
    precision = torch.eye(4).double() + x.T @ x
    posterior = torch.distributions.MultivariateNormal(
        torch.linalg.solve(precision, x.T @ y), precision_matrix=precision
    )
    torch.manual_seed(seed)
    told = torch.distributions.Normal(posterior.sample((4000,)) @ x.T, 1.0).log_prob(y)
    each, k, p = of(left_out(told))
    ordinary = np.arange(60) != 7
    np.testing.assert_allclose(each[ordinary], torch.stack(exact).numpy()[ordinary], atol=0.05)
    assert k.argmax() == 7
    assert k[7] > 0.7 > k[ordinary].max()
    assert p > 2  # of 4


def test_it_is_arviz_s_own_loo() -> None:
    x, y = regression(40, 3, 5)
    torch.manual_seed(0)
    told = torch.distributions.Normal(torch.randn(500, 3).double() * 0.2 @ x.T, 1.0).log_prob(y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz as az

        groups = {"posterior": {"a": np.zeros((1, 500))}, "log_likelihood": {"y": told.numpy()[None]}}
        data = az.from_dict(**groups) if az.__version__.startswith("0") else az.from_dict(groups)
        theirs, ours = az.loo(data, pointwise=True, reff=1.0), left_out(told)
    for one, other in zip(of(ours), of(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    by = 1.0 if az.__version__.startswith("0") else (39 / 40) ** 0.5  # from 1.3 on of n - 1
    assert float(ours.se) == pytest.approx(by * float(theirs.se))
    assert float(ours.good_k) == pytest.approx(float(theirs.good_k))
    assert "Pareto k" in str(ours)


def test_particles_of_one_map_are_left_out_as_a_refit_without_them_leaves_them(tmp_path: Path) -> None:
    """On 8^3 voxels: the posterior of the map without an image's own rows, and the Gaussian that it predicts of it."""
    box = 8
    where = soft_disc(box, 1.5, 1.5, dims=3)
    tau = torch.linspace(1.0, 0.4, box // 2 + 1)
    truth = where * filter_shells(torch.randn(1, box, box, box, generator=seeded()), tau)
    star = simulate(DensityMaps(truth, 4.0), tmp_path / "case", n_images=300, box=box, snr=0.3, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the CTF, which aliases in so small a box
        particles = Particles.open(star)
    with np.load(star.parent / "truth.npz") as file:
        sigma = torch.full((1, box // 2 + 1), float(file["noise_sd"]) / 2**0.5)
        factor = (torch.from_numpy(file["volumes"])[0] * truth[0]).sum() / truth[0].square().sum()
    prior = MapPrior.of(where, tau * factor)
    equations = NormalEquations.empty(box)
    batch = particles.batch(slice(None))
    equations.add(batch, sigma, C1)
    posterior = equations.posterior(prior.scale, prior.tau)
    b = len(posterior.scale)
    root = posterior.to_map(torch.eye(b**3).view(-1, b, b, b))  # (e, D, D, D)
    points = slice_coordinates(batch.rotation, batch.half.k, batch.freq_scale)
    rows = [torch.view_as_real(read_grid(fourier_grid(column), points)) for column in root]
    design = torch.stack([form_image(row, batch.translation, batch).flatten(1) for row in rows], -1).double()
    sd = noise_of(batch, sigma).expand(batch.image.shape).flatten(1).double()
    white, image = design / sd[..., None], (batch.image.flatten(1).double() / sd)
    eye = torch.eye(b**3).view(-1, b, b, b)
    seen = convolve(posterior.spectrum, posterior.scale * posterior.colour(eye))
    everything, exact = (posterior.whiten(seen) + eye).flatten(1).double(), []
    score = posterior.whiten(posterior.rhs).flatten().double()
    for row in range(40):
        own = white[row]
        precision = everything - own.T @ own
        mean = torch.linalg.solve(precision, score - own.T @ image[row])
        covariance = torch.eye(len(own)).double() + own @ torch.linalg.solve(precision, own.T)
        said = torch.distributions.MultivariateNormal(own @ mean, 0.5 * (covariance + covariance.T))
        exact.append(said.log_prob(image[row]) - sd[row].log().sum())
    told = []
    for draw in islice(still_draws(particles, sigma, prior, C1), 400):
        told.append(draw.log_prob(batch, sigma)[:40])
    each, k, p = of(left_out(torch.stack(told)))
    away = each - torch.stack(exact).numpy()
    print(f"loo less refit {away.mean():.3f} +- {away.std():.3f} nats, k {np.median(k):.2f}, p {p / 40:.2f} a particle")
    assert p / 40 > 0.2  # there is something to leave out
    assert abs(away.mean()) < 0.15 * p / 40
    assert away.std() < 0.5 * p / 40
    assert np.median(k) < 0.5


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> Particles:
    return hinge_images(tmp_path_factory.mktemp("loo") / "case", 9, 200, 16, 1.0)


@pytest.mark.parametrize(("window", "kmax"), [(None, 5.0), (0.8, 8.0)])
def test_log_p_under_a_draw_is_the_model_s_evidence(particles: Particles, window: float | None, kmax: float) -> None:
    """The fitted maps taken for a draw; also where a consensus stands beyond the band of the family."""
    seen = replace(particles, window=window)
    run = fit(LinearSubspace(16, zdim=2, contrast=0.0, kmax=kmax), seen)
    model: Any = run.model
    consensus = None if model.volume.side == 16 else model.consensus.map()
    assert (consensus is None) == (kmax == 8)
    turn = torch.cat([torch.zeros(1, model.zdim), torch.eye(model.zdim)])
    draw = FamilyDraw(model.volume.components, torch.zeros(1), model.coefficients, consensus, turn)
    found = draw.log_prob(seen.batch(slice(0, 50)), model.sigma.detach())
    torch.testing.assert_close(found, log_evidence(run, seen[:50], draws=1), atol=0.05, rtol=0)


@pytest.mark.parametrize("model", [Homogeneous(16), LinearSubspace(16, zdim=1), Manifold(16, zdim=1, points=20)])
def test_particles_of_a_fit_are_left_out(model: CryoModel, particles: Particles) -> None:
    run = fit(model, particles)
    each, k, p = of(loo(run, index=range(10, 30), draws=30))
    assert each.shape == k.shape == (20,)
    assert np.isfinite(each).all()
    fitted = log_evidence(run, run.some(range(10, 30)), draws=5).double().numpy()
    assert np.corrcoef(each, fitted)[0, 1] > 0.95
    assert abs((fitted - each).mean()) < 3
    assert p > 0


def test_a_pose_that_was_found_is_integrated_out(particles: Particles) -> None:
    model = Homogeneous(16)
    model.poses = PoseAbout(2.0, 0.5)
    run = fit(model, particles)
    some = run.some(range(12))
    with torch.no_grad():
        (batch,) = run.batches(some, 12)
        torch.manual_seed(0)
        found = _Posed(run, batch).log_prob(StillDraw(run.volume()), run.model.sigma.detach())
        best = StillDraw(run.volume()).log_prob(some.batch(slice(None)), run.model.sigma.detach())
    expected = log_evidence(run, some, draws=20)
    assert float((found - expected).abs().max()) < 1.0  # two bounds of 20 draws
    assert float((best - found).mean()) > 1  # the best pose is worth so much more than all
    each, k, _ = of(loo(run, index=range(12), draws=30))
    assert np.isfinite(each).all()
    assert float((torch.from_numpy(each) - best).mean()) < -1
    assert k.shape == (12,)


def test_what_cannot_be_left_out_is_refused(cryodrgn_run: Path, homogeneous_run: Path) -> None:
    with pytest.raises(ValueError, match=r"CryoDRGN have no posterior .*held out"):
        loo(Run.load(cryodrgn_run))
    with pytest.raises(ValueError, match="24 draws"):
        loo(Run.load(homogeneous_run), draws=24)
    with pytest.raises(ValueError, match="particles 0 to 599"):
        loo(Run.load(homogeneous_run), index=[600], draws=30)
