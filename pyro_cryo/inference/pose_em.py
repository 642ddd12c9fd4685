"""Poses and a map by turns: expectation maximisation with a posterior of every image's pose.

A pass takes one draw of each image's pose from its posterior, so that the map is as blurred as the poses are unsure,
and the noise is what drawn poses leave of the images; the map is then solved for as with known poses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.coefficients import images_at_once
from pyro_cryo.guides.defocus import Defocus
from pyro_cryo.guides.landscape import MapLikelihood, PoseLikelihood, climbed
from pyro_cryo.guides.poses import PoseModes, PosePrior
from pyro_cryo.inference.reconstruct import add_shells, left_of, noise_floor
from pyro_cryo.inference.search import APART, Found, Level, Search
from pyro_cryo.physics.fourier import HalfPlane, resize, soft_disc
from pyro_cryo.physics.rotations import random_rotations
from pyro_cryo.physics.slices import fourier_grid, slope_grid
from pyro_cryo.progress import Progress, quiet
from pyro_cryo.volumes.conjugate import NormalEquations, VoxelPosterior, mackay_tau
from pyro_cryo.volumes.mask import density_envelope, find_mask

BATCH = 256
EXTENT = 3.5  # standard deviations of the shifts, that are searched
EDGE = 0.15  # of half the box: the soft edge of the ball
FLOOR = 0.02  # of the prior's sd outside it
MARCH = 1.2  # factor of the band from pass to pass
OVER = 3  # shells of a box beyond the band in which poses are compared


def march(first: float, finest: float) -> list[float]:
    """Bands of passes, cycles a box, from the first to the finest."""
    bands = [first]
    while bands[-1] < finest:
        bands.append(min(MARCH * bands[-1], finest))
    return bands


def box_of(kmax: float, most: int) -> int:
    """Of the maps in which poses are compared up to kmax cycles a box."""
    return min(2 * (math.floor(kmax) + OVER), most)


@dataclass(frozen=True)
class Solved:
    """A map (b, b, b), and the posterior variance of its slices' coefficients by shell, (b / 2 + 1,)."""

    volume: Tensor
    variance: Tensor

    @property
    def box(self) -> int:
        """b"""
        return len(self.volume)

    def on(self, box: int) -> Solved:
        """The same map on another box of the same field of view."""
        variance = torch.nn.functional.pad(self.variance, (0, max(box // 2 + 1 - len(self.variance), 0)))
        return Solved(resize(self.volume, box), variance[: box // 2 + 1] * (box / self.box) ** 2)


class PoseEM:
    """Passes over images, on boxes of any size up to the particles' own.

    particles: N images of box D; of the poses of their table only how views of one particle lie to each other is read
    prior:     of their poses, translations in pixels of D
    symmetry:  (G, 3, 3) point group of the map
    sigma:     (noise groups, D / 2 + 1) noise sd to begin with; its device is where maps are
    generator: of the draws of poses
    support:   radius of the ball that holds the molecule, of half the box

    defocus:   posteriors of the offsets from the table's, which `particles` then have in; None where they are known
    """

    def __init__(
        self,
        particles: Particles,
        prior: PosePrior,
        symmetry: Tensor,
        sigma: Tensor,
        generator: torch.Generator,
        progress: Progress = quiet,
        support: float = 0.85,
    ) -> None:
        self.particles, self.prior, self.symmetry, self.sigma = particles, prior, symmetry, sigma.clone()
        self.generator, self.progress, self.support = generator, progress, support
        self.device = sigma.device
        self.defocus: Defocus | None = None

    def search(
        self,
        rows: Tensor,
        known: Solved | Sequence[Solved],
        levels: tuple[Level, ...],
        peaks: int,
        apart: float = APART,
        log_share: Tensor | None = None,
    ) -> Found:
        """Peaks of the poses of some images (n,) in a map, or in several; on the CPU, translations in pixels of D."""
        maps = [known] if isinstance(known, Solved) else known
        box, volume = maps[0].box, torch.stack([one.volume for one in maps])
        sd = self.prior.shift_sd * box / self.particles.box
        turn = random_rotations(1, self.generator)[0] if len(self.symmetry) == 1 else None
        how: dict[str, Any] = {"peaks": peaks, "apart": apart, "turn": turn, "log_share": log_share}
        search = Search(volume, levels, EXTENT * sd, sd, self.symmetry, **how)
        parts = []
        for batch in self._batches(rows, box, BATCH, "search"):
            found = search(batch, self.noise(box))
            parts.append(replace(found, translation=found.translation / self._px(batch)[:, None, None]).to("cpu"))
        return Found.of(parts)

    def add(self, rows: Tensor, found: Found, known: Solved) -> Solved:
        """The next map, of the same box, from some images (n,) at all their peaks by weight; noise is learned."""
        sums = self.sums(known)
        self.add_up(rows, found, found.log_mass.softmax(1), [sums])
        self.learn_noise(sums)
        return self.solved(sums)

    def add_up(self, rows: Tensor, found: Found, weight: Tensor, sums: Sequence[Sums]) -> None:
        """Some images (n,) at all their peaks, by weight (n, K), to the sums of the map in which each peak is."""
        for batch in self._batches(rows, sums[0].known.box, BATCH):
            index = batch.index.cpu()
            mine, share = found[index].to(self.device), weight[index].to(self.device)
            for peak in range(share.shape[1]):
                posed = self.posed(batch, mine.rotation[:, peak], mine.translation[:, peak])
                if len(sums) == 1:
                    sums[0].add(posed, share[:, peak])
                    continue
                for number, own in enumerate(sums):
                    here = (mine.which[:, peak] == number).nonzero()[:, 0]
                    if len(here):
                        own.add(posed[here], share[here, peak])

    def climb(self, rows: Tensor, modes: PoseModes, known: Solved, kmax: float, steps: int) -> tuple[Solved, float]:
        """A pass over some images (n,): modes climb in a map, in place, compared up to kmax cycles a box; the next map.

        Beside it the mean log evidence of an image, less that of an empty one.
        """
        sums, evidence = self.sums(known), torch.zeros((), device=self.device)
        likelihood = MapLikelihood(slope_grid(known.volume), self.noise(known.box))
        for batch, mine, gain in self.climbing(rows, modes, likelihood, known.box, kmax, steps):
            evidence += gain.sum()
            sums.add(self.posed(batch, *mine.drawn(self.generator, batch)))
        self.learn_noise(sums)
        return self.solved(sums, enveloped=True), float(evidence) / len(rows)

    def climbing(
        self, rows: Tensor, modes: PoseModes, likelihood: PoseLikelihood, box: int, kmax: float, steps: int
    ) -> Iterator[tuple[Batch, PoseModes, Tensor]]:
        """Some images (n,), cropped to a box: modes climb, in place, compared up to kmax cycles a box.

        Batch by batch: the images, their modes, and the log evidence (n,) of each particle less that of empty images.
        """
        count = HalfPlane.of(box).count(kmax)
        size = max(1, images_at_once(count, self.device) // modes.log_weight.shape[1])
        for batch in self._batches(rows, box, size, f"poses at {box} px"):
            index = batch.index.cpu()
            prior, mine = self.prior[rows[index]].to(self.device), modes[index].to(self.device)
            mine, gain = climbed(batch.band(count), likelihood, mine, prior, self._px(batch), steps)
            modes[index] = mine
            yield batch, mine, gain

    def sample(self, count: int) -> Tensor:
        """Rows of about so many images, all of each particle that is drawn."""
        drawn = torch.randperm(self.particles.n_particles, generator=self.generator)
        return self.particles.images_of(drawn[: self.particles.particles_of(count)])

    def noise(self, box: int) -> Tensor:
        """sigma of images cropped to a box."""
        return self.sigma[:, : box // 2 + 1] * (box / self.particles.box)

    def _batches(self, rows: Tensor, box: int, size: int, title: str | None = None) -> Iterator[Batch]:
        images = replace(self.particles[rows], box=box)
        batches = images.batches(size, device=self.device)
        return batches if title is None else iter(self.progress(batches, images.n_batches(size), title))

    def _px(self, batch: Batch) -> Tensor:
        """(B,) pixels of a batch's own box and field of view in one of D."""
        return batch.freq_scale * (batch.half.box / self.particles.box)

    def posed(self, batch: Batch, rotation: Tensor, translation: Tensor) -> Batch:
        """Images at poses (B, 3, 3), (B, 2), translations in pixels of D."""
        return replace(batch, rotation=rotation, translation=translation * self._px(batch)[:, None])

    def sums(self, known: Solved) -> Sums:
        """Nothing yet."""
        sigma = self.noise(known.box)
        empty = NormalEquations.empty(known.box, self.device)
        grid = fourier_grid(known.volume)
        return Sums(known, grid, sigma, self.symmetry, empty, torch.zeros_like(sigma), torch.zeros_like(sigma))

    def learn_noise(self, *sums: Sums) -> None:
        """sigma, from what the poses left of the images that were added to these."""
        box = sums[0].known.box
        last = box // 2 + (1 if box == self.particles.box else 0)  # the shell of the corner is half empty
        self.sigma[:, 1:last] = noise_left(*sums)[:, 1:last] * (self.particles.box / box)

    def solved(self, sums: Sums, enveloped: bool = False) -> Solved:
        """The posterior mean of the map, within the ball.

        enveloped: the map is solved for twice, the second time under a prior that expects density where the first has
                   it: noise in the solvent is what poses would otherwise be fitted to
        """
        box, order = sums.known.box, len(self.symmetry)
        ball = soft_disc(box, self.support * box / 2, EDGE * box / 2, dims=3, device=self.device).clamp_min(FLOOR)
        posterior = _with_prior(sums.equations.posterior(ball, order=order))
        volume = posterior.to_map(posterior.mean(1e-2))
        if enveloped:
            envelope = density_envelope(volume, find_mask(volume))
            posterior = _with_prior(sums.equations.posterior(envelope, order=order, like=posterior))
            volume = posterior.to_map(posterior.mean(1e-2))
        variance = box * posterior.determined() / posterior.seen.clamp_min(1e-30) / order
        return Solved(volume, variance)


def noise_left(*sums: Sums) -> Tensor:
    """sd of what maps left of the images that were added to these, (noise groups, b / 2 + 1) on their box b."""
    square, count = sum(s.square for s in sums), sum(s.count for s in sums)
    return noise_floor((0.5 * torch.as_tensor(square) / torch.as_tensor(count).clamp_min(1e-6)).sqrt())


def _with_prior(posterior: VoxelPosterior) -> VoxelPosterior:
    """With the variance a shell that its own mean speaks for."""
    return posterior.with_tau(mackay_tau(posterior, posterior.mean(3e-2)))


@dataclass(frozen=True)
class Added:
    """What a pass added up for one map of box b.

    value, weight: (2b, 2b, b + 1) of `NormalEquations`
    square, count: (noise groups, b / 2 + 1) squares of what is left of the images, and of how many coefficients
    """

    value: Tensor
    weight: Tensor
    square: Tensor
    count: Tensor

    @property
    def box(self) -> int:
        """b"""
        return len(self.value) // 2

    def times(self, factor: float) -> Added:
        """As much of everything."""
        return Added(*(factor * one for one in vars(self).values()))


@dataclass(frozen=True)
class Sums:
    """What a pass adds up: normal equations, and squares of what a map leaves of the images, by shell."""

    known: Solved
    grid: Tensor
    sigma: Tensor
    symmetry: Tensor
    equations: NormalEquations
    square: Tensor
    count: Tensor

    def add(self, batch: Batch, weight: Tensor | None = None) -> None:
        """Images at the poses of their batch, weight (B,)."""
        self.equations.add(batch, self.sigma, self.symmetry, weight)
        square = left_of(batch, self.grid).square().sum(-1) + batch.ctf.square() * self.known.variance[batch.half.shell]
        add_shells(self.square, self.count, square, batch, weight)

    @property
    def added(self) -> Added:
        """All of it that the next pass needs."""
        return Added(self.equations.value, self.equations.weight, self.square, self.count)

    def count_on(self, before: Added, factor: float) -> None:
        """Add what an earlier pass on the same box added, times a factor."""
        for mine, theirs in zip(vars(self.added).values(), vars(before).values(), strict=True):
            mine.add_(theirs, alpha=factor)
