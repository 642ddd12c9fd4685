"""Distributions of rotations: uniform, tangent-space Normal, matrix Fisher.

Densities are relative to the normalised Haar measure of SO(3): the uniform distribution has density 1. A rotation
(3, 3) is one event; it takes volume axes to view axes. In rotation vectors v, of length t <= pi, that measure is
2 (1 - cos t) / t^2 dv / (8 pi^2).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_cryo.distributions import bingham
from pyro_cryo.physics.rotations import exp, log, matrix_to_quaternion, quaternion_to_matrix


class _RotationMatrix(constraints.Constraint):
    """R R^T = 1 to within 1e-4, which float32 arithmetic and files in text keep, and det R > 0."""

    event_dim = 2

    def check(self, value: Tensor) -> Tensor:
        """Whether matrices (*batch, 3, 3) are rotations: (*batch,)."""
        error = value @ value.mT - torch.eye(3, dtype=value.dtype, device=value.device)
        return (error.abs().amax((-2, -1)) < 1e-4) & (_determinant(value) > 0)


rotation_matrix = _RotationMatrix()


class UniformRotation(TorchDistribution):
    """The Haar measure: every orientation alike, density 1. Draws have the dtype and device given, torch's defaults."""

    arg_constraints = {}  # noqa: RUF012
    support = rotation_matrix
    has_rsample = True

    def __init__(
        self,
        batch_shape: Any = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.dtype, self.device = dtype, device
        super().__init__(torch.Size(batch_shape), torch.Size((3, 3)), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: object = None) -> UniformRotation:
        """The same distribution for every element of a larger batch."""
        return UniformRotation(batch_shape, self.dtype, self.device, validate_args=self._validate_args)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Rotations (*sample_shape, *batch, 3, 3): normalised Gaussian quaternions (Shoemake 1992)."""
        shape = torch.Size(sample_shape) + self.batch_shape
        return quaternion_to_matrix(torch.randn(*shape, 4, dtype=self.dtype, device=self.device))

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero for rotations (*batch, 3, 3): (*batch,)."""
        if self._validate_args:
            self._validate_sample(value)
        return value.new_zeros(torch.broadcast_shapes(value.shape[:-2], self.batch_shape))


class TangentNormal(TorchDistribution):
    """R = exp([v]x) loc with v ~ Normal(0, L L^T): a Gaussian of rotation vectors about loc, wrapped onto SO(3).

    loc:         (*batch, 3, 3) rotation
    scale_tril:  (*batch, 3, 3) L, lower triangular, in radians along the view axes: v_z turns in the image's plane

    Density at R = exp([t u]x) loc, 0 <= t <= pi, with the turns t_n = t + 2 pi n that end at the same rotation:
    8 pi^2 / (2 (1 - cos t)) sum_n t_n^2 Normal(t_n u; 0, L L^T). A full turn ends at loc whatever its axis, so that the
    terms of n != 0 have an integrable pole there, t^-2. It is levelled off within 1e-4 radians of loc: the density is
    finite and smooth, spreads below 30 degrees do not notice, wider ones lose 1e-4 of their mass at most. Very wide
    ones tend to a uniform angle, density 1 / (1 - cos t), not to the uniform rotation.
    """

    arg_constraints = {"loc": rotation_matrix, "scale_tril": constraints.lower_cholesky}  # noqa: RUF012
    support = rotation_matrix
    has_rsample = True

    def __init__(self, loc: Tensor, scale_tril: Tensor, validate_args: bool | None = None) -> None:
        shape = torch.broadcast_shapes(loc.shape[:-2], scale_tril.shape[:-2])
        self.loc, self.scale_tril = loc.expand(*shape, 3, 3), scale_tril.expand(*shape, 3, 3)
        super().__init__(shape, torch.Size((3, 3)), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: object = None) -> TangentNormal:
        """The same distribution for every element of a larger batch."""
        shape = (*batch_shape, 3, 3)
        new = TangentNormal(self.loc.expand(shape), self.scale_tril.expand(shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mode(self) -> Tensor:
        """(*batch, 3, 3)"""
        return self.loc

    def tangent(self, value: Tensor) -> Tensor:
        """Rotation vectors v (*batch, 3) in radians, |v| <= pi, with exp([v]x) loc the rotations (*batch, 3, 3)."""
        # The skew part of R loc^T is that of (R - loc) loc^T, where near rotations do not lose digits to the 1.
        apart = (value - self.loc) @ self.loc.mT
        return log(apart + torch.eye(3, dtype=apart.dtype, device=apart.device))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Rotations (*sample_shape, *batch, 3, 3)."""
        shape = torch.Size(sample_shape) + self.batch_shape
        white = torch.randn(*shape, 3, 1, dtype=self.loc.dtype, device=self.loc.device)
        return exp((self.scale_tril @ white).squeeze(-1)) @ self.loc

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of rotations (*batch, 3, 3): (*batch,)."""
        if self._validate_args:
            self._validate_sample(value)
        v = self.tangent(value)
        white = torch.linalg.solve_triangular(self.scale_tril, v[..., None], upper=False)
        square, distance = v.square().sum(-1), white.square().sum((-2, -1))
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = math.log(8 * math.pi**2) - 1.5 * math.log(2 * math.pi)
        return constant - log_det + log_jacobian(square) + _log_turns(square, distance, (-2 / 3 * log_det).exp())


def log_jacobian(square: Tensor) -> Tensor:
    """log of t^2 / (2 (1 - cos t)), of t^2: v's volume over the Haar measure of exp(v), t = |v|, but for a constant."""
    small = square < 0.01
    half = torch.where(small, torch.ones_like(square), square).sqrt() / 2
    series = square / 12 * (1 + square / 120 * (1 + square / 63))
    return torch.where(small, series, 2 * (half / half.sin()).log())


def _log_turns(square: Tensor, distance: Tensor, typical: Tensor) -> Tensor:
    """log of sum_n (t_n / t)^2 exp(-p t_n^2 / 2), t_n = t + 2 pi n, of t^2, p t^2 and the precision p where t is zero.

    Few turns count where p, the precision along the axis of v, is high, few Fourier terms (Poisson's summation) where
    it is low; at 1 / (2 pi) either sum is good to 1e-12.
    """
    level = 1e-8  # radians squared: of the pole at loc, and of the axes that meet there
    t = torch.where(square < 1e-30, torch.full_like(square, 1e-30), square).sqrt()
    precision = (distance + level * typical) / (square + level)
    terms = [-0.5 * distance]
    for n in (-3, -2, -1, 1, 2, 3):
        turn = (t + 2 * math.pi * n).square()
        terms.append((turn / (square + level)).log() - 0.5 * precision * turn)
    turns = torch.stack(terms).logsumexp(0)
    p = precision.clamp(1e-3, 1 / (2 * math.pi))  # below, the series is 1; above, it is not used
    series = 1 + sum(2 * (1 - k * k / p) * (-k * k / (2 * p)).exp() * (k * t).cos() for k in (1, 2, 3, 4))
    waves = (series / (square + level)).log() - 1.5 * precision.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(precision > 1 / (2 * math.pi), turns, waves)


class MatrixFisher(TorchDistribution):
    """p(R) = exp(tr(F^T R)) / c(F), the exponential family of the mean rotation. A prior: it samples by rejection.

    parameter: (*batch, 3, 3) F, any matrix. F = U S V^T with rotations U, V and s_1 >= s_2 >= |s_3| has its mode at
    U V^T, and the precision of small turns about the i-th column of U, a view axis, is the sum of the other two
    singular values: F = k R_0 has the standard deviation 1 / sqrt(2 k) radians about every axis.

    With q the quaternion of R mode^T along these axes tr(F^T R) - tr S = -2 sum_i (s_j + s_k) q_i^2, a Bingham density:
    near the mode nothing is lost to differences of traces, nor to rotations that float32 rounds. SO(3) algebra is done
    in float64, results have the dtype of F. Gradients are first order only: that in F is R - E R.
    Source: Khatri and Mardia, J. R. Stat. Soc. B 39 (1977) 95; Lee, IEEE Trans. Autom. Control 63 (2018) 3377.
    """

    arg_constraints = {"parameter": constraints.independent(constraints.real, 2)}  # noqa: RUF012
    support = rotation_matrix

    def __init__(self, parameter: Tensor, validate_args: bool | None = None) -> None:
        self.parameter = parameter
        u, s, vh = torch.linalg.svd(parameter.detach().double())
        flip_u, flip_v = _determinant(u).sign(), _determinant(vh).sign()
        self._u = torch.cat([u[..., :2], u[..., 2:] * flip_u[..., None, None]], -1)
        self._vh = torch.cat([vh[..., :2, :], vh[..., 2:, :] * flip_v[..., None, None]], -2)
        s = torch.cat([s[..., :2], s[..., 2:] * (flip_u * flip_v)[..., None]], -1)
        self._decay = 2 * (s.sum(-1, keepdim=True) - s).clamp_min(0)
        self._trace = s.sum(-1)
        self._log_c, self._moments = bingham.log_normaliser(self._decay)  # of exp(tr(F^T R) - tr S)
        super().__init__(parameter.shape[:-2], torch.Size((3, 3)), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: object = None) -> MatrixFisher:
        """The same distribution for every element of a larger batch."""
        new = self._get_checked_instance(MatrixFisher, _instance)
        shape = torch.Size(batch_shape)
        for name in ("parameter", "_u", "_vh"):
            setattr(new, name, getattr(self, name).expand(*shape, 3, 3))
        for name in ("_decay", "_moments"):
            setattr(new, name, getattr(self, name).expand(*shape, 3))
        for name in ("_trace", "_log_c"):
            setattr(new, name, getattr(self, name).expand(shape))
        super(MatrixFisher, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mode(self) -> Tensor:
        """(*batch, 3, 3), the rotation nearest to F; without gradient."""
        return (self._u @ self._vh).to(self.parameter.dtype)

    @property
    def mean(self) -> Tensor:
        """E R (*batch, 3, 3), not a rotation; without gradient."""
        return self._mean().to(self.parameter.dtype)

    @property
    def log_normaliser(self) -> Tensor:
        """log c(F) (*batch,); c(0) = 1. Its gradient is the mean."""
        return _WithGradient.apply(self._trace + self._log_c, self.parameter, self._mean()).to(self.parameter.dtype)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Rotations (*sample_shape, *batch, 3, 3)."""
        shape = torch.Size(sample_shape) + self.batch_shape
        turned = quaternion_to_matrix(bingham.sample(self._decay.expand(*shape, 3)))
        return (self._u @ turned @ self._vh).to(self.parameter.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of rotations (*batch, 3, 3): (*batch,)."""
        if self._validate_args:
            self._validate_sample(value)
        mode, rotation = self._u @ self._vh, value.double()
        relative = self._u.mT @ ((rotation - mode) @ mode.mT) @ self._u
        q = matrix_to_quaternion(relative + torch.eye(3, dtype=relative.dtype, device=relative.device))
        log_density = -(self._decay * q[..., :3].square()).sum(-1) - self._log_c
        parameter = self.parameter.expand(*log_density.shape, 3, 3)
        return _WithGradient.apply(log_density, parameter, rotation - self._mean()).to(self.parameter.dtype)

    def _mean(self) -> Tensor:
        # E of the diagonal of U^T R V is 1 - 2 (q_j^2 + q_k^2); by symmetry the rest is zero
        diagonal = 1 - 2 * (self._moments.sum(-1, keepdim=True) - self._moments)
        return self._u @ (diagonal[..., None] * self._vh)


class _WithGradient(torch.autograd.Function):
    """Values (*batch,) of a function of matrices (*batch, 3, 3), with its known gradient there (*batch, 3, 3).

    The gradient of a function of singular values needs no derivative of the singular vectors, which is infinite where
    singular values coincide. Second derivatives would lack their share of it, so that they are refused.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, matrix: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = matrix.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor, None]:
        if torch.is_grad_enabled() and ctx.needs_input_grad[1]:
            raise NotImplementedError("second derivatives in the parameter of a MatrixFisher; detach it")
        (gradient,) = ctx.saved_tensors
        return outer, (outer[..., None, None] * gradient).to(ctx.dtype), None


def _determinant(matrix: Tensor) -> Tensor:
    """(*batch, 3, 3) -> (*batch,)"""
    x, y, z = matrix.unbind(-2)
    return (torch.linalg.cross(x, y) * z).sum(-1)
