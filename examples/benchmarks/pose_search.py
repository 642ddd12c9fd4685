"""The search for poses beside the arithmetic that it needs: what fraction of the machine's matrix products a second.

    python examples/benchmarks/pose_search.py CASE [--images 500] [--rounds 3] [--device cuda]

CASE holds particles.star with poses, from which the map that is searched is made. The operations that are counted are
those of the likelihoods alone: of an image's T shifted copies with C slices of P coefficients, 4 P T C, and of the
slices' squares, 2 P C. The rate that they are compared with is that of square products of 2048 in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from pyro_cryo import Particles
from pyro_cryo.inference.ab_initio import SEARCHED
from pyro_cryo.inference.reconstruct import reconstruct
from pyro_cryo.inference.search import Level, Search
from pyro_cryo.physics.fourier import HalfPlane, resize
from pyro_cryo.physics.rotations import point_group

BOX, EXTENT_SD = 26, 3.5


def main() -> None:
    """Time searches of a whole grid and of a beam, and matrix products between them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", type=Path)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    particles = Particles.open(asked.case / "particles.star")
    found = reconstruct(particles, device=asked.device)
    small = Particles.open(asked.case / "particles.star", box=BOX)
    batch = small.batch(slice(0, asked.images), asked.device)
    sigma = found.sigma[:, : BOX // 2 + 1] * (BOX / particles.box)
    searches = {"whole grid of 15 degrees": SEARCHED[:1], "and a beam of 7.5 degrees": SEARCHED}
    rates: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in searches}
    for round_ in range(asked.rounds + 1):
        rates.append(product_rate(asked.device))
        for name, levels in searches.items():
            search = searcher(resize(found.volume, BOX), levels)
            search(batch[torch.arange(8)], sigma)  # the table of slices
            began = time.monotonic()
            search(batch, sigma).log_mass.sum().item()
            seconds[name].append(time.monotonic() - began)
        if not round_:
            rates.clear()
            for times in seconds.values():
                times.clear()
    rate = statistics.median(rates)
    print(f"matrix products: {rate / 1e9:.1f} Gflop/s on {asked.device}, {torch.get_num_threads()} threads")
    for name, levels in searches.items():
        images = asked.images / statistics.median(seconds[name])
        needed = operations(searcher(resize(found.volume, BOX), levels))
        print(
            f"{name}: {images:.0f} images/s, {needed / 1e9:.3f} Gflop an image, "
            f"{images * needed / rate:.0%} of that rate"
        )


def searcher(volume: Tensor, levels: tuple[Level, ...]) -> Search:
    """As ab initio searches, shifts of 4% of the box."""
    sd = BOX / 25
    return Search(volume, levels, EXTENT_SD * sd, sd, point_group("C1"))


def operations(search: Search) -> float:
    """Floating-point operations of an image's likelihoods."""
    half, total = HalfPlane.of(BOX), 0.0
    first, *finer = search.levels
    rotations, shifts = len(search.cells), len(search.shifts)
    for number, level in enumerate((first, *finer)):
        if number:
            before = search.levels[number - 1]
            rotations = min(search.beam, rotations) * 8 ** (level.rotations - before.rotations)
            shifts = min(search.beam // 2, shifts) * 4 ** (level.shifts - before.shifts)
        total += (4 * shifts + 2) * rotations * half.count(level.kmax)
    return total


def product_rate(device: str, side: int = 2048) -> float:
    """Floating-point operations a second of a square product."""
    a, b = torch.randn(side, side, device=device), torch.randn(side, side, device=device)
    (a @ b).sum().item()
    began = time.monotonic()
    for _ in range(5):
        a = a @ b / side
    a.sum().item()
    return 5 * 2 * side**3 / (time.monotonic() - began)


if __name__ == "__main__":
    main()
