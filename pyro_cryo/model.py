"""The generative story as a Pyro model: a plate of particles and five hooks.

    V          = density()                         the map as a function of frequency and z; random in some models
    z_i        ~ latent()                          the shape of particle i
    R_i, t_i   ~ pose(batch)                       where it lies: known, or from a prior of poses
    mean_i     = signal(V, z_i, R_i, t_i, batch)   ctf . shift . slice of V(z_i)
    image_i    ~ noise(mean_i, sigma_i)            one Fourier half-plane

A particle that is seen in several images, a tilt pair or a series, has one z: `latent` samples it for n particles,
`signal` is given that of each of B images. Everything stands in the plate of particles, so what a hook samples for each
image on its own goes through `counted`, which adds its densities up by particle, as `image` does; where every particle
has one image, n is B and `counted` changes nothing.

A variant overrides a hook; whatever it samples goes under the names `z`, `rotation`, `translation`, `image`, `volume`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.distributions.views import counted
from pyro_cryo.physics.fourier import HalfPlane, shift_phase
from pyro_cryo.physics.slices import slice_coordinates
from pyro_cryo.pose import KnownPose
from pyro_cryo.progress import Progress, quiet
from pyro_cryo.volumes.conjugate import component_sd

Density = Callable[[Tensor, Tensor | None], Tensor]
DrawPoses = Callable[[torch.Generator], tuple[Tensor, Tensor]]  # rotation (N, 3, 3), translation (N, 2) of all images


class MapDraw(Protocol):
    """What may be true: the maps, and the z of every particle in them."""

    def of(self, particle: int) -> Tensor:
        """The map (D, D, D) of a particle."""

    def at(self, z: Tensor) -> Tensor:
        """The map (D, D, D) of what the fitted model has at z (zdim,)."""

    def log_prob(self, batch: Batch, sigma: Tensor) -> Tensor:
        """log p of the images of each particle (n,) at the poses of a batch, z and contrast integrated out, nats.

        sigma (noise groups, D / 2 + 1); windowed images count for `Batch.window_power` of it.
        """


pyro.settings.set(module_local_params=True)


class CryoModel(nn.Module):
    """Image formation with a map `self.volume`, known poses and Gaussian noise with a variance for every shell.

    `poses` is the prior of poses, a module of `pyro_cryo.pose`: assign another for poses that are not known.

    box:          D, pixels
    noise_groups: rows of sigma (`Particles.n_noise_groups`)

    log_sigma (noise groups, D / 2 + 1) is a parameter: the log standard deviation of each real Fourier component.
    """

    zdim: int = 0  # dimension of z
    epochs: int = 20  # passes over the data that a fit of this model takes by default
    pose_steps: int = 0  # of each descent, between which poses that are not known climb in the model's own maps
    arguments: dict[str, Any]  # what the model was built with: a saved run builds it again
    volume: nn.Module
    poses: nn.Module

    def __new__(cls, *args: Any, **kwargs: Any) -> CryoModel:
        model = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind(model, *args, **kwargs)
        bound.apply_defaults()
        said = {k: v for k, v in list(bound.arguments.items())[1:]}
        for name, parameter in bound.signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:  # handed on to the base
                said |= said.pop(name)
        object.__setattr__(model, "arguments", said)
        return model

    def __init__(self, box: int, noise_groups: int = 1) -> None:
        super().__init__()
        self.box = box
        self.poses = KnownPose()
        self.log_sigma = nn.Parameter(torch.zeros(noise_groups, HalfPlane.of(box).shells))
        self.beta = 1.0  # weight of log p(z) and log q(z); the fit's warm-up moves it, 1 is the ELBO

    # ---------------------------------------------------------------- the hooks
    def density(self) -> Density:
        """The map as a function of points (*batch, P, 3) and z; samples `volume` where the map is random."""
        return self.volume

    def latent(self) -> Tensor | None:
        """Sample `z` for the particles of the plate: (n, zdim), or None where there is no latent coordinate."""
        return None

    def pose(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rotations (B, 3, 3) and translations (B, 2) in pixels, from `poses`: the known ones, or sampled."""
        return self.poses(batch)

    def signal(self, density: Density, z: Tensor | None, rotation: Tensor, translation: Tensor, batch: Batch) -> Tensor:
        """Noise-free images (B, P, 2): contrast transfer, shift and central slice of V(z), z (B, zdim)."""
        points = slice_coordinates(rotation, batch.half.k, batch.freq_scale)
        return form_image(density(points, z), translation, batch)

    def noise(self, mean: Tensor, sigma: Tensor) -> TorchDistributionMixin:
        """What an image is, given its mean (B, P, 2) and the standard deviation sigma (B, P, 1) of each component."""
        return dist.Normal(mean, sigma)

    # ---------------------------------------------------------------- the story
    def forward(self, batch: Batch) -> None:
        """The Pyro model of a batch."""
        density = self.density()
        with pyro.plate("particles", batch.size, subsample=batch.shown, dim=-1):
            with poutine.scale(scale=self.beta):
                z = self.latent()
            z = None if z is None else batch.of_images(z, -2)
            rotation, translation = self.pose(batch)
            mean = self.signal(density, z, rotation, translation, batch)
            likelihood = self.noise(mean, noise_of(batch, self.sigma))
            likelihood = likelihood.to_event(2 - likelihood.event_dim)
            with poutine.scale(scale=batch.window_power):
                pyro.sample("image", counted(likelihood, batch), obs=batch.image)

    @property
    def sigma(self) -> Tensor:
        """Noise standard deviation by noise group and shell."""
        return self.log_sigma.exp()

    def make_guide(self) -> nn.Module:
        """The variational family of the sites in the plate; without latent sites there is nothing to guess.

        A guide of z also has posterior(batch) -> (mean (n, zdim), covariance (n, zdim, zdim)) of the batch's particles.
        """
        return NoGuide()

    def prepare(self, particles: Particles, seed: int = 0, progress: Progress = quiet) -> None:
        """Before the descent, once: solve for what is conjugate, set starting values from the data."""

    def write_results(self, folder: Path, particles: Particles) -> None:
        """Write what this model leaves in a finished run, beside the latents and the particles."""

    def posterior_draws(
        self, particles: Particles, seed: int = 0, progress: Progress = quiet, poses: DrawPoses | None = None
    ) -> Iterator[MapDraw] | None:
        """Draws without end of the map and of all particles' z, from their posterior given the particles.

        None where the map has no posterior: a network's is a point.

        poses: draws poses from their posterior, those of one draw of the map; default: they are the particles' own
        """
        return None

    def map(self, z: Tensor | None = None) -> Tensor:
        """Maps in real space at z (*batch, zdim): (*batch, D, D, D), z-y-x."""
        return self.volume.map(z)  # type: ignore[operator]


def refuse_other_stories(model: CryoModel) -> None:
    """Raise ValueError where a subclass of a recipe that is solved for tells another story than the one solved."""
    recipe = next(kind for kind in type(model).__mro__ if kind.__module__.startswith("pyro_cryo.models."))
    for hook in ("density", "latent", "pose", "signal", "noise"):
        if getattr(type(model), hook) is not getattr(recipe, hook):
            raise ValueError(
                f"{type(model).__name__} overrides {hook}, but {recipe.__name__} is solved for as it is, with "
                "Gaussian noise; derive from CryoDRGN or CryoModel"
            )


def takes(kind: type[CryoModel]) -> list[str]:
    """Names of the arguments of a model's class, with those that it hands on to its base."""
    names: list[str] = []
    for owner in kind.__mro__:
        if "__init__" not in vars(owner):
            continue
        parameters = list(inspect.signature(owner).parameters.values())
        names += [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in names]
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return names


class NoGuide(nn.Module):
    """The guide of a model without latent sites."""

    def forward(self, batch: Batch) -> None:
        """Nothing to sample."""


def noise_of(batch: Batch, sigma: Tensor) -> Tensor:
    """Standard deviation of each component of each coefficient, as `noise` takes it: (B, P, 1)."""
    return component_sd(batch, sigma)[..., None]


def form_image(slices: Tensor, translation: Tensor, batch: Batch) -> Tensor:
    """Shift central slices (*batch, P, 2) by translation (*batch, 2) pixels and multiply by the CTF."""
    phase = shift_phase(batch.half.k, translation, batch.half.box)
    shifted = torch.view_as_complex(slices.contiguous()) * phase * batch.ctf
    return torch.view_as_real(shifted)
