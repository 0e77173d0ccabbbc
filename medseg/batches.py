"""Batches of augmented patches: the batch of any iteration, made by whoever asks for it.

Batch (epoch, iteration) is the same whoever makes it: everything random in it follows from (seed, epoch, sample). The
stream therefore keeps no state, and a resumed run begins it where the other stopped. It goes on over the ends of
epochs, so that workers never wait for one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import Dataset

from medseg.augmentation import Augmentation, finish_targets
from medseg.errors import DataError, MedsegError
from medseg.patches import Draw, PatchReader, stack
from medseg.sampling import PlannedSample, epoch_plan

__all__ = ["Batch", "BatchMaker", "Key"]

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
        stored: id -> stored or held case, in the order that the run's seed refers to.
        samples: samples in an epoch.
        reader: where patches are and how large.
        batch: samples of an iteration, over all processes.
        seed: the run's seed.
        augmentation: applied here, in the worker; None: left to the caller (on a GPU).
        ignore: label index that counts for nothing.
        outside_fov: what lies outside of the field of view: "unknown" or "background", see `finish_targets`.
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
        outside_fov: str = "unknown",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.stored, self.reader = list(stored.values()), reader
        self.names, self.samples_per_epoch = list(stored), samples
        self.batch, self.seed, self.augmentation = batch, seed, augmentation
        self.ignore, self.outside_fov = ignore, outside_fov
        self.rank, self.world = rank, world
        self._planned: tuple[int, list[PlannedSample]] = (-1, [])

    @property
    def iterations(self) -> int:
        """Iterations in an epoch; the last one may have fewer samples."""
        return -(-self.samples_per_epoch // self.batch)

    @property
    def on_gpu(self) -> bool:
        """Whether patches are cut in a GPU's memory: by this process then, for workers have no GPU."""
        image = self.stored[0].arrays["image"]
        return isinstance(image, torch.Tensor) and image.is_cuda

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
        share = len(every[self.rank :: self.world]) / len(every)
        batch = Batch(key, cases, seeds, stack(parts), share, tuple(spacings))
        return self.finish(batch) if self.augmentation is not None else batch

    def finish(self, batch: Batch, augmentation: Augmentation | None = None) -> Batch:
        """The batch augmented, its label and weight as the loss takes them; on the device where it is."""
        augmentation = augmentation or self.augmentation
        try:
            tensors = batch.tensors
            if augmentation is not None:
                tensors = augmentation(tensors, batch.seeds, batch.spacings, self.reader.context)
            return replace(batch, tensors=finish_targets(tensors, self.ignore, self.outside_fov))
        except MedsegError as error:
            error.case = error.case or ", ".join(batch.cases)
            raise

    def __getitems__(self, keys: Sequence[Key]) -> list[Batch]:
        return [self[key] for key in keys]
