"""The stream of batches: from any number of worker processes, in order, with the cases named when a worker is lost."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import time
import warnings
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from medseg.batches import Batch, BatchMaker, Key
from medseg.errors import MedsegError, ResourceError, TrainingError
from medseg.errors_system import open_files
from medseg.processes import without_script

__all__ = ["TIMEOUT", "BatchStream"]

TIMEOUT = 600.0  # seconds without a batch from the workers after which they count as hanging
_AHEAD = 2  # batches that each worker makes in advance: what bounds memory


class BatchStream:
    """Iterator over batches from (epoch, iteration) on, without end.

    Args:
        maker: makes the batches.
        start: (epoch, iteration in the epoch) of the first.
        workers: processes; 0 makes each batch when it is asked for, as is always done where patches are cut on a GPU.
        pin: page-locked memory, for a CUDA device.

    `waited` is the time in seconds for which `next` had to wait so far.
    """

    def __init__(self, maker: BatchMaker, start: Key = (0, 0), *, workers: int = 0, pin: bool = False) -> None:
        workers = 0 if maker.on_gpu else workers
        self.maker, self.workers, self.waited = maker, workers, 0.0
        self._pending: deque[Key] = deque()
        self._keys = _keys(start, maker.iterations)
        if workers == 0:
            self._source: Iterator[Any] = self._make_here()
            return
        with warnings.catch_warnings():
            # more workers than cores are only made when somebody asked for them by number
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader: DataLoader[Any] = DataLoader(
                _Guarded(maker),
                batch_size=None,
                sampler=_Sampler(self._keys, self._pending),  # pyright: ignore[reportArgumentType]
                num_workers=workers,
                prefetch_factor=_AHEAD,
                collate_fn=_same,
                timeout=TIMEOUT,
                worker_init_fn=_start_worker,
                pin_memory=pin,
            )
            before = multiprocessing.active_children()
            try:
                with without_script():
                    self._source = iter(loader)
            except OSError as error:
                # some may have been: they ignore SIGTERM, and Python would wait for them for ever when it ends
                _kill([worker for worker in multiprocessing.active_children() if worker not in before])
                found, fix = error.strerror, "they need room in /dev/shm and open files (ulimit -n): allow more"
                if error.errno == errno.EMFILE:
                    limit, fix = open_files()
                    found = f"{found}: {limit}"
                fix += ", or --set train.workers=0"
                raise ResourceError("data workers cannot be started", found=found, fix=fix) from error

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> Batch:
        begin = time.perf_counter()
        try:
            found = next(self._source)
        except MedsegError:
            raise
        except RuntimeError as error:
            if self.workers == 0:
                raise
            raise self._lost(error) from error
        if isinstance(found, MedsegError):
            raise found
        if self._pending:
            self._pending.popleft()
        self.waited += time.perf_counter() - begin
        return found

    def close(self, *, lost: bool = False) -> None:
        """End the workers: after their current batch, or at once if one of them was lost or hangs."""
        source, self._source = self._source, iter(())
        workers = list(getattr(source, "_workers", []))
        if workers and lost:
            # torch would raise an error for each worker that it sees killed
            with contextlib.suppress(AttributeError):
                torch.utils.data._utils.signal_handling._remove_worker_pids(id(source))
                source._worker_pids_set = False
            _kill(workers)
        if hasattr(source, "_shutdown_workers"):
            source._shutdown_workers()
        _kill(workers)

    def _make_here(self) -> Iterator[Batch]:
        for key in self._keys:
            self._pending.append(key)
            yield self.maker[key]

    def _lost(self, error: RuntimeError) -> TrainingError:
        cases = dict.fromkeys(case for key in self._pending for case in self.maker.cases(key))
        self.close(lost=True)
        text = str(error).splitlines()[0]
        what = "a data worker hangs" if "timed out" in text else "a data worker was lost"
        fix = (
            "a worker is killed when memory (or /dev/shm) runs out: use fewer workers, a smaller batch, or "
            "--set train.workers=0 to see the error itself"
        )
        if os.strerror(errno.EMFILE) in text:  # torch says what it cannot do then, and not how many there may be
            limit, fix = open_files()
            what, text = f"{what}: too many open files", limit
            fix += ", or --set train.workers=0"
        fix += "; then continue with --resume"
        return TrainingError(what, code="E610", case=f"one of {', '.join(cases)}", found=text, fix=fix)


class _Guarded(Dataset):
    """Errors as values: DataLoader would rebuild them from their text alone and lose their fields."""

    def __init__(self, maker: BatchMaker) -> None:
        self.maker = maker

    def __getitem__(self, key: Key) -> Batch | MedsegError:
        try:
            return self.maker[key]
        except MedsegError as error:
            return error
        except Exception as error:
            cases = ", ".join(self.maker.cases(key))
            return TrainingError(f"a data worker failed: {type(error).__name__}: {error}", code="E611", case=cases)


class _Sampler:
    """Hands out keys and remembers which are on their way."""

    def __init__(self, keys: Iterator[Key], pending: deque[Key]) -> None:
        self._keys, self._pending = keys, pending

    def __iter__(self) -> Iterator[Key]:
        for key in self._keys:
            self._pending.append(key)
            yield key


def _keys(start: Key, iterations: int) -> Iterator[Key]:
    epoch, iteration = start
    while True:
        while iteration < iterations:
            yield epoch, iteration
            iteration += 1
        epoch, iteration = epoch + 1, 0


def _kill(workers: list[Any]) -> None:
    for worker in workers:
        with contextlib.suppress(ValueError, OSError):  # ended already
            worker.kill()


def _same(value: Any) -> Any:
    return value


def _start_worker(_: int) -> None:
    # Ctrl-C and SIGTERM reach all processes of a group: the main one decides what happens, and ends its workers
    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)
    if hasattr(os, "nice"):
        with contextlib.suppress(OSError):
            os.nice(5)  # the step comes first; a batch in advance is enough
