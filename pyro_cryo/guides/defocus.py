"""Posteriors of what images' defocus differs by from the table's, given a map and the poses.

A defocus larger by d turns the CTF towards its quadrature, by phi = pi lambda |s|^2 d (`physics.ctf`), so that

    log p(image | d) = sum over |s| of  a cos phi + b sin phi + a' cos 2 phi + b' sin 2 phi,  up to a constant:

a b of the image's product with the slice, a' b' of the slice's power, each summed over the frequencies of one |s|. That
many offsets are as cheap as one, so posteriors are looked up on a line, whatever their shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.guides.landscape import whitened
from pyro_cryo.physics.slices import read_grid, slice_coordinates
from pyro_cryo.rows import Rows
from pyro_cryo.volumes.conjugate import noise_sd

REACH = 4.0  # standard deviations of the prior to begin with, as far as offsets are looked up
TURN = math.pi / 8  # by which phi moves from one offset to the next, at most
LEAST_POINTS = 65
LEAST_OTHERS = 0.1  # share of a slice that is the other images', at least
SPREADS = torch.logspace(-5, 0.5, 67, base=2.0)  # that the prior may have, of the one to begin with


@dataclass(frozen=True)
class Defocus(Rows):
    """Posteriors of N images' offsets from the table's defocus: mean (N,) and sd (N,), angstrom."""

    mean: Tensor
    sd: Tensor

    @property
    def spread(self) -> float:
        """Standard deviation of the offsets about 0, as far as the images tell; angstrom."""
        return float((self.mean.square() + self.sd.square()).mean().sqrt())

    @staticmethod
    def given(log_likelihood: Tensor, offsets: Tensor, sd: float) -> Defocus:
        """Posteriors from log p(image | d) (N, O) at evenly spaced offsets (O,).

        The prior is Normal(0, s^2), s one of SPREADS times `sd` and as probable as another beforehand; all images
        together say how probable each is, and posteriors are averaged over it (in one product: that of the images'
        likelihoods with the priors).
        """
        priors = (-0.5 * (offsets / (sd * SPREADS.to(offsets)[:, None])).square()).softmax(1)
        likelihood = (log_likelihood - log_likelihood.amax(1, keepdim=True)).exp()
        evidence = (likelihood @ priors.T).clamp_min(1e-30).log().double().sum(0)
        weight = likelihood * (evidence.softmax(0).float() @ priors)
        weight = weight / weight.sum(1, keepdim=True)
        mean = weight @ offsets
        width = (offsets[1] - offsets[0]).square() / 12  # of what lies between two offsets
        variance = (weight * (offsets - mean[:, None]).square()).sum(1) + width
        return Defocus(mean, variance.sqrt())


def offsets_about(sd: float, finest: float) -> Tensor:
    """Offsets (O,) from 0 to both sides, angstrom: as far as a prior reaches, as fine as phases tell.

    finest: largest pi lambda |s|^2, radians an angstrom
    """
    reach = REACH * sd
    half = max(math.ceil(reach * finest / TURN), LEAST_POINTS // 2)
    return torch.linspace(-reach, reach, 2 * half + 1)


@dataclass(frozen=True)
class DefocusLikelihood:
    """What images say of their defocus beside the one map that they were all added up to.

    An image is compared with what the others make of its slice: its own share, whose noise would speak for the defocus
    it was added at, is taken out again in closed form, s_other = (s - h x / ctf) / (1 - h) with its leverage
    h = variance (ctf / sigma)^2 / 2.

    grid:     `fourier_grid` of the map
    variance: (shells,) posterior variance of its slices' coefficients
    sigma:    (noise groups, shells) sd of the noise
    """

    grid: Tensor
    variance: Tensor
    sigma: Tensor

    def at(self, batch: Batch, quadrature: Tensor, turn: Tensor, added: Tensor, offsets: Tensor) -> Tensor:
        """log p(image | d) (B, O) at offsets (O,), angstrom, and the batch's poses; up to a constant of each image.

        quadrature: (B, P) of the CTF
        turn:       (B,) phi at |s| = 1 cycle of an image's field of view, radians an angstrom
        added:      (B,) offsets at which images were added to the map
        """
        image, ctf = whitened(batch, self.sigma, batch.translation)
        quadrature = quadrature / noise_sd(batch, self.sigma)
        slices = read_grid(self.grid, slice_coordinates(batch.rotation, batch.half.k, batch.freq_scale))
        square, ring = batch.half.k.square().sum(-1).round().unique(return_inverse=True)
        phi = (turn * added)[:, None] * square[ring]
        then, each = phi.cos() * ctf + phi.sin() * quadrature, 0.5 * self.variance[batch.half.shell]
        slices = (slices - each * then * image) / (1 - each * then.square()).clamp_min(LEAST_OTHERS)
        product, power = (image * slices.conj()).real, slices.real.square() + slices.imag.square()
        terms = (
            product * ctf,
            product * quadrature,
            -0.25 * power * (ctf.square() - quadrature.square()),
            -0.5 * power * ctf * quadrature,
        )
        sums = [term.new_zeros(len(batch), len(square)).index_add_(1, ring, term) for term in terms]
        result = ctf.new_empty(len(batch), len(offsets))
        for own in turn.unique():  # microscopes and fields of view are few: many images have the same waves
            rows = (turn == own).nonzero()[:, 0]
            phi = own * square[:, None] * offsets
            waves = (phi.cos(), phi.sin(), (2 * phi).cos(), (2 * phi).sin())
            result[rows] = torch.stack([part[rows] @ wave for part, wave in zip(sums, waves, strict=True)]).sum(0)
        return result
