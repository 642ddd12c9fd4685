"""Three noises for one set of images, compared on images that were not fitted: is it whole images that are junk?

python examples/swap_noise.py particles.star [EPOCHS]

Prints log p(image), a bound from importance draws, of every fifth image under fits to the others.
"""

import sys
from typing import Any

import pyro.distributions as dist
import torch
from three_priors import compare

from pyro_cryo import Particles
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
    compare(NOISES, Particles.open(star), *map(int, epochs))
