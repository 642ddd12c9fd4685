"""A nested grid on SO(3): level r has 72 x 8^r cells of equal Haar volume, each with 8 children at level r + 1.

A cell is a HEALPix pixel of view directions (12 faces of 2^r x 2^r pixels) times an interval of in-plane turns
(6 x 2^r of them): Yershova, Jain, LaValle and Mitchell, Int. J. Robotics Res. 29 (2010) 801. The number of a cell is
6 face + sixth of the turn, and then for every level three bits: of x, of y, of the turn.

The direction is (rot, tilt) of RELION's Euler angles, the last row of R. The turn is measured from an upright view of
that direction, and which view is upright is free: volumes stay equal. Shapes do not. RELION's psi winds once round
either pole, the Hopf coordinate psi + rot (upright by the least rotation from the north pole) twice round the south
pole: within a pixel at a pole rot varies by 90 degrees, at every level, and shears cells by 90 or 180 degrees.
Here upright is what the least rotation from the centre of the *face* makes of the view with psi = 0 there. It turns
by tan(a / 2) a radian at an angle a from that centre, and no face reaches beyond 48 degrees: the shear is below 0.45.
Cells beside each other across the border of two faces are not aligned, which nesting does not ask for.

Largest distance, in degrees, of a rotation from the centre of its cell and from the nearest centre (measured):

    level                              0     1     2     3     4
    step_deg                          60    30    15   7.5   3.8
    centre of its cell, here          56    33    18   9.4   4.8
    ... by RELION's psi               82    61    52    49    47
    ... by the Hopf coordinate       120   104    97    94    92
    nearest centre, here              51    28    14   6.7   3.3
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_cryo.physics import healpix, nested
from pyro_cryo.physics.asymmetric_unit import in_unit

TURNS = 6  # of level 0: 60 degrees, beside a pixel's 58.6
FINEST = 18  # what 63 bits hold


def count(level: int) -> int:
    """Number of cells of a level, 0 to 18. Each has the Haar volume 1 / count."""
    if not 0 <= level <= FINEST:
        raise ValueError(f"level {level} of the grid of rotations; expected 0 to {FINEST}")
    return 12 * TURNS * 8**level


def step_deg(level: int) -> float:
    """Length of the interval of turns; the side of a pixel (the root of its area) is 0.98 of it."""
    return 360 / TURNS / 2**level


def cells(level: int, symmetry: Tensor | None = None, device: torch.device | str | None = None) -> Tensor:
    """All cells of a level (n,) int64 in order, or those centred in the asymmetric unit of a point group (G, 3, 3).

    These are about 1 / G of all. Where pixels do not share the symmetry they leave gaps along the unit's border
    (15% of all orbits under I at level 2): a search that only descends into children begins with `covering`.
    """
    if symmetry is None:
        return torch.arange(count(level), device=device)
    pixel = torch.arange(12 * 4**level, device=symmetry.device)
    return _above(pixel[in_unit(healpix.centre(pixel, level), symmetry)], level)


def covering(level: int, symmetry: Tensor) -> Tensor:
    """Cells (n,) int64, in order, that hold of every rotation R an equivalent R @ S, S in a point group (G, 3, 3).

    They are `cells` and what fills the gaps, looked for at 64 points a pixel: up to 1.6 times 1 / G of all at level 2,
    1.3 at level 3. Some orbits are then in two cells.
    """
    if len(symmetry) == 1:
        return cells(level, device=symmetry.device)
    pixel = torch.arange(12 * 4**level, device=symmetry.device)
    kept = in_unit(healpix.centre(pixel, level), symmetry)
    point = healpix.centre(torch.arange(12 * 4 ** (level + 3), device=symmetry.device), level + 3)
    point = point[in_unit(point, symmetry)]
    images = healpix.pixel_of(torch.einsum("nj,gjk->ngk", point, symmetry.to(point)), level)
    kept[images[~kept[images].any(-1), 0]] = True
    return _above(pixel[kept], level)


def children(cell: Tensor) -> Tensor:
    """The cells of the next level in each cell (*batch,): (*batch, 8), from 8 cell on. The parent is cell // 8."""
    return nested.children(cell, 3)


def centres(cell: Tensor, level: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rotations (*batch, 3, 3) at the centres of cells (*batch,) of a level.

    The mean over all centres of a density of sd step / 1.3 is its integral to 1.3% at level 2 and 0.6% at level 3; but
    beside the poles, where pixels are kites, to 9%. Unbiased at any sd is the mean over one `uniform_in` of each cell.
    """
    return _at(cell, level, torch.full((*cell.shape, 3), 0.5, dtype=torch.float64, device=cell.device)).to(dtype)


def uniform_in(
    cell: Tensor, level: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rotations (*batch, 3, 3), one drawn from the Haar measure in each cell (*batch,) of a level.

    They keep 1e-6 of a face and of 60 degrees off the borders of cells, so that a cell still holds its draw in float32.
    """
    share = torch.rand(*cell.shape, 3, dtype=torch.float64, device=cell.device, generator=generator)
    margin = 1e-6 * 2**level
    return _at(cell, level, share.clamp(margin, 1 - margin)).to(dtype)


def cell_of(rotation: Tensor, level: int) -> Tensor:
    """The cells (*batch,) int64 of a level that hold rotations (*batch, 3, 3)."""
    rotation = rotation.double()
    face, x, y = healpix.face_point(rotation[..., 2, :])
    spin = rotation @ _upright(face, rotation[..., 2, :]).mT
    turn = (torch.atan2(spin[..., 0, 1], spin[..., 0, 0]) * (TURNS / (2 * math.pi))) % TURNS
    turn = turn.clamp_max(TURNS * (1 - torch.finfo(torch.float64).eps))
    sixth = turn.floor()
    index = tuple((share * 2**level).long() for share in (x, y, turn - sixth))
    return (TURNS * face + sixth.long()) * 8**level + nested.interleave(index, level)


def _at(cell: Tensor, level: int, share: Tensor) -> Tensor:
    """Rotations (*batch, 3, 3) float64 at shares (*batch, 3), of x, y and the turn, of the sides of cells (*batch,)."""
    root = cell // 8**level
    index = torch.stack(nested.separate(cell % 8**level, 3, level), -1)
    x, y, turn = ((index + share) / 2**level).unbind(-1)
    angle = 2 * math.pi / TURNS * (root % TURNS + turn)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    spin = torch.stack([cos, sin, zero, -sin, cos, zero, zero, zero, zero + 1], -1).unflatten(-1, (3, 3))
    return spin @ _upright(root // TURNS, healpix.direction(root // TURNS, x, y))


def _upright(face: Tensor, direction: Tensor) -> Tensor:
    """The view (*batch, 3, 3) without turn of directions (*batch, 3) in faces (*batch,): that of the face's centre
    (psi = 0), after the least rotation that takes the direction there."""
    middle = healpix.centre(torch.arange(12, device=face.device), 0)
    cos, sin = middle[:, 2], middle[:, :2].norm(dim=-1)
    east, zero = middle[:, :2] / sin[:, None], torch.zeros_like(sin)
    rows = [east[:, 0] * cos, east[:, 1] * cos, -sin, -east[:, 1], east[:, 0], zero, *middle.T]
    frame = torch.stack(rows, -1).unflatten(-1, (3, 3))[face]
    x, y, z = (frame @ torch.nn.functional.normalize(direction, dim=-1)[..., None])[..., 0].unbind(-1)
    xx, xy, yy = x * x / (1 + z), x * y / (1 + z), y * y / (1 + z)
    return torch.stack([1 - xx, -xy, -x, -xy, 1 - yy, -y, x, y, z], -1).unflatten(-1, (3, 3)) @ frame


def _above(pixel: Tensor, level: int) -> Tensor:
    """The cells of pixels (n,) at all turns, in order: (n x 6 x 2^level,)."""
    i, j = nested.separate(pixel % 4**level, 2, level)
    turn = torch.arange(TURNS * 2**level, device=pixel.device)
    root = TURNS * (pixel // 4**level)[:, None] + turn // 2**level
    i, j, w = torch.broadcast_tensors(i[:, None], j[:, None], turn % 2**level)
    return (root * 8**level + nested.interleave((i, j, w), level)).flatten().sort().values
