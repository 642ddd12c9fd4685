"""A descent small enough to repeat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pyro_cryo.data.particles import Particles
from pyro_cryo.models.cryodrgn import CryoDRGN


@pytest.fixture
def particles(toy: Path) -> Particles:
    """80 images of 16 px: 5 batches a pass."""
    return Particles.open(toy, box=16, first=80)


@pytest.fixture
def small_model() -> Callable[..., CryoDRGN]:
    """A small network for them, with starting values of a seed."""

    def build(seed: int = 0, **arguments: int) -> CryoDRGN:
        torch.manual_seed(seed)
        return CryoDRGN(16, **{"zdim": 2, "width": 16, "layers": 1, **arguments})

    return build


@pytest.fixture
def tensors() -> Callable[..., dict[str, Tensor]]:
    """Every parameter and buffer of some modules, copied."""

    def copied(*modules: nn.Module) -> dict[str, Tensor]:
        states = [module.state_dict() for module in modules]
        return {
            f"{i}.{name}": value.clone()
            for i, state in enumerate(states)
            for name, value in state.items()
            if isinstance(value, Tensor)
        }

    return copied
