"""The posterior of several voxel maps together, whose combinations images show.

Image i shows sum_c y_ic V_c, so that maps V_c = scale_c T_c e_c have the precision sum_i y_i y_i' (x) A_i^H W A_i: they
are coupled. Coefficients do not know of poses, and so that is nearly Y (x) A^H W A with Y = <y y'>, for which one
kernel serves all pairs of maps. A draw takes it for the precision M of a step, never for what the images say:

    e' = e + M^-1 (g + n),   g the gradient of the log posterior at e, n ~ Normal(0, M).

While y stays, draws have the exact mean and, with M = H (1 + d), H the exact precision, the covariance H^-1 / (1 - d):
right to second order in d, whose mean is 0 and whose square is about one over the images that see a Fourier voxel. A
matrix splitting as in Hogwild Gibbs sampling (Johnson, Saunderson and Willsky, NIPS 2013); it converges for H < 2 M.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_cryo.distributions.volume import multiply_spectrum, shell_values
from pyro_cryo.physics.slices import convolve
from pyro_cryo.volumes.conjugate import (
    VoxelPosterior,
    conjugate_gradients,
    preconditioner,
    score_noise,
    stands_for,
    to_coefficients,
    to_voxels,
)


@dataclass(frozen=True)
class JointPosterior:
    """Gaussian posterior of C maps on the whole box, D voxels a side.

    yy (C, C) is Y; spectrum (2D, 2D, D + 1) the transform of the kernel of A^H W A and seen (L,) its mean over each
    shell; scale (C, D, D, D) and tau (C, D, D, D / 2 + 1) the prior; order that of the maps' point group.
    """

    yy: Tensor
    spectrum: Tensor
    seen: Tensor
    scale: Tensor
    tau: Tensor
    order: int = 1

    @staticmethod
    def of(posteriors: Sequence[VoxelPosterior], yy: Tensor) -> JointPosterior:
        """Of maps that have these posteriors alone, were each shown with y = 1, all of the same images."""
        first = posteriors[0]
        if any(len(p.scale) < p.box for p in posteriors):
            raise ValueError("a map's scale is zero towards the edge of the box; give all maps a scale above zero")
        scale = torch.stack([p.scale for p in posteriors])
        tau = torch.stack([shell_values(p.tau, p.box) for p in posteriors])
        return JointPosterior(yy, first.spectrum, first.seen, scale, tau, first.order)

    def drawn(self, e: Tensor, score: Tensor, generator: torch.Generator, tolerance: float = 3e-3) -> Tensor:
        """e (C, D, D, D) a step on from e, at whose maps the gradient of the images' log likelihood is `score`.

        What is solved for is the step, as small as a draw is from the next: so `tolerance` is one of the posterior sd,
        over all coefficients: for the lowest shells, few of them, which at ten times as much would hardly move.
        """
        noise = torch.stack([score_noise(self.spectrum, generator) for _ in e])
        root = torch.linalg.cholesky(self.yy + 1e-6 * torch.eye(len(self.yy), device=self.yy.device))
        prior = torch.randn(e.shape, generator=generator).to(e)
        random = self._whiten(torch.einsum("cd,dzyx->czyx", root, noise)) + prior
        return e + self._solve(self._whiten(score) - e + random / self.order**0.5, tolerance)

    def climbed(self, volumes: Tensor, score: Tensor, tolerance: float = 1e-2) -> Tensor:
        """e (C, D, D, D) a Newton step from maps (C, D, D, D) with this score: where a chain starts."""
        return self._solve(self._whiten(self._mixed(convolve(self.spectrum, volumes)) + score), tolerance)

    def to_maps(self, e: Tensor) -> Tensor:
        """V_c = scale_c T_c e_c: (C, D, D, D)."""
        return self.scale * multiply_spectrum(e, self.tau)

    def _mixed(self, values: Tensor) -> Tensor:
        return torch.einsum("cd,dzyx->czyx", self.yy, values)

    def _whiten(self, score: Tensor) -> Tensor:
        return multiply_spectrum(self.scale * score, self.tau)

    def _solve(self, rhs: Tensor, tolerance: float) -> Tensor:
        """Conjugate gradients for all maps at once, on the Fourier coefficients of e: (C, D, D, D)."""
        strength = self.yy.diagonal()[:, None, None, None] * shell_values(self.seen, rhs.shape[-1]) * self.tau.square()
        weak = preconditioner(self.scale, strength)
        twice = stands_for(rhs.shape[-1], rhs.device)

        def operator(e: Tensor) -> Tensor:
            told = self._mixed(convolve(self.spectrum, self.scale * to_voxels(self.tau * e)))
            return torch.addcmul(e, self.tau, to_coefficients(self.scale * told))

        def dot(a: Tensor, c: Tensor) -> Tensor:
            return ((a.real * c.real + a.imag * c.imag) * twice).sum()

        return to_voxels(conjugate_gradients(operator, to_coefficients(rhs), weak, dot, tolerance))
