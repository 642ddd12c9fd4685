"""Images with z integrated out: against a dense Gaussian, against quadrature over z, and against sampling."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from pyro_cryo.data.pixels import window_power
from pyro_cryo.distributions import LowRankFourier, StudentImage
from pyro_cryo.physics.fourier import HalfPlane, image_to_half_plane, soft_disc


def example(rank: int, batch: int = 3, coefficients: int = 11) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loc, factor, sigma and images drawn from them, float64."""
    generator = torch.Generator().manual_seed(rank)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    loc, factor = normal(batch, coefficients, 2), 0.3 * normal(batch, coefficients, 2, rank)
    sigma = 0.5 + normal(batch, coefficients, 1).abs()
    z = normal(batch, rank)
    image = loc + (factor @ z[:, None, :, None])[..., 0] + sigma * normal(batch, coefficients, 2)
    return loc, factor, sigma, image


def by_quadrature(loc: Tensor, factor: Tensor, sigma: Tensor, image: Tensor, nodes: int = 80) -> Tensor:
    """log of the integral over z of p(image | z) p(z) on a Gauss-Hermite grid: (B,)."""
    rank = factor.shape[-1]
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    grid = torch.cartesian_prod(*[torch.as_tensor(x)] * rank).reshape(-1, rank)
    weight = torch.as_tensor(w / math.sqrt(2 * math.pi)).log()
    log_weight = torch.cartesian_prod(*[weight] * rank).reshape(-1, rank).sum(-1)
    mean = loc + torch.einsum("bpcr,nr->nbpc", factor, grid)
    inside = dist.Normal(mean, sigma).log_prob(image).sum((-2, -1))
    return (inside + log_weight[:, None]).logsumexp(0)


@pytest.mark.parametrize("rank", [1, 2])
def test_log_prob_is_the_integral_over_z_and_so_is_its_gradient(rank: int) -> None:
    loc, factor, sigma, image = example(rank)
    factor.requires_grad_()
    closed = LowRankFourier(loc, factor, sigma).log_prob(image)
    brute = by_quadrature(loc, factor, sigma, image)
    torch.testing.assert_close(closed, brute, rtol=1e-5, atol=0)
    (a,) = torch.autograd.grad(closed.sum(), factor)
    (b,) = torch.autograd.grad(brute.sum(), factor)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_log_prob_is_that_of_the_dense_gaussian() -> None:
    loc, factor, sigma, image = example(4)
    flat = factor.flatten(1, 2)
    covariance = flat @ flat.mT + torch.diag_embed(sigma.expand(loc.shape).flatten(1).square())
    dense = dist.MultivariateNormal(loc.flatten(1), covariance).log_prob(image.flatten(1))
    torch.testing.assert_close(LowRankFourier(loc, factor, sigma).log_prob(image), dense)


def test_samples_have_the_covariance() -> None:
    loc, factor, sigma, _ = example(2, batch=1, coefficients=3)
    pyro.set_rng_seed(0)
    drawn = LowRankFourier(loc, factor, sigma).sample((40_000,))[:, 0].flatten(1)
    flat = factor[0].flatten(0, 1)
    expected = flat @ flat.T + torch.diag(sigma[0].expand(3, 2).flatten().square())
    torch.testing.assert_close(torch.cov(drawn.T), expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    torch.testing.assert_close(drawn.mean(0), loc[0].flatten(), rtol=0, atol=0.03)


def test_expanding_repeats() -> None:
    loc, factor, sigma, image = example(2, batch=1)
    wide = LowRankFourier(loc, factor, sigma).expand([5])
    assert wide.batch_shape == (5,)
    assert wide.sample().shape == (5, *image.shape[1:])
    torch.testing.assert_close(
        wide.log_prob(image.expand(5, -1, -1)), LowRankFourier(loc, factor, sigma).log_prob(image).expand(5)
    )


@pytest.mark.slow
def test_the_posterior_of_z_is_what_nuts_finds() -> None:
    loc, factor, sigma, image = example(2, batch=1, coefficients=20)

    def story() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
        pyro.sample("image", dist.Normal(loc[0] + factor[0] @ z, sigma[0]).to_event(2), obs=image[0])

    pyro.set_rng_seed(0)
    chain = MCMC(NUTS(story), num_samples=8000, warmup_steps=300, disable_progbar=True)
    chain.run()
    z = chain.get_samples()["z"]
    mean, covariance = LowRankFourier(loc, factor, sigma).posterior(image)
    effective = float(chain.diagnostics()["z"]["n_eff"].min())
    error = (covariance[0].diagonal() / effective).sqrt()
    assert bool(((z.mean(0) - mean[0]).abs() < 4 * error).all())
    torch.testing.assert_close(torch.cov(z.T), covariance[0], rtol=0, atol=0.05 * float(covariance[0].abs().max()))


def test_a_student_image_is_the_integral_over_its_scale() -> None:
    loc, _, sigma, image = example(1)
    df = torch.tensor([2.0, 5.0, 30.0], dtype=torch.float64)
    u = torch.linspace(1e-4, 12, 40_000, dtype=torch.float64)[:, None]
    inside = dist.Normal(loc, sigma * u[..., None, None].rsqrt()).log_prob(image).sum((-2, -1))
    joint = inside + dist.Gamma(0.5 * df, 0.5 * df).log_prob(u)
    brute = joint.logsumexp(0) + (u[1, 0] - u[0, 0]).log()
    student = StudentImage(df, loc, sigma)
    torch.testing.assert_close(student.log_prob(image), brute, rtol=1e-4, atol=0)
    weight = ((joint - joint.logsumexp(0)).exp() * u).sum(0)
    torch.testing.assert_close(student.weight(image), weight, rtol=1e-3, atol=0)


def test_the_scale_of_a_windowed_image_is_told_by_fewer_numbers() -> None:
    """E[u | weight] is the weight, of noise in real space behind a tight window: nearly, mean(w^2)^2 / mean(w^4) tells.

    Power is told by a tenth more numbers than the mean(w^2) that what is seen in the noise is told by.
    """
    box, window, df = 24, 0.6, torch.tensor(200.0)
    half, disc = HalfPlane.of(box), soft_disc(box, 0.5 * window * box, 0.5 * (1 - window) * box)
    pyro.set_rng_seed(0)
    u = dist.Gamma(0.5 * df, 0.5 * df).sample((4000,))
    noise = torch.randn(len(u), box, box) * u.rsqrt()[:, None, None]
    image, independent = image_to_half_plane(noise * disc, half), window_power(box, window)
    student = StudentImage(df, torch.zeros_like(image), torch.full((len(half), 1), (0.5 * independent) ** 0.5))

    def slope(weight: Tensor) -> float:
        return float(((u - 1) * (weight - weight.mean())).mean() / weight.var())

    assert slope(student.weight(image, independent)) == pytest.approx(1.06, abs=0.08)
    assert slope(student.weight(image)) < 0.85


def test_student_images_are_drawn_with_one_scale_each() -> None:
    pyro.set_rng_seed(0)
    student = StudentImage(torch.tensor(4.0), torch.zeros(500, 2), torch.full((500, 1), 2.0)).expand([3000])
    drawn = student.sample()
    assert drawn.shape == (3000, 500, 2)
    size = drawn.square().mean((1, 2)) / 4  # 1 / u, to within the 1,000 numbers of an image
    torch.testing.assert_close((1 / size).mean(), torch.tensor(1.0), rtol=0, atol=0.05)
    torch.testing.assert_close((1 / size).var(), torch.tensor(0.5), rtol=0, atol=0.08)
