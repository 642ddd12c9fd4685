"""Molecules as sums of Gaussian blobs, whose projections are known exactly: toys, and atoms from a PDB file.

A blob of weight w at (x, y, z) is the density w exp(-d^2 / 2 sigma^2); the projection of a sum of blobs is a sum of
two-dimensional Gaussians, w sqrt(2 pi) sigma exp(-d^2 / 2 sigma^2).
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_cryo.physics.rotations import exp

SHARPEST_BLOB_PX = 0.8
"""Blobs are never narrower than this on the grid: at 0.8 pixels 4% of the amplitude is left at Nyquist."""


@dataclass(frozen=True)
class Complex:
    """A molecule in S states.

    xyz:            (S, A, 3) blob centres in angstrom about the origin, which becomes the centre of the box
    weight:         (S, A) height of each blob; 0 where a state lacks it
    coordinate:     (S, q) where each state lies: a continuous coordinate, or the state's number for discrete states
    sigma_angstrom: standard deviation of every blob
    """

    xyz: Tensor
    weight: Tensor
    coordinate: Tensor
    sigma_angstrom: float

    def __len__(self) -> int:
        return len(self.xyz)

    @property
    def radius_angstrom(self) -> float:
        """Distance from the origin of the farthest blob of any state."""
        return float(self.xyz.norm(dim=-1)[self.weight != 0].max())

    def apix_for(self, box: int, apix: float | None) -> float:
        """`apix` if the molecule fits, or by default the pixel size at which it fills 70% of the box.

        Raises ValueError where the molecule sticks out of the box.
        """
        if apix is None:
            return float(f"{2 * self.radius_angstrom / (0.7 * box):.3g}")
        if self.radius_angstrom > 0.5 * box * apix:
            fits = 2 * self.radius_angstrom / (0.7 * box)
            raise ValueError(
                f"a molecule of {2 * self.radius_angstrom:.0f} angstrom does not fit a box of {box} pixels of {apix:g} "
                f"angstrom; give apix={fits:.3g} or a larger box"
            )
        return float(apix)

    def sigma_px(self, apix: float) -> float:
        """Width of the blobs on a grid of `apix` angstrom, never below what the grid can carry."""
        return max(self.sigma_angstrom / apix, SHARPEST_BLOB_PX)

    def volume(self, state: int, box: int, apix: float) -> Tensor:
        """The density of one state on the grid: (D, D, D), z-y-x."""
        rows = self.weight[state] != 0
        sigma, xyz, weight = self.sigma_px(apix), self.xyz[state][rows] / apix, self.weight[state][rows]
        total = torch.zeros(box, box * box)
        for part in torch.arange(len(xyz)).split(max(1, 2**24 // box**2)):
            ex, ey, ez = (_profile(xyz[part, i], box, sigma) for i in range(3))
            yx = (ey[:, :, None] * ex[:, None, :]).flatten(1)
            total += (ez * weight[part, None]).T @ yx
        return total.view(box, box, box)

    def projector(self, state: int, box: int, apix: float) -> Callable[[Tensor, Tensor], Tensor]:
        """A function of rotations (n, 3, 3) and shifts (n, 2) in pixels that gives the projections (n, D, D)."""
        rows = self.weight[state] != 0
        sigma, xyz = self.sigma_px(apix), self.xyz[state][rows] / apix
        weight = self.weight[state][rows] * (math.sqrt(2 * math.pi) * sigma)

        def project(rotation: Tensor, shift_px: Tensor) -> Tensor:
            xy = xyz @ rotation[:, :2].mT + shift_px[:, None]
            ex, ey = _profile(xy[..., 0], box, sigma), _profile(xy[..., 1], box, sigma)
            return (ey * weight[:, None]).mT @ ex

        return project

    def images_at_once(self, box: int) -> int:
        """How many projections fit into about 100 MB of working memory."""
        return max(1, 2**23 // (self.xyz.shape[1] * box))


def _profile(position: Tensor, box: int, sigma: float) -> Tensor:
    """exp(-d^2 / 2 sigma^2) along one axis: (*batch, A) pixels -> (*batch, A, D)."""
    grid = torch.arange(box, dtype=position.dtype) - box // 2
    return torch.exp((grid - position[..., None]).square() * (-0.5 / sigma**2))


# ------------------------------------------------------------------------------------------------ built-in toys
def hinge(n_states: int = 51) -> Complex:
    """Two domains of 200 blobs: an arm swings about a hinge at the body's edge through -45 to +45 degrees.

    The coordinate runs from 0 to 1. The complex is about 150 angstrom across and has no symmetry and no mirror.
    """
    _check_states(n_states)
    coordinate = torch.linspace(0, 1, n_states) if n_states > 1 else torch.full((1,), 0.5)
    return _swung(coordinate[:, None], 90 * (coordinate - 0.5), axis=(-0.25, 0.45, 1.0))


def rotor(n_states: int = 60) -> Complex:
    """The same two domains: the arm turns about a shaft that leaves the body, full circle.

    The coordinate is (cos, sin) of the angle.
    """
    _check_states(n_states)
    angle = torch.arange(n_states) * (360 / n_states)
    radians = torch.deg2rad(angle)
    return _swung(torch.stack([radians.cos(), radians.sin()], -1), angle, axis=(1.0, 0.1, 0.05))


def two_arms(n_each: int = 9) -> Complex:
    """The hinge's body and arm, and a second arm that swings by itself: n_each angles of each.

    The coordinates run from 0 to 1 each.
    """
    _check_states(n_each)
    along = torch.linspace(0, 1, n_each) if n_each > 1 else torch.full((1,), 0.5)
    coordinate = torch.cartesian_prod(along, along)
    one = _swung(coordinate[:, :1], 90 * (coordinate[:, 0] - 0.5), axis=(-0.25, 0.45, 1.0))
    arm = _globule([((-44, 14, 12), (20, 11, 12)), ((-62, 30, 20), (13, 18, 11))], n=55, seed=13)
    second = _turned(arm, 80 * (coordinate[:, 1] - 0.5), (-30.0, 8.0, 6.0), axis=(0.9, 0.2, 0.4))
    xyz = torch.cat([one.xyz, second], 1)
    return Complex(xyz - xyz.mean((0, 1)), torch.ones(xyz.shape[:2]), coordinate, one.sigma_angstrom)


def _check_states(n_states: int) -> None:
    if n_states < 1:
        raise ValueError(f"{n_states} states; give at least 1")


def _swung(coordinate: Tensor, angle_deg: Tensor, axis: tuple[float, float, float]) -> Complex:
    """A body, and an arm turned by angles (S,) about an axis through the body's edge."""
    body = _globule(
        [((0, 0, 0), (30, 26, 22)), ((-26, 14, 10), (18, 15, 20)), ((8, -24, -16), (15, 13, 12))], n=140, seed=11
    )
    arm = _globule(
        [((46, 8, 6), (21, 12, 13)), ((68, 22, 12), (14, 21, 12)), ((66, 40, 26), (10, 11, 16))], n=60, seed=12
    )
    swung = _turned(arm, angle_deg, (28.0, 3.0, 2.0), axis)
    xyz = torch.cat([body.expand(len(angle_deg), -1, -1), swung], 1)
    xyz = xyz - xyz.mean((0, 1))
    return Complex(xyz, torch.ones(xyz.shape[:2]), coordinate, sigma_angstrom=4.0)


def _turned(
    xyz: Tensor, angle_deg: Tensor, pivot: tuple[float, float, float], axis: tuple[float, float, float]
) -> Tensor:
    """Points (A, 3) turned by angles (S,) about an axis through a pivot: (S, A, 3)."""
    turn = exp(torch.deg2rad(angle_deg)[:, None] * torch.nn.functional.normalize(torch.tensor(axis), dim=0))
    return (xyz - torch.tensor(pivot)) @ turn.mT + torch.tensor(pivot)


def classes() -> Complex:
    """Four assembly states of one complex: a core alone, then with one, two and three more subunits bound.

    The coordinate repeats the state's number.
    """
    core = _globule([((0, 0, 0), (32, 27, 20)), ((18, 22, 12), (16, 14, 15))], n=110, seed=21)
    subunits = [
        _globule([((-38, 12, 8), (15, 18, 14))], n=32, seed=22),
        _globule([((8, -34, 14), (22, 12, 13))], n=34, seed=23),
        _globule([((10, 6, -34), (13, 13, 16))], n=26, seed=24),
    ]
    bound = torch.arange(1, 4) <= torch.arange(4)[:, None]  # state s holds the first s subunits
    return _assembled(core, subunits, bound)


def ten_classes() -> Complex:
    """Ten assembly states: a core, and of five subunits none, one, or one and another.

    The coordinate repeats the state's number.
    """
    core = _globule([((0, 0, 0), (30, 27, 21)), ((16, 20, 12), (16, 14, 15))], n=110, seed=31)
    subunits = [
        _globule([((-38, 12, 8), (15, 18, 14))], n=32, seed=32),
        _globule([((8, -36, 14), (22, 12, 13))], n=34, seed=33),
        _globule([((10, 6, -36), (14, 13, 16))], n=30, seed=34),
        _globule([((42, -6, 4), (14, 17, 12))], n=30, seed=35),
        _globule([((-12, 16, 38), (17, 13, 14))], n=32, seed=36),
    ]
    held = [(), (0,), (1,), (2,), (3,), (4,), (0, 1), (1, 2), (2, 3), (3, 4)]
    return _assembled(core, subunits, torch.tensor([[n in some for n in range(5)] for some in held]))


def _assembled(core: Tensor, subunits: list[Tensor], bound: Tensor) -> Complex:
    """States that hold a core, and the subunits that bound (S, subunits) says."""
    xyz = torch.cat([core, *subunits])
    sizes = torch.tensor([len(part) for part in (core, *subunits)])
    held = torch.cat([torch.ones_like(bound[:, :1]), bound], 1)
    states = len(bound)
    return Complex(
        (xyz - xyz.mean(0)).expand(states, -1, -1).contiguous(),
        held.float().repeat_interleave(sizes, dim=1),
        torch.arange(float(states))[:, None],
        sigma_angstrom=4.0,
    )


def _globule(ellipsoids: list[tuple[tuple[int, ...], tuple[int, ...]]], n: int, seed: int) -> Tensor:
    """n points spread through a union of ellipsoids (centre, half-axes): (n, 3) angstrom.

    Of many random points the farthest from those already taken comes next, which packs them like residues: evenly,
    but without a lattice.
    """
    rng = np.random.default_rng(seed)
    centre, axes = (np.array([e[i] for e in ellipsoids], float) for i in (0, 1))
    low, high = (centre - axes).min(0), (centre + axes).max(0)
    points = rng.uniform(low, high, (6000, 3))
    inside = ((((points[:, None] - centre) / axes) ** 2).sum(-1) < 1).any(1)
    points = points[inside][: 8 * n]
    taken = [0]
    distance = np.linalg.norm(points - points[0], axis=1)
    while len(taken) < n:
        taken.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(points - points[taken[-1]], axis=1))
    return torch.from_numpy(points[taken]).float()


# ------------------------------------------------------------------------------------------------ atoms from a file
def from_pdb(path: str | Path, sigma_angstrom: float = 3.0) -> Complex:
    """One blob a residue from a PDB file (.pdb, also gzipped): CA atoms of weight 1 and P atoms of weight 3.

    The weights stand for the masses of an amino acid and a nucleotide. Every MODEL is a state, with its number from 0
    as the coordinate. The mean of all centres moves to the origin.

    Raises FileNotFoundError, or ValueError where no atom is found or the models differ in their atoms.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"PDB file {path} does not exist; check the path")
    models = _read_models(path)
    if not models:
        raise ValueError(f"{path} has no CA or P atom in ATOM records; give a protein or nucleic acid in PDB format")
    counts = [len(weight) for _, weight in models]
    if any(weight != models[0][1] for _, weight in models):
        raise ValueError(f"the models of {path} have {counts} CA and P atoms; give models of the same molecule")
    xyz = torch.tensor([xyz for xyz, _ in models], dtype=torch.float64)
    xyz = (xyz - xyz.mean((0, 1))).float()
    weight = torch.tensor([weight for _, weight in models], dtype=torch.float32)
    return Complex(xyz, weight, torch.arange(float(len(models)))[:, None], sigma_angstrom)


def _read_models(path: Path) -> list[tuple[list[list[float]], list[float]]]:
    """Coordinates and weights of each MODEL that has any CA or P atom."""
    weights = {"CA": 1.0, "P": 3.0}
    models: list[tuple[list[list[float]], list[float]]] = [([], [])]
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if line.startswith("MODEL"):
                models.append(([], []))
            weight = weights.get(line[12:16].strip()) if line.startswith("ATOM") else None
            if weight is None or line[16:17] not in (" ", "A"):  # alternate locations: the first only
                continue
            try:
                models[-1][0].append([float(line[a : a + 8]) for a in (30, 38, 46)])
            except ValueError:
                raise ValueError(f"{path} line {number} has no coordinates in columns 31 to 54; mend it") from None
            models[-1][1].append(weight)
    return [m for m in models if m[1]]
