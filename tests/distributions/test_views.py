"""Values that images have on their own, counted by particle."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate

from pyro_cryo.distributions import Views

PARTICLE = torch.tensor([0, 0, 1, 2, 2, 2])


def test_the_density_of_a_particle_is_the_product_of_its_images() -> None:
    base = dist.Normal(torch.randn(4, 6, 5), 1.5).to_event(1)
    value = torch.randn(6, 5)
    found = Views(base, PARTICLE, 3).log_prob(value)
    each = base.log_prob(value)
    torch.testing.assert_close(found, torch.stack([each[:, :2].sum(1), each[:, 2], each[:, 3:].sum(1)], 1))


def test_draws_and_moments_are_those_of_the_images() -> None:
    base = dist.LogNormal(torch.linspace(-1, 1, 6), 0.3)
    views = Views(base, PARTICLE, 3)
    assert views.batch_shape == (3,)
    torch.manual_seed(0)
    drawn = views.rsample((20_000,))
    assert drawn.shape == (20_000, 6)
    torch.testing.assert_close(drawn.mean(0), views.mean, rtol=0.02, atol=0)
    torch.testing.assert_close(drawn.var(0), views.variance, rtol=0.1, atol=0)


def test_in_a_plate_of_another_size_it_is_refused() -> None:
    views = Views(dist.Normal(torch.zeros(6), 1.0), PARTICLE, 3)
    assert views.expand((2, 3)).sample().shape == (2, 6)
    with pytest.raises(ValueError, match=r"plate of 6 for images of 3 particles; make it batch\.particles"):
        views.expand((6,))


def test_an_enumerated_choice_is_one_for_all_images_of_a_particle() -> None:
    """log p of a particle is that of a mixture of products, not of a product of mixtures."""
    centre, value = torch.tensor([-1.0, 1.0]), torch.tensor([0.3, 0.8, -0.1, 0.9, -1.2, 0.4])

    @config_enumerate
    def model() -> None:
        with pyro.plate("particles", 3, dim=-1):
            state = pyro.sample("state", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
            mean = centre[state]
            mean = mean.expand(*mean.shape[:-1], 3)[..., PARTICLE]
            pyro.sample("image", Views(dist.Normal(mean, 1.0), PARTICLE, 3), obs=value)

    found = -TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda: None)
    total = 0.0
    for i in range(3):
        mine = value[i == PARTICLE]
        log_p = torch.stack([dist.Normal(c, 1.0).log_prob(mine).sum() for c in centre])
        total += float((log_p + torch.tensor([math.log(0.3), math.log(0.7)])).logsumexp(0))
    assert found == pytest.approx(total, abs=1e-4)
