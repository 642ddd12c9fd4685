"""pyro-cryo check"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pyro_cryo.cli.options import add_device, add_quiet, check_file, device_of, progress_of
from pyro_cryo.cli.parser import add_command


def add_to(commands: Any) -> None:
    """The command and its arguments."""
    parser = add_command(commands, "check", "is the posterior of a run to be trusted? a page with the answers", run)
    add = parser.add_argument
    add("run", type=Path, help="folder of a run")
    add("-o", "--out", type=Path, help=".html to write (default: RUN/check.html)")
    add("--particles", type=int, default=300, help="so many are weighed and simulated, ten times as many looked at")
    add("--halves", action="store_true", help="also fit two halves anew: does the motion come back? as long as the fit")
    add("--seed", type=int, default=0, help="of draws and simulated images")
    add_device(parser)
    add_quiet(parser)


def run(asked: argparse.Namespace) -> None:
    """Print every answer in a line, and write the page."""
    from pyro_cryo.analysis.check import FEWEST, check, overall
    from pyro_cryo.analysis.page import write_page
    from pyro_cryo.inference.run import Run

    if asked.particles < FEWEST:
        raise ValueError(f"--particles is {asked.particles}; expected {FEWEST} or more")
    out = asked.out or asked.run / "check.html"
    if out.suffix != ".html":
        raise ValueError(f"{out} is not .html; name the page by its format")
    found = Run.load(asked.run, device=device_of(asked))
    check_file(out, overwrite=True)
    answers = check(found, asked.particles, asked.seed, asked.halves, progress_of(asked))
    for answer in answers:
        print(f"{answer.question} {answer.verdict.capitalize()}. {answer.said}")
    write_page(out, f"Is {asked.run.resolve().name} to be trusted?", answers)
    print(f"all in all: {overall(answers)}; the page is {out}")
