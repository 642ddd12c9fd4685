"""Tables of other people's data sets, with stacks of zeros where the images are not at hand."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_cryo.data.open import read_table
from pyro_cryo.data.particles import Particles


def zeros(path: Path, box: int, count: int) -> None:
    """A sparse stack."""
    head = bytearray(1024)
    struct.pack_into("<4i", head, 0, box, box, count, 2)
    head[208:216] = b"MAP \x44\x44\0\0"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(1024 + 4 * count * box**2)


def test_six_optics_groups(shared: Path, tmp_path: Path) -> None:
    path = shared / "data/real/relion31_5/relion31.6opticsgroups.star"
    for name in read_table(path, None, None, False).files:
        zeros(tmp_path / Path(name).name, 196, 1000)
    with pytest.warns(UserWarning, match=r"rlnBeamTiltX.*rlnOddZernike.*are not used"):
        particles = Particles.open(path, datadir=tmp_path, box=64)
    assert (len(particles), particles.n_noise_groups) == (139, 6)
    assert [group.apix for group in particles.table.groups] == [1.25, 1.24, 1.25, 1.25, 1.24, 1.25]
    assert particles.apix == pytest.approx(1.24 * 196 / 64)
    batch = particles.batch(slice(None))
    counts = torch.bincount(batch.noise_group).tolist()
    assert counts == [48, 29, 5, 7, 26, 24]  # as the rows of the file count them
    expected = torch.tensor([1.24 / group.apix for group in particles.table.groups])[batch.noise_group]
    torch.testing.assert_close(batch.freq_scale, expected)
    few = particles[batch.noise_group == 5]
    few.write_star(tmp_path / "out.star")
    with pytest.warns(UserWarning, match="are not used"):
        again = Particles.open(tmp_path / "out.star", box=64)
    assert again.n_noise_groups == 1  # groups without images are not written
    torch.testing.assert_close(again.batch(slice(None)).ctf, few.batch(slice(None)).ctf)


def test_relion_5(shared: Path, tmp_path: Path) -> None:
    for name in "ab":
        zeros(tmp_path / f"toy_images_{name}.mrcs", 448, 20)
    with pytest.warns(UserWarning, match="rlnMagMat00"):
        particles = Particles.open(shared / "data/real/relion31_5/relion5.star", datadir=tmp_path)
    assert (len(particles), particles.box, particles.apix) == (17, 448, 0.89)
    assert float(particles.ctf.voltage_kv[0]) == 100
    torch.testing.assert_close(particles.translation[0] * 0.89, torch.tensor([3.12578, 1.41031]))


def test_tables_of_four_data_sets(shared: Path, tmp_path: Path) -> None:
    """Rows, pixel size and origins (angstrom) of each, next to what stands in the files."""
    known = {
        "RyR1GCs_clustRem": (14491, 1e4 * 1.255 / 1000, (0, 0)),
        "aspire_starfile": (3796, 1e4 * 5 / 37369.207031, (0.1996, 0.1996)),
        "betagal_relion_tutorial_particles": (4501, 1.244531, (0.34896 / 1.244531, 0.348955 / 1.244531)),
    }
    for name, (count, apix, origin) in known.items():
        path = tmp_path / f"{name}.star"
        path.write_bytes(gzip.decompress((shared / f"data/tables/{name}.star.gz").read_bytes()))
        table = read_table(path, None, None, False)
        assert len(table) == count
        assert table.groups[0].apix == pytest.approx(apix)
        np.testing.assert_allclose(table.shift_px[0], -np.array(origin), atol=1e-5)
        assert table.rotation is not None
    assert float(table.ctf.voltage_kv[0]) == 200
    with pytest.raises(ValueError, match="no column rlnAmplitudeContrast"):
        read_table(shared / "data/tables/FinalRefinement-OriginalParticles-PfCRT.star", None, None, False)
    table = read_table(shared / "data/tables/t20s_10025_J209_000_particles.cs", None, None, False)
    assert (len(table), table.groups[0].box) == (11764, 256)
    assert table.groups[0].apix == pytest.approx(1.02734, abs=1e-4)
    np.testing.assert_allclose(table.shift_px[0], [-5.890625, -7.678125])
