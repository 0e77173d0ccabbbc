"""Many cases through one model: shards, reading ahead, writing behind, failures kept apart."""

from __future__ import annotations

import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from medseg.errors import MedsegError, UsageError

__all__ = ["Outcome", "SlabQueue", "choose_shard", "run_cohort", "take_shard"]

Item = TypeVar("Item")
# (rank, world size) as torchrun sets them; SLURM's array variables are described in its manual, `man sbatch`
_TORCHRUN = ("RANK", "WORLD_SIZE")
_SLURM = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP")


def choose_shard(shard: str | None = None, environment: Mapping[str, str] | None = None) -> tuple[int, int]:
    """(number from 0, count) of this process' share: from `K/N`, else torchrun's or SLURM's variables, else (0, 1).

    Raises:
        UsageError: E101, not K/N with 0 <= K < N.

    >>> choose_shard("2/4"), choose_shard(None, {"RANK": "1", "WORLD_SIZE": "3"}), choose_shard(None, {})
    ((2, 4), (1, 3), (0, 1))
    >>> choose_shard(None, {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "1"})
    (4, 8)
    """
    environment = os.environ if environment is None else environment
    if shard is not None:
        match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", shard)
        number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    elif all(name in environment for name in _TORCHRUN):
        number, count = (int(environment[name]) for name in _TORCHRUN)
    elif all(name in environment for name in _SLURM[:2]):
        first, step = int(environment.get(_SLURM[2], 0)), int(environment.get(_SLURM[3], 1))
        number, count = (int(environment[_SLURM[0]]) - first) // max(1, step), int(environment[_SLURM[1]])
    else:
        return 0, 1
    if not 0 <= number < count:
        raise UsageError(
            "not a share of the cases",
            field="shard",
            expected="K/N with 0 <= K < N, such as 0/4",
            found=shard if shard is not None else f"{number}/{count}",
            # tasks 3, 7 and 9 of an array submitted again: only their number is known, not which of them this one is
            fix=None if shard is not None else "say which share this process has: --shard K/N",
        )
    return number, count


def take_shard(items: Sequence[Item], number: int, count: int) -> list[Item]:
    """Every `count`th item from the `number`th: the shares are disjoint and together all.

    >>> take_shard("abcde", 1, 2)
    ['b', 'd']
    """
    return list(items[number::count])


@dataclass
class Outcome(Generic[Item]):
    """What became of one item: a result or an error, and the seconds that each stage took."""

    item: Item
    result: Any = None
    error: MedsegError | None = None
    seconds: dict[str, float] | None = None


def run_cohort(
    items: Sequence[Item],
    read: Callable[[Item], Any],
    compute: Callable[[Item, Any], Any],
    finish: Callable[[Item, Any], Any],
    *,
    ahead: bool = True,
) -> Iterator[Outcome[Item]]:
    """`finish(item, compute(item, read(item)))` for each item, as `Outcome`s in order.

    With `ahead` the next item is read in one thread and the last one finished in another while this one is computed; at
    most one item waits on either side. A MedsegError fails its item alone; any other exception ends the run.
    """
    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
        waiting: tuple[Outcome[Item], Future] | None = None
        coming: Future | None = None
        try:
            for number, item in enumerate(items):
                outcome = Outcome(item, seconds={})
                coming = coming or reader.submit(_timed, read, item)
                value = _guarded(outcome, "read", coming.result)
                coming = reader.submit(_timed, read, items[number + 1]) if ahead and number + 1 < len(items) else None
                if outcome.error is None:
                    value = _guarded(outcome, "predict", lambda i=item, v=value: _timed(compute, i, v))
                if waiting is not None:
                    yield _done(*waiting)
                    waiting = None
                if outcome.error is not None:
                    yield outcome
                    continue
                waiting = (outcome, writer.submit(_timed, finish, item, value))
                del value
                if not ahead:
                    yield _done(*waiting)
                    waiting = None
            if waiting is not None:
                yield _done(*waiting)
        finally:
            if coming is not None:
                coming.cancel()


def _timed(action: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    begin = time.perf_counter()
    result = action(*arguments)
    return result, time.perf_counter() - begin


def _guarded(outcome: Outcome, stage: str, action: Callable[[], tuple[Any, float]]) -> Any:
    try:
        value, seconds = action()
    except MedsegError as error:
        outcome.error = error
        return None
    assert outcome.seconds is not None
    outcome.seconds[stage] = seconds
    return value


def _done(outcome: Outcome, future: Future) -> Outcome:
    outcome.result = _guarded(outcome, "write", future.result)
    return outcome


class SlabQueue:
    """Slabs handed from the computing thread to a writing one, so that packing overlaps with computing.

    >>> taken = []
    >>> with SlabQueue(lambda start, slab: taken.append(start)) as put:
    ...     put(0, None)
    ...     put(8, None)
    >>> taken
    [0, 8]
    """

    def __init__(self, write: Callable[[int, Any], None], depth: int = 4) -> None:
        self._write = write
        self._queue: queue.Queue = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="slabs", daemon=True)

    def __enter__(self) -> Callable[[int, Any], None]:
        self._thread.start()
        return self._put

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        self._queue.put(None)
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def _put(self, start: int, slab: Any) -> None:
        if self._error is not None:
            raise self._error
        self._queue.put((start, slab))

    def _work(self) -> None:
        while (entry := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._write(*entry)
                except BaseException as error:  # given to the computing thread, which raises it
                    self._error = error


@contextmanager
def unchanged(fingerprint: Callable[[], Any], message: Callable[[], MedsegError]) -> Iterator[None]:
    """Raises `message()` when `fingerprint()` is another after the block (a file that changes while it is read)."""
    before = fingerprint()
    yield
    if fingerprint() != before:
        raise message()
