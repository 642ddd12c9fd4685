"""Does a comparison on held-out images find the population of shapes that made them, and never name another?

    python examples/benchmarks/compare.py [--replicates 4] [--fitted 1000] [--held 500] [--snr 0.1 0.3]
    python examples/benchmarks/compare.py --truth alike --held 5000   # what fits of one model differ by

Data sets of 24 px with CTFs, at known poses, of V0 + z_1 U_1 + z_2 U_2: two arms of a toy move. z is Gaussian along a
line, one of two states, uniform on a circle, or one of three classes. Linear subspaces are fitted to `fitted` of the
images, from three seeds. All candidates share their maps; where each one's z lie is found by expectation maximisation:

    Gaussian        z ~ Normal(0, I): the linear subspace as it is
    two states      z one of 2 points, with weights
    circle          z = c + A (cos t, sin t), t uniform
    three classes   z one of 3 points, with weights

They are compared on the `held`, each at the best of its three fits. Of data `alike`, z Gaussian in two dimensions, the
candidates are the linear subspace from three seeds and from three others: nothing is to be found. Three classes may be
two, where the third has no weight: of two states they are as good, and `no clear winner` is right.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyro
import torch
from torch import Tensor

from pyro_cryo.analysis.compare import Comparison, compare
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import DensityMaps, simulate, two_arms
from pyro_cryo.distributions import Atoms
from pyro_cryo.guides.coefficients import Seen
from pyro_cryo.guides.exact import ExactGuide
from pyro_cryo.guides.points import PointCoefficients, fit_points
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.run import Run
from pyro_cryo.models.linear_subspace import LinearSubspace

BOX = 24
STATES = 300  # maps of equal probability that stand for a population
FITS = 3
STARTS = 5
ROUND = 48  # points of a circle
PASSES, CONVERGED = 200, 1e-5  # of EM; nats a particle


class Points(PointCoefficients):
    """y = (1, z), z one of the points (L, r), the weights (L,) of which are learned, or not."""

    def __init__(self, points: Tensor, log_weight: Tensor, learned: bool) -> None:
        super().__init__(0.0)
        self.points, self.log_weight, self.learned = points, log_weight, learned
        self.features = self.at(points)

    def at(self, z: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(z[..., :1]), z], -1)


class OnPoints(LinearSubspace):
    """The maps of a linear subspace with another population."""

    def __init__(self, of: LinearSubspace, coefficients: Points) -> None:
        super().__init__(of.box, of.zdim, contrast=0.0, noise_groups=len(of.log_sigma))
        self.consensus, self.volume, self.log_sigma = of.consensus, of.volume, of.log_sigma
        self.coefficients = coefficients

    def latent(self) -> Tensor:
        coefficients: Points = self.coefficients  # type: ignore[assignment]
        return pyro.sample("z", Atoms(coefficients.points, coefficients.log_weight))


def climbed(seen: Seen, template: Tensor, turn: Tensor, log_weight: Tensor, learned: bool) -> Points:
    """EM for the points template (L, m) @ turn (m, r) of all that is `seen` of the particles."""
    before = -math.inf
    for _ in range(PASSES):
        found = Points(template @ turn, log_weight, learned)
        moments = found.moments(seen)
        now, weight = float(moments.evidence.double().mean()), moments.weight
        if now - before < CONVERGED:
            break
        before = now
        gram = (weight.T @ seen.gram.flatten(1)).unflatten(1, seen.gram.shape[1:])
        score = (weight.T @ seen.projection)[:, 1:] - gram[:, 1:, 0]
        square = torch.einsum("la,lb,lij->aibj", template, template, gram[:, 1:, 1:]).flatten(2).flatten(0, 1)
        square += 1e-6 * square.diagonal().mean() * torch.eye(len(square))
        turn = torch.linalg.solve(square, (template.T @ score).flatten()).view_as(turn)
        if learned:
            log_weight = weight.mean(0).clamp_min(1e-6).log()
    return found


def states(seen: Seen, count: int) -> Points:
    points, log_weight = fit_points(seen, count, STARTS, torch.Generator().manual_seed(0))
    return climbed(seen, torch.eye(count), points, log_weight, True)


def circle(seen: Seen) -> Points:
    angle = 2 * math.pi * torch.arange(ROUND) / ROUND
    template = torch.stack([torch.ones(ROUND), angle.cos(), angle.sin()], 1)
    rank = seen.gram.shape[1] - 1
    turn = torch.cat([torch.zeros(1, rank), 2**0.5 * torch.eye(2, rank)])
    return climbed(seen, template, turn, torch.full((ROUND,), -math.log(ROUND)), False)


CANDIDATES: dict[str, Callable[[Seen], Points]] = {
    "two states": lambda seen: states(seen, 2),
    "circle": circle,
    "three classes": lambda seen: states(seen, 3),
}


TRUTHS = ("Gaussian", *CANDIDATES, "alike")


def subspaces(train: Particles, first: int) -> list[Run]:
    """Fits of one model."""
    seeds = range(first, first + FITS)
    return [fit(LinearSubspace(BOX, zdim=2, contrast=0.0), train, seed=seed) for seed in seeds]


def populations(train: Particles) -> dict[str, list[Run]]:
    """Every candidate, on the maps of every fit."""
    runs: dict[str, list[Run]] = {"Gaussian": subspaces(train, 0), **{name: [] for name in CANDIDATES}}
    for gaussian in runs["Gaussian"]:
        model = gaussian.model
        assert isinstance(model, LinearSubspace)
        guide = ExactGuide(model, model.volume, model.coefficients)
        with torch.no_grad():
            seen = Seen.of(guide.seen(batch) for batch in train.batches(256))
            for name, candidate in CANDIDATES.items():
                moved = OnPoints(model, candidate(seen))
                runs[name].append(Run(moved, train, guide=moved.make_guide()))
    return runs


def seeds(train: Particles) -> dict[str, list[Run]]:
    """The same model twice."""
    return {"one": subspaces(train, 0), "other": subspaces(train, FITS)}


def drawn(truth: str, seed: int) -> Tensor:
    """z (STATES, 2) of a population, of mean square 1 along each axis that it fills."""
    generator = torch.Generator().manual_seed(seed)
    turn = 2 * math.pi * float(torch.rand((), generator=generator))
    even = (torch.arange(STATES) + 0.5) / STATES
    line = torch.tensor([math.cos(turn), math.sin(turn)])
    if truth == "alike":
        return torch.randn(STATES, 2, generator=generator)
    if truth == "Gaussian":
        return torch.special.ndtri(even)[:, None] * line
    if truth == "two states":
        share = 0.3 + 0.4 * float(torch.rand((), generator=generator))
        return torch.where(even < share, ((1 - share) / share) ** 0.5, -((share / (1 - share)) ** 0.5))[:, None] * line
    angle = 2 * math.pi * (even if truth == "circle" else (3 * even).floor() / 3) + turn
    return 2**0.5 * torch.stack([angle.cos(), angle.sin()], 1)


def images(truth: str, count: int, snr: float, seed: int, folder: Path) -> Particles:
    toy = two_arms(3)
    apix = toy.apix_for(BOX, None)
    volumes = torch.stack([toy.volume(state, BOX, apix) for state in range(len(toy))])
    motions = 0.5 * torch.stack([volumes[7] - volumes[1], volumes[5] - volumes[3]])
    maps = volumes[4] + torch.einsum("sr,rzyx->szyx", drawn(truth, seed), motions)
    return Particles.open(simulate(DensityMaps(maps, apix), folder, n_images=count, box=BOX, snr=snr, seed=seed))


def verdict(truth: str, found: Comparison) -> str:
    if found.winner is None:
        return "no clear winner"
    return "right" if found.winner == truth else "WRONG"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=4)
    parser.add_argument("--fitted", type=int, default=1000)
    parser.add_argument("--held", type=int, default=500)
    parser.add_argument("--snr", type=float, nargs="*", default=[0.1, 0.3])
    parser.add_argument("--truth", nargs="*", choices=TRUTHS, default=TRUTHS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for snr in args.snr:
        counts, started = Counter[str](), time.monotonic()
        for truth in args.truth:
            for seed in range(args.seed, args.seed + args.replicates):
                with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    particles = images(truth, args.fitted + args.held, snr, seed, Path(folder) / "case")
                    train, held = particles[: args.fitted], particles[args.fitted :]
                    found = compare((seeds if truth == "alike" else populations)(train), held)
                counts[verdict(truth, found)] += 1
                print(f"{truth}\t{seed}\tSNR {snr:g}\t{verdict(truth, found)}\t{found.sentence}", flush=True)
        print(f"SNR {snr:g}: {dict(counts)} in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
