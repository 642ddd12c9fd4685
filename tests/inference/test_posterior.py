"""Draws from a run: of the exact posterior where the guide is, else weighed and picked; as ArviZ takes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.inference.draws import drawn, predicted
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.importance import pareto_smoothed, resampled
from pyro_cryo.inference.run import Run
from pyro_cryo.models.contrast import Contrast
from pyro_cryo.models.homogeneous import Homogeneous
from pyro_cryo.models.linear_subspace import LinearSubspace
from pyro_cryo.models.manifold import Manifold
from pyro_cryo.pose import PoseAbout
from tests.images import hinge_images


class Elsewhere(nn.Module):
    """q(z | images) = Normal(posterior mean + off, wide x posterior sd): near the posterior, and not it."""

    def __init__(self, exact: Any, off: float, wide: float) -> None:
        super().__init__()
        self.exact, self.off, self.wide = exact, off, wide

    def posterior(self, batch: Batch) -> Any:
        return self.exact.posterior(batch)

    def forward(self, batch: Batch) -> None:
        mean, covariance = self.posterior(batch)
        sd = torch.diagonal(covariance, dim1=1, dim2=2).sqrt()
        with pyro.plate("particles", batch.size, subsample=batch.shown, dim=-1):
            pyro.sample("z", dist.Normal(mean + self.off * sd, self.wide * sd).to_event(1))


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> Particles:
    return hinge_images(tmp_path_factory.mktemp("posterior") / "case", 9, 150, 24, 1.0)  # 16 px tell of one component


@pytest.fixture(scope="module")
def run(particles: Particles) -> Run:
    return fit(LinearSubspace(particles.box, zdim=2, contrast=0.0), particles)


def test_draws_have_the_moments_of_the_posterior(run: Run, particles: Particles) -> None:
    batch = particles.batch(slice(0, 20))
    mean, covariance = run.guide.posterior(batch)  # type: ignore[union-attr, operator]
    sites = drawn(run, batch, 4000).sites
    assert set(sites) == {"z"}
    sd = torch.diagonal(covariance, dim1=1, dim2=2).sqrt()
    assert float(((sites["z"].mean(0) - mean) / sd).abs().max()) < 5 / 4000**0.5
    torch.testing.assert_close(sites["z"].std(0), sd, rtol=0.08, atol=0)


def test_weights_of_an_exact_guide_are_the_evidence_whatever_is_drawn(run: Run, particles: Particles) -> None:
    weight = drawn(run, particles.batch(slice(0, 20)), 30, 30).log_weight
    assert weight.shape == (30, 20)
    assert float(weight.std(0).max()) < 5e-3
    assert float(weight.mean(0).std()) > 1


@pytest.mark.parametrize("kind", [Manifold, Contrast])
def test_all_that_is_latent_is_drawn_and_weighed(kind: Any, particles: Particles) -> None:
    arguments: dict[str, Any] = {"points": 20} if kind is Manifold else {"width": 16, "layers": 1}
    run = fit(kind(particles.box, zdim=2, **arguments), particles, epochs=1 if kind is Contrast else None)
    found = drawn(run, particles.batch(slice(0, 9)), 40, 30)
    assert {name: value.shape for name, value in found.sites.items()} == {"z": (40, 9, 2), "contrast": (40, 9)}
    assert bool(found.log_weight.isfinite().all())
    if kind is Manifold:
        assert float(found.log_weight.std(0).max()) < 0.1  # features at a point are read back by its kernel


def test_k_is_small_where_draws_cover_the_posterior_and_large_where_they_do_not() -> None:
    torch.manual_seed(0)
    z = torch.randn(2000, 50).double()
    wide = dist.Normal(0.0, 1.0).log_prob(1.3 * z) - dist.Normal(0.0, 1.0).log_prob(z)  # a posterior that is narrower
    narrow = dist.Normal(0.0, 1.0).log_prob(0.4 * z) - dist.Normal(0.0, 1.0).log_prob(z)  # ... and one 2.5 times wider
    good, bad = (pareto_smoothed(weight)[1] for weight in (wide, narrow))
    assert float(good.max()) < 0.5
    assert float(bad.median()) > 0.7
    k = pareto_smoothed(torch.full((100, 3), 7.0))[1]
    assert bool((k == -torch.inf).all())
    assert bool(pareto_smoothed(wide[:10])[1].isnan().all())
    picked = resampled(pareto_smoothed(wide)[0], 4000, torch.Generator().manual_seed(0))
    sd = z.gather(0, picked).std(0)
    assert float((sd * 1.3 - 1).abs().mean()) < 0.05


def test_a_draw_comes_as_often_as_its_weight_says() -> None:
    weight = torch.tensor([[0.5, 0.1], [0.3, 0.1], [0.2, 0.8]]).double()
    generator = torch.Generator().manual_seed(0)
    counts = torch.stack([resampled(weight.log(), 3, generator) for _ in range(2000)])  # (2000, 3, 2)
    times = torch.stack([(counts == s).sum(1) for s in range(3)], 1).double()
    assert bool(((times - 3 * weight).abs() < 1).all())
    torch.testing.assert_close(times.mean(0), 3 * weight, atol=0.05, rtol=0)
    assert float((counts[:, 0, 0] == 0).double().mean() - 0.5) < 0.05  # in no order


def test_picked_draws_are_the_posteriors_where_the_guide_is_not(run: Run, particles: Particles) -> None:
    wrong = replace(run, guide=Elsewhere(run.guide, 0.8, 1.5))
    mean, covariance = (v.numpy() for v in run.guide.posterior(particles.batch(slice(0, 30))))  # type: ignore[union-attr, operator]
    sd = np.sqrt(covariance.diagonal(axis1=1, axis2=2))
    as_drawn = wrong.posterior(particles[:30], 1000).posterior["z"].values[0]
    found = wrong.posterior(particles[:30], 1000, corrected=True)
    assert bool(found.sample_stats["corrected"].all())
    z = found.posterior["z"].values[0]
    assert abs(((as_drawn.mean(0) - mean) / sd).mean() - 0.8) < 0.05
    assert abs(((z.mean(0) - mean) / sd).mean()) < 0.05
    assert abs((z.std(0) / sd).mean() - 1) < 0.05
    evidence = run.posterior(particles[:30], 30).sample_stats["log_evidence"].values
    assert np.abs(found.sample_stats["log_evidence"].values - evidence).max() < 0.5


def test_a_guide_that_misses_the_posterior_is_found_out_and_left_alone(run: Run, particles: Particles) -> None:
    wrong = replace(run, guide=Elsewhere(run.guide, 3.0, 0.4))
    found = wrong.posterior(particles[:30], 500, corrected=True).sample_stats
    assert float((found["pareto_k"] > 0.7).mean()) > 0.8
    assert not bool(found["corrected"].values[found["pareto_k"].values >= 0.7].any())


def test_arviz_reads_it(run: Run, particles: Particles, tmp_path: Path) -> None:
    az = pytest.importorskip("arviz")
    idata = run.posterior(particles[:20], draws=60, predictive=2)
    z = idata.posterior["z"]
    assert z.dims == ("chain", "draw", "particle", "zdim")
    assert idata.posterior["sigma"].shape == (1, 60, 1, particles.box // 2 + 1)
    assert idata.posterior_predictive["image"].shape == (1, 2, 20, len(particles.half), 2)
    assert idata.observed_data["image"].shape == (20, len(particles.half), 2)
    assert float(abs(idata.posterior["sigma"].mean("draw")[0, 0] / run.model.sigma[0].detach().numpy() - 1).max()) < 0.1
    assert len(az.summary(idata, var_names=["z"])) == 40
    total = float(idata.log_likelihood["image"].mean(("chain", "draw")).sum())
    loo = az.loo(idata)
    assert abs(float(loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd) - total) < 0.1  # since ArviZ 1.0
    idata.to_netcdf(tmp_path / "posterior.nc")
    again = az.from_netcdf(tmp_path / "posterior.nc")
    np.testing.assert_array_equal(again.posterior["z"], z)
    again.log_likelihood["image"] = again.log_likelihood["image"] - 3.0
    assert az.compare({"better": idata, "worse": again})["weight"]["better"] > 0.9


def test_log_likelihoods_are_beside_noise_of_each_images_own_spectrum(run: Run, particles: Particles) -> None:
    idata, batch = run.posterior(particles[:5], draws=30), particles.batch(slice(0, 5))
    shell = batch.half.shell
    power = torch.stack([batch.image[:, shell == s].square().mean((1, 2)) for s in range(1, int(shell.max()) + 1)], 1)
    noise = torch.distributions.Normal(0.0, power.sqrt()[:, shell - 1, None])
    expected = batch.window_power * noise.log_prob(batch.image).sum((1, 2))
    beside = idata.sample_stats["log_evidence"] - idata.log_likelihood["image"].mean(("chain", "draw"))
    np.testing.assert_allclose(beside.values, expected, rtol=1e-5, atol=1e-2)


def test_the_same_seed_gives_the_same_draws_and_leaves_the_generator_alone(run: Run, particles: Particles) -> None:
    torch.manual_seed(5)
    one = run.posterior(particles[:10], draws=5, weighed=0, seed=3)
    after = torch.rand(())
    torch.manual_seed(5)
    assert float(after) == float(torch.rand(()))
    two = run.posterior(particles[:10], draws=5, weighed=0, seed=3)
    np.testing.assert_array_equal(one.posterior["z"], two.posterior["z"])
    assert not hasattr(one, "log_likelihood")


def test_draws_of_poses_belong_to_the_particles_that_were_asked_for(particles: Particles, tmp_path: Path) -> None:
    model = LinearSubspace(particles.box, zdim=1, contrast=0.0)
    model.poses = PoseAbout(2.0, 0.5)
    run = fit(model, particles, tmp_path / "run")
    assert run.poses is not None
    idata = run.posterior(particles[40:50], draws=60, weighed=40)
    turn, shift = (idata.posterior[name].values[0] for name in ("turn", "translation"))
    best = run.poses.best[1][40:50].numpy()
    assert np.abs(shift.mean(0) - best).max() < 1.0
    assert np.abs(turn.mean(0)).max() < 10
    spread = run.poses.spread.angle_deg[40:50].numpy()
    np.testing.assert_allclose(np.sqrt((turn**2).sum(-1).mean(0)), spread, rtol=0.5)
    assert np.isfinite(idata.sample_stats["log_evidence"]).all()
    exact = run.posterior(particles[40:50], draws=60, corrected=True)
    loss = [np.nanvar(one.sample_stats["log_weight"].values, 1).mean() for one in (idata, exact)]
    assert loss[1] < loss[0]  # what is drawn from is matched to the posterior first
    loaded = Run.load(tmp_path / "run", particles=particles)
    z = loaded.encode(particles[40:50]).z
    assert np.abs(z - run.latent.z[40:50]).max() < 1.0
    other = replace(particles, table=replace(particles.table, frame=particles.table.frame + 1000))
    with pytest.raises(ValueError, match="is not one of"):
        run.posterior(other[:5])


def test_images_are_predicted_from_the_fitted_map_and_not_from_its_prior(particles: Particles) -> None:
    run = fit(Homogeneous(particles.box), particles)
    batch = particles.batch(slice(0, 40))
    with torch.no_grad():
        shared = drawn(run, batch, 1).shared
        made = torch.stack([predicted(run, batch, shared) for _ in range(20)]).mean(0)
        expected = run.model.signal(lambda k, z: run.model.volume(k), None, batch.rotation, batch.translation, batch)
    assert float(torch.corrcoef(torch.stack([made.flatten(), expected.flatten()]))[0, 1]) > 0.8
    assert run.posterior(particles[:10], 30).sample_stats["log_evidence"].shape == (10,)


def test_views_of_a_particle_are_told_from_particles(run: Run, particles: Particles) -> None:
    pairs = replace(particles[:20], table=replace(particles[:20].table, particle=torch.arange(20) // 2))
    made = run.posterior(pairs, 30, weighed=0, predictive=2).posterior_predictive
    assert made["image"].dims == ("chain", "draw", "view", "coefficient", "part")
    assert made["of_particle"].values.tolist() == (torch.arange(20) // 2).tolist()


def test_what_cannot_be_drawn_is_refused(run: Run, particles: Particles) -> None:
    with pytest.raises(ValueError, match="9 with images"):
        run.posterior(particles[:5], draws=5, predictive=9)
    with pytest.raises(ValueError, match="expected 0 or more"):
        drawn(run, particles.batch(slice(0, 5)), 2, weighed=3)
