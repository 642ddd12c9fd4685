"""The command line, a command a file."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import pyro_cryo
from pyro_cryo.cli import analyze, check, compare, encode, fit, posterior, select, simulate, uncertainty, volumes
from pyro_cryo.cli.parser import Parser, one_line


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
        print(f"pyro-cryo: stopped{'; --resume goes on' if asked.command is fit.run else ''}", file=sys.stderr)
        return 130
    except Exception as error:
        if asked.debug:
            raise
        text = one_line(error)
        expected = isinstance(error, ValueError | OSError)
        print(f"pyro-cryo: error: {text if expected else f'{type(error).__name__}: {text} (--debug)'}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; builds without PyTorch, so that help comes at once."""
    parser = Parser(prog="pyro-cryo", description="Cryo-EM reconstruction as probabilistic programming.")
    parser.add_argument("--version", action="version", version=f"pyro-cryo {pyro_cryo.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (fit, analyze, volumes, uncertainty, posterior, check, compare, encode, select, simulate):
        command.add_to(commands)
    return parser


def _show_warning(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        print(f"pyro-cryo: warning: {one_line(message)}", file=sys.stderr)
