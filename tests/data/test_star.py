"""STAR files, tidy and not."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pyro_cryo.data.star import numbers, read_star, write_star


def test_what_is_written_is_read(tmp_path: Path) -> None:
    table = pd.DataFrame({"rlnImageName": ["1@a b.mrcs", "2@c.mrcs"], "rlnX": [1.5, -2e-7], "rlnN": [3, 4]})
    write_star(tmp_path / "a.star", {"optics": table.iloc[:1], "particles": table})
    blocks = read_star(tmp_path / "a.star")
    assert list(blocks) == ["optics", "particles"]
    pd.testing.assert_frame_equal(blocks["particles"], table, check_dtype=False)
    assert [p.name for p in tmp_path.iterdir()] == ["a.star"]


def test_the_starfile_library_reads_what_is_written(tmp_path: Path) -> None:
    import starfile

    table = pd.DataFrame({"rlnImageName": ["1@a.mrcs", "2@c.mrcs"], "rlnX": [1.5, -2e-7]})
    write_star(tmp_path / "a.star", {"particles": table})
    pd.testing.assert_frame_equal(starfile.read(tmp_path / "a.star"), table, check_dtype=False)


def test_junk_between_and_around_the_rows(tmp_path: Path) -> None:
    (tmp_path / "a.star").write_text(
        "co1\tco2\n\t\t\ndata_\t\t\n\t\t\nloop_ \t\n_rlnImageName #1\t\n_rlnX\n# a comment\n1@a.mrcs\t2\t\n\n"
        "# another\n'2@b c.mrcs' 3\n\n\ndata_general\n_rlnKey  'some value' \n"
    )
    blocks = read_star(tmp_path / "a.star")
    assert blocks[""].to_numpy().tolist() == [["1@a.mrcs", 2], ["2@b c.mrcs", 3]]
    assert blocks["general"] == {"rlnKey": "some value"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no data_ block"),
        ("loop_\n_rlnX\n1\n", "no data_ block"),
        ("data_\nloop_\n_rlnX\n_rlnY\n1 2\n3\n", "cut short: its last row has 1 values for 2"),
        ("data_\nloop_\n_rlnX\n_rlnY\n1 2\n1 2 3\n3 4\n", "not a readable STAR table"),
        ("data_\nloop_\n_rlnX\n_rlnY\n1 2 3\n3 4 5\n", "rows of 3 values for 2 columns"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.star").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_star(tmp_path / "a.star")


def test_numbers_name_the_bad_row() -> None:
    table = pd.DataFrame({"rlnX": ["1", "abc"], "rlnY": [1.0, np.nan]})
    with pytest.raises(ValueError, match="rlnX of row 1 is 'abc'"):
        numbers(table, "rlnX", Path("a.star"))
    with pytest.raises(ValueError, match="rlnY of row 1 is 'nan'"):
        numbers(table, "rlnY", Path("a.star"))
    with pytest.raises(ValueError, match="no column rlnZ"):
        numbers(table, "rlnZ", Path("a.star"))
    assert numbers(table, "rlnZ", Path("a.star"), default=7).tolist() == [7, 7]


def test_real_tables_are_read_as_the_starfile_library_reads_them(shared: Path, tmp_path: Path) -> None:
    import starfile

    paths = [*sorted((shared / "data").rglob("*.star")), *sorted((shared / "data").rglob("*.star.gz"))]
    assert len(paths) >= 12
    for path in paths:
        if path.suffix == ".gz":
            (tmp_path / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
            path = tmp_path / path.stem
        ours, theirs = read_star(path), starfile.read(path, always_dict=True)
        assert list(ours) == list(theirs)
        for name, block in ours.items():
            if isinstance(block, dict):
                assert block == {key: str(value) for key, value in theirs[name].items()}
            else:
                pd.testing.assert_frame_equal(block, theirs[name], check_dtype=False)
