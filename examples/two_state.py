"""A prior of one's own: a molecule with two states, z from a mixture whose weights and centres are learned.

python examples/two_state.py particles.star OUT [EPOCHS]
"""

import sys

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_cryo import Particles, fit
from pyro_cryo.data.mrc_map import write_map
from pyro_cryo.models.cryodrgn import CryoDRGN


class TwoState(CryoDRGN):
    """z ~ sum_k w_k Normal(mu_k, I): an open and a closed state, on one axis so that no other tells them apart."""

    def __init__(self, box: int, zdim: int = 1, noise_groups: int = 1) -> None:
        super().__init__(box, zdim, width=64, noise_groups=noise_groups)
        self.log_weight = nn.Parameter(torch.zeros(2))
        self.centre = nn.Parameter(torch.tensor([[-2.0], [2.0]]) * torch.eye(1, zdim))

    def latent(self) -> torch.Tensor:
        shape = dist.Normal(self.centre, 1.0).to_event(1)
        return pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=self.log_weight), shape))


if __name__ == "__main__":
    star, out, *epochs = sys.argv[1:]
    particles = Particles.open(star)
    model = TwoState(particles.box, noise_groups=particles.n_noise_groups)
    run = fit(model, particles, out, epochs=int(epochs[0]) if epochs else 10, learning_rate=2e-3)
    weight, centre = run.model.log_weight.detach().softmax(0), run.model.centre.detach()
    state = torch.cdist(torch.from_numpy(run.latent.z), centre).argmin(1)
    for k, volume in enumerate(run.volume(centre)):
        write_map(f"{out}/state{k}.mrc", volume, particles.apix)
        print(f"state {k}: weight {weight[k]:.2f}, {int((state == k).sum())} images, state{k}.mrc")
