"""What the command line shows: tables and bars on a terminal, one JSON document for machines, errors in one line."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from moescope.capturing import Forecast


def fail(message: str) -> NoReturn:
    """Print one error line and exit with code 2."""
    print(f"moescope: {message}", file=sys.stderr)
    sys.exit(2)


def interrupted(message: str) -> NoReturn:
    """Print one line after Ctrl-C and exit as a program stopped by it does."""
    print(f"moescope: {message}", file=sys.stderr)
    sys.exit(130)


def say(text: str = "") -> None:
    """Print a line, wrapped to the terminal; markup in it is not interpreted."""
    from rich.console import Console

    Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty()).print(text)


def heading(text: str) -> None:
    """Print a bold line."""
    from rich.console import Console
    from rich.text import Text

    Console(highlight=False).print(Text(text, style="bold"))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], numbers: Iterable[str] = ()) -> None:
    """Print a table; columns named in ``numbers`` are aligned to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        grid.add_column(column, justify="right" if column in set(numbers) else "left")
    for row in rows:
        grid.add_row(*(Text(str(cell)) for cell in row))
    console = Console(highlight=False)
    # In a pipe nothing is cut: the table is as wide as it needs to be.
    console.print(grid) if console.is_terminal else Console(highlight=False, width=10_000).print(grid)


def cell(value: Any) -> str:
    """A value in a table: four digits, nothing for what is missing."""
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    return "" if value is None else str(value)


def print_json(value: Any) -> None:
    """Print one JSON document; numbers that are not numbers become null."""
    print(json.dumps(_plain(value), ensure_ascii=False, indent=2))


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def size(n: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError("unreachable")


def duration(seconds: float) -> str:
    """Seconds for people."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def forecast_lines(forecast: Forecast) -> str:
    """A forecast in two lines."""
    about = "" if forecast.exact else "about "
    empty = f" ({forecast.empty} without text left out)" if forecast.empty else ""
    return (
        f"{forecast.documents:,} documents{empty}, {about}{forecast.tokens:,} tokens, {forecast.sites} MoE layers\n"
        f"about {size(forecast.bytes)} on disk ({size(forecast.free)} free), "
        f"about {duration(forecast.seconds)} of forward passes"
    )


class CaptureBar:
    """Progress of one capture, in tokens; the forecast gives its end."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task: Any = None
        self._begun = 0

    def forecast(self, forecast: Forecast) -> None:
        """Show the forecast and start the bar."""
        print(forecast_lines(forecast), file=sys.stderr)
        self._task = self._progress.add_task("capturing", total=forecast.tokens, speed="")
        self._progress.start()

    def advance(self, tokens: int) -> None:
        """Tokens done so far."""
        task = self._progress.tasks[0]
        speed = f"{tokens / task.elapsed:,.0f} tokens/s" if task.elapsed else ""
        self._progress.update(self._task, completed=tokens, total=max(tokens, task.total or 0), speed=speed)

    def finish(self) -> None:
        """Stop the bar, at its end if the capture ended."""
        if self._task is not None:
            self._progress.stop()


@contextmanager
def capture_bar() -> Iterator[CaptureBar]:
    """A capture's bar, stopped whatever happens."""
    bar = CaptureBar()
    try:
        yield bar
    finally:
        bar.finish()


def track(items: Sequence[Any], what: str) -> Iterator[Any]:
    """The items, with a bar on the error stream."""
    from rich.console import Console
    from rich.progress import track as bar

    yield from bar(items, description=what, console=Console(stderr=True), transient=True)


@contextmanager
def counting(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal that is told how many are done; silent in a pipe."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


@contextmanager
def watching() -> Iterator[None]:
    """A bar on a terminal for the analyses inside the block, part after part; silent in a pipe."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from moescope.analysis import watched

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} of {task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", visible=False)

        def tell(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total, visible=True)

        with watched(tell):
            yield


def quiet_transformers() -> None:
    """Silence the advice and bars that transformers prints while it loads a model; errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
