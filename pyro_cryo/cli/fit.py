"""pyro-cryo fit"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pyro_cryo.cli.options import (
    AS_STORED,
    add_device,
    add_particles,
    add_quiet,
    device_of,
    open_particles,
    progress_of,
)
from pyro_cryo.cli.parser import add_command
from pyro_cryo.recipes import recipes

PRIORS = {"refine": ("turn_sd_deg", "shift_sd_px", "defocus_sd_angstrom"), "search": ("shift_sd_px", "maps")}
DESCENT = ("batch_size", "learning_rate", "beta", "warmup", "precision", "compile")


def add_to(commands: Any) -> None:
    """The command and its arguments.

    Settings that were not given are not in the namespace: `Settings` has the defaults, and a model that is solved can
    refuse those that were.
    """
    summary = "reconstruct a map, or a family of maps, from particles"
    parser = add_command(commands, "fit", summary, run)
    none = argparse.SUPPRESS
    add_particles(parser, AS_STORED)
    add = parser.add_argument
    add(
        "-o", "--out", type=Path, required=True, help="folder of the run: new or empty, or with --resume the run itself"
    )
    names = ", ".join(recipes())
    add("--model", default="manifold", help=f"a recipe ({names}), or a .py file, whose last CryoModel it takes")
    add("--zdim", type=int, default=none, help="dimension of the latent coordinate (default: the model's)")
    add("--symmetry", default=none, help="point group of the map: C1, C4, D7, T, O, I (default: C1)")
    add("--mask", default=none, help="solvent mask: auto, none or a map of values 0 to 1 (default: auto)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other argument of the model, as in Python; repeatable",
    )
    add("--resume", action="store_true", help="go on with the run in -o; give the arguments that it was started with")
    add = parser.add_argument_group("poses").add_argument
    add(
        "--poses",
        dest="poses_are",
        choices=["known", "refine", "search"],
        default=none,
        help="known: the table's; refine: about the table's; search: from nothing (default: the model's, mostly known)",
    )
    add("--turn-sd-deg", type=float, default=none, help="to refine: sd about each axis, to begin with (default: 5)")
    add(
        "--shift-sd-px",
        type=float,
        default=none,
        help="sd of shifts along each axis, pixels (default: to refine 2, to search 4%% of the box)",
    )
    add(
        "--search-maps",
        dest="maps",
        type=int,
        default=none,
        help="to search: maps at once (default: 1; of classes as many as there are)",
    )
    add(
        "--defocus-sd-angstrom",
        type=float,
        default=none,
        help="to refine the defocus too: its sd about the table's to begin with, 300 say (default: 0, it is known)",
    )
    add = parser.add_argument_group("descent (models that are not solved for)").add_argument
    add("--epochs", "-n", type=int, default=none, help="passes over the data (default: the model's)")
    add("--batch-size", "-b", type=int, default=none, help="images a step (default: 16)")
    add("--learning-rate", "--lr", type=float, default=none, help="of Adam, falling to 0 (default: 0.001)")
    add(
        "--beta",
        type=float,
        default=none,
        help="weight of the prior of z; 1 is the evidence lower bound (default: 1.0)",
    )
    add("--warmup", type=float, default=none, help="passes in which that weight rises from 0 (default: 1.0)")
    add(
        "--precision",
        choices=["float32", "bf16"],
        default=none,
        help="arithmetic of the networks (default: float32)",
    )
    add("--compile", action="store_true", default=none, help="compile the networks (needs a C compiler on a CPU)")
    machine = parser.add_argument_group("machine")
    add = machine.add_argument
    add("--seed", type=int, default=0, help="of starting values, order and draws")
    add_device(machine)
    add("--threads", type=int, default=none, help="processor threads (default: all cores)")
    add("--save-every-s", type=float, default=300.0, help="seconds between checkpoints within a pass")
    add_quiet(machine)


def run(asked: argparse.Namespace) -> None:
    """Fit a model and leave a run."""
    import torch

    from pyro_cryo.inference.fit import Settings, fit
    from pyro_cryo.inference.state import load_class

    if "threads" in asked:
        if asked.threads < 1:
            raise ValueError(f"threads is {asked.threads}; expected 1 or more")
        torch.set_num_threads(asked.threads)
    settings = {name: getattr(asked, name) for name in (*DESCENT, "epochs", "seed", "save_every_s") if name in asked}
    settings["device"] = device_of(asked)
    Settings(**settings)  # what is wrong with them is said before the particles are read
    kind = load_class(asked.model)
    refuse_descent(kind, asked)
    particles = open_particles(asked)
    torch.manual_seed(asked.seed)
    model = build(kind, asked, particles)
    set_poses(model, asked)
    found = fit(model, particles, asked.out, resume=asked.resume, progress=progress_of(asked), **settings)
    last = f", loss {found.records[-1]['loss']:.4f} nats an image" if "loss" in found.records[-1] else ""
    shape = f", z of dimension {found.model.zdim}" if found.model.zdim else ""
    if found.defocus is not None:
        shape += f", defocus off by {found.defocus.spread:.0f} A and known to {float(found.defocus.sd.median()):.0f} A"
    size = f"{len(particles)} images of {particles.box} px at {particles.apix:.3f} A"
    print(f"{size}{shape}{last}; the run is in {asked.out}")


def refuse_descent(kind: Any, asked: argparse.Namespace) -> None:
    """Raise where a model that is solved was given a setting that would do nothing."""
    given = [name for name in DESCENT if name in asked]
    if kind.epochs == 0 and given:
        name, option = given[0], given[0].replace("_", "-")
        raise ValueError(
            f"{name} is {getattr(asked, name)}, but {kind.__name__} is solved, not descended; leave --{option} out"
        )


def build(kind: Any, asked: argparse.Namespace, particles: Any) -> Any:
    """The model that the command line describes, told the box and the noise groups of the data."""
    from pyro_cryo.model import takes

    known = takes(kind)
    arguments: dict[str, Any] = {"box": particles.box, "noise_groups": particles.n_noise_groups}
    arguments = {k: v for k, v in arguments.items() if k in known}
    given = {name: getattr(asked, name) for name in ("zdim", "symmetry", "mask") if name in asked}
    for setting in asked.set:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting} is not NAME=VALUE; for example --set width=128")
        if name in arguments:
            raise ValueError(f"--set {setting}: {name} comes from the particles; use --box for another box")
        given[name] = _value(value)
    for name in given:
        if name not in known:
            others = ", ".join(k for k in known if k not in ("box", "noise_groups"))
            raise ValueError(f"model {kind.__name__} has no argument {name}; it takes {others or 'none'}")
    try:
        return kind(**arguments, **given)
    except (TypeError, RuntimeError) as error:
        said = ", ".join(f"{name}={value!r}" for name, value in given.items()) or "no arguments"
        raise ValueError(f"model {kind.__name__} cannot be built with {said} ({error}); mend them") from error


def set_poses(model: Any, asked: argparse.Namespace) -> None:
    """Give the model the prior of poses that was asked for."""
    from pyro_cryo.pose import AnyPose, KnownPose, PoseAbout

    spread = {name: getattr(asked, name) for names in PRIORS.values() for name in names if name in asked}
    choice = getattr(asked, "poses_are", None)
    useless = [name for name in spread if name not in PRIORS.get(str(choice), ())]
    if useless:
        name, option = useless[0], "search-maps" if useless[0] == "maps" else useless[0].replace("_", "-")
        raise ValueError(
            f"{name} is {spread[name]:g}, but poses are {choice or 'known'}; leave --{option} out, "
            f"or give --poses {'search' if name == 'maps' else 'refine'}"
        )
    match choice:
        case "known":
            model.poses = KnownPose()
        case "refine":
            model.poses = PoseAbout(**spread)
        case "search":
            model.poses = AnyPose(**{"shift_sd_px": model.box / 25, **spread})


def _value(text: str) -> Any:
    import ast

    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
