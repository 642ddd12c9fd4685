"""Does z know the pose? It should not: how a molecule is bent says nothing of how it lay in the ice.

A latent that encodes pose is the commonest false motion: poses that are off depending on the view, or density that a
mask cuts off in some views, are explained by z where nothing moves. The test is of one draw of z from each particle's
posterior. Under the right population and noise p(z) p(R) p(image | z, R) is the joint distribution of all three, so a
draw of z given the image and R is distributed as z itself, whatever R is. Posterior means are not: in views that hide
the motion they shrink to the middle, and so depend on the view.

Of 199 fits to 400 simulated images with a motion (32 px, SNR 0.05) 7.0% have p <= 5%, of particles that were not fitted
3.5%; of 60 with poses off by 6 degrees to the one side or the other (SNR 0.1) 97% where the molecule moves as well, all
where it is still (examples/benchmarks/pose_association.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pyro_cryo.analysis.latent import as_table
from pyro_cryo.data.particles import Particles
from pyro_cryo.inference.draws import drawn
from pyro_cryo.inference.run import Run
from pyro_cryo.physics.asymmetric_unit import to_unit

Array = NDArray[np.floating]

SAMPLE = 20_000  # so many particles tell
FEWEST = 50  # above the 34 functions of the pose, which could explain fewer particles' z whatever it is
VARIES = 1e-4  # what varies by less is rounding
PARTS = ("view direction", "in-plane angle")


@dataclass(frozen=True)
class Association:
    """Whether z and the pose are associated.

    p_value:      of the hypothesis that they are independent; at least 1 / (1 + permutations)
    statistic:    the largest entry of `score`
    score:        (2, 2) rows view direction, in-plane angle; columns z, its squares and products: how much of these
                  the pose explains, in standard deviations of what it explains of shuffled z, from the mean of that;
                  minus infinity where there are none: products of class probabilities are these again
    permutations: how often z was shuffled
    share:        of the variance of z that the pose explains, less what it would by chance
    largest:      the same of that direction in z of which the pose explains most
    particles:    how many were looked at
    """

    p_value: float
    statistic: float
    score: Array
    permutations: int
    share: float
    largest: float
    particles: int

    @property
    def part(self) -> str:
        """What of the pose says most of z: its view direction, or its in-plane angle."""
        return PARTS[int(self.score.max(1).argmax())]


def association(
    z: ArrayLike | Tensor,
    rotation: Tensor,
    symmetry: Tensor | None = None,
    permutations: int = 999,
    seed: int = 0,
) -> Association:
    """Test draws of z (n, zdim), one a particle and never posterior means, against rotations (n, 3, 3).

    symmetry: (G, 3, 3) point group: of rotations R @ S, which are one pose, that of the asymmetric unit counts

    The pose's features are the Wigner functions of degree 1 and 2 (the entries of R and their products), first those of
    the view direction, then what is left of the others; z's are its principal components, then what is left of their
    squares and products. With P and Q orthonormal bases of these, |P^T Q|^2 is what the pose explains (Pillai's
    trace), block by block; the statistic is the largest block, each measured by its own shuffles. As z is shuffled
    against R the p-value holds for any n and any distribution of either (Fisher; Phipson and Smyth, Stat. Appl. Genet.
    Mol. Biol. 9 (2010)).
    """
    z = as_table(z)
    if len(z) != len(rotation):
        raise ValueError(f"{len(z)} draws of z and {len(rotation)} rotations; give one of each a particle")
    if len(z) < FEWEST:
        raise ValueError(f"{len(z)} particles are too few to tell z from pose; give at least {FEWEST}")
    rng = np.random.default_rng(seed)
    if len(z) > SAMPLE:
        rows = rng.choice(len(z), SAMPLE, replace=False)
        z, rotation = z[rows], rotation[torch.from_numpy(rows)]
    if not (z != z[0]).any():
        raise ValueError(f"z is the same for all {len(z)} particles; there is nothing to associate with their poses")
    view, turn = _pose_features(rotation if symmetry is None else to_unit(rotation, symmetry))
    components, products, variance = _shape_features(z)
    pose, shape = np.hstack([view, turn]).T, np.hstack([components, products])
    shuffled = (pose @ shape[rng.permutation(len(z))] for _ in range(permutations))
    return _judged(np.stack([pose @ shape, *shuffled]), view.shape[1], variance, len(z))


def pose_association(run: Run, particles: Particles | None = None, seed: int = 0) -> Association:
    """The test for one draw of z, and of the pose where that is uncertain, from a run's guide for each particle.

    particles: default: those of the fit; others, which were not fitted, need known poses
    """
    draws: list[tuple[Tensor, Tensor]] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in run.batches(run.particles if particles is None else particles, 256):
            sites = drawn(run, batch, 1).sites
            rotation = sites["rotation"][0] if "rotation" in sites else batch.rotation[batch.first]
            draws.append((sites["z"][0].cpu(), rotation.cpu()))
    z, rotation = (torch.cat(part) for part in zip(*draws, strict=True))
    symmetry = getattr(run.model, "symmetry", None)
    return association(z, rotation, None if symmetry is None else symmetry.cpu(), seed=seed)


def _pose_features(rotation: Tensor) -> tuple[Array, Array]:
    """Orthonormal over the particles: functions of the view direction, at most 8, then of all else, at most 26."""
    entries = rotation.detach().cpu().double().flatten(1).numpy()
    view = _basis(_with_products(entries[:, 6:]))
    return view, _basis(_with_products(entries), view)


def _shape_features(z: Array) -> tuple[Array, Array, Array]:
    """Orthonormal over the particles: principal components of z, what is left of their products; shares of variance."""
    components = _basis(z)
    variance = ((z.T @ components) ** 2).sum(0)
    return components, _basis(_products(np.sqrt(len(z)) * components), components), variance / variance.sum()


def _judged(product: Array, views: int, variance: Array, particles: int) -> Association:
    """From P^T Q (1 + permutations, p, q), the observed one first; `views` features are of the view direction."""
    components, square = len(variance), product**2
    rows = (square[:, :views].sum(1), square[:, views:].sum(1))
    explained = np.array([[row[:, :components].sum(1), row[:, components:].sum(1)] for row in rows])
    explained = np.moveaxis(explained, -1, 0)  # (1 + permutations, 2, 2)
    spread = explained.std(0)
    score = np.where(spread > VARIES**2, (explained - explained.mean(0)) / spread.clip(VARIES**2), -np.inf)
    statistic = score.max((1, 2))
    share = square[..., :components].sum(1) @ variance
    linear = product[..., :components]
    largest = np.linalg.eigvalsh(linear.swapaxes(1, 2) @ linear)[:, -1]
    return Association(
        float((statistic >= statistic[0]).mean()),
        float(statistic[0]),
        score[0],
        len(product) - 1,
        _beyond_chance(share),
        _beyond_chance(largest),
        particles,
    )


def _beyond_chance(share: Array) -> float:
    """An observed share, the first, of what those by chance leave."""
    chance = float(share[1:].mean())
    return (float(share[0]) - chance) / (1 - chance)


def _with_products(values: Array) -> Array:
    return np.hstack([values, _products(values)])


def _products(values: Array) -> Array:
    """All products of two columns: (n, q) -> (n, q (q + 1) / 2)."""
    one, other = np.triu_indices(values.shape[1])
    return values[:, one] * values[:, other]


def _basis(values: Array, against: Array | None = None) -> Array:
    """Orthonormal columns that span those of values (n, q), mean and what `against` spans taken out; may be none."""
    left = values - values.mean(0)
    scale = float(np.linalg.norm(left)) / np.sqrt(left.shape[1])
    if against is not None:
        left = left - against @ (against.T @ left)
    u, size, _ = np.linalg.svd(left, full_matrices=False)
    return u[:, size > VARIES * scale]
