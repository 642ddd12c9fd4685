"""Pictures show the values they were given, with units."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_cryo.analysis.calibration import calibration, simultaneous_band
from pyro_cryo.analysis.check_plots import (
    image_misfit,
    latent_uncertainty,
    pareto_k,
    rank_deviation,
    residual_spectrum,
)
from pyro_cryo.analysis.latent import kmeans, pca
from pyro_cryo.analysis.plots import (
    central_sections,
    fsc_curves,
    latent_density,
    learning_curve,
    map_series,
    pose_distribution,
)
from pyro_cryo.analysis.predictive import ImageFit, ResidualPower
from pyro_cryo.guides.poses import PoseSpread
from pyro_cryo.physics.rotations import random_rotations


def texts(axes: object) -> list[str]:
    return [t.get_text() for t in axes.texts]  # type: ignore[attr-defined]


def test_the_learning_curve_draws_the_records_that_have_a_loss(tmp_path: Path) -> None:
    records = [{"event": "start"}, *({"epoch": e, "loss": 100 / e, "seconds": 60.0 * e} for e in range(1, 9))]
    figure = learning_curve(records)
    (axes,) = figure.axes
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[e, 100 / e] for e in range(1, 9)])
    assert "nats" in axes.get_ylabel()
    assert texts(axes) == ["8.0 min"]
    figure.savefig(tmp_path / "loss.png", dpi=150)
    assert (tmp_path / "loss.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="no record"):
        learning_curve([{"event": "start"}])


def test_a_long_learning_curve_is_scaled_to_its_tail() -> None:
    loss = [1e6, *np.linspace(10, 5, 200)]
    axes = learning_curve([{"epoch": i / 100, "loss": v} for i, v in enumerate(loss)]).axes[0]
    assert axes.get_ylim()[1] < 20


@pytest.mark.parametrize("count", [300, 3000])
def test_the_latent_density_counts_every_particle_and_numbers_the_centres(count: int) -> None:
    z = np.random.default_rng(0).normal(size=(count, 4)) * [3, 2, 1, 0.5]
    clusters = kmeans(z, 5)
    axes = latent_density(z, clusters).axes[0]
    assert axes.collections[0].get_array().sum() == count
    assert texts(axes) == ["0", "1", "2", "3", "4"]
    np.testing.assert_allclose([t.xy for t in axes.texts], pca(z).project(clusters.centre)[:, :2])
    assert "% of the variance" in axes.get_xlabel()


def test_one_latent_dimension_is_a_histogram() -> None:
    z = np.random.default_rng(1).normal(size=(500, 1))
    axes = latent_density(torch.from_numpy(z), kmeans(z, 2)).axes[0]
    assert sum(p.get_height() for p in axes.patches) == 500
    assert texts(axes) == ["0", "1"]


def test_fsc_curves_are_drawn_against_angstrom_with_their_resolution() -> None:
    curve = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0])  # box 16
    axes = fsc_curves({"corrected": curve}, apix=2.0, thresholds=(0.5,)).axes[0]
    np.testing.assert_allclose(axes.lines[0].get_xdata(), np.arange(9) / 32)
    assert axes.get_legend().get_texts()[0].get_text() == "corrected (10.7 Å)"
    for tick, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True):
        assert 1 / tick == pytest.approx(float(label.get_text()))
    assert axes.get_xlim()[1] == pytest.approx(0.25)
    assert "Å" in axes.get_xlabel()


def test_sections_go_through_the_centre_voxel_along_the_named_axes() -> None:
    volume = torch.zeros(8, 8, 8)
    volume[4, 4, 6] = 1  # on the x axis
    axes = central_sections(volume, apix=3.0, sd=volume + 1, title="map").axes
    xy, xz, yz = (axes[i].images[0].get_array() for i in range(3))
    assert (xy[4, 6], xz[4, 6], yz.max()) == (1, 1, 0)
    assert axes[3].images[0].get_array()[4, 6] == 2
    assert texts(axes[0]) == ["5 Å"]
    assert {axes[6].get_ylabel(), axes[7].get_ylabel()} == {"density", "standard deviation"}


def test_a_series_shows_both_projections_on_one_grey_scale() -> None:
    volumes = torch.rand(12, 8, 8, 8)
    axes = [ax for ax in map_series(volumes, apix=4.0).axes if ax.get_visible()]
    assert len(axes) == 24
    limits = {ax.images[0].get_clim() for ax in axes}
    assert len(limits) == 1
    np.testing.assert_allclose(axes[0].images[0].get_array(), volumes[0].sum(0), rtol=1e-6)
    shown = [ax.get_title() for ax in axes if ax.get_title()]
    assert shown == [str(i) for i in range(12)]
    with pytest.raises(ValueError, match="2 labels for 12 maps"):
        map_series(volumes, 4.0, labels=["a", "b"])


def test_poses_are_drawn_as_a_density_and_their_uncertainty() -> None:
    generator = torch.Generator().manual_seed(0)
    rotation = random_rotations(4000, generator)
    spread = PoseSpread(torch.linspace(0.5, 1.5, 4000), torch.linspace(0.1, 0.3, 4000), torch.zeros(4000))
    figure = pose_distribution(rotation, spread)
    sphere, _, angle, shift = sorted(figure.axes, key=lambda axes: axes.get_position().x0)
    density = np.asarray(sphere.collections[0].get_array()).reshape(61, 121)
    weight = np.cos(np.linspace(-np.pi / 2, np.pi / 2, 61))[:, None] * np.ones(121)
    assert np.average(density, weights=weight) == pytest.approx(1, abs=0.02)
    assert 0.4 < density.min() < density.max() < 1.8
    assert (angle.get_title(), shift.get_title()) == ("median 1", "median 0.2")
    upright = torch.eye(3).expand(500, 3, 3)
    top = np.asarray(pose_distribution(upright, spread).axes[0].collections[0].get_array()).reshape(61, 121)
    assert top[-1].min() > 20 * top[30].max()


def test_ranks_are_drawn_beside_their_band() -> None:
    generator = torch.Generator().manual_seed(0)
    truth, draws = torch.randn(200, 2, generator=generator), torch.randn(19, 200, 2, generator=generator)
    found = {"right": calibration(truth, draws), "shifted": calibration(truth[:, :1], draws[..., :1] + 2)}
    right, shifted = rank_deviation(found).axes
    assert (right.get_title(), shifted.get_title()) == ("right", "shifted")
    band = simultaneous_band(200, 19)
    for axes, lines, outside in ((right, 2, False), (shifted, 1, True)):
        drawn = [line for line in axes.lines if len(line.get_xdata()) == 19]
        assert len(drawn) == lines
        for line in drawn:
            height = torch.as_tensor(np.asarray(line.get_ydata())) + band.expected
            assert bool(((height > band.upper + 1e-6) | (height < band.lower - 1e-6)).any()) == outside
    with pytest.raises(ValueError, match="nothing to draw"):
        rank_deviation({})


def test_the_residual_is_drawn_against_angstrom_with_its_band() -> None:
    power, count = torch.ones(2, 9), torch.full((2, 9), 100.0)
    power[1, 4] = 2.0
    found = ResidualPower(power, count)
    (axes,) = residual_spectrum(found, apix=2.0).axes
    lines = [line for line in axes.lines if len(line.get_xdata()) == 9]
    np.testing.assert_allclose(lines[1].get_xydata()[4], [4 / 32, 2.0])
    lower, upper = (edge[0] for edge in found.band(0.99))
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((float(lower.min()), float(upper.max())), rel=1e-5)
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["noise group 0", "noise group 1"]


def test_misfit_counts_every_image_and_names_how_many_are_junk() -> None:
    rng = np.random.default_rng(0)
    chi_square, match = rng.chisquare(400, 1000), rng.standard_normal(1000)
    match[:20] -= 30
    found = ImageFit(np.arange(1000), chi_square, 400, match)
    axes = image_misfit(found).axes
    for panel in axes:
        assert sum(p.get_height() for p in panel.patches) == 1000
    assert axes[1].patches[0].get_height() == 20
    (said,) = texts(axes[0])
    assert said == f"{len(found.junk(0.05))} of 1,000 fit badly"
    assert 20 <= len(found.junk(0.05)) <= 25


def test_importing_the_plots_does_not_import_matplotlib() -> None:
    code = "import sys, pyro_cryo.analysis.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_share_of_particles_whose_draws_can_be_taken_is_written() -> None:
    (axes,) = pareto_k(np.array([-np.inf, 0.2, 0.6, 1.0, 9.0])).axes
    assert texts(axes) == ["60% below 0.7"]
    assert sum(patch.get_height() for patch in axes.patches) == 5


def test_ellipses_hold_the_share_that_they_say() -> None:
    rng = np.random.default_rng(0)
    covariance = np.array([[2.0, 0.5], [0.5, 0.4]])
    z = 10 * rng.normal(size=(40, 2))
    (axes,) = latent_uncertainty(z, np.tile(covariance, (40, 1, 1)), count=5).axes
    assert len(axes.patches) == 5
    drawn = rng.multivariate_normal(np.zeros(2), covariance, 4000) @ pca(z).axes.T
    inside = (
        axes.patches[0]
        .get_path()
        .contains_points(axes.patches[0].get_patch_transform().inverted().transform(drawn + axes.patches[0].center))
    )
    assert abs(inside.mean() - 0.9) < 0.02
