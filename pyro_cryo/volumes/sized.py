"""Modules whose buffers have the shape that the data gave them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Sized(nn.Module):
    """A saved state brings the shapes of its buffers with it."""

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        for name, buffer in list(self._buffers.items()):
            saved = state_dict.get(prefix + name)
            if buffer is not None and saved is not None and saved.shape != buffer.shape:
                setattr(self, name, buffer.new_zeros(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)
