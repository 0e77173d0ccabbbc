"""How much memory a network needs per input voxel, and how much there is."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from medseg.errors import UsageError

__all__ = [
    "LiveBytes",
    "available_memory",
    "bytes_per_voxel",
    "container_memory",
    "memory_with_swap",
    "parse_bytes",
    "peak_activation_bytes",
    "resident_bytes",
]

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
WORKSPACE = 1.25  # batch norm outputs, allocator's rounding, small buffers
# oneDNN keeps a copy of a convolution's output besides the tensors that torch shows, channels rounded up to a block of
# 16. Measured on 2-D and 3-D networks of 4 to 128 channels: the estimate is between 5 % below and 35 % above.
_BLOCK = 16


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operators create, and the most bytes alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        beside = (
            _workspace(result)
            if isinstance(result, torch.Tensor) and func.__name__.startswith(("conv", "slow_conv", "mkldnn_conv"))
            else 0
        )
        self.peak = max(self.peak, beside + sum(size for _, size in self._alive.values()))
        return result


def _workspace(output: torch.Tensor) -> int:
    channels = output.shape[1]
    return output.nbytes // channels * -(-channels // _BLOCK) * _BLOCK


def peak_activation_bytes(network: Any, shape: Sequence[int], *, dtype: torch.dtype = torch.float32) -> int:
    """Most bytes of activations alive at once in one inference pass over an input of `shape` (B, C, *spatial).

    Copies that convolutions keep while they run and the outputs of the batch before are counted, weights are not. The
    pass runs on the meta device: nothing is computed and no memory is used.

    >>> round(peak_activation_bytes(torch.nn.ReLU(), (1, 1, 64, 64)) / 64**2 / 4)
    3
    >>> round(peak_activation_bytes(torch.nn.Conv2d(1, 8, 3, padding=1), (1, 1, 64, 64)) / 64**2 / 4)  # 1 + 8 + 16 + 8
    33
    """
    if isinstance(network, torch.nn.Module):
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        stand_ins = {name: torch.empty_like(value, device="meta") for name, value in tensors.items()}
        call = functools.partial(torch.func.functional_call, network, stand_ins)
    else:
        call = network
    image = torch.empty(tuple(shape), dtype=dtype, device="meta")
    with torch.inference_mode(), LiveBytes() as live:
        result = call(image)
    result = result[0] if isinstance(result, tuple | list) else result
    # the outputs of one batch are still being reduced, or kept for windows of constant value, when the next is computed
    return live.peak + image.nbytes + result.nbytes


def bytes_per_voxel(network: Any, channels: int, size: Sequence[int], *, half: bool = False) -> float:
    """Bytes of memory per voxel of an input window of `size`, with the workspace of the convolutions.

    Linear in the number of voxels to a few percent. A network that cannot run on the meta device (it looks at values)
    runs once, for real, on a window of 32 voxels a side.
    """
    shape = (1, channels, *(int(n) for n in size))
    try:
        peak = peak_activation_bytes(network, shape)
    except (RuntimeError, NotImplementedError, TypeError):
        legal = getattr(network, "legal_size", None)
        if legal is not None:
            raise  # medseg's own networks run on meta: this is a fault of the call, and the message says which
        shape = (1, channels, *(min(32, n) for n in shape[2:]))
        device = next((p.device for p in network.parameters()), None) if isinstance(network, torch.nn.Module) else None
        image = torch.zeros(shape, device=device)
        with torch.inference_mode(), LiveBytes() as live:
            result = network(image)
        peak = live.peak + image.nbytes + (result[0] if isinstance(result, tuple | list) else result).nbytes
    # autocast keeps activations in 2 bytes, but casts of the input and of the weights come on top
    return peak / math.prod(shape[2:]) * WORKSPACE * (0.6 if half else 1.0)


def available_memory(device: torch.device | str = "cpu") -> int:
    """Free bytes on the device; on the host, what can be had without swapping.

    Limits of a container or a batch system (control groups 1 and 2) and of the address space (`ulimit -v`) count.
    """
    device = torch.device(device)
    if device.type == "cuda":  # what torch's allocator keeps of a training step for the next can be had as well
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    found = [int(psutil.virtual_memory().available)]
    if (left := container_memory()) is not None:
        found.append(left)
    with contextlib.suppress(ImportError):  # the module is missing on Windows
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            found.append(limit - int(psutil.Process().memory_info().vms))
    return max(0, min(found))


def memory_with_swap() -> int:
    """Bytes that the host gives before it has to end a process: `available_memory` and free swap."""
    return available_memory() + int(psutil.swap_memory().free)


def container_memory(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes left of what the control groups of this process allow, from the narrowest of them; None without a limit.

    Args:
        own: the kernel's list of this process's groups, lines like `0::/user.slice`.
        root: where the groups' files are; a container sees its own group there.
    """
    lefts = []
    with contextlib.suppress(OSError):
        for line in own.read_text(encoding="utf-8").splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" and not controllers:
                place, names = root, ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                place = root / "memory"
            else:
                continue
            parts = [part for part in path.split("/") if part and part != ".."]
            for count in range(len(parts), -1, -1):
                with contextlib.suppress(OSError, ValueError):  # no limit here: no such file, or "max"
                    lefts.append(_left(place.joinpath(*parts[:count]), *names))
    return min(lefts, default=None)


def _left(group: Path, limit: str, used: str, cache: str) -> int:
    most = int((group / limit).read_text(encoding="ascii"))
    lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    pages = sum(int(line.split()[1]) for line in lines if line.startswith(f"{cache} "))  # files that can be dropped
    return most - int((group / used).read_text(encoding="ascii")) + pages


def resident_bytes() -> int:
    """Bytes that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def parse_bytes(value: int | float | str | None, field: str = "max_ram") -> int | None:
    """`"3GB"`, `"512M"`, `"2.5 GiB"` or a number of bytes; units are powers of 1024.

    >>> parse_bytes("3GB"), parse_bytes("512 MiB"), parse_bytes(1000), parse_bytes(None)
    (3221225472, 536870912, 1000, None)
    """
    if value is None:
        return None
    if isinstance(value, int | float):
        amount = float(value)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", value, re.IGNORECASE)
        if not match:
            raise UsageError("not an amount of memory", field=field, expected='like "3GB", "512MB"', found=value)
        amount = float(match[1]) * _UNITS[match[2].lower()]
    if not 0 < amount < math.inf:
        raise UsageError("an amount of memory must be positive and finite", field=field, found=value)
    return int(amount)
