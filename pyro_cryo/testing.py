"""The contract that every model keeps, checked on a few simulated images: for the author of a variant.

from pyro_cryo.testing import check_model
check_model(lambda box: MyModel(box, zdim=2))
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import hinge, simulate
from pyro_cryo.inference.elbo import ReparameterisedELBO
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.run import Run
from pyro_cryo.model import CryoModel

BOX = 16
COUNT = 64


def check_model(factory: Callable[[int], CryoModel], device: str = "cpu", seed: int = 0, views: int = 1) -> None:
    """Raise AssertionError, saying what is wrong, unless the model of a box keeps the contract.

    z and image are sampled under these names, with finite densities; an image is the event, and its density does not
    depend on the others of its batch; a fit reaches every parameter and leaves maps; a saved run loads to the same
    numbers, by its class and arguments where a file or a module has the class. Takes seconds.

    views: images that each particle has; with 2 the model is asked for one z a tilt pair
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        particles = Particles.open(
            simulate(hinge(5), Path(folder) / "case", n_images=COUNT, box=BOX, snr=1.0, seed=seed)
        )
        shown = torch.arange(COUNT) // views
        particles = replace(particles, table=replace(particles.table, particle=shown))
        torch.manual_seed(seed)
        model = factory(particles.box)
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        run = fit(model, particles, Path(folder) / "run", epochs=min(1, model.epochs) or None, seed=seed, device=device)
        _check_sites(run, particles.batch(slice(0, 8), device))
        _check_parts(run, particles.batch(slice(0, 8), device))
        still = [name for name, value in model.named_parameters() if torch.equal(value.detach().cpu(), before[name])]
        assert not still, f"parameter {still[0]} is not reached by the fit; use it in a hook, or make it a buffer"
        _check_maps(run)
        typed = "<locals>" in type(model).__qualname__ or type(model).__module__ == "__main__"
        same = factory(particles.box) if typed else None
        again = Run.load(Path(folder) / "run", model=same, particles=particles, device=device)
        z = None if model.zdim == 0 else torch.as_tensor(run.latent.z[:2])
        assert again.records == run.records, "a loaded run has another log"
        assert torch.allclose(again.volume(z), run.volume(z), atol=1e-5), "a loaded run gives other maps"


def _check_sites(run: Run, batch: Batch) -> None:
    guide: Any
    model: Any
    with torch.no_grad():
        guide = poutine.trace(run.guide).get_trace(batch)  # type: ignore[arg-type, call-arg]
        model = poutine.trace(poutine.replay(run.model, guide)).get_trace(batch)  # type: ignore[call-arg]
    model.compute_log_prob()
    guide.compute_log_prob()
    sampled = {name: site for name, site in model.nodes.items() if site["type"] == "sample"}
    sites = {name: site for name, site in sampled.items() if type(site["fn"]).__name__ != "_Subsample"}
    assert "image" in sites, "no site `image`; let forward be CryoModel's, or observe the images under that name"
    for name, site in sites.items():
        assert bool(torch.isfinite(site["log_prob"]).all()), f"the density of {name} is not finite"
        assert not isinstance(site["value"], Tensor) or site["value"].device.type == batch.image.device.type, (
            f"{name} is on {site['value'].device}, the images on {batch.image.device}; make what it needs a buffer"
        )
    shape = tuple(sites["image"]["log_prob"].shape)
    assert shape == (batch.particles,), (
        f"log p(image) has shape {shape}, expected ({batch.particles},): one number a particle, of all its images"
    )
    if run.model.zdim:
        assert "z" in sites, f"zdim is {run.model.zdim}, but no site is called z"
        found = tuple(sites["z"]["value"].shape)
        expected = (batch.particles, run.model.zdim)
        assert found == expected, f"z is {found}, expected {expected}: one a particle"
        mean, covariance = run.guide.posterior(batch)  # type: ignore[union-attr, operator]
        assert mean.shape == found, f"the guide's posterior mean is {tuple(mean.shape)}, expected {found}"
        assert covariance.shape == (*found, found[1]), f"the guide's covariance is {tuple(covariance.shape)}"


def _check_parts(run: Run, batch: Batch) -> None:
    """Given one draw of what is latent, the log density of a batch is that of its particles one by one, added up."""

    def densities(some: Tensor, drawn: dict[str, Any]) -> Tensor:
        rows = torch.isin(batch.particle, some).nonzero().flatten()
        images = replace(batch[rows], shown=torch.arange(len(some), device=some.device))
        of = {batch.particles: some, len(batch): rows}
        given = {name: value if name == "volume" else value[of[len(value)]] for name, value in drawn.items()}
        trace: Any = poutine.trace(poutine.condition(run.model, given)).get_trace(images)
        trace.compute_log_prob()
        return trace.nodes["image"]["log_prob"]

    every = torch.arange(batch.particles, device=batch.index.device)
    with torch.no_grad():
        guide: Any = poutine.trace(run.guide).get_trace(batch)  # type: ignore[arg-type, call-arg]
        values = {name: guide.nodes[name]["value"] for name in guide.stochastic_nodes}
        drawn = {name: value for name, value in values.items() if isinstance(value, Tensor) and name != "particles"}
        symmetry = getattr(run.model, "symmetry", None)
        if isinstance(symmetry, Tensor):
            run.model.symmetry = symmetry[:1]  # of equivalent views one is drawn at random
        whole = densities(every, drawn)
        parts = torch.cat([densities(every[:1], drawn), densities(every[1:], drawn)])
    assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-2), "a particle's density depends on the others of its batch"
    loss = ReparameterisedELBO()(run.model, run.guide)(batch)  # type: ignore[arg-type]
    assert bool(torch.isfinite(loss)), "the ELBO is not finite"


def _check_maps(run: Run) -> None:
    box, zdim = run.model.box, run.model.zdim
    z = None if zdim == 0 else torch.as_tensor(run.latent.z[:2])
    maps = run.volume(z)
    expected = (box, box, box) if zdim == 0 else (2, box, box, box)
    assert maps.shape == expected, f"maps are {tuple(maps.shape)}, expected {expected}"
    assert bool(torch.isfinite(maps).all()), "maps are not finite"
    assert float(maps.std()) > 0, "maps are empty"
