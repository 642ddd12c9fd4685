"""Coefficients of particles whose z is one of some points: a curved family, classes, and where points are best put."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import replace

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_cryo.distributions.atoms import Atoms
from pyro_cryo.guides.coefficients import Coefficients, Moments, Seen

LEAST_WEIGHT = 1e-6
LEAST_GAIN = 1e-4  # nats a particle, of a pass over the images' statistics
PASSES = 30  # of those, at most
TRIALS = 8  # candidates for every further starting point


class PointCoefficients(Coefficients):
    """y = a phi(z), z one of the points (L, r) with probability exp(log_weight); features (L, C) are phi there.

    phi_0 = 1.
    """

    points: Tensor
    log_weight: Tensor
    features: Tensor

    def __init__(self, contrast_sd: float) -> None:
        super().__init__(contrast_sd)
        for name in ("points", "log_weight", "features"):
            self.register_buffer(name, torch.zeros(0))

    def first(self, rank: int) -> PointCoefficients:
        made = copy(self)
        made._buffers = dict(self._buffers)
        made.features = self.features[:, : 1 + rank]
        return made

    def sample(self, seen: Seen) -> None:
        z = pyro.sample("z", Atoms(self.points, self.moments(seen).weight.log()))
        if self.contrast_varies:
            y = self.at(z)
            linear, square = (seen.projection * y).sum(-1), torch.einsum("...bc,bcd,...bd->...b", y, seen.gram, y)
            variance = self.contrast_sd.square() / (1 + self.contrast_sd.square() * square)
            pyro.sample("contrast", dist.Normal(1 + variance * (linear - square), variance.sqrt()))

    def moments(self, seen: Seen) -> Moments:
        pairs = outer(self.features)
        linear = seen.projection @ self.features.T  # of the image with each point's map: (B, L)
        square = seen.gram.flatten(1) @ pairs.T
        s2 = self.contrast_sd.square()
        shrunk = 1 / (1 + s2 * square)
        difference = s2 * (linear - square) * shrunk  # of the contrast from 1
        log_joint = linear - 0.5 * square + 0.5 * difference * (linear - square) + 0.5 * shrunk.log() + self.log_weight
        evidence = log_joint.logsumexp(-1)
        weight = (log_joint - evidence[:, None]).exp()
        a, aa = weight * (1 + difference), weight * ((1 + difference).square() + s2 * shrunk)
        zz = outer(self.points)
        return Moments(
            a @ self.features, (aa @ pairs).unflatten(1, (self.features.shape[1],) * 2),
            weight @ self.points, (weight @ zz).unflatten(1, (self.points.shape[1],) * 2),
            a.sum(-1), aa.sum(-1), weight, seen.empty + evidence,
        )  # fmt: skip

    def learn(self, mean: Moments) -> None:
        super().learn(mean)
        self.log_weight.copy_((mean.weight + LEAST_WEIGHT).log())


class CurvedCoefficients(PointCoefficients):
    """phi are the leading kernel principal components of the points, of variance one and mean zero over them.

    The kernel is Gaussian, of `width` in the metric |root (z - z')|: the width at which the last of `most` components
    has 1% of the first one's variance, at least 1; those of less than 0.1% are left out.
    """

    root: Tensor
    width: Tensor
    offset: Tensor
    extension: Tensor

    def __init__(self, contrast_sd: float) -> None:
        super().__init__(contrast_sd)
        for name in ("root", "width", "offset", "extension"):
            self.register_buffer(name, torch.zeros(0))

    @staticmethod
    def through(points: Tensor, root: Tensor, contrast_sd: float, most: int = 24) -> CurvedCoefficients:
        """Features of points (L, r) in the metric of root (r, r); all points alike at first."""
        made = CurvedCoefficients(contrast_sd).to(points)
        count = len(points)
        square = torch.cdist(points @ root.T, points @ root.T).square().double()
        low, high = 0.0, math.log(1e4)
        for _ in range(30):
            middle = 0.5 * (low + high)
            value = torch.linalg.eigvalsh(torch.exp(-0.5 * square / math.exp(2 * middle))).flip(0)
            low, high = (middle, high) if value[min(most, count - 1)] > 0.01 * value[0] else (low, middle)
        kernel = torch.exp(-0.5 * square / math.exp(2 * middle))
        offset = kernel.mean(0)
        value, vector = torch.linalg.eigh(kernel - offset - offset[:, None] + offset.mean())
        value, vector = value.flip(0)[:most], vector.flip(1)[:, :most]
        kept = value > max(1e-3 * float(value[0]), 1e-9 * count)
        vector, value = vector[:, kept] * math.sqrt(count), value[kept]
        made.points, made.root, made.width = points, root, points.new_tensor(math.exp(middle))
        made.offset, made.extension = offset.to(points), (vector / value).to(points)
        made.features = torch.cat([torch.ones_like(offset)[:, None], vector], -1).to(points)
        made.log_weight = torch.full_like(made.offset, -math.log(count))
        return made

    def at(self, z: Tensor) -> Tensor:
        """phi at any z (*batch, r): (*batch, C); Nystroem's extension of the components."""
        square = torch.cdist(z.reshape(-1, z.shape[-1]) @ self.root.T, self.points @ self.root.T).square()
        kernel = torch.exp(-0.5 * square / self.width**2)
        centred = kernel - kernel.mean(-1, keepdim=True) - self.offset + self.offset.mean()
        values = torch.cat([torch.ones_like(kernel[:, :1]), centred @ self.extension], -1)
        return values.reshape(*z.shape[:-1], -1)

    def first(self, rank: int) -> PointCoefficients:
        made = super().first(rank)
        made.extension = self.extension[:, :rank]
        return made


class TabulatedCoefficients(PointCoefficients):
    """Features (L, C - 1) of points (L, r), all alike, of which nothing is known but there; contrast is 1."""

    def __init__(self, points: Tensor, features: Tensor) -> None:
        super().__init__(0.0)
        self.points, self.features = points, torch.cat([torch.ones_like(features[:, :1]), features], 1)
        self.log_weight = torch.full_like(features[:, 0], -math.log(len(points)))
        self.to(points.device)

    def at(self, z: Tensor) -> Tensor:
        """At the nearest point."""
        return self.features[torch.cdist(z.reshape(-1, z.shape[-1]), self.points).argmin(1)].view(*z.shape[:-1], -1)


class ClassesCoefficients(PointCoefficients):
    """z one of the K unit vectors: a particle has one of K maps, and the mean of z is their probabilities.

    The maps are V_0 + sum_m phi_m(k) F_m with K - 1 features of the classes' own, learned: what several classes share
    is one map, with one prior.
    """

    def __init__(self, classes: int, contrast_sd: float) -> None:
        super().__init__(contrast_sd)
        self.points = torch.eye(classes)
        self.features = torch.cat([torch.ones(classes, 1), torch.eye(classes)[:, 1:]], 1)
        self.log_weight = torch.full((classes,), -math.log(classes))

    def at(self, z: Tensor) -> Tensor:
        return z @ self.features

    def spread(self, mean: Moments) -> tuple[Tensor, Tensor]:
        """Mean (C - 1,) and covariance (C - 1, C - 1) over the images of all coefficients but the first."""
        weight, features = self.log_weight.exp(), self.features[:, 1:]
        middle = weight @ features
        return middle, (features - middle).T @ ((features - middle) * weight[:, None])

    def turned(self, middle: Tensor, undo: Tensor) -> None:
        """Let undo (y - middle) take the place of y, all coefficients but the first."""
        self.features = torch.cat([self.features[:, :1], (self.features[:, 1:] - middle) @ undo.T], 1)


def fit_points(seen: Seen, count: int, starts: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Where `count` points (count, r) of y = (1, point) are best put, and their log weights: a mixture of points.

    The most probable of some EM fits, each begun from k-means++ on the images' z, with z ~ Normal(0, I). Nothing but
    the statistics `seen` of the images is read.
    """
    rank = seen.gram.shape[1] - 1
    eye = torch.eye(rank, dtype=seen.gram.dtype, device=seen.gram.device)
    gram, score = seen.gram[:, 1:, 1:], seen.projection[:, 1:] - seen.gram[:, 1:, 0]
    z = torch.linalg.solve(gram + eye, score)
    plain = z @ torch.linalg.cholesky(gram.mean(0) + 1e-6 * eye)
    fits = []
    for _ in range(starts):
        label = _seeded(plain, count, generator)
        mass = torch.zeros(count, dtype=z.dtype, device=z.device).index_add_(0, label, torch.ones_like(z[:, 0]))
        points = torch.zeros(count, rank, dtype=z.dtype, device=z.device).index_add_(0, label, z)
        points = points / mass.clamp_min(1)[:, None]
        fits.append(_climb(seen, points, torch.full_like(mass, -math.log(count))))
    points, log_weight, _ = max(fits, key=lambda fitted: float(fitted[2]))
    return points, log_weight


def merge_points(seen: Seen, points: Tensor, log_weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Points (L, r) and log weights, merged two by two until `count` are left, and moved to where they are then best.

    Those are merged which the images tell apart least (Ward, J. Am. Stat. Assoc. 58 (1963) 236).
    """
    points, log_weight = points.clone(), log_weight.clone()
    metric = torch.linalg.cholesky(seen.gram[:, 1:, 1:].mean(0) + 1e-6 * torch.eye(points.shape[1]).to(points))
    while len(points) > count:
        weight = log_weight.exp()
        share = weight[:, None] * weight / (weight[:, None] + weight).clamp_min(LEAST_WEIGHT)
        cost = share * torch.cdist(points @ metric, points @ metric).square()
        cost.fill_diagonal_(torch.inf)
        one, other = divmod(int(cost.argmin()), len(points))
        both = weight[[one, other]]
        points[one] = (both @ points[[one, other]]) / both.sum().clamp_min(LEAST_WEIGHT)
        log_weight[one] = both.sum().log()
        left = torch.arange(len(points), device=points.device) != other
        points, log_weight, _ = _climb(seen, points[left], log_weight[left])
    return points, log_weight


def point_evidence(seen: Seen, points: Tensor, log_weight: Tensor) -> Tensor:
    """log p of each particle under points (L, r) with log weights (L,), up to what does not depend on them: (B,)."""
    return log_joint(seen, points, log_weight).logsumexp(-1)


def outer(rows: Tensor) -> Tensor:
    """The outer product of each row with itself: (L, C) -> (L, C^2)."""
    return (rows[:, :, None] * rows[:, None, :]).flatten(1)


def scaled(seen: Seen, a: Tensor) -> Seen:
    """What the images say of y / a, given their particles' contrasts a (B,)."""
    return replace(seen, gram=seen.gram * a.square()[:, None, None], projection=seen.projection * a[:, None])


def log_joint(seen: Seen, points: Tensor, log_weight: Tensor) -> Tensor:
    """log p(images of a particle, point), less that of empty images: (B, K) of points (K, r), log_weight (K,)."""
    features = torch.cat([torch.ones_like(points[:, :1]), points], 1)
    return seen.projection @ features.T - 0.5 * seen.gram.flatten(1) @ outer(features).T + log_weight


def _climb(seen: Seen, points: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """EM for the points of a mixture, each with the prior Normal(0, I)."""
    eye = torch.eye(points.shape[1], dtype=points.dtype, device=points.device)
    before = -math.inf
    for _ in range(PASSES):
        joint = log_joint(seen, points, log_weight)
        evidence = joint.logsumexp(-1).mean()
        weight = joint.softmax(-1)
        log_weight = (weight.mean(0) + LEAST_WEIGHT).log()
        gram = (weight.T @ seen.gram.flatten(1)).unflatten(1, seen.gram.shape[1:])
        score = (weight.T @ seen.projection)[:, 1:] - gram[:, 1:, 0]
        points = torch.linalg.solve(gram[:, 1:, 1:] + eye, score)
        if float(evidence) - before < LEAST_GAIN:
            break
        before = float(evidence)
    return points, log_weight, evidence


def _seeded(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The nearest of `count` values that k-means++ draws, greedily (Arthur and Vassilvitskii, SODA 2007): (N,)."""
    first = int(torch.randint(len(values), (), generator=generator))
    centres = [values[first]]
    square = (values - centres[0]).square().sum(1)
    for _ in range(count - 1):
        drawn = torch.multinomial(square.cpu() + 1e-12, TRIALS, generator=generator).to(values.device)
        each = torch.minimum(square, torch.cdist(values[drawn], values).square())
        best = int(each.sum(1).argmin())
        centres.append(values[drawn[best]])
        square = each[best]
    return torch.cdist(values, torch.stack(centres)).argmin(1)
