"""The pieces that the networks share: convolution, norm and activation; up-sampling; initialisation.

Convolutions before a norm have no bias (the norm takes the mean away again), activations work in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from medseg.errors import UsageError

__all__ = [
    "CONVOLUTIONS",
    "MAX_POOLS",
    "TRANSPOSED",
    "ConvStack",
    "ConvUnit",
    "Upsample",
    "check_choice",
    "check_common",
    "crop_centre",
    "initialize",
    "make_activation",
    "make_norm",
]

CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Callable[..., nn.Module]] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
MAX_POOLS: dict[int, Callable[..., nn.Module]] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}

NORMS: dict[tuple[str, int], Callable[..., nn.Module]] = {
    ("batch", 2): nn.BatchNorm2d,
    ("batch", 3): nn.BatchNorm3d,
    ("instance", 2): nn.InstanceNorm2d,
    ("instance", 3): nn.InstanceNorm3d,
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "relu6": lambda: nn.ReLU6(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.01, inplace=True),
}
INITIALISATIONS = ("kaiming", "normal", "xavier", "orthogonal")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise UsageError unless `value` is one of `choices`."""
    if value not in choices:
        raise UsageError("no such choice", field=name, expected=" | ".join(str(c) for c in choices), found=value)


def check_common(spatial_dims: int, in_channels: int, out_channels: int, channels: Sequence[int]) -> None:
    """Raise UsageError unless 2 or 3 axes, at least one channel in and out, and positive channel counts."""
    check_choice("spatial_dims", spatial_dims, (2, 3))
    for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
        if value < 1:
            raise UsageError("too few channels", field=name, expected=">= 1", found=value)
    if not channels or any(not isinstance(c, int) or isinstance(c, bool) or c < 1 for c in channels):
        raise UsageError("wrong list of channels", field="channels", expected="whole numbers >= 1", found=channels)


def make_norm(norm: str | None, spatial_dims: int, channels: int) -> nn.Module:
    """A normalisation layer: None, "batch" or "instance" (both with a learnt scale and shift)."""
    check_choice("norm", norm, (None, "batch", "instance"))
    return nn.Identity() if norm is None else NORMS[norm, spatial_dims](channels, affine=True)


def make_activation(activation: str) -> nn.Module:
    """An activation that works in place: "relu", "relu6" (clipped at 6) or "leaky_relu" (slope 0.01)."""
    check_choice("activation", activation, tuple(ACTIVATIONS))
    return ACTIVATIONS[activation]()


class ConvUnit(nn.Sequential):
    """Convolution, norm and activation, (B, in, *spatial) -> (B, out, *spatial').

    >>> ConvUnit(2, 3, 8, norm="batch")(torch.zeros(1, 3, 16, 16)).shape
    torch.Size([1, 8, 16, 16])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int | Sequence[int] = 1,
        padding: int = 1,
        norm: str | None = None,
        activation: str = "relu",
    ) -> None:
        stride = stride if isinstance(stride, int) else tuple(stride)
        convolution = CONVOLUTIONS[spatial_dims](
            in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=norm is None
        )
        layers = [convolution, make_activation(activation)]
        if norm is not None:
            layers.insert(1, make_norm(norm, spatial_dims, out_channels))
        super().__init__(*layers)


class ConvStack(nn.Sequential):
    """Convolution units of kernel 3 one after the other, with the given numbers of channels, then dropout."""

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        channels: Sequence[int],
        *,
        padding: int = 1,
        norm: str | None = None,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        layers: list[nn.Module] = []
        for out_channels in channels:
            layers.append(
                ConvUnit(spatial_dims, in_channels, out_channels, padding=padding, norm=norm, activation=activation)
            )
            in_channels = out_channels
        if dropout:
            layers.append(nn.Dropout(dropout))
        super().__init__(*layers)


class Upsample(nn.Module):
    """Up-sampling by whole factors without weights, half-pixel centres: "linear" or "nearest"."""

    def __init__(self, factors: Sequence[int], mode: str = "linear") -> None:
        super().__init__()
        self.factors = [float(factor) for factor in factors]
        self.linear = mode == "linear"
        self.mode = {2: "bilinear", 3: "trilinear"}[len(self.factors)] if self.linear else "nearest"

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if all(factor == 1 for factor in self.factors):
            return features
        corners = False if self.linear else None
        return F.interpolate(features, scale_factor=self.factors, mode=self.mode, align_corners=corners)

    def extra_repr(self) -> str:
        return f"factors={self.factors}, mode={self.mode}"


def crop_centre(features: torch.Tensor, crops: Sequence[int]) -> torch.Tensor:
    """Take `crops[axis]` samples away from either end of each spatial axis; a view.

    >>> crop_centre(torch.zeros(1, 2, 64, 64), (4, 4)).shape
    torch.Size([1, 2, 56, 56])
    """
    for axis, crop in enumerate(crops, start=2):
        if crop:
            features = features.narrow(axis, crop, features.shape[axis] - 2 * crop)
    return features


def initialize(network: nn.Module, scheme: str = "kaiming") -> None:
    """Give all convolutions in `network` random weights and zero biases, in place; norms start at scale 1, shift 0.

    - "kaiming": N(0, sd sqrt(2 / N)), N the number of inputs of one output neuron (He 2015, doi:10.1109/ICCV.2015.123;
      the U-Net paper's choice). In a transposed convolution an output sees kernel / stride inputs per axis and channel.
    - "normal": N(0, sd 0.02). "xavier": N(0, sd sqrt(2) sqrt(2 / (N in + N out))). "orthogonal": gain sqrt(2).

    Raises:
        UsageError: no such scheme.
    """
    check_choice("init", scheme, INITIALISATIONS)
    convolutions = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    for module in network.modules():
        if not isinstance(module, convolutions):
            continue
        if scheme == "normal":
            nn.init.normal_(module.weight, std=0.02)
        elif scheme == "xavier":
            nn.init.xavier_normal_(module.weight, gain=math.sqrt(2))
        elif scheme == "orthogonal":
            nn.init.orthogonal_(module.weight, gain=math.sqrt(2))
        else:
            inputs = module.in_channels * math.prod(module.kernel_size)
            if module.transposed:
                inputs /= math.prod(module.stride)
            nn.init.normal_(module.weight, std=math.sqrt(2 / inputs))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
