"""What a fit asks of a user's model, and what it refuses to do in silence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_cryo.analysis.report import analyze
from pyro_cryo.analysis.series import finishing, write_series
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import hinge, simulate
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.run import Run
from pyro_cryo.inference.state import build_model
from pyro_cryo.model import CryoModel
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.models.homogeneous import Homogeneous
from pyro_cryo.volumes.mlp import CoordinateMLP


class Unguided(CryoModel):
    """Samples z, and has nothing that guesses it."""

    zdim = 2

    def __init__(self, box: int) -> None:
        super().__init__(box)
        self.volume = CoordinateMLP(box, 2, width=8, layers=1)

    def latent(self) -> torch.Tensor:
        return pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


class HeavyTailed(Homogeneous):
    """Overrides a sentence that is not descended to."""

    def noise(self, mean: torch.Tensor, sigma: torch.Tensor) -> dist.StudentT:
        return dist.StudentT(4.0, mean, sigma)


class Secret(CryoDRGN):
    """Has an argument that JSON cannot say."""

    def __init__(self, box: int, secret: object = None) -> None:
        super().__init__(box, zdim=1, width=8, layers=1)


def test_a_model_with_z_needs_a_guide_of_z(small_case: Path, tmp_path: Path) -> None:
    particles = Particles.open(small_case / "particles.star")
    with pytest.raises(ValueError, match=r"guide of Unguided says nothing of z; .*ImageEncoder"):
        fit(Unguided(particles.box), particles, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_solved_model_takes_no_other_noise(small_case: Path) -> None:
    particles = Particles.open(small_case / "particles.star")
    with pytest.raises(ValueError, match="HeavyTailed overrides noise, but Homogeneous is solved"):
        fit(HeavyTailed(particles.box), particles)


def test_an_argument_that_json_cannot_say_is_asked_for(small_case: Path, tmp_path: Path) -> None:
    particles = Particles.open(small_case / "particles.star")
    run = fit(Secret(particles.box, secret=object()), particles, tmp_path / "run", epochs=1)
    with pytest.raises(ValueError, match=r"argument secret of Secret; give Run\.load\(\.\.\., model=\)"):
        Run.load(tmp_path / "run")
    again = Run.load(tmp_path / "run", model=Secret(particles.box))
    torch.testing.assert_close(again.volume(torch.zeros(1)), run.volume(torch.zeros(1)))
    assert isinstance(build_model({"model": {"module": "pyro_cryo.models.cryodrgn", "class": "CryoDRGN"},
                                   "arguments": {"box": 16}}), CryoDRGN)  # fmt: skip


def test_maps_of_others_are_left_alone(cryodrgn_run: Path, tmp_path: Path) -> None:
    run, finish = Run.load(cryodrgn_run), finishing(1.0, None, None, False)
    (tmp_path / "vol_012.mrc").write_bytes(b"mine")
    z = np.zeros((2, run.model.zdim), np.float32)
    write_series(run, tmp_path, np.array([-1, -1]), z, finish)
    write_series(run, tmp_path, np.array([-1]), z[:1], finish)
    assert sorted(path.name for path in tmp_path.glob("vol_*.mrc")) == ["vol_000.mrc", "vol_012.mrc"]
    assert (tmp_path / "vol_012.mrc").read_bytes() == b"mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "vol_000.mrc").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"vol_000\.mrc exists and is not of an earlier series"):
        write_series(run, tmp_path / "other", np.array([-1]), z[:1], finish)


def test_a_motion_reaches_as_far_in_a_wider_field_of_view(tmp_path: Path) -> None:
    star = simulate(hinge(3), tmp_path / "case", n_images=4, box=16, seed=0)
    particles = Particles.open(star)
    model = CryoDRGN(particles.box, zdim=1, width=8, layers=1, kmax=4.0)
    model.least_scale = 0.5  # as where another group's field of view is half of this one's
    batch = particles.batch(slice(0, 4))
    z, zero = torch.zeros(4, 1), torch.zeros(4, 2)
    moving = model.signal(model.density(), z, batch.rotation, zero, batch)
    beyond = batch.half.k.norm(dim=-1) > 4.0
    assert float(moving[:, beyond].abs().max()) == 0  # the network itself ends at kmax in the model's cycles
    half = torch.full((4,), 0.5)
    wide = model.signal(model.density(), z, batch.rotation, zero, type(batch)(**{**vars(batch), "freq_scale": half}))
    reached = (batch.half.k.norm(dim=-1) > 4.5) & (batch.half.k.norm(dim=-1) < 7.5)
    assert float(wide[:, reached].abs().min()) > 0


def test_a_weight_of_zero_is_refused_before_anything_is_written(small_case: Path, tmp_path: Path) -> None:
    particles = Particles.open(small_case / "particles.star")
    with pytest.raises(ValueError, match="beta is 0; expected a positive number"):
        fit(CryoDRGN(particles.box, zdim=1), particles, tmp_path / "run", beta=0)
    assert not (tmp_path / "run").exists()


def test_a_family_that_was_not_descended_to_is_analysed_all_the_same(small_case: Path, tmp_path: Path) -> None:
    particles = Particles.open(small_case / "particles.star")
    run = fit(CryoDRGN(particles.box, zdim=2, width=8, layers=1), particles, tmp_path / "run", epochs=0)
    names = [path.name for path in analyze(run, tmp_path / "out", clusters=2, steps=2, components=1)]
    assert names == ["latent.png", "kmeans.png", "pc1.png"]  # and no learning curve
