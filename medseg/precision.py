"""How far fp32 is rounded: TF32 keeps 11 of its 24 bits in matrix products and convolutions.

torch has two ways to say so, and reading one of them fails after the other was used. Whoever uses medseg may have used
either: both are put back as they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["full_precision", "kept_precision"]


@contextlib.contextmanager
def kept_precision() -> Iterator[None]:
    """A block after which torch rounds fp32 as before it, whichever way that was said.

    >>> with kept_precision():
    ...     torch.set_float32_matmul_precision("high")
    >>> torch.get_float32_matmul_precision()
    'highest'
    """
    settings = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, *_convolutions()]
    rounded = [setting.fp32_precision for setting in settings]
    # what the older way says cannot be read where the newer one says otherwise: then it was not used
    products, convolutions = "highest", True
    with contextlib.suppress(RuntimeError):
        products = torch.get_float32_matmul_precision()
    with contextlib.suppress(RuntimeError):
        convolutions = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
        for setting, value in zip(settings, rounded, strict=True):
            setting.fp32_precision = value


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """fp32 in all 24 bits for the block: by default cuDNN's convolutions round their inputs to TF32's 11 bits.

    With TF32 tiled and whole-image output differ by some 1e-3 on a GPU (an algorithm is chosen for each size), and
    positions in a patch of 512 voxels by a quarter of a voxel. Has no effect on most CPUs, nor on what autocast
    computes in bf16 or fp16.
    """
    with kept_precision():
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        for setting in _convolutions():  # where a setting for all of torch says TF32, the line above leaves it at that
            setting.fp32_precision = "ieee"
        yield


def _convolutions() -> list[Any]:
    return [torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.mkldnn.conv]
