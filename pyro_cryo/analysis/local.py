"""Maps from the images near a z, where images that were left out support them over the model's own map.

Beside V(z), a fitted model's map, stands V(z) + delta, delta solved for from images that count

    w_i(h) = E exp(-(z_i - z)' S^-1 (z_i - z) / 2 h^2),   z_i ~ q(z_i) = Normal(m_i, C_i),
           = |1 + S^-1 C_i / h^2|^-1/2 exp(-(m_i - z)' (C_i + h^2 S)^-1 (m_i - z) / 2):

a kernel of bandwidth h, in expectation, since noise that moves m_i is in the image too. S is the mean of C_i, so that a
distance counts only as far as images tell it. delta has a Gaussian prior about zero, its variance by shell from the
images (MacKay's fixed point), its place where density is at z and the family moves.

A narrow kernel sees few images and a wide one other states; which is worse depends on the frequency. So each half of
the images estimates delta at several bandwidths, and each shell takes the one under which images of the other half are
most probable, or V(z) where no gain exceeds its standard error. The idea of a bandwidth by shell, from halves: Gilles
and Singer, Cryo-EM heterogeneity analysis using regularized covariance estimation and kernel regression (2023).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.distributions.volume import filter_shells
from pyro_cryo.guides.coefficients import Projected
from pyro_cryo.inference.family import motion_envelope
from pyro_cryo.inference.reconstruct import Halves, half_sets, left_of
from pyro_cryo.inference.run import Latent, Run
from pyro_cryo.physics.slices import channel_grid, fourier_grid
from pyro_cryo.progress import Progress, quiet
from pyro_cryo.volumes.conjugate import NormalEquations, settled
from pyro_cryo.volumes.mask import density_envelope, find_mask

BANDWIDTHS = 6
FEWEST, MOST = 50, 0.5  # particles that count at the narrowest bandwidth, and share of all that do at the widest
SCORED = 2  # the bandwidth, from the narrowest, whose weights images have as judges
LEAST_SCALE = 0.02  # of the largest: where nothing moves nothing is corrected
LEAST_WEIGHT = 1e-2  # of the largest: images of less are left out
FAMILY = 24  # maps that tell where the family moves
TOLERANCE = 5e-2
ALIKE = 1 / 8  # of all shells: sd of the weights with which neighbours' gains count
KEPT_BYTES = 2 << 30  # of normal equations, for several z in one pass over the images


@dataclass(frozen=True)
class LocalMaps:
    """Maps at n values of z.

    volumes:   (n, D, D, D)
    bandwidth: (n, H) h, in posterior standard deviations of z
    images:    (n, H) how many particles count at each, (sum w)^2 / sum w^2
    choice:    (n, D / 2 + 1) the bandwidth of each shell, -1 where the model's own map stands
    """

    volumes: Tensor
    bandwidth: Tensor
    images: Tensor
    choice: Tensor


def local_maps(run: Run, z: Tensor | np.ndarray, batch_size: int = 256, progress: Progress = quiet) -> Tensor:
    """Maps at z (zdim,) or (n, zdim) from the images near it: (D, D, D) or (n, D, D, D), z-y-x, as `Run.volume`.

    maps = local_maps(run, run.latent.z[[12, 100]])
    """
    volumes = local_estimates(run, z, batch_size, progress).volumes
    return volumes[0] if np.ndim(z) == 1 else volumes


def local_estimates(run: Run, z: Tensor | np.ndarray, batch_size: int = 256, progress: Progress = quiet) -> LocalMaps:
    """The same maps, always (n, D, D, D), with the bandwidth that each shell was given.

    The run's particles are read once for as many z as `KEPT_BYTES` holds. Raises ValueError where z does not fit the
    model or is not finite.
    """
    own = run.volume(z)
    points = torch.as_tensor(z, dtype=torch.float32, device=run.device).reshape(-1, run.model.zdim)
    wrong = (~torch.isfinite(points).all(1)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(f"z of map {wrong[0]} is {points[wrong[0]].tolist()}; expected finite numbers")
    devices = [run.device] if run.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(0)  # guides draw: the same maps every time
        local = _Local(run, batch_size)
        at_once = max(1, KEPT_BYTES // (2 * BANDWIDTHS * 12 * 4 * run.model.box**3))
        parts, ticks = [], iter(progress(range(len(points)), len(points), "local maps", unit="map"))
        for some, maps in zip(points.split(at_once), own.reshape(-1, *own.shape[-3:]).split(at_once), strict=True):
            neighbours = [local.near.kernels(one) for one in some]
            equations = local.add_up(maps, [weight for weight, _ in neighbours])
            for volume, both, (weight, bandwidth) in zip(maps, equations, neighbours, strict=True):
                next(ticks, None)
                parts.append((*local.estimate(volume, both, weight), bandwidth, effective(weight)))
        next(ticks, None)
    volumes, choice, bandwidth, images = (torch.stack(part).cpu() for part in zip(*parts, strict=True))
    return LocalMaps(volumes, bandwidth, images, choice)


@dataclass(frozen=True)
class Neighbours:
    """Posteriors of z of N particles, in the metric S^-1, S their mean covariance.

    root:           (r, r) root' root = S^-1: what follows is of root z
    mean:           (N, r)
    axes, variance: (N, r, r) and (N, r) each covariance, in its own axes
    """

    root: Tensor
    mean: Tensor
    axes: Tensor
    variance: Tensor

    @staticmethod
    def of(latent: Latent, device: torch.device | str = "cpu") -> Neighbours:
        """The particles of a run."""
        z, covariance = (torch.as_tensor(v, dtype=torch.float32, device=device) for v in (latent.z, latent.z_cov))
        # z that are certain, and directions that no image takes, as of probabilities, are told apart, but finitely
        least = 1e-4 * z.var(0, correction=0).mean().clamp_min(1e-12) * torch.eye(z.shape[1], device=z.device)
        value, vector = torch.linalg.eigh(covariance.mean(0) + least)
        root = value.rsqrt()[:, None] * vector.T
        variance, axes = torch.linalg.eigh(root @ covariance @ root.T)
        return Neighbours(root, z @ root.T, axes, variance.clamp_min(0))

    def weights(self, z: Tensor, bandwidth: Tensor) -> Tensor:
        """w_i(h) at z (r,) over their largest: bandwidth (H,) -> (H, N)."""
        square = torch.einsum("nr,nrs->ns", self.mean - self.root @ z, self.axes).square()
        log_weight = torch.stack(
            [
                -0.5 * (torch.log1p(self.variance / h**2) + square / (self.variance + h**2)).sum(1)
                for h in bandwidth.tolist()
            ]
        )
        return (log_weight - log_weight.amax(1, keepdim=True)).exp()

    def kernels(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (H, N) and bandwidths (H,) at which geometrically more particles count: from few to half of them.

        Where posteriors are wide, even a kernel of no width has many.
        """
        count = len(self.mean)
        least = float(effective(self.weights(z, torch.tensor([1e-3]))))
        fewest, most = max(least, min(FEWEST, 0.25 * count)), max(least, MOST * count)
        asked = torch.as_tensor(np.geomspace(fewest, most, BANDWIDTHS), device=z.device)
        low, high = torch.full_like(asked, -7.0), torch.full_like(asked, 14.0)
        for _ in range(20):
            middle = 0.5 * (low + high)
            fewer = effective(self.weights(z, middle.exp())) < asked
            low, high = torch.where(fewer, middle, low), torch.where(fewer, high, middle)
        bandwidth = middle.exp().float()
        return self.weights(z, bandwidth), bandwidth


def effective(weight: Tensor) -> Tensor:
    """How many particles weights (*batch, N) amount to: (*batch,)."""
    return weight.sum(-1).square() / weight.square().sum(-1)


class _Local:
    """What all maps of a run have in common."""

    def __init__(self, run: Run, batch_size: int) -> None:
        self.run, self.batch_size = run, batch_size
        self.near = Neighbours.of(run.latent, run.device)
        self.first = half_sets(run.particles, torch.Generator().manual_seed(0)).to(run.device) == 1
        self.sigma = run.model.sigma.detach()
        self.symmetry = getattr(run.model, "symmetry", torch.eye(3, device=run.device)[None])
        rows = np.random.default_rng(0).permutation(len(run.latent.z))[:FAMILY]
        family = run.volume(run.latent.z[rows]).to(run.device)
        self.motion = motion_envelope(family - family.mean(0)).nan_to_num(1.0)

    def known(self, batch: Batch) -> Batch:
        """The images at their poses, the contrast that the guide infers taken into the CTF."""
        rotation, translation = self.run.model.pose(batch)
        guide: Any = poutine.trace(self.run.guide).get_trace(batch)  # type: ignore[arg-type, call-arg]
        site = guide.nodes.get("contrast")
        ctf = batch.ctf
        if site is not None:
            contrast = site["fn"].mean
            ctf = ctf * (contrast if len(contrast) == len(batch) else batch.of_images(contrast))[:, None]
        return replace(batch, rotation=rotation, translation=translation, ctf=ctf)

    def add_up(self, maps: Tensor, weights: list[Tensor]) -> list[list[Halves]]:
        """One pass: of each of n maps (n, D, D, D), what both halves say beyond it at each bandwidth (H, N)."""
        run = self.run
        grids = [fourier_grid(one.to(run.device)) for one in maps]
        empty = partial(NormalEquations.empty, run.model.box, run.device)
        sums = [[(empty(), empty()) for _ in weight] for weight in weights]
        for batch in run.particles.batches(self.batch_size, device=run.device):
            known, first = self.known(batch), self.first[batch.index]
            for grid, weight, by_bandwidth in zip(grids, weights, sums, strict=True):
                weight = weight[:, batch.of_images(batch.shown)]
                beyond = residual(known, grid)
                for one, halves in zip(weight, by_bandwidth, strict=True):
                    for equations, mine in zip(halves, (first, ~first), strict=True):
                        rows = (mine & (one > LEAST_WEIGHT)).nonzero().flatten()
                        if len(rows):
                            equations.add(beyond[rows], self.sigma, self.symmetry, one[rows])
        return sums

    def estimate(self, volume: Tensor, equations: list[Halves], weight: Tensor) -> tuple[Tensor, Tensor]:
        """The map (D, D, D) and the bandwidth of each of its shells (L,)."""
        volume = volume.to(self.run.device)
        scale = self.motion * density_envelope(volume, find_mask(volume))
        scale = torch.where(scale > LEAST_SCALE * scale.max(), scale, 0.0)
        order = len(self.symmetry)
        halves = [torch.stack([correction(both[h], scale, order) for both in equations]) for h in range(2)]
        choice = best_by_shell(*self.gains(volume, halves, weight[SCORED]))
        for h in choice.unique().tolist():
            if h >= 0:
                delta = correction(equations[h][0] + equations[h][1], scale, order)
                volume = volume + filter_shells(delta, (choice == h).float())
        return volume, choice

    def gains(self, volume: Tensor, halves: list[Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
        """What each correction (2 x (H, D, D, D)) adds to the log likelihood of images of the other half.

        Of the particles that weigh something (N,), all images of each: gain (n, H, L) by shell, weight (n,).
        """
        some = (weight > LEAST_WEIGHT).nonzero().flatten()
        rows = self.run.particles.images_of(some.cpu())
        own, other = fourier_grid(volume), [channel_grid(half) for half in reversed(halves)]
        parts = []
        for batch in self.run.particles[rows].batches(self.batch_size, device=self.run.device):
            beyond, first = residual(self.known(batch), own), self.first[rows.to(batch.index.device)[batch.index]]
            gain = torch.zeros(len(batch), len(halves[0]), batch.half.shells, device=volume.device)
            for grid, mine in zip(other, (first, ~first), strict=True):
                if bool(mine.any()):
                    gain[mine] = added(beyond[mine], grid, self.sigma)
            parts.append(batch.by_particle(gain))
        return torch.cat(parts), weight[some]


def residual(batch: Batch, grid: Tensor) -> Batch:
    """Images with those of a map, on its Fourier grid, subtracted."""
    return replace(batch, image=left_of(batch, grid))


def correction(equations: NormalEquations, scale: Tensor, order: int = 1) -> Tensor:
    """The posterior mean of a map (D, D, D) of prior sd `scale` times a factor a shell, learned from the images."""
    posterior, mean = settled(equations.posterior(scale, order=order), 2, TOLERANCE)
    return posterior.to_map(mean)


def added(beyond: Batch, grid: Tensor, sigma: Tensor) -> Tensor:
    """Log likelihood of images (B,) of H maps, their `channel_grid`, less that of none, by shell: (B, H, L)."""
    seen = Projected.of(beyond, grid, sigma)
    gain = (seen.slices * (seen.image[..., None] - 0.5 * seen.slices)).unflatten(1, (-1, 2)).sum(2)
    total = gain.new_zeros(beyond.half.shells, len(beyond), grid.shape[-1])
    return total.index_add_(0, beyond.half.shell, gain.transpose(0, 1)).movedim(0, -1)


def best_by_shell(gain: Tensor, weight: Tensor) -> Tensor:
    """The candidate of each shell that images of gain (n, H, L) and weight (n,) support most: (L,), -1 for none.

    What neighbouring shells gain counts too, and a gain of less than its standard error is none.
    """
    shells = torch.arange(gain.shape[2], device=gain.device, dtype=gain.dtype)
    gain = gain @ torch.exp(-0.5 * ((shells[:, None] - shells) / (ALIKE * len(shells))).square())
    total = torch.einsum("n,nhl->hl", weight, gain)
    deviation = gain - total / weight.sum()
    error = torch.einsum("n,nhl->hl", weight.square(), deviation.square()).sqrt()
    most, best = total.max(0)
    return torch.where(most > error.gather(0, best[None])[0], best, -1)
