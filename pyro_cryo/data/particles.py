"""Particles: images on disk and what a table knows of them, as batches for a model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_cryo.data.batch import Batch, first_of, numbered
from pyro_cryo.data.open import opened
from pyro_cryo.data.order import Order
from pyro_cryo.data.pixels import Pixels, chunks, window_power
from pyro_cryo.data.selection import Subset
from pyro_cryo.data.stack import Stack
from pyro_cryo.data.table import Table
from pyro_cryo.physics.ctf import CTF, electron_wavelength
from pyro_cryo.physics.exposure import attenuation
from pyro_cryo.physics.fourier import HalfPlane

LEAST_NOISE = 0.1  # of |ctf|, where a premultiplied image has next to no noise: the floor keeps likelihoods finite


@dataclass(frozen=True, eq=False)
class Particles:
    """N images of particles, read when a batch is made.

    Protein is bright, `translation` is the displacement of the particle from the box centre and a rotation takes
    volume axes to view axes, whatever the input's own conventions.

    table:     what the input says
    stack:     where the images are
    box:       D, even: images are Fourier-cropped to it
    invert:    whether contrast is toggled
    normalize: whether each image gets mean 0 and standard deviation 1 outside a circle of 0.9 times the box
    window:    fraction of half the box inside which a soft disc is 1 (0 at the edge of the box), or None
    opened_with: what `open` was asked, for a run's record
    """

    table: Table
    stack: Stack
    box: int
    invert: bool = False
    normalize: bool = False
    window: float | None = None
    opened_with: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def open(
        path: str | Path,
        *,
        box: int | None = None,
        apix: float | None = None,
        datadir: str | Path | None = None,
        invert: bool = False,
        normalize: bool = False,
        first: int | None = None,
        subset: Subset | None = None,
        poses: str | Path | None = None,
        ctf: str | Path | None = None,
        window: float | None = None,
        tilt: str | Path | None = None,
        tilt_deg: float | None = None,
    ) -> Particles:
        """Open a table or a stack; images are not read yet.

        path:    .star (RELION 3.0, 3.1, 5; an optimisation set or the particles of a tilt series), .cs, .mrcs or .mrc,
                 or .txt, a list of stacks
        box:     even; default: the smallest box of the optics groups
        apix:    angstrom a stored pixel, in place of what the files say
        datadir: folder for stacks that are not where the table says; or one stack that holds the table's images, by
                 frame where the table names one stack, else in the order of its rows
        invert:  toggle contrast, for images with dark protein; cryoSPARC's blob/sign is applied anyway
        first:   keep so many particles, of those that `subset` keeps
        subset:  numbers from 0, or a file of them (.txt, .npy, .pkl), or a .star that names the images to keep
        poses, ctf: cryoDRGN's pickles, in place of what the table says
        window:  fraction of half the box, above 0 and up to 1; default: no window
        tilt, tilt_deg: tilt pairs: a stack of the same particles in the same order, seen at `physics.rotations.tilt` of
                 so many degrees; poses and ctf are then of the first stack's images

        Raises FileNotFoundError or ValueError with the value and the mend where the input is not sound.

            particles = Particles.open("particles.star", box=128)
            for batch in particles.batches(256, generator=torch.Generator().manual_seed(0)):
                ...
        """
        if window is not None and not 0 < window <= 1:
            raise ValueError(f"window is {window:g}; expected a fraction of half the box, above 0 and up to 1")
        folder = None if datadir is None else Path(datadir)
        table, stack, size = opened(
            Path(path),
            box=box,
            apix=apix,
            datadir=folder,
            first=first,
            subset=subset,
            poses=poses,
            ctf=ctf,
            tilt=tilt,
            tilt_deg=tilt_deg,
        )
        asked: dict[str, Any] = {
            "path": path,
            "box": box,
            "apix": apix,
            "datadir": datadir,
            "invert": invert,
            "normalize": normalize,
        }
        asked |= {"first": first, "subset": subset, "poses": poses, "ctf": ctf, "window": window}
        asked |= {"tilt": tilt, "tilt_deg": tilt_deg}
        return Particles(table, stack, size, invert, normalize, window, _in_words(asked))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, rows: slice | Tensor | np.ndarray | list[int]) -> Particles:
        """Particles of these rows: a slice, a mask (N,) or numbers."""
        index = torch.arange(len(self))[torch.as_tensor(rows) if not isinstance(rows, slice) else rows]
        if index.ndim != 1:
            raise TypeError(
                "particles[i] takes a slice, a mask or an array of rows; for one image use particles[i : i + 1]"
            )
        return replace(self, table=self.table[index])

    @property
    def half(self) -> HalfPlane:
        """The half-plane of the box."""
        return HalfPlane.of(self.box)

    @cached_property
    def apix(self) -> float:
        """Angstrom a pixel of the model's box: the smallest field of view of the optics groups, over the box.

        So every image's half-plane lies inside the model's.
        """
        return min(group.field_angstrom for group in self.table.groups) / self.box

    @property
    def n_noise_groups(self) -> int:
        """Optics groups, each with its own noise."""
        return len(self.table.groups)

    @property
    def noise_group(self) -> Tensor:
        """(N,) long: the optics group of each image, its row of sigma."""
        return self.table.group

    @property
    def half_set(self) -> Tensor:
        """(N,) int8: the half set 1 or 2 of each image, 0 where the input has none."""
        return self.table.half_set

    @property
    def particle(self) -> Tensor:
        """(N,) long: which particle each image shows."""
        return self.table.particle

    @cached_property
    def n_particles(self) -> int:
        """How many particles there are: N, or fewer for tilt series."""
        return int(self.particle.max()) + 1 if len(self) else 0

    @property
    def several(self) -> bool:
        """Whether any particle has several images."""
        return self.n_particles < len(self)

    @cached_property
    def first(self) -> Tensor:
        """(n,) long: the row of each particle's first image."""
        return first_of(self.particle, self.n_particles)

    def of_images(self, values: Tensor) -> Tensor:
        """What each particle has (n, ...) as what each image has, (N, ...)."""
        return values[self.particle] if self.several else values

    def rows_in(self, whole: Particles) -> Tensor:
        """(N,) long: which images of `whole` these are, by stack and frame. ValueError where one is not among them."""
        row = self._sought_in(whole)
        other = np.flatnonzero(row < 0)
        if len(other):
            stack, frame = self.table.files[self.table.file[other[0]]], self.table.frame[other[0]] + 1
            raise ValueError(f"image {other[0]} ({frame}@{stack}) is not one of {whole.table.path}; give some of those")
        return torch.from_numpy(row)

    def are_in(self, whole: Particles) -> Tensor:
        """(N,) bool: which of these images are images of `whole`, by stack and frame."""
        return torch.from_numpy(self._sought_in(whole) >= 0)

    def _sought_in(self, whole: Particles) -> np.ndarray:
        """(N,) the row of each image in `whole`, -1 where it is not there."""
        number = {Path(file.path).resolve(): i for i, file in enumerate(whole.stack.files)}
        mine = np.array([number.get(Path(file.path).resolve(), -1) for file in self.stack.files])
        frames = 1 + max(int(whole.table.frame.max()), int(self.table.frame.max()))
        every, wanted = whole.table.file * frames + whole.table.frame, mine[self.table.file] * frames + self.table.frame
        order = np.argsort(every, kind="stable")
        row = order[np.searchsorted(every, wanted, sorter=order).clip(max=len(order) - 1)]
        return np.where(every[row] == wanted, row, -1)

    @cached_property
    def relative(self) -> Tensor:
        """(N, 3, 3) T with R = T R_first: each image's view as seen from that of its particle's first.

        From the poses where there are any. Raises ValueError where nothing tells.
        """
        if self.table.rotation is not None:
            return self.rotation @ self.of_images(self.rotation[self.first]).mT
        if self.table.view is not None:
            return self.table.view @ self.of_images(self.table.view[self.first]).mT
        if not self.several:
            return torch.eye(3).expand(len(self), 3, 3)
        raise ValueError(
            f"{self.table.path} has {len(self)} images of {self.n_particles} particles and does not say how their "
            "views lie to each other; give poses, which need only be right within a particle"
        )

    @property
    def ctf(self) -> CTF | None:
        """The optics, fields (N,); None where images have no CTF (it is 1 everywhere)."""
        return self.table.ctf

    @property
    def has_poses(self) -> bool:
        """Whether the input has poses."""
        return self.table.rotation is not None

    @property
    def rotation(self) -> Tensor:
        """(N, 3, 3) float32. Raises ValueError where there are no poses."""
        if self.table.rotation is None:
            raise ValueError(
                f"{self.table.path} has no poses; give a cryoDRGN .pkl of poses, a table with rlnAngleRot, "
                "or search for them (--poses search; model.poses = AnyPose())"
            )
        return self.table.rotation

    @property
    def translation(self) -> Tensor:
        """(N, 2) float32: displacement of the particle from the box centre, pixels of the model's box, x-y."""
        return self.table.shift_px * self._pixels_of_model[:, None]

    def with_poses(self, rotation: Tensor, translation: Tensor) -> Particles:
        """The same images with other rotations (N, 3, 3) and translations (N, 2), pixels of the model's box."""
        shift_px = translation.detach().cpu().float() / self._pixels_of_model[:, None]
        return replace(self, table=self.table.with_poses(rotation.detach().cpu(), shift_px))

    def with_defocus(self, offset_angstrom: Tensor) -> Particles:
        """The same images with (N,) more of both defocus values.

        Raises ValueError where images have no CTF, or were multiplied by it as it was.
        """
        if self.ctf is None:
            raise ValueError(f"{self.table.path} has no CTF, and so no defocus to refine; give ctf=, or leave it out")
        if any(group.premultiplied for group in self.table.groups):
            raise ValueError(
                f"images of {self.table.path} were multiplied by their CTF, whose defocus then stays; refine that of "
                "images that were not"
            )
        return replace(self, table=self.table.with_ctf(self.ctf.defocused(offset_angstrom.detach().cpu().float())))

    def quadrature(self, batch: Batch) -> Tensor:
        """(B, P) what the CTF of a batch of these images turns to as defocus grows (`physics.ctf`)."""
        assert self.ctf is not None
        rows, device = batch.index.cpu(), batch.image.device
        optics = torch.stack(list(vars(self.ctf[rows].quadrature).values()), -1)
        exposure = torch.zeros(len(rows)) if self.table.exposure is None else self.table.exposure[rows]
        return self._ctf_of(self._sent(optics, device), batch.freq_scale, self._sent(exposure, device), batch.half)

    @cached_property
    def defocus_turn(self) -> Tensor:
        """(N,) by how much it turns: radians an angstrom of defocus, for |k| = 1 cycle of the image's field of view."""
        assert self.ctf is not None
        return math.pi * electron_wavelength(self.ctf.voltage_kv) / self._lengths.square()

    @cached_property
    def _pixels_of_model(self) -> Tensor:
        """(N,) pixels of the model's box in a stored pixel."""
        return self.table.per_group([group.apix / self.apix for group in self.table.groups])

    @cached_property
    def _lengths(self) -> Tensor:
        """(N,) field of view of each image in angstrom."""
        return self.table.per_group([group.field_angstrom for group in self.table.groups])

    @cached_property
    def freq_scale(self) -> Tensor:
        """(N,) the model's field of view over the image's, at most 1: factor of a slice's coordinates."""
        return self.apix * self.box / self._lengths

    @cached_property
    def _factor(self) -> Tensor:
        """(N,) factor of the coefficients: contrast, and the area of a pixel against the model's.

        Pixel values are samples of one function whatever the field of view L, so the unitary transform of D x D of them
        goes with 1 / L^2.
        """
        return self.table.sign * (-1.0 if self.invert else 1.0) / self.freq_scale**2

    @cached_property
    def _numbers(self) -> Tensor:
        """(N, 23) all floats of a row side by side, so that a batch is one gather and one transfer."""
        ctf = self.ctf
        optics = [torch.zeros(len(self), 9)] if ctf is None else [torch.stack(list(vars(ctf).values()), -1)]
        exposure = torch.zeros(len(self)) if self.table.exposure is None else self.table.exposure
        # Shifts are phases at k in cycles of the image's own field of view, hence in that field's pixels.
        translation = self.translation * self.freq_scale[:, None]
        last = torch.stack([self.freq_scale, self._factor, exposure], -1)
        return torch.cat([*optics, self.rotation.flatten(1), translation, last], -1)

    @cached_property
    def _premultiplied(self) -> Tensor:
        return torch.tensor([group.premultiplied for group in self.table.groups])[self.table.group]

    def batch(self, rows: slice | Tensor | np.ndarray | list[int], device: torch.device | str = "cpu") -> Batch:
        """The images of these rows with all that is known about them, on `device`; `size` counts their particles."""
        index = torch.arange(len(self))[torch.as_tensor(rows) if not isinstance(rows, slice) else rows]
        return self._batch(index, self._read(index, pin=torch.device(device).type == "cuda"), device)

    def batches(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        start: int = 0,
    ) -> Iterator[Batch]:
        """One pass over the images, shuffled where there is a generator; the last batch may be smaller.

        All images of a particle come together: where particles have several, a batch holds about `batch_size` images.
        Files are read one batch ahead by a thread. The order depends on the generator's state alone. `start` skips that
        many batches as if they had been drawn, without reading them.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
        size = self._image_bytes * len(self) // max(1, self.n_particles)
        order = Order.of(self.n_particles, size, self.particles_of(batch_size), generator)
        pin = torch.device(device).type == "cuda"
        for shown, pixels in order.batches(lambda shown: self._read(self.images_of(shown), pin), start):
            yield self._batch(self.images_of(shown), pixels, device)

    def n_batches(self, batch_size: int) -> int:
        """How many `batches` a pass has."""
        return -(-self.n_particles // self.particles_of(batch_size))

    def particles_of(self, images: int) -> int:
        """How many particles have about so many images, at least one."""
        return max(1, images * self.n_particles // max(1, len(self)))

    def images_of(self, particle: Tensor) -> Tensor:
        """Rows of all images of some particles (n,), particle by particle."""
        by_particle, first = self._views
        if len(by_particle) == len(first) - 1:
            return by_particle[particle]
        views = first[particle + 1] - first[particle]
        ends = views.cumsum(0)
        within = torch.arange(int(views.sum())) - (ends - views).repeat_interleave(views)
        return by_particle[first[particle].repeat_interleave(views) + within]

    @cached_property
    def _views(self) -> tuple[Tensor, Tensor]:
        """Rows sorted by particle (N,), and where each particle's begin, with N at the end."""
        count = self.particle.bincount(minlength=self.n_particles)
        return self.particle.argsort(stable=True), torch.cat([count.new_zeros(1), count.cumsum(0)])

    @property
    def _image_bytes(self) -> int:
        return 4 * max(group.box for group in self.table.groups) ** 2

    def _read(self, rows: Tensor, pin: bool) -> Pixels:
        boxes = torch.tensor([group.box for group in self.table.groups])[self.table.group[rows]]
        parts = []
        for box in boxes.unique().tolist():
            position = (boxes == box).nonzero().squeeze(-1)
            images = torch.empty(len(position), box, box, pin_memory=pin)
            picked = rows[position].numpy()
            self.stack.read(self.table.file[picked], self.table.frame[picked], images.numpy())
            self._check_finite(images, rows[position])
            parts.append((position, images))
        return Pixels(tuple(parts))

    def _check_finite(self, images: Tensor, rows: Tensor) -> None:
        if bool(torch.isfinite(images.sum(dtype=torch.float64))):
            return
        row = int(rows[int((~torch.isfinite(images).flatten(1).all(1)).nonzero()[0])])
        stack, frame = self.table.files[self.table.file[row]], self.table.frame[row] + 1
        raise ValueError(f"image {row} ({frame}@{stack}) has pixels that are not finite; leave it out by subset=")

    def _batch(self, rows: Tensor, pixels: Pixels, device: torch.device | str) -> Batch:
        half = HalfPlane.of(self.box, device)
        numbers = self._sent(self._numbers[rows], device)
        shown = self.particle[rows]
        particle, first = numbered(shown)
        integers = [rows, self.table.group[rows], self._premultiplied[rows].long(), particle, shown]
        whole = self._sent(torch.stack(integers, -1), device)
        freq_scale, factor, exposure = numbers[:, 20:].unbind(-1)
        ctf = self._ctf_of(numbers[:, :9], freq_scale, exposure, half)
        noise_scale = None
        if bool(self._premultiplied.any()):
            squared = whole[:, 2:3].bool()
            noise_scale = torch.where(squared, ctf.abs().clamp_min(LEAST_NOISE), 1.0)
            ctf = torch.where(squared, ctf.square(), ctf)
        return Batch(
            half=half,
            index=whole[:, 0],
            image=pixels.to_half_plane(half, factor, self.normalize, self.window),
            ctf=ctf,
            noise_scale=noise_scale,
            rotation=numbers[:, 9:18].unflatten(-1, (3, 3)),
            translation=numbers[:, 18:20],
            noise_group=whole[:, 1],
            freq_scale=freq_scale,
            particle=whole[:, 3],
            shown=whole[:, 4] if len(first) == len(rows) else self._sent(shown[first], device),
            size=len(first),
            window_power=window_power(self.box, self.window),
        )

    def _sent(self, values: Tensor, device: torch.device | str) -> Tensor:
        if torch.device(device).type != "cuda":
            return values.to(device)
        return values.pin_memory().to(device, non_blocking=True)

    def _ctf_of(self, optics: Tensor, freq_scale: Tensor, exposure: Tensor, half: HalfPlane) -> Tensor:
        """(B, P)"""
        if self.ctf is None:
            return torch.ones(len(optics), len(half), device=half.k.device)
        frequency = half.k / (self.apix * self.box)
        if len({group.field_angstrom for group in self.table.groups}) > 1:
            frequency = frequency * freq_scale[:, None, None]
        out = torch.empty(len(optics), len(half), device=half.k.device)
        for rows in chunks(len(optics), len(half), half.k.device):
            ctf, s = CTF(*optics[rows].unbind(-1)), frequency if frequency.ndim == 2 else frequency[rows]
            out[rows] = ctf(s)
            if self.table.exposure is not None:
                out[rows] *= attenuation(s, exposure[rows], ctf.voltage_kv)
        return out

    def fingerprint(self) -> str:
        """SHA-256 of what the images, poses and optics are, without where they lie."""
        digest = hashlib.sha256()
        names = [Path(name).name for name in self.table.files]
        settings = (self.box, self.invert, self.normalize, self.window, self.table.groups, names)
        digest.update(repr(settings).encode())
        digest.update(np.ascontiguousarray(self.table.file, np.int64).tobytes())
        digest.update(np.ascontiguousarray(self.table.frame, np.int64).tobytes())
        fields = [] if self.ctf is None else list(vars(self.ctf).values())
        for values in (*fields, self.table.rotation, self.table.shift_px, self.table.sign, self.table.exposure):
            digest.update(b"none" if values is None else values.contiguous().numpy().tobytes())
        digest.update(self.table.group.numpy().tobytes() + self.half_set.numpy().tobytes())
        if self.several:
            digest.update(self.particle.numpy().tobytes())
        if self.table.view is not None:
            digest.update(self.table.view.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def write_star(
        self,
        path: str | Path,
        rotation: Tensor | None = None,
        translation: Tensor | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a RELION 3.1 STAR file, with the input's own columns where it was a STAR file.

        rotation (N, 3, 3) and translation (N, 2, pixels of the model's box) replace the poses, `extra` adds columns
        (N,). Stacks are named relative to the new file's folder. A tilt series is written as its 2-D images.
        """
        from pyro_cryo.data.export import to_blocks
        from pyro_cryo.data.star import write_star

        table = self.table.used()
        path_of = dict(zip(self.table.files, (file.path for file in self.stack.files), strict=True))
        stacks = [path_of[name] for name in table.files]
        poses = self._stored_poses(rotation, translation)
        write_star(path, to_blocks(table, stacks, Path(path).resolve().parent, poses, extra or {}))

    def write_cs(self, path: str | Path, rotation: Tensor | None = None, translation: Tensor | None = None) -> None:
        """Write the rows of a .cs input again, uid and all; poses as in `write_star`."""
        from pyro_cryo.data.cryosparc import write_particles

        if not isinstance(self.table.source, np.ndarray):
            raise ValueError(f"{self.table.path} is not a .cs file, so its rows have no uid; write a .star file")
        write_particles(path, self.table.source, self._stored_poses(rotation, translation))

    def _stored_poses(self, rotation: Tensor | None, translation: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Poses with displacements in stored pixels; None where neither is given."""
        if rotation is None and translation is None:
            return None
        chosen = self.rotation if rotation is None else rotation.detach().cpu()
        moved = self.translation if translation is None else translation.detach().cpu()
        if chosen.shape != (len(self), 3, 3) or moved.shape != (len(self), 2):
            raise ValueError(
                f"poses of {tuple(chosen.shape)}, {tuple(moved.shape)}; expected ({len(self)}, 3, 3) and (.., 2)"
            )
        return chosen, moved / self._pixels_of_model[:, None]


def _in_words(asked: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `Particles.open` as JSON can say them: absolute paths, lists of numbers, no defaults."""
    said: dict[str, Any] = {}
    for name, value in asked.items():
        if value is None or value is False:
            continue
        if isinstance(value, str | Path):
            said[name] = str(Path(value).resolve())
        else:
            said[name] = np.asarray(value).tolist() if name == "subset" else value
    return said
