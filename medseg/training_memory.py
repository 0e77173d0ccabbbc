"""Memory of a training step: estimated before it starts, and told with the options that help when it runs out.

On a GPU running out is an error, and smaller patches are then tried. A CPU's memory ends differently: Linux grants more
than there is and kills the process without a word. So there the step is measured on torch's meta device, where nothing
is computed and no memory is used, and what cannot fit is refused before the first step.
"""

from __future__ import annotations

import contextlib
import gc
import math
import traceback
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import nn

from medseg.engine_session import Session
from medseg.errors import MedsegError, ResourceError, UsageError
from medseg.hardware import keep_memory, peak_memory
from medseg.inference.memory import WORKSPACE, LiveBytes, available_memory
from medseg.inference.passes import is_out_of_memory

__all__ = ["check_memory", "largest_patch", "memory_error", "step_bytes"]

_HALF = 0.6  # of the bytes in fp32 with autocast: 2 bytes for most activations, casts of input and weights on top
_KEPT = 1.15  # the C library keeps memory in pieces, into which not every tensor fits; measured, see below
# for all networks (benchmarks/step_memory.py) the estimate is 0.84 to 1.17 of the growth of resident memory in fp32 and
# 0.69 to 1.60 in bf16; what has not even this share of it free cannot work
_SURE = 0.6
_SCALES = tuple(0.95**k for k in range(1, 91))  # of the patch's sides: down to a hundredth


def step_bytes(network: nn.Module, shape: tuple[int, ...], *, half: bool = False) -> int:
    """Most bytes of activations and gradients alive at once in one training step; weights are not counted.

    Args:
        network: in training mode; its own tensors stay as they are.
        shape: (B, C, *patch) of the images.
        half: the step runs in bf16 or fp16.

    Raises:
        RuntimeError, NotImplementedError, TypeError: a network that cannot run on the meta device.

    >>> step_bytes(nn.Conv2d(1, 8, 3, padding=1), (1, 1, 64, 64)) > 8 * 64**2 * 4
    True
    """

    def stand_in(value: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(value, device="meta").requires_grad_(value.requires_grad)

    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    stand_ins = {f"network.{name}": stand_in(value) for name, value in tensors.items()}
    image = torch.empty(shape, device="meta")
    with LiveBytes() as live, torch.enable_grad():
        torch.func.functional_call(_WholeStep(network), stand_ins, (image,))
    return int((live.peak + image.nbytes) * WORKSPACE * _KEPT * (_HALF if half else 1.0))


class _WholeStep(nn.Module):
    """Forward and backward pass as one module: recomputed activations need the same tensors in both."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> None:
        output = self.network(image)
        outputs = output if isinstance(output, tuple | list) else [output]
        terms = [part.float().log_softmax(1).square().sum() for part in outputs]
        torch.stack(terms).sum().backward()


def check_memory(session: Session) -> list[str]:
    """Before the first step on a CPU: what should be told.

    Raises:
        ResourceError: E523, the step needs more memory than there is.
    """
    if session.hardware.device.type != "cpu" or (need := _estimate(session, session.train.patch)) is None:
        return []
    free = available_memory("cpu") // session.group.neighbours
    if need <= free:
        return []
    if need * _SURE > free + psutil.swap_memory().free:
        found = f"about {need / 1e9:.3g} GB for a step, {free / 1e9:.3g} GB free"
        raise _told("not enough memory for a training step", session, found, largest_patch(session))
    return [f"memory may run out: a step needs about {need / 1e9:.3g} GB, {free / 1e9:.3g} GB are free"]


def memory_error(error: BaseException, session: Session) -> MedsegError | None:
    """A ResourceError that says what helps, if `error` is about memory; else None."""
    if isinstance(error, MedsegError) or not is_out_of_memory(error):
        return None
    traceback.clear_frames(error.__traceback__)  # they hold the tensors of the step, which a smaller patch can do with
    peak = ", ".join(f"{name} {value:.0f} MB" for name, value in peak_memory(session.hardware.device).items())
    return _told("out of memory while training", session, f"most used: {peak}", largest_patch(session))


def largest_patch(session: Session) -> tuple[int, ...] | None:
    """The largest legal patch below the present one, to 5 % of its sides, whose step fits; None if none is found.

    On a GPU forward and backward pass are tried; on a CPU they are estimated (`step_bytes`) and have to fit into what
    is free now, and into less than the present patch, which did not fit, is estimated to need.
    """
    step, device, patch = session.step, session.hardware.device, tuple(session.train.patch)
    step.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    fits: Callable[[tuple[int, ...]], bool] = lambda size: _works(session, size)  # noqa: E731
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        keep_memory(False)  # what glibc was told to keep counts as free: training is over
        failed = _estimate(session, patch)
        if failed is None:
            return None
        limit = min(available_memory(device) // session.group.neighbours, _SURE * failed)
        fits = lambda size: _estimated(session, size) <= limit  # noqa: E731
    sizes = _smaller(step.bare, patch)
    low, high = 0, len(sizes)  # the first that fits lies in [low, high]
    while low < high:
        middle = (low + high) // 2
        if fits(sizes[middle]):
            high = middle
        else:
            low = middle + 1
    if low == len(sizes) or _estimate(session, sizes[low]) == 0:
        return None
    return sizes[low]


def _told(what: str, session: Session, found: str, patch: tuple[int, ...] | None) -> ResourceError:
    train, hardware = session.train, session.hardware
    options = []
    if patch is not None:
        how = "tried" if hardware.device.type == "cuda" else "estimated"
        options.append(f"train.patch={list(patch)}, the largest patch that fits ({how})")
    if train.batch > session.group.world:
        half = max(session.group.world, train.batch // 2)
        options.append(f"train.batch={half} with train.accumulate={train.accumulate * -(-train.batch // half)}")
    if not train.checkpoint_activations:
        options.append("train.checkpoint_activations=true")
    if hardware.precision == "fp32":
        options.append("train.precision=bf16")
    return ResourceError(
        what,
        code="E523",
        field="train.patch, train.batch",
        found=f"patch {list(train.patch)}, batch {train.batch}, {hardware.precision}; {found}",
        fix="--set " + "; or --set ".join(options or ["network=... with fewer channels"]),
    )


def _shape(session: Session, patch: tuple[int, ...]) -> tuple[int, ...]:
    return (-(-session.train.batch // session.group.world), session.channels["in_channels"], *patch)


def _estimate(session: Session, patch: tuple[int, ...]) -> int | None:
    half, network, parts = session.hardware.dtype is not None, session.step.bare, session.step.parts
    shape = _shape(session, tuple(patch))
    # parts side by side have gradients of their own, and their outputs are put together for the loss and its gradient
    weights = sum(4 * value.numel() for value in network.parameters())
    outputs = 4 * shape[0] * session.channels["out_channels"] * math.prod(patch)
    further = (parts - 1) * weights + (2 * outputs if parts > 1 else 0)
    try:
        return step_bytes(network, shape, half=half) + further
    except ValueError:
        return 0  # batch norm refuses a single value per channel: memory is not what this patch lacks
    except (RuntimeError, NotImplementedError, TypeError):
        return None  # a network that looks at values


def _estimated(session: Session, patch: tuple[int, ...]) -> float:
    need = _estimate(session, patch)
    return math.inf if need is None else need


def _smaller(network: Any, patch: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Legal sizes below the patch in its proportions, the largest first."""
    found = []
    for scale in _SCALES:
        with contextlib.suppress(UsageError):
            legal = tuple(network.legal_size(tuple(max(1, int(n * scale)) for n in patch)))
            legal = tuple(map(min, legal, patch))
            if math.prod(legal) < math.prod(found[-1] if found else patch) and _is_legal(network, legal):
                found.append(legal)
    return found


def _is_legal(network: Any, size: tuple[int, ...]) -> bool:
    return tuple(network.legal_size(size)) == size


def _works(session: Session, patch: tuple[int, ...]) -> bool:
    hardware, step = session.hardware, session.step
    cast = torch.autocast(hardware.device.type, dtype=hardware.dtype) if hardware.dtype else contextlib.nullcontext()
    try:
        image = torch.zeros(_shape(session, patch), device=hardware.device)
        with cast:
            _WholeStep(step.bare)(image)
    except ValueError:
        return True  # too small for batch norm, not too large
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        step.optimizer.zero_grad(set_to_none=True)
    return True
