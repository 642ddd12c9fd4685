"""A network that begins at the solved linear subspace."""

import pytest
import torch
from images import hinge_images

from pyro_cryo.data.particles import Particles
from pyro_cryo.inference.elbo import ReparameterisedELBO
from pyro_cryo.inference.fit import fit
from pyro_cryo.models.linear_subspace import LinearSubspace
from pyro_cryo.models.warm_cryodrgn import WarmCryoDRGN

BOX = 24


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> Particles:
    return hinge_images(tmp_path_factory.mktemp("case"), 9, 600, BOX, 1.0)


@pytest.fixture(scope="module")
def prepared(particles: Particles) -> WarmCryoDRGN:
    torch.manual_seed(0)
    model = WarmCryoDRGN(BOX, 2, width=16, layers=1)
    model.prepare(particles)
    return model


def test_it_begins_at_the_linear_family(particles: Particles, prepared: WarmCryoDRGN) -> None:
    linear = fit(LinearSubspace(BOX, 2, contrast=0.0), particles)
    guide, z = prepared.make_guide(), linear.encode(particles[:20])
    mean, covariance = guide.posterior(particles.batch(slice(20)))  # type: ignore[operator]
    torch.testing.assert_close(mean, torch.from_numpy(z.z), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(covariance, torch.from_numpy(z.z_cov), rtol=1e-2, atol=1e-2)
    inside = prepared.mask > 0.999
    torch.testing.assert_close(
        prepared.map(mean[0])[inside], linear.volume(mean[0])[inside], rtol=1e-3, atol=1e-3 * float(prepared.mask.max())
    )


def test_a_descent_from_there_explains_more(particles: Particles) -> None:
    """A swing seen by one component alone bends more than the component can say."""
    batch = particles.batch(slice(None))

    def loss(model: WarmCryoDRGN, guide: torch.nn.Module) -> float:
        torch.manual_seed(1)
        with torch.no_grad():
            return float(sum(ReparameterisedELBO()(model, guide)(batch) for _ in range(8))) / 8 / len(batch)

    def build() -> WarmCryoDRGN:
        torch.manual_seed(0)
        return WarmCryoDRGN(BOX, 1, width=48, layers=2)

    begun = build()
    begun.prepare(particles)
    run = fit(build(), particles, epochs=8)
    assert isinstance(run.model, WarmCryoDRGN)
    assert run.guide is not None
    assert loss(run.model, run.guide) < loss(begun, begun.make_guide()) - 0.5
