"""Mixtures of Gaussians with the masses, means and covariances of the posteriors of poses that they stand for.

Laplace's approximation takes the curvature at the mode for that of the whole peak, and a slice between the nodes of a
grid is not smooth. Weighted draws see the peak as wide as it is: where poses x_s drawn from q = sum_c w_c N_c have
weights W_s, those of p(x_s, images) / q(x_s) over their sum, component c has

    mass_c = sum_s W_s q(c | x_s),      moments those of the draws with weights W_s q(c | x_s) / mass_c:

a step of population Monte Carlo (Cappe et al., Statistics and Computing 18 (2008) 447, eq. 9-11).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.guides.moments import weighted_moments
from pyro_cryo.guides.pose_mixture import LEAST, PoseGaussians, log_shares
from pyro_cryo.guides.poses import PoseModes, moved
from pyro_cryo.physics.rotations import log

WIDER = 1.25  # sd of what is drawn beside a Gaussian's, so that its tails are seen
FLATTER = 0.5  # power of the weights of the components, so that light ones are


def proposal(modes: PoseModes) -> PoseModes:
    """What to draw from to see more of the posterior than modes say there is."""
    return replace(modes, precision=modes.precision / WIDER**2, log_weight=FLATTER * modes.log_weight)


def matched(modes: PoseModes, batch: Batch, rotation: Tensor, translation: Tensor, log_weight: Tensor) -> PoseModes:
    """The modes (B, K) of a batch's images after a step, from S weighted draws of them.

    rotation:    (S, B, 3, 3) of the images
    translation: (S, B, 2), as the batch's
    log_weight:  (S, n) normalised, of the particles
    """
    own = modes.log_weight.log_softmax(1).clamp_min(LEAST)
    every = PoseGaussians.about(modes, batch.freq_scale)
    share = log_shares(every, own, batch, rotation, translation).log_softmax(-1) + log_weight[..., None]
    log_mass = share.logsumexp(0)
    away = torch.cat(
        [
            log(rotation[:, :, None] @ every.rotation.mT),
            translation[:, :, None] - every.translation,
        ],
        -1,
    )
    points = torch.linalg.solve_triangular(every.factor, away[..., None], upper=False)[..., 0]
    mean, covariance = weighted_moments(points, batch.of_images((share - log_mass).exp(), 1))
    # In pixels of the modes.
    factor = PoseGaussians.about(modes, torch.ones_like(batch.freq_scale)).factor
    covariance = (factor @ covariance @ factor.mT).double()
    precision = torch.cholesky_inverse(torch.linalg.cholesky_ex(covariance)[0]).to(factor.dtype)
    there = moved(modes.rotation, modes.translation, (factor @ mean[..., None])[..., 0])
    mass = batch.of_images(log_mass).masked_fill(~modes.log_weight.isfinite(), -torch.inf)
    return PoseModes(*there, precision, mass.log_softmax(1))
