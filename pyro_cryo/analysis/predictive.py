"""Posterior predictive checks: are the images what the fitted model would have made?

At one draw of an image's latents from its posterior, (image - mean) / sd is white noise of variance 1 where model and
noise are right. A draw, not the posterior mean: (latents, image) is then a draw of the story, and no correction is due
for what the latents fitted. Of images that made the map the residual is smaller by what it fitted of their noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.inference.reconstruct import add_shells
from pyro_cryo.inference.run import Run


@dataclass(frozen=True)
class ResidualPower:
    """What a model leaves of images, |image - mean|^2 / (2 sd^2), averaged by noise group and shell.

    power: (noise groups, D / 2 + 1) 1 where the noise is as fitted; NaN where there is no coefficient
    count: (noise groups, D / 2 + 1) coefficients behind each
    """

    power: Tensor
    count: Tensor

    def band(self, level: float = 0.99) -> tuple[Tensor, Tensor]:
        """Between which all of them lie together with probability `level` where the noise is right: (G, L) each.

        2 count power ~ chi-square of 2 count degrees of freedom, the level split evenly (Sidak).
        """
        from scipy.stats import chi2

        if not 0 < level < 1:
            raise ValueError(f"level is {level:g}; expected between 0 and 1, for example 0.99")
        degrees = np.where(self.count > 0, 2 * self.count.double(), np.nan)
        tail = (1 - level ** (1 / max(1, int((self.count > 0).sum())))) / 2
        low, high = (torch.from_numpy(chi2.ppf(p, degrees) / degrees) for p in (tail, 1 - tail))
        return low, high


@dataclass(frozen=True)
class ImageFit:
    """How N images fit, each against what the model expects of it at one draw of its latents.

    index:      (N,) rows of the images
    chi_square: (N,) sum over an image's numbers of (image - mean)^2 / sd^2
    degrees:    2 P, the numbers in an image, which is what chi_square is about
    match:      (N,) (image - mean) . mean / |mean|, whitened: Normal(0, 1) where the particle is there as expected,
                about -|mean| where there is none
    """

    index: NDArray[np.integer]
    chi_square: NDArray[np.floating]
    degrees: int
    match: NDArray[np.floating]

    @property
    def z_score(self) -> NDArray[np.floating]:
        """(N,) chi_square in standard deviations from what is expected."""
        return (self.chi_square - self.degrees) / (2 * self.degrees) ** 0.5

    @property
    def p_value(self) -> NDArray[np.floating]:
        """(N,) how often an image of the model has a larger chi_square: small where noise is too strong."""
        from scipy.stats import chi2

        return chi2.sf(self.chi_square, self.degrees)

    @property
    def match_p_value(self) -> NDArray[np.floating]:
        """(N,) how often one matches less: small for images of nothing, or of another particle."""
        from scipy.stats import norm

        return norm.cdf(self.match)

    def junk(self, rate: float = 0.05) -> NDArray[np.integer]:
        """Rows of the images that fit worse than the model's own, of which a share of about `rate` is sound.

        By the smaller of both p-values, twice. Source: Benjamini and Hochberg, J. R. Stat. Soc. B 57 (1995) 289.
        """
        if not 0 < rate < 1:
            raise ValueError(f"rate is {rate:g}; expected between 0 and 1, for example 0.05")
        p = 2 * np.minimum(self.p_value, self.match_p_value)
        order = np.argsort(p)
        below = np.flatnonzero(p[order] <= rate * np.arange(1, len(p) + 1) / len(p))
        return np.sort(self.index[order[: below[-1] + 1 if len(below) else 0]])


def residual_power(run: Run, particles: Particles, seed: int = 0, batch_size: int = 64) -> ResidualPower:
    """The power of what a run leaves of images, by noise group and shell, at one draw of each one's latents.

    Above 1 in shells where the map or the noise is too weak, below where the noise is too strong.
    """
    return residuals(run, particles, seed, batch_size)[0]


def image_fit(run: Run, particles: Particles, seed: int = 0, batch_size: int = 64) -> ImageFit:
    """How each image fits a run, at one draw of its latents: what junk among the images does not.

    Scores that are wider than the standard normal as a whole tell of the noise: it is stronger in some images than in
    others, or, under a window, correlated.
    """
    return residuals(run, particles, seed, batch_size)[1]


def residuals(run: Run, particles: Particles, seed: int = 0, batch_size: int = 64) -> tuple[ResidualPower, ImageFit]:
    """Both of `residual_power` and `image_fit`, after one look at the images."""
    total = torch.zeros_like(run.model.log_sigma.detach())
    count = torch.zeros_like(total)
    index, chi_square, match, degrees = [], [], [], 0
    for batch, white, mean in _whitened(run, particles, seed, batch_size):
        bare = replace(batch, noise_scale=None)  # it is a part of the sd already
        add_shells(total, count, 0.5 * white.square().sum(-1), bare)
        index.append(batch.index.cpu())
        chi_square.append(white.square().sum((1, 2)).cpu())
        size = mean.square().sum((1, 2)).sqrt().clamp_min(1e-12)
        match.append(((white * mean).sum((1, 2)) / size).cpu())
        degrees = white[0].numel()
    rows, square, agreement = (torch.cat(parts).numpy() for parts in (index, chi_square, match))
    fit = ImageFit(rows, square.astype(float), degrees, agreement.astype(float))
    return ResidualPower((total / count).cpu(), count.cpu()), fit


def _whitened(run: Run, particles: Particles, seed: int, batch_size: int) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Batches with (image - mean) / sd and mean / sd, (B, P, 2) each, at one draw of the latents."""
    generator = torch.Generator().manual_seed(seed)
    for batch in run.batches(particles, batch_size):
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            guide: Any = poutine.trace(run.guide).get_trace(batch)  # type: ignore[arg-type, call-arg]
            image: Any = poutine.trace(poutine.replay(run.model, guide)).get_trace(batch).nodes["image"]  # type: ignore[call-arg]
            expected, sd = image["fn"].mean, image["fn"].variance.sqrt()
            white, mean = (batch.image - expected) / sd, expected / sd
        yield batch, white, mean
