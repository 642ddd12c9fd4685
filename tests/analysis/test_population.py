"""Populations from likelihoods: against the model itself, against what is most probable, and against known truth."""

import math
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from images import blobs, observed, seen_together
from torch import Tensor

from pyro_cryo.analysis.check_plots import free_energy_profile
from pyro_cryo.analysis.free_energy import FreeEnergy, along_path, free_energy
from pyro_cryo.analysis.likelihoods import log_likelihoods
from pyro_cryo.analysis.population import binned, most_probable, relative, smooth_draws, smoothnesses
from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.inference.run import Run
from pyro_cryo.model import CryoModel, noise_of
from pyro_cryo.models.contrast import Contrast
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.models.linear_subspace import LinearSubspace

BOX = 12
SPAN, WELL, NOISE = 2.4, 0.4, 0.4


class Held:
    """Particles whose images are held in one batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def batches(self, batch_size: int, device: torch.device) -> list[Batch]:
        return [self.batch]

    def n_batches(self, batch_size: int) -> int:
        return 1


def pairs() -> Batch:
    """Six particles, each seen twice."""
    return seen_together(observed(blobs(BOX, 5), 12, 1.0, torch.ones(12)), [i // 2 for i in range(12)])


def found_by(model: CryoModel, batch: Batch, points: Tensor) -> Tensor:
    particles = cast(Particles, Held(batch))
    return log_likelihoods(Run(model, particles), particles, points)


def with_maps(contrast: float) -> LinearSubspace:
    model = LinearSubspace(BOX, zdim=2, contrast=contrast)
    volume = blobs(BOX, 5)
    model.consensus.set(volume)
    model.volume.set(torch.stack([volume, 0.3 * volume.flip(0), 0.3 * volume.flip(1)]))
    return model


def log_normal(model: CryoModel, batch: Batch, mean: Tensor) -> Tensor:
    """log p(images of each particle | mean (B, P, 2)), (n,), double."""
    sigma = noise_of(batch, model.sigma)
    each = -0.5 * ((batch.image - mean) / sigma).double().square().sum((1, 2))
    return batch.by_particle(each)


@pytest.mark.parametrize("contrast", [0.0, 0.2])
def test_likelihoods_of_an_exact_guide_are_the_model_s_with_the_contrast_integrated_out(contrast: float) -> None:
    model, batch = with_maps(contrast), pairs()
    points = torch.tensor([[0.0, 0.0], [1.0, -0.5], [-2.0, 0.7], [0.3, 3.0]])
    nodes = torch.linspace(-7, 7, 1401).double()
    model.coefficients.contrast_varies = False  # the signal is then that of a contrast of 1
    columns = []
    with torch.no_grad():
        for z in points:
            mean = model.signal(model.density(), z.expand(12, 2), batch.rotation, batch.translation, batch)
            told = [log_normal(model, batch, float(1 + contrast * node) * mean) for node in nodes]
            columns.append((torch.stack(told) - 0.5 * nodes[:, None].square()).logsumexp(0))
    expected = torch.stack(columns, 1)
    expected = expected - expected.amax(1, keepdim=True)
    found = found_by(model, batch, points)
    assert float(expected.min()) < -5
    torch.testing.assert_close(found.double(), expected, atol=0.02, rtol=1e-3)


def test_likelihoods_of_any_model_are_of_its_images_at_each_point() -> None:
    torch.manual_seed(0)
    batch, model = pairs(), CryoDRGN(BOX, zdim=2, width=8, layers=1)
    with torch.no_grad():
        for parameter in model.volume.parameters():
            parameter.copy_(torch.randn_like(parameter))
    points = torch.randn(3, 2)
    with torch.no_grad():
        density = model.density()
        means = [model.signal(density, z.expand(12, 2), batch.rotation, batch.translation, batch) for z in points]
        expected = torch.stack([log_normal(model, batch, mean) for mean in means], 1)
    expected = expected - expected.amax(1, keepdim=True)
    assert float(expected.min()) < -0.1
    torch.testing.assert_close(found_by(model, batch, points).double(), expected, atol=0.02, rtol=1e-3)


def test_likelihoods_refuse_what_has_no_closed_form_and_points_that_do_not_fit() -> None:
    batch = pairs()
    with pytest.raises(ValueError, match="Contrast has the latent site contrast beside z"):
        found_by(Contrast(BOX, zdim=2, width=8, layers=1), batch, torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"points of shape \(2, 3\); expected \(L, 2\)"):
        found_by(with_maps(0.0), batch, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"point 1 is \[nan, 0.0\]"):
        found_by(with_maps(0.0), batch, torch.tensor([[0.0, 0.0], [math.nan, 0.0]]))


def grid(count: int) -> np.ndarray:
    """Midpoints of `count` equal parts of -SPAN to SPAN."""
    return SPAN * ((2 * np.arange(count) + 1) / count - 1)


def truth_kt(bins: int) -> np.ndarray:
    """-log of the two wells' density averaged over each bin, 0 for an even one."""
    z = grid(100 * bins)
    density = 0.6 * np.exp(-0.5 * ((z + 1) / WELL) ** 2) + 0.4 * np.exp(-0.5 * ((z - 1) / WELL) ** 2)
    return -np.log(density.reshape(bins, 100).sum(1) / density.sum() * bins)


def two_wells(count: int, seed: int, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log p(particle | point) (n, L), and the means of z with the prior Normal(0, 1)."""
    rng = np.random.default_rng(seed)
    z = np.where(rng.uniform(size=count) < 0.6, -1.0, 1.0) + WELL * rng.normal(size=count)
    said = z + NOISE * rng.normal(size=count)
    return -0.5 * ((said[:, None] - points) / NOISE) ** 2, said / (1 + NOISE**2)


def test_no_weights_are_more_probable_than_the_most_probable() -> None:
    """Lindsay's condition: towards no point does the likelihood grow, and at points that have weight it is level."""
    told, _ = two_wells(500, 0, grid(40))
    weight = most_probable(torch.from_numpy(told), tolerance=1e-4)
    likelihood = relative(torch.from_numpy(told))
    p = likelihood @ weight
    slope = (likelihood / p[:, None]).mean(0)
    assert float(weight.sum()) == pytest.approx(1)
    assert float(slope.max()) < 1.0002
    torch.testing.assert_close(slope[weight > 0.01], torch.ones(int((weight > 0.01).sum())).double(), atol=0.01, rtol=0)
    even = torch.full_like(weight, 1 / 40)
    assert float((likelihood @ even).log().mean()) < float(p.log().mean()) - 0.01
    assert float((weight < 1e-3).double().mean()) > 0.4  # a few atoms


def test_points_of_a_bin_share_its_weight() -> None:
    likelihood = torch.tensor([[1.0, 0.5, 0.2, 0.4]]).double()
    label = torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(
        binned(likelihood, label, 2, torch.tensor([3.0, 1.0, 0.0, 0.0])), torch.tensor([[0.875, 0.3]]).double()
    )
    with pytest.raises(ValueError, match="bin 2 of 3 holds none of 4 points"):
        binned(likelihood, label, 3, torch.ones(4))


def test_two_wells_come_back_where_means_of_z_have_hardly_a_barrier() -> None:
    bins, points, truth = 24, grid(96), truth_kt(24)
    told, means = two_wells(4000, 1, points)
    found = free_energy(told, points, bins)
    np.testing.assert_allclose(found.s, grid(bins))
    counts = np.histogram(means, bins, (-SPAN, SPAN))[0]
    left, right = (int(np.abs(found.s - s).argmin()) for s in (-1, 1))
    barrier = truth[left:right].max() - truth[left]
    naive = -np.log(counts[left:right].min() / counts[left])
    climb = found.barrier_kt(-1.0, 1.0)
    print(f"barrier {barrier:.2f} kT, found {climb}, of means {naive:.2f}")
    assert abs(climb.median_kt - barrier) < 0.6
    assert climb.low_kt < barrier < climb.high_kt
    assert naive < barrier - 1.0
    seen = truth < truth.min() + 3
    assert np.abs(found.median_kt - truth)[seen].max() < 0.5
    assert np.abs(-np.log(np.maximum(counts, 0.5) * bins / 4000) - truth)[seen].max() > 1.0
    np.testing.assert_allclose(np.exp(-found.draws_kt).mean(1), 1)


def test_bands_cover_the_truth_at_about_their_level() -> None:
    bins, points, truth = 16, grid(48), truth_kt(16)
    inside, width = [], []
    for seed in range(16):
        found = free_energy(two_wells(600, seed, points)[0], points, bins, seed=seed)
        inside.append((found.low_kt <= truth) & (truth <= found.high_kt))
        width.append(found.high_kt - found.low_kt)
    print(f"90% bands hold {np.mean(inside):.3f}, median width {np.median(width):.2f} kT")
    assert 0.82 < np.mean(inside) < 0.985
    assert np.median(width) < 2.2


def test_bands_hold_at_their_level_what_the_prior_draws() -> None:
    """Populations from the prior, particles from these: 90% of all bins, and neither above nor below most draws."""
    bins, noise, count = 12, 0.1, 200
    s = (torch.arange(bins).double() + 0.5) / bins
    covariances = torch.linalg.inv(smoothnesses(bins)).numpy()
    rank = []
    for seed in range(36):
        rng = np.random.default_rng(seed)
        f = torch.from_numpy(np.linalg.cholesky(rng.choice(covariances)) @ rng.normal(size=bins))
        said = rng.choice(s.numpy(), count, p=f.softmax(0).numpy()) + noise * rng.normal(size=count)
        likelihood = torch.from_numpy(np.exp(-0.5 * ((said[:, None] - s.numpy()) / noise) ** 2))
        rank.append((smooth_draws(likelihood, seed) < f.log_softmax(0)).double().mean(0))
    ranks = torch.stack(rank)
    held = ((ranks > 0.05) & (ranks < 0.95)).double().mean()
    print(f"90% bands hold {held:.3f}, mean rank {ranks.mean():.3f}")
    assert 0.82 < held < 0.97
    assert abs(float(ranks.mean()) - 0.5) < 0.12


def test_a_cloud_of_points_takes_shapes_off_the_path_into_account() -> None:
    """z = (s, t), t of two states, which images confuse with s: with t held at 0 the wells would be in wrong places."""
    rng = np.random.default_rng(5)
    z = np.where(rng.uniform(size=1500) < 0.6, -1.0, 1.0) + WELL * rng.normal(size=1500)
    z = np.stack([z, np.where(rng.uniform(size=1500) < 0.5, -2.0, 2.0)], 1)
    root = np.linalg.cholesky(np.array([[0.09, 0.24], [0.24, 1.0]]))
    said = z + rng.normal(size=z.shape) @ root.T
    points = np.stack(np.meshgrid(grid(32), np.linspace(-3, 3, 7), indexing="ij"), -1).reshape(-1, 2)

    def told(at: np.ndarray) -> Tensor:
        white = np.linalg.solve(root, (said[:, None] - at).reshape(-1, 2).T)
        return torch.from_numpy(-0.5 * (white**2).sum(0).reshape(len(said), len(at)))

    cloud = free_energy(told(points), points[:, 0], 16, share=most_probable(told(points), tolerance=0.1))
    path = np.stack([grid(32), np.zeros(32)], 1)
    line = free_energy(told(path), path[:, 0], 16)
    truth = truth_kt(16)
    seen = truth < truth.min() + 2
    error = [np.abs(one.median_kt - truth)[seen].max() for one in (cloud, line)]
    print("greatest error in the wells, kT: cloud, line:", error)
    assert error[0] < 0.3
    assert error[1] > 0.5
    assert ((cloud.low_kt <= truth) & (truth <= cloud.high_kt)).mean() > 0.7


def test_points_are_midpoints_of_equal_lengths_of_a_path() -> None:
    points, s = along_path([[0.0, 0.0], [3.0, 0.0], [3.0, 1.0]], 4)
    np.testing.assert_allclose(s, [0.5, 1.5, 2.5, 3.5])
    np.testing.assert_allclose(points, [[0.5, 0], [1.5, 0], [2.5, 0], [3, 0.5]])
    with pytest.raises(ValueError, match="a path of 1 points and no length"):
        along_path([[0.0, 1.0]], 4)


def test_more_particles_narrow_the_band_and_none_leave_it_wide() -> None:
    points = grid(48)
    few, many = (free_energy(two_wells(count, 3, points)[0], points, 16) for count in (300, 3000))
    wells = np.abs(np.abs(few.s) - 1) < 0.4
    width = [(one.high_kt - one.low_kt)[wells].mean() for one in (few, many)]
    assert width[1] < 0.6 * width[0]
    blind = free_energy(np.zeros((50, 48)), points, 16)
    assert (blind.high_kt - blind.low_kt).min() > 1


def test_draws_repeat_with_their_seed_and_do_not_depend_on_the_scale_of_likelihoods() -> None:
    points = grid(48)
    told, _ = two_wells(200, 4, points)
    first, again = (free_energy(shifted, points, 16, seed=3) for shifted in (told, told - 700.0))
    np.testing.assert_allclose(first.draws_kt, again.draws_kt, rtol=1e-6, atol=1e-6)
    likelihood = relative(torch.from_numpy(two_wells(200, 4, grid(16))[0]))
    torch.testing.assert_close(smooth_draws(likelihood, 1).exp().sum(1), torch.ones(600).double())


def profile() -> FreeEnergy:
    """A barrier of 3 kT to either side of which there are 8 draws, one half 0.5 kT higher."""
    s = np.arange(5.0)
    shape = np.array([1.0, 0.0, 3.0, 0.5, 2.0])
    return FreeEnergy.of(s, shape + np.repeat([0.0, 0.5], 4)[:, None] * (shape > 1), 0.9)


def test_a_barrier_is_climbed_from_its_own_side() -> None:
    there, back = profile().barrier_kt(1, 3), profile().barrier_kt(3.2, 1.4)
    assert (there.low_kt, there.median_kt, there.high_kt) == pytest.approx((3.0, 3.25, 3.5))
    assert back.median_kt == pytest.approx(2.75)
    with pytest.raises(ValueError, match=r"7 lies beyond the bins; give -0.5 to 4.5"):
        profile().barrier_kt(1, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coordinate": np.ones(48)}, "not all the same"),
        ({"coordinate": np.arange(47.0)}, r"shape \(9, 48\) at 47 points"),
        ({"bins": 3}, "3 bins, level 0.9; expected at least 8"),
        ({"level": 1.0}, "level 1.0"),
        ({"share": -np.ones(48)}, "none negative"),
        ({"log_likelihood": np.full((9, 48), -np.inf)}, "particle 0 has a log likelihood of -inf"),
    ],
)
def test_what_is_no_profile_is_refused(change: dict[str, object], message: str) -> None:
    given = {"log_likelihood": np.zeros((9, 48)), "coordinate": grid(48), "bins": 16} | change
    with pytest.raises(ValueError, match=message):
        free_energy(**given)  # type: ignore[arg-type]


def test_the_picture_shows_the_band_and_the_histogram_of_means() -> None:
    found = replace(profile(), median_kt=np.array([1.0, 0.0, 3.0, 0.5, 2.0]))
    axes = free_energy_profile(found, means=np.array([1.0, 1.2, 0.8, 3.0]), label="opening").axes[0]
    median, means = axes.lines
    np.testing.assert_allclose(median.get_ydata(), found.median_kt)
    np.testing.assert_allclose(means.get_ydata(), [np.nan, -math.log(15 / 4), np.nan, -math.log(5 / 4), np.nan])
    assert axes.get_ylabel() == "free energy (kT)"
    assert axes.get_xlabel() == "opening"
    assert "90%" in axes.get_legend().get_texts()[0].get_text()
