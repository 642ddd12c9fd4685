"""The answers of `check` on one page that stands by itself."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from pyro_cryo.analysis.check import BAD, LOOK, SOUND, UNASKED, Answer, overall
from pyro_cryo.inference.state import write_atomically

COLOUR = {SOUND: "#009E73", LOOK: "#E69F00", BAD: "#D55E00", UNASKED: "#777777"}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .3rem; }
img { max-width: 100%; } .reading { color: #555; }
.verdict { color: white; border-radius: .6rem; padding: .1rem .6rem; font-size: .9rem; white-space: nowrap; }
"""


def write_page(path: Path, title: str, answers: list[Answer]) -> None:
    """Answers and their pictures as one HTML file, which needs nothing beside it."""
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>",
        f"<p>All in all: {_badge(overall(answers))}</p>",
        *(_section(answer) for answer in answers),
        "</body></html>",
    ]
    write_atomically(path, lambda unnamed: unnamed.write_text("\n".join(parts), encoding="utf-8"))


def _section(answer: Answer) -> str:
    picture = ""
    if answer.figure is not None:
        buffer = io.BytesIO()
        answer.figure.savefig(buffer, format="png", dpi=110)
        code = base64.b64encode(buffer.getvalue()).decode()
        picture = f'<p><img alt="{escape(answer.question)}" src="data:image/png;base64,{code}"></p>'
    return (
        f"<h2>{escape(answer.question)} {_badge(answer.verdict)}</h2><p>{escape(answer.said)}</p>{picture}"
        f'<p class="reading">{escape(answer.reading)}</p>'
    )


def _badge(verdict: str) -> str:
    return f'<span class="verdict" style="background:{COLOUR[verdict]}">{verdict}</span>'
