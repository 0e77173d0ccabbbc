"""The machine as training sees it: device, number type, threads, memory of the process, determinism.

Each choice is made once, said in the run's provenance, and taken back when the `configured` block ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medseg.errors import ResourceError, UsageError
from medseg.precision import kept_precision

__all__ = [
    "Hardware",
    "choose_hardware",
    "configured",
    "fast_layout",
    "keep_memory",
    "kept_memory",
    "memory_format",
    "memory_is_kept",
    "peak_memory",
    "real_cores",
    "supports_bf16",
]

# glibc's numbers for mallopt, from malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_GLIBC_DEFAULTS = {_M_TRIM_THRESHOLD: 128 * 1024, _M_MMAP_MAX: 65536}
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_KEPT: set[str] = set()  # not empty while freed memory is kept; of the process, as glibc's settings are


@dataclass(frozen=True)
class Hardware:
    """What was chosen.

    Attributes:
        device: where the network lives.
        precision: "fp32", "bf16" or "fp16": the number type of autocast; weights and optimizer stay in fp32.
        threads: threads of one operation on the CPU.
        name: the processor's or the GPU's name.
    """

    device: torch.device
    precision: str
    threads: int
    name: str

    @property
    def dtype(self) -> torch.dtype | None:
        """Number type for autocast, or None for fp32."""
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    def describe(self) -> str:
        """One line for the screen and the provenance.

        >>> Hardware(torch.device("cpu"), "bf16", 2, "AMD EPYC").describe()
        'cpu (AMD EPYC), bf16, 2 threads'
        """
        threads = f"{self.threads} thread" + ("s" if self.threads != 1 else "")
        return f"{self.device} ({self.name}), {self.precision}, {threads}"


def choose_hardware(device: str = "auto", precision: str = "auto", *, local_rank: int = 0) -> Hardware:
    """Device and number type, checked.

    Args:
        device: "auto" (CUDA, then Apple's GPU, then the CPU), "cpu", "cuda", "cuda:1", "mps".
        precision: "auto" (bf16 where the processor computes with it, else fp32), "fp32", "bf16", "fp16" (CUDA only).
        local_rank: number of this process on this machine; "cuda" then means `cuda:<local_rank>`.

    Raises:
        UsageError: E101, no such device or precision name, or fp16 without CUDA.
        ResourceError: E510, the device is not there.

    >>> choose_hardware("cpu", "fp32").precision
    'fp32'
    """
    chosen = _choose_device(device, local_rank)
    if precision not in ("auto", "fp32", "bf16", "fp16"):
        raise UsageError("unknown precision", field="precision", expected="auto, fp32, bf16, fp16", found=precision)
    if precision == "auto":
        precision = "bf16" if supports_bf16(chosen) else "fp32"
    if precision == "fp16" and chosen.type != "cuda":
        raise UsageError("fp16 needs a CUDA device", field="precision", found=str(chosen), fix="use bf16 or fp32")
    return Hardware(chosen, precision, real_cores(), _device_name(chosen))


def supports_bf16(device: torch.device) -> bool:
    """Whether the processor has instructions for bf16 (AVX512_BF16 or AMX; compute capability 8 or later)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu":
        return False
    # oneDNN emulates bf16 on AVX512 without BF16, which is slower than fp32: the instruction itself is asked for
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if check is not None:
        return bool(check()) or bool(torch.cpu._is_amx_tile_supported())
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        return "avx512_bf16" in flags or "amx_bf16" in flags
    return False


def real_cores() -> int:
    """Cores that this process may use: affinity, container quota, OMP_NUM_THREADS; two threads of a core count once.

    Of several processes of torchrun each has its share: torchrun sets OMP_NUM_THREADS=1 where nobody chose, which would
    leave one core of many to the preparation of a GPU's batches. More than 1 was chosen and counts.

    >>> real_cores() >= 1
    True
    """
    import psutil

    limits = [os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        limits.append(len(os.sched_getaffinity(0)))
    if (physical := psutil.cpu_count(logical=False)) is not None:
        limits.append(physical)
    if (quota := _container_quota()) is not None:
        limits.append(quota)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    beside = os.environ.get("LOCAL_WORLD_SIZE", "") if "TORCHELASTIC_RUN_ID" in os.environ else ""
    if asked == "1" and beside.isdecimal() and int(beside) > 1:
        limits = [min(limits) // int(beside)]
    elif asked.isdecimal() and int(asked) > 0:
        limits.append(int(asked))
    return max(1, min(limits))


def memory_format(dims: int) -> torch.memory_format:
    """The layout in which convolutions are fast: channels last, for 2 or 3 spatial axes."""
    return torch.channels_last_3d if dims == 3 else torch.channels_last


def fast_layout(network: nn.Module, hardware: Hardware) -> torch.memory_format:
    """The layout in which this network's training step is fast, as measured (benchmarks/RESULTS.md).

    Channels last; but on a CPU contiguous with instance norm, which has no other kernel there and would copy its input
    twice (steps 15 to 25 % slower), and for 3-D networks in fp32 (4 to 8 % slower with AVX-512). With AVX2 alone 3-D
    convolutions in fp32 are so much faster channels last (steps 5 to 40 %) that this outweighs the copies too.
    """
    dims = getattr(network, "spatial_dims", None)
    if not isinstance(dims, int):
        dims = 3 if any(isinstance(module, nn.Conv3d) for module in network.modules()) else 2
    if hardware.device.type == "cpu":
        instance = any(isinstance(m, nn.modules.instancenorm._InstanceNorm) for m in network.modules())
        full_3d = dims == 3 and hardware.dtype is None
        if (instance or full_3d) and not (full_3d and torch.backends.cpu.get_cpu_capability() == "AVX2"):
            return torch.contiguous_format
    return memory_format(dims)


def keep_memory(keep: bool = True) -> bool:
    """Make glibc keep freed memory for the next step instead of giving it back to the system and faulting it in anew.

    A training step frees and takes the same large blocks each time; by default each is a fresh `mmap`, whose pages the
    kernel has to zero. Returns False, and does nothing, where the C library is not glibc.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    values = {_M_TRIM_THRESHOLD: 2**31 - 1, _M_MMAP_MAX: 0} if keep else _GLIBC_DEFAULTS
    done = [library.mallopt(ctypes.c_int(number), ctypes.c_int(value)) for number, value in values.items()]
    if not keep:
        library.malloc_trim(ctypes.c_size_t(0))
    _KEPT.clear()
    _KEPT.update({"kept"} if keep and all(done) else ())
    return all(done)


def memory_is_kept() -> bool:
    """Whether `keep_memory` is in force."""
    return bool(_KEPT)


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """`keep_memory` for a block; inside of another such block, or of training, nothing changes at its end."""
    if _KEPT:
        yield
        return
    done = keep_memory()
    try:
        yield
    finally:
        if done:
            keep_memory(False)


@contextlib.contextmanager
def configured(hardware: Hardware, *, deterministic: bool = True) -> Iterator[None]:
    """Threads, memory and determinism for the block; what was set before comes back afterwards.

    On a CPU with `deterministic` equal inputs give equal bits. On a GPU some operations (the gradient of linear
    interpolation, for one) have no deterministic form; they run all the same. Matrix products there are deterministic
    with a workspace of fixed size alone, which cuBLAS takes from the environment.
    """
    workspace = os.environ.get(_WORKSPACE)
    if deterministic and workspace is None and hardware.device.type == "cuda":
        os.environ[_WORKSPACE] = ":4096:8"
    threads = torch.get_num_threads()
    algorithms = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    fill = torch.utils.deterministic.fill_uninitialized_memory
    benchmark = torch.backends.cudnn.benchmark
    torch.set_num_threads(hardware.threads)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs a pass over memory for each new tensor
    torch.backends.cudnn.benchmark = not deterministic
    kept = hardware.device.type == "cpu" and keep_memory()
    try:
        with warnings.catch_warnings(), kept_precision():
            torch.set_float32_matmul_precision("high")  # TF32 on a GPU; nothing on most CPUs
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
            # 1x1 kernels have several equal layouts; DistributedDataParallel may name another than autograd does
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            yield
    finally:
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark
        if kept:
            keep_memory(False)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Largest memory so far, in MB (10^6 bytes): of this process, and of the GPU if there is one."""
    found = {}
    with contextlib.suppress(ImportError):  # the module is missing on Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux 1024 of them
        found["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    if device.type == "cuda":
        found["gpu"] = torch.cuda.max_memory_allocated(device) / 1e6
    return found


def _choose_device(device: str, local_rank: int) -> torch.device:
    mps: Any = torch.backends.mps
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda", "mps"):
        expected = "auto, cpu, cuda, cuda:1, mps"
        raise UsageError("unknown device", field="device", expected=expected, found=device)
    fix = "use --device cpu, or look at `medseg doctor`"
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0  # counted without a driver that fits, too
        if chosen.index is None:
            chosen = torch.device("cuda", local_rank)
        if chosen.index >= count:
            raise ResourceError("no such GPU", code="E510", field="device", found=f"{count} CUDA devices", fix=fix)
    if chosen.type == "mps" and not mps.is_available():
        raise ResourceError("no Apple GPU here", code="E510", field="device", fix=fix)
    return torch.device("cpu") if chosen.type == "cpu" else chosen


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _container_quota() -> int | None:
    """Cores that a Linux control group allows, rounded up; None without a limit."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else max(1, -(-int(quota) // int(period)))
    return None
