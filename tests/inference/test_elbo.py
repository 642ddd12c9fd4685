"""The ELBO: the lean one equals Pyro's, and a batch stands for the whole data set."""

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyro_cryo.data.batch import Batch
from pyro_cryo.inference.elbo import ReparameterisedELBO
from pyro_cryo.model import CryoModel
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.physics.fourier import HalfPlane
from pyro_cryo.physics.rotations import random_rotations
from pyro_cryo.volumes.grid import VoxelGrid

BOX = 12


def random_batch(count: int = 8) -> Batch:
    half, generator = HalfPlane.of(BOX), torch.Generator().manual_seed(0)
    return Batch(
        half=half,
        index=torch.arange(count),
        image=torch.randn(count, len(half), 2, generator=generator),
        ctf=torch.rand(count, len(half), generator=generator),
        noise_scale=None,
        rotation=random_rotations(count, generator),
        translation=torch.randn(count, 2, generator=generator),
        noise_group=torch.arange(count) % 2,
        freq_scale=torch.ones(count),
        particle=torch.arange(count),
        shown=torch.arange(count),
        size=count,
    )


class MapLikelihood(CryoModel):
    """A map without latent coordinates."""

    def __init__(self, box: int) -> None:
        super().__init__(box, noise_groups=2)
        self.volume = VoxelGrid(box)
        self.volume.set(torch.randn(box, box, box, generator=torch.Generator().manual_seed(1)))
        self.log_sigma.data += 0.1 * torch.arange(box // 2 + 1)


def loss_and_gradients(elbo: Trace_ELBO, model: CryoModel, guide: nn.Module, batch: Batch) -> tuple[Tensor, list]:
    pyro.set_rng_seed(3)
    both = nn.ModuleList([model, guide])
    both.zero_grad()
    loss = elbo(model, guide)(batch)
    loss.backward()
    return loss.detach(), [None if p.grad is None else p.grad.clone() for p in both.parameters()]


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("beta", [1.0, 0.2])
def test_it_equals_pyros_in_value_and_gradients(num_particles: int, beta: float) -> None:
    torch.manual_seed(0)
    model = CryoDRGN(BOX, zdim=2, width=16, layers=1, noise_groups=2)
    guide = model.make_guide()
    model.beta = beta
    batch = random_batch().standing_for(40)
    expected = loss_and_gradients(Trace_ELBO(num_particles=num_particles), model, guide, batch)
    found = loss_and_gradients(ReparameterisedELBO(num_particles=num_particles), model, guide, batch)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    assert len(found[1]) > 10
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_beta_weighs_the_kl_divergence_alone() -> None:
    torch.manual_seed(0)
    model = CryoDRGN(BOX, zdim=2, width=16, layers=1, noise_groups=2)
    guide, batch = model.make_guide(), random_batch()
    losses = []
    for model.beta in (0.2, 0.6, 1.0):
        losses.append(loss_and_gradients(Trace_ELBO(), model, guide, batch)[0])
    torch.testing.assert_close(losses[1], (losses[0] + losses[2]) / 2)
    assert losses[0] != losses[2]


def test_without_latents_the_elbo_is_the_likelihood() -> None:
    model, batch = MapLikelihood(BOX), random_batch()
    sigma = model.sigma[batch.noise_group][:, batch.half.shell, None]
    mean = model.signal(model.volume, None, batch.rotation, batch.translation, batch)
    expected = torch.distributions.Normal(mean, sigma).log_prob(batch.image).sum()
    torch.testing.assert_close(Trace_ELBO()(model, model.make_guide())(batch), -expected)


def test_batches_that_stand_for_all_average_to_the_full_elbo() -> None:
    model, whole = MapLikelihood(BOX), random_batch()
    elbo = Trace_ELBO()(model, model.make_guide())
    parts = [whole[torch.arange(4)].standing_for(8), whole[torch.arange(4, 8)].standing_for(8)]
    torch.testing.assert_close((elbo(parts[0]) + elbo(parts[1])) / 2, elbo(whole))
    assert float((elbo(parts[0]) - elbo(parts[1])).detach().abs()) > 0.1  # else the average says nothing
    alone = whole[torch.arange(4)]
    torch.testing.assert_close(2 * elbo(alone), elbo(parts[0]))


def test_a_premultiplied_image_has_its_noise_scaled() -> None:
    model, batch = MapLikelihood(BOX), random_batch()
    scale = 0.5 + torch.rand(len(batch), len(batch.half), generator=torch.Generator().manual_seed(2))
    scaled = Batch(
        **{**vars(batch), "image": batch.image * scale[..., None], "ctf": batch.ctf * scale, "noise_scale": scale}
    )
    elbo = Trace_ELBO()(model, model.make_guide())
    torch.testing.assert_close(elbo(scaled), elbo(batch) + 2 * scale.log().sum())
