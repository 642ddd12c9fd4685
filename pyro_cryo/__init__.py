"""Cryo-EM reconstruction as probabilistic programming.

from pyro_cryo import CryoModel, Particles, Run, fit
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["CryoModel", "Particles", "Run", "fit"]

_HOMES = {
    "CryoModel": "pyro_cryo.model",
    "Particles": "pyro_cryo.data.particles",
    "Run": "pyro_cryo.inference.run",
    "fit": "pyro_cryo.inference.fit",
}


def __getattr__(name: str) -> Any:
    """The four names of a user's script, imported when asked for: PyTorch takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pyro_cryo' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
