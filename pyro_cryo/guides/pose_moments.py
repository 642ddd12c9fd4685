"""Mixtures of Gaussians with the masses, means and covariances of the posteriors of poses that they stand for.

Laplace's approximation takes the curvature at the mode for that of the whole peak, and a slice between the nodes of a
grid is not smooth. Weighted draws see the peak as wide as it is: with x_s drawn from the component N_c of
q = sum_c w_c N_c,

    log p(image) = log sum_c w_c mean_s p(x_s, image) / q(x_s),

each component's share of this sum is its mass, and its moments are those of its draws so weighted: a step of
population Monte Carlo (Cappe et al., Statistics and Computing 18 (2008) 447, eq. 9-11). Draws are the points of
`guides.moments`, the same for every image: a posterior that is a mixture of Gaussians apart from each other stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.guides.moments import normal_rule, weighted_moments
from pyro_cryo.guides.pose_mixture import LEAST, PoseGaussians, log_density
from pyro_cryo.guides.poses import PoseModes, PosePrior, moved
from pyro_cryo.physics.fourier import shift_phase
from pyro_cryo.physics.slices import read_grid, slice_coordinates
from pyro_cryo.rows import Rows
from pyro_cryo.volumes.conjugate import noise_sd

HELD = 1 << 18  # coefficients of slices that are held at a time on a CPU: in its cache
HELD_GPU = 1 << 24


@dataclass(frozen=True)
class Matched(Rows):
    """What weighted draws say of n images.

    evidence:  (n,) log p(image) less that of an empty image, the pose integrated out
    effective: (n,) share of the draws that count: (sum w)^2 / (S sum w^2), 1 where q is the posterior
    """

    evidence: Tensor
    effective: Tensor


def log_likelihood(
    batch: Batch, grid: Tensor, sigma: Tensor, rotation: Tensor, translation: Tensor, px: Tensor
) -> Tensor:
    """log p(image | pose) less that of an empty image, at poses (*draws, B, 3, 3), (*draws, B, 2): (*draws, B).

    grid: `fourier_grid` of the map; sigma, px: as in `guides.poses.Landscape.at`
    """
    half, sd = batch.half, noise_sd(batch, sigma)
    slices = read_grid(grid, slice_coordinates(rotation, half.k, batch.freq_scale))
    score = torch.view_as_complex(batch.image).conj() * batch.ctf / sd.square()
    square = torch.view_as_real(slices).square().sum(-1) * (batch.ctf / sd).square()
    cross = slices.mul_(shift_phase(half.k, translation * px[:, None], half.box)).mul_(score).real
    return (cross - 0.5 * square).sum(-1)


def matched(
    batch: Batch,
    grid: Tensor,
    sigma: Tensor,
    modes: PoseModes,
    prior: PosePrior,
    px: Tensor,
    draws: int = 128,
    seed: int = 0,
) -> tuple[PoseModes, Matched]:
    """The modes (B, K) after one step towards the posterior's masses and moments, from `draws` of each component.

    grid: `fourier_grid` of the map; other arguments as in `guides.poses.climbed`. A few steps settle: 3 from
    Laplace's approximation.
    """
    image, mode = modes.log_weight.isfinite().nonzero(as_tuple=True)
    every = PoseGaussians.about(modes, torch.ones_like(px))
    log_weight = modes.log_weight.log_softmax(1).clamp_min(LEAST)
    own, own_weight, some = every[image, mode], log_weight[image, mode], batch.copies(image, mode)
    points, chance = normal_rule(draws, 5, seed, px.device)
    poses = moved(own.rotation, own.translation, torch.einsum("mij,sj->smi", own.factor, points))  # (S, M, ...)
    log_ratio = _log_joint(some, grid, sigma, *poses, prior[image], px[image])
    log_ratio = log_ratio - log_density(every[image], log_weight[image], *poses).logsumexp(-1)
    log_share = chance.log()[:, None] + log_ratio
    log_mass = torch.full_like(log_weight, -torch.inf)
    log_mass[image, mode] = own_weight + log_share.logsumexp(0)
    evidence = log_mass.logsumexp(1)
    square = own_weight.exp() * (chance[:, None] * (2 * (log_ratio - evidence[image])).exp()).sum(0)
    effective = 1 / torch.zeros_like(evidence).index_add_(0, image, square)
    mean, covariance = weighted_moments(points, log_share.softmax(0))
    covariance = own.factor @ covariance @ own.factor.mT
    precision = torch.cholesky_inverse(torch.linalg.cholesky_ex(covariance.double())[0]).to(covariance.dtype)
    result = modes.copy()
    new = moved(own.rotation, own.translation, (own.factor @ mean[..., None])[..., 0])
    result.rotation[image, mode], result.translation[image, mode] = new
    result.precision[image, mode] = precision
    result = replace(result, log_weight=log_mass.log_softmax(1))
    return result, Matched(evidence, effective)


def _log_joint(
    batch: Batch, grid: Tensor, sigma: Tensor, rotation: Tensor, translation: Tensor, prior: PosePrior, px: Tensor
) -> Tensor:
    """log p(image, pose) less log p of an empty image at poses (S, B, 3, 3), (S, B, 2): (S, B)."""
    held = max(1, (HELD if px.device.type == "cpu" else HELD_GPU) // batch.ctf.numel())
    pairs = zip(rotation.split(held), translation.split(held), strict=True)
    return torch.cat([log_likelihood(batch, grid, sigma, *pose, px) for pose in pairs]) + prior.log_prob(
        rotation, translation
    )
