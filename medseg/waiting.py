"""A sign of life while many cases are worked on: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from medseg.errors import counted

__all__ = ["progress_of"]

_SECONDS = 30  # between two lines, and before the first


@contextmanager
def progress_of(
    title: str, total: int, *, shown: bool, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[], None]]:
    """A function to be called after each case, while what is done of `total` is shown on standard error.

    Without a terminal it is a line each half minute at most, so that short work shows nothing. `clock` tells seconds.

    >>> with progress_of("reading", 2, shown=False) as tick:
    ...     tick()
    """
    if not shown:
        yield lambda: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=total)
            yield lambda: bar.advance(task)
    else:
        done, told = 0, clock()

        def tick() -> None:
            nonlocal done, told
            done += 1
            if done < total and clock() - told >= _SECONDS:
                told = clock()
                print(f"{title}: {done} of {counted(total, 'case')}", file=sys.stderr, flush=True)

        yield tick
