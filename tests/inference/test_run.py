"""A run gives the same answers from memory, from disk and for other images."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import Tensor

from pyro_cryo.data.particles import Particles
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.run import Run
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.models.homogeneous import Homogeneous


def test_a_loaded_run_answers_as_the_fitted_one(particles, small_model, tmp_path: Path) -> None:
    run = fit(small_model(), particles, tmp_path / "run", epochs=2)
    again = Run.load(tmp_path / "run")
    z = torch.tensor([[0.3, -1.0], [1.2, 0.4]])
    assert torch.equal(again.volume(z), run.volume(z))
    assert_array_equal(again.latent.z, run.latent.z)
    assert_array_equal(again.latent.z_cov, run.latent.z_cov)
    assert_array_equal(again.encode(particles).z, run.latent.z)
    assert again.records == run.records
    assert len(again.particles) == 80
    assert again.device.type == "cpu"


def test_a_loaded_map_is_the_fitted_one(particles, tmp_path: Path) -> None:
    run = fit(Homogeneous(16), particles, tmp_path / "run")
    assert torch.equal(Run.load(tmp_path / "run").volume(), run.volume())


def test_a_run_that_is_going_on_can_be_looked_at(particles, small_model, tmp_path: Path) -> None:
    fit(small_model(), particles, tmp_path / "run", epochs=1)
    (tmp_path / "run" / "latent.npz").unlink()  # as before the end
    run = Run.load(tmp_path / "run")
    assert run.latent.z.shape == (80, 2)
    assert not (tmp_path / "run" / "latent.npz").exists()


def test_shapes_of_z(particles, small_model) -> None:
    run = fit(small_model(), particles, epochs=0)
    one, several = run.volume(np.zeros(2)), run.volume(np.zeros((3, 2)))
    assert one.shape == (16, 16, 16)
    assert several.shape == (3, 16, 16, 16)
    assert_allclose(several[1], one, atol=1e-6)
    assert run.volume(torch.zeros(1, 4, 2)).shape == (1, 4, 16, 16, 16)
    for z in (torch.zeros(3), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match=r"expected \(\*batch, 2\)"):
            run.volume(z)
    with pytest.raises(ValueError, match=r"has a z of dimension 2; call volume\(z\)"):
        run.volume()
    still = fit(Homogeneous(16), particles)
    with pytest.raises(ValueError, match=r"has no z; call volume\(\)"):
        still.volume(torch.zeros(2))
    with pytest.raises(ValueError, match="no latent coordinate z; fit a heterogeneous model"):
        _ = still.latent


class Shifted(CryoDRGN):
    """z ~ Normal(centre, 1)."""

    def __init__(self, box: int, centre: float = 1.0) -> None:
        super().__init__(box, zdim=2, width=16, layers=1)
        self.centre = centre

    def latent(self) -> Tensor:
        return pyro.sample("z", dist.Normal(self.log_sigma.new_full((2,), self.centre), 1.0).to_event(1))


def test_a_class_of_the_users_script_is_found_again(particles, tmp_path: Path) -> None:
    run = fit(Shifted(16, centre=2.0), particles, tmp_path / "run", epochs=1)
    found = Run.load(tmp_path / "run")  # by this file and the class's name
    assert (type(found.model).__name__, found.model.centre) == ("Shifted", 2.0)
    given = Run.load(tmp_path / "run", model=Shifted(16, centre=2.0), particles=particles)
    for again in (found, given):
        assert torch.equal(again.volume(torch.ones(2)), run.volume(torch.ones(2)))


def test_a_class_that_cannot_be_found_must_be_given(particles, tmp_path: Path) -> None:
    class Local(Shifted):
        """Of a function: no import finds it."""

    run = fit(Local(16), particles, tmp_path / "run", epochs=1)
    with pytest.raises(ValueError, match=r"no longer defines .*Local; .*Run\.load\(\.\.\., model=\)"):
        Run.load(tmp_path / "run")
    assert torch.equal(Run.load(tmp_path / "run", model=Local(16)).volume(torch.ones(2)), run.volume(torch.ones(2)))
    with pytest.raises(ValueError, match=r"does not fit CryoDRGN as it is now .*build the model as it was fitted"):
        Run.load(tmp_path / "run", model=CryoDRGN(16, zdim=3))


def test_other_particles_are_encoded(toy: Path, cryodrgn_run: Path) -> None:
    run, whole = Run.load(cryodrgn_run), Particles.open(toy)
    other = run.encode(whole[100:160])
    assert_array_equal(other.index, np.arange(60))
    assert_allclose(other.z, run.latent.z[100:160], atol=1e-5)
    with pytest.raises(ValueError, match="particles of 16 px, the run has 32; open with that box"):
        run.encode(Particles.open(toy, box=16))
    with pytest.raises(ValueError, match=r"particles of 10 A a pixel, the run has 7\.02"):
        run.encode(Particles.open(toy, apix=10.0))


def test_the_latents_are_the_posterior_of_the_guide(toy: Path, cryodrgn_run: Path) -> None:
    run = Run.load(cryodrgn_run)
    batch = run.particles.batch([5, 300])
    with torch.no_grad():
        loc, sd = run.guide.moments(batch)  # type: ignore[union-attr, operator]
    assert_allclose(run.latent.z[[5, 300]], loc, atol=1e-5)
    assert_allclose(run.latent.z_cov[[5, 300]], torch.diag_embed(sd**2), atol=1e-5)


def test_a_better_guide_takes_nothing_from_the_folder(toy: Path, cryodrgn_run: Path) -> None:
    run = Run.load(cryodrgn_run)
    better = run.semi_amortised()
    few = Particles.open(toy)[:20]
    assert better.folder is None
    assert_allclose(better.volume(np.zeros((1, run.model.zdim))), run.volume(np.zeros((1, run.model.zdim))))
    z, own = better.encode(few), run.encode(few)
    assert np.abs(z.z - own.z).max() > 0.01
    assert np.abs(run.latent.z[:20] - own.z).max() < 1e-5


def test_particles_that_moved_or_changed(toy: Path, particles, small_model, tmp_path: Path) -> None:
    shutil.copytree(toy.parent, tmp_path / "case")
    star = tmp_path / "case" / "particles.star"
    fit(small_model(), Particles.open(star, box=16, first=80), tmp_path / "run", epochs=1)
    (tmp_path / "case").rename(tmp_path / "elsewhere")
    run = Run.load(tmp_path / "run")
    assert run.volume(run.latent.z[:1]).shape == (1, 16, 16, 16)  # maps do without the images
    assert run.apix > 0
    with pytest.raises(FileNotFoundError, match=r"run is a fit of .*case/particles\.star, which is not there"):
        _ = run.particles
    moved = Particles.open(tmp_path / "elsewhere" / "particles.star", box=16, first=80)
    assert Run.load(tmp_path / "run", particles=moved).latent.z.shape == (80, 2)
    with pytest.raises(ValueError, match="is a fit of other particles"):
        Run.load(tmp_path / "run", particles=particles[:50])
    (tmp_path / "elsewhere").rename(tmp_path / "case")
    text = star.read_text()
    first, second = (line for line in text.splitlines() if line.startswith(("000001@", "000002@")))
    star.write_text(text.replace(first, "?").replace(second, first).replace("?", second))
    with pytest.raises(ValueError, match="the particles have changed since the fit"):
        _ = Run.load(tmp_path / "run").particles


def test_particles_picked_in_python_must_be_given(particles, small_model, tmp_path: Path) -> None:
    fit(small_model(), particles[::2], tmp_path / "run", epochs=1)
    with pytest.raises(ValueError, match=r"the particles have changed .*Run\.load\(\.\.\., particles=\)"):
        _ = Run.load(tmp_path / "run").particles
    assert Run.load(tmp_path / "run", particles=particles[::2]).latent.z.shape == (40, 2)
