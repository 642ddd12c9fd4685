"""Every example runs, at toy size, as a user runs it; so does the script of the README."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

from pyro_cryo.data.blobs import Complex
from pyro_cryo.data.mrc_map import read_map
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import classes, hinge, simulate
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.run import Run
from pyro_cryo.models.linear_subspace import LinearSubspace

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
COMPARED = re.compile(r"^(\S.*?) +\d +([\d.]+) +[\d.]+ +[\d.]+$", re.MULTILINE)  # what, and how far below the best


def run(*words: object, folder: Path) -> str:
    asked = [sys.executable, *(str(word) for word in words)]
    done = subprocess.run(asked, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def demo(folder: Path) -> None:
    said = run(EXAMPLES / "demo.py", "out", "--images", 500, "--box", 24, folder=folder)
    assert re.search(r"20-nearest-neighbour R2 of -?\d\.\d+", said)
    for name in ("consensus/map.mrc", "consensus/analysis/fsc.png", "run/latent.npz", "run/analysis/pc1.png"):
        assert (folder / "out" / name).stat().st_size > 0
        assert not name.endswith(".png") or f"out/{name}" in said


def two_state(folder: Path) -> None:
    star = simulate(classes(), folder / "case", n_images=600, box=24, snr=1.0, seed=0)
    said = run(EXAMPLES / "two_state.py", star, "out", 8, folder=folder)
    counts = [int(n) for n in re.findall(r"(\d+) images", said)]
    assert sum(counts) == 600
    with np.load(folder / "case" / "truth.npz") as truth:
        subunits = truth["state"]
    found = Run.load(folder / "out", particles=Particles.open(star))  # by the script's name: fits nothing anew
    centre = found.model.centre.detach().numpy()
    nearest = np.linalg.norm(found.latent.z[:, None] - centre, axis=-1).argmin(1)
    small, large = nearest[subunits == 0].mean(), nearest[subunits == 3].mean()
    assert abs(small - large) > 0.9  # the core alone in one state, the whole complex in the other
    volumes = [read_map(folder / "out" / f"state{k}.mrc")[0] for k in (0, 1)]
    assert float((volumes[0] - volumes[1]).norm()) > 0.1 * float(volumes[0].norm())


def uncertainty(folder: Path) -> None:
    said = run(EXAMPLES / "uncertainty.py", "--out", "out", "--images", 300, "--box", 24, "--draws", 3, folder=folder)
    assert re.search(r"all in all: (sound|look at it|not to be trusted)", said)
    for name in ("posterior.nc", "check.html", "maps/mean.mrc", "maps/probability.mrc", "maps/uncertainty.png"):
        assert (folder / "out" / name).stat().st_size > 0


def compare_priors(folder: Path) -> None:
    """The images are of four classes, which a population of any shape can be."""
    star = simulate(classes(), folder / "case", n_images=600, box=24, snr=0.3, seed=0)
    said = run("-W", "ignore", EXAMPLES / "compare_priors.py", star, 4, folder=folder)
    found = [(name, float(short)) for name, short in COMPARED.findall(said)]
    assert sorted(name for name, _ in found) == ["4 classes", "a Gaussian", "any shape"]
    assert found[0][1] == 0
    assert found[-1][0] == "a Gaussian"
    assert found[-1][1] > 50
    assert "Gaussian explains" not in said


def swap_noise(folder: Path) -> None:
    """Every seventh image is three times as strong, noise and all."""
    star = simulate(classes(), folder / "case", n_images=300, box=16, snr=1.0, seed=0)
    with mrcfile.open(folder / "case" / "particles.mrcs", mode="r+") as stack:
        stack.data[::7] *= 3
    said = run(EXAMPLES / "swap_noise.py", star, 4, folder=folder)
    found = [(name, float(short)) for name, short in COMPARED.findall(said)]
    print("below the best, nats:", found)
    assert [name for name, _ in found] == ["a t for each image", "a t for each coefficient", "Gaussian"]
    image, coefficient, gaussian = (short for _, short in found)
    assert image == 0 < coefficient < gaussian


def md_prior(folder: Path) -> None:
    """A simulation that dwells at one end of a motion, and images that dwell at the other."""
    toy, steps = hinge(), torch.linspace(0, 1, 100).square()
    early, late = (50 * steps).round().long(), (50 * (1 - steps)).round().long()
    write_models(folder / "md.pdb", toy.xyz[early])
    source = Complex(toy.xyz[late], toy.weight[late], toy.coordinate[late], toy.sigma_angstrom)
    star = simulate(source, folder / "case", n_images=400, box=24, snr=0.3, seed=0)
    said = run(EXAMPLES / "md_prior.py", star, "md.pdb", folder=folder)
    line = r"^state \d, about frame (\d+): (.+) of the simulation, (.+) \+- (.+) of the images"
    table = np.array(re.findall(line, said, re.MULTILINE), float)
    with np.load(folder / "case" / "truth.npz") as truth:
        coordinate = truth["coordinate"][:, 0]
    middle = toy.coordinate[early[table[:, 0].astype(int)], 0].numpy()
    state = np.abs(coordinate[:, None] - middle).argmin(1)
    true = np.bincount(state, minlength=len(middle)) / len(state)
    _, simulated, found, sd = table.T
    print(f"populations: simulation {simulated}, images {found} +- {sd}, true {true}")
    assert float(np.abs(found - true).max()) < 0.06  # and which state an image at a border is of is a matter of taste
    assert float(np.abs(simulated - true).max()) > 0.3
    assert 0.01 < sd.min() < sd.max() < 0.05
    starless = run(EXAMPLES / "md_prior.py", star, folder=folder)
    assert len(re.findall(line, starless, re.MULTILINE)) == 3


def write_models(path: Path, xyz: torch.Tensor) -> None:
    """Frames (S, A, 3) as MODELs of CA atoms."""
    with path.open("w") as file:
        for number, frame in enumerate(xyz.tolist(), 1):
            file.write(f"MODEL     {number:4d}\n")
            for serial, (x, y, z) in enumerate(frame, 1):
                file.write(f"ATOM  {serial:5d}  CA  ALA A{serial:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00  0.00\n")
            file.write("ENDMDL\n")


def is_the_motion_real(folder: Path) -> None:
    said = run("-W", "ignore", EXAMPLES / "is_the_motion_real.py", "--images", 600, "--box", 24, folder=folder)
    p = [float(found) for found in re.findall(r"associated with p = ([\d.]+)", said)]
    number = r"(-?\d\.\d+)"
    line = rf"^(.+): R2 of z between the halves {number}, motion FSC {number}, of whole maps {number}"
    table = np.array([row[1:] for row in re.findall(line, said, re.MULTILINE)], float)
    print(said)
    assert min(p[:2]) > 0.01 > p[2]  # p-values of what is not associated are anywhere in 0 to 1
    assert table.shape == (3, 3)
    assert table[[0, 2], :2].min() > 0.7  # errors of poses come back as motions do
    assert table[1, 1] < 0.3
    assert table[:, 2].min() > 0.9


KNOWN: dict[str, Callable[[Path], None]] = {
    "compare_priors.py": compare_priors,
    "demo.py": demo,
    "is_the_motion_real.py": is_the_motion_real,
    "md_prior.py": md_prior,
    "swap_noise.py": swap_noise,
    "uncertainty.py": uncertainty,
    "two_state.py": two_state,
}


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example(name: str, tmp_path: Path) -> None:
    assert name in KNOWN, f"say in KNOWN how examples/{name} runs at toy size"
    KNOWN[name](tmp_path)


def test_the_script_of_the_readme(toy: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    scripts = [block for block in blocks if "fit(" in block]
    assert scripts
    for number, script in enumerate(scripts):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        Particles.open(toy, first=60).write_star(folder / "particles.star")
        (folder / "script.py").write_text(re.sub(r"epochs=\d+", "epochs=1", script))
        run("script.py", folder=folder)
        assert (folder / "run" / "checkpoint.pt").exists()


def test_the_questions_of_the_readme(toy: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    script = next(block for block in blocks if "run.posterior(" in block)
    for large, small in (("range(200)", "range(50)"), ("300]", "50]"), ("draws=500", "draws=60")):
        assert large in script
        script = script.replace(large, small)
    fit(LinearSubspace(16, zdim=1), Particles.open(toy, first=200, box=16), tmp_path / "run")
    (tmp_path / "script.py").write_text(script)
    good, p_value, coverage = run("script.py", folder=tmp_path).splitlines()
    assert 0 <= float(good) <= 1
    assert 0 <= float(p_value) <= 1
    assert coverage.startswith("Coverage(")
