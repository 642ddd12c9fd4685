"""Views of a symmetric volume: of the rotations R @ S, S in a point group, which all look alike, one is taken.

The asymmetric unit holds the view directions (the last row of R) that are nearer to a fixed reference than to any of
its images under the group; the in-plane turn is free. It is bounded by great circles, covers 1 / G of the sphere, and
has one of every G equivalent directions, but on its border. The reference lies on no mirror plane of the groups: then
the pixels of a grid that shares the symmetry do not fall on the border, and rounding decides nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

REFERENCE = (0.3, 0.137, 0.94)


def in_unit(direction: Tensor, symmetry: Tensor) -> Tensor:
    """Which view directions (*batch, 3) are in the asymmetric unit of a group (G, 3, 3), identity first: (*batch,)."""
    return _nearest(direction, symmetry) == 0


def to_unit(rotation: Tensor, symmetry: Tensor) -> Tensor:
    """Of each R (*batch, 3, 3) the equivalent R @ S that views from the unit of a group (G, 3, 3), identity first."""
    return rotation @ symmetry.to(rotation)[_nearest(rotation[..., 2, :], symmetry)]


def _nearest(direction: Tensor, symmetry: Tensor) -> Tensor:
    """The number (*batch,) of the S for which the direction d @ S is nearest to the reference."""
    reference = torch.tensor(REFERENCE, dtype=torch.float64, device=direction.device)
    return (direction.double() @ (symmetry.to(reference) @ reference).T).argmax(-1)
