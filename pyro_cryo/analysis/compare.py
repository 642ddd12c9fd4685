"""Which of several fits explains particles best that none of them was fitted to?

Each particle's log p under a fit has z, pose and contrast integrated out (`evidence`), so what is compared is how well
models predict, and a model that has more to fit with gains nothing by that. Differences are paired, particle by
particle: what all models find hard drops out of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_cryo.analysis.evidence import Evidence, evidence
from pyro_cryo.data.particles import Particles
from pyro_cryo.inference.importance import GOOD
from pyro_cryo.inference.run import Run
from pyro_cryo.progress import Progress, quiet

CLEAR = 3.0  # errors
REFIT = 20.0  # nats, over as many particles as were fitted: good fits of one model differ by 14 (benchmarks/compare.py)
LEAST_NATS = 4.0  # in all: errors of smaller differences are not known well (Sivula et al., section 4)
LEAST_PARTICLES = 100  # ... nor those of fewer (the same)
MOST_BAD = 0.1  # of the particles, whose log p may be in doubt
STILL = 3.0  # times the last rise, that log p may yet rise: with k at most 0.7 it is short by S^(1 - 1 / k) of S draws

Fits = Mapping[str, Run | Sequence[Run]]  # by name, one of each model or several from other seeds


@dataclass(frozen=True)
class Comparison:
    """Fits beside each other on n particles that none of them was fitted to.

    table:    ArviZ's of `az.compare`, the best first; p, the effective number of parameters, is NaN
    found:    by name, log_p (n,) in nats, pareto_k (n,) and rise (n,) of each particle, under the best fit of that name
    winner:   the name of what is clearly better than each other; None where nothing is
    sentence: the same in words, and where nothing is clear, why
    """

    table: pd.DataFrame
    found: dict[str, Evidence]
    winner: str | None
    sentence: str

    @property
    def summary(self) -> pd.DataFrame:
        """A row a fit, the best first, in nats a particle: log_p, below (the best) +- error, k_bad (share), weight."""
        names = [str(name) for name in self.table.index]
        best, count = self.found[names[0]].log_p, len(self.found[names[0]].log_p)
        rows = {}
        for name in names:
            one, (below, error) = self.found[name], difference(best, self.found[name].log_p)
            rows[name] = (float(one.log_p.mean()), below / count, error / count, doubtful(one))
        columns = pd.DataFrame.from_dict(rows, "index", columns=["log_p", "below", "error", "k_bad"])
        return columns.assign(weight=self.table["weight"].astype(float))


def compare(
    runs: Fits,
    particles: Particles,
    draws: int = 100,
    *,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress = quiet,
) -> Comparison:
    """Models by name, compared by the log p of particles that none of their fits has seen.

    runs:  a fit of each, or several from other seeds, of which the best counts: a fit that got stuck says nothing of
           its model, and only another fit tells that it did
    draws: of what is latent, for each particle, where a run's guide is not the exact posterior; log p is then a bound,
           which k and how it rises with the draws say how to trust

    A winner is better than each other by more than 3 errors of the paired difference and 4 nats in all, on 100
    particles or more; and that with what more draws could still give the other, whose k may be bad for a tenth of the
    particles. The standard error holds for the fits as they are. Good fits of one model differ a little as well, and
    many particles would show it clearly: 20 nats, over as many particles as were fitted, go into the error.

    Raises ValueError, with the difference named, where images were not seen alike by the runs and as `particles` are;
    where some of these were fitted, and where a run would have to find their poses.

    Source: Vehtari, Gelman and Gabry, Statistics and Computing 27 (2017), section 5; Sivula, Magnusson, Matamoros and
    Vehtari, arXiv:2008.10296.
    """
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} model is given; a comparison needs runs of two or more")
    each = labelled(runs)
    all_runs = {label: run for fits in each.values() for label, run in fits.items()}
    check_comparable(all_runs, particles)
    found = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, fits in each.items():
            told = [_finite(evidence(run, particles, draws, batch_size, progress), name) for run in fits.values()]
            found[name] = max(told, key=lambda one: float(one.log_p.sum()))
    winner, sentence = judged(found, min(run.particles.n_particles for run in all_runs.values()))
    return Comparison(arviz_table(found, draws), found, winner, sentence)


def labelled(runs: Fits) -> dict[str, dict[str, Run]]:
    """By name the fits of it, each labelled: with the name, and numbered where there are several."""
    each = {}
    for name, given in runs.items():
        fits = [given] if isinstance(given, Run) else list(given)
        if not fits:
            raise ValueError(f"{name} has no run; give one or more")
        each[name] = {name if len(fits) == 1 else f"{name} ({number})": fit for number, fit in enumerate(fits, 1)}
    return each


def unseen(runs: Fits, particles: Particles) -> Tensor:
    """(N,) bool: images of the particles that no run was fitted to, by stack and frame; all of a particle or none."""
    fitted = torch.zeros(particles.n_particles, dtype=torch.bool)
    for fits in labelled(runs).values():
        for run in fits.values():
            fitted[particles.particle[particles.are_in(run.particles)]] = True
    return ~fitted[particles.particle]


def check_comparable(runs: Mapping[str, Run], particles: Particles) -> None:
    """Raise ValueError unless log p of the particles under the runs are of the same numbers, and fair."""
    if not len(particles):
        raise ValueError("no particles are given; hold some out of the fits")
    for (one, first), (other, second) in pairwise(runs.items()):
        unlike = _unlike(first.particles, second.particles)
        if unlike:
            name, a, b = unlike
            raise ValueError(f"{one} was fitted with {name} {a} and {other} with {b}; fit both alike to compare them")
    name, run = next(iter(runs.items()))
    unlike = _unlike(run.particles, particles)
    if unlike:
        what, a, b = unlike
        raise ValueError(f"{name} was fitted with {what} {a}, the particles have {b}; open them as the runs did theirs")
    for name, run in runs.items():
        fitted = int((~unseen({name: run}, particles)).sum())
        if fitted:
            raise ValueError(
                f"{fitted} of {len(particles)} images were fitted by {name}, which favours what overfits; hold some "
                "out: fit to a part (--subset, --first, particles[:n]), compare on the rest (--unseen, particles[n:])"
            )
    for name, run in runs.items():
        if run.poses is not None:
            raise ValueError(
                f"{name} found its poses and knows none of these particles'; find the poses of all once, then fit to a "
                "part of that run's particles.star, where they are known, and compare on the rest of it"
            )


def _finite(found: Evidence, name: str) -> Evidence:
    wrong = (~found.log_p.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"log p of {len(wrong)} particles under {name} is not finite, the first is particle {wrong[0]}; look at "
            "its images, or give more draws"
        )
    return found


def judged(found: Mapping[str, Evidence], fitted: int) -> tuple[str | None, str]:
    """The clear winner of fits to so many particles, or None, and a sentence that says so."""
    best = max(found, key=lambda name: float(found[name].log_p.sum()))
    count = len(found[best].log_p)
    others = {name: difference(found[best].log_p, one.log_p) for name, one in found.items() if name != best}
    doubts = [f"{count} particles are few, hold out {LEAST_PARTICLES} or more"] if count < LEAST_PARTICLES else []
    for name, (total, error) in others.items():
        doubt = _doubt(found[name], total, error, REFIT * count / fitted)
        if doubt:
            doubts.append(f"{name} is {total / count:.3g} +- {error / count:.2g} nats a particle below {best}{doubt}")
    if doubts:
        return None, f"no clear winner: {'; '.join(doubts)}"
    next_best = min(others, key=lambda name: others[name][0])
    total, error = (value / count for value in others[next_best])
    than = f"{next_best}, the next" if len(others) > 1 else next_best
    better = f"{total:.3g} +- {error:.2g} nats a particle better than {than}"
    return best, f"{best} explains the {count} particles best, {better}"


def _doubt(other: Evidence, total: float, error: float, refit: float) -> str | None:
    """What is unclear about a lead of `total` nats over another fit; None where nothing is."""
    yet = STILL * float(other.rise.sum())
    if total < max(CLEAR * error, LEAST_NATS):
        return ", which is within the error"
    if total < CLEAR * (error**2 + refit**2) ** 0.5:
        return ", as fits of one model may be"
    if total - yet < CLEAR * (error**2 + refit**2) ** 0.5:
        return ", which more draws may make up for"
    if doubtful(other) > MOST_BAD:
        return f", with a k of {doubtful(other):.0%} of the particles that is bad or unknown: give more draws"
    return None


def difference(one: Tensor, other: Tensor) -> tuple[float, float]:
    """The sum of one - other (n,) and its standard error."""
    paired = (one - other).double()
    return float(paired.sum()), float(len(paired) ** 0.5 * paired.std(correction=0))


def doubtful(found: Evidence) -> float:
    """The share of particles whose weights have a tail that draws do not fill, or so few that none tells."""
    return float((~(found.pareto_k < GOOD)).double().mean())


def arviz_table(found: Mapping[str, Evidence], draws: int) -> pd.DataFrame:
    """What `az.compare` makes of them.

    Its weights of stacking come from p, not log p, which is 0 to the computer for an image of any size: they are taken
    from p over the largest of each particle, which leaves them as they are.
    """
    largest = torch.stack([one.log_p for one in found.values()]).amax(0)
    relative = {name: replace(one, log_p=one.log_p - largest) for name, one in found.items()}
    _, az_compare = _arviz()
    data = [{name: elpd_data(one, draws) for name, one in each.items()} for each in (found, relative)]
    with warnings.catch_warnings(), np.errstate(all="ignore"):  # of these weights
        warnings.simplefilter("ignore")
        table, weighed = map(az_compare, data)
    table["weight"] = weighed["weight"]
    return table


def elpd_data(found: Evidence, draws: int, p: float = np.nan, good_k: float = GOOD) -> Any:
    """log p as ArviZ's ELPDData. Where nothing was left out it is called loo by courtesy, and p is NaN."""
    import xarray as xr

    each, k = (xr.DataArray(value.double().numpy(), dims="particle") for value in (found.log_p, found.pareto_k))
    total, error = float(each.sum()), float(len(each) ** 0.5 * each.std())
    rest = {
        "n_samples": draws,
        "n_data_points": len(each),
        "warning": bool((~(found.pareto_k < good_k)).any()),
        "scale": "log",
        "good_k": good_k,
    }
    kind, _ = _arviz()
    if not (isinstance(kind, type) and issubclass(kind, pd.Series)):  # since 1.0
        return kind(elpd=total, se=error, p=p, **rest, elpd_i=each, pareto_k=k)
    said = {"elpd_loo": total, "se": error, "p_loo": p, **rest, "loo_i": each, "pareto_k": k}
    return kind(data=list(said.values()), index=list(said))


def _arviz() -> tuple[Any, Any]:
    """ELPDData of LOO and compare, of whichever ArviZ is there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the import
        import arviz

        if int(arviz.__version__.split(".")[0]) < 1:
            return arviz.ELPDData, arviz.compare
        import arviz_stats

        utils, unrounded = arviz_stats.utils, partial(arviz_stats.compare, round_to="none")
        return getattr(utils, "ELPDDataLOO", None) or partial(utils.ELPDData, kind="loo"), unrounded


def _unlike(one: Particles, other: Particles) -> tuple[str, str, str] | None:
    """In what two sets of particles are seen differently, and how each is."""
    for name in ("box", "window", "normalize", "invert"):
        a, b = getattr(one, name), getattr(other, name)
        if a != b:
            return name, str(a), str(b)
    if abs(one.apix - other.apix) > 1e-3 * one.apix:
        return "apix", f"{one.apix:.4g}", f"{other.apix:.4g}"
    return None
