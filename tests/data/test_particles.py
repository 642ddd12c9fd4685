"""Particles give batches of what the files say."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_cryo.data import order as order_module
from pyro_cryo.data.order import Order
from pyro_cryo.data.particles import Particles
from pyro_cryo.data.star import read_star, write_star
from pyro_cryo.physics.fourier import HalfPlane, half_plane_to_image, image_to_half_plane, soft_disc
from pyro_cryo.physics.rotations import angle_deg, random_rotations

FIELDS = ("index", "image", "ctf", "rotation", "translation", "noise_group", "freq_scale")


def no_ctf(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.drop(columns=["rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle"])


def test_a_batch_is_the_transform_of_the_stored_images(case, device: str) -> None:
    particles = Particles.open(case.star())
    batch = particles.batch([5, 0, 2], device)
    expected = image_to_half_plane(torch.from_numpy(case.images[[5, 0, 2]]), particles.half)
    torch.testing.assert_close(batch.image.cpu(), expected, atol=1e-5, rtol=1e-5)
    assert batch.image.device.type == device
    assert batch.index.tolist() == [5, 0, 2]
    assert (batch.size, len(batch), batch.noise_scale) == (3, 3, None)
    torch.testing.assert_close(batch.rotation.cpu(), particles.rotation[[5, 0, 2]])
    assert batch.freq_scale.tolist() == [1.0, 1.0, 1.0]


def test_cropping_is_the_low_band(case) -> None:
    whole, cropped = Particles.open(case.star()), Particles.open(case.star(), box=10)
    assert cropped.apix == pytest.approx(2.0 * 16 / 10)
    a, b = whole.batch(slice(None)), cropped.batch(slice(None))
    count = len(cropped.half)
    same = [(a.half.k == k).all(-1).nonzero().item() for k in cropped.half.k]
    torch.testing.assert_close(b.image, a.image[:, same] * 10 / 16)
    torch.testing.assert_close(b.ctf, a.ctf[:, same])
    torch.testing.assert_close(whole.translation * 10 / 16, cropped.translation)
    assert b.image.shape == (6, count, 2)


def test_invert_normalize_and_window(case) -> None:
    path = case.star()
    plain = Particles.open(path).batch(slice(None)).image
    torch.testing.assert_close(Particles.open(path, invert=True).batch(slice(None)).image, -plain)
    c = np.arange(16) - 8
    outside = np.hypot(c[:, None], c) > 0.9 * 8
    background = case.images[:, outside]
    normal = (case.images - background.mean(1)[:, None, None]) / background.std(1, ddof=1)[:, None, None]
    got = Particles.open(path, normalize=True).batch(slice(None))
    torch.testing.assert_close(got.image, image_to_half_plane(torch.from_numpy(normal), got.half), atol=1e-4, rtol=1e-4)
    disc = soft_disc(16, 0.6 * 8, 0.4 * 8)
    windowed = Particles.open(path, window=0.6).batch(slice(None))
    images = torch.from_numpy(case.images)
    mean = (images * disc).sum((1, 2), keepdim=True) / disc.sum()
    torch.testing.assert_close(
        windowed.image, image_to_half_plane((images - mean) * disc, got.half), atol=1e-5, rtol=1e-5
    )


def test_a_window_does_not_leak_the_background_into_the_lowest_shells(tmp_path: Path, stack_writer) -> None:
    """A constant image is nothing: DC is not modelled."""
    stack_writer(tmp_path / "a.mrcs", np.full((1, 16, 16), 1000, np.float32))
    with pytest.warns(UserWarning, match="free of"):
        particles = Particles.open(tmp_path / "a.mrcs", window=0.7)
    batch = particles.with_poses(torch.eye(3)[None], torch.zeros(1, 2)).batch([0])
    assert float(batch.image.abs().max()) < 1e-2


def test_an_odd_box_keeps_its_centre(tmp_path: Path, new_case) -> None:
    case = new_case(tmp_path, box=17)
    particles = Particles.open(case.star(), box=16)
    expected = image_to_half_plane(torch.from_numpy(case.images[:, :16, :16]), particles.half)
    torch.testing.assert_close(particles.batch(slice(None)).image, expected)
    assert particles.apix == 2.0
    with pytest.raises(ValueError, match=r"box 17 is odd; crop with Particles\.open\(\.\.\., box=16\)"):
        Particles.open(case.star())


def test_one_object_in_two_pixel_sizes_is_one_model(tmp_path: Path, stack_writer) -> None:
    """A Gaussian displaced by (12, -7) A, sampled at 2 A in 48 pixels and at 3 A in 40: each image is the model's
    transform at k freq_scale, times the phase of its own translation."""
    sigma, displaced = 8.0, (12.0, -7.0)
    frames = {}
    for name, box, apix in (("a", 48, 2.0), ("b", 40, 3.0)):
        c = (np.arange(box) - box // 2) * apix
        frames[name] = np.exp(-((c[None] - displaced[0]) ** 2 + (c[:, None] - displaced[1]) ** 2) / (2 * sigma**2))
        stack_writer(tmp_path / f"{name}.mrcs", frames[name][None].astype(np.float32), apix)
    optics = pd.DataFrame({
        "rlnOpticsGroup": [7, 3], "rlnOpticsGroupName": ["b", "a"], "rlnVoltage": [300.0, 200.0],
        "rlnSphericalAberration": [2.7, 2.7], "rlnAmplitudeContrast": [0.1, 0.1], "rlnImagePixelSize": [3.0, 2.0],
        "rlnImageSize": [40, 48],
    })  # fmt: skip
    rows = pd.DataFrame({
        "rlnImageName": ["1@b.mrcs", "1@a.mrcs"], "rlnOpticsGroup": [7, 3], "rlnDefocusU": [5000.0, 4000.0],
        "rlnDefocusV": [5000.0, 4000.0], "rlnDefocusAngle": [0.0, 0.0], "rlnAngleRot": [0.0, 0.0],
        "rlnOriginXAngst": [-displaced[0]] * 2, "rlnOriginYAngst": [-displaced[1]] * 2,
    })  # fmt: skip
    write_star(tmp_path / "p.star", {"optics": optics, "particles": rows.assign(rlnAngleTilt=0.0, rlnAnglePsi=0.0)})
    particles = Particles.open(tmp_path / "p.star")
    assert (particles.box, particles.apix, particles.n_noise_groups) == (40, pytest.approx(96 / 40), 2)
    batch = particles.batch([0, 1])
    assert batch.noise_group.tolist() == [1, 0]
    torch.testing.assert_close(batch.freq_scale, torch.tensor([96 / 120, 1.0]))
    k = batch.half.k
    point = k * batch.freq_scale[:, None, None] / 96  # cycles an angstrom
    amplitude = (
        2 * np.pi * (sigma / particles.apix) ** 2 / 40 * torch.exp(-2 * (np.pi * sigma) ** 2 * point.square().sum(-1))
    )
    angle = -2 * np.pi / 40 * (batch.translation[:, None] * k).sum(-1)
    model = torch.view_as_real(torch.polar(amplitude, angle))
    assert float((batch.image - model).abs().max()) < 1e-4 * float(amplitude.max())
    for row in (0, 1):
        direct = particles.ctf[torch.tensor([row])](point[row])
        torch.testing.assert_close(batch.ctf[row], direct[0], atol=1e-5, rtol=1e-5)


def test_rows_of_particles_are_particles(case) -> None:
    particles = Particles.open(case.star())
    whole = particles.batch(slice(None))
    mask = torch.tensor([True, False, True, True, False, False])
    for rows in (slice(1, 5, 2), mask, np.array([4, 1]), [3], torch.tensor([0, 5])):
        part = particles[rows]
        chosen = torch.arange(6)[rows if isinstance(rows, slice) else torch.as_tensor(rows)]
        batch = part.batch(slice(None))
        torch.testing.assert_close(batch.image, whole.image[chosen])
        torch.testing.assert_close(batch.ctf, whole.ctf[chosen])
        torch.testing.assert_close(part.rotation, particles.rotation[chosen])
        assert batch.index.tolist() == list(range(len(chosen)))
        assert part.half_set.tolist() == particles.half_set[chosen].tolist()
        assert (part.stack, part.apix, part.n_noise_groups) == (
            particles.stack,
            particles.apix,
            particles.n_noise_groups,
        )


def test_a_pass_visits_each_image_once(case, device: str) -> None:
    particles = Particles.open(case.star())
    whole = particles.batch(slice(None))
    batches = list(particles.batches(4, device=device))
    assert [b.index.tolist() for b in batches] == [[0, 1, 2, 3], [4, 5]]
    for name in FIELDS:
        torch.testing.assert_close(torch.cat([getattr(b, name) for b in batches]).cpu(), getattr(whole, name))


@pytest.mark.parametrize("buffered", [False, True])
def test_shuffled_passes_repeat_and_resume(
    tmp_path: Path, new_case, buffered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same seed gives the same batches, `start` the same but for the first; also where buffers are shuffled."""
    if buffered:
        monkeypatch.setattr(order_module, "SHUFFLED_WHOLE_BYTES", 1000)
        monkeypatch.setattr(order_module, "BUFFER_BYTES", 12 * 256)
        monkeypatch.setattr(order_module, "BLOCK_BYTES", 4 * 256)
    particles = Particles.open(new_case(tmp_path, count=53, box=8).star())
    whole = particles.batch(slice(None))

    def one(seed: int, start: int = 0) -> list:
        return list(particles.batches(5, generator=torch.Generator().manual_seed(seed), start=start))

    first, again, other = one(1), one(1), one(2)
    index = torch.cat([b.index for b in first])
    assert index.sort().values.tolist() == list(range(53))
    assert [b.index.tolist() for b in first] == [b.index.tolist() for b in again]
    assert index.tolist() != torch.cat([b.index for b in other]).tolist()
    assert [len(b) for b in first] == [5] * 10 + [3]
    for batch in first:
        torch.testing.assert_close(batch.image, whole.image[batch.index])
        torch.testing.assert_close(batch.rotation, whole.rotation[batch.index])
    for start in range(12):
        assert [b.index.tolist() for b in one(1, start)] == [b.index.tolist() for b in first[start:]]


def test_two_box_sizes_in_one_buffer(tmp_path: Path, stack_writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "SHUFFLED_WHOLE_BYTES", 0)
    rng = np.random.default_rng(0)
    stacks = {
        "a": rng.normal(size=(20, 8, 8)).astype(np.float32),
        "b": rng.normal(size=(20, 12, 12)).astype(np.float32),
    }
    for name, images in stacks.items():
        stack_writer(tmp_path / f"{name}.mrcs", images)
    (tmp_path / "p.star").write_text(
        "data_optics\nloop_\n_rlnOpticsGroup\n_rlnImagePixelSize\n1 3\n2 2\n\ndata_particles\nloop_\n_rlnImageName\n"
        "_rlnOpticsGroup\n_rlnAngleRot\n_rlnAngleTilt\n_rlnAnglePsi\n"
        + "".join(f"{i + 1}@{n}.mrcs {g} {i} 1 2\n" for i in range(20) for n, g in (("a", 1), ("b", 2)))
    )
    with pytest.warns(UserWarning, match="free of CTF"):
        particles = Particles.open(tmp_path / "p.star")
    assert particles.box == 8
    for batch in particles.batches(7, generator=torch.Generator().manual_seed(0)):
        for row, image in zip(batch.index.tolist(), batch.image, strict=True):
            raw = torch.from_numpy(stacks["ab"[row % 2]][row // 2])
            torch.testing.assert_close(image, image_to_half_plane(raw, batch.half), atol=1e-5, rtol=1e-5)


def test_a_large_set_is_shuffled_in_blocks_on_disk() -> None:
    """50 GB of images: rows of a buffer are runs of neighbours, a pass is a permutation, and it is well mixed."""
    image_bytes, count = 4 * 128**2, 800_000
    order = Order.of(count, image_bytes, 100, torch.Generator().manual_seed(0))
    assert torch.equal(order.rows.sort().values, torch.arange(count))
    assert order.buffer % 100 == 0
    assert 64 << 20 <= order.buffer * image_bytes <= 128 << 20
    buffer = order.rows[: order.buffer].sort().values
    runs = 1 + int((buffer.diff() != 1).sum())
    assert len(buffer) / runs > 10
    batch = order.rows[:100].double()
    assert 0.4 * count < float(batch.mean()) < 0.6 * count
    assert float(batch.std()) > 0.2 * count


def test_errors_of_the_reading_thread_arrive_and_the_thread_ends(case, stack_writer) -> None:
    images = case.images.copy()
    images[4, 3, 3] = np.nan
    stack_writer(case.folder / "particles.mrcs", images)
    particles = Particles.open(case.star())
    seen = []
    with pytest.raises(ValueError, match=r"image 4 \(5@particles\.mrcs\) has pixels that are not finite.*subset"):
        seen.extend(batch.index.tolist() for batch in particles.batches(2))
    assert seen == [[0, 1], [2, 3]]
    abandoned = particles.batches(2)
    next(abandoned)
    abandoned.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("read-ahead")]
    assert len(Particles.open(case.star(), subset=[0, 1, 2, 3, 5]).batch(slice(None))) == 5


def test_without_poses_a_batch_says_so(case) -> None:
    particles = Particles.open(case.star(lambda t: t.drop(columns=["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"])))
    assert not particles.has_poses
    with pytest.raises(ValueError, match=r"particles\.star has no poses; give a cryoDRGN"):
        particles.batch([0])
    given = particles.with_poses(random_rotations(6), torch.ones(6, 2))
    torch.testing.assert_close(given.batch(slice(None)).translation, torch.ones(6, 2))


def test_without_ctf_it_is_one(case) -> None:
    with pytest.warns(UserWarning, match="free of CTF"):
        particles = Particles.open(case.star(no_ctf))
    assert particles.ctf is None
    assert bool((particles.batch(slice(None)).ctf == 1).all())


def test_premultiplied_stacks(case) -> None:
    plain = Particles.open(case.star()).batch(slice(None))
    path = case.star(optics=lambda t: t.assign(rlnCtfDataAreCtfPremultiplied=1))
    batch = Particles.open(path).batch(slice(None))
    torch.testing.assert_close(batch.ctf, plain.ctf.square())
    torch.testing.assert_close(batch.noise_scale, plain.ctf.abs().clamp_min(0.1))


def test_the_fingerprint_is_of_the_content(case, tmp_path: Path) -> None:
    path = case.star()
    first = Particles.open(path).fingerprint()
    assert Particles.open(path).fingerprint() == first
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / "particles.mrcs").write_bytes((case.folder / "particles.mrcs").read_bytes())
    (moved / "other.star").write_bytes(path.read_bytes())
    assert Particles.open(moved / "other.star").fingerprint() == first
    changed = [
        Particles.open(path, invert=True), Particles.open(path, box=12), Particles.open(path, apix=3.0),
        Particles.open(path, first=5), Particles.open(path, window=0.8), Particles.open(path, normalize=True),
        Particles.open(case.star(lambda t: t.assign(rlnDefocusU=3100.0))),
        Particles.open(case.star(lambda t: t.assign(rlnAngleRot=t.rlnAngleRot + 1))),
    ]  # fmt: skip
    assert len({first, *(p.fingerprint() for p in changed)}) == 1 + len(changed)


def test_subsets(case, tmp_path: Path) -> None:
    path = case.star()
    (tmp_path / "s.txt").write_text("4\n0\n2\n")
    np.save(tmp_path / "s.npy", np.array([4, 0, 2]))
    import pickle

    (tmp_path / "s.pkl").write_bytes(pickle.dumps(np.array([4, 0, 2])))
    Particles.open(path)[[4, 0, 2]].write_star(tmp_path / "s.star")
    whole = Particles.open(path).batch(slice(None))
    for subset in ([4, 0, 2], *(tmp_path / f"s.{kind}" for kind in ("txt", "npy", "pkl", "star"))):
        particles = Particles.open(path, subset=subset)
        torch.testing.assert_close(particles.batch(slice(None)).image, whole.image[[4, 0, 2]])
        torch.testing.assert_close(particles.rotation, whole.rotation[[4, 0, 2]])
    assert Particles.open(path, subset=tmp_path / "s.txt", first=2).table.frame.tolist() == [4, 0]
    assert Particles.open(path, subset=np.arange(6) > 3).table.frame.tolist() == [4, 5]
    assert len(Particles.open(path, first=100)) == 6


def test_subsets_pick_from_pickles_too(case, tmp_path: Path) -> None:
    import pickle

    rotation = random_rotations(6).numpy()
    (tmp_path / "poses.pkl").write_bytes(pickle.dumps((rotation, np.full((6, 2), 0.25))))
    particles = Particles.open(case.star(), poses=tmp_path / "poses.pkl", subset=[3, 1])
    np.testing.assert_allclose(particles.rotation, rotation[[3, 1]], atol=1e-6)
    torch.testing.assert_close(particles.translation, torch.full((2, 2), -4.0))


def test_a_star_written_and_opened_is_the_same(case, tmp_path: Path) -> None:
    particles = Particles.open(case.star(), box=12)
    out = tmp_path / "deep" / "out.star"
    out.parent.mkdir()
    particles[[5, 2, 1]].write_star(out, extra={"rlnScore": np.array([0.5, 0.25, 1e-7])})
    again = Particles.open(out, box=12)
    a, b = particles[[5, 2, 1]].batch(slice(None)), again.batch(slice(None))
    for name in FIELDS:
        torch.testing.assert_close(getattr(a, name), getattr(b, name))
    rows = read_star(out)["particles"]
    assert rows["rlnImageName"].iloc[0] == "000006@../particles.mrcs"
    assert rows["rlnScore"].tolist() == [0.5, 0.25, 1e-7]
    assert rows["rlnMicrographName"].iloc[0] == "a micrograph.mrc"  # columns of the input stay
    before = read_star(case.folder / "particles.star")["particles"].iloc[[5, 2, 1]]
    np.testing.assert_array_equal(rows["rlnAngleRot"], before["rlnAngleRot"])  # to the last digit


def test_new_poses_are_written(case, tmp_path: Path) -> None:
    particles = Particles.open(case.star(), box=12)
    rotation, translation = random_rotations(6), torch.randn(6, 2)
    particles.write_star(tmp_path / "out.star", rotation, translation)
    again = Particles.open(tmp_path / "out.star", box=12)
    assert float(angle_deg(again.rotation, rotation).max()) < 0.01
    torch.testing.assert_close(again.translation, translation, atol=1e-5, rtol=1e-5)
    origins = read_star(tmp_path / "out.star")["particles"]["rlnOriginXAngst"]
    np.testing.assert_allclose(origins, -translation[:, 0] * particles.apix, rtol=1e-5)
    with pytest.raises(ValueError, match=r"expected \(6, 3, 3\)"):
        particles.write_star(tmp_path / "bad.star", rotation[:3], translation)
    with pytest.raises(ValueError, match="column rlnScore has shape"):
        particles.write_star(tmp_path / "bad.star", extra={"rlnScore": np.zeros(3)})
    assert not (tmp_path / "bad.star").exists()


def test_new_defocus_is_written(case, tmp_path: Path) -> None:
    particles = Particles.open(case.star())
    offset = torch.linspace(-300, 500, len(particles))
    particles.with_defocus(offset).write_star(tmp_path / "new.star")
    again = Particles.open(tmp_path / "new.star").ctf
    assert particles.ctf is not None
    assert again is not None
    torch.testing.assert_close(again.defocus_u_angstrom, particles.ctf.defocus_u_angstrom + offset, atol=0.01, rtol=0)
    torch.testing.assert_close(again.defocus_v_angstrom, particles.ctf.defocus_v_angstrom + offset, atol=0.01, rtol=0)
    torch.testing.assert_close(again.defocus_angle_deg, particles.ctf.defocus_angle_deg)


def test_defocus_that_cannot_be_refined(case) -> None:
    premultiplied = Particles.open(case.star(optics=lambda t: t.assign(rlnCtfDataAreCtfPremultiplied=1)))
    with pytest.raises(ValueError, match="were multiplied by their CTF, whose defocus then stays"):
        premultiplied.with_defocus(torch.zeros(len(premultiplied)))
    with pytest.warns(UserWarning, match="free of CTF"):
        bare = Particles.open(case.star(no_ctf))
    with pytest.raises(ValueError, match="has no CTF, and so no defocus to refine"):
        bare.with_defocus(torch.zeros(len(bare)))


def test_overrides_survive_being_written(case, tmp_path: Path) -> None:
    """Pickled optics and poses and another pixel size: the table that is written says them, not what the input said."""
    import pickle

    values = np.tile([16, 2.5, 2900, 2800, 30, 200, 2.0, 0.07, 0.0], (6, 1))
    (tmp_path / "ctf.pkl").write_bytes(pickle.dumps(values))
    (tmp_path / "poses.pkl").write_bytes(pickle.dumps((random_rotations(6).numpy(), np.full((6, 2), 0.1))))
    particles = Particles.open(case.star(), poses=tmp_path / "poses.pkl", ctf=tmp_path / "ctf.pkl", apix=3.0)
    assert particles.apix == 3.0
    particles.write_star(tmp_path / "out.star")
    again = Particles.open(tmp_path / "out.star")
    a, b = particles.batch(slice(None)), again.batch(slice(None))
    for name in FIELDS:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=1e-4, rtol=1e-4)


def test_cs_rows_keep_their_uid(shared: Path, tmp_path: Path, stack_writer) -> None:
    rows = np.load(shared / "data/tables/cryosparc_P12_J24_001_particles.cs")[:5].copy()
    rows["blob/shape"] = 16
    rows["blob/idx"] = np.arange(5)
    rows["blob/path"] = b">J1/a.mrc"
    stack_writer(tmp_path / "J1/a.mrc", np.random.default_rng(0).normal(size=(5, 16, 16)).astype(np.float32))
    with open(tmp_path / "in.cs", "wb") as file:
        np.save(file, rows)
    with pytest.warns(UserWarning, match="aliases"):
        particles = Particles.open(tmp_path / "in.cs")
    chosen = particles[[4, 0]]
    rotation, translation = random_rotations(2), torch.randn(2, 2)
    chosen.write_cs(tmp_path / "out.cs", rotation, translation)
    written = np.load(tmp_path / "out.cs")
    assert written["uid"].tolist() == rows["uid"][[4, 0]].tolist()
    assert written.dtype == rows.dtype
    with pytest.warns(UserWarning, match="aliases"):
        again = Particles.open(tmp_path / "out.cs")
    assert float(angle_deg(again.rotation, rotation).max()) < 0.01
    torch.testing.assert_close(again.translation, translation, atol=1e-5, rtol=1e-5)
    chosen.write_cs(tmp_path / "same.cs")
    assert np.array_equal(np.load(tmp_path / "same.cs"), rows[[4, 0]])
    chosen.write_star(tmp_path / "out.star")
    with pytest.warns(UserWarning, match="aliases"):
        star = Particles.open(tmp_path / "out.star", invert=True)  # STAR has no word for blob/sign
    a, b = chosen.batch(slice(None)), star.batch(slice(None))
    for name in FIELDS:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=1e-4, rtol=1e-4)


def test_a_list_of_stacks(tmp_path: Path, stack_writer) -> None:
    rng = np.random.default_rng(0)
    images = [rng.normal(size=(n, 8, 8)).astype(np.float32) for n in (2, 3)]
    for i, stack in enumerate(images):
        stack_writer(tmp_path / f"s{i}.mrcs", stack)
    (tmp_path / "list.txt").write_text("s0.mrcs\n\ns1.mrcs\n")
    with pytest.warns(UserWarning, match="free of"):
        particles = Particles.open(tmp_path / "list.txt")
    assert (len(particles), particles.apix) == (5, 2.0)
    batch = particles.with_poses(torch.eye(3).expand(5, 3, 3), torch.zeros(5, 2)).batch(slice(None))
    half = HalfPlane.of(8)
    torch.testing.assert_close(batch.image, image_to_half_plane(torch.from_numpy(np.concatenate(images)), half))
    assert float(half_plane_to_image(batch.image, half).std()) > 0.5


def test_one_stack_in_place_of_the_tables(case) -> None:
    def elsewhere(rows: pd.DataFrame) -> pd.DataFrame:
        return rows.assign(rlnImageName=[f"{i % 3 + 1}@Extract/m{i // 3}.mrcs" for i in range(6)])

    a = Particles.open(case.star()).batch(slice(None))
    b = Particles.open(case.star(elsewhere), datadir=case.folder / "particles.mrcs").batch(slice(None))
    torch.testing.assert_close(a.image, b.image)


def test_all_real_sets_open(shared: Path) -> None:
    real = shared / "data/real"
    tilt = real / "tilt_series_10499/warptools_test_4-tomos_10-ptcls_box-32_angpix-12_optimisation_set.star"
    sets = {
        (real / "aspire_17/sample_relion_data.star", real / "aspire_17/sample_17x200.mrcs"): (17, 200, 1.338, True),
        (real / "empiar_10076_7/empiar_10076_7.cs", None): (7, 320, 1.31, False),
        (real / "empiar_10076_7/empiar_10076_7.star", None): (7, 320, 1.31, False),
        (real / "relion31_5/relion31.star", None): (5, 256, 2.806, True),
        (real / "ribosome_subtomogram/sta_testing_bin8.star", None): (219, 64, 1.96, True),
        (tilt, None): (1430, 32, 12.0, True),
    }
    for (path, datadir), (count, box, apix, posed) in sets.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            particles = Particles.open(path, datadir=datadir)
        assert (len(particles), particles.box, particles.has_poses) == (count, box, posed)
        assert particles.apix == pytest.approx(apix, abs=1e-3)
        if not posed:
            particles = particles.with_poses(torch.eye(3).expand(count, 3, 3), torch.zeros(count, 2))
        batch = particles.batch(slice(0, 3))
        assert bool(torch.isfinite(batch.image).all())
        assert float(batch.image.std()) > 0.05
        assert float(batch.ctf.abs().max()) <= 1.0 + 1e-5
