"""Units, signs and rotations of each program against one another and against images made by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import torch

from pyro_cryo.data.cryodrgn import read_arrays, read_ctf, read_poses
from pyro_cryo.data.cryosparc import read_particles
from pyro_cryo.data.open import read_table
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.star import read_star
from pyro_cryo.physics.fourier import HalfPlane, image_to_half_plane, radius, shift_phase
from pyro_cryo.physics.rotations import angle_deg, from_euler_deg

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def blob(box: int, x: float, y: float, sigma: float = 2.0) -> np.ndarray:
    """A Gaussian displaced by (x, y) pixels from the centre pixel: (1, D, D)."""
    c = np.arange(box) - box // 2
    return np.exp(-((c[None, :] - x) ** 2 + (c[:, None] - y) ** 2) / (2 * sigma**2))[None].astype(np.float32)


def star_of(folder: Path, columns: str, row: str) -> Path:
    """A RELION 3.0 table of one image."""
    heads = "".join(
        f"_{name}\n" for name in ["rlnImageName", "rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", *columns.split()]
    )
    (folder / "a.star").write_text(f"data_\n\nloop_\n{heads}1@a.mrcs 0 0 0 {row}\n")
    return folder / "a.star"


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ("rlnOriginX rlnOriginY rlnDetectorPixelSize rlnMagnification", "-4 2.5 5 25000"),
        ("rlnOriginXAngst rlnOriginYAngst rlnImagePixelSize", "-8 5 2"),
    ],
)
@pytest.mark.parametrize("box", [32, 24])
def test_a_displaced_particle_is_a_centred_one_times_the_phase(
    tmp_path: Path, stack_writer, columns: str, row: str, box: int
) -> None:
    """The particle lies at (+4, -2.5) pixels of 2 A; RELION writes the negative."""
    stack_writer(tmp_path / "a.mrcs", blob(32, 4.0, -2.5))
    particles = Particles.open(star_of(tmp_path, columns, row), box=box)
    assert particles.apix == pytest.approx(2.0 * 32 / box)
    torch.testing.assert_close(particles.translation * particles.apix, torch.tensor([[8.0, -5.0]]))
    batch = particles.batch([0])
    centred = image_to_half_plane(torch.from_numpy(blob(32, 0, 0)), batch.half)
    phase = shift_phase(batch.half.k, batch.translation, box)
    predicted = torch.view_as_real(torch.view_as_complex(centred) * phase)
    assert float((batch.image - predicted).abs().max() / predicted.abs().max()) < 1e-5


def test_pixel_size_overrides_keep_displacements_in_pixels(case) -> None:
    named, told = Particles.open(case.star()), Particles.open(case.star(), apix=3.0)
    torch.testing.assert_close(named.translation, told.translation)
    assert (named.apix, told.apix) == (2.0, 3.0)


def test_cryosparc_agrees_with_cryodrgns_reading_of_it(shared: Path) -> None:
    table = read_particles(shared / "data/tables/cryosparc_P12_J24_001_particles.cs", ctf_given=False)
    rotation, fraction = read_poses(shared / "data/tables/pose.cs.pkl", len(table))
    assert float((table.rotation - rotation).abs().max()) < 1e-5
    torch.testing.assert_close(table.shift_px, fraction * 180)
    values = read_ctf(shared / "data/tables/ctf2.pkl", len(table))
    assert [(g.box, pytest.approx(g.apix, abs=1e-4)) for g in table.groups] == [(values[0, 0], values[0, 1])]
    fields = np.stack([field.numpy() for field in list(vars(table.ctf).values())[:7]], -1)
    np.testing.assert_allclose(fields, values[:, 2:], rtol=1e-5, atol=1e-5)
    assert set(table.half_set.tolist()) == {1, 2}
    assert set(table.sign.tolist()) == {-1.0}


def test_cryosparcs_sign_makes_protein_bright(shared: Path) -> None:
    """Ribosomes imported as they came from the micrograph, dark: the batch has the opposite sign of the stack."""
    folder = shared / "data/real/empiar_10076_7"
    particles = Particles.open(folder / "empiar_10076_7.cs")
    still = particles.with_poses(torch.eye(3).expand(7, 3, 3), torch.zeros(7, 2))
    raw = torch.from_numpy(mrcfile.read(folder / "empiar_10076_7.mrc"))
    batch = still.batch(slice(None))
    torch.testing.assert_close(batch.image, -image_to_half_plane(raw, batch.half))
    c = torch.arange(320) - 160
    distance = torch.hypot(c[:, None].float(), c.float())
    assert bool((raw[:, distance < 70].mean(1) < raw[:, distance > 130].mean(1)).all())
    star = Particles.open(folder / "empiar_10076_7.star", invert=True).with_poses(still.rotation, still.translation)
    torch.testing.assert_close(star.batch(slice(None)).image, batch.image)
    torch.testing.assert_close(star.batch(slice(None)).ctf, batch.ctf, atol=2e-3, rtol=0)


def test_relion_angles_agree_with_cryodrgns_reading_of_them(shared: Path) -> None:
    folder = shared / "data/real/ribosome_subtomogram"
    table = read_table(folder / "sta_testing_bin8.star", None, None, False)
    rotation, _ = read_poses(folder / "sta_pose.pkl", 219)
    assert float(angle_deg(table.rotation.double(), rotation.double()).max()) < 1e-3
    values = read_ctf(folder / "sta_ctf.pkl", 219)
    fields = np.stack([field.numpy() for field in list(vars(table.ctf).values())[:7]], -1)
    np.testing.assert_allclose(fields, values[:, 2:], rtol=1e-5)
    assert float(table.ctf.bfactor_angstrom2.min()) >= 0  # Warp's are negative


def test_a_ctf_pickle_of_the_images_before_downsampling(shared: Path) -> None:
    """sta_ctf.pkl says 512 pixels of 1.82 A, the stack has 64: pixels are 8 times as large."""
    folder = shared / "data/real/ribosome_subtomogram"
    particles = Particles.open(
        folder / "sta_testing_bin8.star", poses=folder / "sta_pose.pkl", ctf=folder / "sta_ctf.pkl"
    )
    assert particles.apix == pytest.approx(1.82 * 8, rel=1e-5)
    fractions = read_arrays(folder / "sta_pose.pkl")[1]
    np.testing.assert_allclose(particles.translation.numpy(), -fractions * 64, atol=1e-5)


def test_relion_3_and_31_say_the_same(case) -> None:
    """The same rows with optics in the rows, origins in pixels and no table of optics."""
    new = Particles.open(case.star())

    def older(rows: pd.DataFrame) -> pd.DataFrame:
        rows = rows.assign(rlnOriginX=rows.rlnOriginXAngst / 2, rlnOriginY=rows.rlnOriginYAngst / 2)
        rows = rows.assign(rlnVoltage=300.0, rlnSphericalAberration=2.7, rlnAmplitudeContrast=0.1)
        rows = rows.assign(rlnMagnification=10000.0, rlnDetectorPixelSize=2.0)
        return rows.drop(columns=["rlnOriginXAngst", "rlnOriginYAngst", "rlnOpticsGroup"])

    path = case.star(older, name="old.star")
    path.write_text("\n# version" + path.read_text().split("# version")[-1])  # the particles alone
    old = Particles.open(path)
    a, b = new.batch(slice(None)), old.batch(slice(None))
    for name in ("image", "ctf", "rotation", "translation", "noise_group", "freq_scale"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name))


def test_a_ctf_is_evaluated_in_cycles_an_angstrom_of_the_whole_field(case) -> None:
    particles = Particles.open(case.star(), box=12)
    batch = particles.batch([4, 1])
    expected = particles.ctf[torch.tensor([4, 1])](HalfPlane.of(12).k / (16 * 2.0))
    torch.testing.assert_close(batch.ctf, expected)


def test_cases_with_known_truth(shared: Path, tmp_path: Path) -> None:
    """A case made independently, in real space: poses, shifts and contrast, from the STAR and from the pickles."""
    out = tmp_path / "case"
    subprocess.run(
        [sys.executable, shared / "yardstick/make_case.py", "igg", "--images", "60", "--box", "32", "--snr", "100",
         "--states", "2", "--out", out],
        check=True, capture_output=True,
    )  # fmt: skip
    truth = np.load(out / "truth.npz")
    star = Particles.open(out / "particles.star")
    pickles = Particles.open(out / "particles.mrcs", poses=out / "poses.pkl", ctf=out / "ctf.pkl")
    for particles in (star, pickles):
        assert particles.apix == pytest.approx(float(truth["apix"]), rel=1e-5)
        np.testing.assert_allclose(particles.rotation, truth["rotation"], atol=1e-5)
        np.testing.assert_allclose(particles.translation, truth["shift_px"], atol=1e-4)
    a, b = star.batch(slice(None)), pickles.batch(slice(None))
    torch.testing.assert_close(a.ctf, b.ctf, atol=1e-4, rtol=0)
    # The lowest shells hold the mass: image = ctf . phase . positive, where the object is far smaller than the wave.
    low = a.band(a.half.count(1.0))
    phase = shift_phase(low.half.k, low.translation, 32)
    aligned = (torch.view_as_complex(low.image) * phase.conj()).real * low.ctf.sign()
    assert float((aligned > 0).float().mean()) > 0.95


def test_toy_projections_are_slices_of_their_map(shared: Path) -> None:
    """cryoDRGN's simulated set: images without CTF and shifts are projections of the map at their rotations."""
    from scipy.ndimage import map_coordinates

    folder = shared / "data/simulated/cryodrgn_toy"
    volume = mrcfile.read(folder / "toymodel_small_nocenter.mrc").astype(np.float32)
    particles = Particles.open(folder / "toy_projections.mrcs", poses=folder / "toy_rot_trans.pkl")
    batch = particles.batch(slice(0, 8))
    c = np.arange(30) - 15
    z, y, x = np.meshgrid(c, c, c, indexing="ij")
    view = np.stack([x, y, z], -1).reshape(-1, 3)
    for row, rotation in enumerate(batch.rotation.numpy()):
        source = view @ rotation  # rows R^T (x, y, z)
        turned = map_coordinates(volume, (source[:, ::-1] + 15).T, order=1).reshape(30, 30, 30).sum(0)
        clean = image_to_half_plane(torch.from_numpy(turned), batch.half)
        low = slice(0, batch.half.count(10))
        correlation = (batch.image[row, low] * clean[low]).sum() / (batch.image[row, low].norm() * clean[low].norm())
        assert float(correlation) > 0.99


def test_cryodrgns_rotations_and_shifts_agree_between_halves_of_a_set(shared: Path, backproject) -> None:
    """Maps of the even and of the odd images, at |k| 10, under the poses as read and under wrong readings of them."""
    folder = shared / "data/simulated/cryodrgn_hand"
    kmag = radius(64, 3).round()

    def halves(particles: Particles) -> float:
        maps = [backproject(batch, batch.rotation) for batch in (particles[h::2].batch(slice(None)) for h in (0, 1))]
        a, b = (torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(v)))[kmag == 10] for v in maps)
        return float((a * b.conj()).sum().real / (a.norm() * b.norm()))

    turned = Particles.open(folder / "hand.mrcs", poses=folder / "hand_rot.pkl")
    assert halves(turned) > 0.95
    assert halves(turned.with_poses(turned.rotation.mT, turned.translation)) < 0.5
    moved = Particles.open(folder / "hand.mrcs", poses=folder / "hand_rot_trans.pkl")
    right, wrong = halves(moved), halves(moved.with_poses(moved.rotation, -moved.translation))
    assert right > wrong + 0.2


def test_euler_angles_are_those_of_the_table(case) -> None:
    particles = Particles.open(case.star())
    rows = read_star(case.folder / "particles.star")["particles"]
    expected = from_euler_deg(rows[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy())
    np.testing.assert_allclose(particles.rotation, expected, atol=1e-6)
