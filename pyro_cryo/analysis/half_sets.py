"""Does the motion come back? Two fits of one recipe to two halves of the particles, compared at the same shapes.

The consensus of two halves agrees even where all that moves is noise. What tells is the motion's own FSC: of maps at
one z less the mean map, from each half. Motion that both halves show may still be no motion: errors of the poses come
back as well, and `analysis.association` asks for these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pyro_cryo.analysis.fsc import fsc, resolution_angstrom, shell_sum
from pyro_cryo.analysis.latent import as_table, kmeans
from pyro_cryo.data.particles import Particles
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.run import Run
from pyro_cryo.model import CryoModel
from pyro_cryo.pose import KnownPose
from pyro_cryo.volumes.mask import find_mask

Array = NDArray[np.floating]

NEIGHBOURS = 30  # a tenth of a standard deviation of what is left, of the particle's own, is what they add
SHUFFLES = 200


@dataclass(frozen=True)
class HalfSets:
    """What two runs, A and B, agree on. Curves are by shell, (D / 2 + 1,) the last axis, inside a mask.

    runs:   A and B
    index:  (K,) particles at whose shapes maps are compared, numbers in the particles that both encoded
    z:      (K, zdim of A), (K, zdim of B) these shapes in each run
    r2:     share of the variance of B's z that A's tells, and of A's that B's tells
    maps:   (K, D / 2 + 1) FSC of A's and B's map at each shape
    motion: (K, D / 2 + 1) FSC of the same less each run's mean over the K maps
    pooled: FSC of all K motions together: sum Re A_i conj B_i / sqrt(sum |A_i|^2 sum |B_i|^2)
    null:   what `pooled` exceeds once in twenty where shapes are matched at random: no more than this is due to z
    apix:   angstrom a voxel
    """

    runs: tuple[Run, Run]
    index: NDArray[np.integer]
    z: tuple[Array, Array]
    r2: tuple[float, float]
    maps: Tensor
    motion: Tensor
    pooled: Tensor
    null: Tensor
    apix: float

    @property
    def resolution_angstrom(self) -> float:
        """Where the pooled FSC of the motions first falls below 0.143; infinity where nothing comes back."""
        return resolution_angstrom(self.pooled, self.apix)


def half_sets(
    build: Callable[[], CryoModel],
    particles: Particles,
    seed: int = 0,
    *,
    encoded: Particles | None = None,
    points: int = 10,
    mask: Tensor | None = None,
    **settings: Any,
) -> HalfSets:
    """Fit `build()` to two random halves of the particles, all images of one in the same half, and compare the fits.

    encoded:  what both runs encode, to tell their z from each other; default: all particles
    settings: of `fit`
    points, mask: as in `compare`

        found = half_sets(lambda: LinearSubspace(particles.box, zdim=4), particles, seed=0)
        print(found.r2, found.resolution_angstrom)
    """
    order = torch.randperm(particles.n_particles, generator=torch.Generator().manual_seed(seed))
    runs = []
    for number, half in enumerate(order.tensor_split(2)):
        torch.manual_seed(seed + number)
        model = build()
        if not isinstance(model.poses, KnownPose):
            raise ValueError(
                f"poses are {type(model.poses).__name__}; both runs encode the same particles, which takes known "
                "poses: find them first, and give run.particles"
            )
        runs.append(fit(model, particles[particles.images_of(half.sort().values)], seed=seed + number, **settings))
    a, b = runs
    return compare(a, b, particles if encoded is None else encoded, points=points, mask=mask, seed=seed)


def compare(
    a: Run, b: Run, particles: Particles, *, points: int = 10, mask: Tensor | None = None, seed: int = 0
) -> HalfSets:
    """Two runs with known poses, at shapes of particles that both encode.

    points: K, as many shapes as there are at most: particles nearest to the centres of clusters in A's z
    mask:   (D, D, D) in 0 to 1; default: found on the mean of all maps
    """
    z_a, z_b = (run.encode(particles).z.astype(float) for run in (a, b))
    b_from_a, a_from_b = told(z_a, z_b), told(z_b, z_a)
    index = kmeans(z_a, min(points, len(np.unique(z_a, axis=0))), seed).nearest
    z = (z_a[index], b_from_a[index])
    maps_a, maps_b = a.volume(z[0]), b.volume(z[1])
    mask = find_mask((maps_a + maps_b).mean(0)) if mask is None else mask
    moved_a, moved_b = ((maps - maps.mean(0)) * mask for maps in (maps_a, maps_b))
    motion, pooled, null = _motion_fsc(moved_a, moved_b, np.random.default_rng(seed))
    return HalfSets(
        (a, b),
        index,
        z,
        (_r2(z_b, b_from_a), _r2(z_a, a_from_b)),
        torch.stack([fsc(one * mask, other * mask) for one, other in zip(maps_a, maps_b, strict=True)]),
        motion,
        pooled,
        null,
        a.apix,
    )


def told(z: ArrayLike | Tensor, other: ArrayLike | Tensor) -> Array:
    """What coordinates z (n, p) tell of others (n, q) of the same particles: (n, q).

    The affine regression, and where that leaves something the mean of what it leaves of the `NEIGHBOURS` nearest
    particles, never the particle itself. Latent spaces of linear families differ by an affine map, which the first
    finds exactly and the second leaves alone; those of curved families and of networks by a smooth one, which the
    second follows. Where coordinates depend on each other, as probabilities do, the affine map is that of least norm.
    """
    from scipy.spatial import cKDTree

    z, other = as_table(z), as_table(other)
    design = np.hstack([np.ones((len(z), 1)), z])
    affine = design @ np.linalg.lstsq(design, other, rcond=1e-6)[0]
    count = min(NEIGHBOURS, len(z) - 1)
    near = np.asarray(cKDTree(z).query(z, count + 1)[1])
    others = (near != np.arange(len(z))[:, None])[..., None]  # of particles at the same z the own may not be nearest
    return affine + ((other - affine)[near] * others).sum(1) / others.sum(1)


def _r2(z: Array, by: Array) -> float:
    spread = float(((z - z.mean(0)) ** 2).sum())
    return 1 - float(((z - by) ** 2).sum()) / spread if spread > 0 else 0.0


def _motion_fsc(a: Tensor, b: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Of motions (K, D, D, D): FSC of each pair (K, D / 2 + 1), of all together, its 95% quantile at random pairs."""
    spectra_a, spectra_b = (torch.fft.rfftn(m.double(), dim=(1, 2, 3)) for m in (a, b))
    cross = torch.stack([torch.stack([shell_sum((x * y.conj()).real) for y in spectra_b]) for x in spectra_a])
    power_a, power_b = (torch.stack([shell_sum(x.abs().square()) for x in s]) for s in (spectra_a, spectra_b))
    own = torch.arange(len(a))
    pooled_power = power_a.sum(0) * power_b.sum(0)
    pairs = [torch.from_numpy(rng.permutation(len(a))) for _ in range(SHUFFLES)]
    null = torch.stack([_correlation(cross[own, pair].sum(0), pooled_power) for pair in pairs])
    return (
        _correlation(cross[own, own], power_a * power_b),
        _correlation(cross[own, own].sum(0), pooled_power),
        null.quantile(0.95, dim=0),
    )


def _correlation(cross: Tensor, power: Tensor) -> Tensor:
    """cross / sqrt(power), 0 where there is no power, and 1 in shell 0 as in `fsc`."""
    curve = torch.where(power > 0, cross / power.sqrt().clamp_min(1e-300), torch.zeros_like(cross))
    curve[..., 0] = 1.0
    return curve
