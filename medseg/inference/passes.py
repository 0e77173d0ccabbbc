"""One batch of windows through the networks: mirror passes, fold ensembles, precision, layout, out of memory."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from medseg.errors import ResourceError, UsageError
from medseg.inference.convolutions import FastConvolutions
from medseg.precision import full_precision

__all__ = ["Passes", "is_out_of_memory", "mirror_axes", "to_logits", "to_probabilities"]

Network = Callable[[torch.Tensor], Any]
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_TINY = 1e-30  # log of a probability of 0 stays finite


def mirror_axes(mirror: bool | Sequence[int], dims: int) -> tuple[tuple[int, ...], ...]:
    """All combinations of flipped spatial axes, the empty one first; `mirror` True means every axis.

    >>> mirror_axes((0, 1), 2)
    ((), (0,), (1,), (0, 1))
    """
    axes = tuple(range(dims)) if mirror is True else tuple(sorted({int(a) for a in mirror or ()}))
    if any(a < 0 or a >= dims for a in axes):
        raise UsageError(
            "mirror names an axis that the image does not have",
            field="mirror",
            expected=f"axes 0 to {dims - 1}",
            found=mirror,
        )
    return tuple(c for n in range(len(axes) + 1) for c in itertools.combinations(axes, n))


def to_probabilities(logits: torch.Tensor, axis: int = 1) -> torch.Tensor:
    """Sigmoid for one channel, softmax for several."""
    return logits.sigmoid() if logits.shape[axis] == 1 else logits.softmax(axis)


def to_logits(probabilities: torch.Tensor, axis: int = 1) -> torch.Tensor:
    """Inverse of `to_probabilities` (up to a constant per voxel)."""
    if probabilities.shape[axis] == 1:
        return probabilities.clamp(_TINY, 1 - 1e-7).logit()
    return probabilities.clamp_min(_TINY).log()


def is_out_of_memory(error: BaseException) -> bool:
    """True for CUDA's and the host allocator's ways of saying so."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text
        or "can't allocate memory" in text
        or "not enough memory" in text
        # cuBLAS's and cuDNN's word for it
        or "alloc_failed" in text
    )


class Passes:
    """Calls `networks` on batches of windows and averages: mean of logits' probabilities over networks and mirrors.

    Args:
        networks: one, or the folds of an ensemble; each (B, C, *size) -> (B, K, *size').
        dims: number of spatial axes.
        mirror: test-time mirroring over these axes (True: all); its passes are put into the batch.
        precision: "fp32", or "bf16"/"fp16" autocast.
        device: where the windows go.
        channels_last: memory layout; the fast one for convolutions on most processors.

    A single network without mirroring gives its own logits, untouched. Otherwise the result is the logarithm of the
    mean probability, so that softmax (sigmoid) of it is that mean.
    """

    def __init__(
        self,
        networks: Sequence[Network],
        dims: int,
        *,
        mirror: bool | Sequence[int] = False,
        precision: str = "fp32",
        device: torch.device | str = "cpu",
        channels_last: bool = True,
    ) -> None:
        if not networks:
            raise UsageError("no network given", field="networks")
        if precision not in _DTYPES:
            raise UsageError("unknown precision", field="precision", expected=", ".join(_DTYPES), found=precision)
        self.networks = tuple(networks)
        self.dims = dims
        self.flips = mirror_axes(mirror, dims)
        self.device = torch.device(device)
        self.dtype = _DTYPES[precision]
        layouts = {2: torch.channels_last, 3: torch.channels_last_3d}
        self.layout = layouts.get(dims, torch.contiguous_format) if channels_last else torch.contiguous_format

    @property
    def count(self) -> int:
        """Network passes per window."""
        return len(self.flips) * len(self.networks)

    def __call__(self, windows: torch.Tensor, largest: int | None = None) -> torch.Tensor:
        """(B, C, *size) -> logits (B, K, *size'), float32, on the device; at most `largest` windows per pass.

        After running out of memory the windows are passed in halves; with one window left the error goes on.
        """
        flips = self.flips
        images = windows.to(self.device, non_blocking=True)
        if len(flips) == 1 and len(self.networks) == 1:
            return self._one(self.networks[0], images, largest)
        total: torch.Tensor | None = None
        flipped = images if len(flips) == 1 else torch.cat([_flip(images, axes) for axes in flips])
        for network in self.networks:
            logits = self._one(network, flipped, largest)
            for part, axes in zip(logits.split(len(images)), flips, strict=True):
                probability = to_probabilities(_flip(part, axes))
                total = probability if total is None else total.add_(probability)
            del logits
        assert total is not None
        return to_logits(total.div_(self.count))

    def _one(self, network: Network, images: torch.Tensor, largest: int | None) -> torch.Tensor:
        largest = min(largest or len(images), len(images))
        while True:
            try:
                if largest == len(images):
                    return self._forward(network, images)
                return torch.cat([self._forward(network, part) for part in images.split(largest)])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or largest == 1:
                    raise
            if self.device.type == "cuda":  # outside of the except block: the traceback holds the tensors
                torch.cuda.empty_cache()
            largest = max(1, largest // 2)

    def _forward(self, network: Network, images: torch.Tensor) -> torch.Tensor:
        cast = (
            torch.autocast(self.device.type, dtype=self.dtype) if self.dtype is not None else contextlib.nullcontext()
        )
        # a compiled network has chosen its kernels
        kernels = contextlib.nullcontext() if hasattr(network, "_orig_mod") else FastConvolutions()
        with torch.inference_mode(), cast, kernels, full_precision():
            output = network(images.contiguous(memory_format=self.layout))
        if isinstance(output, tuple | list):  # deep supervision: the full resolution comes first
            output = output[0]
        if isinstance(output, dict):
            raise UsageError("the network returns a dict; inference needs a tensor", field="network")
        return output.float()


def _flip(images: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    return images.flip([axis + 2 for axis in axes]) if axes else images


def memory_error(error: BaseException, window: Sequence[int], fix: str) -> ResourceError:
    """What to tell when not even the smallest plan fits."""
    return ResourceError(
        "out of memory while predicting",
        code="E521",
        field="tile",
        found=f"window {tuple(window)}; {str(error).splitlines()[0] if str(error) else type(error).__name__}",
        fix=fix,
    )
