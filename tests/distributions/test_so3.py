"""Distributions of rotations: they integrate to one over SO(3), draws follow them, gradients are finite and right."""

import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor

from pyro_cryo.distributions import MatrixFisher, TangentNormal, UniformRotation, bingham
from pyro_cryo.distributions.so3 import rotation_matrix
from pyro_cryo.physics.rotations import angle_deg, exp, matrix_to_quaternion, orthogonality_error, random_rotations

F64 = torch.float64
DEGREE = math.pi / 180
LOC = exp(torch.tensor([0.4, -1.1, 0.7], dtype=F64))
SHAPE = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.7, 0.0], [-0.6, 0.3, 1.5]], dtype=F64)  # of an anisotropic scale_tril
KS = 1.95  # of sqrt(n) times the largest difference, at a significance of 1e-3

TURNED = exp(torch.tensor([[0.3, 0.2, -0.9], [-1.0, 0.8, 0.1]], dtype=F64))
FISHERS = {
    "uniform": torch.zeros(3, 3, dtype=F64),
    "isotropic": 2.5 * LOC,
    "general": TURNED[0] @ torch.diag(torch.tensor([6.0, 3.0, 1.0], dtype=F64)) @ TURNED[1],
    "negative": TURNED[0] @ torch.diag(torch.tensor([5.0, 2.0, -1.5], dtype=F64)) @ TURNED[1],
    "ring": torch.diag(torch.tensor([4.0, 0.0, 0.0], dtype=F64)),
    "sphere": torch.diag(torch.tensor([2.0, 2.0, -2.0], dtype=F64)),
}


def product_rule(nodes: int) -> tuple[Tensor, Tensor]:
    """Rotations Rz(a) Ry(b) Rz(c) (n, 3, 3) and weights (n,) of the Haar measure, exact for band-limited functions."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    turn = 2 * math.pi / (2 * nodes) * torch.arange(2 * nodes, dtype=F64)
    zero = torch.zeros_like(turn)
    tilt = torch.as_tensor(x).acos()
    about_z = exp(torch.stack([zero, zero, turn], -1))
    about_y = exp(torch.stack([0 * tilt, tilt, 0 * tilt], -1))
    rotation = about_z[:, None, None] @ about_y[:, None] @ about_z
    weight = torch.as_tensor(w)[:, None].expand(2 * nodes, nodes, 2 * nodes) / 2 / (2 * nodes) ** 2
    return rotation.reshape(-1, 3, 3), weight.reshape(-1)


def ball_rule(radius: float, nodes: int = 40, axes: int = 24) -> tuple[Tensor, Tensor]:
    """Rotations (n, 3, 3) with angles below radius about the identity, and weights (n,) of the Haar measure.

    Gauss-Legendre in angle and in the axis's z, trapezoid in its azimuth; the angle's measure is (1 - cos t) / pi dt.
    """
    x, w = (torch.as_tensor(v) for v in np.polynomial.legendre.leggauss(nodes))
    z, w_z = (torch.as_tensor(v) for v in np.polynomial.legendre.leggauss(axes))
    t, azimuth = radius * (x + 1) / 2, math.pi / axes * torch.arange(2 * axes, dtype=F64)
    ring = torch.stack([azimuth.cos(), azimuth.sin(), torch.zeros_like(azimuth)], -1)
    pole = torch.tensor([0.0, 0.0, 1.0], dtype=F64)
    axis = (1 - z.square()).sqrt()[:, None, None] * ring + z[:, None, None] * pole
    weight = (w * radius / 2 * 2 * (t / 2).sin().square() / math.pi)[:, None, None] * w_z[:, None] / 2 / (2 * axes)
    return exp(t[:, None, None, None] * axis).reshape(-1, 3, 3), weight.expand(-1, -1, 2 * axes).reshape(-1)


PRODUCT = product_rule(20)


def integral(density: dist.Distribution, rule: tuple[Tensor, Tensor], centre: Tensor | None = None) -> float:
    rotation, weight = rule
    points = rotation if centre is None else rotation @ centre
    return float((density.log_prob(points).exp() * weight).sum())


def assert_angles_follow(density: dist.Distribution, drawn: Tensor, centre: Tensor, radius: float) -> None:
    """Kolmogorov and Smirnov's test of the angles to a centre against the integral of the density over balls."""
    rotation, weight = ball_rule(radius)
    shell = (density.log_prob(rotation @ centre).exp() * weight).view(40, -1).sum(-1)
    t, w = (torch.as_tensor(v) for v in np.polynomial.legendre.leggauss(40))
    # the angles' density as a polynomial through the nodes, integrated from 0
    series = np.polynomial.legendre.Legendre(np.polynomial.legendre.legfit(t.numpy(), (shell / w).numpy(), 39)).integ()
    angle = angle_deg(drawn.double(), centre).sort().values * DEGREE
    x = (2 * angle.clamp(max=radius) / radius - 1).numpy()
    expected = torch.as_tensor(series(x) - series(-1.0))
    n = len(angle)
    assert float((expected - (torch.arange(n, dtype=F64) + 0.5) / n).abs().max()) < KS / math.sqrt(n)


def assert_moments_follow(density: dist.Distribution, drawn: Tensor, rule: tuple[Tensor, Tensor]) -> None:
    """E R and E R_ij R_kl of draws are those of the density, to within 4.5 standard errors."""
    points, weight = rule
    mass = density.log_prob(points).exp() * weight

    def products(rotation: Tensor) -> Tensor:
        flat = rotation.flatten(1)
        return torch.cat([flat, (flat[:, :, None] * flat[:, None, :]).flatten(1)], 1)

    found, expected = products(drawn.double()), (mass[:, None] * products(points)).sum(0)
    error = (found.mean(0) - expected) / (found.std(0) / math.sqrt(len(found)) + 1e-7)
    assert float(error.abs().max()) < 4.5


def test_the_rules_integrate_the_haar_measure() -> None:
    """E 1 = 1, E R = 0 and E R_ij R_kl = d_ik d_jl / 3, by either rule."""
    for rotation, weight in (PRODUCT, ball_rule(math.pi, 20)):
        flat = rotation.flatten(1)
        torch.testing.assert_close(weight.sum(), torch.tensor(1.0, dtype=F64))
        torch.testing.assert_close(weight @ flat, torch.zeros(9, dtype=F64), rtol=0, atol=1e-12)
        second = (weight[:, None] * flat).mT @ flat
        torch.testing.assert_close(second, torch.eye(9, dtype=F64) / 3, rtol=0, atol=1e-12)


def test_the_uniform_has_density_one_and_haar_draws() -> None:
    pyro.set_rng_seed(0)
    uniform = UniformRotation((3,), dtype=F64)
    drawn = uniform.sample((4000, 2))
    assert drawn.shape == (4000, 2, 3, 3, 3)
    assert drawn.dtype == F64
    assert torch.equal(uniform.log_prob(drawn), torch.zeros(4000, 2, 3, dtype=F64))
    assert_angles_follow(UniformRotation(), drawn.reshape(-1, 3, 3), LOC, math.pi)
    assert uniform.expand([5, 3]).sample().shape == (5, 3, 3, 3)


def test_what_is_not_a_rotation_is_refused() -> None:
    good = random_rotations(4, torch.Generator().manual_seed(0))
    bad = torch.stack([1.001 * good[0], -good[1], torch.full((3, 3), math.nan), good[3]])
    assert rotation_matrix.check(good).tolist() == [True] * 4
    assert rotation_matrix.check(bad).tolist() == [False, False, False, True]
    with pytest.raises(ValueError, match="loc"):
        TangentNormal(bad, torch.eye(3), validate_args=True)
    for density in (UniformRotation(), TangentNormal(good[0], torch.eye(3)), MatrixFisher(good[0])):
        with pytest.raises(ValueError, match="support"):
            density.log_prob(bad)


@pytest.mark.parametrize("scale", [0.15, 0.25, 0.4])
def test_a_tangent_normal_integrates_to_one_over_euler_angles(scale: float) -> None:
    """A measure that knows nothing of rotation vectors; the narrowest and the widest that these nodes resolve."""
    density = TangentNormal(LOC, scale * (SHAPE if scale > 0.15 else 2 * torch.eye(3, dtype=F64)))
    assert integral(density, PRODUCT) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("scale", [0.01 * DEGREE, 0.1 * DEGREE, 0.1, 0.5, 1.0, 2.0, 4.0, 1e4])
def test_a_tangent_normal_integrates_to_one_from_narrow_to_wide(scale: float) -> None:
    isotropic = TangentNormal(LOC, scale * torch.eye(3, dtype=F64))
    anisotropic = TangentNormal(LOC, scale * SHAPE)
    rule = ball_rule(min(8 * scale, math.pi), axes=2)
    assert integral(isotropic, rule, LOC) == pytest.approx(1, abs=1e-4)
    rule = ball_rule(min(9 * scale, math.pi))
    assert integral(anisotropic, rule, LOC) == pytest.approx(1, abs=1e-4)


def test_a_tangent_normal_is_a_sum_over_turns() -> None:
    """Against more turns than the density sums, where a sum and its Fourier series meet, and in the far limits."""
    axis = torch.tensor([0.6, 0.0, 0.8], dtype=F64)
    t = torch.linspace(0.01, math.pi, 50, dtype=F64)[:, None]
    for scale in (0.3, 1.0, 2.4, 2.6, 10.0):
        scale_tril = scale * SHAPE
        turn = t + 2 * math.pi * torch.arange(-60, 61, dtype=F64)
        gauss = dist.MultivariateNormal(torch.zeros(3, dtype=F64), scale_tril=scale_tril)
        terms = gauss.log_prob(turn[..., None] * axis) + 2 * turn.abs().log()
        expected = terms.logsumexp(-1) - (2 * (t[:, 0] / 2).sin().square() * 2).log() + math.log(8 * math.pi**2)
        found = TangentNormal(LOC, scale_tril).log_prob(exp(t * axis) @ LOC)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7 if scale < 0.5 else 1e-3)
        torch.testing.assert_close(found[10:], expected[10:], rtol=0, atol=1e-6)
    wide = TangentNormal(LOC, 1e3 * torch.eye(3, dtype=F64)).log_prob(exp(t * axis) @ LOC)
    torch.testing.assert_close(wide[10:], -(1 - t.cos()).log()[10:, 0], rtol=0, atol=1e-6)
    v = 1e-4 * torch.randn(20, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    narrow = TangentNormal(LOC, 1e-4 * SHAPE)
    gauss = dist.MultivariateNormal(torch.zeros(3, dtype=F64), scale_tril=1e-4 * SHAPE)
    found = narrow.log_prob(exp(v) @ LOC) - math.log(8 * math.pi**2)
    torch.testing.assert_close(found, gauss.log_prob(v), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [0.1 * DEGREE, 0.5, 1.2])
def test_draws_of_a_tangent_normal_follow_its_density(scale: float) -> None:
    pyro.set_rng_seed(1)
    density = TangentNormal(LOC, scale * SHAPE)
    drawn = density.sample((20_000,))
    assert orthogonality_error(drawn) < 1e-12
    radius = min(9 * scale, math.pi)
    assert_angles_follow(density, drawn, LOC, radius)
    if scale > 0.3:
        rotation, weight = ball_rule(radius)
        assert_moments_follow(density, drawn, (rotation @ LOC, weight))
    else:
        torch.testing.assert_close(torch.cov(density.tangent(drawn).T) / scale**2, SHAPE @ SHAPE.T, rtol=0, atol=0.06)


def test_the_tangent_is_in_view_axes() -> None:
    """A turn about view z moves R's view x and y axes in the plane, and leaves the direction of view."""
    turn = torch.tensor([0.0, 0.0, 0.2], dtype=F64)
    rotation = exp(turn) @ LOC
    torch.testing.assert_close(rotation[2], LOC[2])
    torch.testing.assert_close(TangentNormal(LOC, SHAPE).tangent(rotation), turn)
    assert torch.equal(TangentNormal(LOC, SHAPE).mode, LOC)


@pytest.mark.parametrize("scale", [0.01 * DEGREE, 0.1 * DEGREE, 0.2, 1.0, 3.0, 100.0])
def test_a_tangent_normal_keeps_its_digits_in_single_precision(scale: float) -> None:
    """What is left is the rounding of the rotations themselves: 1e-7 radians of a spread."""
    pyro.set_rng_seed(2)
    loc, scale_tril = LOC.float(), (scale * SHAPE).float()
    single, double = TangentNormal(loc, scale_tril), TangentNormal(LOC, scale * SHAPE)
    v = (
        torch.linspace(0, 3, 200, dtype=F64)[:, None]
        * scale
        * torch.nn.functional.normalize(torch.randn(200, 3, dtype=F64), dim=-1)
    )
    value = exp(v) @ LOC
    away = double.tangent(value).norm(dim=-1) > (0.1 if scale > 0.5 else -1)  # from the pole of wide ones

    def with_slope(density: TangentNormal, at: Tensor) -> tuple[Tensor, Tensor]:
        turn = torch.zeros(200, 3, dtype=at.dtype, requires_grad=True)
        log_prob = density.log_prob(exp(turn) @ at)
        return log_prob.detach(), torch.autograd.grad(log_prob.sum(), turn)[0]

    for found, expected in zip(with_slope(single, value.float()), with_slope(double, value), strict=True):
        error = (found - expected).abs()[away] * (min(scale, 1) if found.ndim == 2 else 1)
        assert float(error.max()) < 2e-5 + 2e-6 / scale
    drawn = single.sample((100,))
    assert drawn.dtype == torch.float32
    assert orthogonality_error(drawn) < 2e-6
    assert float(single.tangent(drawn).norm(dim=-1).median()) > 0.5 * min(scale, 2)


EDGES = [0.0, 1e-12, 1e-9, 1e-6, 1e-4, 0.09, 0.11, 1.0, 3.0, math.pi - 1e-6, math.pi]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("scale", [0.01 * DEGREE, 0.1 * DEGREE, 0.3, 1.0, 30.0])
def test_a_tangent_normal_and_its_gradients_are_finite_everywhere(scale: float, dtype: torch.dtype) -> None:
    axes = torch.nn.functional.normalize(
        torch.tensor([[1.0, 2, 2], [0, 0, 1], [1, 0, 0], [0, -1, 1]], dtype=F64), dim=-1
    )
    v = (torch.tensor(EDGES, dtype=F64)[:, None, None] * axes).reshape(-1, 3).to(dtype)
    loc, scale_tril = LOC.to(dtype, copy=True).requires_grad_(), (scale * SHAPE).to(dtype).requires_grad_()
    value = (exp(v) @ LOC.to(dtype)).requires_grad_()
    log_prob = TangentNormal(loc, scale_tril).log_prob(value)
    gradients = torch.autograd.grad(log_prob.sum(), (loc, scale_tril, value))
    assert all(bool(g.isfinite().all()) for g in (log_prob, *gradients))
    at_loc = TangentNormal(torch.eye(3, dtype=dtype), scale_tril.detach()).log_prob(torch.eye(3, dtype=dtype))
    if scale < 0.5:
        peak = (
            math.log(8 * math.pi**2 / (2 * math.pi) ** 1.5) - float(SHAPE.diagonal().log().sum()) - 3 * math.log(scale)
        )
        assert float(at_loc) == pytest.approx(peak, abs=1e-4)


@pytest.mark.parametrize(
    ("scale", "angle"),
    [(0.05, 0.0), (0.05, 0.3), (0.05, 2.0), *((s, a) for s in (0.8, 3.0) for a in (0.05, 0.3, 2.0, math.pi))],
)
def test_gradients_of_a_tangent_normal_are_those_of_differences(scale: float, angle: float) -> None:
    """At loc, on the way and on the far side, to the rotation, to loc and to the scale."""
    v = torch.tensor([[0.6, 0.0, 0.8], [0.0, 0.0, 1.0]], dtype=F64) * angle
    scale_tril = scale * SHAPE

    def by_tangents(value: Tensor, loc: Tensor, factor: Tensor) -> Tensor:
        return TangentNormal(exp(loc) @ LOC, factor.tril(), validate_args=False).log_prob(exp(value) @ LOC)

    zero = torch.zeros(3, dtype=F64)
    inputs = tuple(x.clone().requires_grad_() for x in (v, zero, scale_tril))
    assert torch.autograd.gradcheck(by_tangents, inputs, atol=1e-4, rtol=1e-4)


def test_draws_of_a_tangent_normal_are_differentiable() -> None:
    def draw(turn: Tensor, factor: Tensor) -> Tensor:
        torch.manual_seed(3)
        return TangentNormal(exp(turn) @ LOC, factor.tril(), validate_args=False).rsample((2,))

    turn = torch.zeros(3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(draw, (turn, (0.4 * SHAPE).requires_grad_()))


@pytest.mark.parametrize("name", FISHERS)
def test_a_matrix_fisher_is_its_exponential_and_integrates_to_one(name: str) -> None:
    parameter = FISHERS[name]
    density = MatrixFisher(parameter)
    rotation, weight = PRODUCT
    exponent = (parameter * rotation).sum((-2, -1))
    brute = (exponent.exp() * weight).sum().log()
    torch.testing.assert_close(density.log_normaliser, brute, rtol=0, atol=1e-8)
    torch.testing.assert_close(density.log_prob(rotation), exponent - brute, rtol=0, atol=1e-8)
    mean = ((exponent - brute).exp() * weight) @ rotation.flatten(1)
    torch.testing.assert_close(density.mean.flatten(), mean, rtol=0, atol=1e-8)
    assert float(density.log_prob(density.mode)) >= float(density.log_prob(rotation).max()) - 1e-9
    assert bool(rotation_matrix.check(density.mode))


@pytest.mark.parametrize("name", FISHERS)
def test_the_gradient_of_the_normaliser_is_the_mean_also_where_singular_values_coincide(name: str) -> None:
    parameter = FISHERS[name].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: MatrixFisher(f).log_normaliser, (parameter,), eps=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(MatrixFisher(parameter).log_normaliser, parameter)
    torch.testing.assert_close(gradient, MatrixFisher(parameter).mean)
    v = torch.tensor([[0.0, 0.0, 0.0], [0.3, -1.0, 0.4], [0.0, math.pi, 0.0]], dtype=F64, requires_grad=True)

    def log_prob(f: Tensor, turn: Tensor) -> Tensor:
        return MatrixFisher(f).log_prob(exp(turn) @ LOC)

    assert torch.autograd.gradcheck(log_prob, (parameter, v), eps=1e-4, atol=1e-5)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(MatrixFisher(parameter).log_normaliser, parameter, create_graph=True)


@pytest.mark.parametrize("degrees", [0.01, 0.1, 1.0, 10.0])
def test_a_narrow_matrix_fisher_integrates_to_one_and_has_the_stated_spread(degrees: float) -> None:
    spread = degrees * DEGREE
    isotropic = MatrixFisher(LOC / (2 * spread**2))
    rule = ball_rule(min(9 * spread, math.pi), axes=2)
    assert integral(isotropic, rule, isotropic.mode) == pytest.approx(1, abs=1e-7)
    ratio = torch.tensor([3.0, 1.0, -0.5], dtype=F64)
    general = MatrixFisher(TURNED[0] @ torch.diag(ratio / spread**2) @ TURNED[1])
    assert integral(general, ball_rule(min(10 * spread, math.pi), 50), general.mode) == pytest.approx(1, abs=1e-6)
    step = 1e-2 * spread * torch.eye(3, dtype=F64) @ TURNED[0].T  # along each column of U
    drop = general.log_prob(general.mode) - general.log_prob(exp(step) @ general.mode)
    precision = 2 * drop / (1e-2 * spread) ** 2
    torch.testing.assert_close(precision * spread**2, torch.tensor([0.5, 2.5, 4.0], dtype=F64), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "decay", [[0.0, 0.0, 0.0], [0.0, 1e-3, 3e6], [0.0, 0.0, 1e5], [2e-2, 7.0, 7.0], [1e4, 2e6, 5e7]]
)
def test_the_bingham_normaliser_is_the_integral_over_quaternions(decay: list[float]) -> None:
    """q = (sqrt(1 - r) (cos a, sin a), sqrt(r) (cos b, sin b)), r, a, b uniform; the angles give Bessel functions."""
    d = torch.tensor(decay, dtype=F64, requires_grad=True)
    # r = q_3^2 + q_4^2 on a grid that is dense at both ends
    x, w = (torch.as_tensor(v) for v in np.polynomial.legendre.leggauss(400))
    z, reach = 45 * x, 45.0
    r, rest = torch.sigmoid(z), torch.sigmoid(-z)

    def averaged(a: Tensor, b: Tensor, size: Tensor) -> Tensor:
        """Mean over an angle of exp(-size (a cos^2 + b sin^2))."""
        return torch.special.i0e(size * (a - b) / 2) * torch.exp(-size * torch.minimum(a, b))

    c = (w * reach * r * rest * averaged(d[0], d[1], rest) * averaged(d[2], d.new_zeros(()), r)).sum()
    log_c, moments = bingham.log_normaliser(d)
    torch.testing.assert_close(log_c, c.log(), rtol=0, atol=2e-9)
    (slope,) = torch.autograd.grad(c.log(), d)
    torch.testing.assert_close(moments, -slope, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", FISHERS)
def test_draws_of_a_matrix_fisher_follow_its_density(name: str) -> None:
    pyro.set_rng_seed(4)
    density = MatrixFisher(FISHERS[name])
    drawn = density.sample((20_000,))
    assert orthogonality_error(drawn) < 1e-12
    assert_angles_follow(density, drawn, density.mode, math.pi)
    assert_moments_follow(density, drawn, PRODUCT)


@pytest.mark.parametrize("degrees", [0.01, 0.1, 5.0])
def test_draws_of_a_narrow_matrix_fisher_have_its_covariance(degrees: float) -> None:
    pyro.set_rng_seed(5)
    spread = degrees * DEGREE
    ratio = torch.tensor([3.0, 1.0, -0.5], dtype=F64)
    density = MatrixFisher(TURNED[0] @ torch.diag(ratio / spread**2) @ TURNED[1])
    drawn = density.sample((20_000,))
    v = TangentNormal(density.mode, SHAPE).tangent(drawn) @ TURNED[0] / spread
    torch.testing.assert_close(
        torch.cov(v.T), torch.diag(1 / torch.tensor([0.5, 2.5, 4.0], dtype=F64)), rtol=0, atol=0.09
    )
    assert_angles_follow(density, drawn, density.mode, min(10 * spread, math.pi))


@pytest.mark.parametrize("concentration", [0.0, 1e-3, 1.0, 1e2, 3e5, 1e7])
def test_a_matrix_fisher_keeps_its_digits_in_single_precision(concentration: float) -> None:
    """From the uniform to 0.01 degrees; what is left is the rounding of the rotations, 1e-7 radians of a spread."""
    pyro.set_rng_seed(6)
    single = MatrixFisher((concentration * FISHERS["general"]).float())
    double = MatrixFisher(single.parameter.double())
    drawn = double.sample((300,))
    found = single.log_prob(drawn.float())
    assert found.dtype == torch.float32
    error = (found - double.log_prob(drawn)).abs()
    assert float(error.max()) < 3e-5 + 2e-6 * math.sqrt(concentration)
    parameter = single.parameter.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(MatrixFisher(parameter).log_prob(drawn.float()).sum(), parameter)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient.double(), (drawn - double.mean).sum(0), rtol=0, atol=1e-4)
    assert single.sample().dtype == torch.float32


def batches() -> list[Callable[[], dist.TorchDistribution]]:
    loc = random_rotations(4, torch.Generator().manual_seed(1))
    scale_tril = torch.tensor([0.1, 0.3, 1.0, 3.0])[:, None, None] * SHAPE.float()
    parameter = torch.stack(list(FISHERS.values())[:4]).float()
    return [lambda: UniformRotation((4,)), lambda: TangentNormal(loc, scale_tril), lambda: MatrixFisher(parameter)]


@pytest.mark.parametrize("make", batches(), ids=["uniform", "tangent", "fisher"])
def test_batches_broadcast_and_expand(make: Callable[[], dist.TorchDistribution]) -> None:
    pyro.set_rng_seed(7)
    density = make()
    assert (density.batch_shape, density.event_shape) == ((4,), (3, 3))
    wide = density.expand([2, 4])
    assert wide.batch_shape == (2, 4)
    assert wide.sample((5,)).shape == (5, 2, 4, 3, 3)
    value = density.sample((7, 1))
    assert value.shape == (7, 1, 4, 3, 3)
    torch.testing.assert_close(wide.log_prob(value), density.log_prob(value).expand(7, 2, 4))
    single = density.log_prob(value[0, 0, 0])  # one rotation under every member
    torch.testing.assert_close(single[0], density.log_prob(value)[0, 0, 0])
    assert wide.expand([3, 2, 4]).log_prob(value[0]).shape == (3, 2, 4)
    with pytest.raises(ValueError, match="support"):
        wide.log_prob(2 * value)


def test_a_loc_without_batch_takes_a_batch_of_scales() -> None:
    density = TangentNormal(LOC, torch.tensor([0.1, 0.2], dtype=F64)[:, None, None] * SHAPE)
    assert density.batch_shape == (2,)
    assert density.sample().shape == (2, 3, 3)


@pytest.mark.parametrize("make", batches(), ids=["uniform", "tangent", "fisher"])
def test_they_are_sites_in_a_plate(make: Callable[[], dist.TorchDistribution]) -> None:
    """The evidence of an observation that says nothing of the rotation is the observation's own, with q the prior."""
    pyro.set_rng_seed(8)

    def guide() -> None:
        with pyro.plate("views", 3, dim=-2), pyro.plate("particles", 4, dim=-1):
            pyro.sample("rotation", make())

    def model() -> None:
        with pyro.plate("views", 3, dim=-2), pyro.plate("particles", 4, dim=-1):
            rotation = pyro.sample("rotation", make())
            assert rotation.shape == (3, 4, 3, 3)
            pyro.sample("image", dist.Normal(0 * rotation[..., 0, 0], 1.0), obs=torch.ones(3, 4))

    expected = -12 * float(dist.Normal(0.0, 1.0).log_prob(torch.tensor(1.0)))
    assert Trace_ELBO().loss(model, guide) == pytest.approx(expected, rel=1e-5)


def test_locs_of_an_enumerated_cell_broadcast() -> None:
    """cell ~ Categorical, rotation | cell ~ TangentNormal: enumeration gives the mixture's density."""
    pyro.set_rng_seed(9)
    loc = random_rotations(5)
    scale_tril = 0.7 * SHAPE.float()
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(5)), TangentNormal(loc, scale_tril.expand(5, 3, 3)))
    seen = mixture.sample((4,))
    shapes = []

    @config_enumerate
    def model() -> None:
        with pyro.plate("particles", 4, dim=-1):
            cell = pyro.sample("cell", dist.Categorical(torch.ones(5)))
            shapes.append(cell.shape)
            pyro.sample("rotation", TangentNormal(loc[cell], scale_tril), obs=seen)

    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda: None)
    assert shapes[-1] == (5, 1)
    assert loss == pytest.approx(-float(mixture.log_prob(seen).sum()), rel=1e-5)


def test_mixtures_are_those_of_pyro() -> None:
    pyro.set_rng_seed(10)
    loc = random_rotations(6).double().view(2, 3, 3, 3)
    weight = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]], dtype=F64)
    parts = TangentNormal(loc, 0.4 * SHAPE)
    mixture = dist.MixtureSameFamily(dist.Categorical(weight), parts)
    assert (mixture.batch_shape, mixture.event_shape) == ((2,), (3, 3))
    drawn = mixture.sample((20_000,))
    assert drawn.shape == (20_000, 2, 3, 3)
    found = mixture.log_prob(drawn)
    assert found.shape == (20_000, 2)
    expected = (parts.log_prob(drawn[:, :, None]) + weight.log()).logsumexp(-1)
    torch.testing.assert_close(found, expected)
    first = dist.MixtureSameFamily(dist.Categorical(weight[0]), TangentNormal(loc[0], 0.4 * SHAPE))
    assert integral(first, PRODUCT) == pytest.approx(1, abs=1e-3)
    assert_moments_follow(first, drawn[:, 0], PRODUCT)


def test_a_matrix_fisher_is_the_bingham_of_its_quaternions() -> None:
    """tr(F^T R) is a quadratic form of the quaternion, so F = diag(s) gives exp(-sum 2 (s_j + s_k) q_i^2)."""
    s = torch.tensor([3.0, 2.0, -1.0], dtype=F64)
    rotation = random_rotations(50, torch.Generator().manual_seed(2)).double()
    q = matrix_to_quaternion(rotation)[:, :3]
    density = MatrixFisher(torch.diag(s))
    expected = -(2 * (s.sum() - s) * q.square()).sum(-1) - bingham.log_normaliser(2 * (s.sum() - s))[0]
    torch.testing.assert_close(density.log_prob(rotation), expected, rtol=0, atol=1e-5)
