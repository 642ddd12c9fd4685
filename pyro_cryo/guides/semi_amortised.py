"""Semi-amortised inference of z: an encoder begins, Newton's method and weighed points end, particle by particle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_cryo.data.batch import Batch
from pyro_cryo.guides.moments import normal_rule, weighted_moments
from pyro_cryo.model import CryoModel
from pyro_cryo.pose import KnownPose
from pyro_cryo.rows import Rows

LOOKS = 16  # at draws of the encoder's, beside its mean
MUCH = 3.0  # nats by which one of them must be likelier for the climb to begin there
ROUNDS = 12  # of Newton's method at most
ENOUGH = 1e-2  # nats: a particle whose bound rose by less in a step has arrived
SHORT = 0.25  # of a step that was refused, tried before it is said to have arrived
NARROWER, WIDER = 10.0, 2.0  # by which the variance along an axis may shrink and grow in one: less is known outside
FARTHEST = 2.0  # sd from the mean at which the posterior is looked at
MATCHES = 2  # with the posterior's mean and covariance
POINTS = 64  # looks at the images, a match, or 8 for each dimension of z


class SemiAmortised(nn.Module):
    """q(z | images) is the Gaussian with the posterior's mean and covariance, for each particle.

    An encoder is one function for all images; what it loses of each (Kim et al., ICML 2018) Newton's method gets back.
    From its mean, or where it has learned little from a draw that is much likelier, a Gaussian is moved to where its
    evidence bound is largest: over it,

        E[d log p(images, z)] = 0    and    E[-d^2 log p(images, z)] is its precision

    (Opper and Archambeau, Neural Computation 21 (2009)). The means are taken over points on both sides of the Gaussian
    along its axes, the second derivative from differences of the first between them.

    Of all Gaussians that of largest bound is too sure where the posterior is none: it avoids what is improbable, not
    what is left out. So its mean and covariance then become those of the posterior, by points that are weighed beside
    it (`guides.moments`).

    Sites that the encoder guesses beside z it goes on guessing; z is climbed at their means.

    model: of a z that may be anywhere, at poses that are known
    start: a guide with posterior(batch)

    Raises ValueError for other models.
    """

    def __init__(self, model: CryoModel, start: nn.Module) -> None:
        super().__init__()
        if not isinstance(model.poses, KnownPose):
            raise ValueError(
                f"poses are {type(model.poses).__name__}, of which every draw would need a climb of its own; fit "
                "particles whose poses are known"
            )
        if not anywhere(model):
            raise ValueError(f"z of {type(model).__name__} cannot be anywhere, as a Gaussian's; keep the model's guide")
        self._parts = (model, start)

    def posterior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean (n, zdim) and covariance (n, zdim, zdim) of q(z | images)."""
        with poutine.block():
            return self._found(batch)

    def forward(self, batch: Batch) -> None:
        """Sample what the other guide samples, and `z`."""
        with poutine.block(hide=["z", "particles"]):
            self._parts[1](batch)
        with poutine.block():
            mean, covariance = self._found(batch)
        factor = torch.linalg.cholesky(covariance)
        with pyro.plate("particles", batch.size, subsample=batch.shown, dim=-1):
            pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=factor))

    def _found(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean (n, zdim) and covariance (n, zdim, zdim)."""
        model, start = self._parts
        with torch.no_grad():
            mean, covariance = start.posterior(batch)  # type: ignore[operator]
            trace: Any = poutine.trace(start).get_trace(batch)
            names = [name for name in trace.stochastic_nodes if name not in ("z", "particles")]
            others = {name: trace.nodes[name]["fn"].mean for name in names}
            begun = _begun(model, batch, others, mean, covariance)
        best = _Gaussian.at(model, batch, others, *begun)
        share = torch.ones_like(best.bound)
        going = torch.arange(len(share), device=share.device)
        for _ in range(ROUNDS):
            seen = torch.isin(batch.particle, going)
            here = {name: value[going if len(value) == len(share) else seen] for name, value in others.items()}
            tried = _Gaussian.at(model, batch[seen], here, *best[going].moved(share[going]))
            gain = tried.bound - best.bound[going]
            best = best.replaced(going[gain > 0], tried[gain > 0])
            arrived = torch.where(gain > 0, gain < ENOUGH, share[going] < 1)
            share[going] = torch.where(gain > 0, 1.0, SHORT)
            going = going[~arrived]
            if len(going) == 0:
                break
        mean, root = best.mean, best.root
        for seed in range(MATCHES):
            mean, root = _matched(model, batch, others, mean, root, seed)
        return mean, root @ root.mT


@dataclass(frozen=True)
class _Gaussian(Rows):
    """Gaussians of mean and root root', and where Newton's method goes from there.

    bound (n,): of the evidence, up to a constant
    slope (n, zdim), bent (n, zdim, zdim): E[d log p] and E[-d^2 log p] in coordinates in which it is Normal(0, I)
    """

    mean: Tensor
    root: Tensor
    bound: Tensor
    slope: Tensor
    bent: Tensor

    @staticmethod
    def at(model: CryoModel, batch: Batch, others: dict[str, Tensor], mean: Tensor, root: Tensor) -> _Gaussian:
        """With the means over points `reach` sd to both sides of the mean along each axis."""
        zdim = mean.shape[1]
        reach = min(zdim**0.5, FARTHEST)
        sides = [mean + side * reach * root[..., axis] for axis in range(zdim) for side in (1, -1)]
        height, slope = (
            torch.stack(v, -1) for v in zip(*(_joint(model, batch, others, z) for z in sides), strict=True)
        )
        slope = torch.einsum("nij,nia->nja", root, slope).unflatten(-1, (zdim, 2))
        bent = (slope[..., 1] - slope[..., 0]) / (2 * reach)
        # Points nearer than sqrt(zdim) see less than the Gaussian's spread: the bend makes up for the rest.
        unseen = 0.5 * (1 - reach**2 / zdim) * bent.diagonal(dim1=1, dim2=2).sum(-1)
        bound = height.mean(-1) - unseen + torch.linalg.slogdet(root)[1]
        return _Gaussian(mean, root, bound, slope.mean((-2, -1)), 0.5 * (bent + bent.mT))

    def moved(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and root after a share (n,) of a step."""
        value, turn = torch.linalg.eigh(self.bent)
        value = value.clamp(1 / WIDER, NARROWER)
        step = turn @ ((turn.mT @ self.slope[..., None]) / value[..., None])
        step = step.clamp(-FARTHEST, FARTHEST) * share[:, None, None]
        narrower = value ** (-0.5 * share[:, None])
        return self.mean + (self.root @ step)[..., 0], self.root @ (turn * narrower[:, None, :])

    def replaced(self, rows: Tensor, by: _Gaussian) -> _Gaussian:
        """Other ones at some rows (m,) long."""
        return _Gaussian(*(old.index_copy(0, rows, new) for new, old in zip(by.tensors, self.tensors, strict=True)))


def anywhere(model: CryoModel) -> bool:
    """Whether z has a density all over R^zdim."""
    if model.zdim == 0:
        return False
    with torch.no_grad():
        prior: Any = poutine.trace(model.latent).get_trace().nodes["z"]["fn"]  # type: ignore[arg-type]
    support = prior.support
    while hasattr(support, "base_constraint"):  # of several coordinates, or of a mixture
        support = support.base_constraint
    return isinstance(support, type(constraints.real)) and not prior.has_enumerate_support


def _begun(
    model: CryoModel, batch: Batch, others: dict[str, Tensor], mean: Tensor, covariance: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean (n, zdim) and a root, or the likeliest of LOOKS draws and half the root; the same draws every time."""
    root = torch.linalg.cholesky(covariance)
    white = torch.randn(LOOKS, 1, mean.shape[1], 1, generator=torch.Generator().manual_seed(0)).to(root)
    tried = torch.cat([mean[None], mean + (root @ white)[..., 0]])
    height = torch.stack([_height(model, batch, others, z) for z in tried])
    height[0] += MUCH
    chosen = height.argmax(0)
    narrower = torch.where(chosen > 0, 0.5, 1.0)[:, None, None]
    return tried[chosen, torch.arange(len(mean), device=mean.device)], narrower * root


def _matched(
    model: CryoModel, batch: Batch, others: dict[str, Tensor], mean: Tensor, root: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """Mean (n, zdim) of the posterior and a root of its covariance, by points of a Gaussian that has them nearly."""
    zdim = mean.shape[1]
    points, chance = normal_rule(max(POINTS, 8 * zdim), zdim, seed, mean.device)
    with torch.no_grad():
        height = torch.stack([_height(model, batch, others, mean + root @ point) for point in points])
    log_ratio = height + 0.5 * points.square().sum(1, keepdim=True)
    away, covariance = weighted_moments(points, (chance.log()[:, None] + log_ratio).softmax(0))
    return mean + (root @ away[..., None])[..., 0], root @ torch.linalg.cholesky(covariance)


def _joint(model: CryoModel, batch: Batch, others: dict[str, Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """log p(images, z) (n,) at z (n, zdim) and its gradient (n, zdim)."""
    with torch.enable_grad():
        at = z.detach().requires_grad_()
        height = _height(model, batch, others, at)
        return height.detach(), torch.autograd.grad(height.sum(), at)[0]


def _height(model: CryoModel, batch: Batch, others: dict[str, Tensor], z: Tensor) -> Tensor:
    """log p(images, z) (n,) at z (n, zdim)."""
    nodes: Any = poutine.trace(poutine.condition(model, {**others, "z": z})).get_trace(batch).nodes
    return batch.window_power * nodes["image"]["fn"].log_prob(batch.image) + nodes["z"]["fn"].log_prob(z)
