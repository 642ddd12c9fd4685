"""The recipe for one map: its posterior is the story's, its options do what they say."""

from pathlib import Path

import pyro
import pytest
import torch
from images import hinge_images
from pyro import poutine
from pyro.infer import Trace_ELBO

from pyro_cryo.analysis.fsc import fsc
from pyro_cryo.data.mrc_map import write_map
from pyro_cryo.data.particles import Particles
from pyro_cryo.models.homogeneous import Homogeneous
from pyro_cryo.physics.fourier import radius

BOX = 24


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> Particles:
    return hinge_images(tmp_path_factory.mktemp("case"), 1, 400, BOX, 0.2, fill=0.6)


@pytest.fixture(scope="module")
def model(particles: Particles) -> Homogeneous:
    model = Homogeneous(BOX)
    model.prepare(particles)
    return model


def test_prepare_leaves_the_solved_map(model: Homogeneous) -> None:
    found = model.reconstruction
    assert found is not None
    torch.testing.assert_close(model.map(), found.volume)
    torch.testing.assert_close(model.scale * model.u, found.volume, rtol=0, atol=1e-4 * float(found.volume.max()))
    torch.testing.assert_close(model.sigma, found.sigma)
    assert model.epochs == 0


def test_the_story_at_the_posterior_mean_makes_the_images(model: Homogeneous, particles: Particles) -> None:
    batch = particles.batch(slice(0, 50))
    trace = poutine.trace(poutine.condition(model, {"volume": model.u})).get_trace(batch)
    mean = trace.nodes["image"]["fn"].base_dist.loc
    sigma = model.sigma.detach()[0][batch.half.shell][:, None]
    assert float(((batch.image - mean) / sigma).square().mean()) == pytest.approx(1.0, abs=0.03)
    assert float((batch.image / sigma).square().mean()) > 1.1


def test_the_elbo_is_highest_at_the_posterior(model: Homogeneous, particles: Particles) -> None:
    """In the map's size, its place and the width of the guide."""
    batch, guide = particles.batch(slice(0, 400)), model.make_guide()

    def elbo() -> float:
        pyro.set_rng_seed(0)
        with torch.no_grad():
            return -float(Trace_ELBO(num_particles=4)(model, guide)(batch))

    best, u, sd = elbo(), model.u.clone(), model.u_sd.clone()
    others = {}
    for name, change in (("larger", 1.2 * u), ("smaller", 0.8 * u), ("moved", u.roll(1, 0)), ("flipped", u.flip(0))):
        model.u.copy_(change)
        others[name] = elbo()
    model.u.copy_(u)
    for name, factor in (("narrow", 0.2), ("wide", 3.0)):
        model.u_sd.copy_(factor * sd)
        others[name] = elbo()
    model.u_sd.copy_(sd)
    print(f"ELBO {best:.0f}; below it:", {name: round(best - value) for name, value in others.items()})
    assert all(best > value for value in others.values())


def test_the_recipe_samples_maps_of_its_prior(model: Homogeneous, particles: Particles) -> None:
    pyro.set_rng_seed(0)
    trace = poutine.trace(model).get_trace(particles.batch(slice(0, 3)))
    assert trace.nodes["volume"]["value"].shape == (BOX, BOX, BOX)
    assert trace.nodes["image"]["value"].shape == (3, len(particles.half), 2)
    site = poutine.trace(model.make_guide()).get_trace(particles.batch(slice(0, 3))).nodes["volume"]
    assert float((site["value"] - model.u).std()) < 0.8 * float(model.u.std())


def test_masks_are_found_left_out_or_read(model: Homogeneous, particles: Particles, tmp_path: Path) -> None:
    none = Homogeneous(BOX, mask="none")
    none.prepare(particles)
    assert bool((none.scale == 1).all())
    ball = (radius(BOX, 3) < 9).float()
    write_map(tmp_path / "ball.mrc", ball, particles.apix)
    given = Homogeneous(BOX, mask=str(tmp_path / "ball.mrc"))
    given.prepare(particles)
    assert float(given.map()[ball == 0].abs().max()) == 0
    assert float(fsc(given.map(), model.map())[1:6].min()) > 0.9


def test_symmetry_is_applied(particles: Particles) -> None:
    model = Homogeneous(BOX, symmetry="C2")
    model.prepare(particles)
    inner = model.map()[:, 1:, 1:]
    torch.testing.assert_close(inner.rot90(2, (1, 2)), inner, rtol=0, atol=0.02 * float(inner.max()))
    with pytest.raises(ValueError, match="symmetry 'Q' is not a point group"):
        Homogeneous(BOX, symmetry="Q")
