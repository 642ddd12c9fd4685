"""A stack of 100,000 particles: opening it, a pass over it, the same images from memory.

    python examples/benchmarks/streaming.py [--images 100000] [--box 64]

Prints the time and memory of opening, the memory of a shuffled pass and its images a second beside a pass over
the same batches held in memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import torch

from pyro_cryo.data.particles import Particles
from pyro_cryo.data.stack import Stack
from pyro_cryo.volumes.conjugate import NormalEquations


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--box", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=128)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        write = multiprocessing.get_context("spawn").Process(target=write_case, args=(folder, asked.images, asked.box))
        write.start()
        write.join()
        star = Path(folder) / "particles.star"
        Particles.open(star, first=1)
        start = peak_mb()
        began = time.monotonic()
        particles = Particles.open(star)
        print(f"opened {len(particles)} particles in {time.monotonic() - began:.2f} s, {peak_mb() - start:.0f} MB")
        add_up(particles, asked.batch_size, 20 * asked.batch_size)  # warm up
        before = peak_mb()
        streamed = {
            "transform only": rate(particles, asked.batch_size),
            "reconstruct": add_up(particles, asked.batch_size),
        }
        print(f"two shuffled passes: {peak_mb() - before:.0f} MB more")
        held = replace(particles, stack=Held(particles))
        in_memory = {"transform only": rate(held, asked.batch_size), "reconstruct": add_up(held, asked.batch_size)}
        for name, from_disk in streamed.items():
            share = 100 * from_disk / in_memory[name]
            print(f"{name}: {from_disk:.0f} images/s from disk, {in_memory[name]:.0f} from memory: {share:.0f}%")


class Held(Stack):
    """All images of a stack in one array, read as the stack is."""

    def __init__(self, particles: Particles) -> None:
        count, box = len(particles), particles.box
        self.images = np.empty((count, box, box), np.float32)
        particles.stack.read(particles.table.file, particles.table.frame, self.images)

    def read(self, file: np.ndarray, frame: np.ndarray, out: np.ndarray) -> None:
        """Frames (n,) of the one file into out (n, D, D)."""
        np.take(self.images, frame, axis=0, out=out)


def write_case(name: str, images: int, box: int) -> None:
    """White images and a table with poses and optics."""
    folder, rng = Path(name), np.random.default_rng(0)
    with mrcfile.new_mmap(folder / "particles.mrcs", (images, box, box), mrc_mode=2) as stack:
        for i in range(0, images, 4096):
            stack.data[i : i + 4096] = rng.standard_normal((min(4096, images - i), box, box), np.float32)
    names = "ImageName AngleRot AngleTilt AnglePsi OriginXAngst OriginYAngst DefocusU DefocusV DefocusAngle OpticsGroup"
    optics = "OpticsGroup Voltage SphericalAberration AmplitudeContrast ImagePixelSize ImageSize"
    with (folder / "particles.star").open("w") as file:
        file.write("data_optics\n\nloop_\n" + "".join(f"_rln{n}\n" for n in optics.split()))
        file.write(f"1 300 2.7 0.1 2.0 {box}\n\ndata_particles\n\nloop_\n")
        file.write("".join(f"_rln{n}\n" for n in names.split()))
        for i, (a, b, c, x, y, u) in enumerate(rng.uniform(size=(images, 6)), 1):
            angles = f"{360 * a:.3f} {180 * b:.3f} {360 * c:.3f}"
            defocus = f"{10000 + 1e4 * u:.1f} {10000 + 1e4 * u:.1f}"
            file.write(f"{i:06d}@particles.mrcs {angles} {x:.3f} {y:.3f} {defocus} 0 1\n")


def rate(particles: Particles, batch_size: int) -> float:
    """Images a second of a shuffled pass, from the files to batches."""
    generator = torch.Generator().manual_seed(0)
    began = time.monotonic()
    count = sum(len(batch) for batch in particles.batches(batch_size, generator=generator))
    return count / (time.monotonic() - began)


def add_up(particles: Particles, batch_size: int, count: int | None = None) -> float:
    """Images a second of a shuffled pass that accumulates the normal equations of a map."""
    picked = particles if count is None else particles[:count]
    equations = NormalEquations.empty(particles.box)
    sigma, symmetry = torch.ones(1, particles.half.shells), torch.eye(3)[None]
    began = time.monotonic()
    for batch in picked.batches(batch_size, generator=torch.Generator().manual_seed(0)):
        equations.add(batch, sigma, symmetry)
    return len(picked) / (time.monotonic() - began)


def peak_mb() -> float:
    """Largest memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
