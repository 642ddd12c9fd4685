"""Mixtures of Gaussians with the masses, means and covariances of the posteriors of poses that they stand for.

Laplace's approximation takes the curvature at the mode for that of the whole peak, and a slice between the nodes of a
grid is not smooth. Weighted draws see the peak as wide as it is: with x_s drawn from the component N_c of
q = sum_c w_c N_c,

    log p(images) = log sum_c w_c mean_s p(x_s, images) / q(x_s),

each component's share of this sum is its mass, and its moments are those of its draws so weighted: a step of
population Monte Carlo (Cappe et al., Statistics and Computing 18 (2008) 447, eq. 9-11). Draws are the points of
`guides.moments`, the same for every image: a posterior that is a mixture of Gaussians apart from each other stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pyro_cryo.data.batch import Batch, of_copies, to_copies
from pyro_cryo.guides.moments import even_points, normal_rule, weighted_moments
from pyro_cryo.guides.pose_mixture import normalised
from pyro_cryo.guides.poses import PoseModes, covariance_factor
from pyro_cryo.physics.rotations import log

LogRatio = Callable[[Batch, Tensor, Tensor], Tensor]


def matched(modes: PoseModes, batch: Batch, log_ratio: LogRatio, draws: int = 128, seed: int = 0) -> PoseModes:
    """The modes (B, K) of a batch's images after one step, from an even number of draws of each component.

    log_ratio: log p(images, pose) - log q(pose) (n,) of each particle of a batch, given that and poses (B, 3, 3),
               (B, 2) in pixels of the modes; batches are copies of these images
    """
    image, mode = modes.log_weight.isfinite().nonzero(as_tuple=True)
    some = batch.copies(image, mode)
    own = PoseModes(
        modes.rotation[image, mode][:, None],
        modes.translation[image, mode][:, None],
        modes.precision[image, mode][:, None],
        torch.zeros_like(modes.log_weight[image, :1]),
    )
    white, chance = _points(some, draws, seed)
    poses, ratios = [], []
    for part in white.split(some.times_at_once):
        copies, points = some.again(len(part)), to_copies(part)
        which = torch.arange(len(own.log_weight), device=points.device).repeat_interleave(len(part))
        posed = own[which].placed(torch.zeros_like(points[:, 0]), points, copies)
        ratios.append(of_copies(log_ratio(copies, *posed), len(part)))
        poses.append([of_copies(value, len(part)) for value in posed])
    rotation, translation = (torch.cat(values) for values in zip(*poses, strict=True))
    log_share = chance.log()[:, None] + torch.cat(ratios)
    log_weight = normalised(modes.log_weight)
    log_mass = torch.full_like(log_weight, -torch.inf)
    log_mass[image, mode] = log_weight[image, mode] + some.of_images(log_share.logsumexp(0))
    factor = covariance_factor(own.precision[:, 0])
    away = torch.cat([log(rotation @ own.rotation[:, 0].mT), translation - own.translation[:, 0]], -1)
    points = torch.linalg.solve_triangular(factor, away[..., None], upper=False)[..., 0]
    mean, covariance = weighted_moments(points, some.of_images(log_share.softmax(0), 1))
    covariance = (factor @ covariance @ factor.mT).double()
    result = replace(modes.copy(), log_weight=log_mass.log_softmax(1))
    result.rotation[image, mode], result.translation[image, mode] = own.placed(torch.zeros_like(mean[:, 0]), mean, some)
    result.precision[image, mode] = torch.cholesky_inverse(torch.linalg.cholesky_ex(covariance)[0]).to(factor.dtype)
    return result


def _points(batch: Batch, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """Standard normal points (S, B, 5) and their weights (S,).

    Images of a particle beyond its first have the turn of that; their shifts are points of their own.
    """
    points, chance = normal_rule(draws, 5, seed, batch.image.device)
    white = points[:, None].repeat(1, len(batch), 1)
    if batch.several:
        further = torch.ones(len(batch), dtype=torch.bool, device=points.device)
        further[batch.first] = False
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(draws, int(further.sum()), generator=generator).argsort(0).to(points.device)
        white[:, further, 3:] = even_points(draws, 2, seed, points.device)[order]
    return white, chance
