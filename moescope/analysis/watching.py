"""Watching a long analysis: how far it is, and a way to stop it.

>>> with analysis.watched(lambda what, done, total: print(f"{what}: {done} of {total}")):
...     analysis.npmi(store, by="domain")

The callback runs where the analysis does, between two steps of its work. What it raises ends the analysis and comes
out of it as it is; raise `CancelledError` to say that somebody wished it so. Tables are kept in a store's aggregates
only when they are whole, so that nothing half-counted stays behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Watcher = Callable[[str, int, int], None]
"""Told (what is being worked at, steps done, steps in all); one analysis has several such parts, one after the other
or a short one inside a step of a long one, and a part may come more than once."""

T = TypeVar("T")

_WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)
_TOLD: ContextVar[tuple[str, int, int]] = ContextVar("told", default=("", 0, 0))


@contextmanager
def watched(callback: Watcher) -> Iterator[None]:
    """Analyses inside the block tell `callback` how far they are, and end with whatever it raises.

    Args:
        callback: see `Watcher`. It is called in the thread that runs the analysis, a few times a second to some
            hundreds of times: it should return soon.
    """
    token = _WATCHER.set(callback)
    try:
        yield
    finally:
        _WATCHER.reset(token)


def counted(what: str, items: Iterable[T], total: int | None = None) -> Iterator[T]:
    """The items, telling who watches before the first, and after each when the next one is asked for.

    Args:
        what: a few words, e.g. "permutations".
        items: steps of about the same work.
        total: how many they are; their length if None.
    """
    if total is None:
        if not isinstance(items, Sized):
            items = list(items)
        total = len(items)
    report(what, 0, total)
    for done, item in enumerate(items, start=1):
        yield item
        report(what, done, total)


def report(what: str, done: int, total: int) -> None:
    """Tells who watches, if anybody does."""
    watcher = _WATCHER.get()
    if watcher is not None:
        _TOLD.set((what, done, total))
        watcher(what, done, total)


def look() -> None:
    """Tells who watches the same as last time: a long step can be stopped here."""
    watcher = _WATCHER.get()
    if watcher is not None:
        watcher(*_TOLD.get())


def is_watched() -> bool:
    """Whether somebody may want to stop this."""
    return _WATCHER.get() is not None
