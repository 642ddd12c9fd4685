"""Fits compared on held-out particles: a winner only where one is, ArviZ's numbers, and only what can be compared."""

from __future__ import annotations

import sys
import types
import warnings
from dataclasses import make_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_cryo.analysis.compare import arviz_table, compare, difference, elpd_data, judged, unseen
from pyro_cryo.analysis.evidence import Evidence, evidence, log_evidence
from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.run import Run
from pyro_cryo.model import noise_of
from pyro_cryo.models.classes import Classes
from pyro_cryo.models.homogeneous import Homogeneous
from pyro_cryo.models.linear_subspace import LinearSubspace
from pyro_cryo.pose import PoseAbout
from tests.images import hinge_images

FITTED = 200


class Elsewhere(nn.Module):
    """q(z | images) = Normal(posterior mean + off x sd, wide x sd)."""

    def __init__(self, exact: Any, off: float, wide: float) -> None:
        super().__init__()
        self.exact, self.off, self.wide = exact, off, wide

    def forward(self, batch: Batch) -> None:
        mean, covariance = self.exact.posterior(batch)
        sd = torch.diagonal(covariance, dim1=1, dim2=2).sqrt()
        with pyro.plate("particles", batch.size, subsample=batch.shown, dim=-1):
            pyro.sample("z", dist.Normal(mean + self.off * sd, self.wide * sd).to_event(1))


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> Particles:
    return hinge_images(tmp_path_factory.mktemp("compare") / "case", 9, FITTED + 150, 16, 1.0)


@pytest.fixture(scope="module")
def runs(particles: Particles) -> dict[str, Run]:
    models = {"still": Homogeneous(16), "moving": LinearSubspace(16, zdim=2, contrast=0.0)}
    return {name: fit(model, particles[:FITTED]) for name, model in models.items()}


def made(log_p: Tensor, k: float = -torch.inf, rise: float = 0.0) -> Evidence:
    return Evidence(log_p.double(), torch.full_like(log_p, k).double(), torch.full_like(log_p, rise).double())


# ------------------------------------------------------------------------------------------------------- the verdict
def test_fits_that_predict_alike_have_a_winner_once_in_hundreds() -> None:
    generator = torch.Generator().manual_seed(0)
    won = 0
    for _ in range(1000):
        common = -1500 + 10 * torch.randn(200, generator=generator)
        found = {name: made(common + torch.randn(200, generator=generator)) for name in "ab"}
        won += judged(found, 10**9)[0] is not None
    assert won <= 10  # 2.7 expected, of both tails


def test_a_small_paired_difference_is_found_among_large_ones_between_particles() -> None:
    generator = torch.Generator().manual_seed(0)
    common = -1500 + 10 * torch.randn(500, generator=generator)
    better = common + 0.2 + 0.3 * torch.randn(500, generator=generator)
    winner, sentence = judged({"a": made(common), "b": made(better), "c": made(common - 1)}, 1000)
    assert winner == "b"
    assert sentence.startswith("b explains the 500 particles best, 0.2")
    assert sentence.endswith("nats a particle better than a, the next")


@pytest.mark.parametrize(
    ("other", "fitted", "count", "why"),
    [
        ({}, 1000, 500, None),
        ({"k": 0.9}, 1000, 500, "with a k of 100% of the particles that is bad or unknown"),
        ({"k": torch.nan}, 1000, 500, "bad or unknown"),
        ({"rise": 0.08}, 1000, 500, "which more draws may make up for"),
        ({}, 200, 500, "as fits of one model may be"),
        ({}, 1000, 60, "60 particles are few"),
        ({}, 1000, 10, "within the error"),
    ],
)
def test_a_lead_that_is_in_doubt_is_none(other: dict[str, float], fitted: int, count: int, why: str | None) -> None:
    low = 0.2 * torch.randn(count, generator=torch.Generator().manual_seed(0)) - 900
    found = {"worse": made(low, **other), "better": made(torch.full_like(low, -899.8))}
    winner, sentence = judged(found, fitted)
    if why is None:
        assert winner == "better"
    else:
        assert winner is None
        assert sentence.startswith("no clear winner: ")
        assert why in sentence
    assert judged({name: made(one.log_p) for name, one in found.items()}, 10**9)[0] == (
        "better" if count > 99 else None
    )


def test_doubts_about_the_winner_itself_do_not_matter() -> None:
    """Its log p can only be higher."""
    low = 0.2 * torch.randn(500, generator=torch.Generator().manual_seed(0)) - 900
    assert judged({"worse": made(low), "better": made(torch.full_like(low, -899.8), 0.9, 0.1)}, 1000)[0] == "better"


# ------------------------------------------------------------------------------------------------------- of real fits
def test_motion_is_found_and_one_map_loses(runs: dict[str, Run], particles: Particles) -> None:
    found = compare(runs, particles[FITTED:])
    assert found.winner == "moving"
    assert "moving explains the 150 particles best" in found.sentence
    still, moving = (found.found[name] for name in ("still", "moving"))
    assert bool((still.pareto_k == -torch.inf).all())
    assert bool((moving.pareto_k == -torch.inf).all())
    total, error = difference(moving.log_p, still.log_p)
    assert list(found.summary.index) == ["moving", "still"]
    np.testing.assert_allclose(found.summary.loc["still", ["below", "error"]].tolist(), [total / 150, error / 150])
    assert found.summary.loc["still", "k_bad"] == 0
    assert found.summary["weight"].sum() == pytest.approx(1, abs=1e-6)
    assert found.summary.loc["moving", "weight"] > 0.8


def test_log_p_without_anything_latent_is_the_density(runs: dict[str, Run], particles: Particles) -> None:
    model, batch = runs["still"].model, particles[FITTED:].batch(slice(0, 40))
    with torch.no_grad():
        mean = model.signal(model.volume, None, *model.pose(batch), batch)
        expected = dist.Normal(mean, noise_of(batch, model.sigma)).log_prob(batch.image).sum((1, 2))
    found = evidence(runs["still"], particles[FITTED : FITTED + 40])
    torch.testing.assert_close(found.log_p.float(), expected, atol=0.05, rtol=0)


def test_exact_guides_need_few_draws(runs: dict[str, Run], particles: Particles) -> None:
    held = particles[FITTED:]
    found = evidence(runs["moving"], held, draws=10**9)
    torch.testing.assert_close(found.log_p.float(), log_evidence(runs["moving"], held, draws=3), atol=5e-3, rtol=0)


@pytest.mark.parametrize(("off", "wide"), [(0.0, 2.0), (0.5, 1.0), (3.0, 0.4), (0.0, 0.3)])
def test_a_model_does_not_lose_to_itself_by_its_guide(
    off: float, wide: float, runs: dict[str, Run], particles: Particles
) -> None:
    exact, held = runs["moving"], particles[FITTED:]
    guessed = replace(exact, guide=Elsewhere(exact.guide, off, wide))
    found = compare({"exact": exact, "guessed": guessed}, held)
    assert float((found.found["exact"].log_p - found.found["guessed"].log_p).mean()) > -0.03
    assert found.winner is None
    bad = float((found.found["guessed"].pareto_k > 0.7).double().mean())
    assert bad < 0.1 if wide >= 1 else bad > 0.3


def test_of_several_fits_of_a_model_the_best_counts(runs: dict[str, Run], particles: Particles) -> None:
    """A fit that got stuck is no word against its model."""
    held, moving = particles[FITTED:], runs["moving"]
    alone = compare({"one": runs["still"], "other": moving}, held)
    assert alone.winner == "other"
    several = compare({"one": [runs["still"], moving], "other": moving}, held)
    assert several.winner is None
    torch.testing.assert_close(several.found["one"].log_p, several.found["other"].log_p, atol=1e-2, rtol=0)
    with pytest.raises(ValueError, match=r"images were fitted by one \(1\)"):
        compare({"one": [runs["still"], moving], "other": moving}, particles)
    with pytest.raises(ValueError, match="one has no run; give one or more"):
        compare({"one": [], "other": moving}, held)


def test_the_same_seed_gives_the_same_numbers_and_leaves_the_generator_alone(
    runs: dict[str, Run], particles: Particles
) -> None:
    guessed = {name: replace(runs["moving"], guide=Elsewhere(runs["moving"].guide, 0.5, 1.0)) for name in "ab"}
    torch.manual_seed(5)
    one = compare(guessed, particles[FITTED : FITTED + 20], seed=3)
    after = torch.rand(())
    torch.manual_seed(5)
    assert float(after) == float(torch.rand(()))
    two = compare(guessed, particles[FITTED : FITTED + 20], seed=3)
    for name in "ab":
        assert bool((one.found[name].log_p == two.found[name].log_p).all())


# --------------------------------------------------------------------------------------------------------------- ArviZ
def test_arviz_compares_posteriors_to_the_same_end(runs: dict[str, Run], particles: Particles) -> None:
    classes = fit(Classes(16, classes=2, contrast=0.0), particles[:FITTED])
    both, held = {"moving": runs["moving"], "classes": classes}, particles[FITTED:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz as az

        how = {} if az.__version__.startswith("0") else {"round_to": "none"}
        table = az.compare({name: run.posterior(held, 60) for name, run in both.items()}, **how)
    found = compare(both, held)
    assert list(table.index) == list(found.table.index)
    elpd = next(name for name in table.columns if str(name).startswith("elpd") and name != "elpd_diff")
    for column in ("elpd_diff", "dse", "weight"):
        np.testing.assert_allclose(table[column].astype(float), found.table[column].astype(float), atol=0.1)
    beside = (table[elpd] - found.table[elpd]).astype(float)  # noise of the images' own spectra
    np.testing.assert_allclose(beside, beside.iloc[0], atol=0.1)
    total, error = difference(*(found.found[name].log_p for name in found.table.index))
    # From 1.3 on differences are from the best, errors of n - 1, and what is wrong is written out.
    sign, rtol = (1, 1e-7) if az.__version__.startswith("0") else (-1, 0.01)
    np.testing.assert_allclose(
        found.table.iloc[1][["elpd_diff", "dse"]].astype(float), [sign * total, error], rtol=rtol
    )
    assert not any(found.table["warning" if sign > 0 else "diag_elpd"])


def test_stacking_weights_are_of_images_of_any_size() -> None:
    """p of an image is 0 to the computer; a mixture of two models that are each right for half of the particles."""
    half = (torch.arange(400) % 2).double()
    table = arviz_table({"odd": made(-60_000 - 9 * half), "even": made(-60_009 + 9 * half)}, 4)
    np.testing.assert_allclose(table["weight"].astype(float), 0.5, atol=1e-3)


@pytest.mark.parametrize("release", ["0.23.4", "1.0.0", "1.3.3"])
def test_elpd_data_of_every_generation_of_arviz(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Series; a dataclass that has its kind said; one for each kind."""
    fields = ["elpd", "se", "p", "n_samples", "n_data_points", "scale", "warning", "good_k"]
    fields += [] if release == "1.3.3" else ["kind"]
    newer = make_dataclass("ELPDData", [*fields, *((name, object, None) for name in ("elpd_i", "pareto_k"))])
    older = type("ELPDData", (pd.Series,), {})
    arviz, stats = (types.ModuleType(name) for name in ("arviz", "arviz_stats"))
    modules: tuple[Any, Any] = arviz, stats
    modules[0].__version__ = release
    modules[0].ELPDData, modules[0].compare = older, len
    modules[1].utils = types.SimpleNamespace(**{"ELPDDataLOO" if release == "1.3.3" else "ELPDData": newer})
    modules[1].compare = len
    monkeypatch.setitem(sys.modules, "arviz", arviz)
    monkeypatch.setitem(sys.modules, "arviz_stats", stats)
    found = elpd_data(Evidence(torch.tensor([-2.0, -4.0]), torch.tensor([0.1, 0.9]), torch.zeros(2)), 30)
    first = release.startswith("0")
    assert isinstance(found, older if first else newer)
    each = found["loo_i"] if first else found.elpd_i
    assert each.values.tolist() == [-2, -4]
    assert (found["elpd_loo"] if first else found.elpd) == -6
    assert (found.se, found.n_samples, found.n_data_points, found.warning) == (pytest.approx(2**0.5), 30, 2, True)
    if first:
        assert list(found.index)[:3] == ["elpd_loo", "se", "p_loo"]
    assert getattr(found, "kind", None) == ("loo" if release == "1.0.0" else None)


# --------------------------------------------------------------------------------------------- what can be compared
def test_particles_that_were_fitted_are_refused_and_told_apart(runs: dict[str, Run], particles: Particles) -> None:
    with pytest.raises(ValueError, match=r"50 of 200 images were fitted by still, .*--subset, --first"):
        compare(runs, particles[FITTED - 50 : FITTED + 150])
    left = unseen(runs, particles)
    assert left.tolist() == [False] * FITTED + [True] * 150
    pairs = replace(particles, table=replace(particles.table, particle=torch.arange(len(particles)) // 2))
    odd = replace(runs["still"], source=particles[: FITTED + 1])  # one image of a pair
    assert unseen({"odd": odd}, pairs).tolist() == [False] * (FITTED + 2) + [True] * 148


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"window": 0.9}, "window None and other with 0.9"),
        ({"normalize": True}, "normalize False and other with True"),
        ({"invert": True}, "invert False and other with True"),
        ({"box": 12}, "box 16 and other with 12"),
    ],
)
def test_fits_of_images_seen_differently_are_refused(
    changed: dict[str, Any], said: str, runs: dict[str, Run], particles: Particles
) -> None:
    other = replace(runs["moving"], source=replace(particles[:FITTED], **changed))
    with pytest.raises(ValueError, match=f"moving was fitted with {said}; fit both alike"):
        compare({"moving": runs["moving"], "other": other}, particles[FITTED:])
    with pytest.raises(ValueError, match=r"the particles have .*; open them as the runs did"):
        compare(runs, replace(particles[FITTED:], **changed))


def test_another_pixel_size_is_refused(runs: dict[str, Run], particles: Particles) -> None:
    groups = tuple(replace(group, apix=2 * group.apix) for group in particles.table.groups)
    coarse = replace(particles[FITTED:], table=replace(particles[FITTED:].table, groups=groups))
    with pytest.raises(ValueError, match="still was fitted with apix"):
        compare(runs, coarse)


def test_one_run_is_refused(runs: dict[str, Run], particles: Particles) -> None:
    with pytest.raises(ValueError, match="1 model is given; a comparison needs runs of two or more"):
        compare({"still": runs["still"]}, particles[FITTED:])


def test_log_p_that_is_not_a_number_is_told(runs: dict[str, Run], particles: Particles) -> None:
    broken = LinearSubspace(16, zdim=2, contrast=0.0)
    broken.load_state_dict(runs["moving"].model.state_dict())
    broken.log_sigma.data[:, 3] = torch.nan
    with pytest.raises(ValueError, match="log p of 150 particles under broken is not finite, the first is particle 0"):
        compare({"still": runs["still"], "broken": replace(runs["moving"], model=broken)}, particles[FITTED:])
    with pytest.raises(ValueError, match="no particles are given"):
        compare(runs, particles[:0])


def test_runs_that_found_their_poses_are_refused(runs: dict[str, Run], particles: Particles, tmp_path: Path) -> None:
    model = Homogeneous(16)
    model.poses = PoseAbout(turn_sd_deg=2.0, shift_sd_px=0.5)
    posed = fit(model, particles[:60])
    with pytest.raises(ValueError, match="posed found its poses and knows none of these particles'; find the poses"):
        compare({"still": runs["still"], "posed": posed}, particles[FITTED:])
