"""What part of the input an output depends on, by interval arithmetic, and the class that states it for every network.

A network is described once per axis as an `Axis`: its operations, each of which knows which input samples a range of
output samples needs. From that follow the size of the output, the legal sizes of the input, the voxels that an output
needs around it (`context`) and the receptive field. Tests compare the results with gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn

from medseg.errors import UsageError

__all__ = ["Axis", "Interpolation", "SegmentationNetwork", "Spread", "Window", "per_axis"]

Range = tuple[int, int]  # first and last index, both included


@dataclass(frozen=True)
class Window:
    """A convolution or pooling along one axis: output i sees input i * stride - padding and the kernel - 1 after it."""

    kernel: int
    stride: int = 1
    padding: int = 0

    def needs(self, low: int, high: int) -> Range:
        return low * self.stride - self.padding, high * self.stride - self.padding + self.kernel - 1

    def size(self, size: int) -> int:
        # a size that the stride does not divide would drop the last samples and shift the grid: not legal
        return 0 if size % self.stride else (size + 2 * self.padding - self.kernel) // self.stride + 1


@dataclass(frozen=True)
class Spread:
    """A transposed convolution along one axis: input i reaches output i * stride - padding and kernel - 1 after it."""

    kernel: int
    stride: int
    padding: int = 0
    extra: int = 0  # output_padding

    def needs(self, low: int, high: int) -> Range:
        return -((self.kernel - 1 - low - self.padding) // self.stride), (high + self.padding) // self.stride

    def size(self, size: int) -> int:
        return (size - 1) * self.stride - 2 * self.padding + self.kernel + self.extra


@dataclass(frozen=True)
class Interpolation:
    """Up-sampling by a whole factor along one axis, half-pixel centres (align_corners=False): linear, or nearest."""

    factor: int
    linear: bool = True

    def needs(self, low: int, high: int) -> Range:
        if not self.linear or self.factor == 1:
            return low // self.factor, high // self.factor
        # output o lies at (o + 1/2) / factor - 1/2 of the input, between two samples
        return (2 * low + 1 - self.factor) // (2 * self.factor), -((self.factor - 1 - 2 * high) // (2 * self.factor))

    def size(self, size: int) -> int:
        return size * self.factor


Operation = Window | Spread | Interpolation


def _back(operations: Sequence[Operation], needed: Range) -> Range:
    for operation in reversed(operations):
        needed = operation.needs(*needed)
    return needed


def _forward(operations: Sequence[Operation], size: int) -> int:
    for operation in operations:
        size = operation.size(size) if size > 0 else 0
    return max(size, 0)


def _union(first: Range | None, second: Range) -> Range:
    return second if first is None else (min(first[0], second[0]), max(first[1], second[1]))


@dataclass(frozen=True)
class Axis:
    """A U-shaped network along one axis, levels from fine to coarse.

    Args:
        encoder: for each level, what leads to it from the level above (for the first: from the input).
        up: for each level but the coarsest, what leads up to it from the decoder below.
        decoder: for each level but the coarsest, what follows once skip and up-sampled features are joined.
        head: what follows the finest decoder level.
        gates: for each level but the coarsest, the stride of its grid attention gate, 0 where there is none.
        fused: strides from each further decoder level to the finest, whose logits join in the output.
    """

    encoder: tuple[tuple[Operation, ...], ...]
    up: tuple[tuple[Operation, ...], ...]
    decoder: tuple[tuple[Operation, ...], ...]
    head: tuple[Operation, ...] = ()
    gates: tuple[int, ...] = ()
    fused: tuple[int, ...] = ()
    divisor: int = field(init=False)
    smallest: int = field(init=False)
    crops: tuple[int, ...] = field(init=False)
    margin: int = field(init=False)

    def __post_init__(self) -> None:
        strides = [op.stride for level in self.encoder for op in level if isinstance(op, Window)]
        divisor = 1
        for stride in strides:
            divisor *= stride
        object.__setattr__(self, "divisor", divisor)
        size = next(size for size in range(1, 100_000) if self.trace(size)[0])
        output, crops = self.trace(size)
        object.__setattr__(self, "smallest", size)
        object.__setattr__(self, "crops", crops)
        object.__setattr__(self, "margin", (size - output) // 2)

    def trace(self, size: int) -> tuple[int, tuple[int, ...]]:
        """Size of the output (0 when `size` is not legal) and, per level, the samples cropped from a skip's ends."""
        sizes = []
        for level in self.encoder:
            size = _forward(level, size)
            sizes.append(size)
        if not all(sizes):
            return 0, ()
        crops = []
        for skip, up, decoder in zip(reversed(sizes[:-1]), reversed(self.up), reversed(self.decoder), strict=True):
            raised = _forward(up, size)
            if raised > skip or (skip - raised) % 2:
                return 0, ()
            crops.append((skip - raised) // 2)
            size = _forward(decoder, raised)
        return _forward(self.head, size), tuple(reversed(crops))

    def needs(self, low: int, high: int) -> Range:
        """First and last input sample that the outputs `low` to `high` depend on (before clipping to the input)."""
        decoded: list[Range | None] = [None] * len(self.encoder)
        encoded: list[Range | None] = [None] * len(self.encoder)
        decoded[0] = _back(self.head, (low, high))
        for level, factor in enumerate(self.fused, start=1):
            decoded[level] = Interpolation(factor).needs(low, high)
        for level, (up, decoder, crop) in enumerate(zip(self.up, self.decoder, self.crops, strict=True)):
            joined = _back(decoder, _required(decoded[level]))
            skip = (joined[0] + crop, joined[1] + crop)
            decoded[level + 1] = _union(decoded[level + 1], _back(up, joined))
            if self.gates and (stride := self.gates[level]):
                gate = Interpolation(stride).needs(*joined)
                decoded[level + 1] = _union(decoded[level + 1], gate)
                skip = _union(skip, Window(stride, stride).needs(*gate))
            encoded[level] = skip
        encoded[-1] = _required(decoded[-1])
        for fine, coarse in pairwise(range(len(self.encoder) - 1, -1, -1)):
            encoded[coarse] = _union(encoded[coarse], _back(self.encoder[fine], _required(encoded[fine])))
        return _back(self.encoder[0], _required(encoded[0]))

    @property
    def context(self) -> int:
        """Samples on either side that an output block needs: unpadded, what the network takes away; padded, for a block
        that begins and ends on the grid of `divisor`, and a multiple of it."""
        if self.margin:
            return self.margin
        low, high = self.needs(0, self.divisor - 1)
        context = max(-low, high - self.divisor + 1)
        return -(-context // self.divisor) * self.divisor  # so that a tile with its context keeps the grid

    @property
    def receptive_field(self) -> int:
        """Samples that one output depends on, at the position where they are most."""
        spans = [self.needs(position, position) for position in range(self.divisor)]
        return max(high - low + 1 for low, high in spans)

    def legal(self, size: int, *, below: bool = False) -> int:
        """The nearest legal size that is not smaller (or, with `below`, not larger; the smallest if there is none)."""
        steps = (size - self.smallest) / self.divisor
        whole = int(steps // 1) if below else int(-(-steps // 1))
        return self.smallest + max(whole, 0) * self.divisor


def _required(needed: Range | None) -> Range:
    assert needed is not None, "every level is reached from the level above"
    return needed


def per_axis(value: int | Sequence[int], spatial_dims: int, name: str) -> tuple[int, ...]:
    """One positive whole number per axis, from one number or a sequence of `spatial_dims`.

    >>> per_axis(2, 3, "strides"), per_axis((2, 2, 1), 3, "strides")
    ((2, 2, 2), (2, 2, 1))

    Raises:
        UsageError: another length, or a number below 1.
    """
    values = (value,) * spatial_dims if isinstance(value, int) else tuple(int(part) for part in value)
    if len(values) != spatial_dims or min(values, default=0) < 1:
        raise UsageError("wrong number per axis", field=name, expected=f"{spatial_dims} numbers >= 1", found=value)
    return values


class SegmentationNetwork(nn.Module):
    """What every network states about itself; the base of all networks in medseg.

    Attributes:
        spatial_dims, in_channels, out_channels: as given.
        divisor: product of strides per axis. Outputs are the same up to a shift when the input shifts by it.
        context: voxels per side and axis that an output block needs beyond itself. Unpadded: half of input minus output
            size. Padded: for a block that begins and ends on multiples of `divisor`, rounded up to such a multiple, so
            that a tile extended by it stays on the grid.
        receptive_field: voxels per axis that one output voxel depends on at most.
        padded: True when the output has the size of the input.
        exact_under_tiling: True when, in eval mode, tiles given their context and cropped equal the whole image.

    >>> from medseg.networks import UNet
    >>> network = UNet(channels=(4, 8), padding="same", norm="instance")  # whose statistics are those of a tile
    >>> isinstance(network, SegmentationNetwork), network.padded, network.exact_under_tiling
    (True, True, False)
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, out_channels: int, axes: Sequence[Axis], *, exact: bool
    ) -> None:
        super().__init__()
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.axes = tuple(axes)
        self.divisor = tuple(axis.divisor for axis in axes)
        self.context = tuple(axis.context for axis in axes)
        self.receptive_field = tuple(axis.receptive_field for axis in axes)
        self.padded = not any(axis.margin for axis in axes)
        self.exact_under_tiling = exact

    def output_size(self, input_size: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the output for a spatial size of the input.

        Raises:
            UsageError: the size is not legal; the message names the nearest legal sizes.
        """
        if len(input_size) != self.spatial_dims:
            raise UsageError(
                f"{type(self).__name__} has {self.spatial_dims} spatial axes",
                field="input size",
                expected=f"{self.spatial_dims} numbers",
                found=tuple(input_size),
            )
        sizes = tuple(int(size) for size in input_size)
        outputs = tuple(axis.trace(size)[0] for axis, size in zip(self.axes, sizes, strict=True))
        if not all(outputs):
            smaller = tuple(axis.legal(size, below=True) for axis, size in zip(self.axes, sizes, strict=True))
            larger = self.legal_size(sizes)
            raise UsageError(
                f"{type(self).__name__} cannot take an input of this size",
                field="input size",
                expected=" or ".join(str(size) for size in dict.fromkeys((smaller, larger))),
                found=sizes,
                fix="pad or crop the image, or choose a legal patch: these are the nearest legal sizes",
            )
        return outputs

    def legal_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """The smallest legal input size that is nowhere smaller than `size`."""
        return tuple(axis.legal(int(part)) for axis, part in zip(self.axes, size, strict=True))

    def check_input(self, images: torch.Tensor) -> None:
        """Raise UsageError unless `images` is (B, in_channels, *legal size). Nothing is checked while tracing."""
        if torch.compiler.is_compiling():
            return  # an exported or compiled graph keeps its sizes symbolic
        if images.ndim != self.spatial_dims + 2 or images.shape[1] != self.in_channels:
            axes = ", ".join("ijk"[: self.spatial_dims])
            raise UsageError(
                f"{type(self).__name__} cannot take an input of this shape",
                field="input",
                expected=f"(batch, {self.in_channels}, {axes})",
                found=tuple(images.shape),
            )
        self.output_size(images.shape[2:])
