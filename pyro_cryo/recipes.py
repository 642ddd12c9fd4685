"""The models that come with the package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def recipes() -> list[str]:
    """Their names, found without loading them."""
    spec = find_spec("pyro_cryo.models")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return sorted(path.stem for folder in folders for path in Path(folder).glob("[!_]*.py"))
