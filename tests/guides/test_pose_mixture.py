"""Poses as sample sites: the enumerated ELBO against brute-force quadrature, on images of a map that is almost C2."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from images import Given, almost_symmetric, blobs, observed
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from quadrature import evidence
from torch import Tensor, nn

from pyro_cryo.data.batch import Batch
from pyro_cryo.guides.coefficients import LinearCoefficients
from pyro_cryo.guides.exact import ExactGuide
from pyro_cryo.guides.landscape import MapLikelihood, climbed
from pyro_cryo.guides.pose_mixture import PosedGuide, PoseGaussians, PoseMixture
from pyro_cryo.guides.poses import PoseModes, PosePrior, moved
from pyro_cryo.inference.elbo import ReparameterisedELBO
from pyro_cryo.inference.pose_matching import with_matched_poses
from pyro_cryo.inference.run import Run, guide_of
from pyro_cryo.model import form_image, noise_of
from pyro_cryo.models.linear_subspace import LinearSubspace
from pyro_cryo.physics.rotations import exp, point_group
from pyro_cryo.physics.slices import slice_coordinates, slope_grid
from pyro_cryo.pose import PoseAbout

BOX, IMAGES, SIGMA, SHIFT_SD = 24, 48, 0.5, 2.0


@pytest.fixture(scope="module")
def volume() -> Tensor:
    return almost_symmetric(BOX, 11, apart=0.08)


@pytest.fixture(scope="module")
def batch(volume: Tensor) -> Batch:
    return observed(volume, IMAGES, SIGMA, torch.where(torch.arange(IMAGES) % 3 == 0, 1.0, 0.9))


@pytest.fixture(scope="module")
def modes(volume: Tensor, batch: Batch) -> PoseModes:
    """Both views of each image that look alike, climbed and matched."""
    sigma, px = torch.full((1, BOX // 2 + 1), SIGMA), batch.freq_scale
    start = PoseModes(
        batch.rotation[:, None] @ point_group("C2"),
        (batch.translation / px[:, None])[:, None].repeat(1, 2, 1),
        torch.eye(5).expand(IMAGES, 2, 5, 5),
        torch.zeros(IMAGES, 2),
    )
    prior = PosePrior(torch.eye(3).expand(IMAGES, 3, 3), torch.zeros(IMAGES, 2), math.inf, SHIFT_SD)
    found, _ = climbed(batch, MapLikelihood(slope_grid(volume), sigma), start, prior, px, steps=10)
    model = Given(volume, SIGMA, SHIFT_SD)
    pyro.set_rng_seed(0)
    run: Any = Run(model, Path, guide=guide_of(model, found), poses=found)
    return with_matched_poses(run, batch).guide.poses.modes


def elbo(model: nn.Module, guide: nn.Module, batch: Batch, copies: int) -> Tensor:
    """The enumerated ELBO of each image less log p of an empty one, over copies of the image: (B,)."""
    pyro.set_rng_seed(0)
    bound, values = TraceEnum_ELBO(max_plate_nesting=1), []
    with torch.no_grad():
        for image in range(len(batch)):
            one = batch[torch.full((copies,), image)]
            values.append(-bound.loss(model, guide, one) / copies)
    empty = -0.5 * (batch.image / SIGMA).square() - math.log(SIGMA) - 0.5 * math.log(2 * math.pi)
    return torch.tensor(values) - empty.sum((1, 2))


def test_the_enumerated_elbo_is_the_evidence_within_a_twentieth_of_a_nat(
    volume: Tensor, batch: Batch, modes: PoseModes
) -> None:
    log_evidence, share = evidence(batch, volume, SIGMA, modes, SHIFT_SD, level=5)
    weight = modes.log_weight.exp()
    assert int((weight.amin(1) > 0.05).sum()) >= 12  # images that are seen from two sides
    gap = log_evidence - elbo(Given(volume, SIGMA, SHIFT_SD), PoseMixture(modes), batch, copies=200)
    assert 0 < float(gap.mean()) < 0.03
    assert float(gap.min()) > -0.04  # three standard errors of 200 draws
    assert float((gap < 0.05).float().mean()) > 0.85  # peaks of a few images are less like a Gaussian
    assert float(gap.max()) < 0.08 + 0.04
    assert float((weight - share).abs().max()) < 0.02


def test_components_that_coincide_count_once(volume: Tensor, batch: Batch, modes: PoseModes) -> None:
    """Without the factor an ELBO of two components at one place is too high by log 2."""
    heaviest = PoseModes(*(value[:, :1] for value in modes.tensors))
    one = replace(heaviest, log_weight=torch.zeros(IMAGES, 1))
    two = PoseModes(*(value.repeat(1, 2, *[1] * (value.dim() - 2)) for value in one.tensors))
    model, few = Given(volume, SIGMA, SHIFT_SD), batch[torch.arange(8)]
    alone = elbo(model, PoseMixture(one), few, copies=200).mean()
    with_factor = elbo(model, PoseMixture(two), few, copies=200).mean()
    without = elbo(model, poutine.block(PoseMixture(two), hide=["overlap"]), few, copies=200).mean()
    assert abs(float(with_factor - alone)) < 0.04
    assert abs(float(without - alone) - math.log(2)) < 0.04


def test_one_component_is_a_gaussian_of_turn_and_shift(batch: Batch, modes: PoseModes) -> None:
    """Its density is that of 5 dimensions, on the measure of Haar: 8 pi^2 t^2 / (2 - 2 cos t) times that of dv."""
    gaussians = PoseGaussians.about(modes, torch.ones(IMAGES))
    away = torch.einsum("nkij,nkj->nki", gaussians.factor, torch.randn(IMAGES, 2, 5))
    log_density = gaussians.log_prob(*moved(modes.rotation, modes.translation, away))
    normal = torch.distributions.MultivariateNormal(torch.zeros(5), modes.precision.double().inverse())
    t = away[..., :3].double().norm(dim=-1)
    haar = (8 * math.pi**2 * t.square() / (2 - 2 * t.cos())).log()
    torch.testing.assert_close(log_density.double(), normal.log_prob(away.double()) + haar, atol=2e-2, rtol=0)


def test_a_shift_has_the_pixels_of_the_image(batch: Batch, modes: PoseModes) -> None:
    own, own_px = PoseGaussians.about(modes, torch.ones(IMAGES)), PoseGaussians.about(modes, batch.freq_scale)
    shift = modes.translation + 0.1
    there = shift * batch.freq_scale[:, None, None]
    jacobian = 2 * batch.freq_scale.log()[:, None]
    expected = own.log_prob(modes.rotation, shift) - jacobian
    torch.testing.assert_close(own_px.log_prob(modes.rotation, there), expected, atol=1e-3, rtol=1e-4)


def test_a_drawn_cell_has_the_same_elbo(volume: Tensor, batch: Batch, modes: PoseModes) -> None:
    """Whatever sums over the cells or draws one; and gradients reach the map, not the table."""
    model, few = Given(volume, SIGMA, SHIFT_SD), batch[torch.arange(8)]
    empty = -0.5 * (few.image / SIGMA).square() - math.log(SIGMA) - 0.5 * math.log(2 * math.pi)
    enumerated = elbo(model, PoseMixture(modes), few, copies=200).mean()
    many = few[torch.arange(8).repeat(200)]
    loss = ReparameterisedELBO()(model, PoseMixture(modes, enumerated=False))(many) / 200
    loss.backward()
    assert abs(float(-loss.detach() - empty.sum()) / 8 - float(enumerated)) < 0.05
    assert float(model.log_sigma.grad.abs().sum()) > 0  # type: ignore[union-attr]
    assert not list(PoseMixture(modes).parameters())


def test_z_is_guessed_at_the_pose_that_was_drawn() -> None:
    """With the exact posterior of z the ELBO is E_q log p(image, pose) / q(pose), z integrated out, at every draw."""
    mean = blobs(BOX, 11)
    motion = 0.5 * (mean.roll(1, 0) - mean.roll(-1, 0))
    model = LinearSubspace(BOX, zdim=1, contrast=0.0)
    model.consensus.set(mean)
    model.volume.set(torch.stack([mean, motion]))
    model.coefficients = LinearCoefficients(0.0)
    model.log_sigma.data.fill_(math.log(SIGMA))
    model.poses = PoseAbout(turn_sd_deg=3.0, shift_sd_px=0.5)
    few = observed(mean + 0.7 * motion, 12, SIGMA, torch.ones(12))
    start = PoseModes(
        few.rotation[:, None], few.translation[:, None], torch.eye(5).expand(12, 1, 5, 5), torch.zeros(12, 1)
    )
    prior = PosePrior(few.rotation, few.translation, math.radians(3.0), 0.5)
    found, _ = climbed(few, MapLikelihood(slope_grid(mean), model.sigma.detach()), start, prior, few.freq_scale)
    guide = PosedGuide(
        PoseMixture(found, enumerated=False), ExactGuide(model, model.volume, model.coefficients), draws=50
    )
    pyro.set_rng_seed(1)
    ratios = []
    with torch.no_grad():
        for _ in range(60):
            drawn = poutine.trace(guide).get_trace(few)
            told = poutine.trace(poutine.replay(model, drawn)).get_trace(few)
            rotation, translation = (drawn.nodes[name]["value"] for name in ("rotation", "translation"))
            ratio = _total(told, few) - _total(drawn, few)
            collapsed = _collapsed(model, few, rotation, translation) + prior.log_prob(rotation, translation)
            q = PoseGaussians.about(found, few.freq_scale).log_prob(rotation[:, None], translation[:, None])[:, 0]
            torch.testing.assert_close(ratio, collapsed - q, atol=0.05, rtol=0)
            ratios.append(ratio)
        _, covariance = guide.posterior(few)
        known = ExactGuide(model, model.volume, model.coefficients).posterior(few)[1]
    drawn_ratios = torch.stack(ratios)
    log_evidence = drawn_ratios.logsumexp(0) - math.log(60)
    assert bool((drawn_ratios.mean(0) <= log_evidence).all())
    assert float((log_evidence - drawn_ratios.mean(0)).mean()) < 1.0
    assert float((covariance / known).mean()) > 1.02  # a pose that is not known makes z less certain


def test_a_guide_of_z_takes_one_pose(modes: PoseModes) -> None:
    with pytest.raises(ValueError, match=r"the poses are enumerated, .* PoseMixture\(enumerated=False\)"):
        PosedGuide(PoseMixture(modes), nn.Module())


def test_modes_that_are_not_there_are_never_drawn(volume: Tensor, batch: Batch, modes: PoseModes) -> None:
    away = exp(torch.tensor([0.0, 1.0, 0.0])) @ modes.rotation[:, :1]
    three = PoseModes(
        torch.cat([modes.rotation, away], 1),
        torch.cat([modes.translation, modes.translation[:, :1]], 1),
        torch.cat([modes.precision, torch.eye(5).expand(IMAGES, 1, 5, 5)], 1),
        torch.cat([modes.log_weight, torch.full((IMAGES, 1), -torch.inf)], 1),
    )
    model, few = Given(volume, SIGMA, SHIFT_SD), batch[torch.arange(4)]
    two = elbo(model, PoseMixture(modes), few, copies=50)
    torch.testing.assert_close(elbo(model, PoseMixture(three), few, copies=50), two, atol=0.3, rtol=0)


def _total(trace: poutine.Trace, batch: Batch) -> Tensor:
    """Log density of all sites, image by image: (B,)."""
    trace.compute_log_prob()
    sites = [site for site in trace.nodes.values() if site["type"] == "sample" and "log_prob" in site]
    return torch.stack([site["log_prob"] for site in sites if site["log_prob"].shape == (len(batch),)]).sum(0)


def _collapsed(model: LinearSubspace, batch: Batch, rotation: Tensor, translation: Tensor) -> Tensor:
    """log Normal(image; m, s^2 + a a^T), m and a the images of the mean and of the motion: (B,)."""
    points = slice_coordinates(rotation, batch.half.k, batch.freq_scale)
    at = [form_image(model.volume(points, torch.tensor([y]).expand(len(batch), 2)), translation, batch) for y in
          ([1.0, 0.0], [0.0, 1.0])]  # fmt: skip
    sd = noise_of(batch, model.sigma)
    residual, slope = ((batch.image - at[0]) / sd).flatten(1), (at[1] / sd).flatten(1)
    one = 1 + slope.square().sum(1)
    normal = -0.5 * residual.square().sum(1) - (2 * sd.log() + math.log(2 * math.pi)).sum((1, 2))
    return normal + 0.5 * (slope * residual).sum(1).square() / one - 0.5 * one.log()
