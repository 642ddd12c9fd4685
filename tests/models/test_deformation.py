"""The recipe of a molecule that bends: images, gradients, and a hinge found sharper than its consensus."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import hinge, simulate
from pyro_cryo.inference.fit import fit
from pyro_cryo.models.deformation import Deformation
from pyro_cryo.physics.slices import slice_coordinates
from pyro_cryo.volumes.grid import VoxelGrid

BOX = 24


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> Particles:
    """500 images of a hinge in nine states."""
    return Particles.open(simulate(hinge(9), tmp_path_factory.mktemp("bends") / "case", n_images=500, box=BOX, snr=1.0))


@pytest.fixture(scope="module")
def prepared(particles: Particles) -> Deformation:
    """Solved for, bent somewhat, nothing masked, some images of a wider field of view; to be read only."""
    torch.manual_seed(0)
    model = Deformation(BOX, points=1500, width=16, layers=1)
    model.prepare(particles)
    torch.nn.init.normal_(model.volume.net[-1].weight, std=0.2)
    model.mask.fill_(1.0)
    model.least_scale = 0.8
    return model


def truth_of(particles: Particles) -> dict[str, np.ndarray]:
    with np.load(particles.table.path.parent / "truth.npz") as truth:
        return dict(truth)


def test_at_rest_the_template_is_the_consensus(particles: Particles) -> None:
    model = Deformation(BOX, points=1500, width=16, layers=1)
    model.prepare(particles)
    for parameter in model.volume.net[-1].parameters():
        torch.nn.init.zeros_(parameter)
    batch = particles.batch(slice(0, 20))
    with torch.no_grad():
        mean = model.signal(model.density(), torch.randn(20, 2), *model.pose(batch), batch)
        still, _ = model.expected(batch)
    assert float((mean - still).norm() / still.norm()) < 0.05  # the solvent's noise is left out


def test_images_are_slices_of_the_maps(particles: Particles, prepared: Deformation) -> None:
    """Splatted images agree with slices of the map on voxels, whose own error is 1%, at every scale of k."""
    z, batch = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), particles.batch(slice(0, 6))
    batch = dataclasses.replace(
        batch,
        ctf=torch.ones_like(batch.ctf),
        translation=torch.zeros(6, 2),
        freq_scale=torch.tensor([1.0, 1.0, 1.0, 0.8, 0.8, 1.1]),
    )
    with torch.no_grad():
        assert float(prepared.volume.displacement(z).norm(dim=-1).mean()) > 0.3
        images = prepared.signal(prepared.density(), z, *prepared.pose(batch), batch)
        points = slice_coordinates(batch.rotation, batch.half.k, batch.freq_scale)
        for i, volume in enumerate(prepared.map(z)):
            grid = VoxelGrid(BOX)
            grid.set(volume)
            near = points[i].norm(dim=-1) < prepared.volume.kmax - 1
            slices = grid(points[i])
            assert float((images[i] - slices)[near].norm() / slices[near].norm()) < 0.02


def test_beyond_the_band_limit_images_are_the_consensus_alone(particles: Particles, prepared: Deformation) -> None:
    batch = particles.batch(slice(0, 4))
    with torch.no_grad():
        near, far = (prepared.signal(prepared.density(), z, *prepared.pose(batch), batch) for z in torch.randn(2, 4, 2))
        still, _ = prepared.expected(batch)
    count = batch.half.count(prepared.volume.kmax)
    assert count < len(batch.half)
    torch.testing.assert_close(near[:, count:], still[:, count:])
    assert float((near - far)[:, :count].abs().max()) > 0


@pytest.mark.parametrize("wrong", [{"points": 0}, {"modes": 0}, {"length": 0.0}])
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} {next(iter(wrong.values()))}.*expected at least"):
        Deformation(BOX, **wrong)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def test_a_hinge_is_found_and_its_arm_is_sharper_than_in_the_consensus(particles: Particles) -> None:
    torch.manual_seed(0)
    model = Deformation(BOX, zdim=1, points=800, width=32, layers=1)
    run = fit(model, particles, epochs=9, learning_rate=4e-3)
    truth, z = truth_of(particles), torch.as_tensor(run.latent.z[:, 0])
    rank = spearmanr(run.latent.z[:, 0], truth["coordinate"][:, 0]).statistic
    print(f"rank correlation of z and the hinge's coordinate {rank:.3f}")
    assert abs(rank) > 0.95
    volumes = torch.as_tensor(truth["volumes"])
    moving = volumes.var(0) > 0.1 * volumes.var(0).max()
    for state in (0, len(volumes) - 1):
        bent = run.volume(z[torch.as_tensor(truth["state"] == state)].median()[None])
        found, blurred = (correlation(v[moving], volumes[state][moving]) for v in (bent, model.consensus.voxels))
        print(f"state {state}: correlation where it moves {found:.3f}, of the consensus {blurred:.3f}")
        assert found > 0.8 > blurred + 0.3
