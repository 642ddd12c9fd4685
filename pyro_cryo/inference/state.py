"""What a run leaves on disk, and reading it back: run.json, log.jsonl, checkpoint.pt."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch

import pyro_cryo
from pyro_cryo import pose
from pyro_cryo.data.particles import Particles
from pyro_cryo.model import CryoModel
from pyro_cryo.recipes import recipes

RECORD, LOG, CHECKPOINT = "run.json", "log.jsonl", "checkpoint.pt"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in its place: a reader sees the old or the new, whole."""
    beside = path.with_name(path.name + ".part")
    try:
        write(beside)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """An .npz of arrays by name."""

    def save(beside: Path) -> None:
        with beside.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    write_atomically(path, save)


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Tensors, numbers, strings and containers of them to checkpoint.pt."""
    write_atomically(folder / CHECKPOINT, lambda path: torch.save(state, path))


def load_checkpoint(folder: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state that `save_checkpoint` wrote."""
    path = folder / CHECKPOINT
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; is {folder} a run, and has it saved its first checkpoint?")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {reason}); remove it, and fit --resume starts anew"
        ) from error


def append_log(folder: Path, record: dict[str, Any]) -> None:
    """One line of log.jsonl."""
    with (folder / LOG).open("a") as file:
        file.write(json.dumps(record) + "\n")


def write_log(folder: Path, records: list[dict[str, Any]]) -> None:
    """log.jsonl anew: a resumed run drops what was logged after its checkpoint."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    write_atomically(folder / LOG, lambda path: path.write_text(text))


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of log.jsonl; a line cut short by a kill is left out."""
    path = folder / LOG
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def write_record(folder: Path, model: CryoModel, particles: Particles, settings: dict[str, Any]) -> dict[str, Any]:
    """run.json: how to build the model again, what it was fitted to and how."""
    record = {
        "model": model_reference(model),
        "arguments": json_arguments(model),
        "unsaid": sorted(set(model.arguments) - set(json_arguments(model))),
        "poses": pose_reference(model),
        "particles": {**particles.opened_with, "count": len(particles), "fingerprint": particles.fingerprint()},
        "apix": particles.apix,
        "settings": settings,
        "versions": {
            "pyro_cryo": pyro_cryo.__version__,
            "pyro": pyro.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    text = json.dumps(record, indent=2) + "\n"
    write_atomically(folder / RECORD, lambda path: path.write_text(text))
    return record


def read_record(folder: Path) -> dict[str, Any]:
    """run.json of a run."""
    path = folder / RECORD
    if not path.exists():
        raise FileNotFoundError(f"{folder} is not a run: it has no {RECORD}; give the folder that `fit -o` wrote")
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); is {folder} a run? fit it anew") from error
    missing = [name for name in ("model", "arguments", "particles", "settings") if name not in record]
    if missing:
        raise ValueError(f"{path} says nothing of {missing[0]}; is {folder} a run? fit it anew")
    return record


def model_reference(model: CryoModel) -> dict[str, str]:
    """Where a model's class is: a module's name or a file, and the class."""
    kind = type(model)
    module = sys.modules.get(kind.__module__)
    file = getattr(module, "__file__", None)
    if kind.__module__.startswith("pyro_cryo.") or file is None:
        return {"module": kind.__module__, "class": kind.__qualname__}
    return {"file": str(Path(file).resolve()), "sha256": _digest(Path(file)), "class": kind.__qualname__}


def pose_reference(model: CryoModel) -> dict[str, Any]:
    """The class of a model's prior of poses and what it was built with."""
    kind = type(model.poses)
    return {"module": kind.__module__, "class": kind.__qualname__, "arguments": getattr(model.poses, "arguments", {})}


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def json_arguments(model: CryoModel) -> dict[str, Any]:
    """What the model was built with, as JSON can say it; an argument that it cannot say is left out."""
    kept = {}
    for name, value in model.arguments.items():
        try:
            kept[name] = json.loads(json.dumps(value))
        except TypeError:
            continue
    return kept


def build_model(record: dict[str, Any]) -> CryoModel:
    """The model of run.json, with fresh parameters."""
    reference, arguments = record["model"], record["arguments"]
    if record.get("unsaid"):
        name = record["unsaid"][0]
        raise ValueError(
            f"run.json could not hold the argument {name} of {reference['class']}; give Run.load(..., model=)"
        )
    where = reference.get("file") or reference["module"]
    if "file" not in reference and not where.startswith("pyro_cryo."):
        raise ValueError(f"{reference['class']} was typed in a session; give Run.load(..., model=)")
    kind = load_class(where, reference["class"])
    if "file" in reference and _digest(Path(where)) != reference["sha256"]:
        warnings.warn(
            f"{where} has changed since the fit; its model may not be the one fitted", UserWarning, stacklevel=3
        )
    try:
        model = kind(**arguments)
    except TypeError as error:
        raise ValueError(f"{reference['class']} cannot be built again ({error}); give Run.load(..., model=)") from error
    _set_poses(model, record.get("poses", pose_reference(model)))
    return model


def _set_poses(model: CryoModel, reference: dict[str, Any]) -> None:
    """The prior of poses that run.json names."""
    if reference == pose_reference(model):
        return
    if reference["module"] != "pyro_cryo.pose":
        raise ValueError(f"the prior of poses {reference['class']} is the run's own; give Run.load(..., model=)")
    model.poses = getattr(pose, reference["class"])(**reference["arguments"])


def load_class(name: str, wanted: str | None = None) -> type[CryoModel]:
    """The CryoModel of a recipe's name, of a module or of a .py file: `wanted`, or the last one that it defines."""
    if name.endswith(".py"):
        module = _module_of_file(Path(name))
    elif name.startswith("pyro_cryo."):
        module = importlib.import_module(name)
    else:
        module = _recipe(name)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, CryoModel) and value.__module__ == module.__name__
    ]
    if not found:
        raise ValueError(f"{name} defines no subclass of pyro_cryo.model.CryoModel; write `class My(CryoModel): ...`")
    if wanted is None:
        return found[-1]
    named = [kind for kind in found if kind.__qualname__ == wanted]
    if not named:
        raise ValueError(f"{name} no longer defines {wanted}; put it back, or give Run.load(..., model=)")
    return named[-1]


def _recipe(name: str) -> Any:
    if name not in recipes():
        raise ValueError(f"model {name!r} is not known; expected {', '.join(recipes())} or the path of a .py file")
    return importlib.import_module(f"pyro_cryo.models.{name}")


def _module_of_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(
            f"model file {path} does not exist; give the path of a .py file or the name of a recipe"
        )
    name = "pyro_cryo_user_" + path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(
            f"model file {path} does not run ({type(error).__name__}: {error}); mend it, and put what a script does "
            'under `if __name__ == "__main__":`'
        ) from error
    return module
