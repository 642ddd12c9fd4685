"""Rotations: maps to and from vectors, angles, Euler angles, the uniform measure and point groups."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_cryo.physics.rotations import (
    align_poses,
    angle_deg,
    exp,
    from_euler_deg,
    log,
    matrix_to_quaternion,
    orthogonality_error,
    point_group,
    quaternion_to_matrix,
    random_rotations,
    skew,
    to_euler_deg,
)


def vectors(angle: float, count: int = 200, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rotation vectors of one angle about random axes."""
    axes = torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (angle * torch.nn.functional.normalize(axes, dim=-1)).to(dtype)


ANGLES = [0.0, 1e-8, 1e-5, 3e-3, 9.9e-3, 1.01e-2, 0.3, 1.0, math.pi / 2, 2.5, math.pi - 1e-2, math.pi - 1e-5]


@pytest.mark.parametrize("angle", ANGLES)
def test_log_undoes_exp_in_double_precision(angle: float) -> None:
    v = vectors(angle)
    torch.testing.assert_close(log(exp(v)), v, rtol=0, atol=1e-6 * max(angle, 1e-3))


@pytest.mark.parametrize("angle", [*ANGLES, math.pi])
@pytest.mark.parametrize(("dtype", "tolerance_rad"), [(torch.float32, 2e-6), (torch.float64, 1e-9)])
def test_exp_undoes_log(angle: float, dtype: torch.dtype, tolerance_rad: float) -> None:
    rotation = exp(vectors(angle, dtype=dtype))
    again = exp(log(rotation))
    assert orthogonality_error(again) < tolerance_rad
    assert float(angle_deg(again.double(), rotation.double()).max()) < math.degrees(tolerance_rad)


@pytest.mark.parametrize("angle", [a for a in ANGLES if a < 3])
def test_log_undoes_exp_in_single_precision(angle: float) -> None:
    v = vectors(angle, dtype=torch.float32)
    assert float((log(exp(v)) - v).abs().max()) < 2e-6


def test_log_at_pi_has_length_pi_and_the_right_axis() -> None:
    v = vectors(math.pi)
    found = log(exp(v))
    torch.testing.assert_close(found.norm(dim=-1), v.norm(dim=-1))
    torch.testing.assert_close(found * (found * v).sum(-1, keepdim=True).sign(), v, rtol=0, atol=1e-6)


def test_exp_is_the_matrix_exponential_and_smooth_at_zero() -> None:
    v = torch.cat([vectors(a, 5) for a in ANGLES])
    torch.testing.assert_close(exp(v), torch.linalg.matrix_exp(skew(v)), rtol=0, atol=1e-12)
    zero = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(exp, (zero,))
    assert torch.autograd.gradcheck(exp, (vectors(0.7, 2).requires_grad_(),))


def test_log_has_a_gradient_at_the_identity() -> None:
    zero = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(log(exp(zero)).sum(), zero)
    torch.testing.assert_close(gradient, torch.ones_like(gradient))


def test_quaternions_round_trip_in_every_branch() -> None:
    rotation = torch.cat([random_rotations(500, torch.Generator().manual_seed(1)).double(), exp(vectors(math.pi, 50))])
    torch.testing.assert_close(quaternion_to_matrix(matrix_to_quaternion(rotation)), rotation, rtol=0, atol=1e-6)


def test_random_rotations_are_uniform() -> None:
    """Under the Haar measure E R = 0, E R_ij R_kl = d_ik d_jl / 3, and the angle has density (1 - cos a) / pi."""
    rotation = random_rotations(20_000, torch.Generator().manual_seed(2))
    assert orthogonality_error(rotation) < 1e-5
    flat = rotation.flatten(1)
    torch.testing.assert_close(flat.mean(0), torch.zeros(9), rtol=0, atol=0.02)
    torch.testing.assert_close(flat.T @ flat / len(flat), torch.eye(9) / 3, rtol=0, atol=0.015)
    angle = torch.deg2rad(angle_deg(rotation, torch.eye(3))).sort().values
    distribution = (angle - angle.sin()) / math.pi
    assert float((distribution - torch.linspace(0, 1, len(angle))).abs().max()) < 1.63 / math.sqrt(20_000)  # KS, 1%
    turned = exp(torch.tensor([0.4, -1.0, 0.3])) @ rotation
    assert float((turned.mean(0) - 0).abs().max()) < 0.02


@pytest.mark.parametrize("degrees", [0.0, 1e-3, 0.01, 1.0, 90.0, 179.0, 179.99])
def test_angles_are_right_in_single_precision(degrees: float) -> None:
    base = random_rotations(100, torch.Generator().manual_seed(3)).double()
    turned = exp(vectors(math.radians(degrees), 100)) @ base
    found = angle_deg(turned.float(), base.float())
    torch.testing.assert_close(found, torch.full_like(found, degrees), rtol=0, atol=3e-5)


def test_euler_angles_round_trip_also_at_the_poles() -> None:
    rng = np.random.default_rng(0)
    euler = np.stack([rng.uniform(-180, 180, 200), rng.uniform(0, 180, 200), rng.uniform(-180, 180, 200)], 1)
    np.testing.assert_allclose(to_euler_deg(from_euler_deg(euler)), euler, atol=1e-6)
    euler[::2, 1], euler[1::2, 1] = 0, 180
    rotation = from_euler_deg(euler)
    np.testing.assert_allclose(from_euler_deg(to_euler_deg(rotation)), rotation, atol=1e-7)


def test_relions_tilt_views_along_the_stated_direction() -> None:
    """rot and tilt are the azimuth and the colatitude of the viewing direction, R^T z; psi turns in the plane."""
    rot, tilt, psi = 25.0, 70.0, 130.0
    rotation = from_euler_deg(np.array([[rot, tilt, psi]]))[0]
    a, b = np.radians([rot, tilt])
    direction = [np.cos(a) * np.sin(b), np.sin(a) * np.sin(b), np.cos(b)]
    np.testing.assert_allclose(rotation[2], direction, atol=1e-12)
    flat = from_euler_deg(np.array([[0.0, 0.0, psi]]))[0]
    p = np.radians(psi)
    np.testing.assert_allclose(flat, [[np.cos(p), np.sin(p), 0], [-np.sin(p), np.cos(p), 0], [0, 0, 1]], atol=1e-12)


@pytest.mark.parametrize(
    ("name", "order"), [("C1", 1), ("C5", 5), ("c4", 4), ("D2", 4), ("D7", 14), ("T", 12), ("O", 24), ("I", 60)]
)
def test_point_groups_are_groups(name: str, order: int) -> None:
    group = point_group(name)
    assert group.shape == (order, 3, 3)
    torch.testing.assert_close(group[0], torch.eye(3), rtol=0, atol=1e-6)
    assert orthogonality_error(group) < 1e-5

    def nearest(rotation: Tensor) -> Tensor:
        """(n, m, 3, 3) -> which element each is, or -1."""
        distance = (rotation[..., None, :, :] - group).abs().amax((-2, -1))
        return torch.where(distance.amin(-1) < 1e-4, distance.argmin(-1), -1)

    products = nearest(group[:, None] @ group[None])
    for row in (*products, *products.T):  # each row and column holds every element once
        assert row.sort().values.tolist() == list(range(order))


def test_axes_of_point_groups() -> None:
    quarter = exp(torch.tensor([0.0, 0.0, math.pi / 2]))
    half_turn_x = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
    half_turn_y = torch.diag(torch.tensor([-1.0, 1.0, -1.0]))

    def holds(name: str, rotation: Tensor) -> bool:
        return float((point_group(name) - rotation).abs().amax((1, 2)).min()) < 1e-5

    assert holds("C4", quarter)
    assert holds("O", quarter)
    assert not holds("T", quarter)
    assert holds("D7", half_turn_x)
    assert all(holds(name, half) for name in "TOI" for half in (half_turn_x, half_turn_y))


@pytest.mark.parametrize("name", ["", "C", "C0", "D0", "X3", "I2", "C4 ", "T3", "C-1"])
def test_names_that_are_no_point_group_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"symmetry '.*' is not a point group; expected C1, C4"):
        point_group(name)


def test_what_is_not_a_rotation_is_found() -> None:
    good = random_rotations(10, torch.Generator().manual_seed(4))
    assert orthogonality_error(good) < 1e-5
    assert orthogonality_error(1.01 * good) == pytest.approx(0.0201, rel=1e-2)
    assert orthogonality_error(torch.cat([good, -good[:1]])) == math.inf
    assert orthogonality_error(torch.full((1, 3, 3), math.nan)) == math.inf


@pytest.mark.parametrize("flip", [False, True])
def test_poses_of_another_frame_and_hand_are_aligned(flip: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    reference = random_rotations(300, generator)
    turn = random_rotations(1, generator)[0]
    noise = exp(math.radians(1) * torch.randn(300, 3, generator=generator))
    found = noise @ reference @ turn
    found[:60] = random_rotations(60, generator)
    if flip:
        mirror = torch.diag(torch.tensor([1.0, 1.0, -1.0]))
        found = mirror @ found @ mirror
    aligned, flipped = align_poses(found, reference)
    assert flipped is flip
    assert float(angle_deg(aligned, reference)[60:].median()) < 1.8
