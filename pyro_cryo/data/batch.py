"""What a model sees of a set of images."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from pyro_cryo.physics.fourier import HalfPlane


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
    particle:    (B,) long, which of the batch's particles each image shows, from 0
    particles:   how many these are: B, or fewer where a particle has several images
    size:        how many images the batch stands for: N in a fit, B elsewhere; scales the likelihood by size / B
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
    particles: int
    size: int

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Tensor) -> Batch:
        """Some of the images: rows (B,) bool or (n,) long."""
        picked = {f.name: getattr(self, f.name) for f in fields(self)}
        picked = {k: v[rows] if isinstance(v, Tensor) else v for k, v in picked.items()}
        return Batch(**{**picked, "size": len(picked["index"])})

    def standing_for(self, size: int) -> Batch:
        """The same images, counted as a sample of `size`."""
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
