"""Numbers of nested cells: the bits of the indices along d axes, interleaved (Morton 1966).

A level halves every axis. Cell c has the 2^d children 2^d c .. 2^d c + 2^d - 1, and is itself a child of c >> d.
"""

from __future__ import annotations

import torch
from torch import Tensor


def interleave(index: tuple[Tensor, ...], level: int) -> Tensor:
    """Numbers (*batch,) int64 of cells from their index (*batch,), 0 .. 2^level - 1, on each axis, lowest bit first."""
    number = torch.zeros_like(index[0])
    for bit in range(level):
        for axis, along in enumerate(index):
            number = number | (along >> bit & 1) << len(index) * bit + axis
    return number


def separate(number: Tensor, axes: int, level: int) -> tuple[Tensor, ...]:
    """The index (*batch,) int64 along each axis, inverse of `interleave`."""
    return tuple(
        sum(((number >> axes * bit + axis & 1) << bit for bit in range(level)), torch.zeros_like(number))
        for axis in range(axes)
    )


def children(cell: Tensor, axes: int) -> Tensor:
    """The cells of the next level in each cell (*batch,): (*batch, 2^axes)."""
    return (cell[..., None] << axes) + torch.arange(1 << axes, device=cell.device)
