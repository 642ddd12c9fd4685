"""Three populations for one set of images, compared on images that were not fitted: which prior of z do they support?

python examples/three_priors.py particles.star [EPOCHS]

Prints log p(image), a bound from importance draws, of every fifth image under fits to the others.
"""

import sys
from collections.abc import Mapping

import torch

from pyro_cryo import Particles, fit
from pyro_cryo.analysis.evidence import log_evidence
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.models.flow import Flow
from pyro_cryo.models.mixture import Mixture

PRIORS = {"one Gaussian": CryoDRGN, "two Gaussians": Mixture, "a flow": Flow}


def compare(kinds: Mapping[str, type[CryoDRGN]], particles: Particles, epochs: int = 10) -> None:
    """Fit each kind of model to four fifths of the images and print log p(image) of the others, with differences."""
    held = torch.arange(len(particles)) % 5 == 0
    found = {}
    for name, kind in kinds.items():
        torch.manual_seed(0)
        model = kind(particles.box, zdim=2, width=64, noise_groups=particles.n_noise_groups)
        run = fit(model, particles[~held], epochs=epochs, learning_rate=2e-3)
        found[name] = log_evidence(run, particles[held])
    best = max(found, key=lambda name: float(found[name].mean()))
    for name, value in found.items():
        short = found[best] - value
        error = float(short.std()) / len(value) ** 0.5
        print(f"{name}: {value.mean():.2f} nats an image, {short.mean():.2f} +- {error:.2f} below {best}")


if __name__ == "__main__":
    star, *epochs = sys.argv[1:]
    compare(PRIORS, Particles.open(star), *map(int, epochs))
