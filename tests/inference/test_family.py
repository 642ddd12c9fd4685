"""Subspaces: a linear motion is found with its rank, a still molecule has none, a bent family is bent."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyro_cryo.analysis.latent import neighbour_r2
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import hinge, simulate
from pyro_cryo.guides.coefficients import LinearCoefficients, Moments, Projected
from pyro_cryo.inference.em import EM, Maps
from pyro_cryo.inference.family import Family, FamilySolver, _scale_on, with_band
from pyro_cryo.inference.reconstruct import Reconstruction, reconstruct
from pyro_cryo.physics.fourier import resize, volume_to_fourier
from pyro_cryo.physics.rotations import point_group
from pyro_cryo.physics.slices import channel_grid

BOX = 24
C1 = torch.eye(3)[None]


def opened(folder: Path, states: int, images: int = 800, snr: float = 0.5) -> Particles:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Particles.open(simulate(hinge(states), folder / "case", n_images=images, box=BOX, snr=snr, seed=1))


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> tuple[Particles, Reconstruction, Family]:
    particles = opened(tmp_path_factory.mktemp("moving"), 21)
    start = reconstruct(particles)
    return particles, start, FamilySolver(particles, start, C1).subspace(4, side=16)


def moments(particles: Particles, family: Family) -> Moments:
    box = family.maps.shape[-1]
    sigma = family.sigma[:, : box // 2 + 1] * (box / particles.box)
    batch = next(iter(replace(particles, box=box).batches(len(particles))))
    return family.coefficients.moments(Projected.of(batch, channel_grid(family.maps), sigma).seen())


def truth(particles: Particles) -> Tensor:
    import numpy as np

    with np.load(particles.table.path.parent / "truth.npz") as file:
        return torch.from_numpy(file["coordinate"]).float()


def test_a_motion_is_found(moving: tuple[Particles, Reconstruction, Family]) -> None:
    particles, _, family = moving
    found = moments(particles, family)
    assert 1 <= family.zdim <= 4
    assert neighbour_r2(found.z.numpy(), truth(particles).numpy())[0] > 0.9
    assert float(family.coefficients.contrast_sd) < 0.05  # all images have the same
    covariance = torch.cov(found.z.T).reshape(family.zdim, family.zdim) + found.z_cov.mean(0)
    torch.testing.assert_close(covariance, torch.eye(family.zdim), rtol=0, atol=0.2)


def test_the_noise_is_that_of_the_images(moving: tuple[Particles, Reconstruction, Family]) -> None:
    import numpy as np

    particles, _, family = moving
    with np.load(particles.table.path.parent / "truth.npz") as file:
        sigma = float(file["noise_sd"]) / 2**0.5
    torch.testing.assert_close(family.sigma[0, 2:8] / sigma, torch.ones(6), rtol=0, atol=0.08)


def test_a_still_molecule_has_no_motion(tmp_path: Path) -> None:
    particles = opened(tmp_path, 1)
    start = reconstruct(particles)
    solver = FamilySolver(particles, start, C1)
    family = solver.subspace(3, side=16)
    assert family.zdim == 1
    assert float(family.maps[1].abs().max()) == 0
    bent = solver.manifold(family, side=16, points=50)
    assert len(bent.maps) == 1


def test_bending_follows_the_motion_and_the_population(moving: tuple[Particles, Reconstruction, Family]) -> None:
    particles, start, family = moving
    bent = FamilySolver(particles, start, C1).manifold(family, side=BOX, points=150, features=8)
    assert bent.maps.shape[-1] == BOX
    assert 2 <= len(bent.maps) <= 9
    found = moments(particles, bent)
    assert neighbour_r2(found.z.numpy(), truth(particles).numpy())[0] > 0.9
    weight = bent.coefficients.log_weight.exp()  # type: ignore[union-attr, operator]
    torch.testing.assert_close(weight, found.weight.mean(0), rtol=0, atol=0.02)


def test_a_pass_never_loses_evidence(moving: tuple[Particles, Reconstruction, Family]) -> None:
    """EM with the prior and the noise held: every pass is an ascent."""
    particles, _, family = moving
    small = replace(particles, box=16)
    maps = Maps(
        family.maps
        + 0.3 * family.maps.std() * torch.randn(family.maps.shape, generator=torch.Generator().manual_seed(0)),
        torch.ones(2, 16, 16, 16),
        family.sigma[:, :9] * (16 / BOX),
        tau=torch.full((len(family.maps), 9), 1e3),
    )
    em = EM(small, maps, LinearCoefficients(0.0), C1)
    seen = []
    for _ in range(4):
        sigma = maps.sigma
        seen.append(em.step())
        maps.sigma, maps.tau = sigma, torch.full((len(family.maps), 9), 1e3)
    assert seen == sorted(seen)


def test_a_point_group_is_kept(moving: tuple[Particles, Reconstruction, Family]) -> None:
    """A pass that knows of a two-fold axis along z leaves maps that have it so."""

    def turned(maps: Tensor) -> Tensor:
        return maps.flip((-1, -2)).roll((1, 1), (-1, -2))

    particles, _, family = moving
    symmetric = 0.5 * (family.maps + turned(family.maps))
    maps = Maps(symmetric, torch.ones(2, 16, 16, 16), family.sigma[:, :9] * (16 / BOX))
    for group, largest in (("C2", 0.05), ("C1", 10.0)):
        em = EM(replace(particles, box=16), replace(maps), LinearCoefficients(0.0), point_group(group))
        em.step()
        own = em.maps.values
        odd = (turned(own) - own)[0].norm() / own[0].norm()
        assert float(odd) < largest
        assert group == "C2" or float(odd) > 0.2


def test_a_band_is_put_in_its_place() -> None:
    volume = torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(0))
    low = torch.randn(12, 12, 12, generator=torch.Generator().manual_seed(1))
    found = with_band(volume, low)
    a, b, c = (volume_to_fourier(v) for v in (found, resize(low, BOX), volume))
    inside, middle = slice(BOX // 2 - 5, BOX // 2 + 6), BOX // 2
    torch.testing.assert_close(a[inside, inside, :6], b[inside, inside, :6], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(a[middle, middle, 7:], c[middle, middle, 7:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("box", [8, 16, BOX])
def test_a_scale_is_the_same_on_every_box(box: int) -> None:
    for value in (1.0, 0.1):
        found = _scale_on(torch.full((BOX, BOX, BOX), value), box)
        torch.testing.assert_close(found, torch.full((box, box, box), value))
