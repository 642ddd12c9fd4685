"""A population of points: its probabilities, its moments, its enumeration."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate

from pyro_cryo.distributions import Atoms

POINTS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
LOG_WEIGHT = torch.tensor([0.5, 0.3, 0.2]).log() + 3.0  # any constant


def test_probabilities_are_those_of_the_points() -> None:
    atoms = Atoms(POINTS, LOG_WEIGHT)
    torch.testing.assert_close(atoms.log_prob(POINTS).exp(), torch.tensor([0.5, 0.3, 0.2]))
    assert float(atoms.log_prob(torch.tensor([0.5, 0.5]))) == -torch.inf
    torch.testing.assert_close(atoms.enumerate_support().squeeze(), POINTS)


def test_samples_have_the_moments() -> None:
    pyro.set_rng_seed(0)
    atoms = Atoms(POINTS, LOG_WEIGHT).expand([4])
    drawn = atoms.sample((20_000,))
    assert drawn.shape == (20_000, 4, 2)
    torch.testing.assert_close(drawn[:, 1].mean(0), atoms.mean[1], rtol=0, atol=0.02)
    torch.testing.assert_close(torch.cov(drawn[:, 2].T), atoms.covariance[2], rtol=0, atol=0.03)


def test_a_batch_has_weights_of_its_own() -> None:
    rows = torch.stack([LOG_WEIGHT, LOG_WEIGHT.flip(0)])
    atoms = Atoms(POINTS, rows)
    torch.testing.assert_close(atoms.log_prob(POINTS[:2]).exp(), torch.tensor([0.5, 0.3]))


def test_pyro_enumerates_it() -> None:
    """The evidence of a mixture over points is the sum over them."""
    seen = torch.tensor([0.3, 1.1])

    @config_enumerate
    def model() -> None:
        with pyro.plate("two", 2, dim=-1):
            z = pyro.sample("z", Atoms(POINTS, LOG_WEIGHT))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=seen)

    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda: None)
    each = LOG_WEIGHT.softmax(0).log() + dist.Normal(POINTS.sum(-1), 1.0).log_prob(seen[:, None])
    assert abs(loss + float(each.logsumexp(1).sum())) < 1e-5
