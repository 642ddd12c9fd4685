"""Maps of one molecule that were found with either hand, each in a frame of its own, brought to one hand and frame.

Images say nothing of the hand of what they show. At low frequency one state of a molecule that moves may look more like
the mirror image of another than like that one itself; then images of some states are found in the poses of the wrong
hand, with which they agree as well. A family of maps tells the two apart, and at higher frequency what does not move
shows with which hand a state was found.

Two maps are compared by their correlation with every shell whitened, over all rotations and shifts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from pyro_cryo.physics import rotation_grid
from pyro_cryo.physics.fourier import flip_hand, shift_phase
from pyro_cryo.physics.rotations import exp
from pyro_cryo.physics.slices import fourier_grid, read_grid

LEVEL, COARSE = 2, 6.0  # grid of rotations that is searched whole, and up to which frequency, cycles a box
ANYWHERE = 8.0  # the same of maps that may lie anywhere: below, what they differ in may show more than what they share
BEST = 8  # cells of it, about which maps are compared further
FINE = 12.0
STEPS_DEG = (7.5, 3.75, 1.9)
ROUNDS = 2  # more, beside the mean of all maps as they were placed
AT_ONCE = 256  # rotations


@dataclass(frozen=True)
class Placement:
    """What brings a map V to where another lies: V'(r) = V(M Q^T (r - s)).

    rotation:    (3, 3) Q
    shift:       (3,) s along x, y, z, boxes
    mirrored:    whether M is diag(1, 1, -1), or 1
    correlation: of the two maps then
    """

    rotation: Tensor
    shift: Tensor
    mirrored: bool
    correlation: float

    def poses(self, rotation: Tensor, translation: Tensor, box: int) -> tuple[Tensor, Tensor]:
        """Poses (n, 3, 3), (n, 2) in pixels of a box, of images of V as those of V'."""
        mirror = torch.diag(rotation.new_tensor([1.0, 1.0, -1.0 if self.mirrored else 1.0]))
        turned = mirror @ rotation @ mirror @ self.rotation.to(rotation).mT
        return turned, translation - box * (turned @ self.shift.to(rotation))[:, :2]


def to_one_hand(maps: Tensor, share: Tensor) -> list[Placement]:
    """How K maps (K, b, b, b) are brought to the hand and the frame of the one with the largest share (K,) of images.

    A map that has this hand is in about this frame, as images that are compared with one family are: however well it
    agreed elsewhere, it is turned by little. One of the other hand may be anywhere.
    """
    kmax, most = min(FINE, maps.shape[-1] / 2 - 1), int(share.argmax())
    grids = [(fourier_grid(one), fourier_grid(flip_hand(one))) for one in maps]
    here = torch.eye(3, device=maps.device)
    placed = {most: Placement(here, torch.zeros_like(here[0]), False, 1.0)}
    begun = _Reference.of(grids[most][0], min(COARSE, kmax))
    about = {number: [here[None], *map(begun.best_cells, both)] for number, both in enumerate(grids) if number != most}
    for steps in (STEPS_DEG, *(STEPS_DEG[1:],) * ROUNDS):
        before = dict(placed)
        for number, begin in about.items():
            others = {n: one for n, one in before.items() if n != number}
            reference = _Reference.mean(grids, others, share, kmax)
            still, elsewhere, other = (
                reference.climbed(grids[number][flip], rotation, steps, flip)
                for rotation, flip in zip(begin, (False, False, True), strict=True)
            )
            same = max(still.correlation, elsewhere.correlation) >= other.correlation
            placed[number] = still if same else other
            about[number] = [one.rotation[None] for one in (still, elsewhere, other)]
    return [placed[number] for number in range(len(maps))]


def to_one_frame(maps: Tensor, share: Tensor, mirrored: bool) -> list[Placement]:
    """How K maps (K, b, b, b) that may lie anywhere are brought to the frame of that with the largest share (K,).

    Each goes where it agrees best with the mean of the others, of those that agreed better than the median.

    mirrored: whether they may be of either hand
    """
    kmax, most = min(FINE, maps.shape[-1] / 2 - 1), int(share.argmax())
    grids = [(fourier_grid(one), fourier_grid(flip_hand(one))) for one in maps]
    here = torch.eye(3, device=maps.device)
    placed = {most: Placement(here, torch.zeros_like(here[0]), False, 1.0)}
    for _ in range(1 + ROUNDS):
        before, middle = dict(placed), median(one.correlation for one in placed.values())
        for number in set(range(len(maps))) - {most}:
            others = {n: one for n, one in before.items() if n != number and one.correlation >= middle}
            coarse, fine = (_Reference.mean(grids, others, share, k) for k in (min(ANYWHERE, kmax), kmax))
            found = [
                fine.climbed(grids[number][flip], coarse.best_cells(grids[number][flip]), STEPS_DEG, flip)
                for flip in ((False, True) if mirrored else (False,))
            ]
            placed[number] = max(found, key=lambda one: one.correlation)
    return [placed[number] for number in range(len(maps))]


@dataclass(frozen=True)
class _Reference:
    """Half of a map's coefficients within a ball: k (P, 3), cycles a box, their shell (P,) and whitened value (P,)."""

    k: Tensor
    shell: Tensor
    value: Tensor

    @staticmethod
    def of(grid: Tensor, kmax: float) -> _Reference:
        """A map's own."""
        most = int(kmax)
        axis = torch.arange(-most, most + 1, device=grid.device)
        x, y, z = (one.flatten() for one in torch.meshgrid(axis, axis, axis, indexing="ij"))
        half = (x > 0) | ((x == 0) & ((y > 0) | ((y == 0) & (z > 0))))
        k = torch.stack([x, y, z], -1)[half].float()
        k = k[k.norm(dim=1) <= kmax]
        shell = k.norm(dim=1).round().long()
        return _Reference(k, shell, _white(read_grid(grid, k), shell))

    @staticmethod
    def mean(
        grids: list[tuple[Tensor, Tensor]], placed: dict[int, Placement], share: Tensor, kmax: float
    ) -> _Reference:
        """The mean of those maps, of either hand each, that were placed, by their share (K,)."""
        plain = _Reference.of(grids[0][0], kmax)
        total = torch.zeros_like(plain.value)
        for number, one in placed.items():
            slices = read_grid(grids[number][one.mirrored], plain.k @ one.rotation)
            total += share[number] * slices * shift_phase(plain.k, one.shift, 1)
        return replace(plain, value=_white(total, plain.shell))

    def beside(self, grid: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Another map at rotations (n, 3, 3): its correlation (n,) at the best shift, and that (n, 3), boxes."""
        side = 3 * int(self.k.max())
        x, y, z = (self.k.long() % side).T
        opposite = (x == 0).nonzero()[:, 0]
        correlation, place = [], []
        for part in rotation.split(AT_ONCE):
            product = _white(read_grid(grid, self.k @ part), self.shell).conj() * self.value
            spectrum = product.new_zeros(len(part), side, side, side // 2 + 1)
            spectrum[:, z, y, x] = product
            spectrum[:, -z[opposite], -y[opposite], 0] = product[:, opposite].conj()
            best = torch.fft.irfftn(spectrum, s=(side,) * 3, norm="forward").flatten(1).max(1)
            correlation.append(best.values / (2 * len(self.k)))
            place.append(best.indices)
        shift = torch.stack(torch.unravel_index(torch.cat(place), (side,) * 3)[::-1], -1) / side
        return torch.cat(correlation), (shift + 0.5) % 1 - 0.5

    def best_cells(self, grid: Tensor) -> Tensor:
        """Rotations (n, 3, 3) of a whole grid, at which another map agrees best."""
        whole = rotation_grid.centres(rotation_grid.cells(LEVEL, device=grid.device), LEVEL)
        return whole[self.beside(grid, whole)[0].topk(BEST).indices]

    def climbed(self, grid: Tensor, rotation: Tensor, steps_deg: tuple[float, ...], flip: bool) -> Placement:
        """Where a map agrees best, sought about rotations (n, 3, 3) in smaller and smaller steps."""
        around = torch.cartesian_prod(*[torch.arange(-1.0, 2.0, device=grid.device)] * 3)
        for step in steps_deg:
            rotation = (exp(torch.deg2rad(step * around)) @ rotation[:, None]).flatten(0, 1)
            correlation, shift = self.beside(grid, rotation)
            best = correlation.argmax()
            rotation = rotation[best][None]
        return Placement(rotation[0], shift[best], flip, float(correlation[best]))


def _white(value: Tensor, shell: Tensor) -> Tensor:
    """Coefficients (*batch, P) of a map, of mean square 1 in every shell (P,)."""
    power = torch.zeros(*value.shape[:-1], int(shell.max()) + 1, device=value.device)
    power.index_add_(-1, shell, value.abs().square())
    return value / (power / shell.bincount()).clamp_min(1e-30).sqrt()[..., shell]
