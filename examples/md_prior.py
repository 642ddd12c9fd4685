"""A prior from molecular dynamics: the simulation brings maps and states, the images say how many are in which.

python examples/md_prior.py particles.star [TRAJECTORY.pdb]

Frames are the MODELs of a PDB file, superposed on one another and turned as the poses of the particles want it; their
maps are all in memory. Without one: the hinge of `pyro-cryo simulate --toy hinge`, mostly near its first end. Prints
the population of each state in the simulation and in the images.
"""

import sys
from dataclasses import replace

import pyro
import torch
from torch import Tensor

from pyro_cryo import Particles, fit
from pyro_cryo.analysis.latent import kmeans
from pyro_cryo.data.blobs import Complex, from_pdb, hinge
from pyro_cryo.distributions import Atoms
from pyro_cryo.guides.coefficients import Moments, Projected, Seen
from pyro_cryo.guides.points import PointCoefficients, scaled
from pyro_cryo.inference.reconstruct import reconstruct
from pyro_cryo.models.linear_subspace import LinearSubspace
from pyro_cryo.physics.fourier import displacement_px

ROUNDS, DRAWS = 30, 400  # of expectation maximisation, then of Gibbs sampling


class States(PointCoefficients):
    """y = a (1, z), z one of the frames' (S, r). States have probabilities w, a state's frames are as many each.

    member: (S, K) 1 where a frame is of a state; w ~ Dirichlet(K w_md), so that the simulation is worth K images
    """

    def take(self, z: Tensor, member: Tensor) -> None:
        """The frames, populated as in the simulation."""
        self.points, self.features, self.member = z, self.at(z), member
        self.populate(member.mean(0))

    def at(self, z: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(z[..., :1]), z], -1)

    def populate(self, w: Tensor) -> None:
        self.w, self.log_weight = w, (self.member @ (w / self.member.sum(0))).log()

    def learn(self, mean: Moments) -> None:
        super().learn(mean)
        self.populate(mean.weight @ self.member)

    def draws(self, seen: Seen) -> Tensor:
        """Of w given the images, (DRAWS, K): an image's state and w in turn."""
        likelihood, w, drawn = self.moments(seen).weight @ self.member / self.w, self.w, []
        for _ in range(DRAWS):
            count = torch.multinomial(likelihood * w, 1).flatten().bincount(minlength=len(w))
            w = torch.distributions.Dirichlet(len(w) * self.member.mean(0) + count).sample()
            drawn.append(w)
        return torch.stack(drawn)


class MDPrior(LinearSubspace):
    """V(z) = g (V0 + sum_j z_j U_j), z ~ sum_k w_k p(z | state k): mean and principal components of the frames' maps.

    States are clusters of frames, p(z | state k) a state's own frames, g the scale of the images.
    """

    coefficients: States

    def __init__(self, frames: Complex, box: int, zdim: int = 6, states: int = 3, noise_groups: int = 1) -> None:
        super().__init__(box, zdim, noise_groups=noise_groups)
        self.frames, self.states, self.coefficients = frames, states, States(self.contrast)

    def latent(self) -> Tensor:
        return pyro.sample("z", Atoms(self.coefficients.points, self.coefficients.log_weight))

    def maps(self, apix: float) -> Tensor:
        """Those of the frames, (S, D, D, D)."""
        return torch.stack([self.frames.volume(s, self.box, apix) for s in range(len(self.frames))])

    def prepare(self, particles: Particles, seed: int = 0, progress: object = None) -> None:
        self.reconstruction, apix = reconstruct(particles), particles.apix
        self.log_sigma.data.copy_(self.reconstruction.sigma.log())
        moved = apix * displacement_px(self.reconstruction.volume, self.maps(apix).mean(0))
        self.frames = replace(self.frames, xyz=self.frames.xyz + moved)  # onto the images' map
        maps, r = self.maps(apix), self.zdim
        left, size, axes = torch.linalg.svd((maps - maps.mean(0)).flatten(1), full_matrices=False)
        self.clusters = kmeans(left[:, :r] * size[:r], self.states)
        member = torch.eye(self.states)[torch.from_numpy(self.clusters.label).long()]
        root = len(maps) ** 0.5  # so that z has a variance of 1
        self.coefficients.take(root * left[:, :r], member)
        moving = (size[:r, None] * axes[:r] / root).unflatten(1, maps.shape[1:])
        self.weigh(particles, torch.cat([maps.mean(0)[None], moving]))

    def weigh(self, particles: Particles, basis: Tensor) -> None:
        """Find the scale g of V0 and U (1 + r, D, D, D) in the images, their contrasts and the populations."""
        self.volume.set(basis)
        grid, sigma = self.volume.grid(), self.sigma.detach()
        seen = Seen.of(Projected.of(batch, grid, sigma).seen() for batch in particles.batches(256))
        g = torch.linalg.solve(seen.gram.sum(0), seen.projection.sum(0))[0]  # of V0, at whatever mean of z
        self.volume.set(g * basis)
        self.consensus.set(g * basis[0])
        seen = scaled(seen, g.expand(len(particles)))
        for _ in range(ROUNDS):
            self.coefficients.learn(self.coefficients.moments(seen).total().over(len(particles)))
        self.populations = self.coefficients.draws(seen)
        self.coefficients.populate(self.populations.mean(0))


if __name__ == "__main__":
    star, *trajectory = sys.argv[1:]
    particles, toy = Particles.open(star), hinge()
    often = (50 * torch.linspace(0, 1, 200).square()).long()
    frames = from_pdb(trajectory[0]) if trajectory else replace(toy, xyz=toy.xyz[often], weight=toy.weight[often])
    model = MDPrior(frames, particles.box, noise_groups=particles.n_noise_groups)
    fit(model, particles)
    simulated, found, sd = model.coefficients.member.mean(0), model.populations.mean(0), model.populations.std(0)
    for k, frame in enumerate(model.clusters.nearest):
        said = f"{simulated[k]:.2f} of the simulation, {found[k]:.2f} +- {sd[k]:.2f} of the images"
        print(f"state {k}, about frame {frame}: {said}")
