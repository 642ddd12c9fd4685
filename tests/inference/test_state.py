"""What is on disk is whole, is not unpickled, and says how to build the model again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from pyro_cryo.inference.state import (
    append_log,
    build_model,
    json_arguments,
    load_checkpoint,
    load_class,
    model_reference,
    read_log,
    read_record,
    save_checkpoint,
    write_atomically,
    write_log,
    write_record,
)
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.models.homogeneous import Homogeneous
from pyro_cryo.recipes import recipes

TWO_MODELS = """
from pyro_cryo.models.homogeneous import Homogeneous

class First(Homogeneous):
    def __init__(self, box, note="a"):
        super().__init__(box)
        self.note = note

class Second(Homogeneous):
    pass
"""


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fails(beside: Path) -> None:
        beside.write_text("half of the n")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_atomically(path, fails)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"
    write_atomically(path, lambda beside: beside.write_text("new"))
    assert path.read_text() == "new"


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path: Path, monkeypatch) -> None:
    save_checkpoint(tmp_path, {"step": 1, "x": torch.ones(3)})

    def fails(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path, {"step": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert load_checkpoint(tmp_path)["step"] == 1


def test_checkpoints_hold_tensors_and_numbers_only(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"checkpoint\.pt does not exist; .*saved its first"):
        load_checkpoint(tmp_path)
    torch.save({"step": Path("x")}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be read") as caught:
        load_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_log_line_cut_short_is_left_out(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []
    for epoch in (1, 2):
        append_log(tmp_path, {"epoch": epoch})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"epoch": 3, "lo')
    assert read_log(tmp_path) == [{"epoch": 1}, {"epoch": 2}]
    write_log(tmp_path, [{"epoch": 1}])
    assert (tmp_path / "log.jsonl").read_text() == '{"epoch": 1}\n'


def test_the_record_builds_the_model_again(particles, tmp_path: Path) -> None:
    model = CryoDRGN(16, zdim=3, width=8, layers=2, kmax=5.0)
    written = write_record(tmp_path, model, particles, {"seed": 4})
    record = read_record(tmp_path)
    assert record == json.loads(json.dumps(written))
    assert record["settings"] == {"seed": 4}
    assert record["particles"]["first"] == 80
    again = build_model(record)
    assert type(again) is CryoDRGN
    assert again.arguments == model.arguments
    assert {k: v.shape for k, v in again.named_parameters()} == {k: v.shape for k, v in model.named_parameters()}


def test_an_argument_that_is_no_json_is_left_out() -> None:
    class Own(Homogeneous):
        def __init__(self, box: int, weight: object = None) -> None:
            super().__init__(box)

    assert json_arguments(Own(16, torch.ones(2))) == {"box": 16}


def test_a_file_of_two_models_gives_the_one_that_was_fitted(tmp_path: Path) -> None:
    path = tmp_path / "two.py"
    path.write_text(TWO_MODELS)
    assert load_class(str(path)).__name__ == "Second"
    first = load_class(str(path), "First")
    model = first(16, note="b")  # type: ignore[call-arg]
    record = {"model": model_reference(model), "arguments": json_arguments(model)}
    assert (record["model"]["file"], record["model"]["class"]) == (str(path), "First")
    again = build_model(record)
    assert (type(again).__name__, again.note) == ("First", "b")
    path.write_text("from pyro_cryo.model import CryoModel\nclass Other(CryoModel): pass\n")
    with pytest.raises(ValueError, match=r"two\.py no longer defines First"):
        build_model(record)
    path.write_text(TWO_MODELS.replace("note", "remark"))
    with pytest.raises(ValueError, match=r"First cannot be built again \(.*note.*\); give Run.load\(\.\.\., model=\)"):
        build_model(record)


def test_a_model_file_that_does_not_run_says_why(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import gone_and_lost")
    with pytest.raises(ValueError, match=r"broken\.py does not run \(ModuleNotFoundError: .*gone_and_lost.*__main__"):
        load_class(str(path))
    assert "pyro_cryo_user_broken" not in sys.modules


def test_a_model_typed_in_a_session_must_be_given() -> None:
    record = {"model": {"module": "__main__", "class": "Typed"}, "arguments": {"box": 16}}
    with pytest.raises(ValueError, match=r"Typed was typed in a session; give Run\.load\(\.\.\., model=\)"):
        build_model(record)


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_found_by_name(name: str) -> None:
    assert load_class(name).__module__ == f"pyro_cryo.models.{name}"
    assert load_class(f"pyro_cryo.models.{name}") is load_class(name)
