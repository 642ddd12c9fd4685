"""Is the standard deviation of a voxel right? Errors of maps over their posterior sd, for maps drawn from the prior.

    python examples/benchmarks/voxel_calibration.py [--images 2000] [--box 32] [--snr 0.1] [--mask given] [--off 2]

Maps scale * u, u ~ ShellNormal(tau), are drawn, of one state and of a family V_0 + z_1 U_1 + z_2 U_2, and images of
them simulated, in whose projections no error of the package's own is. Both are fitted as a user would fit them: noise,
tau, envelope, number of components and contrast are learned. For each shell up to the resolution: the mean over its
coefficients of |mean of the draws - truth|^2 / (variance of the draws), freed of what the finite number of draws adds;
1 where the posterior is right. Of a family, at the z of some particles, as uncertain as they are: of many, because what
a z is off by is the same in all shells of a particle's map.

--mask: support, that of the prior from which maps were drawn; given, a solvent mask about it, as a user would make one;
        auto and none, as of `pyro-cryo fit`.
--off:  degrees about each axis, and half as many pixels, by which the table's poses are off; they are then refined, and
        every draw of a map has poses of its own.
--case: images with true maps (truth.npz beside the .star, as `pyro-cryo simulate` writes) in place of drawn ones.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_cryo.analysis.fsc import fsc, shell_sum
from pyro_cryo.data.density_maps import DensityMaps
from pyro_cryo.data.mrc_map import write_map
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import simulate
from pyro_cryo.distributions.volume import filter_shells
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.run import Run
from pyro_cryo.inference.volume_draws import volume_draws
from pyro_cryo.model import CryoModel
from pyro_cryo.models.homogeneous import Homogeneous
from pyro_cryo.models.linear_subspace import LinearSubspace
from pyro_cryo.physics.fourier import soft_disc
from pyro_cryo.physics.rotations import exp
from pyro_cryo.pose import PoseAbout

APIX = 4.0
STATES = 500
MOTION = 0.4  # sd of each U_j over that of V_0
RESOLVED = 0.5  # FSC to the truth, down to which shells count


def falling(box: int) -> Tensor:
    """A prior sd by shell as of a protein at some angstrom a voxel: flat at first, then down to a tenth."""
    k = torch.linspace(0, 1, box // 2 + 1)
    return 1 / (1 + (3 * k) ** 2)


def support(box: int) -> Tensor:
    """Where density is, soft."""
    return soft_disc(box, 0.26 * box, 0.12 * box, dims=3)


def solvent_mask(box: int) -> Tensor:
    """What a user would give: a ball about the support, with a soft edge beyond it."""
    return soft_disc(box, 0.36 * box, 0.06 * box, dims=3)


GIVEN = {"given": solvent_mask, "support": support}


def drawn(box: int, count: int, generator: torch.Generator) -> Tensor:
    """Maps (count, D, D, D) from the prior."""
    return support(box) * filter_shells(torch.randn(count, box, box, box, generator=generator), falling(box))


@dataclass(frozen=True)
class Errors:
    """By shell (D / 2 + 1,), of one map: mean of |error|^2 / variance, FSC to the truth; and over the voxels inside."""

    ratio: Tensor
    curve: Tensor
    voxels: float


def errors(draws: Iterable[Tensor], truth: Tensor, inside: Tensor) -> list[Errors]:
    """Of draws (n, D, D, D) beside the truth (n, D, D, D)."""
    maps = torch.stack(list(draws), 1)
    found = []
    for drawn_maps, true in zip(maps, truth.double(), strict=True):
        own = drawn_maps.double()
        spectrum, count = torch.fft.rfftn(own, dim=(1, 2, 3)), len(own)
        mean = spectrum.mean(0)
        variance = (spectrum - mean).abs().square().sum(0) / (count - 1)
        square = (mean - torch.fft.rfftn(true)).abs().square()
        # 1 / variance of n complex draws is too large by (n - 1) / (n - 2), their mean strays by variance / n
        share = (count - 2) / (count - 1) / (1 + 1 / count)
        ratio = share * shell_sum(square / variance.clamp_min(1e-30)) / shell_sum(torch.ones_like(square))
        voxels = (own.mean(0) - true).square() / own.var(0)
        real = (count - 3) / (count - 1) / (1 + 1 / count)
        found.append(Errors(ratio, fsc(own.mean(0), true), real * float(voxels[inside].mean())))
    return found


def fitted(model: CryoModel, particles: Particles, seed: int) -> Run:
    """In memory, quietly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit(model, particles, seed=seed)


def report(name: str, found: list[Errors], seconds: float) -> None:
    """A line of shells, and the mean over those that are resolved."""
    ratio, curve = (torch.stack([getattr(e, f) for e in found]).mean(0) for f in ("ratio", "curve"))
    last = int((curve[1:] < RESOLVED).nonzero()[0]) if bool((curve[1:] < RESOLVED).any()) else len(curve) - 1
    shells = ratio[1 : last + 1]
    print(
        f"{name}\tshells 1-{last}\tmean {float(shells.mean()):.3f}\tvoxels "
        f"{np.mean([e.voxels for e in found]):.3f}\t{seconds:.0f} s\t" + " ".join(f"{float(r):.2f}" for r in ratio[1:]),
        flush=True,
    )


def one_state(args: argparse.Namespace, seed: int) -> list[Errors]:
    """A map from the prior, reconstructed."""
    box, generator = args.box, torch.Generator().manual_seed(seed)
    source = DensityMaps(drawn(box, 1, generator), APIX)
    with tempfile.TemporaryDirectory() as folder:
        run, truth = run_of(source, Path(folder), args, seed, lambda mask: Homogeneous(box, mask=mask))
        return errors((m[None] for m in volume_draws(run, args.draws, seed=seed)), truth["volumes"], inside(box))


def family(args: argparse.Namespace, seed: int) -> list[Errors]:
    """A family of two components, at the z of some particles."""
    box, generator = args.box, torch.Generator().manual_seed(100 + seed)
    basis = drawn(box, 3, generator)
    z = torch.randn(STATES, 2, generator=generator)
    source = DensityMaps(basis[0] + MOTION * torch.einsum("sj,jzyx->szyx", z, basis[1:]), APIX)
    with tempfile.TemporaryDirectory() as folder:
        run, truth = run_of(source, Path(folder), args, seed, lambda mask: LinearSubspace(box, zdim=4, mask=mask))
        print(f"\tzdim {run.model.zdim}, contrast sd {float(run.model.coefficients.contrast_sd):.3f}", flush=True)  # type: ignore[union-attr, arg-type]
        index = list(range(args.particles))
        return errors(
            volume_draws(run, args.draws, index=index, seed=seed), truth["volumes"][truth["state"][index]], inside(box)
        )


def inside(box: int) -> Tensor:
    return support(box) > 0.5


Truth = dict[str, Tensor]


def run_of(
    source: DensityMaps, folder: Path, args: argparse.Namespace, seed: int, model: Callable[[str], CryoModel]
) -> tuple[Run, Truth]:
    """Images of the maps, the model fitted to them, and what is true."""
    mask = args.mask
    if mask in GIVEN:
        mask = str(folder / "mask.mrc")
        write_map(mask, GIVEN[args.mask](args.box), APIX)
    star = simulate(source, folder / "case", n_images=args.images, box=args.box, snr=args.snr, seed=seed)
    particles, ready = Particles.open(star), model(mask)
    if args.off:
        particles = misplaced(particles, args.off, seed)
        ready.poses = PoseAbout(args.off, args.off / 2)
    return fitted(ready, particles, seed), truth_of(star)


def misplaced(particles: Particles, off: float, seed: int) -> Particles:
    """Images whose table is off by Gaussians of this sd, degrees about each axis and half as many pixels.

    On average they stay where they are: a map in a frame of its own is not what is asked about.
    """
    noise = torch.randn(len(particles), 5, generator=torch.Generator().manual_seed(seed))
    turn, shift = torch.deg2rad(off * noise[:, :3]), 0.5 * off * noise[:, 3:]
    rotation, across = particles.rotation, particles.rotation[:, :2].flatten(0, 1)
    turn = turn - rotation @ (rotation.mT @ turn[..., None]).mean(0)[:, 0]
    shift = shift - (across @ torch.linalg.lstsq(across, shift.flatten()[:, None]).solution).view_as(shift)
    return particles.with_poses(exp(turn) @ rotation, particles.translation + shift)


def truth_of(star: Path) -> Truth:
    """The maps and which of them each image shows."""
    with np.load(star.parent / "truth.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in ("volumes", "state")}


def of_case(star: Path, args: argparse.Namespace) -> None:
    """The same of images with true maps that no prior drew."""
    particles, truth = Particles.open(star), truth_of(star)
    index = list(range(args.particles))
    true = truth["volumes"][truth["state"][index]]
    within = (true.mean(0) > 0.1 * true.max()) if len(truth["volumes"]) > 1 else truth["volumes"][0] > 0.05
    start = time.perf_counter()
    if len(truth["volumes"]) == 1:
        run = fitted(Homogeneous(particles.box), particles, 0)
        found = errors((m[None] for m in volume_draws(run, args.draws)), truth["volumes"], within)
    else:
        run = fitted(LinearSubspace(particles.box), particles, 0)
        found = errors(volume_draws(run, args.draws, index=index), true, within)
    report(star.parent.name, found, time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--box", type=int, default=32)
    parser.add_argument("--snr", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=30)
    parser.add_argument("--particles", type=int, default=100, help="at whose z the maps of a family are taken")
    parser.add_argument("--mask", choices=(*GIVEN, "auto", "none"), default="given")
    parser.add_argument("--off", type=float, default=0.0, help="of the table's poses, degrees about each axis")
    parser.add_argument("--kinds", nargs="+", choices=("one", "family"), default=["one", "family"])
    parser.add_argument("--case", type=Path, nargs="+", default=[], help=".star files of cases with truth.npz")
    args = parser.parse_args()
    for star in args.case:
        of_case(star, args)
    if args.case:
        return
    for kind in args.kinds:
        everything: list[Errors] = []
        start = time.perf_counter()
        for seed in range(args.seeds):
            began = time.perf_counter()
            found = one_state(args, seed) if kind == "one" else family(args, seed)
            report(f"{kind} {seed}", found, time.perf_counter() - began)
            everything += found
        report(f"{kind}, all", everything, time.perf_counter() - start)


if __name__ == "__main__":
    main()
