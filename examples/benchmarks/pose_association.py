"""How often is z called associated with the pose where it is not, and where it is?

    python examples/benchmarks/pose_association.py [--sets 200] [--images 400] [--box 32] [--snr 0.05] [--off-deg 8]

Every set is simulated anew and fitted from the beginning. Prints the share of the sets whose p-value is at most 5% and
1%, and the median share of the variance of z that the pose explains; apart, sets whose images support no motion.

clean sets: two of the hinge's states mixed by a Normal z, which is what LinearSubspace supposes (one draw of z for each
particle from the fit, for particles that were not fitted, and from the maps and the noise that made the images; and
posterior means, which no one should test), and the hinge itself, whose maps and population the manifold learns.
corrupted sets: poses turned by `off-deg` about an axis of the molecule, one way or the other by the side that it shows:
of a still molecule, and of the one that moves.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pyro_cryo import Particles, fit
from pyro_cryo.analysis.association import Association, association, pose_association
from pyro_cryo.data.blobs import Complex, hinge
from pyro_cryo.data.simulate import simulate
from pyro_cryo.inference.run import Run
from pyro_cryo.models.linear_subspace import LinearSubspace
from pyro_cryo.models.manifold import Manifold
from pyro_cryo.physics.rotations import exp

AXIS = (0.6, 0.0, 0.8)
STATES = 100

Tested = Iterator[tuple[str, Association]]


def mixed(states: int = STATES, sd: float = 0.35) -> Complex:
    """V = (1/2 - sd z) A + (1/2 + sd z) B of the hinge's outermost states, z at quantiles of the standard Normal."""
    ends, z = hinge(2), torch.special.ndtri((torch.arange(states) + 0.5) / states)
    share = 0.5 + sd * torch.stack([-z, z], 1)
    xyz = ends.xyz.flatten(0, 1).expand(states, -1, -1).contiguous()
    return Complex(xyz, share.repeat_interleave(ends.xyz.shape[1], 1), z[:, None], ends.sigma_angstrom)


def turned(particles: Particles, angle_deg: float) -> Particles:
    """Poses off by an angle about an axis of the molecule, with a sign that the view direction says."""
    rotation = particles.rotation
    angle = math.radians(angle_deg) * rotation[:, 2, 0].sign()
    return particles.with_poses(rotation @ exp(angle[:, None] * torch.tensor(AXIS)), particles.translation)


def generating(particles: Particles, truth: Path) -> Run:
    """LinearSubspace with the maps and the noise that made the images, in place of fitted ones."""
    with np.load(truth) as file:
        volumes, noise_sd = torch.from_numpy(file["volumes"]), float(file["noise_sd"])
    z, middle = mixed().coordinate[:, 0], volumes.mean(0)
    along = torch.einsum("s,szyx->zyx", z, volumes) / z.square().sum()
    model = LinearSubspace(particles.box, zdim=1, contrast=0.0)
    model.consensus.set(middle)
    model.volume.set(torch.stack([middle, along]))
    model.log_sigma.data.fill_(math.log(noise_sd / 2**0.5))
    return Run(model, particles, guide=model.make_guide())


def linear(particles: Particles, seed: int) -> Tested:
    """A linear motion: half of the particles are fitted."""
    mine, other = halves(particles)
    run = fit(LinearSubspace(particles.box, zdim=2, contrast=0.0), mine, seed=seed)
    name = "linear motion" if moves(run) else "linear motion, not found"
    yield f"{name}: fit", pose_association(run, seed=seed)
    yield f"{name}: fit, other particles", pose_association(run, other, seed)
    truth = generating(mine, particles.table.path.parent / "truth.npz")
    yield "linear motion: maps that made it", pose_association(truth, seed=seed)
    if moves(run):
        yield f"{name}: posterior means", association(run.latent.z, mine.rotation, seed=seed)


def curved(particles: Particles, seed: int) -> Tested:
    """The hinge, bent and evenly populated."""
    mine, other = halves(particles)
    run = fit(Manifold(particles.box, zdim=2, points=100, contrast=0.0), mine, seed=seed)
    yield "hinge: manifold", pose_association(run, seed=seed)
    yield "hinge: manifold, other particles", pose_association(run, other, seed)
    run = fit(LinearSubspace(particles.box, zdim=2, contrast=0.0), mine, seed=seed)
    yield "hinge: linear subspace", pose_association(run, seed=seed)


def halves(particles: Particles) -> tuple[Particles, Particles]:
    """The first and the second half of the particles."""
    middle = len(particles) // 2
    return particles[:middle], particles[middle:]


def off(particles: Particles, name: str, off_deg: float, seed: int) -> Tested:
    """Poses that are off by what they are."""
    run = fit(LinearSubspace(particles.box, zdim=2, contrast=0.0), turned(particles, off_deg), seed=seed)
    found = "" if moves(run) else ", no motion found"
    yield f"{name} molecule, poses off by {off_deg:g} degrees{found}", pose_association(run, seed=seed)


def moves(run: Run) -> bool:
    """Whether the images support any motion: a fit to too few has none, and its z says nothing."""
    assert isinstance(run.model, LinearSubspace)
    return bool(run.model.volume.components[1:].any())


def tested(case: str, args: argparse.Namespace, seed: int) -> Tested:
    """All tests of one set."""
    source = {"linear": mixed(), "hinge": hinge(), "still": hinge(1), "moving": mixed()}[case]
    images = args.images * (2 if case in ("linear", "hinge") else 1)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        star = simulate(source, Path(folder) / "case", n_images=images, box=args.box, snr=args.snr, seed=seed)
        particles = Particles.open(star)
        if case == "linear":
            yield from linear(particles, seed)
        elif case == "hinge":
            yield from curved(particles, seed)
        else:
            yield from off(particles, case, args.off_deg, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=200)
    parser.add_argument("--images", type=int, default=400, help="fitted, in every set")
    parser.add_argument("--box", type=int, default=32)
    parser.add_argument("--snr", type=float, default=0.05)
    parser.add_argument("--off-deg", type=float, default=8.0)
    parser.add_argument("--cases", nargs="+", default=["linear", "hinge", "still", "moving"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("sets\tp <= 5%\tp <= 1%\tshare\tlargest\twhat")
    for case in args.cases:
        found = defaultdict(list)
        for seed in range(args.sets):
            for name, one in tested(case, args, seed):
                found[name].append(one)
        for name, all_ in found.items():
            p = np.array([one.p_value for one in all_])
            share, largest = (np.median([getattr(one, what) for one in all_]) for what in ("share", "largest"))
            rates = f"{(p <= 0.05).mean():.3f}\t{(p <= 0.01).mean():.3f}"
            print(f"{len(p)}\t{rates}\t{share:.3f}\t{largest:.3f}\t{name}", flush=True)


if __name__ == "__main__":
    main()
