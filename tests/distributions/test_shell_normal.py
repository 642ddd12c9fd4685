"""The shell prior is the Gaussian it says it is: against a dense covariance, and by its samples."""

import itertools
import math

import pyro
import pytest
import torch
from torch import Tensor

from pyro_cryo.distributions import ShellNormal
from pyro_cryo.distributions.volume import filter_shells, shell_values
from pyro_cryo.volumes.conjugate import shell_power


def dense_covariance(tau: Tensor) -> Tensor:
    """C(r - r') = sum_k tau(|k|)^2 cos(2 pi k.(r - r') / D) / D^3, tau linear between shells: (D^3, D^3)."""
    last = len(tau) - 1
    box = 2 * last
    r = torch.tensor(list(itertools.product(range(box), repeat=3)), dtype=torch.float64)
    k = torch.where(r > box / 2, r - box, r)
    length = k.norm(dim=-1).clamp(max=last)
    low = length.floor().clamp(max=last - 1).long()
    height = tau[low] + (tau[low + 1] - tau[low]) * (length - low)
    phase = torch.exp(2j * math.pi / box * (r @ k.T))
    return ((phase * height.square()) @ phase.conj().T).real / box**3


def test_log_prob_is_the_density_of_the_dense_gaussian() -> None:
    tau = torch.tensor([1.3, 0.8, 0.4], dtype=torch.float64)
    loc = torch.randn(4, 4, 4, dtype=torch.float64)
    value = loc + torch.randn(5, 4, 4, 4, dtype=torch.float64)
    dense = torch.distributions.MultivariateNormal(loc.flatten(), dense_covariance(tau))
    torch.testing.assert_close(ShellNormal(tau, loc).log_prob(value), dense.log_prob(value.flatten(1)))
    torch.testing.assert_close(ShellNormal(tau).log_prob(value), ShellNormal(tau, 0 * loc).log_prob(value))


def test_white_maps_are_independent_voxels() -> None:
    value = torch.randn(8, 8, 8, dtype=torch.float64)
    found = ShellNormal(torch.full((5,), 2.0, dtype=torch.float64)).log_prob(value)
    torch.testing.assert_close(found, torch.distributions.Normal(0.0, 2.0).log_prob(value).sum())


def test_samples_have_the_dense_covariance() -> None:
    pyro.set_rng_seed(0)
    tau, loc = torch.tensor([1.5, 1.0, 0.5]), torch.linspace(-1, 1, 64).view(4, 4, 4)
    draws = ShellNormal(tau, loc).sample((20_000,)).flatten(1)
    torch.testing.assert_close(draws.mean(0), loc.flatten(), rtol=0, atol=0.04)
    torch.testing.assert_close(torch.cov(draws.T), dense_covariance(tau.double()).float(), rtol=0, atol=0.05)


def test_samples_have_the_power_of_each_shell() -> None:
    pyro.set_rng_seed(1)
    tau = torch.linspace(2, 0.5, 9)
    power = shell_power(ShellNormal(tau).sample((60,)), 9)
    # within a shell tau is linear in |k|, so that its mean square is that of the shell's radius to second order
    torch.testing.assert_close(power[1:-1].sqrt(), tau[1:-1], rtol=0.04, atol=0)


def test_samples_are_differentiable_in_tau_and_loc() -> None:
    def draw(tau: Tensor, loc: Tensor) -> Tensor:
        torch.manual_seed(2)
        return ShellNormal(tau, loc).rsample()

    tau = torch.tensor([1.3, 0.8, 0.4], dtype=torch.float64, requires_grad=True)
    loc = torch.zeros(4, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(draw, (tau, loc))
    assert torch.autograd.gradcheck(lambda t, x: ShellNormal(t, x).log_prob(torch.ones(4, 4, 4)), (tau, loc))


def test_it_is_a_site_outside_every_plate() -> None:
    prior = ShellNormal(torch.ones(3))
    assert pyro.sample("volume", prior).shape == (4, 4, 4)
    assert prior.expand(()) is prior
    with pytest.raises(ValueError, match="batch shape"):
        prior.expand((3,))
    with pytest.raises(ValueError, match="tau"):
        ShellNormal(torch.tensor([1.0, -1.0, 1.0]), validate_args=True)


def test_a_shell_filter_multiplies_waves_by_their_shell() -> None:
    z, y, x = torch.meshgrid(*[torch.arange(16, dtype=torch.float64)] * 3, indexing="ij")
    table = torch.linspace(3, 1, 9, dtype=torch.float64)
    wave = torch.cos(2 * math.pi / 16 * (3 * x - 4 * y + 0 * z))
    torch.testing.assert_close(filter_shells(wave, table), table[5] * wave)
    # a smaller cube has its frequencies farther apart: |k| = 2 of 8 voxels is |k| = 4 of 16
    assert shell_values(table, 8)[0, 0, 2] == pytest.approx(float(table[4]))
    assert shell_values(table, 8)[0, 0, 4] == pytest.approx(float(table[8]))
