"""HEALPix: the sphere as twelve faces, each the unit square, mapped so that equal areas stay equal.

Source: Gorski et al., ApJ 622 (2005) 759; as an equal-area projection, Calabretta and Roukema, MNRAS 381 (2007) 865.
Faces 0-3 surround the north pole, 4-7 the equator, 8-11 the south pole; x of a face grows to the north east, y to the
north west. Level r has 12 x 4^r pixels of equal area, 2^r x 2^r a face, with the numbers of the nested scheme.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_cryo.physics.nested import interleave, separate


def centre(pixel: Tensor, level: int) -> Tensor:
    """Unit vectors (*batch, 3) float64 to the centres of pixels (*batch,) of a level."""
    x, y = ((index.double() + 0.5) / 2**level for index in separate(pixel % 4**level, 2, level))
    return direction(pixel // 4**level, x, y)


def pixel_of(vector: Tensor, level: int) -> Tensor:
    """The pixels (*batch,) int64 of a level that hold vectors (*batch, 3) of any length but zero."""
    face, x, y = face_point(vector)
    return face * 4**level + interleave(((x * 2**level).long(), (y * 2**level).long()), level)


def direction(face: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Unit vectors (*batch, 3) of points x, y (*batch,) float64 in [0, 1] of faces (*batch,)."""
    row = 1 - face // 4
    height = row + x + y - 1  # from -2 at the south pole to 2 at the north pole, in the plane of the projection
    east = x - y
    to_pole = 2 - height.abs()  # below 1 in the polar caps, where meridians converge
    cap = to_pole < 1
    third = to_pole.square() / 3
    cosine = torch.where(cap, height.sign() * (1 - third), height * 2 / 3)
    sine = torch.where(cap, third * (2 - third), 1 - cosine.square()).clamp_min(0).sqrt()
    east = torch.where(cap, east / to_pole.clamp_min(1e-300), east)
    azimuth = math.pi / 4 * (2 * (face % 4) + row.abs() + east)
    return torch.stack([azimuth.cos() * sine, azimuth.sin() * sine, cosine], -1)


def face_point(vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Faces (*batch,) int64, and points x, y (*batch,) float64 in [0, 1), of vectors (*batch, 3) other than 0."""
    unit = torch.nn.functional.normalize(vector.double(), dim=-1)
    cosine = unit[..., 2]
    azimuth = (torch.atan2(unit[..., 1], unit[..., 0]) * (4 / math.pi)) % 8
    quadrant = (azimuth / 2).floor().clamp_max(3)
    east = azimuth - 2 * quadrant - 1
    # The root of 3 (1 - |cosine|), through the sine: exact near the poles.
    to_pole = (3 * unit[..., :2].square().sum(-1) / (1 + cosine.abs())).sqrt()
    cap = to_pole < 1
    height = torch.where(cap, cosine.sign() * (2 - to_pole), 1.5 * cosine)
    east = torch.where(cap, east * to_pole, east)
    # In the quadrant's northern face: x < 0 beyond its south west side, y < 0 beyond its south east side.
    x, y = (height + east) / 2, (height - east) / 2
    west, south = x < 0, y < 0
    quadrant = quadrant.long()
    face = torch.where(west & south, 8 + quadrant, torch.where(west | south, 4 + (quadrant + south) % 4, quadrant))
    last = 1 - torch.finfo(torch.float64).eps
    return face, torch.where(west, x + 1, x).clamp(0, last), torch.where(south, y + 1, y).clamp(0, last)
