"""What a model sees of a set of images."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from pyro_cryo.physics.fourier import HalfPlane

AT_ONCE = 1 << 18  # coefficients of images that are looked at together


@dataclass(frozen=True)
class Batch:
    """B images on the half-plane with all that is known about each.

    half:        the half-plane, P coefficients
    index:       (B,) long, row of each image in its Particles
    image:       (B, P, 2) real and imaginary parts
    ctf:         (B, P) factor of the slice: the CTF, or its square where the stack is CTF-premultiplied
    noise_scale: (B, P) factor of sigma, |ctf| where the stack is CTF-premultiplied; None where it is 1 everywhere
    rotation:    (B, 3, 3) consensus pose, volume axes to view axes
    translation: (B, 2) displacement of the particle from the box centre, x-y, pixels of the image's own field of view
                 on D pixels: k counts cycles of that field
    noise_group: (B,) long, row of sigma
    freq_scale:  (B,) (D apix) of the model over (D apix) of the image: factor of the slice's coordinates
    particle:    (B,) long, which of the batch's n particles each image shows, from 0 in the order they appear in
    shown:       (n,) long, number of each of these particles in the Particles: `index` where each has one image
    size:        how many particles the batch stands for: all of them in a fit, n elsewhere; what is said of the batch's
                 particles, images and all, is scaled by size / n
    window_power: mean of the squared window, 1 without: windowed noise is correlated, and its coefficients tell as much
                 as this share of independent ones would
    """

    half: HalfPlane
    index: Tensor
    image: Tensor
    ctf: Tensor
    noise_scale: Tensor | None
    rotation: Tensor
    translation: Tensor
    noise_group: Tensor
    freq_scale: Tensor
    particle: Tensor
    shown: Tensor
    size: int
    window_power: float = 1.0

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Tensor) -> Batch:
        """Some of the images: rows (B,) bool or (m,) long."""
        picked = {f.name: getattr(self, f.name) for f in fields(self)}
        picked["shown"] = self.of_images(self.shown)
        picked = {k: v[rows] if isinstance(v, Tensor) else v for k, v in picked.items()}
        if self.several:
            picked["particle"], first = numbered(picked["particle"])
            picked["shown"] = picked["shown"][first]
        else:  # without a look at the device
            picked["particle"] = torch.arange(len(picked["index"]), device=self.index.device)
        return Batch(**{**picked, "size": len(picked["shown"])})

    @property
    def particles(self) -> int:
        """n: B, or fewer where a particle has several images."""
        return len(self.shown)

    @property
    def several(self) -> bool:
        """Whether any particle has several images here."""
        return len(self.shown) < len(self.index)

    def of_images(self, values: Tensor, dim: int = 0) -> Tensor:
        """What each particle has, n or 1 along `dim`, as what each image has: B along it."""
        if not self.several:
            return values
        if values.shape[dim] == 1:  # enumerated, or the same for all
            shape = list(values.shape)
            shape[dim] = len(self)
            return values.expand(shape)
        return values.index_select(dim, self.particle)

    def by_particle(self, values: Tensor, dim: int = 0) -> Tensor:
        """What images have, B along `dim`, summed over the images of each particle: n along it."""
        if not self.several:
            return values
        shape = list(values.shape)
        shape[dim] = self.particles
        return values.new_zeros(shape).index_add_(dim, self.particle, values)

    @property
    def first(self) -> Tensor:
        """(n,) long, which image is the first of each particle."""
        return first_of(self.particle, self.particles)

    @property
    def relative(self) -> Tensor:
        """(B, 3, 3) T with R = T R_first: each image's view as seen from that of its particle's first."""
        if not self.several:
            return torch.eye(3, dtype=self.rotation.dtype, device=self.rotation.device).expand_as(self.rotation)
        return self.rotation @ self.of_images(self.rotation[self.first]).mT

    def copies(self, rows: Tensor, copy: Tensor) -> Batch:
        """Images (m,) long, again and again: those of one particle and of one copy (m,) are a particle of their own."""
        if not self.several:
            return self[rows]
        particle, first = numbered(self.particle[rows] * (int(copy.max()) + 1) + copy)
        return replace(self[rows], particle=particle, shown=self.shown[self.particle[rows]][first], size=len(first))

    @property
    def times_at_once(self) -> int:
        """How many copies of its images are looked at together."""
        return max(1, AT_ONCE // self.ctf.numel())

    def again(self, times: int) -> Batch:
        """Every image so many times, beside each other: each copy of a particle is a particle of its own."""
        if times == 1:
            return self
        image, copy = (torch.arange(count, device=self.index.device) for count in (len(self), times))
        return self.copies(image.repeat_interleave(times), copy.repeat(len(self)))

    @property
    def views(self) -> Tensor:
        """(n,) how many images each particle has."""
        return self.by_particle(torch.ones_like(self.freq_scale))

    def standing_for(self, size: int) -> Batch:
        """The same images, their particles counted as a sample of `size`."""
        return replace(self, size=size)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in moved.items()}
        return Batch(**{**moved, "half": HalfPlane.of(self.half.box, device)})

    def band(self, count: int) -> Batch:
        """The lowest `count` coefficients of every image, a prefix since they are sorted by |k|."""
        return self._part(slice(count))

    def beyond(self, count: int) -> Batch:
        """All but the lowest `count` coefficients of every image."""
        return self._part(slice(count, None))

    def _part(self, part: slice) -> Batch:
        half = replace(
            self.half,
            **{name: getattr(self.half, name)[part] for name in ("k", "shell", "index", "sign")},
        )
        noise_scale = None if self.noise_scale is None else self.noise_scale[:, part]
        return replace(self, half=half, image=self.image[:, part], ctf=self.ctf[:, part], noise_scale=noise_scale)


def of_copies(values: Tensor, times: int) -> Tensor:
    """What images or particles have that are there `times` times: (n times, *event) -> (times, n, *event)."""
    return values.unflatten(0, (-1, times)).movedim(1, 0)


def to_copies(values: Tensor) -> Tensor:
    """And back: (times, n, *event) -> (n times, *event)."""
    return values.movedim(0, 1).flatten(0, 1)


def first_of(number: Tensor, count: int) -> Tensor:
    """Where each of the numbers 0 ... count - 1 is first in (B,): (count,) long, B for one that is not there."""
    here = torch.arange(len(number), device=number.device)
    return number.new_full((count,), len(number)).scatter_reduce(0, number, here, "amin")


def numbered(name: Tensor) -> tuple[Tensor, Tensor]:
    """Equal numbers (B,) as equal numbers 0, 1, ... in the order in which they first appear, and where that is (n,)."""
    different, number = name.unique(return_inverse=True)
    first = first_of(number, len(different))
    order = first.argsort()
    return order.argsort()[number], first[order]
