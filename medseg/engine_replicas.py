"""One batch in several parts side by side, each on threads of its own: what a CPU with several cores is faster with.

    replicas = Replicas(network, 2, hardware)
    logits = replicas(images)      # each part of the batch through its own copy of the network
    loss(logits, label).backward()
    replicas.backward()            # on to the weights; their gradients are added in a fixed order

Threads that share one operation wait for each other at its end, and a training step has some hundred operations; parts
of the batch need nothing of each other but at the end of a pass. Copies share the network's weights; their
gradients and the outputs, put together for the loss, are what more memory is needed for. The loss is computed over the
whole batch: without batch norm the gradient is that of the undivided batch, but for rounding. Batch norm takes the
statistics of each part by itself, as it does with several processes; the running ones are the mean of the parts'. So
with batch norm there are two parts at most, and not more where there are more cores.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import nn

from medseg.errors import ConfigError
from medseg.hardware import Hardware

__all__ = ["Replicas", "choose_replicas"]

_MOST = 2  # parts with batch norm
# how much faster an operation is on n threads: n ** 0.6. Steps on two threads were 1.3 to 1.6 times as fast as on one
_SHARED = 0.6


class Replicas:
    """The network and copies of it, each with a part of every batch.

    Args:
        network: on the CPU, in its memory layout; without dropout (see `choose_replicas`).
        count: of parts, at least 2; a smaller batch (an epoch's last) is cut into fewer.
        hardware: threads, which the parts share out, and number type.
    """

    def __init__(self, network: nn.Module, count: int, hardware: Hardware) -> None:
        self.networks = [network]
        for _ in range(count - 1):
            other = copy.deepcopy(network)
            for own, shared in zip(other.parameters(), network.parameters(), strict=True):
                own.data = shared.data
            self.networks.append(other)
        self._dtype, self._least = hardware.dtype, _least(network)
        self._threads = max(1, hardware.threads // count)
        # the number of threads is one of each thread, but setting it also writes the process's default
        before, here = torch.get_num_threads(), threading.Barrier(count)
        self._pool = ThreadPoolExecutor(count, "replica", initializer=_start_thread, initargs=(self._threads,))
        list(self._pool.map(lambda _: here.wait(), range(count)))
        torch.set_num_threads(before)
        self._outputs: list[list[torch.Tensor]] = []
        self._whole: list[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self.networks)

    def __call__(self, images: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """The network's output (or outputs, with deep supervision) for the whole batch, for the loss to look at."""
        parts = images.tensor_split(min(len(self), max(1, len(images) // self._least)))
        self._spread_statistics()
        found = self._each(self._forward, self.networks, parts)
        self._outputs = [[part] if isinstance(part, torch.Tensor) else list(part) for part in found]
        self._whole = [
            torch.cat([part.detach() for part in level]).requires_grad_() for level in zip(*self._outputs, strict=True)
        ]
        return self._whole[0] if isinstance(found[0], torch.Tensor) else self._whole

    def backward(self) -> None:
        """From the gradient of what the call returned to the gradient of the network's weights."""
        seen = [(index, level.grad) for index, level in enumerate(self._whole) if level.grad is not None]
        parts = [grad.tensor_split(len(self._outputs)) for _, grad in seen]
        tasks = [
            ([outputs[index] for index, _ in seen], [grads[number] for grads in parts])
            for number, outputs in enumerate(self._outputs)
        ]
        self._outputs, self._whole = [], []
        self._each(_backward, tasks)
        for other in self.networks[1 : len(tasks)]:
            for own, further in zip(self.networks[0].parameters(), other.parameters(), strict=True):
                if further.grad is not None:
                    own.grad = further.grad if own.grad is None else own.grad.add_(further.grad)
                    further.grad = None
        # not before: the backward pass of batch norm looks at its statistics
        self._gather_statistics(len(tasks))

    def _each(self, function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
        """Results of all parts; an error is raised when the last one has ended, and leaves nothing behind."""
        tasks = [self._pool.submit(function, *each) for each in zip(*arguments, strict=False)]
        wait(tasks)
        try:
            return [task.result() for task in tasks]
        except BaseException:
            self._outputs, self._whole = [], []
            for other in self.networks[1:]:
                other.zero_grad(set_to_none=True)
            raise

    def _forward(self, network: nn.Module, images: torch.Tensor) -> Any:
        # the number type of autocast belongs to a thread, its cache of weights to all of them
        half = self._dtype is not None
        cast = torch.autocast("cpu", dtype=self._dtype, enabled=half, cache_enabled=False)
        with torch.enable_grad(), cast:
            return network(images)

    def _spread_statistics(self) -> None:
        """Let the copies begin with the network's running statistics (which a checkpoint may just have brought)."""
        for other in self.networks[1:]:
            for own, shared in zip(other.buffers(), self.networks[0].buffers(), strict=True):
                own.copy_(shared)

    def _gather_statistics(self, used: int) -> None:
        """Give the network the mean of the running statistics of the parts (all of one size but for a sample)."""
        for values in zip(*(other.buffers() for other in self.networks[:used]), strict=True):
            if values[0].is_floating_point() and used > 1:
                values[0].copy_(torch.stack(values).mean(0))


def choose_replicas(
    network: nn.Module, wish: int | str, batch: int, hardware: Hardware, *, alone: bool
) -> tuple[int, list[str]]:
    """Parts of a batch that are computed side by side, and what should be told.

    Args:
        network: its dropout and batch norm are looked at.
        wish: `train.replicas`; "auto" takes as many as are fastest with these threads, with batch norm at most two of
            two samples or more, and one alone where the parts could not be computed by themselves.
        batch: samples of an iteration.
        hardware: device and threads.
        alone: one process, nothing compiled, no activations recomputed.

    Raises:
        ConfigError: E118, more than one part was asked for where that is not possible.
    """
    least = _least(network)
    dropout = any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in network.modules())
    reasons = {
        "it is computed on a CPU": hardware.device.type == "cpu",
        # the random numbers of threads would depend on which of them comes first
        "the network has no dropout": not dropout,
        "there is one process, and neither train.compile nor train.checkpoint_activations is set": alone,
        f"each part has {least} samples of the batch, which suffices for {batch // least}": (
            wish == "auto" or int(wish) <= max(1, batch // least)
        ),
    }
    missing = [text for text, given in reasons.items() if not given]
    if wish == "auto":
        most = min(hardware.threads, batch // least, _MOST if least > 1 else batch)
        count = 1 if missing else min(range(max(1, most), 0, -1), key=lambda n: _duration(n, batch, hardware.threads))
    else:
        count = int(wish)
        if count > 1 and missing:
            raise ConfigError(
                "a batch cannot be computed in several parts here",
                code="E118",
                field="train.replicas",
                expected=f"1, or that {'; that '.join(missing)}",
                found=count,
                fix="--set train.replicas=auto takes several where that is possible",
            )
    if count == 1:
        return 1, []
    sizes = " or ".join(dict.fromkeys(f"{len(part)}" for part in torch.empty(batch).tensor_split(count)))
    threads = max(1, hardware.threads // count)
    told = f"a batch is computed in {count} parts side by side, {threads} thread{'s' * (threads > 1)} each"
    return count, [told + (f"; batch norm takes the statistics of a part's {sizes} samples" if least > 1 else "")]


def _least(network: nn.Module) -> int:
    """Samples of a part: two with batch norm, which with one is instance norm in training, and is not in prediction."""
    return 1 + any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def _duration(parts: int, batch: int, threads: int) -> float:
    """Of a step, in units of one sample on one thread: the largest part on its share of the threads."""
    return -(-batch // parts) / (threads // parts) ** _SHARED


def _start_thread(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.get_num_threads()  # the first look takes the process's default over; from now on it stays


def _backward(task: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]) -> None:
    torch.autograd.backward(*task)
