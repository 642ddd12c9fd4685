"""Poses of molecules that move, refined together with a linear family of maps.

Where all images are compared with one map, poses follow what moves. In a family they need not; but what a turn or a
shift of the whole molecule would do, a component of the family can do as well, and a pass hands little of it back. Two
conditions part motion from pose:

1. While poses climb, no component has a part in a rigid motion of the consensus (Eckart, Phys. Rev. 47 (1935) 552):
   what moves as a whole is the pose's. The family is solved for anew in every pass, without that condition.
2. Afterwards what z tells of the displacements from the table's poses is taken out of them: how far a table is off
   owes nothing to the shape. So the frame is that of the table, in which, say, one domain stands still.

Poses from nothing have no table; there, states that were found with the wrong hand are mirrored after the first passes
(`one_hand`), which are then made again. Some show their hand at finer detail alone: it is looked for again after the
last of the linear passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.coefficients import Projected, Seen
from pyro_cryo.guides.family_landscape import FamilyLikelihood
from pyro_cryo.guides.landscape import MapLikelihood
from pyro_cryo.guides.points import fit_points, log_joint
from pyro_cryo.guides.poses import PoseModes, PosePrior
from pyro_cryo.inference.family import Family, FamilySolver, motion_side
from pyro_cryo.inference.focus import refocusing
from pyro_cryo.inference.one_hand import to_one_hand
from pyro_cryo.inference.pose_em import BATCH, PoseEM, Solved, box_of, march
from pyro_cryo.inference.reconstruct import image_power, reconstruct, sample_rows
from pyro_cryo.inference.refine import STEPS, first_band
from pyro_cryo.inference.stages import Posed, Reached, Stage, through
from pyro_cryo.physics.fourier import HalfPlane, resize
from pyro_cryo.physics.rotations import exp
from pyro_cryo.physics.slices import channel_grid, slope_grid
from pyro_cryo.progress import Progress, quiet

COMPONENTS = 8
CONTRAST_SD = 0.1
HELD = 3  # passes in which components have no rigid part
STATES = 8  # of what moves, each of which may have been found with the wrong hand
STARTS = 10  # of fits of these
HAND_ROUNDS = 2
FEW = 0.03  # of the particles, for which passes are not made again
CURVED_PASSES = 2  # last ones, in a family that bends, from all frequencies
LEADING = 4  # principal components of z whose squares and cubes tell of displacements too


def refined_with_motion(
    particles: Particles,
    prior: PosePrior,
    symmetry: Tensor,
    *,
    components: int = COMPONENTS,
    first: float | None = None,
    start: PoseModes | None = None,
    one_hand: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = quiet,
    kept: Path | None = None,
) -> Posed:
    """Posteriors of poses about those that are known roughly, in a family of maps; the consensus.

    prior:      its centre is where poses begin; where its turn_sd is infinite they only begin there
    symmetry:   (G, 3, 3) point group of every map
    components: of the family, at most
    first:      band of the first pass, cycles a box (default: as unsure as the prior is)
    start:      modes that climb, the first family being that of the best of each image (default: the prior's centre)
    one_hand:   look for states of the wrong hand where poses only begin at the prior's centre, unless there are several
                views of a particle, or symmetry
    kept:       file of the state after each pass, from which a killed refinement goes on; passes that are made again
                for the hand are one with the last before them
    """
    generator = generator or torch.Generator().manual_seed(0)
    sigma = image_power(particles[sample_rows(particles, generator)], BATCH, device)
    em = PoseEM(particles, prior, symmetry.to(device), sigma, generator, progress)
    first = first_band(prior, particles.box) if first is None else first
    bands = [first, *march(first, particles.box / 2 - 1)]
    linear = _Linear(components)
    start = PoseModes.single(prior.rotation, prior.translation) if start is None else start.copy()

    def passed(band: float, solve: Callable[[FamilySolver, int], Family], eckart: bool) -> Stage:
        return lambda reached: _pass(em, start, band, solve, eckart, reached).reached

    stages = [passed(band, linear, number < HELD) for number, band in enumerate(bands)]
    if one_hand and not math.isfinite(prior.turn_sd) and not particles.several and len(symmetry) == 1:
        for number in sorted({min(HELD, len(bands)) - 1, len(bands) - 1}):
            stages[number] = partial(_in_one_hand, em, bands[: number + 1], linear)
    stages += [passed(bands[-1], _Curved(components), False)] * CURVED_PASSES
    return through(em, [*stages, *refocusing(em, stages[-1])], kept)


@dataclass(frozen=True)
class _Linear:
    """The linear family of at most so many components."""

    components: int

    def __call__(self, solver: FamilySolver, side: int) -> Family:
        return solver.subspace(self.components, side, CONTRAST_SD)


@dataclass(frozen=True)
class _Curved:
    """The same, bent."""

    components: int

    def __call__(self, solver: FamilySolver, side: int) -> Family:
        return solver.manifold(solver.coarse_subspace(self.components, side, CONTRAST_SD), side)


@dataclass(frozen=True)
class _Pass:
    """What a pass over all images came to, the family in which they climbed, and what they say of its coefficients."""

    reached: Reached
    family: Family
    seen: Seen


def _pass(
    em: PoseEM,
    start: PoseModes,
    band: float,
    solve: Callable[[FamilySolver, int], Family],
    eckart: bool,
    reached: Reached | None,
) -> _Pass:
    """The family of the poses as they are; all images climb in it."""
    modes = start if reached is None else reached.modes
    whole, box = em.particles.box, box_of(band, em.particles.box)
    poses = modes.best if reached is None else modes.drawn(em.generator, em.particles)
    images = replace(em.particles, box=box).with_poses(poses[0], poses[1] * (box / whole))
    found = reconstruct(images, symmetry=em.symmetry, device=em.device, generator=em.generator, progress=em.progress)
    solver = FamilySolver(images, found, em.symmetry, generator=em.generator, progress=em.progress)
    family = solve(solver, motion_side(found))
    likelihood = likelihood_in(family, found.volume, eckart)
    everyone, evidence, parts = torch.arange(len(em.particles)), torch.zeros((), device=em.device), []
    grid, scale, low = channel_grid(family.maps), box / family.maps.shape[-1], likelihood.count
    for batch, mine, gain in em.climbing(everyone, modes, likelihood, box, band, STEPS):
        evidence += gain.sum()
        posed = em.posed(batch, *mine.best).band(min(low, len(batch.half)))
        parts.append(Projected.of(posed, grid, family.sigma, scale).seen().by_particle(posed))
    seen = Seen.of(parts)
    last = box // 2 + (1 if box == whole else 0)
    em.sigma[:, 1:last] = family.sigma[:, 1:last] * (whole / box)
    z = family.coefficients.moments(seen).z.cpu()
    return _Pass(climbed_in_family(em, found.volume, modes, z, float(evidence)), family, seen)


def _in_one_hand(
    em: PoseEM, bands: list[float], solve: Callable[[FamilySolver, int], Family], reached: Reached | None
) -> Reached:
    """The last of some passes, and all of them again while states are found with the wrong hand.

    Beyond the first passes only where images then are more probable: nothing that follows would mend it.
    """
    assert reached is not None
    last = _pass(em, reached.modes, bands[-1], solve, len(bands) <= HELD, reached)
    for _ in range(HAND_ROUNDS):
        modes = _mirrored_where_wrong(em, last)
        if modes is None:
            break
        before, known, reached = last, (em.sigma.clone(), em.prior), None
        for number, band in enumerate(bands):
            last = _pass(em, modes, band, solve, number < HELD, reached)
            reached = last.reached
        if len(bands) > HELD and last.reached.evidence < before.reached.evidence:
            em.sigma, em.prior = known
            return before.reached
    return last.reached


def _mirrored_where_wrong(em: PoseEM, last: _Pass) -> PoseModes | None:
    """The best poses, all states in one hand and frame; None where next to no image is in a state of the wrong hand.

    States are points in the space of the family's maps, as many for every molecule.
    """
    points, log_weight = fit_points(last.seen, STATES, STARTS, em.generator)
    state = log_joint(last.seen, points, log_weight).argmax(1).cpu()
    maps = last.family.maps[0] + torch.einsum("kc,czyx->kzyx", points, last.family.maps[1:])
    placed = to_one_hand(maps, log_weight.exp())
    wrong = float(torch.tensor([one.mirrored for one in placed])[state].float().mean())
    em.progress.note(f"{wrong:.0%} of the particles had the other hand")
    if wrong < FEW:
        return None
    rotation, translation = last.reached.modes.best
    for number, one in enumerate(placed):
        mine = state == number
        rotation[mine], translation[mine] = one.poses(rotation[mine], translation[mine], em.particles.box)
    return PoseModes.single(rotation, translation)


def climbed_in_family(em: PoseEM, volume: Tensor, modes: PoseModes, z: Tensor, evidence: float) -> Reached:
    """What a pass over all images came to: a map (b, b, b), modes, z (n, zdim), the log evidence of all together."""
    if math.isfinite(em.prior.turn_sd):
        modes = free_of(modes, em.prior, em.particles.of_images(z))
    em.prior = em.prior.learned(modes)
    mean = evidence / len(em.particles)
    em.progress.note(f"log evidence {mean:.2f}")
    return Reached(Solved(volume, torch.zeros(len(volume) // 2 + 1, device=em.device)), modes, mean)


def likelihood_in(family: Family, consensus: Tensor, eckart: bool) -> FamilyLikelihood:
    """What images say of their poses in a family, and beyond its band in the consensus (D, D, D).

    eckart: without the rigid part of the components
    """
    side, box = family.maps.shape[-1], len(consensus)
    maps = family.maps
    if eckart:
        maps = torch.cat([maps[:1], without_rigid(maps[1:], resize(consensus, side))])
    slopes = torch.stack([slope_grid(one) for one in maps], -1).flatten(3)
    count = int(HalfPlane.of(box).count(side / 2 - 1e-3))
    beyond = MapLikelihood(slope_grid(consensus), family.sigma)
    return FamilyLikelihood(slopes, family.coefficients, family.sigma, box / side, count, beyond)


def without_rigid(components: Tensor, volume: Tensor) -> Tensor:
    """Maps (C, b, b, b) less their part in shifts and turns of a map (b, b, b): orthogonal to its six generators."""
    rigid = generators(volume).flatten(1)
    part = torch.linalg.solve(rigid @ rigid.T, rigid @ components.flatten(1).T)
    return components - (part.T @ rigid).view_as(components)


def generators(volume: Tensor) -> Tensor:
    """How a map (b, b, b) changes with a shift along, and with a turn about, x, y and z: (6, b, b, b)."""
    b = len(volume)
    k = 2 * math.pi * torch.fft.fftfreq(b, device=volume.device)
    k[b // 2] = 0  # Nyquist has no derivative
    transform, axis = torch.fft.fftn(volume), torch.arange(b, device=volume.device) - b // 2
    dx, dy, dz = (torch.fft.ifftn(1j * transform * g).real for g in (k, k[:, None], k[:, None, None]))
    x, y, z = axis, axis[:, None], axis[:, None, None]
    return -torch.stack([dx, dy, dz, y * dz - z * dy, z * dx - x * dz, x * dy - y * dx])


def free_of(modes: PoseModes, prior: PosePrior, z: Tensor) -> PoseModes:
    """Posteriors whose displacements from the prior's centre do not depend on the z (N, zdim) of each image's particle.

    The best poses' turns in the volume's frame, and the shifts of the volume that shifts of images show, are regressed
    on z and on powers of its principal components; what is told, shrunk by what chance would tell (James and Stein), is
    undone in all modes.
    """
    rotation, translation = modes.best
    features = _features(z)
    turn = (prior.rotation.mT @ prior.away(rotation, translation)[:, :3, None])[..., 0]
    told = features @ _shrunk(features.T @ turn, turn)
    shift = (translation - prior.translation).reshape(-1, 1)
    seen = torch.einsum("nic,nf->nicf", rotation[:, :2], features).flatten(0, 1).flatten(1)
    basis = torch.linalg.qr(seen)[0]
    moved = (basis @ _shrunk(basis.T @ shift, shift)).view_as(translation)
    return replace(modes, rotation=modes.rotation @ exp(-told)[:, None], translation=modes.translation - moved[:, None])


def _features(z: Tensor) -> Tensor:
    """1, z, and squares and cubes of its leading principal components, orthonormal over the images: (N, F)."""
    centred = z - z.mean(0)
    leading = torch.linalg.svd(centred, full_matrices=False)[0][:, :LEADING] * len(z) ** 0.5
    return torch.linalg.qr(torch.cat([torch.ones_like(z[:, :1]), centred, leading.square(), leading**3], 1))[0]


def _shrunk(coefficient: Tensor, target: Tensor) -> Tensor:
    """Coefficients (F, q) on orthonormal features of targets (N, q), less what chance gives them."""
    left = (target.square().sum(0) - coefficient.square().sum(0)) / (len(target) - len(coefficient))
    return coefficient * (1 - left / coefficient.square().clamp_min(1e-30)).clamp_min(0)
