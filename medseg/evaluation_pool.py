"""Many cases in parallel processes, with progress, every problem collected."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

from medseg.errors import MedsegError, ResourceError, UsageError, collect
from medseg.inference.memory import available_memory
from medseg.processes import process_pool, without_script
from medseg.volumes import read_geometry
from medseg.waiting import progress_of

__all__ = ["count_workers", "largest_reference", "map_cases"]

# what scoring a case holds at its peak for a voxel of its image; measured: 8 to 14 for smooth structures, 87 for noise
_BYTES_PER_VOXEL = 40
_PROCESS = 2**28  # bytes that a process takes before it has read anything
_SMALL = 2**22  # voxels in all that one process scores while others are still starting


def count_workers(workers: int | None, cases: int, voxels: int = 0) -> int:
    """Processes to use: as many as asked for; else as many as cores and free memory allow. Not more than cases.

    Args:
        workers: as asked for; None: as many as cores and memory allow.
        cases: how many there are.
        voxels: of the largest case; few in all are for one process.

    Raises:
        UsageError: less than one was asked for.
    """
    if workers is not None and workers < 1:
        raise UsageError("at least one process is needed", field="workers", expected="1 or more", found=workers)
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        fitting = int(available_memory() * 0.7 / (_PROCESS + voxels * _BYTES_PER_VOXEL))
        workers = min(cores, fitting) if cases * voxels >= _SMALL else 1
    return max(1, min(workers, cases))


def largest_reference(pairs: Sequence[Any], *, affine: str = "auto") -> int:
    """Voxels of the largest reference, from the headers. One that cannot be read is refused by who reads it."""
    found = [0]
    for pair in pairs:
        with contextlib.suppress(MedsegError):
            found.append(math.prod(read_geometry(pair.reference, affine=affine)[0].shape))
    return max(found)


def map_cases(
    work: Callable[[Any], Any], items: Sequence[Any], *, workers: int, progress: bool, title: str
) -> list[Any]:
    """`work` of every item, in order, in `workers` processes; all problems are collected before any is raised.

    Raises:
        MedsegError: of one or several items.
        ResourceError: a process was killed (mostly: no memory left).
    """
    results: list[Any] = [None] * len(items)
    problems: list[MedsegError] = []

    def take(number: int, call: Callable[[], Any]) -> None:
        try:
            results[number] = call()
        except BrokenProcessPool as error:
            raise ResourceError(
                "a scoring process was killed", code="E510", case=getattr(items[number], "case", None),
                expected="enough memory for one case in each process",
                fix="use fewer processes (--workers 1)",
            ) from error  # fmt: skip
        except MedsegError as error:
            problems.extend(error.problems)

    with progress_of(title, len(items), shown=progress) as tick:
        if workers == 1:
            for number, item in enumerate(items):
                take(number, partial(work, item))
                tick()
        else:
            with process_pool(workers, "spawn", _one_thread) as pool:
                with without_script():
                    waiting = {pool.submit(work, item): number for number, item in enumerate(items)}
                while waiting:
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        take(waiting.pop(future), future.result)
                        tick()
    if problems:
        raise collect(problems)
    return results


def _one_thread() -> None:
    # the processes share the cores: a thread pool in each would only make them wait for one another
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
