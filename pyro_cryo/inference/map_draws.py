"""Draws of maps from their posterior given images, noise and prior as they were fitted.

One map has a Gaussian posterior, and its draws are independent. In a family V(z) = sum_c y_c(z) V_c the z are not known
either, and what the images would say of the maps if they were overstates what they do. So draws are a Gibbs chain on
both (data augmentation: Tanner and Wong, J. Am. Stat. Assoc. 82 (1987) 528): given the maps, z and the contrast of
every particle from their exact posterior; given these, all maps together (`volumes.joint`). It begins at the fitted
maps, and each step is a pass over the images.

Poses are as they are, or where they have posteriors drawn from these for each draw of the maps: multiple imputation
(Rubin, Multiple Imputation for Nonresponse in Surveys, 1987). That takes a pose to be as sure in every draw as it is in
the fitted map.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import log, pi
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.coefficients import Coefficients, LinearCoefficients, Moments, Projected, Seen
from pyro_cryo.inference.em import EM, Maps
from pyro_cryo.inference.family import with_band
from pyro_cryo.model import DrawPoses
from pyro_cryo.physics.fourier import HalfPlane
from pyro_cryo.physics.slices import channel_grid
from pyro_cryo.progress import Progress, quiet
from pyro_cryo.volumes.conjugate import NormalEquations, VoxelPosterior, component_sd, noise_sd
from pyro_cryo.volumes.prior import MapPrior

WARM_UP = 10  # steps of a chain before its first draw
BATCH = 256


@dataclass(frozen=True)
class StillDraw:
    """A draw of the one map of all particles."""

    volume: Tensor

    def of(self, particle: int) -> Tensor:
        """(D, D, D)"""
        return self.volume

    def at(self, z: Tensor) -> Tensor:
        """(D, D, D)"""
        return self.volume

    def log_prob(self, batch: Batch, sigma: Tensor) -> Tensor:
        """(n,)"""
        seen = Projected.of(batch, self._grid, sigma).seen().by_particle(batch)
        return seen.empty + seen.projection[:, 0] - 0.5 * seen.gram[:, 0, 0] + _measure(batch, sigma)

    @cached_property
    def _grid(self) -> Tensor:
        return channel_grid(self.volume[None])


@dataclass(frozen=True)
class FamilyDraw:
    """A draw of the maps of a family and of the z of every particle.

    maps:      (C, b, b, b) on the scale of images cropped to b pixels
    z:         (N, r)
    consensus: (D, D, D), the map beyond the band limit of the family; None where that is the box's
    turn:      (1 + r, r) what z the draw has where the fit has z: (1, z) turn
    """

    maps: Tensor
    z: Tensor
    coefficients: Coefficients
    consensus: Tensor | None
    turn: Tensor

    def of(self, particle: int) -> Tensor:
        """The map (D, D, D) of a particle, at a contrast of 1."""
        return self._map(self.z[particle])

    def at(self, z: Tensor) -> Tensor:
        """The map (D, D, D) of what the fit has at z (r,)."""
        return self._map(torch.cat([torch.ones_like(z[:1]), z]) @ self.turn)

    def log_prob(self, batch: Batch, sigma: Tensor) -> Tensor:
        """(n,); the contrast is that of the consensus too."""
        box, side = batch.half.box, self.maps.shape[-1]
        reached = HalfPlane.of(box).count(side / 2 - 1e-3)
        seen = Projected.of(batch.band(reached), self._grid, sigma, box / side).seen()
        if self.consensus is not None:
            still = Projected.of(batch.beyond(reached), self._beyond, sigma).seen()
            gram, projection = seen.gram.clone(), seen.projection.clone()
            gram[:, 0, 0] += still.gram[:, 0, 0]  # the first coefficient is the contrast
            projection[:, 0] += still.projection[:, 0]
            seen = Seen(gram, projection, seen.empty + still.empty)
        return self.coefficients.moments(seen.by_particle(batch)).evidence + _measure(batch, sigma)

    def _map(self, z: Tensor) -> Tensor:
        low = torch.einsum("c,czyx->zyx", self.coefficients.at(z[None])[0], self.maps)
        return low if self.consensus is None else with_band(self.consensus, low)

    @cached_property
    def _grid(self) -> Tensor:
        return channel_grid(self.maps)

    @cached_property
    def _beyond(self) -> Tensor:
        assert self.consensus is not None
        return channel_grid(self.consensus[None])


def _measure(batch: Batch, sigma: Tensor) -> Tensor:
    """What makes `Seen` a density to the power `window_power`, as a model has it: (n,)."""
    left, own = (2 * sd.double().log().sum(1) for sd in (noise_sd(batch, sigma), component_sd(batch, sigma)))
    return batch.by_particle((left - batch.window_power * (own + len(batch.half) * log(2 * pi))).float())


def still_draws(
    particles: Particles,
    sigma: Tensor,
    prior: MapPrior,
    symmetry: Tensor,
    seed: int = 0,
    progress: Progress = quiet,
    poses: DrawPoses | None = None,
) -> Iterator[StillDraw]:
    """Independent draws of the map of all particles; sigma (noise groups, D / 2 + 1).

    After one pass over them, or where each has poses of its own after one for every draw.
    """
    generator = torch.Generator().manual_seed(seed)

    def posterior(images: Particles, shown: Progress) -> VoxelPosterior:
        equations = NormalEquations.empty(images.box, sigma.device)
        batches = images.batches(BATCH, device=sigma.device)
        for batch in shown(batches, images.n_batches(BATCH), "posterior"):
            equations.add(batch, sigma, symmetry)
        return equations.posterior(prior.scale, prior.tau, order=len(symmetry))

    given, mean = None, None
    while True:
        if given is None or poses is not None:
            images = particles if poses is None else particles.with_poses(*poses(generator))
            given = posterior(images, progress if given is None else quiet)
            mean = given.mean(1e-3, start=mean)
        assert mean is not None
        yield StillDraw(given.to_map(mean) + deviation(given, generator))


def deviation(posterior: VoxelPosterior, generator: torch.Generator) -> Tensor:
    """A draw of a map minus its posterior mean: (D, D, D).

    That of a symmetric map is narrower by the order of its group, R and R S counting as one view.
    """
    return posterior.to_map(posterior.deviations(1, generator)[0]) / posterior.order**0.5


def family_draws(
    particles: Particles,
    maps: Maps,
    coefficients: Coefficients,
    consensus: MapPrior,
    symmetry: Tensor,
    seed: int = 0,
    progress: Progress = quiet,
    poses: DrawPoses | None = None,
) -> Iterator[FamilyDraw]:
    """A chain of draws of a family's maps, each after one pass over the particles, `WARM_UP` passes before the first.

    maps:      as fitted, on b voxels, sigma that of the whole box (noise groups, D / 2 + 1)
    consensus: prior of the one map that is shown beyond b / 2
    poses:     of every step, as if they owed nothing to the maps of the one before; the consensus beyond has its own
    """
    generator, side = torch.Generator().manual_seed(seed), maps.box
    beyond: Iterator[StillDraw] | None = None
    if side < particles.box:
        beyond = still_draws(particles, maps.sigma, consensus, symmetry, seed + 1, progress, poses)
    sigma = maps.sigma[:, : side // 2 + 1] * (side / particles.box)
    em = EM(replace(particles, box=side), replace(maps, sigma=sigma), coefficients, symmetry)
    chain = _Chain(em, coefficients, generator, poses, side / particles.box)
    chain.step()
    fitted = chain.mean
    for _ in progress(range(1, WARM_UP), WARM_UP - 1, "warm-up", unit="pass"):
        chain.step()
    while True:
        chain.step()
        volume = None if beyond is None else next(beyond).volume
        yield FamilyDraw(chain.em.maps.values, chain.z, coefficients, volume, turn_of(coefficients, fitted, chain.z))


def turn_of(coefficients: Coefficients, fitted: Tensor, drawn: Tensor) -> Tensor:
    """`FamilyDraw.turn`, from the posterior means of z (N, r) in the fit and the z (N, r) of a draw.

    A linear family says the same turned and moved, and a chain strays along that: E[drawn | fitted] is what the fit's z
    are in the draw. Where z is one of given points nothing strays.
    """
    one = torch.cat([torch.ones_like(fitted[:, :1]), fitted], 1)
    same = torch.cat([torch.zeros_like(fitted[:1]), torch.eye(fitted.shape[1]).to(fitted)])
    if not isinstance(coefficients, LinearCoefficients):
        return same
    ridge = 1e-3 * len(one) * torch.eye(one.shape[1]).to(one)  # of a z that no image tells nothing is learned
    return same + torch.linalg.solve(one.T @ one + ridge, one.T @ (drawn - fitted))


class _Chain:
    """Steps of a Gibbs chain: `z` (N, r) and `em.maps` after one, `mean` (N, r) what z was expected to be in it.

    px: pixels of the maps' box in one of the poses' translations
    """

    def __init__(
        self, em: EM, coefficients: Coefficients, generator: torch.Generator, poses: DrawPoses | None, px: float
    ) -> None:
        self.em, self.coefficients, self.generator, self.poses, self.px = em, coefficients, generator, poses, px
        self._z: list[Tensor] = []
        self._mean: list[Tensor] = []

    def step(self) -> None:
        """Poses where they are drawn; z and contrasts given the maps, then the maps given all these."""
        self._z, self._mean = [], []
        if self.poses is not None:
            rotation, translation = self.poses(self.generator)
            self.em.place(rotation, self.px * translation)
        device = self.em.device
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(int(torch.randint(2**62, (), generator=self.generator)))
            self.em.sweep(self._drawn, self.generator)

    @property
    def z(self) -> Tensor:
        return torch.cat(self._z)

    @property
    def mean(self) -> Tensor:
        return torch.cat(self._mean)

    def _drawn(self, said: Seen) -> Moments:
        moments = self.coefficients.moments(said)
        nodes: Any = poutine.trace(self.coefficients.sample).get_trace(said).nodes
        z = nodes["z"]["value"]
        a = nodes["contrast"]["value"] if "contrast" in nodes else torch.ones_like(moments.a)
        self._z.append(z)
        self._mean.append(moments.z)
        y = a[:, None] * self.coefficients.at(z)
        pairs = [v[:, :, None] * v[:, None, :] for v in (y, z)]
        return replace(moments, y=y, yy=pairs[0], z=z, zz=pairs[1], a=a, aa=a.square())
