"""Maps survive the way to a file and back, with their geometry."""

from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

from pyro_cryo.data.mrc_map import read_map, write_map


def test_a_map_comes_back_as_it_was_written(tmp_path: Path) -> None:
    volume = torch.randn(8, 8, 8, generator=torch.Generator().manual_seed(0))
    write_map(tmp_path / "map.mrc", volume, 1.37)
    found, apix = read_map(tmp_path / "map.mrc")
    assert torch.equal(found, volume)
    assert apix == pytest.approx(1.37, rel=1e-6)
    with mrcfile.open(tmp_path / "map.mrc") as file:
        assert file.is_volume()
        assert file.header.origin.item() == (0, 0, 0)
        assert (file.header.nxstart, file.header.nystart, file.header.nzstart) == (0, 0, 0)
    assert mrcfile.validate(tmp_path / "map.mrc")


def test_writing_replaces_whole_files_and_repeats_bytes(tmp_path: Path) -> None:
    path = tmp_path / "map.mrc"
    write_map(path, torch.ones(8, 8, 8), 1.0)
    first = path.read_bytes()
    with pytest.raises(ValueError, match="not a cube"):
        write_map(path, torch.ones(8, 8, 6), 1.0)
    with pytest.raises(ValueError, match=r"voxel size 0\.0"):
        write_map(path, torch.ones(8, 8, 8), 0.0)
    assert path.read_bytes() == first
    write_map(path, torch.ones(8, 8, 8), 1.0)
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]


def test_other_axis_orders_are_put_right(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).normal(size=(6, 6, 6)).astype(np.float32)
    with mrcfile.new(tmp_path / "xyz.mrc") as file:
        file.set_data(np.ascontiguousarray(volume.transpose(1, 2, 0)))  # sections along y, rows along x, columns z
        file.voxel_size = 2.0
        file.header.maps, file.header.mapr, file.header.mapc = 2, 1, 3
    np.testing.assert_array_equal(read_map(tmp_path / "xyz.mrc")[0], volume)


def test_integers_and_half_floats_are_read(tmp_path: Path) -> None:
    volume = np.arange(64).reshape(4, 4, 4)
    for kind in (np.int8, np.int16, np.uint16, np.float16):
        with mrcfile.new(tmp_path / f"{kind.__name__}.mrc") as file:
            file.set_data(volume.astype(kind))
            file.voxel_size = 1.0
        found, _ = read_map(tmp_path / f"{kind.__name__}.mrc")
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found, volume)


@pytest.mark.filterwarnings("ignore:Data array contains NaN")
def test_what_cannot_be_a_map_is_named(tmp_path: Path) -> None:
    def put(name: str, shape: tuple[int, ...], apix: float = 1.0, value: float = 0.0) -> Path:
        with mrcfile.new(tmp_path / name) as file:
            file.set_data(np.full(shape, value, np.float32))
            file.voxel_size = apix
        return tmp_path / name

    (tmp_path / "text.mrc").write_text("not a map\n")
    whole = put("whole.mrc", (8, 8, 8)).read_bytes()
    (tmp_path / "short.mrc").write_bytes(whole[:1500])
    cases = {
        put("slab.mrc", (8, 8, 10)): "8 x 8 x 10 voxels, not a cube",
        put("odd.mrc", (7, 7, 7)): "box of 7, not an even number",
        put("nan.mrc", (8, 8, 8), value=float("nan")): "not finite",
        put("nosize.mrc", (8, 8, 8), apix=0.0): "no voxel size",
        tmp_path / "text.mrc": "MRC map",
        tmp_path / "short.mrc": "MRC map",
    }
    for path, message in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            read_map(path)
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_map(tmp_path / "none.mrc")
    assert read_map(tmp_path / "nosize.mrc", apix=3.0)[1] == 3.0


def test_reference_maps_open(shared: Path) -> None:
    volume, apix = read_map(
        shared / "data" / "real" / "tilt_series_10499" / "warptools_test_box-32_angpix-12_reconstruct.mrc"
    )
    assert volume.shape == (32, 32, 32)
    assert apix == pytest.approx(12.0, abs=0.01)
    gzipped = sorted((shared / "data" / "structures" / "50S").glob("*.mrc.gz"))[0]
    assert read_map(gzipped)[0].shape == (64, 64, 64)
