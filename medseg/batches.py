"""Batches of augmented patches, in order, from any number of worker processes, beginning at any iteration.

Batch (epoch, iteration) is the same whoever makes it: everything random in it follows from (seed, epoch, sample). The
stream therefore keeps no state, and a resumed run begins it where the other stopped. It goes on over the ends of
epochs, so that workers never wait for one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from medseg.augmentation import Augmentation, finish_targets
from medseg.errors import DataError, MedsegError, TrainingError
from medseg.patches import Draw, PatchReader, stack
from medseg.sampling import PlannedSample, epoch_plan

__all__ = ["Batch", "BatchMaker", "BatchStream"]

TIMEOUT = 600.0  # seconds without a batch from the workers after which they count as hanging
_AHEAD = 2  # batches that each worker makes in advance: what bounds memory

Key = tuple[int, int]  # epoch, iteration in the epoch, both from 0


@dataclass
class Batch:
    """What one process gets of one iteration.

    Attributes:
        key: (epoch, iteration in the epoch).
        cases: ids of its samples.
        seeds: their seeds.
        tensors: image (B, C, *patch), label, perhaps weight and fov.
        share: this process's samples / all samples of the iteration.
        spacings: size of a voxel of each sample.
    """

    key: Key
    cases: tuple[str, ...]
    seeds: tuple[int, ...]
    tensors: dict[str, torch.Tensor]
    share: float = 1.0
    spacings: tuple[tuple[float, ...], ...] | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, copied without waiting where the memory allows it."""
        if device.type == "cpu":
            return self
        moved = {name: values.to(device, non_blocking=True) for name, values in self.tensors.items()}
        return replace(self, tensors=moved)

    def pin_memory(self) -> Batch:
        """For DataLoader: the same batch in page-locked memory."""
        return replace(self, tensors={name: values.pin_memory() for name, values in self.tensors.items()})


class BatchMaker(Dataset):
    """Makes the batch of an iteration.

    Args:
        stored: id -> stored case, in the order that the run's seed refers to.
        samples: samples in an epoch.
        reader: where patches are and how large.
        batch: samples of an iteration, over all processes.
        seed: the run's seed.
        augmentation: applied here, in the worker; None: left to the caller (on a GPU).
        ignore: label index that counts for nothing.
        rank, world: this process and the number of processes: sample n of an iteration belongs to process n % world.
    """

    def __init__(
        self,
        stored: Mapping[str, Any],
        samples: int,
        reader: PatchReader,
        *,
        batch: int,
        seed: int,
        augmentation: Augmentation | None = None,
        ignore: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.stored, self.reader = list(stored.values()), reader
        self.names, self.samples_per_epoch = list(stored), samples
        self.batch, self.seed, self.augmentation, self.ignore = batch, seed, augmentation, ignore
        self.rank, self.world = rank, world
        self._planned: tuple[int, list[PlannedSample]] = (-1, [])

    @property
    def iterations(self) -> int:
        """Iterations in an epoch; the last one may have fewer samples."""
        return -(-self.samples_per_epoch // self.batch)

    def samples(self, key: Key) -> list[PlannedSample]:
        """All samples of an iteration, over all processes."""
        first = key[1] * self.batch
        return list(self._epoch(key[0])[first : first + self.batch])

    def cases(self, key: Key) -> tuple[str, ...]:
        """Ids of the cases of an iteration, of this process."""
        return tuple(self.names[sample.case] for sample in self._own(self.samples(key)))

    def _epoch(self, epoch: int) -> list[PlannedSample]:
        if self._planned[0] != epoch:
            plan = epoch_plan(len(self.names), epoch=epoch, seed=self.seed, samples=self.samples_per_epoch)
            self._planned = (epoch, plan)
        return self._planned[1]

    def _own(self, samples: list[PlannedSample]) -> list[PlannedSample]:
        # a process without a sample takes one that another has, with no weight: all processes must take the step
        return samples[self.rank :: self.world] or samples[:1]

    def __getitem__(self, key: Key) -> Batch:
        """The batch; raises DataError naming the case that cannot be read."""
        every = self.samples(key)
        own = self._own(every)
        cases, seeds = self.cases(key), tuple(sample.seed for sample in own)
        parts, spacings = [], []
        for sample in own:
            stored = self.stored[sample.case]
            try:
                start = self.reader.start(stored, Draw.of(sample.seed, len(stored.shape)))
                parts.append(self.reader.read(stored, start))
                spacings.append(self.reader.spacing(stored))
            except MedsegError as error:
                error.case = error.case or self.names[sample.case]
                raise
            except OSError as error:
                case, fix = self.names[sample.case], "the store may have been removed: continue with --resume"
                raise DataError(f"cannot read a stored case: {error}", code="E370", case=case, fix=fix) from error
        tensors = {name: torch.from_numpy(array) for name, array in stack(parts).items()}
        share = len(every[self.rank :: self.world]) / len(every)
        batch = Batch(key, cases, seeds, tensors, share, tuple(spacings))
        return self.finish(batch) if self.augmentation is not None else batch

    def finish(self, batch: Batch, augmentation: Augmentation | None = None) -> Batch:
        """The batch augmented, its label and weight as the loss takes them; on the device where it is."""
        augmentation = augmentation or self.augmentation
        try:
            tensors = batch.tensors
            if augmentation is not None:
                tensors = augmentation(tensors, batch.seeds, batch.spacings)
            return replace(batch, tensors=finish_targets(tensors, self.ignore))
        except MedsegError as error:
            error.case = error.case or ", ".join(batch.cases)
            raise

    def __getitems__(self, keys: Sequence[Key]) -> list[Batch]:
        return [self[key] for key in keys]


class BatchStream:
    """Iterator over batches from (epoch, iteration) on, without end.

    Args:
        maker: makes the batches.
        start: (epoch, iteration in the epoch) of the first.
        workers: processes; 0 makes each batch when it is asked for.
        pin: page-locked memory, for a CUDA device.

    `waited` is the time in seconds for which `next` had to wait so far.
    """

    def __init__(self, maker: BatchMaker, start: Key = (0, 0), *, workers: int = 0, pin: bool = False) -> None:
        self.maker, self.workers, self.waited = maker, workers, 0.0
        self._pending: deque[Key] = deque()
        self._keys = _keys(start, maker.iterations)
        if workers == 0:
            self._source: Iterator[Any] = self._make_here()
            return
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
        self._source = iter(loader)

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
            self.close()
            raise found
        if self._pending:
            self._pending.popleft()
        self.waited += time.perf_counter() - begin
        return found

    def close(self) -> None:
        """End the workers at once."""
        for worker in getattr(self._source, "_workers", []):
            with contextlib.suppress(ValueError, OSError):  # ended already
                worker.kill()
        self._source = iter(())

    def _make_here(self) -> Iterator[Batch]:
        for key in self._keys:
            self._pending.append(key)
            yield self.maker[key]

    def _lost(self, error: RuntimeError) -> TrainingError:
        cases = dict.fromkeys(case for key in self._pending for case in self.maker.cases(key))
        self.close()
        text = str(error).splitlines()[0]
        what = "a data worker hangs" if "timed out" in text else "a data worker was lost"
        return TrainingError(
            what,
            code="E610",
            case=f"one of {', '.join(cases)}",
            found=text,
            fix="a worker is killed when memory (or /dev/shm) runs out: use fewer workers, a smaller batch, or "
            "--set train.workers=0 to see the error itself; then continue with --resume",
        )


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
