"""The pictures of a run, and the numbers beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from numpy.testing import assert_array_equal

from pyro_cryo.analysis.latent import kmeans
from pyro_cryo.analysis.report import analyze, half_map_curves
from pyro_cryo.data.mrc_map import read_map
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import hinge, simulate
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.run import Run
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.models.homogeneous import Homogeneous
from pyro_cryo.models.manifold import Manifold


def shows_something(path: Path) -> bool:
    """Whether a picture has ink on it, and not on its edge, where labels would be cut off."""
    picture = imread(path)[..., :3].mean(-1)
    edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    return bool(picture.std() > 0.02 and edge.std() < 1e-3)


def test_pictures_of_a_family_of_maps(cryodrgn_run: Path, tmp_path: Path) -> None:
    run = Run.load(cryodrgn_run)
    pictures = analyze(run, tmp_path, clusters=3, steps=2, components=5)
    assert [path.name for path in pictures] == ["learning_curve.png", "latent.png", "kmeans.png", "pc1.png", "pc2.png"]
    assert all(shows_something(path) for path in pictures)
    image, cluster = np.loadtxt(tmp_path / "clusters.txt", dtype=int).T
    assert_array_equal(image, np.arange(600))
    assert_array_equal(cluster, kmeans(run.latent.z, 3).label)
    for name, count in (("kmeans3", 3), ("pc1", 2), ("pc2", 2)):
        assert len(list((tmp_path / name).glob("vol_*.mrc"))) == count


def test_pictures_of_one_map(homogeneous_run: Path, tmp_path: Path) -> None:
    pictures = analyze(Run.load(homogeneous_run), tmp_path)
    assert [path.name for path in pictures] == ["map.png", "fsc.png"]
    assert all(shows_something(path) for path in pictures)


def test_a_run_of_few_images_and_one_dimension(toy: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    particles = Particles.open(toy, box=16, first=6)
    run = fit(CryoDRGN(16, zdim=1, width=8, layers=1), particles, epochs=1)
    assert [path.name for path in analyze(run, tmp_path, steps=1)][-1] == "pc1.png"
    assert len(list((tmp_path / "kmeans6").glob("vol_*.mrc"))) == 6


def test_what_cannot_be_analysed(homogeneous_run: Path, toy: Path, tmp_path: Path) -> None:
    run = Run.load(homogeneous_run)
    for asked in ({"clusters": 0}, {"steps": 0}, {"components": -1}):
        (name,) = asked
        with pytest.raises(ValueError, match=f"{asked[name]} {name}; give "):
            analyze(run, tmp_path / "out", **asked)
    memory = fit(Homogeneous(16), Particles.open(toy, box=16, first=40))
    with pytest.raises(ValueError, match=r"no map\.mrc"):
        analyze(memory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_maps_of_one_molecule_agree_where_the_truth_does(homogeneous_run: Path) -> None:
    maps = [read_map(homogeneous_run / f"{name}.mrc")[0] for name in ("half1", "half2", "mask")]
    curves = half_map_curves(*maps)
    assert list(curves) == ["unmasked", "masked", "phase-randomised", "corrected"]
    assert float(curves["unmasked"][1:5].min()) > 0.9
    assert float(curves["masked"][1:].mean()) > float(curves["unmasked"][1:].mean())
    table = np.loadtxt(homogeneous_run / "fsc.tsv", skiprows=1)
    np.testing.assert_allclose(table[:, 2:], torch.stack(list(curves.values()), -1)[1:17], atol=2e-5)


def test_independent_half_maps_of_noise_do_not_agree(tmp_path: Path, toy: Path) -> None:
    noise = [torch.randn(32, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    curves = half_map_curves(noise[0], noise[1], torch.ones(32, 32, 32))
    assert float(curves["unmasked"][4:16].abs().max()) < 0.25


def test_a_family_without_motion_is_shown_as_one_map(tmp_path: Path) -> None:
    star = simulate(hinge(1), tmp_path / "case", n_images=200, box=16, snr=0.5, seed=0)
    with pytest.warns(UserWarning, match="the images support no motion") as said:
        run = fit(Manifold(16, zdim=2, points=50), Particles.open(star), tmp_path / "run")
    assert len([one for one in said if "no motion" in str(one.message)]) == 1
    with pytest.warns(UserWarning, match="no free energy"):
        pictures = analyze(run, tmp_path / "out", free_energy=True)
    assert [path.name for path in pictures] == ["map.png", "fsc.png"]
