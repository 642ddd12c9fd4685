"""Every example runs, at toy size, as a user runs it; so does the script of the README."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pyro_cryo.data.mrc_map import read_map
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import classes, simulate
from pyro_cryo.inference.run import Run

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


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


def three_priors(folder: Path) -> None:
    star = simulate(classes(), folder / "case", n_images=200, box=16, snr=1.0, seed=0)
    said = run(EXAMPLES / "three_priors.py", star, 2, folder=folder)
    lines = re.findall(r"^(.+): (-?[\d.]+) nats an image, (-?[\d.]+) \+- ([\d.]+) below", said, re.MULTILINE)
    assert [line[0] for line in lines] == ["one Gaussian", "two Gaussians", "a flow"]
    assert min(float(line[2]) for line in lines) == 0


KNOWN: dict[str, Callable[[Path], None]] = {"demo.py": demo, "two_state.py": two_state, "three_priors.py": three_priors}


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example(name: str, tmp_path: Path) -> None:
    assert name in KNOWN, f"say in KNOWN how examples/{name} runs at toy size"
    KNOWN[name](tmp_path)


def test_the_script_of_the_readme(toy: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    scripts = [block for block in blocks if "fit(" in block]
    assert scripts
    Particles.open(toy, first=60).write_star(tmp_path / "particles.star")
    for number, script in enumerate(scripts):
        quick, changed = re.subn(r"epochs=\d+", "epochs=1", script)
        assert changed, "a script that says how many epochs"
        (tmp_path / f"script{number}.py").write_text(quick)
        run(f"script{number}.py", folder=tmp_path)
        assert (tmp_path / "run" / "latent.npz").exists()
