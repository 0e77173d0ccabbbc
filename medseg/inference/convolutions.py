"""Three-dimensional convolutions of one window by oneDNN, where torch would take its slow general kernel.

For one image torch chooses oneDNN only where batch * channels * the first two spatial axes are more than 20480 (a rule
made for 2-D, in `aten/src/ATen/native/Convolution.cpp`), and never for 1x1 convolutions in a single thread. Windows of
64 voxels with few channels, and all coarse levels, fall below that and are computed by unfolding into a matrix 27 times
as large: measured 1.5 to 11 times slower, with that matrix in memory on top.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["FastConvolutions"]


class FastConvolutions(TorchFunctionMode):
    """Inside of this block `conv3d` in float32 on a CPU is computed by oneDNN; everything else is as it was.

    The same sums in another order: results differ by rounding (1e-6 of the largest). Compiled networks choose their
    kernels themselves and need no such block.

    >>> network = torch.nn.Conv3d(8, 8, 3, padding=1)
    >>> image = torch.rand(1, 8, 16, 16, 16)
    >>> with torch.inference_mode(), FastConvolutions():
    ...     fast = network(image)
    >>> bool(torch.allclose(fast, network(image), atol=1e-5))
    True
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.conv3d:
            return _convolve(*args, **kwargs)
        return func(*args, **kwargs)


def _convolve(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    if not _fit(input, weight, padding):
        return F.conv3d(input, weight, bias, stride, padding, dilation, groups)
    stride, padding, dilation = ([v] * 3 if isinstance(v, int) else list(v) for v in (stride, padding, dilation))
    return torch.mkldnn_convolution(input, weight, bias, padding, stride, dilation, groups)


def _fit(input: torch.Tensor, weight: torch.Tensor, padding: Any) -> bool:
    return (
        input.device.type == "cpu"
        and input.dtype == weight.dtype == torch.float32
        and input.ndim == 5
        and input.numel() > 0
        and not isinstance(padding, str)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")  # which casts the arguments of conv3d, and of no other name
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        # a 1x1 convolution of channels one after the other is a product of matrices, which torch does as such
        and (math.prod(weight.shape[2:]) > 1 or not input.is_contiguous())
    )
