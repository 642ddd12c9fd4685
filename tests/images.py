"""What several tests look at: images of blobs at known poses, of a hinge that fills its box; a model of a known map."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import hinge, simulate
from pyro_cryo.model import CryoModel, form_image
from pyro_cryo.physics.fourier import HalfPlane, radius
from pyro_cryo.physics.rotations import random_rotations
from pyro_cryo.physics.slices import fourier_grid, read_grid, slice_coordinates
from pyro_cryo.pose import AnyPose
from pyro_cryo.volumes.grid import VoxelGrid


def blobs(box: int, radius_px: float) -> Tensor:
    """A map without symmetry (D, D, D), inside a ball."""
    generator = torch.Generator().manual_seed(0)
    axis = torch.arange(box).float() - box // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    centre = 3.0 * torch.randn(12, 3, generator=generator)
    each = [torch.exp(-((x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2) / (2 * 1.3**2)) for a, b, c in centre.tolist()]
    return torch.stack(each).sum(0) * (radius(box, 3) < radius_px)


def observed(volume: Tensor, count: int, sigma: float, freq_scale: Tensor) -> Batch:
    """Noisy images of a map at random poses, shifted by a pixel or so; freq_scale (B,)."""
    generator, half = torch.Generator().manual_seed(1), HalfPlane.of(len(volume))
    blank = Batch(
        half=half,
        index=torch.arange(count),
        image=torch.zeros(count, len(half), 2),
        ctf=torch.cos(0.02 * half.k.square().sum(-1) * (1 + torch.rand(count, 1, generator=generator))),
        noise_scale=None,
        rotation=random_rotations(count, generator),
        translation=torch.randn(count, 2, generator=generator),
        noise_group=torch.zeros(count, dtype=torch.long),
        freq_scale=freq_scale,
        particle=torch.arange(count),
        shown=torch.arange(count),
        size=count,
    )
    points = slice_coordinates(blank.rotation, half.k, blank.freq_scale)
    clean = form_image(torch.view_as_real(read_grid(fourier_grid(volume), points)), blank.translation, blank)
    return dataclasses.replace(blank, image=clean + sigma * torch.randn(clean.shape, generator=generator))


def hinge_images(folder: Path, states: int, count: int, box: int, snr: float, fill: float = 0.65) -> Particles:
    """Images of a hinge, as long as a part `fill` of the box, no finer than its pixels show."""
    source = hinge(states)
    apix = 2 * source.radius_angstrom / (fill * box)
    source = dataclasses.replace(source, sigma_angstrom=1.3 * apix)
    return Particles.open(simulate(source, folder, n_images=count, box=box, apix=apix, snr=snr))


def fine_images(folder: Path, count: int, box: int, snr: float) -> Particles:
    """Images of a molecule so small, in pixels of 2.2 angstrom, that defocus shows in them."""
    source, apix = hinge(1), 2.2
    shrunk = 0.5 * 0.65 * box * apix / source.radius_angstrom
    source = dataclasses.replace(source, xyz=shrunk * source.xyz, sigma_angstrom=0.8 * apix)
    optics = {"apix": apix, "defocus_angstrom": (2_500.0, 4_500.0)}
    return Particles.open(simulate(source, folder, n_images=count, box=box, snr=snr, **optics))


def in_views(particles: Particles, state: Tensor, views: int = 2) -> tuple[Particles, Tensor]:
    """The images with `views` of one state (N,) for those of one particle, and the state of each particle (n,)."""
    order = state.argsort(stable=True)
    count = state.bincount()
    first = count.cumsum(0) - count
    within = torch.arange(len(state)) - first[state[order]]
    kept = order[within < count[state[order]] // views * views]
    table = particles.table[kept]
    table = dataclasses.replace(table, particle=torch.arange(len(kept)) // views)
    return dataclasses.replace(particles, table=table), state[kept][::views]


def seen_together(batch: Batch, particle: list[int]) -> Batch:
    """The same images, as those of some particles (B,), numbered from 0 as they appear."""
    count = max(particle) + 1
    number = torch.tensor(particle)
    return dataclasses.replace(batch, particle=number, shown=torch.arange(count), size=count)


def almost_symmetric(box: int, radius_px: float, apart: float) -> Tensor:
    """A map (D, D, D) that has a 2-fold axis along z but for a part `apart` of it."""
    whole = blobs(box, radius_px)
    turned = torch.zeros_like(whole)
    turned[:, 1:, 1:] = whole[:, 1:, 1:].flip(1, 2)
    return 0.5 * (whole + turned) + apart * whole


class Given(CryoModel):
    """A map that is known, images from anywhere."""

    def __init__(self, volume: Tensor, sigma: float, shift_sd_px: float) -> None:
        super().__init__(len(volume))
        self.volume = VoxelGrid(len(volume))
        self.volume.set(volume)
        self.log_sigma.data.fill_(math.log(sigma))
        self.poses = AnyPose(shift_sd_px)
