"""How probable images are at points of z: what a population of shapes is learned from, free of the prior of z."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.coefficients import Seen
from pyro_cryo.guides.exact import ExactGuide
from pyro_cryo.inference.run import Run
from pyro_cryo.progress import Progress, quiet


def log_likelihoods(
    run: Run,
    particles: Particles,
    points: Tensor | np.ndarray,
    batch_size: int = 256,
    progress: Progress = quiet,
) -> Tensor:
    """log p(images_i | z_l) of n particles at points (L, zdim), less the largest of each particle: (n, L), nats.

    In one pass over the images, at their poses; of `run.particles`, where poses were found, at the best of each. The
    contrast is integrated out where a model's guide is exact (`at_points`); any other model is run at every point.
    Raises ValueError where points do not fit the model or are not finite, and where something beside z and the pose is
    latent.
    """
    z = torch.as_tensor(points, dtype=torch.float32, device=run.device)
    if run.model.zdim == 0:
        raise ValueError(f"{type(run.model).__name__} has no latent coordinate z; fit a heterogeneous model")
    if z.ndim != 2 or z.shape[1] != run.model.zdim or not len(z):
        raise ValueError(f"points of shape {tuple(z.shape)}; expected (L, {run.model.zdim})")
    wrong = (~torch.isfinite(z).all(1)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(f"point {wrong[0]} is {z[wrong[0]].tolist()}; expected finite numbers")
    guide = run.model.make_guide()  # not the run's, which may draw poses
    parts = []
    with torch.no_grad():
        batches = particles.batches(batch_size, device=run.device)
        for batch in progress(batches, particles.n_batches(batch_size), "likelihoods"):
            exact = isinstance(guide, ExactGuide)
            found = _solved(run, guide, batch, z) if exact else _evaluated(run, batch, z)  # type: ignore[arg-type]
            parts.append((found - found.amax(1, keepdim=True)).float().cpu())
    return torch.cat(parts)


def at_points(seen: Seen, y: Tensor, contrast_sd: Tensor) -> Tensor:
    """log p(x | y) - empty of particles (n,) at coefficients y (L, C), in double precision: (n, L).

    With b = projection . y and s = y . gram y, the contrast a ~ Normal(1, contrast_sd^2) integrated out:

        log int exp(a b - a^2 s / 2) p(a) da = b - s / 2 + (v (b - s)^2 - log(1 + contrast_sd^2 s)) / 2,
        v = contrast_sd^2 / (1 + contrast_sd^2 s).
    """
    y, gram, variance = y.double(), seen.gram.double(), contrast_sd.double().square()
    linear = seen.projection.double() @ y.T
    square = gram.flatten(1) @ (y[:, :, None] * y[:, None, :]).flatten(1).T
    grown = 1 + variance * square
    return linear - 0.5 * square + 0.5 * (variance / grown * (linear - square).square() - grown.log())


def _solved(run: Run, guide: ExactGuide, batch: Batch, z: Tensor) -> Tensor:
    """Of a model whose images are linear in coefficients: (n, L)."""
    coefficients: Any = run.model.coefficients
    return at_points(guide.seen(batch), coefficients.at(z), coefficients.contrast_sd)


def _evaluated(run: Run, batch: Batch, z: Tensor) -> Tensor:
    """Of any model, told z and the pose of every particle: (n, L)."""
    posed = {"rotation": batch.rotation[batch.first], "translation": batch.translation}
    columns = []
    for point in z:
        told = poutine.condition(run.model, {**posed, "z": point.expand(batch.particles, -1)})
        trace: Any = poutine.trace(told).get_trace(batch)
        left = [name for name in trace.stochastic_nodes if name != "particles"]
        if left:
            raise ValueError(
                f"{type(run.model).__name__} has the latent site {left[0]} beside z, and no closed form to integrate "
                "it out; give a model whose guide is exact, such as manifold or linear_subspace"
            )
        trace.compute_log_prob(lambda name, _: name == "image")
        columns.append(batch.window_power * trace.nodes["image"]["unscaled_log_prob"])
    return torch.stack(columns, 1)
