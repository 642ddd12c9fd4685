"""Three populations of shapes for one set of images: which do images support that were not fitted?

python examples/compare_priors.py particles.star [CLASSES]

Fits a Gaussian, so many classes and a population of any shape to four fifths of the particles, and prints ArviZ's
comparison on the others: log p of all of them below the best's, its standard error, and weights of a mixture.
"""

import sys
from collections.abc import Mapping

from pyro_cryo import Particles, fit
from pyro_cryo.analysis.compare import Comparison, compare
from pyro_cryo.model import CryoModel
from pyro_cryo.models.classes import Classes
from pyro_cryo.models.linear_subspace import LinearSubspace
from pyro_cryo.models.manifold import Manifold


def compared(models: Mapping[str, CryoModel], particles: Particles, **settings: float) -> Comparison:
    """Fit each model to four fifths of the particles, and compare them on the others."""
    held = particles.particle % 5 == 0
    runs = {name: fit(model, particles[~held], **settings) for name, model in models.items()}
    return compare(runs, particles[held])


def show(found: Comparison) -> None:
    """The table, the best first, and what it says."""
    print(found.table[["rank", "elpd_diff", "dse", "weight"]].round(3).to_string())
    print(found.sentence)


if __name__ == "__main__":
    star, *classes = sys.argv[1:]
    particles = Particles.open(star)
    box, groups, count = particles.box, particles.n_noise_groups, int(classes[0]) if classes else 4
    priors: dict[str, CryoModel] = {
        "a Gaussian": LinearSubspace(box, zdim=4, noise_groups=groups),
        f"{count} classes": Classes(box, classes=count, noise_groups=groups),
        "any shape": Manifold(box, zdim=4, noise_groups=groups),
    }
    show(compared(priors, particles))
