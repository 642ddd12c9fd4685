"""Every recipe fits, saves, loads and gives maps."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import hinge, simulate
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.run import Run
from pyro_cryo.inference.state import load_class
from pyro_cryo.recipes import recipes

SMALL: dict[str, Any] = {"zdim": 2, "width": 16, "layers": 1}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Particles:
    """64 images of 16 px."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Particles.open(simulate(hinge(5), tmp_path_factory.mktemp("few") / "case", n_images=64, box=16, seed=0))


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_fits_and_loads(name: str, few: Particles, tmp_path: Path, device: str) -> None:
    kind = load_class(name)
    known = inspect.signature(kind.__init__).parameters
    torch.manual_seed(0)
    model = kind(few.box, **{k: v for k, v in SMALL.items() if k in known})
    before = {k: v.clone() for k, v in model.named_parameters()}
    run = fit(model, few, tmp_path / "run", epochs=min(1, model.epochs), device=device)
    moved = [k for k, v in model.named_parameters() if not torch.equal(v.cpu(), before[k])]
    assert moved == list(before), "a parameter that the fit does not reach"
    z = None if model.zdim == 0 else torch.tensor(run.latent.z[:2])
    loaded = Run.load(tmp_path / "run", device=device)
    maps = run.volume(z)
    assert bool(torch.isfinite(maps).all())
    assert float(maps.std()) > 0
    torch.testing.assert_close(loaded.volume(z), maps)
    assert loaded.records == run.records
