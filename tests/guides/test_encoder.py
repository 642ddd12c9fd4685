"""The encoder sees a motion from the molecule's own frame, and what it guesses can be learned."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from images import seen_together
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.guides.encoder import ImageEncoder
from pyro_cryo.inference.elbo import ReparameterisedELBO
from pyro_cryo.model import form_image
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.physics.fourier import HalfPlane, radius
from pyro_cryo.physics.rotations import exp, random_rotations
from pyro_cryo.physics.slices import slice_coordinates
from pyro_cryo.volumes.grid import VoxelGrid

BOX = 24


def smooth_map(seed: int) -> Tensor:
    """A random map of low resolution inside 60% of the box."""
    noise = torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(seed))
    spectrum = torch.fft.rfftn(noise)
    k = torch.fft.fftfreq(BOX, 1 / BOX)
    square = k[:, None, None] ** 2 + k[:, None] ** 2 + k[: BOX // 2 + 1] ** 2
    return torch.fft.irfftn(spectrum * torch.exp(-square / 18)) * (radius(BOX, 3) < 0.3 * BOX)


@pytest.fixture
def model() -> CryoDRGN:
    torch.manual_seed(0)
    model = CryoDRGN(BOX, zdim=2, width=24, layers=1, noise_groups=2)
    model.consensus.set(smooth_map(0))
    model.log_sigma.data.fill_(-2.0)
    return model


def images(model: CryoDRGN, motion: Tensor, rotation: Tensor, translation: Tensor) -> Batch:
    """Noise-free images of the consensus plus a motion (D, D, D), seen without a CTF."""
    half, count = HalfPlane.of(BOX), len(rotation)
    volume = VoxelGrid(BOX)
    volume.set(model.consensus.voxels + motion)
    batch = Batch(
        half=half,
        index=torch.arange(count),
        image=torch.zeros(count, len(half), 2),
        ctf=torch.ones(count, len(half)),
        noise_scale=None,
        rotation=rotation,
        translation=translation,
        noise_group=torch.zeros(count, dtype=torch.long),
        freq_scale=torch.ones(count),
        particle=torch.arange(count),
        shown=torch.arange(count),
        size=count,
    )
    seen = form_image(volume(slice_coordinates(rotation, half.k)), translation, batch)
    return Batch(**{**vars(batch), "image": seen})


def in_plane(degrees: list[float]) -> Tensor:
    return exp(torch.tensor([[0.0, 0.0, math.radians(d)] for d in degrees]))


def test_a_turn_of_the_camera_leaves_the_features_alone(model: CryoDRGN) -> None:
    encoder, motion = model.make_guide(), smooth_map(1)
    view = random_rotations(1, torch.Generator().manual_seed(2))
    rotation = in_plane([0, 90, 180, 270, 37, 120]) @ view
    features = encoder.features(images(model, motion, rotation, torch.zeros(6, 2)))
    size = float(features[0].norm())
    assert size > 1
    torch.testing.assert_close(features[1:4], features[:1].expand(3, -1), rtol=0, atol=1e-3 * size)
    difference = (features[4:] - features[:1]).norm(dim=1) / size
    print("relative change of the features at 37 and 120 degrees:", difference.tolist())
    assert float(difference.max()) < 0.3  # other points of the plane fall on the grid: alike, not equal


def test_shifts_leave_the_features_alone(model: CryoDRGN) -> None:
    encoder, view = model.make_guide(), random_rotations(1, torch.Generator().manual_seed(2)).expand(2, 3, 3)
    moved = torch.tensor([[0.0, 0.0], [2.3, -1.7]])
    features = encoder.features(images(model, smooth_map(1), view, moved))
    torch.testing.assert_close(features[1], features[0], rtol=0, atol=1e-4 * float(features[0].norm()))


def test_features_show_the_motion_and_nothing_of_the_consensus(model: CryoDRGN) -> None:
    encoder, rotation = model.make_guide(), random_rotations(40, torch.Generator().manual_seed(3))
    still = encoder.features(images(model, torch.zeros(BOX, BOX, BOX), rotation, torch.zeros(40, 2)))
    first = encoder.features(images(model, smooth_map(1), rotation, torch.zeros(40, 2)))
    opposite = encoder.features(images(model, -smooth_map(1), rotation, torch.zeros(40, 2)))
    other = encoder.features(images(model, smooth_map(4), rotation, torch.zeros(40, 2)))
    assert float(still.norm()) < 1e-3 * float(first.norm())
    assert float((opposite + first).norm()) < 1e-3 * float(first.norm())
    # from whichever side: each view resembles the sum of the others more for its own motion than for another's
    cosine = torch.nn.functional.cosine_similarity
    own, wrong = cosine(first, first.sum(0) - first), cosine(first, other.sum(0, keepdim=True))
    assert float((own > wrong).float().mean()) > 0.9


def test_features_follow_the_noise_of_the_images_group(model: CryoDRGN) -> None:
    """At a high signal-to-noise ratio features go with 1 / sigma, at a low one with 1 / sigma^2."""
    encoder, rotation = model.make_guide(), random_rotations(2, torch.Generator().manual_seed(3))
    batch = images(model, smooth_map(1), rotation[:1].expand(2, 3, 3), torch.zeros(2, 2))
    batch = Batch(**{**vars(batch), "noise_group": torch.tensor([0, 1])})
    for sigma, power in ((1e-3, 1), (1e3, 2)):
        model.log_sigma.data[0].fill_(math.log(sigma))
        model.log_sigma.data[1].fill_(math.log(2 * sigma))
        quiet, loud = encoder.features(batch)
        torch.testing.assert_close(quiet, 2**power * loud, rtol=1e-3, atol=1e-4 * float(quiet.abs().max()))


def test_images_of_a_particle_are_added_in_its_frame(model: CryoDRGN) -> None:
    encoder, rotation = model.make_guide(), random_rotations(6, torch.Generator().manual_seed(3))
    batch = images(model, smooth_map(1), rotation, torch.zeros(6, 2))
    each = encoder.features(batch)
    found = encoder.features(seen_together(batch, [0, 0, 1, 2, 2, 2]))
    expected = torch.stack([each[:2].sum(0) / 2**0.5, each[2], each[3:].sum(0) / 3**0.5])
    torch.testing.assert_close(found, expected)
    turned = encoder.features(seen_together(batch[torch.tensor([1, 0, 2, 5, 3, 4])], [0, 0, 1, 2, 2, 2]))
    torch.testing.assert_close(turned, found, rtol=1e-4, atol=1e-4 * float(found.abs().max()))


def test_what_an_encoder_of_images_says_of_each_is_multiplied(model: CryoDRGN) -> None:
    torch.manual_seed(1)
    encoder = ImageEncoder(model, reach=6, width=16, layers=1)
    batch = images(model, smooth_map(1), random_rotations(3), torch.zeros(3, 2))
    with torch.no_grad():
        loc, sd = encoder.moments(batch)
        found, its_sd = encoder.moments(seen_together(batch, [0, 0, 1]))
    z = torch.linspace(-30, 30, 200_001).double()
    for axis in range(2):
        log_q = sum(dist.Normal(loc[i, axis].double(), sd[i, axis].double()).log_prob(z) for i in range(2))
        weight = torch.as_tensor(log_q).softmax(0)
        mean = float((weight * z).sum())
        assert float(found[0, axis]) == pytest.approx(mean, abs=1e-4)
        assert float(its_sd[0, axis]) == pytest.approx(float((weight * (z - mean) ** 2).sum().sqrt()), rel=1e-3)
    torch.testing.assert_close(found[1], loc[2])


def test_an_elbo_of_pairs_counts_z_once_and_every_image(model: CryoDRGN) -> None:
    guide = model.make_guide()
    batch = images(model, smooth_map(1), random_rotations(6), torch.zeros(6, 2))
    batch = seen_together(batch, [0, 0, 1, 2, 2, 2])
    loc, sd = guide.moments(batch)
    q = dist.Normal(loc, sd)
    pyro.set_rng_seed(5)
    z = q.rsample()
    mean = model.signal(model.density(), z[batch.particle], batch.rotation, batch.translation, batch)
    sigma = model.sigma[0][batch.half.shell][:, None]
    log_p = dist.Normal(mean, sigma).log_prob(batch.image).sum() + dist.Normal(0.0, 1.0).log_prob(z).sum()
    expected = q.log_prob(z).sum() - log_p
    for elbo in (Trace_ELBO(), ReparameterisedELBO()):
        pyro.set_rng_seed(5)
        torch.testing.assert_close(elbo(model, guide)(batch), expected)
        pyro.set_rng_seed(5)
        torch.testing.assert_close(elbo(model, guide)(batch.standing_for(30)), 10 * expected)


def test_gradients_reach_every_parameter_of_model_and_guide(model: CryoDRGN) -> None:
    guide = model.make_guide()
    batch = images(model, smooth_map(1), random_rotations(6), torch.randn(6, 2))
    batch = Batch(**{**vars(batch), "noise_group": torch.arange(6) % 2})
    Trace_ELBO()(model, guide)(batch).backward()
    named = [*model.named_parameters(), *guide.named_parameters()]
    assert len(named) >= 14
    for name, parameter in named:
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
        assert float(parameter.grad.abs().max()) > 0, name


def test_the_guide_does_not_hold_the_models_parameters(model: CryoDRGN) -> None:
    guide = model.make_guide()
    assert not {id(p) for p in guide.parameters()} & {id(p) for p in model.parameters()}
    assert not any("volume" in name or "consensus" in name for name in guide.state_dict())


def test_moments_are_those_of_what_the_guide_samples(model: CryoDRGN) -> None:
    guide = model.make_guide()
    batch = images(model, smooth_map(1), random_rotations(5), torch.zeros(5, 2))
    site = poutine.trace(guide).get_trace(batch).nodes["z"]
    loc, sd = guide.moments(batch)
    torch.testing.assert_close(site["fn"].base_dist.loc, loc)
    torch.testing.assert_close(site["fn"].base_dist.scale, sd)
    assert site["value"].shape == (5, 2)
    mean, covariance = guide.posterior(batch)
    torch.testing.assert_close(mean, loc)
    torch.testing.assert_close(covariance.diagonal(dim1=1, dim2=2), sd.square())


class Heavy(CryoDRGN):
    """Two states and Student-t noise: what a user writes."""

    def latent(self) -> Tensor:
        states = dist.Categorical(probs=torch.tensor([0.4, 0.6]))
        loc = torch.tensor([[-1.0] * self.zdim, [1.0] * self.zdim])
        return pyro.sample("z", dist.MixtureSameFamily(states, dist.Normal(loc, 0.5).to_event(1)))

    def noise(self, mean: Tensor, sigma: Tensor) -> TorchDistributionMixin:
        return dist.StudentT(4.0, mean, sigma)


def test_a_variant_that_overrides_latent_and_noise_is_fitted() -> None:
    torch.manual_seed(0)
    model = Heavy(BOX, zdim=2, width=24, layers=1)
    model.consensus.set(smooth_map(0))
    guide = model.make_guide()
    batch = images(model, smooth_map(1), random_rotations(12, torch.Generator().manual_seed(1)), torch.zeros(12, 2))
    trace = poutine.trace(model).get_trace(batch)
    trace.compute_log_prob()
    z, image = trace.nodes["z"], trace.nodes["image"]
    sigma = model.sigma[0][batch.half.shell][:, None]
    mean = model.signal(model.volume, z["value"], batch.rotation, batch.translation, batch)
    expected = torch.distributions.StudentT(4.0, mean, sigma).log_prob(batch.image).sum((1, 2))
    torch.testing.assert_close(image["log_prob"], expected)
    components = torch.stack(
        [
            torch.distributions.Normal(m, 0.5).log_prob(z["value"]).sum(-1) + math.log(w)
            for m, w in ((-1, 0.4), (1, 0.6))
        ]
    )
    torch.testing.assert_close(z["log_prob"], components.logsumexp(0))
    elbo = ReparameterisedELBO()(model, guide)
    optimiser = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=3e-3)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = elbo(batch)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) / 5 < losses[0] - 100
