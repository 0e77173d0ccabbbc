"""Signals set a flag; training looks at it between iterations, saves, and leaves. A second signal leaves at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["Signals", "Stopped", "listen"]


class Stopped(Exception):
    """Training was asked to stop, and has saved.

    Attributes:
        number: the signal's number (2 SIGINT, 15 SIGTERM).
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def name(self) -> str:
        """The signal's name."""
        return signal.Signals(self.number).name


class Signals:
    """The signal that has been received; 0 for none."""

    def __init__(self) -> None:
        self.received = 0

    def handle(self, number: int, _frame: Any = None) -> None:
        """Note the first signal; leave at once on the second."""
        if self.received:
            os._exit(128 + number)
        self.received = number


@contextlib.contextmanager
def listen() -> Iterator[Signals]:
    """Note SIGINT and SIGTERM for the block; what was set before comes back.

    Outside of the main thread Python cannot set handlers: then signals do what they did before.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, signals.handle)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
