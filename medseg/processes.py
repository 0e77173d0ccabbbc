"""Processes that do not run the caller's script again, and that end when the one that started them does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

__all__ = ["process_pool", "without_script"]


@contextmanager
def process_pool(count: int, method: str, start: Callable[[], None]) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes call `start` first. An exception in the block, Ctrl-C too, ends them at once.

    Without that a command that was stopped waits for the cases that they are at, and one that was killed leaves them
    behind, waiting for work, with all the memory that they hold.
    """
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(count, context, initializer=_start, initargs=(start,)) as pool:
        try:
            yield pool
        except BaseException:
            for process in [*(pool._processes or {}).values()]:
                process.kill()
            raise


def _start(start: Callable[[], None]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked process has its parent's handlers
    threading.Thread(target=_follow, name="follow", daemon=True).start()
    start()


def _follow() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def without_script() -> Iterator[None]:
    """Start processes without the script that is running, for work that stands in medseg's own modules.

    A process that is not forked imports the script that started it first, in case the work stands there. A script
    without `if __name__ == "__main__":` would then train once more in every process, so `multiprocessing` is not
    told of it. Processes that are started later, outside, are told as ever.

    Ctrl-C reaches all processes of a terminal: these leave it to the one that started them.

    >>> import sys
    >>> before = dict(vars(sys.modules["__main__"]))
    >>> with without_script():
    ...     vars(sys.modules["__main__"]).get("__file__")
    >>> vars(sys.modules["__main__"]) == before
    True
    """
    facts = vars(sys.modules["__main__"])  # what multiprocessing.spawn.get_preparation_data looks at
    kept = {name: facts[name] for name in ("__spec__", "__file__") if name in facts}
    facts.pop("__file__", None)
    facts["__spec__"] = None
    masks = hasattr(signal, "pthread_sigmask")  # a new process inherits which signals wait
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if masks else None
    try:
        yield
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        facts.pop("__spec__")
        facts.update(kept)
