"""Where a particle is seen from, searched over nested grids of rotations and shifts.

With an image's CTF c and noise sigma, its log likelihood at a pose is, up to a constant, a cross term less a square,

    Re sum_k conj(c X / sigma^2) S(t) P(R)  -  1/2 sum_k (c / sigma)^2 |P(R)|^2,

P(R) the central slice of the map at R: matrix products of a batch of images, each with its own CTF and noise, and the
slices of a whole level of the grid. The first level is searched whole, at a low band limit. The cells with most
posterior mass, a beam, are then cut into their children, which are compared in a wider band, and so on. At the end
cells that lie together are one peak.

A particle that is seen in several images, each turned from the first by a known rotation T_v and with a shift of its
own, is searched as a whole: the log mass of a rotation R is the sum over its images of that of T_v R, the shift summed
over. Images with the same T_v have the same slices.

Several maps, of classes or of one family at several z, are searched at once: a hypothesis is a map and a cell of
rotations, numbered map by map in the order of the grid, which is nested all the same.

What a beam leaves out is not what the level that is cut says of it: the cells of most mass are those whose centres lie
well by chance. So some of the others, drawn by their mass, are cut and compared as well; each stands for those like it.
Particles of which much is left out so are searched again with a wider beam.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_cryo.data.batch import Batch, first_of
from pyro_cryo.guides.poses import PoseModes
from pyro_cryo.physics import rotation_grid, shift_grid
from pyro_cryo.physics.fourier import HalfPlane, shift_phase
from pyro_cryo.physics.rotations import angle_deg
from pyro_cryo.physics.slices import fourier_grid, read_grid, slice_coordinates
from pyro_cryo.rows import Rows
from pyro_cryo.volumes.conjugate import noise_sd

NUMBERS = 1 << 22  # log likelihoods that are held at a time on a CPU
NUMBERS_GPU = 1 << 28
TABLE = 1 << 24  # coefficients of all slices of a level, that are kept rather than read again
NOTHING = -60.0  # nats below the best, that count no more: exponentials of less are slow
WIDER = 4  # times as wide is the next beam
PROBES = 12  # cells of rotations beside the beam, and half as many of shifts, that tell what it leaves out
ALIKE = 1e3  # views whose rotations agree to a thousandth are one
APART = 1.6  # steps of the grid between two peaks


@dataclass(frozen=True)
class Level:
    """Levels of the grids of rotations and of shifts, and the band limit, cycles a box, in which they are compared."""

    rotations: int
    shifts: int
    kmax: float


@dataclass(frozen=True)
class Found(Rows):
    """Peaks of the posterior of B images' poses.

    rotation:    (B, K, 3, 3)
    translation: (B, K, 2) pixels of the images' box
    log_mass:    (B, K) of the cells about each peak, the first one's the largest; minus infinity beyond the last peak
    left_out:    (B,) share of the mass that the beams left out, as the finer level sees it: an estimate from probes,
                 over all images about half of the truth, as beams are no longer widened once it is small by chance
    evidence:    (B,) log mean likelihood over the poses of the first level, beside that of an empty image
    which:       (B, K) long, the map in which each peak is

    All but rotation and translation are of the particle, alike in all its images.
    """

    rotation: Tensor
    translation: Tensor
    log_mass: Tensor
    left_out: Tensor
    evidence: Tensor
    which: Tensor

    @property
    def modes(self) -> PoseModes:
        """The peaks as where modes begin to climb: all alike."""
        there = self.log_mass.isfinite()
        weight = torch.zeros_like(self.log_mass).masked_fill(~there, -torch.inf).log_softmax(1)
        precision = torch.eye(5, device=weight.device).expand(*weight.shape, 5, 5).clone()
        return PoseModes(self.rotation, self.translation, precision, weight)


class _View(NamedTuple):
    """How an image sees its particle: the factor of its slices' coordinates, and the rotation from the first view.

    key: the same numbers, rounded: what views that are alike have in common
    """

    key: tuple[int, ...]
    freq_scale: float
    rotation: tuple[float, ...]

    @property
    def turn(self) -> Tensor:
        """(3, 3)"""
        return torch.tensor(self.rotation).view(3, 3)


@dataclass(frozen=True)
class _Seen:
    """All views of a search, and which of them each of some images has: view (B,) long."""

    views: list[_View]
    view: Tensor

    def groups(self) -> Iterator[tuple[Tensor | slice, int]]:
        """Images that have one view, and the number of that."""
        numbers = self.view.unique().tolist()
        for number in numbers:
            yield (slice(None) if len(numbers) == 1 else (self.view == number).nonzero()[:, 0]), number


@dataclass(frozen=True)
class _Cells:
    """Cells that are compared: rotations (n, C) and shifts (B, T), or (C,) and (T,) where all have the same.

    value (B, T, C): log posterior of every pair of an image
    mass (n, C): of rotations, the shifts summed over; of_shift (B, T): of shifts, the rotations summed over
    """

    level: Level
    rotation: Tensor
    shift: Tensor
    value: Tensor
    mass: Tensor
    of_shift: Tensor

    @staticmethod
    def of(level: Level, batch: Batch, rotation: Tensor, shift: Tensor, value: Tensor, log_prior: Tensor) -> _Cells:
        """log_prior (n, C) or (C,) of the maps that the rotations are of."""
        # What is nothing in one image may be much in another: where images add up, each rotation has its own scale.
        most = value.amax(1 if batch.several else (1, 2), keepdim=True)
        share = (value - most).clamp_min_(NOTHING).exp_()
        each = share.sum(1).log() + most[:, 0]
        mass = batch.by_particle(each) + log_prior
        if not batch.several and not bool(log_prior.any()):
            return _Cells(level, rotation, shift, value, mass, share.sum(2).log() + most[..., 0])
        told = batch.of_images(mass) - each + most[:, 0]  # of a rotation's best shift, with what other images say
        best = told.amax(1, keepdim=True)
        of_shift = (share @ (told - best).clamp_min_(NOTHING).exp_()[..., None])[..., 0].log() + best
        return _Cells(level, rotation, shift, value, mass, of_shift)


@dataclass(frozen=True)
class _Beam:
    """Cells that go on (B, M + P): the `own` of most mass, and probes, each for exp(log_weight) of the others."""

    cell: Tensor
    log_weight: Tensor
    own: int

    @staticmethod
    def of(cell: Tensor, mass: Tensor, most: int, probes: int) -> _Beam:
        """Of cells, of all images (C,) or of each (B, C), with log masses (B, C)."""
        own = min(most, mass.shape[1])
        place = mass.topk(own, 1).indices
        weight = torch.zeros_like(mass[:, :own])
        if own < mass.shape[1]:
            # by the root of the mass, evenly along the nested order: those of little mass may have more than they show
            chance = (0.5 * mass.scatter(1, place, -torch.inf)).softmax(1)
            even = ((torch.arange(probes, device=mass.device) + 0.5) / probes).expand(len(mass), -1).contiguous()
            drawn = torch.searchsorted(chance.cumsum(1), even).clamp_max_(mass.shape[1] - 1)
            place = torch.cat([place, drawn], 1)
            weight = torch.cat([weight, -(probes * chance.gather(1, drawn)).log()], 1)
        return _Beam(_taken(cell, place), weight, own)

    def cut(self, children: Callable[[Tensor], Tensor]) -> _Beam:
        """Into the children of its cells."""
        cell = children(self.cell)
        times = cell.shape[-1]
        return _Beam(cell.flatten(1), self.log_weight.repeat_interleave(times, 1), self.own * times)


class Search:
    """A search for the poses of images in one map, or in which of several and where.

    volume:    (b, b, b), b the box of the images, or (M, b, b, b)
    levels:    coarse to fine
    extent_px: half the side of the square of shifts, pixels of that box
    shift_sd:  of their prior, Normal(0, shift_sd^2), those pixels
    symmetry:  (G, 3, 3) point group of the map
    beam:      cells of a level that are cut, of rotations and half as many of shifts
    spared:    share of a particle's mass that beams may leave out. Of which they leave out more, it is searched again,
               each time with a beam four times as wide, up to what fits in memory; 1: never
    peaks:     K
    apart:     steps of the last grid, within which cells are of one peak; 0 makes every cell a peak
    turn:      (3, 3) rotation of the whole grid: R @ turn for R. Only without symmetry; default none
    log_share: (M,) log of how many particles each map has, of all; default: each as many
    """

    def __init__(
        self,
        volume: Tensor,
        levels: tuple[Level, ...],
        extent_px: float,
        shift_sd: float,
        symmetry: Tensor,
        beam: int = 32,
        spared: float = 0.01,
        peaks: int = 4,
        apart: float = APART,
        turn: Tensor | None = None,
        log_share: Tensor | None = None,
    ) -> None:
        self.levels, self.extent, self.shift_sd, self.peaks = levels, extent_px, shift_sd, peaks
        self.beam, self.spared = beam, spared
        self.apart_deg = apart * rotation_grid.step_deg(levels[-1].rotations)
        box, maps = volume.shape[-1], 1 if volume.dim() == 3 else len(volume)
        self.half = HalfPlane.of(box, volume.device)
        self.grids = [fourier_grid(one) for one in volume.view(maps, box, box, box)]
        level, each = levels[0].rotations, rotation_grid.covering(levels[0].rotations, symmetry.to(volume.device))
        number = torch.arange(maps, device=volume.device)
        self.cells = (rotation_grid.count(level) * number[:, None] + each).flatten()
        equal = torch.full((maps,), -math.log(maps), device=volume.device)
        self.log_share = equal if log_share is None else log_share.to(volume.device)
        self.shifts = shift_grid.disc(levels[0].shifts, volume.device)
        self.turn = torch.eye(3, device=volume.device) if turn is None else turn.to(volume.device)
        self._tables: dict[tuple[Level, tuple[int, ...]], Tensor] = {}

    def __call__(self, batch: Batch, sigma: Tensor) -> Found:
        """The peaks of images of the map's box; sigma (noise groups, b / 2 + 1)."""
        held = NUMBERS if self.half.k.device.type == "cpu" else NUMBERS_GPU
        beam, found = self.beam, self._in_parts(batch, sigma, self.beam, held)
        while self._numbers(beam) != self._numbers(beam * WIDER) and max(self._numbers(beam * WIDER)) <= held:
            again = (found.left_out > self.spared).nonzero()[:, 0]
            if not len(again):
                break
            beam *= WIDER
            found[again] = self._in_parts(batch[again], sigma, beam, held)
        return found

    def _numbers(self, beam: int) -> list[int]:
        """Log likelihoods of an image that are compared at a time, of every level."""
        turns, shifts = len(self.cells), len(self.shifts)
        numbers = [turns * shifts]
        for level, finer in pairwise(self.levels):
            turns = (min(beam, turns) + PROBES) * 8 ** (finer.rotations - level.rotations)
            shifts = (min(beam // 2, shifts) + PROBES // 2) * 4 ** (finer.shifts - level.shifts)
            numbers.append(turns * shifts)
        return numbers

    def _in_parts(self, batch: Batch, sigma: Tensor, beam: int, held: int) -> Found:
        """The peaks that a beam finds; so many log likelihoods are held at a time."""
        rows = max(1, held // max(self._numbers(beam)))
        views, view = _views(batch)
        # Particles whose first images have one field of view come together: one table of slices serves them all.
        order = batch.of_images(view[batch.first]).argsort(stable=True) if len(views) > 1 else torch.arange(len(batch))
        order = order.to(batch.index.device)
        ends = batch.views[batch.particle[order].unique_consecutive()].cumsum(0).long().tolist()
        parts, begin = [], 0
        for end, following in pairwise([*ends, ends[-1] + rows]):
            if following - begin > rows:
                parts.append(order[begin:end])
                begin = end
        found = [self._of(batch[part], _Seen(views, view[part]), sigma, beam) for part in parts]
        return Found.of(found)[torch.cat(parts).argsort()]

    def _of(self, batch: Batch, seen: _Seen, sigma: Tensor, beam: int) -> Found:
        first, *finer = self.levels
        value = self._log_posterior(batch, seen, sigma, first, self.cells, self.shifts)
        cells = self._cells(first, batch, self.cells, self.shifts, value)
        evidence = cells.mass.logsumexp(1) - math.log(len(self.cells) / len(self.grids))
        kept = torch.ones_like(evidence)
        for level in finer:
            turns = _Beam.of(cells.rotation, cells.mass, beam, PROBES)
            shifts = _Beam.of(cells.shift, cells.of_shift, beam // 2, PROBES // 2)
            for _ in range(level.rotations - cells.level.rotations):
                turns = turns.cut(rotation_grid.children)
            for _ in range(level.shifts - cells.level.shifts):
                shifts = shifts.cut(shift_grid.children)
            value = self._log_posterior(batch, seen, sigma, level, turns.cell, shifts.cell)
            own = value[:, : shifts.own, : turns.own]
            cells = self._cells(level, batch, turns.cell[:, : turns.own], shifts.cell[:, : shifts.own], own)
            every = batch.by_particle((value + shifts.log_weight[..., None]).logsumexp(1)) + turns.log_weight
            every = every + self.log_share[self._map(turns.cell, level)]
            kept = kept * (cells.mass.logsumexp(1) - every.logsumexp(1)).exp()
        rotation, translation, mass, which = self._peaks(batch, cells, 4 * beam)
        return Found(
            batch.relative[:, None] @ batch.of_images(rotation),
            translation,
            *(batch.of_images(value) for value in (mass, 1 - kept, evidence, which)),
        )

    def _cells(self, level: Level, batch: Batch, rotation: Tensor, shift: Tensor, value: Tensor) -> _Cells:
        return _Cells.of(level, batch, rotation, shift, value, self.log_share[self._map(rotation, level)])

    def _log_posterior(
        self, batch: Batch, seen: _Seen, sigma: Tensor, level: Level, rotation: Tensor, shift: Tensor
    ) -> Tensor:
        """Of every pair of cells, rotations (C,) or (n, C) and shifts (T,) or (B, T): (B, T, C)."""
        low = batch.band(self.half.count(level.kmax))
        sd = noise_sd(low, sigma)
        score = torch.view_as_complex(low.image) * low.ctf / sd.square()
        displacement = shift_grid.centres(shift, level.shifts, self.extent)
        unshifted = score[:, None] * shift_phase(low.half.k, displacement, low.half.box).conj()
        unshifted = torch.view_as_real(unshifted).flatten(-2)
        factor = (0.5 * (low.ctf / sd).square())[:, None]
        rotation = rotation if rotation.dim() == 1 else batch.of_images(rotation)
        values = []
        for images, view in seen.groups():
            cells = rotation if rotation.dim() == 1 else rotation[images]
            columns = torch.view_as_real(self._slices(low.half, level, seen.views, view, cells))
            each = unshifted[images] @ columns.flatten(-2).mT
            each -= factor[images] @ columns.square().sum(-1).mT
            values.append((images, each))
        value = values[0][1]
        if len(values) > 1:
            value = value.new_empty(len(batch), *value.shape[1:])
            for images, each in values:
                value[images] = each
        value -= 0.5 * (displacement.square().sum(-1) / self.shift_sd**2)[..., None]
        return value

    def _slices(self, half: HalfPlane, level: Level, views: list[_View], view: int, cell: Tensor) -> Tensor:
        """Slices at cells (C,) or (b, C), as one of all views has them: (C, P) or (b, C, P) complex."""
        count = len(self.grids) * rotation_grid.count(level.rotations)
        size = count * len(half)
        if size * len(views) > TABLE:
            return self._read(half, level, views[view], cell)
        key = (level, views[view].key)
        if key not in self._tables:
            if sum(table.numel() for table in self._tables.values()) + size > TABLE:
                self._tables.clear()
            self._tables[key] = self._read(half, level, views[view], torch.arange(count, device=cell.device))
        return self._tables[key][cell]

    def _read(self, half: HalfPlane, level: Level, view: _View, cell: Tensor) -> Tensor:
        rotation = view.turn.to(self.turn) @ self._rotations(cell, level)
        points = slice_coordinates(rotation, half.k) * view.freq_scale
        if len(self.grids) == 1:
            return read_grid(self.grids[0], points)
        slices, which = points.new_empty(points.shape[:-1], dtype=torch.complex64), self._map(cell, level)
        for number, grid in enumerate(self.grids):
            there = which == number
            slices[there] = read_grid(grid, points[there])
        return slices

    def _map(self, cell: Tensor, level: Level) -> Tensor:
        return cell // rotation_grid.count(level.rotations)

    def _rotations(self, cell: Tensor, level: Level) -> Tensor:
        return rotation_grid.centres(cell % rotation_grid.count(level.rotations), level.rotations) @ self.turn

    def _peaks(self, batch: Batch, cells: _Cells, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Peaks among so many cells: the heaviest, then the heaviest that is not near, ...

        Rotation (n, K, 3, 3), log mass (n, K) and map (n, K) of particles, translation (B, K, 2) of images.
        """
        level = cells.level
        mass, place = cells.mass.topk(min(most, cells.mass.shape[1]), 1)
        cell = _taken(cells.rotation, place)
        value = cells.value.gather(2, batch.of_images(place)[:, None].expand(-1, cells.value.shape[1], -1))
        shift = _taken(cells.shift, value.argmax(1))
        rotation, which = self._rotations(cell, level), self._map(cell, level)
        image = torch.arange(len(mass), device=mass.device)
        at, masses = [], []
        for _ in range(self.peaks):
            heaviest = mass.argmax(1)
            near = angle_deg(rotation, rotation[image, heaviest][:, None]) < self.apart_deg
            near &= which == which[image, heaviest][:, None]
            near[image, heaviest] = True
            at.append(heaviest)
            masses.append(mass.masked_fill(~near, -torch.inf).logsumexp(1))
            mass = mass.masked_fill(near, -torch.inf)
        peak = torch.stack(at, 1)
        translation = shift_grid.centres(shift.gather(1, batch.of_images(peak)), level.shifts, self.extent)
        return rotation[image[:, None], peak], translation, torch.stack(masses, 1), which.gather(1, peak)


def _views(batch: Batch) -> tuple[list[_View], Tensor]:
    """The views that a batch's images have of their particles, and which of them each has (B,)."""
    said = torch.cat([batch.freq_scale[:, None], batch.relative.flatten(1)], 1)
    alike, view = (ALIKE * said).round().long().unique(dim=0, return_inverse=True)
    numbers = zip(alike.tolist(), said[first_of(view, len(alike))].tolist(), strict=True)
    return [_View(tuple(key), scale, tuple(turn)) for key, (scale, *turn) in numbers], view


def _taken(cell: Tensor, place: Tensor) -> Tensor:
    """Cells, of all images (C,) or of each (B, C), at places (B, M)."""
    return cell[place] if cell.dim() == 1 else cell.gather(1, place)
