"""torch.compile for the training step: on request, or when a measurement at the start says that it pays."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from medseg.errors import ResourceError
from medseg.hardware import Hardware, fast_layout
from medseg.inference.passes import is_out_of_memory

__all__ = ["choose_compiled"]

_ROUNDS = 10
_PAYS = 1.05  # a smaller gain is within the noise, and compiling takes a minute


def choose_compiled(
    network: nn.Module, wish: bool | str, shape: tuple[int, ...], hardware: Hardware
) -> tuple[Callable[..., Any], list[str]]:
    """What the training step calls: the network or its compiled form; and what should be told.

    Args:
        network: on its device, in training mode; its weights and statistics stay as they are.
        wish: `train.compile`: True, False or "auto".
        shape: of a batch (B, C, *patch).
        hardware: device and number type. "auto" measures on a GPU; on a CPU it stays with the plain network.

    Raises:
        ResourceError: E531, compiling was asked for and does not work here (no compiler, as a rule).
    """
    if wish is False or (wish == "auto" and hardware.device.type != "cuda"):
        return network, []
    # patches have one size: nothing is compiled twice but for an epoch's smaller last batch
    compiled = torch.compile(network)
    try:
        fast = _pace(network, compiled, shape, hardware)
    except Exception as error:
        if is_out_of_memory(error):  # training ends so too, and then tells what helps
            return (compiled if wish is True else network), []
        if wish is True:
            text = f"torch.compile does not work here: {type(error).__name__}"
            found = (str(error).splitlines() or [""])[0]
            fix = "install a C++ compiler, or set train.compile=false"
            raise ResourceError(text, code="E531", field="train.compile", found=found, fix=fix) from error
        return network, [f"torch.compile does not work here ({type(error).__name__}): not used"]
    if wish is True:
        return compiled, ["the network is compiled"]
    try:
        plain = _pace(network, network, shape, hardware)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return compiled, ["without torch.compile a step does not fit into memory: used"]
    factor = plain / fast
    told = f"torch.compile makes a step {factor:.2f} times as fast: {'used' if factor > _PAYS else 'not used'}"
    return (compiled if factor > _PAYS else network), [told]


def _pace(network: nn.Module, call: Callable[..., Any], shape: tuple[int, ...], hardware: Hardware) -> float:
    """Seconds of a forward and backward pass; statistics and gradients are put back, however it ends."""
    kept = copy.deepcopy(dict(network.named_buffers()))
    images = torch.zeros(shape, device=hardware.device).contiguous(memory_format=fast_layout(network, hardware))
    begin = 0.0
    try:
        for number in range(_ROUNDS + 3):
            if number == 3:
                _wait(hardware)
                begin = time.perf_counter()
            with torch.autocast(hardware.device.type, dtype=hardware.dtype, enabled=hardware.dtype is not None):
                output = call(images)
            sum(part.float().sum() for part in (output if isinstance(output, tuple | list) else [output])).backward()
            network.zero_grad(set_to_none=True)
        _wait(hardware)
        return (time.perf_counter() - begin) / _ROUNDS
    finally:
        network.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, value in network.named_buffers():
                value.copy_(kept[name])


def _wait(hardware: Hardware) -> None:
    if hardware.device.type == "cuda":
        torch.cuda.synchronize(hardware.device)
