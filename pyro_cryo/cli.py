"""The command line: pyro-cryo fit | volumes | analyze | select | simulate."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pyro_cryo
from pyro_cryo.recipes import recipes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, 2 where the input was wrong, 130 where it was interrupted."""
    asked = build_parser().parse_args(arguments)
    warnings.showwarning = _show_warning
    # Threads that wait spin for microseconds, then sleep: GNU OpenMP's own milliseconds make a command several times
    # slower where another process has one of the cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        asked.command(asked)
    except KeyboardInterrupt:
        print(f"pyro-cryo: stopped{'; --resume goes on' if asked.command is fit else ''}", file=sys.stderr)
        return 130
    except Exception as error:
        if asked.debug:
            raise
        text = _one_line(error)
        expected = isinstance(error, ValueError | OSError)
        print(f"pyro-cryo: error: {text if expected else f'{type(error).__name__}: {text} (--debug)'}", file=sys.stderr)
        return 2
    return 0


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument like any other error: in one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Leave."""
        self.exit(2, f"pyro-cryo: error: {_one_line(message)}; see {self.prog} --help\n")


class Help(argparse.HelpFormatter):
    """Adds a default to the help of every option that has one and does not tell it itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        untold = default is None or isinstance(default, bool | list) or default == argparse.SUPPRESS
        if untold or "default" in text or not action.option_strings:
            return text
        if isinstance(default, tuple):
            return f"{text} (default: {' '.join(f'{value:g}' for value in default)})"
        return f"{text} (default: %(default)s)"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: "N", float: "X", Path: "PATH"}.get(action.type, action.dest.upper())  # type: ignore[call-overload]


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="pyro-cryo", description="Cryo-EM reconstruction as probabilistic programming.")
    parser.add_argument("--version", action="version", version=f"pyro-cryo {pyro_cryo.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_fit(_command(commands, "fit", "reconstruct a map, or a family of maps, from particles with poses", fit))
    _add_volumes(_command(commands, "volumes", "write maps of a run, at chosen latent coordinates", volumes))
    _add_analyze(_command(commands, "analyze", "latent plots, clusters, motions and learning curve of a run", analyze))
    _add_select(_command(commands, "select", "write the particles of a cluster or a list as STAR or .cs", select))
    _add_simulate(_command(commands, "simulate", "particles with known truth", simulate))
    return parser


def _command(
    commands: Any, name: str, summary: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        formatter_class=Help,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(command=run)
    return parser


# -------------------------------------------------------------------------------------------------------------- fit
def _add_fit(parser: argparse.ArgumentParser) -> None:
    none = argparse.SUPPRESS
    add = parser.add_argument
    add("particles", type=Path, help=".star, .cs, .mrcs with --poses-pkl and --ctf-pkl, or .txt, a list of stacks")
    add(
        "-o", "--out", type=Path, required=True, help="folder of the run: new or empty, or with --resume the run itself"
    )
    names = ", ".join(recipes())
    add("--model", default="homogeneous", help=f"a recipe ({names}), or a .py file, whose last CryoModel it takes")
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
    images = parser.add_argument_group("images")
    add = images.add_argument
    add("--box", type=int, default=none, help="Fourier-crop to this even box, pixels (default: as stored)")
    add("--apix", type=float, default=none, help="angstrom a stored pixel (default: as the files say)")
    add("--datadir", type=Path, default=none, help="folder for stacks that are not where the table says")
    add("--poses-pkl", type=Path, default=none, help="poses from a cryoDRGN .pkl")
    add("--ctf-pkl", type=Path, default=none, help="CTF from a cryoDRGN .pkl")
    add("--invert", action="store_true", help="toggle contrast, for images with dark protein")
    add("--normalize", action="store_true", help="each image to mean 0, sd 1 outside a circle 0.9 boxes across")
    add("--window", type=float, default=none, help="soft disc, a fraction of half the box (default: no window)")
    add("--first", type=int, default=none, help="only so many particles, from the first (default: all)")
    add(
        "--subset",
        type=Path,
        default=none,
        help="only those of a .txt or .npy of rows from 0, or of a .star (default: all)",
    )
    descent = parser.add_argument_group("descent (models that are not solved for)")
    add = descent.add_argument
    add("--epochs", "-n", type=int, default=none, help="passes over the data (default: the model's)")
    add("--batch-size", "-b", type=int, default=16, help="images a step")
    add("--learning-rate", "--lr", type=float, default=1e-3, help="of Adam, falling to 0")
    add("--beta", type=float, default=1.0, help="weight of the prior of z; 1 is the evidence lower bound")
    add("--warmup", type=float, default=1.0, help="passes in which that weight rises from 0")
    machine = parser.add_argument_group("machine")
    add = machine.add_argument
    add("--seed", type=int, default=0, help="of starting values, order and draws")
    add("--device", default="auto", help="cpu, cuda, cuda:1; auto takes a GPU where there is one")
    add("--precision", choices=["float32", "bf16"], default="float32", help="arithmetic of the networks")
    add("--compile", action="store_true", help="compile the networks (needs a C compiler on a CPU)")
    add("--threads", type=int, default=none, help="processor threads (default: all cores)")
    add("--save-every-s", type=float, default=300.0, help="seconds between checkpoints within a pass")
    add("--quiet", action="store_true", help="no progress bar")


def fit(asked: argparse.Namespace) -> None:
    """pyro-cryo fit"""
    import torch

    from pyro_cryo.data.particles import Particles
    from pyro_cryo.inference.fit import Settings
    from pyro_cryo.inference.fit import fit as fit_model
    from pyro_cryo.inference.state import load_class
    from pyro_cryo.progress import Bar, quiet

    if "threads" in asked:
        if asked.threads < 1:
            raise ValueError(f"threads is {asked.threads}; expected 1 or more")
        torch.set_num_threads(asked.threads)
    own = ("batch_size", "learning_rate", "beta", "warmup", "seed", "precision", "compile", "save_every_s", "epochs")
    settings = {name: getattr(asked, name) for name in own if name in asked}
    settings["device"] = _device(asked.device)
    Settings(**settings)  # what is wrong with them is said before the particles are read
    kind = load_class(asked.model)
    renamed = {"poses_pkl": "poses", "ctf_pkl": "ctf"}
    names = ("box", "apix", "datadir", "poses_pkl", "ctf_pkl", "invert", "normalize", "window", "first", "subset")
    particles = Particles.open(asked.particles, **{renamed.get(k, k): getattr(asked, k) for k in names if k in asked})
    torch.manual_seed(asked.seed)
    model = build(kind, asked, particles)
    bar = quiet if asked.quiet else Bar()
    run = fit_model(model, particles, asked.out, resume=asked.resume, progress=bar, **settings)
    last = f", loss {run.records[-1]['loss']:.4f} nats an image" if "loss" in run.records[-1] else ""
    print(f"{len(particles)} images of {particles.box} px at {particles.apix:.3f} A{last}; the run is in {asked.out}")


def build(kind: Any, asked: argparse.Namespace, particles: Any) -> Any:
    """The model that the command line describes, told the box and the noise groups of the data."""
    import inspect

    known = inspect.signature(kind.__init__).parameters
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
            takes = ", ".join(k for k in known if k not in ("self", "box", "noise_groups"))
            raise ValueError(f"model {kind.__name__} has no argument {name}; it takes {takes or 'none'}")
    try:
        return kind(**arguments, **given)
    except (TypeError, RuntimeError) as error:
        said = ", ".join(f"{name}={value!r}" for name, value in given.items()) or "no arguments"
        raise ValueError(f"model {kind.__name__} cannot be built with {said} ({error}); mend them") from error


def _value(text: str) -> Any:
    import ast

    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


# ---------------------------------------------------------------------------------------------------------- volumes
def _add_volumes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, help="folder of a run")
    add("-o", "--out", type=Path, required=True, help="folder for the maps")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--index", type=int, nargs="+", metavar="I", help="at the posterior means of z of these images")
    where.add_argument("--kmeans", type=int, metavar="K", help="at the images nearest to K cluster centres")
    where.add_argument("--z-values", type=Path, metavar="FILE", help="at the rows of a text file or .npy")
    where.add_argument("--path-along", type=int, metavar="PC", help="along a principal component of z, from 1")
    add("--steps", type=int, default=10, help="maps along --path-along")
    add("--low-pass", type=float, metavar="A", help="low-pass at so many angstrom")
    add("--bfactor", type=float, metavar="A2", help="multiply by exp(-B s^2 / 4); a negative B sharpens")
    add("--flip", action="store_true", help="write mirror images, the other hand")
    add("--overwrite", action="store_true", help="replace an earlier series")
    add("--device", default="auto", help="cpu, cuda, cuda:1; auto takes a GPU where there is one")


def volumes(asked: argparse.Namespace) -> None:
    """pyro-cryo volumes"""
    import numpy as np

    from pyro_cryo.analysis import series
    from pyro_cryo.inference.run import Run

    _refuse_to_overwrite(asked.out / series.VOLUMES, asked.overwrite)
    run = Run.load(asked.run, device=_device(asked.device))
    finish = series.finishing(run.apix, asked.low_pass, asked.bfactor, asked.flip)
    index: Any = np.array([-1])
    z = None
    if run.model.zdim:
        index, z = _points(asked, run)
    elif any(value is not None for value in (asked.index, asked.kmeans, asked.z_values, asked.path_along)):
        raise ValueError(f"{asked.run} is a fit of one map, without z; leave the choice of z out")
    paths = series.write_series(run, asked.out, index, z, finish)
    print(f"{len(paths)} maps, {series.VOLUMES} and series.cxc are in {asked.out}")


def _points(asked: argparse.Namespace, run: Any) -> tuple[Any, Any]:
    from pyro_cryo.analysis import series

    if asked.index is not None:
        return series.at_images(run, asked.index)
    if asked.kmeans is not None:
        return series.at_clusters(run, asked.kmeans)
    if asked.z_values is not None:
        return series.from_file(asked.z_values, run.model.zdim)
    if asked.path_along is not None:
        return series.along_component(run, asked.path_along, asked.steps)
    raise ValueError("which maps? give --index, --kmeans, --z-values or --path-along")


# ---------------------------------------------------------------------------------------------------------- analyze
def _add_analyze(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, help="folder of a run")
    add("-o", "--out", type=Path, help="folder for plots and maps (default: RUN/analysis)")
    add("--kmeans", type=int, default=10, help="clusters of z")
    add("--steps", type=int, default=10, help="maps along each principal component")
    add("--components", type=int, default=2, help="principal components to follow")
    add("--device", default="auto", help="cpu, cuda, cuda:1; auto takes a GPU where there is one")


def analyze(asked: argparse.Namespace) -> None:
    """pyro-cryo analyze"""
    from pyro_cryo.analysis import report
    from pyro_cryo.inference.run import Run

    out = asked.out or asked.run / "analysis"
    run = Run.load(asked.run, device=_device(asked.device))
    pictures = report.analyze(run, out, asked.kmeans, asked.steps, asked.components)
    maps = " and maps" if run.model.zdim else ""
    print(f"{', '.join(path.name for path in pictures)}{maps} are in {out}")


# ----------------------------------------------------------------------------------------------------------- select
def _add_select(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, help="folder of a run")
    add("-o", "--out", type=Path, required=True, help="file to write: .star, or .cs where the input was one")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--cluster", type=int, nargs="+", metavar="C", help="images of these k-means clusters, from 0")
    which.add_argument("--index", type=Path, metavar="FILE", help="rows in a .txt or .npy file, from 0, or a .star")
    add("--kmeans", type=int, help="count this many clusters anew (default: those of the last `analyze`, else 10)")
    add("--overwrite", action="store_true", help="replace the file if it is there")


def select(asked: argparse.Namespace) -> None:
    """pyro-cryo select"""
    import numpy as np

    from pyro_cryo.analysis.latent import kmeans
    from pyro_cryo.analysis.report import CLUSTERS
    from pyro_cryo.inference.run import Run

    if asked.out.suffix not in (".star", ".cs"):
        raise ValueError(f"{asked.out} is neither .star nor .cs; name the file by its format")
    if not asked.out.absolute().parent.is_dir():
        raise FileNotFoundError(f"folder {asked.out.parent} of {asked.out} does not exist; make it first")
    _refuse_to_overwrite(asked.out, asked.overwrite)
    run = Run.load(asked.run)
    if asked.cluster is not None:
        analysed = asked.run / "analysis" / CLUSTERS
        if asked.kmeans is None and analysed.exists():
            label = np.loadtxt(analysed, dtype=int, ndmin=2)[:, 1]
        else:
            label = kmeans(run.latent.z, asked.kmeans or 10).label
        beyond = [c for c in asked.cluster if not 0 <= c <= label.max()]
        if beyond:
            raise ValueError(f"cluster {beyond[0]} is not there; clusters are 0 to {label.max()}")
        rows = np.flatnonzero(np.isin(label, asked.cluster))
        print(f"of {label.max() + 1} clusters: {' '.join(str(c) for c in asked.cluster)}")
    else:
        from pyro_cryo.data.selection import selected

        rows = selected(run.particles.table, asked.index, None).numpy()
    kept = run.particles[rows]
    kept.write_star(asked.out) if asked.out.suffix == ".star" else kept.write_cs(asked.out)
    print(f"{len(kept)} of {len(run.particles)} particles are in {asked.out}")


# --------------------------------------------------------------------------------------------------------- simulate
def _add_simulate(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--toy", metavar="NAME", help="a built-in complex: hinge (moves) or classes (four states)")
    what.add_argument("--pdb", type=Path, help="an atomic model; several MODELs are several states")
    what.add_argument("--map", type=Path, nargs="+", help="one or several maps (.mrc), each a state")
    add = parser.add_argument
    add("-o", "--out", type=Path, required=True, help="folder for particles.mrcs, particles.star and truth.npz")
    add("--images", type=int, default=5000, help="how many")
    add("--box", type=int, default=64, help="pixels, even")
    add("--apix", type=float, default=None, help="angstrom a pixel (default: the molecule fills 70%% of the box)")
    add("--snr", type=float, default=0.1, help="variance of the clean images over that of the noise")
    add("--shift-px", type=float, default=None, help="sd of displacements in x and y, pixels (default: 3%% of the box)")
    add("--defocus", type=float, nargs=2, default=(10_000.0, 25_000.0), metavar="A", help="range, angstrom")
    add("--voltage", type=float, default=300.0, help="kV")
    add("--cs", type=float, default=2.7, help="spherical aberration, mm")
    add("--amplitude-contrast", type=float, default=0.1, help="fraction")
    add("--seed", type=int, default=0, help="the same seed gives the same files")
    add("--overwrite", action="store_true", help="replace a case that is there")


def simulate(asked: argparse.Namespace) -> None:
    """pyro-cryo simulate"""
    from pyro_cryo.data import simulate as simulation

    if asked.toy is not None:
        if asked.toy not in simulation.TOYS:
            raise ValueError(f"toy {asked.toy!r} is not known; expected {' or '.join(simulation.TOYS)}")
        source: simulation.Source = simulation.TOYS[asked.toy]()
    else:
        source = simulation.from_pdb(asked.pdb) if asked.pdb is not None else simulation.from_maps(asked.map)
    star = simulation.simulate(
        source,
        asked.out,
        n_images=asked.images,
        box=asked.box,
        apix=asked.apix,
        snr=asked.snr,
        shift_sd_px=asked.shift_px,
        defocus_angstrom=tuple(asked.defocus),
        voltage_kv=asked.voltage,
        cs_mm=asked.cs,
        amplitude_contrast=asked.amplitude_contrast,
        seed=asked.seed,
        overwrite=asked.overwrite,
    )
    print(f"{asked.images} images of {asked.box} px, {len(source)} states: {star}")


def _device(name: str) -> str:
    """The device of that name; of "auto", a GPU where there is one."""
    import torch

    from pyro_cryo.inference.fit import check_device

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(name)
    return name


def _refuse_to_overwrite(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; give another -o, or --overwrite to replace it")


def _one_line(error: BaseException | str) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _show_warning(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        print(f"pyro-cryo: warning: {_one_line(message)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
