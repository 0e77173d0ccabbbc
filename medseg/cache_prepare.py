"""Jobs on many cases in several processes: results as they come, errors as values, a killed process named."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from medseg.data import Case
from medseg.errors import MedsegError, ResourceError
from medseg.processes import process_pool, without_script

__all__ = ["choose_workers", "run_jobs"]

_SMALL = 2**23  # bytes of input below which starting processes costs more than it gains
# memory for one case, as a multiple of its files: gzip (4x), float32 for int16 (2x), several arrays while resampling
_BYTES_PER_INPUT_BYTE = 40


def run_jobs(
    job: Callable[[Case], Any], cases: Sequence[Case], workers: int | str
) -> Iterator[tuple[Case, Any | MedsegError]]:
    """(case, result) for each case, in any order; a MedsegError is the result of a case that was refused.

    Raises:
        ResourceError: E524, a process was killed (by the system, for want of memory, as a rule).
    """
    count = choose_workers(cases) if workers == "auto" else int(workers)
    if count <= 1:
        for case in cases:
            yield case, _attempt(job, case)
        return
    # fork is quick and shares what is imported; where threads make it unsafe (macOS) a fresh process is started
    with process_pool(count, "fork" if sys.platform == "linux" else "spawn", _start) as pool:
        with without_script():
            waiting = {pool.submit(_attempt, job, case): case for case in cases}
        try:
            for future in as_completed(dict(waiting)):
                case = waiting.pop(future)
                yield case, future.result()
        except BrokenProcessPool as error:
            names = ", ".join(case.id for case in list(waiting.values())[: count + 1])
            raise ResourceError(
                "a process that prepares cases was killed, probably for want of memory",
                code="E524",
                case=names,
                fix="free memory and run the same command again: finished cases are kept",
            ) from error


def choose_workers(cases: Sequence[Case]) -> int:
    """Processes for these cases: bounded by cores and free memory; 1 where the work is small."""
    from medseg.hardware import real_cores
    from medseg.inference.memory import available_memory

    sizes = [sum(_size(path) for path in case.images) for case in cases]
    if not sizes or sum(sizes) < _SMALL:
        return 1
    fitting = int(available_memory() * 0.7 / max(1, max(sizes) * _BYTES_PER_INPUT_BYTE))
    return max(1, min(real_cores(), len(cases), fitting))


def _size(path: Path) -> int:
    try:
        if path.is_dir():
            return sum(file.stat().st_size for file in path.iterdir())
        return path.stat().st_size
    except OSError:
        return 0


def _attempt(job: Callable[[Case], Any], case: Case) -> Any:
    try:
        return job(case)
    except MedsegError as error:
        error.case = error.case or case.id
        return error


def _start() -> None:
    import torch

    torch.set_num_threads(1)  # one case for each process; and OpenMP does not survive a fork with several threads
