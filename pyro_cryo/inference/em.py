"""Expectation maximisation for a basis of voxel maps whose coefficients have an exact posterior.

A pass over the images sums, with posterior moments of the coefficients y, the gradient of every map's log likelihood,

    score_c = A^H W (E[y_c] x - sum_d E[y_c y_d] A V_d),

and what is new about noise and coefficients. The M-step solves, for each map by conjugate gradients,

    (<y_c^2> A^H W A + prior) V_c = <y_c^2> A^H W A V_c_before + score_c,

which takes the mean over particles <y y'> for diagonal, as it is where coefficients are whitened, and for that over
their images. The fixed point is that of exact EM, and one kernel serves all maps. What images say of a map
when y is not known is less, by what the variance of y is of <y^2>: only E[y]^2 counts for how much of a map they
determine, and so for its prior's variance. Images of one particle have one y: what they say of it is added up before
its moments are taken, and these then serve each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.coefficients import Coefficients, Moments, Projected, Seen, images_at_once
from pyro_cryo.inference.reconstruct import add_shells, noise_floor
from pyro_cryo.physics.slices import channel_grid, fourier_grid_adjoint
from pyro_cryo.progress import Progress, quiet
from pyro_cryo.volumes.conjugate import NormalEquations, VoxelPosterior, first_tau, mackay_tau, noise_sd
from pyro_cryo.volumes.joint import JointPosterior

KEPT_BYTES = 1 << 30  # particles of a small band that are kept in memory from pass to pass


@dataclass
class Maps:
    """A basis as it is being fitted.

    values: (C, b, b, b) on the scale of images cropped to b pixels
    scale:  (2, b, b, b) prior sd of each voxel up to tau: of the first map, and of all others
    tau:    (C, b / 2 + 1) prior sd by shell; None before the first M-step
    sigma:  (noise groups, b / 2 + 1) noise sd
    """

    values: Tensor
    scale: Tensor
    sigma: Tensor
    tau: Tensor | None = None

    @property
    def box(self) -> int:
        """b"""
        return self.values.shape[-1]


class EM:
    """Passes over the same images. `step` makes one, and an M-step after it.

    particles:    of the maps' own box
    passes:       how many will be made at most: what the progress bar shows
    symmetry:     (G, 3, 3): an image counts 1 / G from each of its equivalent views
    """

    def __init__(
        self,
        particles: Particles,
        maps: Maps,
        coefficients: Coefficients,
        symmetry: Tensor,
        progress: Progress = quiet,
        title: str = "em",
        passes: int = 1,
    ) -> None:
        self.particles, self.maps, self.coefficients, self.symmetry = particles, maps, coefficients, symmetry
        self.progress = progress
        self.device = maps.values.device
        self.mean: Moments | None = None
        self.gram = torch.zeros(0)
        self.known = torch.zeros(0)  # (C,) mean square of what the coefficients are expected to be
        self.batch_size = images_at_once(len(particles.half), self.device)
        total = passes * particles.n_batches(self.batch_size)
        self._ticks = iter(progress(range(total), total, title))
        self._posterior: list[VoxelPosterior] = []
        self._white: Tensor | None = None  # e of the maps that a chain has come to
        bytes_kept = len(particles) * len(particles.half) * 12
        self._kept = list(self._read()) if bytes_kept <= KEPT_BYTES else None

    def _read(self) -> Iterable[Batch]:
        return self.particles.batches(self.batch_size, device=self.device)

    def place(self, rotation: Tensor, translation: Tensor) -> None:
        """Other poses of the images: (N, 3, 3), (N, 2) in pixels of the maps' box."""
        self.particles = self.particles.with_poses(rotation, translation)
        if self._kept is None:
            return
        poses = self.particles.rotation, self.particles.translation

        def placed(batch: Batch) -> Batch:
            row = batch.index.cpu()
            turned, moved = (value[row].to(self.device) for value in poses)
            return replace(batch, rotation=turned, translation=moved * batch.freq_scale[:, None])

        self._kept = [placed(batch) for batch in self._kept]

    def begin(self, draw: Callable[[Moments], Moments]) -> None:
        """A pass with coefficients that are drawn, not inferred: from here the maps move."""
        score, self.mean, _ = self._expect(lambda said: draw(self.coefficients.moments(said)))
        self._maximise(score, self.mean)

    def step(self) -> float:
        """One pass and M-step; the evidence before it, nats a particle (without the 2 pi of the density)."""
        first = not self._posterior
        score, self.mean, noise = self._expect(self.coefficients.moments)
        self._maximise(score, self.mean)
        if self.particles.several:  # of one image the prior of its contrast says more
            self.mean = self._take_up(self.mean)
        self.coefficients.learn(self.mean)
        if not first:  # when the maps' variance was not yet known
            self.maps.sigma = noise
        evidence = float(self.mean.evidence)
        self.progress.note(f"log evidence {evidence:.2f}")
        return evidence

    def _take_up(self, mean: Moments) -> Moments:
        """Let the maps be as strong as the particles' mean contrast says, which then is 1; the moments from there.

        Maps that their prior shrinks and contrasts that make up for it would drift apart without end, the faster the
        more images tell a particle's contrast: the widths of both priors are learned, and the images see the product.
        """
        maps, level = self.maps, mean.a
        assert maps.tau is not None
        maps.values, maps.tau = maps.values * level, maps.tau * level
        self.gram = self.gram * level.square()
        y, yy = mean.y / level, mean.yy / level.square()
        return replace(mean, y=y, yy=yy, a=mean.a / level, aa=mean.aa / level.square())

    def sweep(self, drawn: Callable[[Seen], Moments], generator: torch.Generator) -> None:
        """One pass with coefficients that are drawn, and a draw of the maps given these; noise and prior stay.

        With coefficients from their posterior given the maps: a step of a Gibbs chain on maps and coefficients. The
        first one does not draw maps but climbs to their mode.
        """
        maps = self.maps
        assert maps.tau is not None
        score, self.mean, _ = self._expect(drawn)
        posteriors = [self._of(c).with_tau(tau) for c, tau in enumerate(maps.tau)]
        joint = JointPosterior.of(posteriors, self.mean.yy)
        ascent = torch.stack([fourier_grid_adjoint(one, maps.box) for one in score])
        if self._white is None:
            self._white = joint.climbed(maps.values, ascent)
        else:
            self._white = joint.drawn(self._white, ascent, generator)
        maps.values = joint.to_maps(self._white)

    def close(self) -> None:
        """End the progress bar, where no further pass is needed."""
        if isinstance(self._ticks, Generator):
            self._ticks.close()

    def _expect(self, taken: Callable[[Seen], Moments]) -> tuple[Tensor, Moments, Tensor]:
        maps, grid = self.maps, channel_grid(self.maps.values)
        score = torch.zeros(grid.shape[-1], *grid.shape[:3], dtype=torch.complex64, device=self.device)
        weight = torch.zeros(1, *grid.shape[:3], device=self.device)
        variance = self._variance()
        total: Moments | None = None
        gram = torch.zeros(grid.shape[-1], grid.shape[-1], device=self.device)
        known = torch.zeros(grid.shape[-1], device=self.device)
        square = torch.zeros_like(maps.sigma)
        count = torch.zeros_like(square)
        batches = self._read() if self._kept is None else self._kept
        for batch in batches:
            next(self._ticks, None)
            seen = Projected.of(batch, grid, maps.sigma)
            said = seen.seen().by_particle(batch)
            moments = taken(said)
            y, yy = batch.of_images(moments.y), batch.of_images(moments.yy)
            explained = seen.slices @ yy
            residual = (y[:, None] * seen.image[..., None] - explained).unflatten(1, (-1, 2))
            value = residual * (seen.factor / len(self.symmetry))[..., None, None]
            value = torch.view_as_complex(value.flatten(0, 1).permute(2, 0, 1).contiguous())
            share = (seen.factor.square() / len(self.symmetry)).flatten()[None]
            for points in seen.equivalents(batch, self.symmetry, grid.shape[0]):
                points.add(score, value)
                points.add(weight, share)
            fitted = (seen.slices @ y[..., None])[..., 0]
            left = seen.image * (seen.image - 2 * fitted) + (seen.slices * explained).sum(-1)
            left = left.unflatten(1, (-1, 2)).sum(-1)
            spread = torch.diagonal(yy, dim1=1, dim2=2) @ variance
            left = left + seen.factor.square() * spread[:, batch.half.shell]
            bare = replace(batch, noise_scale=None)  # what a premultiplied stack scales its noise by is divided out
            add_shells(square, count, left * noise_sd(bare, maps.sigma).square(), bare)
            gram += said.gram.sum(0)
            known += moments.y.square().sum(0)
            total = moments.total() if total is None else total + moments.total()
        assert total is not None
        self.gram, self.known = (sums / self.particles.n_particles for sums in (gram, known))
        empty = NormalEquations(maps.box, torch.zeros_like(score[0]), weight[0])
        order = len(self.symmetry)
        first = empty.posterior(maps.scale[0], order=order)
        self._posterior = [first, empty.posterior(maps.scale[1], order=order, like=first)]
        noise = noise_floor((0.5 * square / count.clamp_min(1)).sqrt())
        noise = torch.where(count > 0, noise, maps.sigma)
        return score, total.over(self.particles.n_particles), noise

    def _variance(self) -> Tensor:
        """Posterior variance of a slice's coefficient of each map by shell, (C, L); 0 at first.

        D times the mean over voxels of scale^2 / (seen scale^2 + 1 / tau^2).
        """
        maps = self.maps
        if maps.tau is None or not self._posterior:
            return torch.zeros(len(maps.values), maps.box // 2 + 1, device=self.device)
        assert self.mean is not None
        square = torch.diagonal(self.mean.yy)
        variance = []
        for c in range(len(maps.values)):
            posterior = self._of(c).counted(square[c]).with_tau(maps.tau[c])
            variance.append(posterior.determined() / posterior.seen.clamp_min(1e-30))
        return maps.box / len(self.symmetry) * torch.stack(variance)

    def evidence(self, particles: Particles, ranks: Sequence[int]) -> Tensor:
        """log p of each particle with only the first r maps beside the mean, for each r of `ranks`: (ranks, n)."""
        grid, each = channel_grid(self.maps.values), []
        for batch in particles.batches(self.batch_size, device=self.device):
            seen = Projected.of(batch, grid, self.maps.sigma).seen().by_particle(batch)
            each.append(torch.stack([self.coefficients.first(r).moments(seen.first(r)).evidence for r in ranks]))
        return torch.cat(each, 1)

    def _of(self, component: int) -> VoxelPosterior:
        return self._posterior[min(component, 1)]

    def _maximise(self, score: Tensor, mean: Moments) -> None:
        maps = self.maps
        square = torch.diagonal(mean.yy)
        values, tau = [], []
        for c in range(len(maps.values)):
            ascent = fourier_grid_adjoint(score[c], maps.box)
            posterior = self._of(c).counted(square[c]).stepped(maps.values[c], ascent)
            prior = first_tau(posterior) if maps.tau is None else maps.tau[c]
            posterior = posterior.with_tau(prior)
            e = posterior.mean(3e-2)
            values.append(posterior.to_map(e))
            tau.append(mackay_tau(posterior.counted(self.known[c] / square[c].clamp_min(1e-30)), e))
        maps.values, maps.tau = torch.stack(values), torch.stack(tau)
