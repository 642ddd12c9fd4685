"""The Bingham distribution of unit quaternions in its own axes: p(q) = exp(-sum_i d_i q_i^2) / c(d).

q = (q_1, q_2, q_3, q_4), scalar last, uniform on the sphere but for the exponent; q_4 is free and the decay d
(*batch, 3) is ascending, 0 <= d_1 <= d_2 <= d_3. The density is relative to the uniform one, so that c(0) = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NODES = 201  # log c is good to 1e-9 up to d = 1e7, to 2e-8 up to 1e10
_TAIL = 25.0  # the integral stops at exp(-25) of the narrowest scale from either end


def log_normaliser(decay: Tensor) -> tuple[Tensor, Tensor]:
    """log c(d) (*batch,) and the second moments E q_i^2 = -d log c / d d_i (*batch, 3), of decay (*batch, 3).

    c = 1/2 int_0^2 J0((d_2 - d_1) x / 4) J0(d_3 (2 - x) / 4) exp(-d_1 x / 2) dx with J0(y) = exp(-y) I_0(y):
    Lee, IEEE Trans. Autom. Control 63 (2018) 3377. Its factors change on scales 1 / d at the ends and nowhere
    else, so that it is smooth in w = log(x / (2 - x)), where the trapezoid rule converges exponentially.
    All terms are positive. In float64.
    """
    d1, d2, d3 = (d[..., None] for d in decay.unbind(-1))
    reach = d3.log1p() + _TAIL
    w = reach * torch.linspace(-1, 1, _NODES, dtype=decay.dtype, device=decay.device)
    x, rest = 2 * torch.sigmoid(w), 2 * torch.sigmoid(-w)
    left, right = (d2 - d1) * x / 4, d3 * rest / 4
    left0, left1, right0, right1 = (f(y) for y in (left, right) for f in (torch.special.i0e, torch.special.i1e))
    # dx = x (2 - x) / 2 dw; the step is 2 reach / (nodes - 1)
    weight = torch.exp(-d1 * x / 2) * x * rest * (reach / (2 * (_NODES - 1)))
    terms = torch.stack(
        [
            left0 * right0,
            (left0 + left1) * right0 * x / 4,
            (left0 - left1) * right0 * x / 4,
            left0 * (right0 - right1) * rest / 4,
        ]
    )
    c, *moments = (weight * terms).sum(-1)
    return c.log(), torch.stack(moments, -1) / c[..., None]


@torch.no_grad()
def sample(decay: Tensor) -> Tensor:
    """One unit quaternion (*batch, 4), scalar last, for each decay (*batch, 3), by rejection.

    The envelope is the angular central Gaussian (1 + 2 t / b)^-2, t = sum_i d_i q_i^2, drawn as a normalised Normal of
    precisions 1 + 2 d_i / b; sum_i 1 / (b + 2 d_i) = 1 makes its bound the tightest, any b makes it a bound. About half
    of the proposals are kept. Source: Kent, Ganeiber and Mardia, J. Comput. Graph. Stat. 27 (2018) 291.
    """
    d = torch.nn.functional.pad(decay.reshape(-1, 3), (0, 1))
    b = torch.ones_like(d[:, :1])
    for _ in range(8):  # Newton steps from the left of the root of a convex function
        inverse = 1 / (b + 2 * d)
        b = b + (inverse.sum(-1, keepdim=True) - 1) / inverse.square().sum(-1, keepdim=True)
    log_bound = (b - 4) / 2 + 2 * (4 / b).log()
    drawn = torch.empty_like(d)
    waiting = torch.arange(len(d), device=d.device)
    while len(waiting):
        di, bi = d[waiting], b[waiting]
        proposal = torch.randn_like(di) / (1 + 2 * di / bi).sqrt()
        proposal = proposal / proposal.norm(dim=-1, keepdim=True)
        t = (di * proposal.square()).sum(-1, keepdim=True)
        log_ratio = 2 * torch.log1p(2 * t / bi) - t - log_bound[waiting]
        kept = (torch.rand_like(t).log() < log_ratio).squeeze(-1)
        drawn[waiting[kept]] = proposal[kept]
        waiting = waiting[~kept]
    return drawn.view(*decay.shape[:-1], 4)
