"""Several processes as one: started by torchrun, talking over gloo (CPU) or nccl (GPU) through ignite.

Only tensors travel between processes, never objects. Decisions (stop, which folder, scores) go over gloo on the CPU,
so that nothing waits for a GPU. If a process is lost, the next exchange of the others fails: nobody hangs.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist
from torch import nn

from medseg.errors import MedsegError, TrainingError, UsageError
from medseg.hardware import choose_hardware

__all__ = ["Group", "launched", "lost_process", "processes", "tell_copies", "wrap_network"]

# how many tasks a launcher started: SLURM's srun (`man srun`, "output environment variables"), Open MPI, MPICH
_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
PATIENCE = datetime.timedelta(hours=2)  # for the slowest validation case; a process that died is noticed at once


@dataclass(frozen=True)
class Group:
    """The processes of this run.

    Attributes:
        rank: number of this process; 0 writes.
        world: how many there are.
        local_rank: number of this process on its machine.
        control: gloo group for decisions, or None with one process.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    control: Any = None

    @property
    def writes(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def neighbours(self) -> int:
        """How many of them share this machine and its memory."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.world)) if self.world > 1 else 1

    def any(self, flag: int) -> int:
        """The largest of all processes' numbers."""
        return self.largest([flag])[0]

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest of all processes' numbers, one by one."""
        if self.control is None:
            return list(values)
        return self._reduce(torch.tensor(list(values), dtype=torch.int64), dist.ReduceOp.MAX).tolist()

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, on the CPU."""
        return self._reduce(values.detach().cpu().clone(), dist.ReduceOp.SUM) if self.control else values.detach().cpu()

    def share_text(self, text: str) -> str:
        """The text that process 0 gives."""
        if self.control is None:
            return text
        raw = text.encode("utf-8", "surrogateescape")
        length = self._reduce(torch.tensor([len(raw) if self.rank == 0 else 0]), dist.ReduceOp.MAX)
        data = torch.zeros(int(length[0]), dtype=torch.uint8)
        if self.rank == 0:
            data = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else data
        with _told():
            dist.broadcast(data, 0, group=self.control)
        return bytes(data.tolist()).decode("utf-8", "surrogateescape")

    def share_values(self, tensors: Iterable[torch.Tensor]) -> None:
        """Put the values that process 0 has into the other processes' tensors (on the CPU)."""
        if self.control is None:
            return
        with _told():
            for tensor in tensors:
                dist.broadcast(tensor, 0, group=self.control)

    def wait(self) -> None:
        """Until all processes are here."""
        self.any(0)

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """A block that process 0 does alone; if it fails there, the others end too instead of waiting."""
        problem: BaseException | None = None
        if self.rank == 0:
            try:
                yield
            except BaseException as error:
                problem = error
        else:
            yield
        failed = self.any(int(problem is not None))
        if problem is not None:
            raise problem
        if failed:
            raise LostProcess("another process ended with an error", code="E620")

    def _reduce(self, values: torch.Tensor, how: Any) -> torch.Tensor:
        with _told():
            dist.all_reduce(values, how, group=self.control)
        return values


# gloo has no errors of its own: its texts hold the path of its source, or what the system says of a connection
_BROKEN = ("gloo", "Connection reset by peer", "Connection closed by peer", "Broken pipe")


class LostProcess(TrainingError):
    """Another process of the run has ended; its own message says why."""

    default_code = "E620"


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except MedsegError:
        raise
    except RuntimeError as error:
        raise _lost(error) from error


def _lost(error: BaseException) -> LostProcess:
    text = str(error).splitlines()[0]
    return LostProcess("a process of this run was lost", found=text, fix="continue with --resume")


def lost_process(error: BaseException) -> LostProcess | None:
    """`error` of a training step as the loss of another process, if it is that: torch itself exchanges gradients."""
    told = isinstance(error, RuntimeError) and any(text in str(error) for text in _BROKEN)
    exchanged = isinstance(error, dist.DistError) or told
    return _lost(error) if exchanged else None


def launched() -> bool:
    """Whether torchrun has started this as one of several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def tell_copies() -> list[str]:
    """What should be told where srun or mpirun has started several of this process without torchrun.

    It may be meant (seeds side by side, each with its own command), so it is no error.
    """
    name, count = next(((name, os.environ[name]) for name in _TASKS if name in os.environ), ("", "1"))
    if launched() or not count.isdecimal() or int(count) < 2:
        return []
    return [
        f"{count} tasks were started ({name}), and each trains a run of its own, on the same cores and GPUs if they "
        "share a machine; for one run on all of them let each machine's task start torchrun (docs/training.md)"
    ]


@contextlib.contextmanager
def processes(device: str = "auto") -> Iterator[Group]:
    """The group of this run's processes for the block; a group of one when nothing else was launched.

    Raises:
        UsageError: launched, but without the address of the first process.
        ResourceError: E510, there is no GPU for this process.
    """
    if not launched():
        yield Group()
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK") if name not in os.environ]
    if missing:
        found = f"{', '.join(missing)} not set"
        raise UsageError("cannot join the other processes", field="WORLD_SIZE", found=found, fix="start with torchrun")
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:  # refused here and not by nccl, which only knows that it failed
        choose_hardware(device, local_rank=int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if on_gpu else "gloo"
    with _told(), _by_torchrun():
        idist.initialize(backend, timeout=PATIENCE)
    control = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=PATIENCE)
    group = Group(idist.get_rank(), idist.get_world_size(), idist.get_local_rank(), control)
    try:
        yield group
    except BaseException:
        # no farewell: the others may wait in an exchange that only ends when this process does
        raise
    else:
        # gloo's thread needs the interpreter to let go of the last exchange's tensors; torch waits for that thread with
        # the interpreter locked when the last holder of the group goes. So: no holder but torch, and time to let go
        gc.collect()
        time.sleep(0.2)
        with _by_torchrun():
            idist.finalize()


@contextlib.contextmanager
def _by_torchrun() -> Iterator[None]:
    """A block in which ignite takes the ranks that torchrun gave.

    Inside of a SLURM job it asks that they be those of SLURM's tasks, of which one starts a torchrun for each machine.
    """
    job = os.environ.pop("SLURM_JOB_ID", None)
    try:
        yield
    finally:
        if job is not None:
            os.environ["SLURM_JOB_ID"] = job


def wrap_network(network: nn.Module, group: Group, device: torch.device) -> tuple[nn.Module, list[str]]:
    """The network for training with the group's processes, and what should be told.

    Batch norm takes its statistics over all processes on GPUs; on CPUs over each process's own samples, and before each
    validation all processes get the running statistics of the first.
    """
    if group.world == 1:
        return network, []
    notices = []
    if _has_batch_norm(network):
        if device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        else:
            notices.append(
                "batch norm: torch cannot synchronise it on CPUs; each process uses the statistics of its own "
                "samples, so losses are not quite those of one process (with norm: instance they are)"
            )
    ids: Sequence[int] | None = [device.index or 0] if device.type == "cuda" else None
    with _told():
        return nn.parallel.DistributedDataParallel(network, device_ids=ids), notices


def _has_batch_norm(network: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
