"""Junk among the particles: every image has a noise scale of its own, integrated out; a bad one counts little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.distributions import StudentImage
from pyro_cryo.inference.state import write_arrays
from pyro_cryo.model import noise_of
from pyro_cryo.models.cryodrgn import CryoDRGN


class RobustNoise(CryoDRGN):
    """image_i ~ Normal(mean_i, sigma / sqrt(u_i)), u_i ~ Gamma(df / 2, df / 2) an image's own, df learned.

    Arguments as in CryoDRGN. A run leaves weights.npz: index, weight (N,), the posterior mean of u given the image.
    """

    def __init__(self, box: int, zdim: int = 8, **arguments: Any) -> None:
        super().__init__(box, zdim, **arguments)
        self.log_df = nn.Parameter(torch.tensor(3.0))

    def noise(self, mean: Tensor, sigma: Tensor) -> StudentImage:
        return StudentImage(self.log_df.exp(), mean, sigma)

    def weight(self, batch: Batch, z: Tensor) -> Tensor:
        """What each image counts for at z (B, zdim): (B,)."""
        rotation, translation = self.pose(batch)
        mean = self.signal(self.density(), z, rotation, translation, batch)
        return self.noise(mean, noise_of(batch, self.sigma)).weight(batch.image, batch.window_power)

    def write_results(self, folder: Path, particles: Particles) -> None:
        """weights.npz, at the posterior means of z in latent.npz."""
        with np.load(folder / "latent.npz") as file:
            z = torch.as_tensor(file["z"], device=self.log_df.device)
        with torch.no_grad():
            found = [self.weight(b, z[b.of_images(b.shown)]).cpu() for b in particles.batches(64, device=z.device)]
        weight = torch.cat(found).numpy()
        write_arrays(folder / "weights.npz", index=np.arange(len(weight)), weight=weight)
