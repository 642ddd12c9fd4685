"""Are posteriors of z as sure as they say?

    python examples/benchmarks/calibration.py [linear] [fitted] [network] [--images 1000] [--box 32] [--snr 0.03 0.1 1]
                                              [--toy two_arms] [--zdim 3] [--fit-snr 0.1] [--seed 0]

Images of V(z) = V0 + sum_j z_j U_j, z ~ Normal(0, I), smooth random maps, are made in real space, and seen without a
window and through soft ones.

linear:  with the true V0 and U and the noise learned from the images, ranks of z among draws (in the simultaneous 99%
         band?), shares of truths within 50% and 90% intervals and regions. Beside what the package makes of windowed
         images stands what comes out where their noise, which is correlated, is counted as if it were not
fitted:  with `linear_subspace` fitted to 2,000 images, the average of V(z_i) over a region, of 1,000 others: within its
         90% interval at the fitted maps, and with what maps from other images differ by added
network: `cryodrgn` fitted to 2,000 images, of such maps or of a toy, and the ranks of z of images that it makes itself:
         under its encoder's q, under a Gaussian for each image, and in draws picked from that by their weights; then
         what the encoder loses of the evidence of the images. Where z is as sharp as the prior nothing was learned
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import mrcfile
import torch
from torch import Tensor

from pyro_cryo.analysis.amortisation import amortisation
from pyro_cryo.analysis.calibration import Calibration, calibration, sbc
from pyro_cryo.analysis.predictive import residual_power
from pyro_cryo.data.density_maps import DensityMaps, kaiser_bessel_grid, read_kaiser_bessel
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.pixels import window_power
from pyro_cryo.data.simulate import TOYS, simulate
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.importance import GOOD
from pyro_cryo.inference.reconstruct import image_power
from pyro_cryo.inference.run import Run
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.models.linear_subspace import LinearSubspace
from pyro_cryo.physics.fourier import half_plane_to_image, shift_phase

RANK = 3
MOTION = 0.3  # norm of each U over that of V0
BALL = 0.5  # radius of the molecule over half the box
DRAWS, NETWORK_DRAWS = 99, 39
WEIGHED = 200  # draws, of which those are picked
WINDOWS = (None, 0.85, 0.6)
ROUNDS = 5  # of sigma
FITTED, HELD = 2000, 1000
MOVING = 0.3  # of the largest variance: the region. In a wide one the mean of all voxels counts, which no image shows
APIX = 4.0


@dataclass(frozen=True)
class Case:
    """maps (1 + RANK, D, D, D): V0 and U; z (N, RANK); star: the images."""

    maps: Tensor
    z: Tensor
    star: Path

    def seen(self, window: float | None = None) -> Particles:
        """The images as they are, or through a soft window."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Particles.open(self.star, window=window)


def random_maps(box: int, generator: torch.Generator) -> Tensor:
    """V0, of Gaussian blobs in a ball, and U, of blobs that are there and elsewhere missing: (1 + RANK, D, D, D)."""
    axis = torch.arange(box) - box // 2
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")[::-1], -1).float()
    reach, width = BALL * box / 2, 1.5 * box / 32

    def blobs(count: int) -> Tensor:
        centre = torch.randn(count, 3, generator=generator)
        centre = centre / centre.norm(dim=1, keepdim=True) * reach * torch.rand(count, 1, generator=generator).sqrt()
        return torch.stack([torch.exp(-(grid - c).square().sum(-1) / (2 * width**2)) for c in centre]).sum(0)

    still = blobs(30)
    moving = torch.stack([blobs(4) - blobs(4) for _ in range(RANK)])
    moving = moving * (MOTION * still.norm() / moving.flatten(1).norm(dim=1))[:, None, None, None]
    return torch.cat([still[None], moving])


def make(folder: Path, images: int, box: int, snr: float, seed: int = 0) -> Case:
    """Images in real space: exact projections of V(z_i), shifted, times the CTF, and white noise."""
    generator = torch.Generator().manual_seed(seed)
    maps = random_maps(box, generator)
    z = torch.randn(images, RANK, generator=generator)
    star = simulate(DensityMaps(maps[:1], APIX), folder, n_images=images, box=box, snr=snr, seed=seed)
    case = Case(maps, z, star)
    clean = projected(case)
    noise = (clean.var() / snr).sqrt() * torch.randn(clean.shape, generator=generator)
    with mrcfile.open(folder / "particles.mrcs", mode="r+") as stack:
        stack.data[:] = (clean + noise).numpy()
    return case


def projected(case: Case) -> Tensor:
    """The images before noise: (N, D, D)."""
    particles, grids = case.seen(), [kaiser_bessel_grid(volume) for volume in case.maps]
    weight, images = torch.cat([torch.ones(len(case.z), 1), case.z], 1), []
    for batch in particles.batches(100):
        k = batch.half.k @ batch.rotation[:, :2]
        slices = torch.stack([read_kaiser_bessel(grid, k) for grid in grids], -1)
        values = (slices * weight[batch.index][:, None]).sum(-1) * batch.ctf
        values = values * shift_phase(batch.half.k, batch.translation, particles.box)
        images.append(half_plane_to_image(torch.view_as_real(values), batch.half))
    return torch.cat(images)


def generating(case: Case, particles: Particles, share: float = 1.0) -> Run:
    """The model of the true maps, its noise learned from the images.

    share: sigma^2 is this share of the power of the residual at draws of z
    """
    model = LinearSubspace(particles.box, zdim=RANK, contrast=0.0)
    model.consensus.set(case.maps[0])
    model.volume.set(case.maps)
    model.log_sigma.data.copy_(image_power(particles, 256, "cpu").log())
    run = Run(model, particles, guide=model.make_guide())
    for number in range(ROUNDS):
        power = residual_power(run, particles, seed=number).power.nan_to_num(1.0)
        model.log_sigma.data += 0.5 * (power * share).log()
    return run


def draws_of(run: Run, particles: Particles, count: int = DRAWS) -> Tensor:
    """Draws of z from the exact posterior: (S, n, zdim)."""
    latent = run.encode(particles)
    mean, root = torch.from_numpy(latent.z), torch.linalg.cholesky(torch.from_numpy(latent.z_cov))
    white = torch.randn(count, *mean.shape, generator=torch.Generator().manual_seed(1))
    return mean + (root @ white[..., None])[..., 0]


def verdict(found: Calibration) -> str:
    """Columns: in the band, the least p-value, shares in 50% and 90%, sharpness."""
    told, half, most = found.uniformity(0.99), found.coverage(0.5), found.coverage(0.9)
    inside = f"{int(told.inside.sum())} of {len(told.inside)}\t{float(told.p_value.min()):.4f}"
    shares = [half.interval.mean(), half.region, most.interval.mean(), most.region]
    return f"{inside}\t" + "\t".join(f"{float(s):.3f}" for s in shares) + f"\t{float(found.sharpness.mean()):.2f}"


def linear(folder: Path, images: int, box: int, snrs: list[float]) -> None:
    print("snr\twindow\tnoise\tin the band\tleast p\t50%\tregion\t90%\tregion\tsharpness")
    for snr in snrs:
        case = make(folder / f"linear{snr:g}", images, box, snr)
        for window in WINDOWS:
            particles = case.seen(window)
            for share in sorted({1.0, window_power(box, window)}, reverse=True):
                run = generating(case, particles, share)
                found = calibration(case.z, draws_of(run, particles), torch.Generator().manual_seed(0))
                how = "learned" if share == 1 else "as if white"
                print(f"{snr:g}\t{window or 'none'}\t{how}\t{verdict(found)}", flush=True)
        run = generating(case, case.seen())
        own = sbc(run, case.seen(), DRAWS)
        for name, found in own.items():
            print(f"{snr:g}\tnone\tits own images: {name}\t{verdict(found)}", flush=True)


def fitted(case: Case, box: int, window: float | None) -> None:
    particles = case.seen(window)
    held = torch.arange(2 * FITTED, 2 * FITTED + HELD)
    region = case.maps[1:].square().sum(0)
    region = (region > MOVING * region.max()).float()
    parts = torch.arange(FITTED), torch.arange(FITTED, 2 * FITTED)
    runs = [fit(LinearSubspace(box, zdim=2 * RANK, contrast=0.0), particles[part]) for part in parts]
    kept = " and ".join(str(run.model.zdim) for run in runs)
    print(f"window {window or 'none'}: region of {int(region.sum())} voxels, {kept} components kept")

    def of_truth(rows: Tensor) -> Tensor:
        average = (case.maps * region).sum((1, 2, 3)) / region.sum()
        return (average[0] + case.z[rows] @ average[1:])[:, None]

    def of_draws(run: Run, rows: Tensor) -> Tensor:
        zero = torch.zeros(1, run.model.zdim)
        maps = run.volume(torch.cat([zero, torch.eye(run.model.zdim)]))
        average = (maps * region).sum((1, 2, 3)) / region.sum()
        return (average[0] + draws_of(run, particles[rows]) @ (average[1:] - average[0]))[..., None]

    for name, rows in (("fitted images", parts[0]), ("other images", held)):
        print(f"{name}\t{verdict(calibration(of_truth(rows), of_draws(runs[0], rows)))}", flush=True)
    first, second = (of_draws(run, held) for run in runs)
    between = (first.mean(0) - second.mean(0)).square().mean() / 2
    within = first.var(0).mean()
    print(f"posterior sd of z's part {float(within.sqrt()):.4f}, of the maps' {float(between.sqrt()):.4f}")
    noise = between.sqrt() * torch.randn(first.shape, generator=torch.Generator().manual_seed(2))
    print(f"with the maps' part\t{verdict(calibration(of_truth(held), first + noise))}", flush=True)
    error = first.mean(0) - of_truth(held)
    print(f"sd of the truth {float(of_truth(held).std()):.4f}, rms error {float(error.square().mean().sqrt()):.4f}")


def network(particles: Particles, zdim: int, epochs: int, seed: int) -> None:
    torch.manual_seed(seed)
    run = fit(CryoDRGN(particles.box, zdim=zdim, width=128, layers=2), particles, epochs=epochs, seed=seed)
    best, some = run.semi_amortised(), particles[:1000]
    print("cryodrgn\tof\tin the band\tleast p\t50%\tregion\t90%\tregion\tsharpness\tseconds a particle")
    for name, asked, weighed in (("encoder", run, 0), ("its own Gaussian", best, 0), ("picked from it", best, WEIGHED)):
        begun = time.perf_counter()
        told = sbc(asked, some, NETWORK_DRAWS, weighed=weighed)
        seconds = (time.perf_counter() - begun) / len(some)
        for quantity, found in told.items():
            print(f"{name}\t{quantity}\t{verdict(found)}\t{seconds:.3f}", flush=True)
    lost = amortisation(run, some[:500])
    good = [float((k < GOOD).double().mean()) for k in (lost.guide_k, lost.best_k)]
    gap, left = float(lost.gap.mean()), float(lost.left.mean())
    print(f"nats an image: the encoder loses {gap:.2f}, its own Gaussian {left:.2f} more")
    print(f"share with k below {GOOD}: {good[0]:.3f}, {good[1]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["linear", "fitted", "network"])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--box", type=int, default=32)
    parser.add_argument("--snr", type=float, nargs="+", default=[0.03, 0.1, 1.0])
    parser.add_argument("--fit-snr", type=float, default=0.1)
    parser.add_argument("--toy", choices=TOYS)
    parser.add_argument("--zdim", type=int, default=RANK)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "linear" in asked.parts:
            linear(folder, asked.images, asked.box, asked.snr)
        if "fitted" in asked.parts:
            case = make(folder / "fitted", 2 * FITTED + HELD, asked.box, asked.fit_snr)
            for window in WINDOWS[:2]:
                fitted(case, asked.box, window)
        if "network" in asked.parts:
            out, box, snr = folder / "network", asked.box, asked.fit_snr
            if asked.toy is None:
                particles = make(out, FITTED, box, snr, asked.seed).seen()
            else:
                star = simulate(TOYS[asked.toy](), out, n_images=FITTED, box=box, snr=snr, seed=asked.seed)
                particles = Particles.open(star)
            network(particles, asked.zdim, asked.epochs, asked.seed)


if __name__ == "__main__":
    main()
