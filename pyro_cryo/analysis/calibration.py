"""Whether posteriors are calibrated: a truth lies among draws of its posterior as one more draw would.

Where theta ~ p(theta), image ~ p(image | theta) and S draws come from p(theta | image), the rank of theta among them,
or of any f(theta, image), is uniform on 0 .. S (Talts, Betancourt, Simpson, Vehtari and Gelman, arXiv:1804.06788
(2018)). `sbc` makes such images from a fitted model itself; where truths are known from elsewhere, `calibration` takes
them as they are.

Ranks of theta alone are also uniform where q(theta | image) = p(theta), which has learned nothing: so the sharpness of
q stands beside them, and the rank of log p(image | theta), which it fails (Modrak et al., Bayesian Analysis 20 (2025)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.inference.draws import drawn, latent_of, of_particles, picked
from pyro_cryo.inference.run import Run
from pyro_cryo.physics.rotations import log

SIMULATED = 10_000  # sets of uniform ranks that tell how far one strays
DIRECTIONS = 4  # random ones, along which z is ranked beside its own coordinates
LIKELIHOOD = "likelihood"

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Band:
    """Where the distribution function of n uniform ranks on 0 .. S runs, at all of them at once, at a level.

    expected, lower, upper: (S,) the share of ranks of at most j = 0 .. S - 1
    """

    level: float
    expected: Tensor
    lower: Tensor
    upper: Tensor


@dataclass(frozen=True)
class Uniformity:
    """Whether ranks (n, d) are uniform, coordinate by coordinate.

    inside:  (d,) whether the distribution function stays within the band
    excess:  (d,) by how much it leaves it at most, a share of the ranks; 0 inside
    p_value: (d,) how often uniform ranks stray as far
    """

    inside: Tensor
    excess: Tensor
    p_value: Tensor


@dataclass(frozen=True)
class Coverage:
    """How many truths lie in posterior regions of a level.

    level:    the one asked for, to within what S draws resolve: a multiple of 2 / (S + 1) below 1
    interval: (d,) share of them within the central interval of each coordinate
    region:   () share within the highest-density region of all coordinates
    error:    standard error of a share that is `level`, sqrt(level (1 - level) / n)
    """

    level: float
    interval: Tensor
    region: Tensor
    error: float


@dataclass(frozen=True)
class Calibration:
    """How n truths of d coordinates lie among S draws of each one's posterior.

    draws:     S
    ranks:     (n, d) 0 .. S, how many draws lie below
    distance:  (n,) 0 .. S, how many draws lie nearer to the middle: rank of the Mahalanobis distance from the mean of
               draws and truth, with their covariance
    sharpness: (d,) root mean square posterior sd over the sd of the truths: 1 where q knows no more than the prior
    """

    draws: int
    ranks: Tensor
    distance: Tensor
    sharpness: Tensor

    def uniformity(self, level: float = 0.99) -> Uniformity:
        """Of the ranks, in the simultaneous band of a level."""
        return uniformity(self.ranks, self.draws, level)

    def coverage(self, level: float = 0.9) -> Coverage:
        """Of regions of a level."""
        count, places = len(self.ranks), self.draws + 1
        tail = round((1 - level) / 2 * places)
        own = 1 - 2 * tail / places
        if not 0 < own < 1:
            raise ValueError(f"{self.draws} draws tell no region of level {level:g}; give more draws")
        interval = ((self.ranks >= tail) & (self.ranks < places - tail)).double().mean(0)
        region = (self.distance < places - 2 * tail).double().mean()
        return Coverage(own, interval, region, (own * (1 - own) / count) ** 0.5)


@dataclass(frozen=True)
class Simulated:
    """Images that a model made itself.

    batch:          poses, optics and noise groups of real images, with images from the model
    latent:         what each particle was given, by site: (n, ...), or (B, ...) where images have it each
    shared:         what all have in common, by site, such as the map: its mean under the guide, as for the draws
    log_likelihood: (n,) log p(image | latent), nats
    """

    batch: Batch
    latent: Values
    shared: Values
    log_likelihood: Tensor


def ranks(truth: Tensor, draws: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """How many of S draws (S, n, d) lie below the truth (n, d): (n, d) long, 0 .. S.

    A truth that equals some draws, as under a discrete posterior, is put among them at random, which keeps the rank of
    a further draw uniform.
    """
    if draws.shape[1:] != truth.shape:
        raise ValueError(
            f"draws of {tuple(draws.shape)} for truths of {tuple(truth.shape)}; expected (S, n, d), (n, d)"
        )
    below, equal = (draws < truth).sum(0), (draws == truth).sum(0)
    chance = torch.rand(truth.shape, generator=generator, dtype=torch.float64).to(truth.device)
    return below + (chance * (equal + 1)).long().clamp_max(equal)


def simultaneous_band(n: int, draws: int, level: float = 0.99) -> Band:
    """The band that the distribution function of n uniform ranks among `draws` leaves with probability 1 - level.

    At each point it is the central interval of a binomial distribution, at a level adjusted by simulation so that all
    hold together. Source: Sailynoja, Buerkner and Vehtari, Statistics and Computing 32 (2022) 32, algorithm 1.
    """
    from scipy.stats import binom

    if not 0 < level < 1:
        raise ValueError(f"level is {level:g}; expected between 0 and 1, for example 0.99")
    # Counts are discrete and many sets stray equally far: those that do so by just gamma are inside.
    tail = 0.5 * (1 - 1e-9) * np.quantile(_strays(n, draws), 1 - level, method="lower")
    share = _shares(draws)
    lower, upper = (torch.from_numpy(count / n) for count in (binom.ppf(tail, n, share), binom.isf(tail, n, share)))
    return Band(level, torch.from_numpy(share), lower, upper)


def uniformity(ranks: Tensor, draws: int, level: float = 0.99) -> Uniformity:
    """Whether ranks (n, d) among `draws` are uniform on 0 .. draws."""
    if len(ranks) == 0 or int(ranks.min()) < 0 or int(ranks.max()) > draws:
        raise ValueError(f"ranks of shape {tuple(ranks.shape)} are not (n, d) numbers from 0 to {draws}")
    count, band = len(ranks), simultaneous_band(len(ranks), draws, level)
    below = torch.stack([(ranks <= j).sum(0) for j in range(draws)]).cpu()  # (S, d)
    share = below.double() / count
    excess = torch.maximum(share - band.upper[:, None], band.lower[:, None] - share).amax(0).clamp_min(0)
    stray = _least_tail(below.T.numpy(), count, draws) * (1 + 1e-9)
    p_value = np.searchsorted(_strays(count, draws), stray, side="right") / SIMULATED
    return Uniformity(excess <= 0, excess, torch.from_numpy(p_value))


def calibration(truth: Tensor, draws: Tensor, generator: torch.Generator | None = None) -> Calibration:
    """How truths (n, d) lie among draws (S, n, d) of their posteriors."""
    if len(draws) < 2 or len(truth) < 2:
        raise ValueError(f"{len(draws)} draws of {len(truth)} posteriors; give at least 2 of each")
    distance = _distance(torch.cat([truth[None], draws]))
    return Calibration(
        draws=len(draws),
        ranks=ranks(truth, draws, generator),
        distance=ranks(distance[0, :, None], distance[1:, :, None], generator)[:, 0],
        sharpness=(draws.var(0).mean(0) / truth.var(0)).sqrt(),
    )


def simulated(run: Run, batch: Batch) -> Simulated:
    """Images of a fitted model's own story: its latents from the prior, its map and noise as fitted.

    Poses that are not known are drawn from their prior too. What is drawn comes from PyTorch's generator.
    """
    with torch.no_grad():
        guessed: Any = poutine.trace(run.guide).get_trace(batch)  # type: ignore[arg-type, call-arg]
        shared = {name: node["fn"].mean for name, node in latent_of(guessed) if not of_particles(node)}
        story = poutine.condition(poutine.uncondition(run.model), data=shared)  # type: ignore[arg-type]
        told: Any = poutine.trace(story).get_trace(batch)  # type: ignore[call-arg]
    latent = {name: node["value"] for name, node in latent_of(told) if of_particles(node)}
    image = latent.pop("image")
    own = replace(batch, image=image, window_power=1.0)  # their noise is white
    return Simulated(own, latent, shared, told.nodes["image"]["fn"].log_prob(image))


def sbc(
    run: Run,
    particles: Particles,
    draws: int = 99,
    seed: int = 0,
    batch_size: int = 128,
    guide: Callable[[Batch], Any] | None = None,
    weighed: int = 0,
) -> dict[str, Calibration]:
    """Simulation-based calibration of a run's guide: is q(latents | image) the posterior under the model as fitted?

    Of `particles` poses, optics and noise groups are used; images are simulated, and the guide is asked about these.
    The model's maps and noise are taken for true; whether they are is another question (`predictive`). Its noise is
    white, so of what a window does to that of real images nothing is seen here.

    draws: S; S + 1 divisible by 20 lets 50% and 90% regions be exact
    guide: gives the guide of a batch of simulated images, where it is not the run's: posteriors that are found image by
           image, as those of poses are, have to be found for these
    weighed: from so many draws, S or more, S are picked by what they weigh beside the model, where k is below 0.7, as
           `Run.posterior(corrected=True)` does; 0: the guide's own draws. A few times S lets few be picked twice

    By quantity: `z`, its coordinates; `z along`, along random directions; `rotation`, the turn about three axes from
    the table's, radians, and its angle; `translation`, pixels, of a particle's first image; other sites; and
    `likelihood`, log p(image | latents). Raises ValueError where a run has a table of poses and no guide is given, or
    fewer draws are weighed than picked.

        for name, found in sbc(run, particles[:1000]).items():
            print(name, found.uniformity().inside, found.coverage(0.9).interval, found.sharpness)
    """
    if guide is None and run.poses is not None:
        raise ValueError(
            "the poses of this run have a table of posteriors, of its own images; give guide=, which finds those of "
            "simulated ones"
        )
    if 0 < weighed < draws:
        raise ValueError(f"{draws} draws are to be picked from {weighed}; expected weighed=0, or at least {draws}")
    ask = guide or (lambda batch: run.guide)
    generator = torch.Generator().manual_seed(seed)
    truths: list[Values] = []
    answers: list[Values] = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for batch in run.batches(particles, batch_size):
            made = simulated(run, batch)
            with torch.enable_grad():
                asked = ask(made.batch)
            every = drawn(replace(run, guide=asked), made.batch, max(draws, weighed), weighed)
            kept = picked(every, made.batch, draws, generator) if weighed else every
            latent = {name: value for name, value in kept.sites.items() if name in made.latent}
            told = [_log_likelihood(run, made, {name: v[s] for name, v in latent.items()}) for s in range(draws)]
            truths.append(_quantities(made.latent, made.log_likelihood, latent, made.batch))
            answers.append(_quantities(latent, torch.stack(told), latent, made.batch))
    truth, answer = _joined(truths, 0), _joined(answers, 1)
    if "z" in truth and truth["z"].shape[-1] > 1:
        truth["z along"], answer["z along"] = _along(truth["z"], answer["z"], generator)
    return {name: calibration(truth[name], answer[name], generator) for name in sorted(truth)}


def _shares(draws: int) -> NDArray[np.floating]:
    """P(rank <= j) of a uniform rank, j = 0 .. S - 1: (S,)."""
    return np.arange(1, draws + 1) / (draws + 1)


@lru_cache(maxsize=16)
def _strays(n: int, draws: int) -> NDArray[np.floating]:
    """`_least_tail` of sets of n uniform ranks, in order: (SIMULATED,)."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(n, np.full(draws + 1, 1 / (draws + 1)), size=SIMULATED)
    return np.sort(_least_tail(counts[:, :-1].cumsum(1), n, draws))


def _least_tail(below: NDArray[np.integer], n: int, draws: int) -> NDArray[np.floating]:
    """How improbable counts (m, S) of n ranks at most j are, two-sided, where they are most so: (m,)."""
    return _tails(n, draws)[below, np.arange(draws)].min(1)


@lru_cache(maxsize=4)
def _tails(n: int, draws: int) -> NDArray[np.floating]:
    """Two-sided tail probability of every count 0 .. n of ranks at most j: (n + 1, S)."""
    from scipy.stats import binom

    count, share = np.arange(n + 1)[:, None], _shares(draws)
    return 2 * np.minimum(binom.cdf(count, n, share), binom.sf(count - 1, n, share))


def _distance(points: Tensor) -> Tensor:
    """Squared Mahalanobis distance of each of M points (M, n, d) from their mean, in their covariance: (M, n).

    All M points count alike in both, so where one is as another its rank is uniform for any M.
    """
    centred = (points - points.mean(0)).double()
    covariance = torch.einsum("mni,mnj->nij", centred, centred) / len(points)
    precision = torch.linalg.pinv(covariance, hermitian=True)
    return torch.einsum("mni,nij,mnj->mn", centred, precision, centred).float()


def _log_likelihood(run: Run, made: Simulated, latent: Values) -> Tensor:
    """log p(image | latents) of a batch's particles: (n,)."""
    given = poutine.condition(run.model, data={**made.shared, **latent})
    image: Any = poutine.trace(given).get_trace(made.batch).nodes["image"]  # type: ignore[call-arg]
    return image["fn"].log_prob(image["value"])


def _quantities(latent: Values, log_likelihood: Tensor, among: Values, batch: Batch) -> Values:
    """What is ranked: (*draws, n, d) by name, of the sites that are in `among`."""
    ahead = log_likelihood.ndim - 1
    found = {name: _as_columns(name, latent[name], ahead, batch).cpu() for name in among}
    return {**found, LIKELIHOOD: log_likelihood[..., None].cpu()}


def _as_columns(name: str, value: Tensor, ahead: int, batch: Batch) -> Tensor:
    """A site's value as numbers of each particle, (*draws, n, d); `ahead` is 1 where there are draws, else 0."""
    if name == "rotation":
        turn = log(value @ batch.rotation[batch.first].mT)
        return torch.cat([turn, turn.norm(dim=-1, keepdim=True)], -1)
    if value.shape[ahead] == len(batch):
        value = value.index_select(ahead, batch.first)
    return value.flatten(ahead + 1) if value.ndim > ahead + 1 else value[..., None]


def _along(truth: Tensor, draws: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Both along random directions: (n, DIRECTIONS), (S, n, DIRECTIONS). What was equal is so after rounding."""
    direction = torch.randn(truth.shape[-1], DIRECTIONS, generator=generator, dtype=torch.float64)
    direction = direction / direction.norm(dim=0)
    return (truth.double() @ direction).float(), (draws.double() @ direction).float()


def _joined(parts: Iterable[Values], dim: int) -> Values:
    """Quantities of batches side by side."""
    every = list(parts)
    return {name: torch.cat([part[name] for part in every], dim) for name in every[0]}
