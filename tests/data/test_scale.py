"""A hundred thousand particles open in a second, and reading keeps up."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_cryo.data.particles import Particles
from pyro_cryo.data.star import write_star

COUNT, BOX = 100_000, 32


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 100,000 rows and a sparse stack: 400 MB that are nowhere on disk."""
    import struct

    import pandas as pd

    folder = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)
    head = bytearray(1024)
    struct.pack_into("<4i", head, 0, BOX, BOX, COUNT, 2)
    head[208:216] = b"MAP \x44\x44\0\0"
    with open(folder / "particles.mrcs", "wb") as file:
        file.write(head)
        file.truncate(1024 + 4 * COUNT * BOX**2)
    numbers = {
        name: rng.uniform(0, 100, COUNT).round(6)
        for name in ("rlnCoordinateX", "rlnCoordinateY", "rlnCtfFigureOfMerit")
    }
    rows = pd.DataFrame({
        "rlnImageName": [f"{i + 1:06d}@particles.mrcs" for i in range(COUNT)], "rlnMicrographName": "Micrographs/m.mrc",
        "rlnAngleRot": rng.uniform(-180, 180, COUNT), "rlnAngleTilt": rng.uniform(0, 180, COUNT),
        "rlnAnglePsi": rng.uniform(-180, 180, COUNT), "rlnOriginXAngst": rng.normal(0, 3, COUNT),
        "rlnOriginYAngst": rng.normal(0, 3, COUNT), "rlnDefocusU": rng.uniform(8e3, 2e4, COUNT),
        "rlnDefocusV": rng.uniform(8e3, 2e4, COUNT), "rlnDefocusAngle": rng.uniform(0, 180, COUNT),
        "rlnOpticsGroup": 1, "rlnRandomSubset": rng.integers(1, 3, COUNT), **numbers,
    })  # fmt: skip
    optics = pd.DataFrame({
        "rlnOpticsGroup": [1], "rlnOpticsGroupName": ["o"], "rlnVoltage": [300.0], "rlnSphericalAberration": [2.7],
        "rlnAmplitudeContrast": [0.1], "rlnImagePixelSize": [8.0], "rlnImageSize": [BOX],
    })  # fmt: skip
    write_star(folder / "particles.star", {"optics": optics, "particles": rows})
    return folder / "particles.star"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is Linux's to tell")
def test_opening_and_a_pass(large: Path) -> None:
    """In a process of its own: time and memory beyond the imports, those of the table included."""
    script = f"""
import time
import pandas, scipy.spatial.transform, torch
from pyro_cryo.data.particles import Particles
def status(key):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))
def reset():
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
    return status("VmRSS")
torch.set_num_threads(1)
before, start = reset(), time.perf_counter()
particles = Particles.open({str(large)!r})
opened, memory = time.perf_counter() - start, status('VmHWM') - before
before, start = reset(), time.perf_counter()
count = sum(len(batch) for batch in particles.batches(256, generator=torch.Generator().manual_seed(0)))
assert count == len(particles) == {COUNT}
print(opened, memory, time.perf_counter() - start, status('VmHWM') - before)
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    seconds, megabytes, pass_seconds, pass_megabytes = map(float, run.stdout.split())
    print(
        f"\n100,000 particles: opened in {seconds:.2f} s with {megabytes:.0f} MB; a shuffled pass at "
        f"{COUNT / pass_seconds:.0f} images/s with {pass_megabytes:.0f} MB"
    )
    assert seconds < 2.0  # 1 s on an idle machine
    assert megabytes < 300
    assert pass_megabytes < 500


def test_images_a_second(tmp_path: Path, new_case) -> None:
    """Reading, transforming and the CTF of 5,000 images of 64 pixels on one thread."""
    particles = Particles.open(new_case(tmp_path, count=5000, box=64).star())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best = 0.0
        for _ in range(3):
            start = time.perf_counter()
            count = sum(len(b) for b in particles.batches(256, generator=torch.Generator().manual_seed(0)))
            best = max(best, count / (time.perf_counter() - start))
    finally:
        torch.set_num_threads(threads)
    print(f"\n64 pixels: {best:.0f} images/s on one thread")
    assert best > 4000  # 10,000 and more on an idle machine
