"""Rotations: sampling, exponential map, geodesic distance, Euler angles, point groups.

A rotation is a (3, 3) matrix R that takes volume axes to view axes: projection(x, y) = integral over z of
V(R^T (x, y, z)), so that a slice at the 2-D frequency k is the volume's transform at k @ R.
"""

from __future__ import annotations

import math
import re

import numpy as np
import torch
from torch import Tensor


def random_rotations(n: int, generator: torch.Generator | None = None) -> Tensor:
    """n rotations from the Haar (uniform) measure: (n, 3, 3). Normalised Gaussian quaternions (Shoemake 1992)."""
    return quaternion_to_matrix(torch.randn(n, 4, generator=generator))


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Scalar-last quaternions (*batch, 4), of any length but zero, to matrices (*batch, 3, 3)."""
    x, y, z, w = (quaternion / quaternion.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
        2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
        2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def tilt(angle_deg: float) -> Tensor:
    """The view turned about its x axis, (3, 3): a particle at R is seen at tilt(angle_deg) @ R."""
    return exp(torch.tensor([math.radians(angle_deg), 0.0, 0.0]))


def exp(vector: Tensor) -> Tensor:
    """Rotation vectors in radians (*batch, 3) to matrices (*batch, 3, 3): Rodrigues' formula, smooth at zero."""
    square = vector.square().sum(-1)[..., None, None]
    small = square < 1e-4
    angle = torch.where(small, torch.ones_like(square), square).sqrt()
    a = torch.where(small, 1 - square / 6 * (1 - square / 20), torch.sin(angle) / angle)
    b = torch.where(small, 0.5 - square / 24 * (1 - square / 30), 2 * torch.sin(angle / 2).square() / angle.square())
    k = skew(vector)
    return torch.eye(3, dtype=vector.dtype, device=vector.device) + a * k + b * (k @ k)


def log(rotation: Tensor) -> Tensor:
    """Rotation vectors in radians (*batch, 3), |v| <= pi, of matrices (*batch, 3, 3), through the unit quaternion."""
    q = matrix_to_quaternion(rotation)
    q = q * torch.where(q[..., 3:] < 0, -1.0, 1.0)
    sine = q[..., :3].norm(dim=-1, keepdim=True)
    half_angle = torch.atan2(sine, q[..., 3:])
    ratio = torch.where(sine > 1e-6, 2 * half_angle / sine.clamp_min(1e-12), 2 / q[..., 3:].clamp_min(1e-3))
    return q[..., :3] * ratio


def matrix_to_quaternion(rotation: Tensor) -> Tensor:
    """Scalar-last unit quaternions (*batch, 4): of the four ways to divide, the stable one (Shepperd 1978)."""
    m = rotation
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    a, b, c = m[..., 2, 1], m[..., 0, 2], m[..., 1, 0]
    d, e, f = m[..., 1, 2], m[..., 2, 0], m[..., 0, 1]
    candidates = torch.stack(
        [
            torch.stack([1 + xx - yy - zz, f + c, b + e, a - d], -1),
            torch.stack([f + c, 1 - xx + yy - zz, a + d, b - e], -1),
            torch.stack([b + e, a + d, 1 - xx - yy + zz, c - f], -1),
            torch.stack([a - d, b - e, c - f, 1 + xx + yy + zz], -1),
        ],
        -2,
    )
    best = torch.stack([xx - yy - zz, yy - xx - zz, zz - xx - yy, xx + yy + zz], -1).argmax(-1)
    q = torch.gather(candidates, -2, best[..., None, None].expand(*best.shape, 1, 4)).squeeze(-2)
    return q / q.norm(dim=-1, keepdim=True)


def skew(vector: Tensor) -> Tensor:
    """The matrix [v]x with [v]x w = v x w: (*batch, 3) -> (*batch, 3, 3)."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))


def angle_deg(a: Tensor, b: Tensor) -> Tensor:
    """Geodesic distance in degrees between rotations (*batch, 3, 3).

    By atan2 of the skew part and the trace of the relative rotation: acos of the trace alone is zero below 0.05
    degrees in float32.
    """
    relative = a @ b.mT
    vector = torch.stack(
        [
            relative[..., 2, 1] - relative[..., 1, 2],
            relative[..., 0, 2] - relative[..., 2, 0],
            relative[..., 1, 0] - relative[..., 0, 1],
        ],
        -1,
    )
    trace = relative.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.rad2deg(torch.atan2(vector.norm(dim=-1), trace - 1))


def from_euler_deg(euler: np.ndarray) -> np.ndarray:
    """RELION's (rot, tilt, psi) in degrees (N, 3) to matrices (N, 3, 3): the inverse of Rz(rot) Ry(tilt) Rz(psi)."""
    angle = np.radians(np.asarray(euler, float))
    cos, sin = np.cos(angle), np.sin(angle)
    (ca, cb, cc), (sa, sb, sc) = cos.T, sin.T
    rows = [
        ca * cb * cc - sa * sc, sa * cb * cc + ca * sc, -sb * cc,
        -ca * cb * sc - sa * cc, -sa * cb * sc + ca * cc, sb * sc,
        ca * sb, sa * sb, cb,
    ]  # fmt: skip
    return np.stack(rows, -1).reshape(*angle.shape[:-1], 3, 3)


def to_euler_deg(rotation: np.ndarray) -> np.ndarray:
    """Matrices (N, 3, 3) to RELION's (rot, tilt, psi) in degrees (N, 3); psi = 0 where tilt is 0 or 180."""
    m = np.asarray(rotation, float)
    sine = np.hypot(m[..., 2, 0], m[..., 2, 1])
    tilt = np.arctan2(sine, m[..., 2, 2])
    flat = sine < 1e-7
    rot = np.where(flat, np.arctan2(-m[..., 1, 0], m[..., 1, 1]), np.arctan2(m[..., 2, 1], m[..., 2, 0]))
    psi = np.where(flat, 0.0, np.arctan2(m[..., 1, 2], -m[..., 0, 2]))
    return np.degrees(np.stack([rot, tilt, psi], -1))


def point_group(name: str) -> Tensor:
    """Rotations (n, 3, 3) of a point group: C1, C2, ... Cn, D2, ... Dn, T, O or I; the identity comes first.

    Axes as in RELION for Cn (n-fold along z), Dn (n-fold along z, 2-fold along x) and O (4-folds along x, y, z).
    T has its 2-folds and I three of its 2-folds along x, y and z (turn poses of other settings first).
    Symmetry of a volume: V(S r) = V(r), so R and R @ S give the same projection.
    """
    match = re.fullmatch(r"([CD])(\d+)|([TOI])", name.upper())
    if match is None or (match.group(2) is not None and int(match.group(2)) < 1):
        raise ValueError(f"symmetry {name!r} is not a point group; expected C1, C4, D7, T, O or I")
    if match.group(3) is None:
        n = int(match.group(2))
        turn = 2 * math.pi / n * torch.arange(n, dtype=torch.float64)
        group = exp(torch.stack([torch.zeros_like(turn), torch.zeros_like(turn), turn], -1))
        if match.group(1) == "D":
            group = torch.cat([group, group @ torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))])
        return group.float()
    from scipy.spatial.transform import Rotation

    polyhedral = Rotation.create_group(name.upper()).as_matrix()  # type: ignore[arg-type]
    order = np.argsort(-np.trace(polyhedral, axis1=1, axis2=2), kind="stable")
    return torch.from_numpy(polyhedral[order]).float()


def align_poses(rotation: Tensor, reference: Tensor, tries: int = 200) -> tuple[Tensor, bool]:
    """Rotations (N, 3, 3) in the frame, and with the hand, of reference poses (N, 3, 3); whether the hand was flipped.

    Poses that were found without a map are right up to one rotation Q of it, R @ Q, and up to its mirror image, which
    the views M R M show, M = diag(1, 1, -1). Q is what brings most poses to within 20 degrees.
    """
    mirror = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=rotation.dtype, device=rotation.device))
    best, flipped, q, hand = math.inf, False, mirror, rotation
    for flip in (False, True):
        own = mirror @ rotation @ mirror if flip else rotation
        step, judged = -(-len(own) // tries), -(-len(own) // 1000)
        for candidate in own[::step].mT @ reference[::step]:
            cost = float(angle_deg(own[::judged] @ candidate, reference[::judged]).clamp_max(20).mean())
            if cost < best:
                best, flipped, q, hand = cost, flip, candidate, own
    for _ in range(3):
        close = angle_deg(hand @ q, reference) < 20
        if not bool(close.any()):
            break
        u, _, vh = torch.linalg.svd((hand[close].mT @ reference[close]).sum(0))
        sign = torch.ones_like(u[0])
        sign[2] = torch.linalg.det(u @ vh).sign()
        q = u @ torch.diag(sign) @ vh
    return hand @ q, flipped


def orthogonality_error(rotation: Tensor) -> float:
    """Largest |R R^T - 1| of (N, 3, 3), or infinity where a determinant is not positive."""
    error = (rotation @ rotation.mT - torch.eye(3, dtype=rotation.dtype)).abs().max()
    proper = bool((torch.linalg.det(rotation) > 0).all())
    return float(error) if proper and math.isfinite(float(error)) else math.inf
