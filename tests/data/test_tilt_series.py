"""A tilt series of ribosomes: the geometry is right where the tilts agree on one map."""

from __future__ import annotations

import math
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_cryo.data.particles import Particles
from pyro_cryo.data.star import read_star
from pyro_cryo.physics.exposure import attenuation
from pyro_cryo.physics.fourier import radius
from pyro_cryo.physics.rotations import from_euler_deg

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NAME = "warptools_test_4-tomos_10-ptcls_box-32_angpix-12"


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "data/real/tilt_series_10499"


@pytest.fixture(scope="module")
def particles(folder: Path) -> Particles:
    return Particles.open(folder / f"{NAME}_optimisation_set.star")


def agreement(a: Tensor, b: Tensor) -> float:
    """Mean Fourier shell correlation of shells 2 to 12 inside a ball: it does not live off the lowest shell."""
    ball = (radius(len(a), 3) < 13).float()
    shell = radius(len(a), 3).round()
    x, y = (torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(v * ball))) for v in (a, b))
    scores = []
    for s in range(2, 13):
        m = shell == s
        scores.append(float((x[m] * y[m].conj()).sum().real / (x[m].norm() * y[m].norm())))
    return float(np.mean(scores))


def mirrored(volume: Tensor) -> Tensor:
    """z to -z about the centre voxel."""
    return volume.flip(0).roll(1, 0)


def test_each_visible_tilt_is_an_image(particles: Particles) -> None:
    assert particles.n_particles == 40
    assert len(particles) == 10 * (34 + 37 + 35 + 37)  # tilts without a good image are not visible
    assert torch.equal(particles.particle.unique(), torch.arange(40))
    assert (particles.box, particles.apix, particles.n_noise_groups) == (32, pytest.approx(12.0), 4)
    images = [particles._read(torch.tensor([row]), pin=False).parts[0][1] for row in range(0, len(particles), 7)]
    assert min(float(image.std()) for image in images) > 0.1  # invisible tilts are stored as zeros


def test_the_tilts_agree_on_the_supplied_map(particles: Particles, folder: Path, backproject) -> None:
    """The supplied map is the mirror image of what its poses define: its hand was settled after reconstruction."""
    supplied = torch.from_numpy(
        mrcfile.read(folder / "warptools_test_box-32_angpix-12_reconstruct.mrc").astype(np.float32)
    )
    batch = particles.batch(slice(None))
    right = backproject(batch, batch.rotation)
    assert agreement(mirrored(right), supplied) > 0.65
    assert agreement(right, supplied) < 0.55
    centre, rim = right[radius(32, 3) < 6].mean(), right[(radius(32, 3) > 12) & (radius(32, 3) < 15)].mean()
    assert centre > rim  # protein is bright
    rows = read_star(folder / f"{NAME}.star")["particles"]
    euler = rows[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy()
    particle = torch.from_numpy(from_euler_deg(euler)).float()[particles.particle]
    tilt = batch.rotation @ particle.mT
    flip = torch.diag(torch.tensor([1.0, 1.0, -1.0]))
    wrong = {
        "inverse": batch.rotation.mT,
        "particle's inverse": tilt @ particle.mT,
        "tilt's inverse": tilt.mT @ particle,
        "other order": particle @ tilt,
        "other sense of tilting": flip @ tilt @ flip @ particle,
        "another particle's": batch.rotation.roll(37, 0),
    }
    for name, rotation in wrong.items():
        volume = backproject(batch, rotation)
        assert max(agreement(volume, supplied), agreement(mirrored(volume), supplied)) < 0.55, name


def test_premultiplied_images_have_squared_ctf_and_its_noise(particles: Particles) -> None:
    """Where the CTF is strong, the images' power goes with the noise scale: over tilts it falls by a factor of 5."""
    batch = particles.batch(slice(None))
    assert batch.noise_scale is not None
    strong = batch.noise_scale > 0.15
    torch.testing.assert_close(batch.ctf[strong], batch.noise_scale[strong].square())
    assert float(batch.noise_scale.min()) >= 0.1 - 1e-6
    shells = (batch.half.shell >= 6) & (batch.half.shell <= 12)
    power = batch.image.square().sum(-1)[:, shells].sum(1)
    predicted = batch.noise_scale.square()[:, shells].sum(1)
    ratio = (power / predicted).log()
    assert float(torch.corrcoef(torch.stack([power.log(), predicted.log()]))[0, 1]) > 0.9
    assert float(ratio.std()) < 0.5 * float(power.log().std())


def test_depth_changes_the_defocus(particles: Particles, folder: Path) -> None:
    """Tilts of one tomogram share a defocus at its centre: particles differ by their depth, none of them at random."""
    ctf, particle = particles.ctf, particles.particle
    mean = 0.5 * (ctf.defocus_u_angstrom + ctf.defocus_v_angstrom)
    first, second = mean[particle == 10], mean[particle == 11]  # the same 37 tilts
    difference = (first - second).double()
    tilt = particles.rotation[particle == 10].double() @ particles.rotation[particle == 10][18].double().T
    # Depth along the beam is linear in the third rows of the projections: two particles differ by a fixed vector.
    rows = tilt[:, 2]
    fitted = rows @ torch.linalg.lstsq(rows, difference[:, None]).solution
    assert float(difference.std()) > 100
    assert float((fitted[:, 0] - difference).abs().max()) < 2
    size = np.array([4400, 6000, 1400]) * 1.667
    assert float(difference.abs().max()) < np.linalg.norm(size)


def test_exposure_wears_out_high_frequencies() -> None:
    frequency = torch.tensor([[0.01, 0.0], [0.0, 0.1], [0.25, 0.0]])
    left = attenuation(frequency, torch.tensor([0.0, 30.0]), torch.tensor([300.0, 300.0]))
    torch.testing.assert_close(left[0], torch.ones(3))
    critical = 0.245 * 0.1**-1.665 + 2.81
    assert float(left[1, 1]) == pytest.approx(math.exp(-15 / critical), rel=1e-5)
    assert left[1, 0] > left[1, 1] > left[1, 2]


@pytest.mark.parametrize("shuffled", [False, True])
def test_all_images_of_a_particle_come_in_one_batch(particles: Particles, shuffled: bool) -> None:
    generator = torch.Generator().manual_seed(0) if shuffled else None
    batches = list(particles.batches(100, generator=generator))
    assert len(batches) == particles.n_batches(100)
    seen = torch.cat([batch.index for batch in batches])
    assert torch.equal(seen.sort().values, torch.arange(len(particles)))
    assert torch.equal(seen, torch.arange(len(particles))) is not shuffled
    named = [particles.particle[batch.index] for batch in batches]
    assert sum(len(name.unique()) for name in named) == particles.n_particles
    for batch, name in zip(batches, named, strict=True):
        assert batch.particles == len(name.unique()) == len(torch.stack([batch.particle, name]).unique(dim=1).T)
        assert int(batch.particle.max()) == batch.particles - 1


def test_rows_in_another_order_are_the_same_particles(particles: Particles) -> None:
    some = particles[torch.randperm(len(particles), generator=torch.Generator().manual_seed(1))[:300]]
    assert int(some.particle[0]) == 0
    assert torch.equal(some.particle.unique(), torch.arange(some.n_particles))
    batch = some.batch(slice(0, 60))
    assert torch.equal(batch.index, torch.arange(60))


def test_a_subset_counts_particles(folder: Path) -> None:
    some = Particles.open(folder / f"{NAME}.star", subset=folder / "warptools_test_ind_last2tomos.pkl")
    assert (some.n_particles, len(some)) == (20, 10 * (35 + 37))
    few = Particles.open(folder / f"{NAME}.star", subset=[3, 0])
    assert few.n_particles == 2
    assert few.table.files[0].endswith("Unt_083_12.00A_000001.mrcs") or few.table.files[1].endswith("000004.mrcs")
    assert Particles.open(folder / f"{NAME}.star", subset=folder / f"{NAME}.star", first=4).n_particles == 4


def test_tilt_images_written_as_2d_rows_are_the_same_images(particles: Particles, tmp_path: Path) -> None:
    particles.write_star(tmp_path / "tilts.star")
    again = Particles.open(tmp_path / "tilts.star")
    assert again.n_particles == 40
    a, b = particles.batch(slice(0, 100)), again.batch(slice(0, 100))
    for name in ("image", "ctf", "noise_scale", "rotation", "translation", "noise_group"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=2e-4, rtol=1e-4)


def test_tomograms_must_fit(folder: Path, tmp_path: Path) -> None:
    table = (folder / f"{NAME}.star").read_text()
    (tmp_path / "p.star").write_text(table)
    with pytest.raises(FileNotFoundError, match=r"optimisation_set\.star"):
        Particles.open(tmp_path / "p.star", datadir=folder)
    tomograms = (folder / f"{NAME}_tomograms.star").read_text()
    (tmp_path / "tomograms.star").write_text(tomograms.replace("Unt_083.tomostar", "other"))
    with pytest.raises(ValueError, match=r"no tomogram Unt_083\.tomostar"):
        Particles.open(tmp_path / "p.star", datadir=folder)
    (tmp_path / "tomograms.star").write_text(tomograms)
    (tmp_path / "p.star").write_text(table.replace("[0,1,1,", "[1,1,"))
    with pytest.raises(ValueError, match="36 flags for 37 tilts"):
        Particles.open(tmp_path / "p.star", datadir=folder)
    (tmp_path / "p.star").write_text(table)
    assert len(Particles.open(tmp_path / "p.star", datadir=folder)) == 1430


def test_relion_5_angles_of_the_tilts(folder: Path) -> None:
    """Rz(ZRot) Ry(YTilt) Rx(XTilt) of angles taken from Warp's matrices gives the matrices back."""
    import pandas as pd
    from scipy.spatial.transform import Rotation

    from pyro_cryo.data.tomograms import _projection

    tilts = read_star(folder / f"{NAME}_tomograms.star")["Unt_050.tomostar"]
    matrix = _projection(tilts, folder)
    x, y, z = Rotation.from_matrix(matrix).as_euler("xyz", degrees=True).T
    angles = pd.DataFrame({"rlnTomoXTilt": x, "rlnTomoYTilt": y, "rlnTomoZRot": z})
    np.testing.assert_allclose(_projection(angles, folder), matrix, atol=1e-5)
    assert np.abs(y).max() > 55  # the tilt is about y, as RELION has it
    by_hand = [np.eye(3)] * 3
    a = np.radians([x[0], y[0], z[0]])
    for axis, (i, j) in enumerate(((1, 2), (2, 0), (0, 1))):
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(a[axis])
        turn[i, j], turn[j, i] = -np.sin(a[axis]), np.sin(a[axis])
        by_hand[axis] = turn
    np.testing.assert_allclose(by_hand[2] @ by_hand[1] @ by_hand[0], matrix[0], atol=1e-5)
