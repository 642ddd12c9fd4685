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

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.guides.moments import normal_rule, weighted_moments
from pyro_cryo.guides.pose_mixture import LEAST, PoseGaussians, log_density
from pyro_cryo.guides.poses import PoseModes, PosePrior, moved
from pyro_cryo.model import form_image
from pyro_cryo.physics.slices import read_grid, slice_coordinates
from pyro_cryo.rows import Rows
from pyro_cryo.volumes.conjugate import noise_sd

HELD = 1 << 24  # coefficients of slices that are held at a time


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
    points = slice_coordinates(rotation, batch.half.k, batch.freq_scale)
    expected = form_image(torch.view_as_real(read_grid(grid, points)), translation * px[:, None], batch)
    sd = noise_sd(batch, sigma)[..., None]
    return ((batch.image / sd) * (expected / sd)).sum((-2, -1)) - 0.5 * (expected / sd).square().sum((-2, -1))


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
    own = PoseGaussians.about(modes, torch.ones_like(px))
    log_weight = modes.log_weight.log_softmax(1).clamp_min(LEAST)
    points, chance = normal_rule(draws, 5, seed, px.device)
    away = torch.einsum("nkij,sj->skni", own.factor, points)
    poses = moved(own.rotation.transpose(0, 1), own.translation.transpose(0, 1), away)  # (S, K, B, ...)
    log_ratio = _log_joint(batch, grid, sigma, *poses, prior, px)
    log_ratio = log_ratio - log_density(own, log_weight, *poses).logsumexp(-1)
    log_share = chance.log()[:, None, None] + log_ratio
    log_mass = log_weight.T + log_share.logsumexp(0)  # (K, B)
    evidence = log_mass.logsumexp(0)
    weight = (log_ratio - evidence).exp()
    effective = 1 / (chance[:, None, None] * log_weight.exp().T * weight.square()).sum((0, 1))
    mean, covariance = (value.transpose(0, 1) for value in weighted_moments(points, log_share.softmax(0)))
    mean = (own.factor @ mean[..., None])[..., 0]
    covariance = own.factor @ covariance @ own.factor.mT
    precision = torch.cholesky_inverse(torch.linalg.cholesky_ex(covariance.double())[0]).to(covariance.dtype)
    there = modes.log_weight.isfinite()
    new = moved(modes.rotation, modes.translation, mean)
    result = PoseModes(
        torch.where(there[..., None, None], new[0], modes.rotation),
        torch.where(there[..., None], new[1], modes.translation),
        torch.where(there[..., None, None], precision, modes.precision),
        log_mass.T.masked_fill(~there, -torch.inf).log_softmax(1),
    )
    return result, Matched(evidence, effective)


def _log_joint(
    batch: Batch, grid: Tensor, sigma: Tensor, rotation: Tensor, translation: Tensor, prior: PosePrior, px: Tensor
) -> Tensor:
    """log p(image, pose) less log p of an empty image at poses (S, K, B, 3, 3), (S, K, B, 2): (S, K, B)."""
    held = max(1, HELD // (rotation.shape[1] * len(batch) * len(batch.half)))
    pairs = zip(rotation.split(held), translation.split(held), strict=True)
    return torch.cat([log_likelihood(batch, grid, sigma, *pose, px) for pose in pairs]) + prior.log_prob(
        rotation, translation
    )
