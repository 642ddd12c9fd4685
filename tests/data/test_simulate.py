"""Simulated particles are what their truth says, and are made as asked."""

import dataclasses
import gzip
import os
import subprocess
import sys
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

from pyro_cryo.data.blobs import Complex
from pyro_cryo.data.density_maps import kaiser_bessel_grid, read_kaiser_bessel
from pyro_cryo.data.mrc_map import write_map
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import (
    TOYS,
    DensityMaps,
    classes,
    from_maps,
    from_pdb,
    hinge,
    rotor,
    simulate,
    ten_classes,
    two_arms,
)
from pyro_cryo.physics.ctf import CTF
from pyro_cryo.physics.fourier import HalfPlane, image_to_half_plane, shift_phase
from pyro_cryo.physics.rotations import angle_deg, from_euler_deg, random_rotations
from pyro_cryo.progress import Progress

BOX = 32


def smooth_hinge(n_states: int = 3) -> tuple[Complex, float]:
    """Blobs wide enough (1.3 pixels) that nothing aliases, filling 60% of the box."""
    complex_ = hinge(n_states)
    apix = 2 * complex_.radius_angstrom / (0.6 * BOX)
    return dataclasses.replace(complex_, sigma_angstrom=1.3 * apix), apix


def exact_slice(volume: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The transform of a volume at any frequencies (P, 3), by the sum over its voxels, in float64."""
    box = volume.shape[-1]
    grid = torch.arange(box, dtype=torch.float64) - box // 2
    ex, ey, ez = (torch.exp(-2j * np.pi / box * k[:, i : i + 1].double() * grid) for i in range(3))
    return torch.einsum("zyx,pz,py,px->p", volume.to(torch.complex128), ez, ey, ex) / box


def star_columns(path: Path) -> dict[str, list[str]]:
    """The particle table of a STAR file, column by column."""
    lines = path.read_text().split("data_particles")[1].splitlines()
    names = [line.split()[0] for line in lines if line.startswith("_rln")]
    rows = [line.split() for line in lines if "@" in line]
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def truth_of(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "truth.npz") as file:
        return dict(file)


def test_the_projection_along_z_is_the_sum_over_z() -> None:
    source, apix = smooth_hinge()
    volume = source.volume(1, BOX, apix)
    image = source.projector(1, BOX, apix)(torch.eye(3)[None], torch.zeros(1, 2))[0]
    torch.testing.assert_close(image, volume.sum(0), rtol=1e-5, atol=1e-5 * float(image.max()))


def test_a_projection_is_a_central_slice_of_the_volume() -> None:
    source, apix = smooth_hinge()
    volume, half = source.volume(0, BOX, apix), HalfPlane.of(BOX)
    rotation, shift = random_rotations(4, torch.Generator().manual_seed(0)), torch.tensor([[1.5, -2.25]] * 4)
    images = torch.view_as_complex(image_to_half_plane(source.projector(0, BOX, apix)(rotation, shift), half))
    expected = torch.stack([exact_slice(volume, half.k @ r[:2]) for r in rotation]) * shift_phase(half.k, shift, BOX)
    assert (images - expected).abs().norm() < 1e-3 * expected.abs().norm()


def test_the_interpolated_transform_of_a_map_is_accurate_to_one_in_ten_thousand() -> None:
    volume = torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(1))
    k = 8 * (2 * torch.rand(200, 3, generator=torch.Generator().manual_seed(2)) - 1)
    expected = exact_slice(volume, k)
    error = (read_kaiser_bessel(kaiser_bessel_grid(volume), k) - expected).abs().norm() / expected.abs().norm()
    assert error < 1e-4


def test_maps_and_blobs_give_the_same_images() -> None:
    source, apix = smooth_hinge()
    maps = DensityMaps(source.volume(2, BOX, apix)[None], apix)
    rotation, shift = random_rotations(3, torch.Generator().manual_seed(3)), torch.tensor([[0.5, 1.25]] * 3)
    a = source.projector(2, BOX, apix)(rotation, shift)
    b = maps.projector(0, BOX, apix)(rotation, shift)
    assert (a - b).norm() < 2e-3 * a.norm()


def test_maps_on_another_grid_keep_their_density() -> None:
    source, apix = smooth_hinge()
    maps = DensityMaps(source.volume(0, BOX, apix)[None], apix)
    assert maps.apix_for(2 * BOX, None) == pytest.approx(apix / 2)
    finer = maps.volume(0, 2 * BOX, apix / 2)
    torch.testing.assert_close(finer[::2, ::2, ::2], maps.volume(0, BOX, apix), atol=2e-3, rtol=0)


@pytest.mark.parametrize("snr", [0.05, 2.0])
def test_images_have_the_snr_and_the_noise_that_truth_states(tmp_path: Path, snr: float) -> None:
    source, apix = smooth_hinge()
    simulate(source, tmp_path / "noisy", n_images=300, box=BOX, apix=apix, snr=snr, seed=5)
    simulate(source, tmp_path / "clean", n_images=300, box=BOX, apix=apix, snr=1e8, seed=5)
    noisy, clean = (mrcfile.read(tmp_path / name / "particles.mrcs").astype(float) for name in ("noisy", "clean"))
    truth, other = truth_of(tmp_path / "noisy"), truth_of(tmp_path / "clean")
    signal = clean * float(truth["volumes"].max() / other["volumes"].max())  # to the scale of the noisy images
    noise = noisy - signal
    assert signal.var() / noise.var() == pytest.approx(snr, rel=0.02)
    assert noise.std() == pytest.approx(float(truth["noise_sd"]), rel=0.01)
    assert noisy.var() == pytest.approx(1.0, rel=0.02)


def test_the_image_is_ctf_times_shifted_slice_of_the_stated_volume(tmp_path: Path) -> None:
    source, apix = smooth_hinge()
    star = simulate(source, tmp_path, n_images=12, box=BOX, apix=apix, snr=1e8, seed=1)
    truth, table, half = truth_of(tmp_path), star_columns(star), HalfPlane.of(BOX)
    image = torch.from_numpy(mrcfile.read(tmp_path / "particles.mrcs"))
    columns = torch.from_numpy(truth["ctf"])[:, 2:].T
    ctf = CTF(*columns, torch.zeros(12), torch.ones(12))(half.k / (BOX * apix))
    rotation, shift = torch.from_numpy(truth["rotation"]), torch.from_numpy(truth["shift_px"])
    slices = torch.stack(
        [
            exact_slice(torch.from_numpy(truth["volumes"][s]), half.k @ r[:2])
            for s, r in zip(truth["state"], rotation, strict=True)
        ]
    )
    expected = ctf * shift_phase(half.k, shift, BOX) * slices
    found = torch.view_as_complex(image_to_half_plane(image, half))
    assert (found - expected).abs().norm() < 2e-3 * expected.abs().norm()
    # the table says the same, in RELION's angles, signs and units
    euler = np.array([table[f"_rlnAngle{a}"] for a in ("Rot", "Tilt", "Psi")], float).T
    assert float(angle_deg(torch.from_numpy(from_euler_deg(euler)).float(), rotation).max()) < 1e-3
    origin = np.array([table[f"_rlnOrigin{a}Angst"] for a in "XY"], float).T
    np.testing.assert_allclose(origin, -truth["shift_px"] * apix, atol=1e-4)
    np.testing.assert_allclose(np.array(table["_rlnDefocusU"], float), truth["ctf"][:, 2], atol=1e-2)
    np.testing.assert_allclose(truth["coordinate"], source.coordinate.numpy()[truth["state"]])


def test_poses_are_uniform_and_states_are_all_seen(tmp_path: Path) -> None:
    simulate(hinge(5), tmp_path, n_images=2000, box=8, seed=2)
    truth = truth_of(tmp_path)
    assert set(truth["state"]) == set(range(5))
    # under the Haar measure every entry of R has mean 0 and variance 1 / 3
    np.testing.assert_allclose(truth["rotation"].mean(0), 0, atol=0.06)
    np.testing.assert_allclose(truth["rotation"].var(0), 1 / 3, atol=0.03)


def test_coloured_noise_has_the_asked_spectrum_and_variance(tmp_path: Path) -> None:
    power = np.linspace(4, 1, BOX // 2 + 1)
    simulate(hinge(1), tmp_path, n_images=400, box=BOX, snr=1e-4, noise_power=power.tolist(), seed=3)
    half = HalfPlane.of(BOX)
    values = image_to_half_plane(torch.from_numpy(mrcfile.read(tmp_path / "particles.mrcs")), half)
    spectrum = torch.zeros(half.shells).index_add_(0, half.shell, values.square().mean((0, 2)))
    spectrum = spectrum[1:-1] / torch.bincount(half.shell)[1:-1]
    np.testing.assert_allclose(spectrum / spectrum.mean(), power[1:-1] / power[1:-1].mean(), rtol=0.08)
    noise_sd = float(truth_of(tmp_path)["noise_sd"])
    assert mrcfile.read(tmp_path / "particles.mrcs").std() == pytest.approx(noise_sd, rel=0.01)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        simulate(classes(), tmp_path / name, n_images=20, box=16, seed=seed)
    for file in ("particles.mrcs", "particles.star", "truth.npz"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b, file
        assert a != c, file
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["particles.mrcs", "particles.star", "truth.npz"]


def test_the_stack_is_a_valid_image_stack_with_its_pixel_size(tmp_path: Path) -> None:
    simulate(hinge(2), tmp_path, n_images=6, box=16, apix=10.0)
    with mrcfile.open(tmp_path / "particles.mrcs") as file:
        assert file.is_image_stack()
        assert file.data.shape == (6, 16, 16)
        assert float(file.voxel_size.x) == pytest.approx(10.0)
        assert float(file.header.dmax) == pytest.approx(float(file.data.max()))
        assert float(file.header.rms) == pytest.approx(float(file.data.std()), rel=1e-4)


@pytest.mark.parametrize("name", sorted(TOYS))
def test_toys_are_asymmetric_and_their_states_differ(name: str) -> None:
    source = TOYS[name]()
    apix = source.apix_for(BOX, None)
    volume = source.volume(len(source) // 2, BOX, apix)
    inner = volume[1:, 1:, 1:]  # symmetric about the centre voxel
    norm = inner.norm() ** 2
    for dims in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
        assert float((inner * inner.flip(dims)).sum() / norm) < 0.9
    first, *others = (source.volume(state, BOX, apix) for state in (0, len(source) // 2, len(source) - 1))
    assert min(float((first * other).sum() / (first.norm() * other.norm())) for other in others) < 0.9
    assert float((volume.sum() - inner[1:-1, 1:-1, 1:-1].sum()) / volume.sum()) < 1e-3  # nothing at the faces


def test_the_rotor_turns_full_circle() -> None:
    source = rotor(8)
    torch.testing.assert_close(source.coordinate.norm(dim=1), torch.ones(8))
    step = (source.xyz[:, 140:] - source.xyz[:, 140:].roll(-1, 0)).norm(dim=-1).mean(1)
    torch.testing.assert_close(step, step.mean().expand(8))  # as far from the last to the first as between others
    torch.testing.assert_close(source.xyz[0, :140], source.xyz[4, :140])


def test_two_arms_swing_independently() -> None:
    xyz = two_arms(3).xyz.unflatten(0, (3, 3))
    body, first, second = xyz[:, :, :140], xyz[:, :, 140:200], xyz[:, :, 200:]
    torch.testing.assert_close(body, body[:1, :1].expand_as(body))
    torch.testing.assert_close(first, first[:, :1].expand_as(first))
    torch.testing.assert_close(second, second[:1].expand_as(second))
    for arm, axis in ((first, 0), (second, 1)):
        ends = arm.select(axis, 2) - arm.select(axis, 0)
        assert float(ends.norm(dim=-1).mean()) > 20


def test_ten_classes_bind_different_subunits() -> None:
    source = ten_classes()
    assert len(source.weight.unique(dim=0)) == 10
    assert bool((source.weight[:, :110] == 1).all())


def test_the_hinge_moves_one_rigid_domain_through_ninety_degrees() -> None:
    xyz = hinge(3).xyz
    body, arm = xyz[:, :140], xyz[:, 140:]
    torch.testing.assert_close(body[0], body[2])
    distance = torch.cdist(arm.double(), arm.double())
    torch.testing.assert_close(distance[0], distance[2], atol=1e-3, rtol=0)
    a, b = arm[0] - arm[0].mean(0), arm[2] - arm[2].mean(0)
    u, _, v = torch.linalg.svd(b.T @ a)
    assert float(angle_deg(u @ v, torch.eye(3))) == pytest.approx(90, abs=0.1)


def atom(serial: int, name: str, x: float, y: float, z: float) -> str:
    return f"ATOM  {serial:5d}  {name:<3s} ALA A{serial:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00  0.00           C\n"


def test_pdb_models_are_states_about_their_mean(tmp_path: Path) -> None:
    text = ""
    for model, x in enumerate((0.0, 8.0), 1):
        text += f"MODEL     {model:4d}\n" + atom(1, "CA", x, 0, 0) + atom(2, "CB", 9, 9, 9) + atom(3, "P", 4, 6, 0)
        text += "ENDMDL\n"
    (tmp_path / "two.pdb.gz").write_bytes(gzip.compress(text.encode()))
    source = from_pdb(tmp_path / "two.pdb.gz")
    assert source.xyz.shape == (2, 2, 3)
    torch.testing.assert_close(source.xyz.mean((0, 1)), torch.zeros(3))
    torch.testing.assert_close(source.xyz[1, 0] - source.xyz[0, 0], torch.tensor([8.0, 0, 0]))
    assert source.weight[0].tolist() == [1.0, 3.0]
    assert source.coordinate.tolist() == [[0.0], [1.0]]


def test_pdb_mistakes_are_named(tmp_path: Path) -> None:
    empty, uneven = tmp_path / "water.pdb", tmp_path / "uneven.pdb"
    empty.write_text("HETATM    1  O   HOH A   1       1.000   1.000   1.000  1.00  0.00           O\n")
    uneven.write_text("MODEL 1\n" + atom(1, "CA", 0, 0, 0) + "ENDMDL\nMODEL 2\n" + atom(1, "CA", 0, 0, 0) * 2)
    with pytest.raises(ValueError, match=r"water\.pdb has no CA or P atom"):
        from_pdb(empty)
    with pytest.raises(ValueError, match=r"uneven\.pdb have \[1, 2\]"):
        from_pdb(uneven)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        from_pdb(tmp_path / "none.pdb")


def test_map_mistakes_are_named(tmp_path: Path) -> None:
    write_map(tmp_path / "a.mrc", torch.rand(8, 8, 8), 2.0)
    write_map(tmp_path / "b.mrc", torch.rand(10, 10, 10), 2.0)
    with mrcfile.new(tmp_path / "slab.mrc") as file:
        file.set_data(np.zeros((8, 8, 10), np.float32))
    with pytest.raises(ValueError, match="resample the maps"):
        from_maps([tmp_path / "a.mrc", tmp_path / "b.mrc"])
    with pytest.raises(ValueError, match="not a cube"):
        from_maps(tmp_path / "slab.mrc")
    with pytest.raises(ValueError, match="have 2 angstrom a pixel in 8 pixels, not 3"):
        simulate(from_maps(tmp_path / "a.mrc"), tmp_path / "case", n_images=2, box=8, apix=3.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"box": 33}, "box 33 is not an even number"),
        ({"snr": 0.0}, "snr 0.0 is not positive"),
        ({"snr": -1.0}, "snr -1.0 is not positive"),
        ({"n_images": 0}, "0 images"),
        ({"shift_sd_px": -1.0}, "shift_sd_px -1.0"),
        ({"defocus_angstrom": (2e4, 1e4)}, "defocus range"),
        ({"amplitude_contrast": 1.5}, "amplitude contrast 1.5"),
        ({"noise_power": [1.0, 1.0]}, "noise_power holds 2 values; give 17"),
        ({"apix": 0.5}, "does not fit a box of 32 pixels"),
    ],
)
def test_senseless_arguments_are_named_and_nothing_is_written(tmp_path: Path, wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(hinge(2), tmp_path / "case", **{"n_images": 4, "box": BOX, **wrong})
    assert not (tmp_path / "case").exists()


def test_progress_sees_every_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    totals, counts = {}, {}

    class Seen(Progress):
        def __call__(self, items, total, title, done=0, unit="batch"):
            totals[title], counts[title] = total, 0
            for item in items:
                counts[title] += 1
                yield item

    monkeypatch.setattr(Complex, "images_at_once", lambda self, box: 3)
    monkeypatch.setattr("pyro_cryo.data.simulate.NOISE_ROWS_PX", 4 * 8**2)
    seen = simulate(hinge(5), tmp_path / "seen", n_images=26, box=8, progress=Seen())
    assert counts == totals
    assert counts["add noise"] == 7
    assert counts["project"] > 26 // 3
    unseen = simulate(hinge(5), tmp_path / "unseen", n_images=26, box=8)
    assert seen.with_suffix(".mrcs").read_bytes() == unseen.with_suffix(".mrcs").read_bytes()


def test_a_case_is_not_overwritten_unasked(tmp_path: Path) -> None:
    star = simulate(hinge(2), tmp_path, n_images=2, box=8)
    before = star.read_bytes()
    with pytest.raises(ValueError, match="already holds particles"):
        simulate(hinge(2), tmp_path, n_images=3, box=8, seed=1)
    assert star.read_bytes() == before
    simulate(hinge(2), tmp_path, n_images=3, box=8, seed=1, overwrite=True)
    assert len(star_columns(star)["_rlnImageName"]) == 3


def test_the_reference_scores_read_a_case(tmp_path: Path, shared: Path) -> None:
    simulate(hinge(5), tmp_path, n_images=60, box=16, seed=4)
    truth = truth_of(tmp_path)
    np.savez(tmp_path / "volumes.npz", index=np.arange(6), volumes=truth["volumes"][truth["state"][:6]])
    np.savez(tmp_path / "latent.npz", z=truth["coordinate"])
    np.savez(tmp_path / "poses.npz", rotation=truth["rotation"], shift_px=truth["shift_px"])
    command = [sys.executable, str(shared / "yardstick" / "score.py"), str(tmp_path / "truth.npz")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    files = ["--volumes", str(tmp_path / "volumes.npz"), "--latent", str(tmp_path / "latent.npz")]
    maps = subprocess.run([*command, *files], capture_output=True, text=True, env=environment, check=True).stdout
    assert "FSC-AUC unmasked: mean 0.4375" in maps  # the whole area under a curve that is 1 up to shell D / 2 - 1
    assert "20-NN R2" in maps
    poses = ["--poses", str(tmp_path / "poses.npz")]
    scored = subprocess.run([*command, *poses], capture_output=True, text=True, env=environment, check=True).stdout
    assert "median 0.0" in scored
    assert "hand kept" in scored


def test_tilt_pairs_show_a_particle_twice(tmp_path: Path) -> None:
    star = simulate(hinge(7), tmp_path, n_images=40, box=16, snr=5.0, tilt_deg=40.0, seed=4)
    truth = truth_of(tmp_path)
    one, other = truth["rotation"][::2], truth["rotation"][1::2]
    c, s = np.cos(np.radians(40)), np.sin(np.radians(40))
    np.testing.assert_allclose(other, np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ one, atol=1e-5)
    np.testing.assert_array_equal(truth["state"][::2], truth["state"][1::2])
    assert (truth["shift_px"][::2] != truth["shift_px"][1::2]).all()
    particles = Particles.open(star)
    assert particles.n_particles == 20
    np.testing.assert_array_equal(particles.particle.numpy(), np.arange(40) // 2)
    np.testing.assert_allclose(particles.rotation.numpy(), truth["rotation"], atol=1e-4)
    with pytest.raises(ValueError, match="41 images of tilt pairs; give 42"):
        simulate(hinge(7), tmp_path / "odd", n_images=41, box=16, tilt_deg=40.0)
    with pytest.raises(ValueError, match="tilt_deg nan; give degrees"):
        simulate(hinge(7), tmp_path / "odd", n_images=42, box=16, tilt_deg=float("nan"))
