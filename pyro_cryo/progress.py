"""How long work reports on itself, whoever shows it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class Progress:
    """Shows nothing: hands the items through."""

    def __call__(self, items: Iterable[T], total: int, title: str, done: int = 0, unit: str = "batch") -> Iterator[T]:
        """The items of a piece of work, `done` of `total` behind it; `unit` is what one of them is called."""
        return iter(items)

    def note(self, text: str) -> None:
        """Say how it goes."""


class Bar(Progress):
    """A progress bar on the terminal with the time left."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, items: Iterable[T], total: int, title: str, done: int = 0, unit: str = "batch") -> Iterator[T]:
        from tqdm import tqdm

        self._bar = tqdm(items, total=total, desc=title, unit=unit, initial=done, dynamic_ncols=True)
        with self._bar:
            yield from self._bar

    def note(self, text: str) -> None:
        from tqdm import tqdm

        if self._bar.disable:  # closed: what is said now would not show
            tqdm.write(text, file=sys.stderr)
        else:
            self._bar.set_postfix_str(text, refresh=False)


quiet = Progress()
