"""The exact posterior of a voxel map whose slices were seen with Gaussian noise: solve, do not descend.

The likelihood is Gaussian in the map V and so is the prior V = scale * u, u ~ ShellNormal(tau), where `scale` says
how much density to expect where (a mask, an envelope). With u = T e and e white, the posterior of e has precision
H = T S (A^H W A) S T + 1, where A^H W A is a convolution with a kernel that one pass over the images accumulates, and
mean H^-1 T S A^H W X. Conjugate gradients give the mean; perturb-and-solve (Papandreou and Yuille, NIPS 2010) gives
exact draws: solve for a right-hand side with the covariance H.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.distributions.volume import filter_shells, shell_values
from pyro_cryo.physics.fourier import half_radius, shift_phase, soft_disc
from pyro_cryo.physics.slices import (
    add_to_grid,
    convolve,
    crop_kernel,
    fourier_grid_adjoint,
    slice_coordinates,
    toeplitz_kernel,
)

SHARED = 0.25  # of what a shell's neighbours say, that counts for its variance
LEAST_SQUARE = 0.03  # of scale^2 over its typical value, which the preconditioner divides by


@dataclass(frozen=True)
class NormalEquations:
    """What a set of images says about a map: gridded A^H W X and gridded weights, both (n, n, n / 2 + 1)."""

    box: int
    value: Tensor
    weight: Tensor

    @staticmethod
    def empty(box: int, device: torch.device | str = "cpu", oversample: int = 2) -> NormalEquations:
        """No images yet."""
        shape = (oversample * box, oversample * box, oversample * box // 2 + 1)
        return NormalEquations(
            box, torch.zeros(shape, dtype=torch.complex64, device=device), torch.zeros(shape, device=device)
        )

    def add(self, batch: Batch, sigma: Tensor, symmetry: Tensor, weight: Tensor | None = None) -> None:
        """Add images in place; sigma (noise groups, shells), symmetry (G, 3, 3) the rotations of a point group.

        A symmetric map is seen equally from R and R S: each image counts 1 / G from each of its G equivalent views.
        weight (B,): what each image counts for, 1 by default.
        """
        ctf, inverse_variance = batch.ctf, 1 / noise_sd(batch, sigma).square()
        phase = shift_phase(batch.half.k, batch.translation, batch.half.box)
        share = inverse_variance / len(symmetry)
        if weight is not None:
            share = share * weight[:, None]
        value = torch.view_as_complex(batch.image) * phase.conj() * (ctf * share)
        strength = ctf.square() * share
        for element in symmetry:
            points = slice_coordinates(batch.rotation @ element, batch.half.k, batch.freq_scale)
            add_to_grid(self.value, points, value, also=(self.weight, strength))

    def __add__(self, other: NormalEquations) -> NormalEquations:
        return NormalEquations(self.box, self.value + other.value, self.weight + other.weight)

    def reweighted(self, factor: Tensor) -> NormalEquations:
        """The same images, each shell weighing `factor` (L,) times as much: another sigma of all of them."""
        table = shell_values(factor, self.weight.shape[0])
        return NormalEquations(self.box, self.value * table, self.weight * table)

    def posterior(
        self, scale: Tensor, tau: Tensor | None = None, order: int = 1, like: VoxelPosterior | None = None
    ) -> VoxelPosterior:
        """The posterior under V = scale * u, scale (D, D, D), u ~ ShellNormal(tau); tau defaults to `first_tau`.

        order is that of the point group with which the images were added; like is another posterior of the same
        images, whose likelihood serves again where it is of the same cube.
        """
        crop = _bounding_cube(scale)
        if like is None or like.crop != crop:
            rhs, spectrum = self._likelihood(crop)
        else:
            rhs, spectrum = like.rhs, like.spectrum
        shells, where = self.box // 2 + 1, scale[crop].contiguous()
        told, step = coefficient_information(spectrum, where) / where.square().mean(), self.box / spectrum.shape[0]
        mean, square = (shell_mean(v, shells, step) for v in (told, told.square()))
        seen, shown = torch.minimum(shell_mean(spectrum, shells, step), mean), torch.ones_like(mean)
        seen[-1], shown[-1] = mean[-1], mean[-1].square() / square[-1].clamp_min(1e-30)
        result = VoxelPosterior(self.box, crop, rhs, spectrum, seen, shown, where, torch.ones_like(seen), order)
        return result.with_tau(first_tau(result) if tau is None else tau)

    def _likelihood(self, crop: tuple[slice, slice, slice]) -> tuple[Tensor, Tensor]:
        """rhs and spectrum of a `VoxelPosterior` on a cube."""
        side = crop[0].stop - crop[0].start
        kernel = crop_kernel(toeplitz_kernel(self.weight, self.box), side)
        # Few pairs of voxels are farther apart; lags that end abruptly would make the spectrum ring below zero.
        taper = soft_disc(2 * side, 0.6 * side, 0.4 * side, dims=3, device=kernel.device)
        spectrum = nonnegative(torch.fft.rfftn(kernel.mul_(torch.fft.ifftshift(taper))).real)
        return fourier_grid_adjoint(self.value, self.box)[crop].contiguous(), spectrum


def component_sd(batch: Batch, sigma: Tensor) -> Tensor:
    """Standard deviation of each real component of each coefficient: (B, P)."""
    sd = sigma[batch.noise_group][:, batch.half.shell]
    return sd if batch.noise_scale is None else sd * batch.noise_scale


def noise_sd(batch: Batch, sigma: Tensor) -> Tensor:
    """That of independent noise which tells as little as the images' own: (B, P).

    A soft window w leaves the signal as it is, takes mean(w^2) of the noise's power and correlates the rest: what
    images say is then what they said before, at sd^2 = power of windowed noise / mean(w^2). As a model's likelihood to
    the power mean(w^2) has it.
    """
    sd = component_sd(batch, sigma)
    return sd if batch.window_power == 1 else sd / math.sqrt(batch.window_power)


@dataclass(frozen=True)
class VoxelPosterior:
    """Gaussian posterior of e, V = scale * T e, on the cube of `crop`, b voxels a side, where scale is not zero.

    rhs (b, b, b) is A^H W X; spectrum (2b, 2b, b + 1) the transform of the Toeplitz kernel; scale (b, b, b); tau (L,).
    seen:  (L,) what the images say of a coefficient, over the mean of scale^2: the mean of the spectrum over a shell,
           and no more than that smoothed as the transform of scale mixes coefficients, less next to what none shows;
           smoothed alone in the last shell
    shown: (L,) the share of a shell's coefficients that would have all of it, were it the same in these and none in the
           others: 1 but in the last shell, half of which is beyond the images
    order: of the map's point group, 1 without: only 1 / order of the coefficients of a symmetric map are free, and
    tau is their standard deviation.
    """

    box: int
    crop: tuple[slice, slice, slice]
    rhs: Tensor
    spectrum: Tensor
    seen: Tensor
    shown: Tensor
    scale: Tensor
    tau: Tensor
    order: int = 1

    def with_tau(self, tau: Tensor) -> VoxelPosterior:
        """The same images under another prior."""
        return replace(self, tau=tau)

    def counted(self, times: Tensor) -> VoxelPosterior:
        """The posterior of a map that the images show `times` () as strongly; its rhs is to be set."""
        return replace(self, spectrum=self.spectrum * times, seen=self.seen * times)

    def stepped(self, volume: Tensor, score: Tensor) -> VoxelPosterior:
        """With the rhs that the images' score (D, D, D), the gradient of their log likelihood, tells at `volume`."""
        here = convolve(self.spectrum, volume[self.crop]) + score[self.crop]
        return replace(self, rhs=here)

    def information(self) -> Tensor:
        """What the images say about a coefficient of u, averaged over each shell: (L,), in the units of 1 / tau^2."""
        return self.seen * self.scale.square().mean()

    def determined(self) -> Tensor:
        """The share of the coefficients of each shell that the images determine, not the prior: (L,), 0 to 1.

        A coefficient near r has the precision seen * scale(r)^2 + 1 / tau^2: where scale is small, nothing is seen. It
        is taken as seen / shown in a share `shown` of a shell, and as 0 in the rest.
        """
        strength = (self.seen / self.shown.clamp_min(1e-30) * self.tau.square()).clamp_min(0)[:, None]
        step = max(1, len(self.scale) // 32)  # scale is smooth: a part of its voxels tells
        square = self.scale[::step, ::step, ::step].square().flatten()
        return self.shown * torch.stack([(s * square / (1 + s * square)).mean() for s in strength])

    def mean(self, tolerance: float = 1e-3, start: Tensor | None = None) -> Tensor:
        """Posterior mean of e (b, b, b)."""
        return self._solve(self.whiten(self.rhs), tolerance, start)

    def deviations(self, count: int, generator: torch.Generator, tolerance: float = 3e-3) -> Tensor:
        """Draws of e minus its mean: (count, b, b, b).

        Few coefficients are in the lowest shells, whose variance a larger tolerance leaves too small.
        """
        b, device = len(self.scale), self.rhs.device
        draws = []
        for _ in range(count):
            score = score_noise(self.spectrum, generator)
            prior = torch.randn(b, b, b, generator=generator).to(device)
            draws.append(self._solve(self.whiten(score) + prior, tolerance))
        return torch.stack(draws)

    def colour(self, e: Tensor) -> Tensor:
        """u = F^-1 tau F e: white to the prior of u, (*batch, b, b, b)."""
        return filter_shells(e, self.tau)

    def whiten(self, score: Tensor) -> Tensor:
        """The adjoint of e -> scale * colour(e): what a score of V is to e."""
        return filter_shells(self.scale * score, self.tau)

    def to_map(self, e: Tensor) -> Tensor:
        """V = scale * colour(e) in the whole box: (*batch, b, b, b) -> (*batch, D, D, D)."""
        return self.in_box(self.scale * self.colour(e))

    def in_box(self, values: Tensor) -> Tensor:
        """Values on the cube (*batch, b, b, b), zero around it: (*batch, D, D, D)."""
        volume = values.new_zeros((*values.shape[:-3], self.box, self.box, self.box))
        volume[(..., *self.crop)] = values
        return volume

    def _solve(self, rhs: Tensor, tolerance: float, start: Tensor | None = None) -> Tensor:
        """Conjugate gradients on H e = rhs (b, b, b), on the Fourier coefficients of e, where the prior is a factor."""
        b = len(self.scale)
        tau = shell_values(self.tau, b)
        weak = preconditioner(self.scale, shell_values(self.seen * self.tau.square(), b))
        twice = stands_for(b, rhs.device)

        def operator(e: Tensor) -> Tensor:
            score = convolve(self.spectrum, self.scale * to_voxels(tau * e))
            return torch.addcmul(e, tau, to_coefficients(self.scale * score))

        def dot(a: Tensor, c: Tensor) -> Tensor:
            return ((a.real * c.real + a.imag * c.imag) * twice).sum()

        first = None if start is None else to_coefficients(start)
        return to_voxels(conjugate_gradients(operator, to_coefficients(rhs), weak, dot, tolerance, first))


def coefficient_information(spectrum: Tensor, scale: Tensor) -> Tensor:
    """What images say of each coefficient of u, the diagonal of S A^H W A S, on the layout of the spectrum.

    The spectrum, smoothed as the transform of scale (b, b, b) mixes coefficients.
    """
    n = spectrum.shape[0]
    overlap = torch.fft.irfftn(torch.fft.rfftn(scale, s=(n,) * 3).abs().square(), s=(n,) * 3)
    kernel = torch.fft.irfftn(spectrum, s=(n,) * 3)
    return torch.fft.rfftn(kernel.mul_(overlap)).real / scale.numel()


def score_noise(spectrum: Tensor, generator: torch.Generator) -> Tensor:
    """What noise in the images does to their score, A^H W times noise: a draw (b, b, b) of covariance A^H W A."""
    n = spectrum.shape[0]
    noise = torch.randn(n, n, n, generator=generator).to(spectrum.device)
    return torch.fft.irfftn(torch.fft.rfftn(noise) * spectrum.sqrt(), s=(n,) * 3)[: n // 2, : n // 2, : n // 2]


def conjugate_gradients(
    operator: Callable[[Tensor], Tensor],
    right: Tensor,
    weak: Callable[[Tensor], Tensor],
    dot: Callable[[Tensor, Tensor], Tensor],
    tolerance: float,
    start: Tensor | None = None,
) -> Tensor:
    """e with operator(e) = right, from 0 or `start`; weak is the preconditioner, dot the inner product ()."""
    if start is None:
        e, residual = torch.zeros_like(right), right.clone()
    else:
        e = start.clone()
        residual = right - operator(e)
    z = weak(residual)
    direction, rz = z, dot(residual, z)
    target = tolerance**2 * dot(right, weak(right))
    for _ in range(300):
        if bool(rz <= target):
            break
        image = operator(direction)
        curvature = dot(direction, image)
        if not bool(curvature > 0):  # beyond what single precision resolves
            break
        step = rz / curvature
        e.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        z = weak(residual)
        previous, rz = rz, dot(residual, z)
        direction = torch.addcmul(z, rz / previous.clamp_min(1e-30), direction)
    return e


def preconditioner(scale: Tensor, strength: Tensor) -> Callable[[Tensor], Tensor]:
    """About the inverse of H = 1 + T S K S T, on the Fourier coefficients of e: what to give `conjugate_gradients`.

    scale (*batch, b, b, b) is S, strength (*batch, b, b, b / 2 + 1) is K T^2. Where K is as good as flat over the width
    of the transform of S, and with t the typical S^2 where density is,

        W H W = 1 - q^2 + q (S^2 / t) q,    W^2 = 1 / (1 + t K T^2),    q^2 = 1 - W^2,

    whose inverse is about 1 - q^2 + q (S^2 / t)^-1 q: a factor of coefficients, of voxels, and of coefficients again.
    """
    square = scale.square()
    typical = (square.square().mean((-3, -2, -1)) / square.mean((-3, -2, -1)))[..., None, None, None]
    voxel = 1 / (square / typical + LEAST_SQUARE)
    told = typical * strength
    outer = (1 + told).rsqrt()
    inner, rest = outer * (told / (1 + told)).sqrt(), outer.square() / (1 + told)

    def apply(residual: Tensor) -> Tensor:
        return torch.addcmul(rest * residual, inner, to_coefficients(voxel * to_voxels(inner * residual)))

    return apply


def to_coefficients(volume: Tensor) -> Tensor:
    """The unitary transform of voxels: (*batch, b, b, b) -> (*batch, b, b, b / 2 + 1)."""
    return torch.fft.rfftn(volume, dim=(-3, -2, -1), norm="ortho")


def to_voxels(coefficients: Tensor) -> Tensor:
    """Its inverse."""
    return torch.fft.irfftn(coefficients, s=(coefficients.shape[-2],) * 3, dim=(-3, -2, -1), norm="ortho")


def stands_for(n: int, device: torch.device) -> Tensor:
    """How many of the n columns of kx each of the n / 2 + 1 stored ones stands for."""
    twice = torch.full((n // 2 + 1,), 2.0, device=device)
    twice[0] = twice[-1] = 1.0
    return twice


def first_tau(posterior: VoxelPosterior) -> Tensor:
    """Prior sd of u by shell from moments of the right-hand side, each coefficient taken on its own: (L,).

    A coefficient of S A^H W X has about the variance lambda^2 tau^2 <S^4> / <S^2>^2 + lambda, lambda the images'
    information: signal and noise are both seen where scale is, and lambda is in a part of each shell.
    """
    weight = posterior.information().clamp_min(1e-30)
    power = posterior.order * shell_power(posterior.scale * posterior.rhs, len(posterior.tau))
    square = posterior.scale.square()
    spread = square.square().mean() / square.mean().square() / posterior.shown.clamp_min(1e-30)
    return floor_tau((power - weight).clamp_min(0) / (weight.square() * spread), weight)


def mackay_tau(posterior: VoxelPosterior, mean: Tensor) -> Tensor:
    """Prior sd of u by shell, one step of MacKay's fixed point: (L,).

    tau^2 changes by |mean|^2 / (gamma tau^2), gamma = 1 - var / tau^2 the share of the coefficients that the images
    determine, with the posterior variance of each coefficient taken on its own. Where gamma is small a shell's own
    figure is chance, and would be its end: both are summed over it and, by SHARED, its neighbours.
    Source: MacKay, Neural Computation 4 (1992) 415.
    """
    shells = len(posterior.tau)
    power = posterior.order * shell_power(posterior.colour(mean), shells) / posterior.tau.square()
    coefficients = torch.arange(shells, device=power.device).square().clamp_min(1)
    beside = torch.nn.functional.pad(torch.stack([power, posterior.determined()]) * coefficients, (1, 1))
    spoken, free = beside[:, 1:-1] + SHARED * (beside[:, :-2] + beside[:, 2:])
    return floor_tau(posterior.tau.square() * spoken / free.clamp_min(1e-30), posterior.information())


def settled(posterior: VoxelPosterior, steps: int, tolerance: float) -> tuple[VoxelPosterior, Tensor]:
    """The posterior after so many steps of MacKay's fixed point for tau, and its mean e (b, b, b)."""
    mean = posterior.mean(tolerance)
    for _ in range(steps):
        tau = mackay_tau(posterior, mean)
        start = filter_shells(mean, posterior.tau / tau)
        posterior = posterior.with_tau(tau)
        mean = posterior.mean(tolerance, start=start)
    return posterior, mean


def floor_tau(variance: Tensor, information: Tensor) -> Tensor:
    """Standard deviations from variances by shell: DC as its neighbours, a floor where the images show no signal."""
    variance = variance.clone()
    variance[0] = variance[1:3].max()
    floor = torch.minimum(1e-3 / information.clamp_min(1e-30), 1e-2 * variance.max())
    return torch.maximum(variance, floor.clamp_min(1e-30)).sqrt()


def nonnegative(spectrum: Tensor) -> Tensor:
    """A spectrum (n, n, n / 2 + 1) without its negative values but with the mean of every shell as it was.

    Clamping alone would add to what the images say, most where they say little.
    """
    n = spectrum.shape[0]
    shells = math.ceil(3**0.5 * n / 2) + 1
    clamped = spectrum.clamp_min(0)
    share = shell_mean(spectrum, shells).clamp_min(0) / shell_mean(clamped, shells).clamp_min(1e-30)
    return clamped * share[_shell_layout(n, shells, 1.0, str(spectrum.device))[0]].reshape(spectrum.shape)


def shell_mean(values: Tensor, shells: int, scale: float = 1.0) -> Tensor:
    """Mean over shells round(scale |k|) of values on an rfftn layout: (L,); what stands for two counts twice."""
    index, twice, count = _shell_layout(values.shape[-3], shells, scale, str(values.device))
    total = torch.zeros(shells + 1, device=values.device).index_add_(0, index, (values * twice).flatten())
    return total[:shells] / count


@lru_cache(maxsize=8)
def _shell_layout(n: int, shells: int, scale: float, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Shell of every stored coefficient of an n cube (those beyond go to one more), how often each counts, how many."""
    index = (half_radius(n, device) * scale).round().long().clamp_max(shells).flatten()
    twice = stands_for(n, index.device)
    count = torch.zeros(shells + 1, device=device).index_add_(0, index, twice.expand(n, n, -1).flatten())
    return index, twice, count[:shells].clamp_min(1)


def shell_power(volume: Tensor, shells: int) -> Tensor:
    """Mean squared coefficient of maps (*batch, b, b, b), unitary, by shell of a box of 2 (shells - 1): (L,)."""
    spectrum = torch.fft.rfftn(volume, dim=(-3, -2, -1), norm="ortho").abs().square()
    spectrum = spectrum.reshape(-1, *spectrum.shape[-3:]).mean(0)
    return shell_mean(spectrum, shells, 2 * (shells - 1) / volume.shape[-1])


def _bounding_cube(scale: Tensor) -> tuple[slice, slice, slice]:
    """An even cube, centred like the box, outside which scale is zero; with a margin of a quarter where it fits."""
    box = len(scale)
    inside = scale > 0
    reach = 2
    for dim in range(3):
        line = inside.any(dim=tuple(d for d in range(3) if d != dim)).nonzero()
        if len(line):
            reach = max(reach, box // 2 - int(line.min()), int(line.max()) + 1 - box // 2)
    reach = min(-(-5 * reach // 4), box // 2)
    side = slice(box // 2 - reach, box // 2 + reach)
    return side, side, side
