"""How arguments are parsed, told in help and refused."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument like any other error: in one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Leave."""
        self.exit(2, f"pyro-cryo: error: {one_line(message)}; see {self.prog} --help\n")


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


def add_command(
    commands: Any, name: str, summary: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    """The parser of one command among `commands`; `run` gets what was asked."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        formatter_class=Help,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(command=run)
    return parser


def one_line(error: BaseException | str) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
