"""The population of shapes along a coordinate, learned from likelihoods: p(x_i) = sum_l w_l p(x_i | z_l).

Posterior means of z are drawn together by its prior, and draws of z are spread by each image's noise: histograms of
either fill barriers and move wells. Weights that make the particles most probable (`most_probable`) are free of that,
but they are a few atoms (Lindsay, Annals of Statistics 11 (1983) 86). A density is smooth: on K bins, at s_k, it is a
logistic Gaussian process (Leonard, J. R. Stat. Soc. B 40 (1978) 113),

    w_k = exp f_k / sum_j exp f_j,      f = quadratic + g,      cov(g_k, g_l) = amplitude^2 c(|s_k - s_l| / length),

c a Matern correlation whose g has one derivative, two, or all (Rasmussen & Williams (2006) 4.2), the quadratic that of
one harmonic well: without it the ends, of few particles, are drawn towards the mean. With all derivatives, what is
smooth is learned nearly as fast as if one knew how smooth (van der Vaart & van Zanten, Annals of Statistics 37 (2009)
2655), but a barrier that is sharper than the wells is flattened, with bands too narrow there; with one it is followed,
with wider bands. c, length and amplitude are learned with f: draws are of all, given the particles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CORRELATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda r: (-0.5 * r.square()).exp(),
    lambda r: (1 + 5**0.5 * r + 5 / 3 * r.square()) * (-(5**0.5) * r).exp(),
    lambda r: (1 + 3**0.5 * r) * (-(3**0.5) * r).exp(),
)
LENGTHS = (0.1, 0.2, 0.4, 0.8)  # of the whole axis
AMPLITUDES_KT = (2.0, 6.0)
QUADRATIC_KT = 5.0  # sd at a bin of the quadratic's linear part, and of the rest of it
ROUGHNESS_KT = 0.01  # sd of each bin by itself, which keeps covariances invertible
PARTICLES = 1024  # whose likelihoods are handled together
CHAINS, KEPT = 100, 6  # that are drawn side by side, and how many of the last draws of each are kept
BURN, LEAPS, LEAP = 8, 6, 0.3
PASSES = 10_000


def most_probable(log_likelihood: Tensor, tolerance: float = 1e-3) -> Tensor:
    """Weights (L,) of points that make particles most probable, from log p(x_i | z_l) (n, L): no smoothness, no prior.

    Expectation maximisation from equal weights, until max_l mean_i p(x_i | z_l) / p(x_i) <= 1 + tolerance: no weights
    then have more than `tolerance` nats a particle more (Lindsay 1983); or for `PASSES`. Many are next to nothing.
    """
    likelihood = relative(log_likelihood)
    weight = torch.full_like(likelihood[0], 1 / likelihood.shape[1])
    for _ in range(PASSES):
        ratio = _mean_ratio(likelihood, weight)
        weight = weight * ratio
        if float(ratio.max()) <= 1 + tolerance:
            break
    return weight / weight.sum()


def relative(log_likelihood: Tensor) -> Tensor:
    """Likelihoods (n, L) over the largest of each particle, in double precision; ValueError where one is not finite."""
    largest = log_likelihood.double().amax(1, keepdim=True)
    wrong = (~torch.isfinite(largest[:, 0])).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"particle {wrong[0]} has a log likelihood of {float(largest[wrong[0]])}; expected finite numbers"
        )
    return (log_likelihood.double() - largest).exp()


def _mean_ratio(likelihood: Tensor, weight: Tensor) -> Tensor:
    """mean_i p(x_i | z_l) / p(x_i): (L,)."""
    return (likelihood @ weight).reciprocal() @ likelihood / len(likelihood)


def binned(likelihood: Tensor, label: Tensor, bins: int, share: Tensor) -> Tensor:
    """Likelihoods (n, K) of bins from those of points (n, L), label (L,), that share their bin's weight: share (L,).

    Where all shares in a bin are 0, its points share alike. Raises ValueError where a bin holds no point.
    """
    count = label.bincount(minlength=bins)
    if not bool((count > 0).all()):
        empty = int((count == 0).nonzero()[0])
        raise ValueError(f"bin {empty} of {bins} holds none of {len(label)} points; give fewer bins or more points")
    share = share.double()
    whole = torch.zeros(bins, dtype=share.dtype).index_add_(0, label, share)
    part = torch.where(whole[label] > 0, share / whole[label].clamp_min(1e-300), 1 / count[label])
    return torch.zeros(len(likelihood), bins, dtype=part.dtype).index_add_(1, label, likelihood * part)


def smooth_draws(likelihood: Tensor, seed: int = 0) -> Tensor:
    """Draws of log w (S, K), a smooth population's, from its posterior given likelihoods (n, K).

    For each smoothness, of a grid of them, f climbs to its mode, where Laplace's approximation gives the evidence and a
    Gaussian. Chains begin at draws of these and go on by Hamiltonian Monte Carlo, in that Gaussian's metric, and with
    the smoothness drawn anew given f.
    """
    generator = torch.Generator().manual_seed(seed)
    peaks = _Peaks.of(likelihood)
    which = torch.multinomial(peaks.log_evidence.softmax(0), CHAINS, replacement=True, generator=generator)
    f = peaks.drawn(which, generator)
    kept = []
    for _ in range(BURN + KEPT):
        f = _moved(likelihood, f, peaks.precision[which], peaks.root[which], generator)
        which = torch.multinomial(peaks.log_prior(f).softmax(1), 1, generator=generator)[:, 0]
        kept.append(f.log_softmax(1))
    return torch.cat(kept[-KEPT:])


def smoothnesses(bins: int) -> Tensor:
    """Inverse covariances of f (G, K, K) for all correlations, lengths and amplitudes, equally probable."""
    s = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
    apart = (s[:, None] - s).abs()
    quadratic = torch.linalg.qr(torch.stack([torch.ones_like(s), s, s.square()], 1)).Q[:, 1:]
    other = bins * QUADRATIC_KT**2 * quadratic @ quadratic.T + ROUGHNESS_KT**2 * torch.eye(bins, dtype=torch.float64)
    return torch.stack(
        [
            torch.linalg.inv(amplitude**2 * correlation(apart / length) + other)
            for correlation in CORRELATIONS
            for length in LENGTHS
            for amplitude in AMPLITUDES_KT
        ]
    )


@dataclass(frozen=True)
class _Peaks:
    """Laplace's approximation for each of G smoothnesses.

    precision:    (G, K, K) of the prior
    mode:         (G, K) of f
    root:         (G, K, K) lower triangular, root root' the curvature there
    log_evidence: (G,) log p(particles | smoothness), up to a constant
    """

    precision: Tensor
    mode: Tensor
    root: Tensor
    log_evidence: Tensor

    @staticmethod
    def of(likelihood: Tensor) -> _Peaks:
        """From likelihoods (n, K)."""
        precision = smoothnesses(likelihood.shape[1])
        f, modes, roots, heights = torch.zeros(likelihood.shape[1], dtype=torch.float64), [], [], []
        for one in precision:
            f, height, root = _climbed(likelihood, f, one)
            modes.append(f)
            heights.append(height)
            roots.append(root)
        root = torch.stack(roots)
        log_volume = 0.5 * torch.logdet(precision) - root.diagonal(dim1=1, dim2=2).log().sum(1)
        return _Peaks(precision, torch.stack(modes), root, torch.stack(heights) + log_volume)

    def drawn(self, which: Tensor, generator: torch.Generator) -> Tensor:
        """f from the Gaussians `which` (C,): (C, K)."""
        noise = torch.randn(len(which), self.mode.shape[1], dtype=torch.float64, generator=generator)
        return self.mode[which] + _solved_transposed(self.root[which], noise)

    def log_prior(self, f: Tensor) -> Tensor:
        """log p(f | smoothness) of f (C, K), up to a constant: (C, G)."""
        square = torch.einsum("ck,gkl,cl->cg", f, self.precision, f)
        return 0.5 * (torch.logdet(self.precision) - square)


def _climbed(likelihood: Tensor, f: Tensor, precision: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mode (K,) of f, its log posterior () and the root (K, K) of the curvature there.

    Newton's method from f with the score's outer products for the curvature, always positive, damped where it fails.
    """
    damping = 0.0
    height, slope = _log_posterior(likelihood, f[None], precision[None])
    for _ in range(200):
        curvature = _information(likelihood, f) + precision
        step = torch.linalg.solve(curvature + damping * curvature.diagonal().diag(), slope[0])
        there, its_slope = _log_posterior(likelihood, (f + step)[None], precision[None])
        if bool(there > height):
            gain = float(slope[0] @ step)
            f, height, slope, damping = f + step, there, its_slope, damping / 4
            if gain < 1e-2:
                break
        elif float(step.abs().max()) < 1e-6:
            break
        else:
            damping = max(4 * damping, 0.1)
    return f, height[0], torch.linalg.cholesky(_information(likelihood, f) + precision)


def _log_posterior(likelihood: Tensor, f: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """Of f (C, K) under priors (C, K, K), up to a constant, (C,), and its gradient (C, K)."""
    weight = f.softmax(1)
    pull = torch.einsum("ckl,cl->ck", precision, f)
    value, ratio = -0.5 * (f * pull).sum(1), torch.zeros_like(f)
    for part in likelihood.split(PARTICLES):
        probability = part @ weight.T
        value = value + probability.log().sum(0)
        ratio += probability.reciprocal().T @ part
    return value, weight * (ratio - len(likelihood)) - pull


def _information(likelihood: Tensor, f: Tensor) -> Tensor:
    """Sum over particles of the outer products of their scores: (K, K)."""
    weight, total = f.softmax(0), torch.zeros(len(f), len(f), dtype=f.dtype)
    for part in likelihood.split(PARTICLES):
        joint = part * weight
        score = joint / joint.sum(1, keepdim=True) - weight
        total += score.T @ score
    return total


def _moved(likelihood: Tensor, f: Tensor, precision: Tensor, root: Tensor, generator: torch.Generator) -> Tensor:
    """One transition of Hamiltonian Monte Carlo (Neal 2011) of chains f (C, K), with mass root root' (C, K, K)."""
    u = torch.randn(f.shape, dtype=f.dtype, generator=generator)  # momentum, where the mass is one
    step = LEAP * (0.5 + torch.rand(len(f), 1, dtype=f.dtype, generator=generator))
    value, slope = _log_posterior(likelihood, f, precision)
    before, moved = value - 0.5 * u.square().sum(1), f
    for _ in range(LEAPS):
        u = u + 0.5 * step * _solved(root, slope)
        moved = moved + step * _solved_transposed(root, u)
        value, slope = _log_posterior(likelihood, moved, precision)
        u = u + 0.5 * step * _solved(root, slope)
    gain = value - 0.5 * u.square().sum(1) - before
    taken = torch.rand(len(f), dtype=f.dtype, generator=generator).log() < gain
    return torch.where(taken[:, None], moved, f)


def _solved(root: Tensor, values: Tensor) -> Tensor:
    """root^-1 values, (C, K)."""
    return torch.linalg.solve_triangular(root, values[..., None], upper=False)[..., 0]


def _solved_transposed(root: Tensor, values: Tensor) -> Tensor:
    """root'^-1 values, (C, K)."""
    return torch.linalg.solve_triangular(root.mT, values[..., None], upper=True)[..., 0]
