"""Three noises for one set of images, compared on images that were not fitted: is it whole images that are junk?

python examples/swap_noise.py particles.star [EPOCHS]

Prints ArviZ's comparison on every fifth particle of fits to the others. log p of a particle is a bound from importance
draws, whose k tells how much more draws would raise it.
"""

import sys
from typing import Any

import pyro.distributions as dist
import torch
from compare_priors import compared, show

from pyro_cryo import Particles
from pyro_cryo.model import CryoModel
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.models.robust_noise import RobustNoise


class HeavyTails(CryoDRGN):
    """image ~ StudentT(df, mean, sigma), each number of it on its own, df learned."""

    def __init__(self, box: int, zdim: int = 2, **arguments: Any) -> None:
        super().__init__(box, zdim, **arguments)
        self.log_df = torch.nn.Parameter(torch.tensor(3.0))

    def noise(self, mean: torch.Tensor, sigma: torch.Tensor) -> dist.StudentT:
        return dist.StudentT(self.log_df.exp(), mean, sigma)


NOISES = {"Gaussian": CryoDRGN, "a t for each coefficient": HeavyTails, "a t for each image": RobustNoise}

if __name__ == "__main__":
    star, *epochs = sys.argv[1:]
    particles = Particles.open(star)
    models: dict[str, CryoModel] = {}
    for name, kind in NOISES.items():
        torch.manual_seed(0)
        models[name] = kind(particles.box, zdim=2, width=64, noise_groups=particles.n_noise_groups)
    show(compared(models, particles, epochs=int(epochs[0]) if epochs else 10, learning_rate=2e-3))
