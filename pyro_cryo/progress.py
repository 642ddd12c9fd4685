"""How long work reports on itself, whoever shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
Progress = Callable[[Iterable[Any], int, str], Iterator[Any]]


def quiet(items: Iterable[T], total: int, title: str) -> Iterator[T]:
    """Hand the items through and show nothing."""
    return iter(items)


def bar(items: Iterable[T], total: int, title: str) -> Iterator[T]:
    """Hand the items through under a progress bar with the time left."""
    from tqdm import tqdm

    yield from tqdm(items, total=total, desc=title, unit="batch", leave=False)
