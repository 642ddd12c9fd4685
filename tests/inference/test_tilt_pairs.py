"""Particles that are seen in several images, from fit to maps: one z each, and a better one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from images import in_views
from numpy.testing import assert_allclose, assert_array_equal
from torch import Tensor

from pyro_cryo.analysis.latent import neighbour_r2
from pyro_cryo.analysis.local import _Local
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import hinge, simulate
from pyro_cryo.guides.coefficients import LinearCoefficients
from pyro_cryo.inference.family import FamilySolver
from pyro_cryo.inference.fit import fit
from pyro_cryo.inference.reconstruct import reconstruct
from pyro_cryo.inference.run import Run
from pyro_cryo.models.classes import Classes
from pyro_cryo.models.contrast import Contrast
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.models.linear_subspace import LinearSubspace
from pyro_cryo.models.manifold import Manifold
from pyro_cryo.models.robust_noise import RobustNoise

BOX = 24
STATES = 21


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Particles, Tensor]:
    """All images, at a low signal-to-noise ratio, each a particle; and their states."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = tmp_path_factory.mktemp("hinge") / "case"
        particles = Particles.open(simulate(hinge(STATES), folder, n_images=1000, box=BOX, snr=0.1, seed=2))
    with np.load(particles.table.path.parent / "truth.npz") as truth:
        return particles, torch.from_numpy(truth["state"])


@pytest.fixture(scope="module")
def pairs(case: tuple[Particles, Tensor]) -> tuple[Particles, Tensor]:
    """Two images a particle, as a STAR file says, in no order; and the states of the particles."""
    particles, state = case
    some, their_state = in_views(particles, state)
    path = particles.table.path.parent / "pairs.star"
    name = [f"tomogram/{i}" for i in some.particle.tolist()]
    some.write_star(path, extra={"rlnTomoParticleName": name})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = Particles.open(path)
    assert opened.n_particles == len(their_state) == len(opened) // 2
    return opened, their_state


@pytest.fixture(scope="module")
def paired_run(pairs: tuple[Particles, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fit(LinearSubspace(BOX, zdim=2), pairs[0], tmp_path_factory.mktemp("pairs") / "run")


def test_pairs_have_one_z_and_a_better_one(
    case: tuple[Particles, Tensor], pairs: tuple[Particles, Tensor], paired_run: Run
) -> None:
    particles, state = case
    alone = fit(LinearSubspace(BOX, zdim=2), particles)
    latent = paired_run.latent
    assert_array_equal(latent.index, np.arange(pairs[0].n_particles))
    assert latent.z_cov.shape == (pairs[0].n_particles, *[paired_run.model.zdim] * 2)
    one = neighbour_r2(alone.latent.z, state.numpy())[0]
    two = neighbour_r2(latent.z, pairs[1].numpy())[0]
    both = torch.from_numpy(alone.model.make_guide().posterior(pairs[0].batch(slice(None)))[0].detach().numpy())
    same_maps = neighbour_r2(both.numpy(), pairs[1].numpy())[0]
    print(f"R2 of z: one image {one:.3f}, two {two:.3f}, two in the maps of the first fit {same_maps:.3f}")
    assert two > one + 0.05
    assert same_maps > one + 0.05


def test_a_saved_run_of_pairs_is_opened_selected_and_mapped(
    paired_run: Run, pairs: tuple[Particles, Tensor], tmp_path: Path, command: Callable[..., int]
) -> None:
    folder, particles = paired_run.folder, pairs[0]
    assert folder is not None
    again = Run.load(folder)
    assert again.particles.n_particles == particles.n_particles
    assert_allclose(again.encode(particles[particles.images_of(torch.arange(40))]).z, again.latent.z[:40], atol=1e-4)
    assert command("analyze", folder, "--kmeans", 3, "--steps", 2, "--components", 1, "--quiet") == 0
    cluster = np.loadtxt(folder / "analysis" / "clusters.txt", dtype=int)
    assert cluster.shape == (particles.n_particles, 2)
    assert command("select", folder, "--cluster", 1, "-o", tmp_path / "some.star") == 0
    some, kept = Particles.open(tmp_path / "some.star"), np.flatnonzero(cluster[:, 1] == 1)
    assert (some.n_particles, len(some)) == (len(kept), 2 * len(kept))
    rows = particles.images_of(torch.from_numpy(kept))
    assert_allclose(some.rotation, particles.rotation[rows], atol=1e-5)
    last = particles.n_particles - 1
    assert command("volumes", folder, "--index", 3, last, "-o", tmp_path / "maps", "--quiet") == 0
    with np.load(tmp_path / "maps" / "volumes.npz") as file:
        assert_array_equal(file["z"], again.latent.z[[3, last]])
    assert command("volumes", folder, "--index", last + 1, "-o", tmp_path / "beyond", "--quiet") == 2
    assert command("volumes", folder, "--index", 3, "--local", "-o", tmp_path / "local", "--quiet") == 0


def test_a_resumed_run_must_have_the_same_pairs(paired_run: Run, pairs: tuple[Particles, Tensor]) -> None:
    particles = pairs[0]
    apart = replace(particles, table=replace(particles.table, particle=torch.arange(len(particles))))
    assert paired_run.folder is not None
    with pytest.raises(ValueError, match="is a fit of other particles"):
        Run.load(paired_run.folder, particles=apart)


def test_images_near_a_z_weigh_as_their_particles_do(paired_run: Run) -> None:
    """What is added up of weighed particles is what is of their images, each with its particle's weight."""
    local, particles = _Local(paired_run, 64), paired_run.particles
    weight = torch.rand(1, particles.n_particles, generator=torch.Generator().manual_seed(0))
    alone = replace(particles, table=replace(particles.table, particle=torch.arange(len(particles))))
    apart = Run(paired_run.model, alone, guide=paired_run.guide)
    apart.latent = paired_run.latent
    each = _Local(apart, 64)
    each.first = local.first
    volume = paired_run.volume(np.zeros(paired_run.model.zdim))[None]
    with torch.no_grad():
        contrast = paired_run.model.coefficients.contrast_sd  # type: ignore[union-attr]
        kept = contrast.clone()
        contrast.fill_(1e-6)  # of one image it would be inferred otherwise
        together = local.add_up(volume, [weight])[0][0]
        expected = each.add_up(volume, [weight[:, particles.particle]])[0][0]
        contrast.copy_(kept)
    for found, by_image in zip(together, expected, strict=True):
        assert float(found.weight.abs().max()) > 0
        for a, b in ((found.weight, by_image.weight), (found.value, by_image.value)):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
    halves = [volume.clone(), 2 * volume]
    gain, of = local.gains(volume[0], halves, weight[0])
    assert len(gain) == len(of) == int((weight[0] > 1e-2).sum())


def test_families_split_and_draw_whole_particles(pairs: tuple[Particles, Tensor]) -> None:
    particles = pairs[0]
    solver = FamilySolver(particles, reconstruct(particles), torch.eye(3)[None])
    train, held = solver.split
    assert (held.n_particles, len(held)) == (-(-particles.n_particles // 10), 2 * -(-particles.n_particles // 10))
    assert train.n_particles + held.n_particles == particles.n_particles
    assert len(train) + len(held) == len(particles)
    drawn = solver.drawn(30)
    assert (drawn.n_particles, len(drawn)) == (30, 60)


def test_contrasts_that_many_images_tell_are_learned(case: tuple[Particles, Tensor]) -> None:
    """Their mean is the maps' own scale: it does not drift, however far a fit goes."""
    some, _ = in_views(*case, 10)
    contrast = 1 + 0.3 * torch.randn(some.n_particles, generator=torch.Generator().manual_seed(0))
    contrast = contrast.clamp_min(0.2)
    table = replace(some.table, sign=some.table.sign * contrast[some.particle])
    run = fit(LinearSubspace(BOX, zdim=1), replace(some, table=table))
    coefficients = run.model.coefficients
    assert isinstance(coefficients, LinearCoefficients)
    planted = float(contrast.std() / contrast.mean())
    print(f"sd of contrasts: {planted:.3f} planted, {float(coefficients.contrast_sd):.3f} found")
    assert float(coefficients.contrast_sd) == pytest.approx(planted, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("views", [2, 8])
@pytest.mark.parametrize("kind", [partial(Manifold, zdim=2), partial(Classes, classes=4)])
def test_solved_families_gain_from_views(case: tuple[Particles, Tensor], kind: Callable, views: int) -> None:
    particles, state = case
    some, their_state = in_views(particles, state, views)
    alone = neighbour_r2(fit(kind(BOX), particles).latent.z, state.numpy())[0]
    together = neighbour_r2(fit(kind(BOX), some).latent.z, their_state.numpy())[0]
    print(f"{kind}: R2 of z from one image {alone:.3f}, from {views} {together:.3f}")
    assert together > alone + 0.05


@pytest.mark.slow
@pytest.mark.parametrize("kind", [CryoDRGN, Contrast, RobustNoise])
def test_encoders_gain_from_views(case: tuple[Particles, Tensor], kind: type, tmp_path: Path) -> None:
    particles, state = case
    some, their_state = in_views(particles, state, 2)
    found = []
    for images, truth in ((particles, state), (some, their_state)):
        torch.manual_seed(0)
        model = kind(BOX, zdim=1, width=48, layers=1)
        run = fit(model, images, tmp_path / f"run{len(found)}", epochs=20, learning_rate=2e-3)
        found.append(neighbour_r2(run.latent.z, truth.numpy())[0])
    print(f"{kind.__name__}: R2 of z from one image {found[0]:.3f}, from two {found[1]:.3f}")
    assert found[1] > found[0] + 0.05
