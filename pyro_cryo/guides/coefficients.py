"""Exact inference of shape where images are linear in coefficients of a basis of maps: no encoder, no descent.

An image is x = sum_c y_c B_c + noise, B_c the slice of map c, and all that it says about y is its Gram matrix and
projection: log p(x | y) = b.y - y.G y / 2 + constant. Images of one particle have one y, and what they say of it adds
up: G and b are sums over them. What y may be is a function of the contrast a and of z:

    linear   y = a (1, z),    z ~ Normal(0, I)
    curved   y = a phi(z),    z one of L points, phi smooth functions on them
    classes  y = a z,         z one of the K unit vectors

and a ~ Normal(1, contrast_sd), a particle's own in all its images: were it an image's own, y would not be one, and no
sum would tell z. Given these, posterior moments of y, z and a and the evidence are closed forms, but for
a one-dimensional quadrature over a.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.physics.fourier import shift_phase
from pyro_cryo.physics.slices import GridPoints, slice_coordinates
from pyro_cryo.rows import Rows
from pyro_cryo.volumes.conjugate import noise_sd
from pyro_cryo.volumes.sized import Sized

NODES = 7  # of the quadrature over the contrast
POINTS = 1 << 15  # coefficients a batch on a CPU: what is read and written for them stays in its cache
POINTS_GPU = 1 << 21
LEAST_CONTRAST_SD = 1e-3


def images_at_once(count: int, device: torch.device) -> int:
    """How many images of `count` coefficients are best projected together."""
    return max(1, (POINTS if device.type == "cpu" else POINTS_GPU) // count)


@dataclass(frozen=True)
class Projected:
    """Whitened images and the slices of a basis at their poses, real and imaginary part of each coefficient in turn.

    points: where the slices lie on the grid; both are conjugated where that has it so, which no product of them shows
    image:  (B, 2 P), shift undone, over sigma
    empty:  (B,) log density of the images if there were nothing in them, without the 2 pi
    factor: (B, P) the CTF over sigma
    slices: (B, 2 P, C), times `factor`
    """

    points: GridPoints
    image: Tensor
    empty: Tensor
    factor: Tensor
    slices: Tensor

    @staticmethod
    def of(batch: Batch, grid: Tensor, sigma: Tensor, scale: float = 1.0) -> Projected:
        """Images beside the `channel_grid` of C maps times `scale`; sigma (noise groups, shells)."""
        sd = noise_sd(batch, sigma)
        shift = shift_phase(batch.half.k, batch.translation, batch.half.box)
        image = torch.view_as_complex(batch.image) * shift.conj() / sd
        factor = batch.ctf / sd
        empty = -0.5 * torch.view_as_real(image).square().sum((1, 2)) - 2 * sd.log().sum(1)
        coordinates = slice_coordinates(batch.rotation, batch.half.k, batch.freq_scale)
        points = GridPoints.of(coordinates, grid.shape[0])
        slices = points.columns(grid, (scale * factor).flatten())
        image = torch.view_as_real(points.as_on_grid(image.flatten())).view(len(batch), -1)
        return Projected(points, image, empty, factor, slices.view(*image.shape, -1))

    def equivalents(self, batch: Batch, symmetry: Tensor, n: int) -> Iterator[GridPoints]:
        """The points of each view of the images that a point group (G, 3, 3) makes equivalent to their own.

        `mirrored` are those where one of the two is, for values that stand as `image` and `slices` do.
        """
        mirrored = self.points.mirrored
        assert mirrored is not None
        yield replace(self.points, mirrored=None)
        for element in symmetry[1:]:
            coordinates = slice_coordinates(batch.rotation @ element, batch.half.k, batch.freq_scale)
            points = GridPoints.of(coordinates, n)
            assert points.mirrored is not None
            yield replace(points, mirrored=mirrored ^ points.mirrored)

    def seen(self) -> Seen:
        """What the images say about the coefficients."""
        return Seen.beside(self.slices, self.image, self.empty)


@dataclass(frozen=True)
class Seen(Rows):
    """gram (B, C, C), projection (B, C), empty (B,): log p(x | y) = empty + projection . y - y . gram y / 2."""

    gram: Tensor
    projection: Tensor
    empty: Tensor

    @staticmethod
    def beside(slices: Tensor, image: Tensor, empty: Tensor) -> Seen:
        """What images (B, 2 P) say beside slices (B, 2 P, C), both whitened."""
        return Seen(slices.mT @ slices, (slices.mT @ image[..., None])[..., 0], empty)

    def by_particle(self, batch: Batch) -> Seen:
        """What all images (B,) of each particle say together of its coefficients, which they share: (n,)."""
        return Seen(*(batch.by_particle(value) for value in self.tensors))

    def first(self, rank: int) -> Seen:
        """Of the first map and `rank` others alone."""
        return Seen(self.gram[:, : 1 + rank, : 1 + rank], self.projection[:, : 1 + rank], self.empty)


@dataclass(frozen=True)
class Moments:
    """Posterior moments, of each particle or summed over some.

    y (*batch, C), yy (*batch, C, C); z (*batch, r), zz (*batch, r, r); a (*batch,) contrast, aa (*batch,)
    weight (*batch, L): posterior of the points of a curved family, else L = 0
    evidence (*batch,): log p(x), without the 2 pi of the density
    """

    y: Tensor
    yy: Tensor
    z: Tensor
    zz: Tensor
    a: Tensor
    aa: Tensor
    weight: Tensor
    evidence: Tensor

    def total(self) -> Moments:
        """Summed over the particles, the evidence in double precision: it is compared between passes."""
        summed = Moments(**{f.name: getattr(self, f.name).sum(0) for f in fields(self)})
        return replace(summed, evidence=self.evidence.sum(0, dtype=torch.float64))

    def __add__(self, other: Moments) -> Moments:
        return Moments(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def over(self, count: int) -> Moments:
        """Divided by how many there were."""
        return Moments(**{f.name: getattr(self, f.name) / count for f in fields(self)})

    @property
    def z_cov(self) -> Tensor:
        """(*batch, r, r)"""
        return self.zz - self.z[..., :, None] * self.z[..., None, :]


class Coefficients(Sized, ABC):
    """What coefficients a particle may have, and their posterior.

    contrast_sd: () of the particles' contrast about 1; 0 holds it at 1
    """

    contrast_sd: Tensor

    def __init__(self, contrast_sd: float) -> None:
        super().__init__()
        self.register_buffer("contrast_sd", torch.tensor(float(contrast_sd)))
        self.contrast_varies = contrast_sd > 0

    @abstractmethod
    def at(self, z: Tensor) -> Tensor:
        """y at z (*batch, r) and a contrast of 1: (*batch, C)."""

    @abstractmethod
    def first(self, rank: int) -> Coefficients:
        """Those of the first map and `rank` others alone."""

    @abstractmethod
    def moments(self, seen: Seen) -> Moments:
        """The E-step of each particle."""

    @abstractmethod
    def sample(self, seen: Seen) -> None:
        """Sample `z`, and `contrast` where it varies, from the posterior of each particle: the guide's statements.

        The contrast of a linear family comes from the Normal with its posterior's moments.
        """

    def learn(self, mean: Moments) -> None:
        """The M-step of what is unknown about the coefficients, from moments averaged over all particles."""
        if self.contrast_varies:
            self.contrast_sd.copy_((mean.aa - 2 * mean.a + 1).clamp_min(LEAST_CONTRAST_SD**2).sqrt())


class LinearCoefficients(Coefficients):
    """y = a (1, z), z ~ Normal(0, I_r)."""

    def at(self, z: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(z[..., :1]), z], -1)

    def first(self, rank: int) -> LinearCoefficients:
        return self

    def spread(self, mean: Moments) -> tuple[Tensor, Tensor]:
        """Mean (r,) and covariance (r, r) over the images of all coefficients but the first, at a contrast of 1."""
        return mean.z, mean.z_cov

    def turned(self, middle: Tensor, undo: Tensor) -> None:
        """Let undo (y - middle) take the place of y, r of all coefficients but the first: what is expected stays."""

    def sample(self, seen: Seen) -> None:
        a = torch.ones_like(seen.projection[:, 0])
        if self.contrast_varies:
            moments = self.moments(seen)
            sd = (moments.aa - moments.a.square()).clamp_min(LEAST_CONTRAST_SD**2).sqrt()
            a = pyro.sample("contrast", dist.Normal(moments.a, sd))
        gram = seen.gram * a[..., None, None].square()
        score = seen.projection[:, 1:] * a[..., None] - gram[..., 1:, 0]
        precision = gram[..., 1:, 1:] + torch.eye(score.shape[-1], dtype=score.dtype, device=score.device)
        precision = 0.5 * (precision + precision.mT)  # rounding leaves it less symmetric than the distribution demands
        mean = torch.linalg.solve(precision, score)
        pyro.sample("z", dist.MultivariateNormal(mean, precision_matrix=precision))

    def moments(self, seen: Seen) -> Moments:
        gram, projection = seen.gram, seen.projection
        eigenvalue, basis = torch.linalg.eigh(gram[:, 1:, 1:])
        eigenvalue = eigenvalue.clamp_min(0)
        image = (basis.mT @ projection[:, 1:, None])[..., 0]
        mean_map = (basis.mT @ gram[:, 1:, :1])[..., 0]
        first, square = projection[:, 0], gram[:, 0, 0]
        a, log_weight = self._contrast(eigenvalue, image, mean_map, first, square)
        weight = log_weight.softmax(-1)  # (B, K)
        value, variance = _given(a, eigenvalue, image, mean_map)  # z in the eigenbasis: (B, K, r)
        z = torch.einsum("bk,bkr->br", weight, value)
        zz = _outer(weight, value, variance)
        az, aaz = (torch.einsum("bk,bkr->br", weight * a**n, value) for n in (1, 2))
        aazz = _outer(weight * a.square(), value, variance)
        mean_a, mean_aa = (weight * a).sum(-1), (weight * a.square()).sum(-1)
        y = torch.cat([mean_a[:, None], _turn(basis, az)], -1)
        corner = _turn(basis, aaz)
        top = torch.cat([mean_aa[:, None], corner], -1)
        yy = torch.cat([top[:, None], torch.cat([corner[..., None], basis @ aazz @ basis.mT], -1)], -2)
        return Moments(
            y, yy, _turn(basis, z), basis @ zz @ basis.mT, mean_a, mean_aa, z.new_zeros(len(z), 0),
            seen.empty + log_weight.logsumexp(-1),
        )  # fmt: skip

    def _contrast(
        self, eigenvalue: Tensor, image: Tensor, mean_map: Tensor, first: Tensor, square: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Nodes a (B, K) about the mode of each particle's contrast and log weights (B, K), which add up to p(x)."""
        sd = self.contrast_sd

        def log_joint(a: Tensor) -> Tensor:
            value, _ = _given(a, eigenvalue, image, mean_map)
            gain = 0.5 * ((1 + a[..., None].square() * eigenvalue[:, None]) * value.square()).sum(-1)
            log_det = 0.5 * torch.log1p(a[..., None].square() * eigenvalue[:, None]).sum(-1)
            prior = 0.5 * ((a - 1) / sd.clamp_min(LEAST_CONTRAST_SD)).square()
            return a * first[:, None] - 0.5 * a.square() * square[:, None] + gain - log_det - prior

        one = torch.ones_like(first)[:, None]
        if not self.contrast_varies:
            return one, log_joint(one)
        # The mode by Newton's method on differences, then Gauss-Hermite quadrature with the curvature found there.
        mode, step = one, 0.1 * sd
        for _ in range(4):
            low, middle, high = (log_joint(mode + shift) for shift in (-step, torch.zeros_like(step), step))
            curvature = ((2 * middle - low - high) / step.square()).clamp_min(0.25 / sd.square())
            move = (high - low) / (2 * step) / curvature
            mode = (mode + move.clamp(-2 * sd, 2 * sd)).clamp(1 - 5 * sd, 1 + 5 * sd)
        width = curvature.rsqrt()
        nodes, weights = (torch.as_tensor(v, dtype=mode.dtype, device=mode.device) for v in _hermite())
        a = mode + width * nodes
        measure = weights.log() + 0.5 * nodes.square() + (width / sd).log()
        return a, log_joint(a) + measure


def _given(a: Tensor, eigenvalue: Tensor, image: Tensor, mean_map: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean and variance of z in the eigenbasis given contrasts a (B, K): (B, K, r)."""
    a = a[..., None]
    variance = 1 / (1 + a.square() * eigenvalue[:, None])
    return variance * a * (image[:, None] - a * mean_map[:, None]), variance


def _outer(weight: Tensor, value: Tensor, variance: Tensor) -> Tensor:
    """Sum over nodes of weight (value value' + diag variance): (B, r, r)."""
    spread = torch.diag_embed(torch.einsum("bk,bkr->br", weight, variance))
    return torch.einsum("bk,bki,bkj->bij", weight, value, value) + spread


def _turn(basis: Tensor, values: Tensor) -> Tensor:
    return (basis @ values[..., None])[..., 0]


def _hermite() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of quadrature with the standard normal density."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    return nodes, weights / math.sqrt(2 * math.pi)
