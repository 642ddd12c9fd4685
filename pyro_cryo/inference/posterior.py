"""Posteriors of particles as ArviZ takes them: draws by chain, draw and particle, with names and units."""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_cryo.data.batch import AT_ONCE, Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.pixels import window_power
from pyro_cryo.inference.draws import drawn, picked, predicted
from pyro_cryo.inference.importance import LEAST
from pyro_cryo.inference.pose_matching import with_matched_poses
from pyro_cryo.physics.rotations import log
from pyro_cryo.progress import Progress, quiet

if TYPE_CHECKING:
    from pyro_cryo.inference.run import Run

Tables = dict[str, dict[str, Tensor]]  # by group and variable: draws, or 1, along the first axis

AXES = {
    "z": ["zdim"],
    "rotation": ["view_axis", "map_axis"],
    "turn": ["view_axis"],
    "translation": ["image_axis"],
    "image": ["coefficient", "part"],
}  # after draw and particle; of other sites they are numbered
NAMES: dict[str, list[Any]] = {
    "view_axis": list("xyz"),
    "map_axis": list("xyz"),
    "image_axis": list("xy"),
    "part": ["real", "imaginary"],
}
UNITS = {"translation": "pixels of the model's box", "turn": "degrees", "log_weight": "nats", "log_evidence": "nats"}
OF_PARTICLES = ("pareto_k", "log_evidence", "corrected")  # the same at every draw
COPIES = 16  # of images whose poses are drawn: what several read of a grid stays in a processor's cache
TREMOR = 1e-4  # nats of noise on log likelihoods that are the same at every draw, which ArviZ takes for a failure


def posterior(
    run: Run,
    particles: Particles,
    draws: int = 500,
    *,
    index: Sequence[int] | None = None,
    weighed: int = 50,
    corrected: bool = False,
    predictive: int = 0,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress = quiet,
) -> Any:
    """Draws of all that is latent about particles: ArviZ's InferenceData, from ArviZ 1.0 on xarray's DataTree.

    draws:      of each particle, from the run's guide
    index:      numbers by which the particles are named; default: their places
    weighed:    so many of them are weighed beside the model, each by a look at the images: for k and log p(images)
    corrected:  weigh all, and pick draws by their weights where k is below 0.7: then they are the exact posterior's.
                Of poses that were found the guide is matched to the posterior's masses and moments first
                (`inference.pose_matching`), 400 looks at each mode of an image
    predictive: so many of them have images that the model makes of them, which are large: they lie in a temporary file
    batch_size: images looked at together, which bounds what is in memory beside the result (default: as many as have
                260,000 coefficients, copies for draws of poses counted)

    posterior:      z, contrast; where poses are not known rotation (volume axes to view axes), turn (rotation vector
                    from the best pose) and translation; sigma of the noise, given all else
    sample_stats:   log_weight, NaN where not weighed; of each particle pareto_k, log_evidence and corrected
    log_likelihood: image, log p(images of a particle) with all that is latent integrated out, at the maps, noise and
                    priors as they were fitted, less what noise of each image's own spectrum would make it: the same
                    for every fit, and small enough for `az.compare` to find its weights. The same at every draw but
                    for a tremor of 1e-4, so that `az.loo` and `az.compare` add it up and leave nothing out. It compares
                    fits by particles that were not fitted. Of those that were `analysis.loo` leaves each out, over
                    draws of the maps
    posterior_predictive, observed_data: image, with predictive images

    The dimensions are chain, draw and particle. Where particles have several images these are the dimension view,
    particle by particle, and the coordinate of_particle says whose each is.
    """
    if draws < 1 or weighed < 0 or not 0 <= predictive <= draws:
        raise ValueError(
            f"{draws} draws, {weighed} weighed, {predictive} with images; expected 1 or more, of these 0 or more"
        )
    if corrected and draws < LEAST:
        raise ValueError(f"{draws} draws have no tail that tells whether they can be corrected; give {LEAST} or more")
    weighed = draws if corrected else min(weighed, draws)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if batch_size is None:
            copies = 1 if run.poses is None else COPIES
            batch_size = max(1, AT_ONCE // (copies * len(particles.half)))
        count = {"posterior_predictive": predictive, "observed_data": min(predictive, 1)}
        images = {group: _on_disk(s, len(particles), len(particles.half), 2) for group, s in count.items() if s}
        done = 0
        batches = run.batches(particles, batch_size)
        for batch in progress(batches, particles.n_batches(batch_size), "posterior"):
            part = _of_batch(run, batch, draws, weighed, corrected, predictive, generator)
            for group, all_images in images.items():
                all_images[:, done : done + len(batch)] = part.pop(group)["image"]
            done += len(batch)
            parts.append(part)
        sigma = noise_draws(run, draws)
    tables = {
        group: {name: torch.cat([part[group][name] for part in parts], 1) for name in table}
        for group, table in parts[0].items()
    } | {group: {"image": all_images} for group, all_images in images.items()}
    names = range(particles.n_particles) if index is None else index
    return as_arviz(tables, sigma, names, described(run, particles), particles.particle.sort().values)


def _on_disk(*shape: int) -> Tensor:
    """Zeros in a temporary file, which goes when they do: memory holds what is looked at."""
    size = 4 * math.prod(shape)
    with tempfile.TemporaryFile() as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # or a full disk is told by a bus error
        except AttributeError:  # where the system has none
            pass
        except OSError as error:
            folder = tempfile.gettempdir()
            raise OSError(
                f"{size / 1e9:.1f} GB of images do not fit into {folder}; give fewer (predictive), or let TMPDIR name "
                "a larger folder"
            ) from error
        return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))


def _of_noise(batch: Batch) -> Tensor:
    """log p of the images of each particle (n,), were they noise with the power that each has in each shell."""
    half = batch.half
    square = batch.image.double().square().sum(-1)
    power = square.new_zeros(len(batch), half.shells).index_add_(1, half.shell, square)
    count = 2 * half.shell.bincount(minlength=half.shells)
    told = count * ((2 * math.pi * power / count.clamp_min(1)).log() + 1)
    return -0.5 * batch.window_power * batch.by_particle(torch.where(power > 0, told, 0.0).sum(1))


def noise_draws(run: Run, draws: int) -> Tensor:
    """sigma (draws, noise groups, shells) from its posterior given all else, log sigma alike everywhere a priori.

    Of the m real components of a shell in the images of a group the mean square is known, and with it m sigma^2 over it
    is chi-square with m degrees of freedom; of windowed images, which tell less, with fewer.
    """
    images = torch.bincount(run.particles.noise_group, minlength=len(run.model.log_sigma))
    count = 2 * images[:, None] * torch.bincount(run.particles.half.shell, minlength=run.model.log_sigma.shape[1])
    half = 0.5 * count.clamp_min(1).double() * window_power(run.particles.box, run.particles.window)
    drawn = torch.distributions.Gamma(half, half).sample((draws,))
    return run.model.sigma.detach().cpu() * torch.where(count > 0, drawn.rsqrt().float(), 1.0)


def described(run: Run, particles: Particles) -> dict[str, Any]:
    """What tells whether two log likelihoods are of the same images, seen in the same way."""
    return {
        "model": type(run.model).__name__,
        "run": str(run.folder or ""),
        "images": particles.fingerprint(),
        "box": particles.box,
        "apix": particles.apix,
        "window": particles.window or 0.0,
        "normalize": int(particles.normalize),
        "invert": int(particles.invert),
    }


def as_arviz(tables: Tables, sigma: Tensor, index: Sequence[int], attributes: dict[str, Any], shown: Tensor) -> Any:
    """InferenceData, or a DataTree, of tables (draws, particles or views, ...) of particles with these numbers.

    shown: (views,) the place of each view's particle
    """
    import xarray as xr

    groups = {}
    for group, table in tables.items():
        once = table if group == "observed_data" else OF_PARTICLES
        variables = {name: _variable(name, value, len(index), name in once) for name, value in table.items()}
        if group == "posterior":
            variables["sigma"] = (["chain", "draw", "noise_group", "shell"], sigma.numpy()[None], {})
        data = xr.Dataset(variables, attrs=attributes)
        names = {**NAMES, "particle": list(index)}
        named: dict[Any, Any] = {axis: names.get(str(axis), list(range(size))) for axis, size in data.sizes.items()}
        if "view" in data.sizes:
            named["of_particle"] = ("view", np.asarray(index)[shown.numpy()])
        groups[group] = data.assign_coords(named)
    if int(version("arviz").split(".")[0]) >= 1:
        return xr.DataTree.from_dict(groups)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # ArviZ tells of its own future when imported
        from arviz import InferenceData
    return InferenceData(**groups)  # type: ignore[arg-type]


def _variable(name: str, value: Tensor, count: int, once: bool) -> tuple[list[str], np.ndarray, dict[str, str]]:
    own = AXES.get(name, [f"{name}_{axis}" for axis in range(value.ndim - 2)])[: value.ndim - 2]
    dims = ["chain", "draw", "particle" if value.shape[1] == count else "view", *own]
    unit = {"units": UNITS[name]} if name in UNITS else {}
    if once:
        return dims[2:], value[0].numpy(), unit
    return dims, value.numpy()[None], unit


def _of_batch(
    run: Run, batch: Batch, draws: int, weighed: int, corrected: bool, predictive: int, generator: torch.Generator
) -> Tables:
    if corrected and run.poses is not None:
        run = with_matched_poses(run, batch)
    found = drawn(run, batch, draws, weighed)
    kept = picked(found, batch, draws, generator) if corrected else found
    sites, log_weight = dict(kept.sites), kept.log_weight.cpu()
    each = [found.shared | {name: value[s] for name, value in sites.items()} for s in range(predictive)]
    images = [predicted(run, batch, given) for given in each]
    if "rotation" in sites:
        assert run.poses is not None
        best = run.poses[batch.index[batch.first].to(run.poses.rotation.device)].best[0].to(batch.image.device)
        sites["turn"] = log(sites["rotation"] @ best.mT).rad2deg()
    tables: Tables = {"posterior": {name: value.cpu() for name, value in sites.items()}}
    if weighed:
        evidence = found.log_weight.cpu().double().logsumexp(0, keepdim=True) - math.log(weighed)
        rest = log_weight.new_full((draws - weighed, batch.particles), math.nan)
        tables["sample_stats"] = {
            "log_weight": torch.cat([log_weight, rest]),
            "pareto_k": found.smoothed[1][None],
            "log_evidence": evidence,
            "corrected": (found.trusted & corrected)[None],
        }
        tremor = TREMOR * torch.randn(draws, batch.particles).double()
        tables["log_likelihood"] = {"image": evidence - _of_noise(batch).cpu() + tremor}
    if predictive:
        tables["posterior_predictive"] = {"image": torch.stack(images).cpu()}
        tables["observed_data"] = {"image": batch.image[None].cpu()}
    return tables
