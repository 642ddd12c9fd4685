"""Is the motion real? Two questions to ask of it, of a true motion and of a false one that errors of poses make.

python examples/is_the_motion_real.py [particles.star] [--images 1500] [--box 32]

Without particles: a swinging arm, and the same molecule at rest, whose poses are off by some degrees, one way or the
other by the side that it shows. Prints whether z is associated with the pose, and whether the motion comes back in
the other half of the particles.
"""

import argparse
import math
import tempfile

import torch

from pyro_cryo import Particles, fit
from pyro_cryo.analysis.association import pose_association
from pyro_cryo.analysis.half_sets import half_sets
from pyro_cryo.data.simulate import hinge, simulate
from pyro_cryo.models.linear_subspace import LinearSubspace
from pyro_cryo.physics.rotations import exp


def judge(name: str, particles: Particles) -> None:
    """Fit, ask both questions, say how to read what comes out."""

    def model() -> LinearSubspace:
        return LinearSubspace(particles.box, zdim=2, noise_groups=particles.n_noise_groups)

    pose = pose_association(fit(model(), particles))
    print(f"{name}: z and pose are associated with p = {pose.p_value:.3f}, share of z explained {pose.share:.2f}")
    if pose.p_value > 0.05:
        print("  z says nothing of the pose that chance would not.")
    else:
        print(f"  z says how the molecule lay ({pose.part}), as no motion should: suspect the poses or the mask.")
    found = half_sets(model, particles)
    shells = slice(1, found.pooled.shape[0] // 2)
    motion, chance, maps = (float(v[..., shells].mean()) for v in (found.pooled, found.null, found.maps))
    print(f"{name}: R2 of z between the halves {min(found.r2):.2f}, motion FSC {motion:.2f}, of whole maps {maps:.2f}")
    if motion > max(chance, 0.143):
        print(f"  both halves show the same motion, to {found.resolution_angstrom:.0f} angstrom.")
    else:
        print(f"  what moves in one half, if anything, does not in the other (at random {chance:.2f}): noise.")


def off(particles: Particles, angle_deg: float) -> Particles:
    """Poses turned about an axis of the molecule, with the sign of a coordinate of the view direction."""
    rotation = particles.rotation
    angle = math.radians(angle_deg) * rotation[:, 2, 0].sign()
    return particles.with_poses(rotation @ exp(angle[:, None] * torch.tensor([0.6, 0.0, 0.8])), particles.translation)


def simulated(images: int, box: int) -> None:
    """A true motion, none, and a false one."""
    with tempfile.TemporaryDirectory() as folder:
        moving, still = (
            Particles.open(simulate(hinge(n), f"{folder}/{n}", n_images=images, box=box, snr=0.2, seed=0))
            for n in (51, 1)
        )
        judge("a swinging arm", moving)
        judge("a molecule at rest", still)
        judge("a molecule at rest, poses off", off(still, 6.0))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("star", nargs="?", help="particles with poses; default: simulated ones")
    parser.add_argument("--images", type=int, default=1500, help="of each simulated set")
    parser.add_argument("--box", type=int, default=32)
    args = parser.parse_args()
    if args.star is None:
        simulated(args.images, args.box)
    else:
        judge(args.star, Particles.open(args.star))
