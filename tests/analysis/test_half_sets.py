"""What two runs share is found whatever the axes of their z; what is noise in each is not shared."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_cryo.analysis.check_plots import motion_fsc
from pyro_cryo.analysis.half_sets import HalfSets, compare, half_sets, told
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import hinge, simulate
from pyro_cryo.inference.run import Run
from pyro_cryo.models.linear_subspace import LinearSubspace
from pyro_cryo.models.uncertain_pose import UncertainPose
from pyro_cryo.physics.fourier import soft_disc

BOX = 20


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> Particles:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = tmp_path_factory.mktemp("halves") / "case"
        return Particles.open(simulate(hinge(9), folder, n_images=600, box=BOX, snr=0.5, seed=0))


def blurred(seed: int) -> Tensor:
    """Random density of the molecule's size (D, D, D)."""
    noise = torch.fft.rfftn(torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(seed)))
    return torch.fft.irfftn(noise, s=(BOX,) * 3) * soft_disc(BOX, 7.0, 2.0, dims=3)


def run_of(particles: Particles, maps: Tensor) -> Run:
    """A linear family (1 + r, D, D, D) as if it had been fitted."""
    model = LinearSubspace(BOX, zdim=len(maps) - 1, contrast=0.0)
    model.consensus.set(maps[0])
    model.volume.set(maps)
    with np.load(particles.table.path.parent / "truth.npz") as truth:
        model.log_sigma.data.fill_(math.log(float(truth["noise_sd"]) / 2**0.5))
    return Run(model, particles, guide=model.make_guide())


def principal(particles: Particles, count: int) -> Tensor:
    """Mean and principal components of the true maps, z of variance one."""
    with np.load(particles.table.path.parent / "truth.npz") as truth:
        volumes = torch.from_numpy(truth["volumes"])
    middle = volumes.mean(0)
    _, size, axes = torch.linalg.svd((volumes - middle).flatten(1), full_matrices=False)
    along = size[:count, None] * axes[:count] / len(volumes) ** 0.5
    return torch.cat([middle[None], along.view(count, BOX, BOX, BOX)])


def test_an_affine_map_of_z_is_found_exactly_and_a_curved_one_is_followed() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2000, 3))
    turned = z @ rng.normal(size=(3, 2)) + [4.0, -1.0]
    np.testing.assert_allclose(told(z, turned), turned, atol=1e-9)
    curve = np.stack([np.cos(2 * z[:, 0]), np.sin(2 * z[:, 0])], 1)
    assert np.abs(told(z[:, :1], curve) - curve).mean() < 0.05
    assert float(((told(z, curve) - curve) ** 2).sum() / ((curve - curve.mean(0)) ** 2).sum()) < 0.4


def test_what_is_told_of_noise_is_nothing() -> None:
    """Also where a particle's own value is the only thing to tell it by."""
    rng = np.random.default_rng(1)
    z, other = rng.normal(size=(2, 3000, 2))
    left = ((told(z, other) - other) ** 2).sum() / (other**2).sum()
    assert left == pytest.approx(1 + 1 / 30, abs=0.02)
    same = np.zeros((3000, 1))
    np.testing.assert_allclose(told(same, other), np.broadcast_to(other.mean(0), other.shape), atol=1.0)


def test_probabilities_of_classes_are_told_from_each_other() -> None:
    rng = np.random.default_rng(2)
    label, renumbered = rng.integers(4, size=500), np.array([2, 0, 3, 1])
    z, other = np.eye(4)[label], np.eye(4)[renumbered[label]]
    np.testing.assert_allclose(told(z, other), other, atol=1e-6)


def test_a_family_with_other_axes_is_the_same(moving: Particles) -> None:
    maps = principal(moving, 2)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    turned = torch.cat([maps[:1], torch.einsum("ij,jzyx->izyx", turn, maps[1:])])
    found = compare(run_of(moving, maps), run_of(moving, turned), moving, points=6)
    assert min(found.r2) > 0.999
    assert float(found.motion.min()) > 0.99
    np.testing.assert_allclose(found.z[1], found.z[0] @ turn.numpy().T, atol=0.02)
    assert found.resolution_angstrom == pytest.approx(2 * moving.apix)


def test_motions_that_are_noise_are_not_shared_though_maps_are(moving: Particles) -> None:
    """One consensus, and in each half a motion that only it has."""
    middle = principal(moving, 1)[:1]
    pooled, null = [], []
    for seed in range(4):
        noise = [0.3 * float(middle.std()) * blurred(10 * seed + n)[None] for n in (0, 1)]
        found = compare(*(run_of(moving, torch.cat([middle, own])) for own in noise), moving)
        assert max(found.r2) < 0.15
        assert float(found.maps[:, :8].min()) > 0.9
        pooled.append(float(found.pooled[3:].mean()))
        null.append(float(found.null[3:].mean()))
    print("pooled", pooled, "null", null, "r2", found.r2)
    assert abs(np.mean(pooled)) < 0.06
    assert abs(np.mean(null)) < 0.1


def test_shapes_matched_at_random_share_less_than_the_motion(moving: Particles) -> None:
    maps = principal(moving, 2)
    found = compare(run_of(moving, maps), run_of(moving, maps), moving)
    assert float(found.null[1:].max()) < 0.8 < float(found.pooled[1:].min())


def test_halves_of_a_motion_agree(moving: Particles, tmp_path: Path) -> None:
    found = half_sets(lambda: LinearSubspace(BOX, zdim=2, contrast=0.0), moving, seed=3, points=5)
    shifts = [run.particles.translation for run in found.runs]  # no two images have the same
    assert torch.equal(torch.cat(shifts).unique(dim=0), moving.translation.unique(dim=0))
    assert [len(own) for own in shifts] == [300, 300]
    assert min(found.r2) > 0.8
    assert float(found.pooled[1:6].min()) > 0.8
    assert found.motion.shape == (5, BOX // 2 + 1)
    check_plot(found, tmp_path / "motion.png")


def check_plot(found: HalfSets, path: Path) -> None:
    figure = motion_fsc(found)
    (axes,) = figure.axes
    s = np.arange(BOX // 2 + 1) / (BOX * found.apix)
    np.testing.assert_allclose(axes.lines[1].get_xydata(), np.stack([s, found.pooled], 1))
    assert sum(len(line.get_xdata()) == len(s) for line in axes.lines) == 3 + len(found.motion)
    assert "R²" in axes.get_title()
    figure.savefig(path, dpi=150)
    assert path.stat().st_size > 5000


def test_a_still_molecule_has_no_motion_to_share(moving: Particles) -> None:
    still = torch.cat([principal(moving, 1)[:1], torch.zeros(1, BOX, BOX, BOX)])
    found = compare(run_of(moving, still), run_of(moving, still), moving)
    assert found.r2 == (0.0, 0.0)
    assert len(found.index) == 1
    assert found.resolution_angstrom == math.inf


def test_images_of_one_particle_are_in_one_half(moving: Particles) -> None:
    pairs = replace(moving, table=replace(moving.table, particle=torch.arange(600) // 2))
    found = half_sets(lambda: LinearSubspace(BOX, zdim=1, contrast=0.0), pairs)
    for run in found.runs:
        assert len(run.particles) == 300
        assert run.particles.n_particles == 150


def test_poses_must_be_known(moving: Particles) -> None:
    with pytest.raises(ValueError, match=r"poses are PoseAbout.*run\.particles"):
        half_sets(lambda: UncertainPose(BOX), moving)
