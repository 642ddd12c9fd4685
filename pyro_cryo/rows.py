"""Records of tensors that have a row for every image."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """A base for frozen dataclasses whose fields are all tensors (n, ...)."""

    def __getitem__(self, rows: Any) -> Self:
        """Those of some images: whatever indexes a tensor."""
        return type(self)(*(value[rows] for value in self.tensors))

    def __setitem__(self, rows: Any, other: Self) -> None:
        """Others in place of those of some images."""
        for mine, new in zip(self.tensors, other.tensors, strict=True):
            mine[rows] = new.to(mine.device)

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        return type(self)(*(value.to(device) for value in self.tensors))

    @classmethod
    def of(cls, parts: Iterable[Self]) -> Self:
        """The images of several, one after the other."""
        return cls(*(torch.cat(values) for values in zip(*(part.tensors for part in parts), strict=True)))

    @property
    def tensors(self) -> list[Tensor]:
        """The fields, in order."""
        return [getattr(self, field.name) for field in fields(self)]
