"""The recipe for a family of maps: a consensus and what moves about it, learned from images."""

import numpy as np
import pyro
import pytest
import torch
from images import hinge_images
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.inference.elbo import ReparameterisedELBO
from pyro_cryo.inference.reconstruct import band_limit
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.physics.fourier import image_to_half_plane, shift_phase
from pyro_cryo.physics.rotations import point_group
from pyro_cryo.physics.slices import slice_coordinates

BOX = 24


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> Particles:
    return hinge_images(tmp_path_factory.mktemp("case"), 9, 600, BOX, 1.0)


@pytest.fixture(scope="module")
def coordinate(particles: Particles) -> Tensor:
    with np.load(particles.table.path.parent / "truth.npz") as truth:
        return torch.from_numpy(truth["coordinate"][:, 0]).float()


def prepared(particles: Particles, **arguments: object) -> CryoDRGN:
    torch.manual_seed(0)
    model = CryoDRGN(BOX, **{"zdim": 2, "width": 48, "layers": 2, **arguments})  # type: ignore[arg-type]
    model.prepare(particles)
    return model


def test_the_consensus_is_solved_for_before_the_descent(particles: Particles) -> None:
    model = prepared(particles)
    batch = particles.batch(slice(0, 100))
    image, amplitude = model.expected(batch)
    left = (batch.image - image).square().sum((0, 2)) / batch.image.square().sum((0, 2))
    assert float(left[:60].mean()) < 0.5
    assert amplitude.shape == (len(batch.half),)
    size = image.square().sum(-1).mean(0).sqrt() / batch.ctf.square().mean(0).sqrt()
    ratio = (size / amplitude)[: batch.half.count(7)]
    assert 0.5 < float(ratio.log().mean().exp()) < 2
    assert 3 <= model.volume.kmax <= BOX / 2


def test_the_band_limit_is_where_the_signal_falls_below_a_level() -> None:
    curve = torch.tensor([9.0, 9.0, 9.0, 8.0, 5.0, 2.5, 1.5, 3.0, 0.1])
    assert band_limit(curve, 2.0) == 5.0
    assert band_limit(torch.full((9,), 9.0), 2.0) == 8.0
    assert band_limit(torch.zeros(17), 2.0) == 4.0


def test_images_are_slices_of_the_maps(particles: Particles) -> None:
    """ctf . shift . slice of map(z), where nothing is masked, equals the story's mean at every frequency."""
    model = prepared(particles)
    model.mask.fill_(1.0)
    z, half = torch.randn(2, 2), particles.half
    batch = particles.batch(slice(0, 2))
    with torch.no_grad():
        axes = torch.stack([torch.eye(3), torch.eye(3)[[1, 2, 0]]])
        batch = Batch(**{**vars(batch), "rotation": axes})
        mean = model.signal(model.density(), z, *model.pose(batch), batch)
        maps = model.map(z)
        consensus = model.consensus(slice_coordinates(axes, half.k))
    moved = maps - model.consensus.voxels
    projections = image_to_half_plane(torch.stack([moved[0].sum(0), moved[1].sum(2)]), half) + consensus
    phase = shift_phase(half.k, batch.translation, BOX) * batch.ctf
    expected = torch.view_as_real(torch.view_as_complex(projections) * phase)
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-4 * float(mean.abs().max()))


def test_beyond_the_band_limit_images_are_the_consensus_alone(particles: Particles) -> None:
    model = prepared(particles, kmax=5)
    batch = particles.batch(slice(0, 4))
    with torch.no_grad():
        near, far = (model.signal(model.density(), z, *model.pose(batch), batch) for z in torch.randn(2, 4, 2))
        still, _ = model.expected(batch)
    count = batch.half.count(5)
    torch.testing.assert_close(near[:, count:], still[:, count:])
    assert float((near - far)[:, :count].abs().max()) > 0


def test_a_symmetric_family_is_seen_from_all_equivalent_poses(particles: Particles) -> None:
    model = CryoDRGN(BOX, zdim=2, width=16, layers=1, symmetry="C3")
    batch = particles.batch(slice(0, 200))
    rotation, translation = model.pose(batch)
    torch.testing.assert_close(translation, batch.translation)
    element = batch.rotation.mT @ rotation
    distance = (element[:, None] - point_group("C3")).abs().amax((-2, -1))
    assert float(distance.amin(1).max()) < 1e-5
    assert bool((torch.bincount(distance.argmin(1), minlength=3) > 40).all())


def test_the_latent_coordinate_follows_the_motion(particles: Particles, coordinate: Tensor) -> None:
    """A few seconds of descent: the loss falls, and z tells where the arm of the hinge stands."""
    model = prepared(particles)
    guide = model.make_guide()
    elbo = ReparameterisedELBO()(model, guide)
    optimiser = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=2e-3)
    pyro.set_rng_seed(0)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for epoch in range(16):
        model.beta = min(1.0, 0.05 + epoch / 5)
        total = 0.0
        for batch in particles.batches(60, generator=generator):
            optimiser.zero_grad()
            loss = elbo(batch.standing_for(len(particles))) / len(particles)
            loss.backward()
            optimiser.step()
            total += float(loss.detach())
        losses.append(total)
    assert losses[-1] < losses[6]
    with torch.no_grad():
        loc, sd = guide.moments(particles.batch(slice(0, len(particles))))
    design = torch.cat([loc, loc.square(), torch.ones(len(loc), 1)], 1)
    fitted = design @ torch.linalg.lstsq(design, coordinate[:, None]).solution
    r2 = 1 - float((fitted[:, 0] - coordinate).square().sum() / (coordinate - coordinate.mean()).square().sum())
    print(f"R2 of the hinge's coordinate on z: {r2:.3f}; posterior sd of z {sd.mean(0).tolist()}")
    assert r2 > 0.7
    assert float(loc.std(0).max()) > 2 * float(sd.mean(0).min())  # z has not collapsed onto its prior
