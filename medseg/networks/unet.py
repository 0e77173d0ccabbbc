"""The U-Net: Ronneberger, Fischer, Brox 2015 (doi:10.1007/978-3-319-24574-4_28), its 3-D form and padded variants."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from medseg.errors import UsageError
from medseg.networks.blocks import (
    CONVOLUTIONS,
    MAX_POOLS,
    TRANSPOSED,
    ConvStack,
    ConvUnit,
    Upsample,
    check_choice,
    check_common,
    crop_centre,
    initialize,
)
from medseg.networks.geometry import Axis, Interpolation, Operation, SegmentationNetwork, Spread, Window, per_axis

__all__ = ["UNet"]


class UNet(SegmentationNetwork):
    """U-Net; with default arguments the paper's: unpadded, 572 x 572 in, 388 x 388 out.

    Maps images (B, in_channels, *spatial) to logits (B, out_channels, *spatial'). A skip is cropped to the size of the
    up-sampled features and concatenated behind them.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: classes, background included (softmax), or 1 (sigmoid).
        channels: features of each level, fine to coarse.
        padding: "valid", as in the paper, or "same": zeros, so that the output has the input's size.
        norm: None, "batch" or "instance" after each convolution of the levels.
        down: "pool" (maximum), or "conv": convolution of kernel 3 with stride, norm and activation ("same" only).
        up: "transpose": transposed convolution, kernel = stride after pooling (the paper's), kernel 3 with padding 1
            and output padding stride - 1 with down="conv"; or "interpolate": linear, no weights ("same" only).
        activation: "relu", "relu6" or "leaky_relu".
        dropout: probability, after the last activation of the two coarsest encoder levels (training only).
        convs_per_level: convolutions in each level, on the way down and on the way up.
        strides: down-sampling between levels: one number, or one per step, each a number or a tuple with one per axis
            (for example ((2, 2, 1), 2, 2, 2) for CT with thick slices).
        widen: "level": a level's first convolution brings its full number of features, up-sampling halves them (2-D
            paper); "pool": the first convolution brings half and the last doubles them before pooling, up-sampling
            keeps them (Çiçek et al. 2016, 3-D U-Net, doi:10.1007/978-3-319-46723-8_49).
        deep_supervision: number of further outputs, from the decoder levels below the finest ("same" only). In
            training mode `forward` then returns a tuple of logits: full size, level 1, level 2, ...
        init: "kaiming" (the paper's: sd sqrt(2/N)), "normal", "xavier" or "orthogonal".

    Raises:
        UsageError: an argument is wrong, or the arguments do not go together; in `forward`: input of an illegal size.

    >>> network = UNet(channels=(4, 8, 16))
    >>> network.output_size((76, 76)), network.context, network.divisor
    ((36, 36), (20, 20), (4, 4))
    >>> UNet(3, 1, 3, channels=(4, 8), padding="same", norm="batch").eval()(torch.zeros(1, 1, 8, 8, 8)).shape
    torch.Size([1, 3, 8, 8, 8])
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 1,
        out_channels: int = 2,
        channels: Sequence[int] = (64, 128, 256, 512, 1024),
        *,
        padding: str = "valid",
        norm: str | None = None,
        down: str = "pool",
        up: str = "transpose",
        activation: str = "relu",
        dropout: float = 0.5,
        convs_per_level: int = 2,
        strides: int | Sequence[int | Sequence[int]] = 2,
        widen: str = "level",
        deep_supervision: int = 0,
        init: str = "kaiming",
    ) -> None:
        channels = tuple(channels)
        check_common(spatial_dims, in_channels, out_channels, channels)
        for name, value, choices in (
            ("padding", padding, ("valid", "same")),
            ("down", down, ("pool", "conv")),
            ("up", up, ("transpose", "interpolate")),
            ("widen", widen, ("level", "pool")),
        ):
            check_choice(name, value, choices)
        _check_numbers(len(channels), convs_per_level, dropout, deep_supervision)
        if padding == "valid":
            _check_valid(down, up, deep_supervision)
        if widen == "pool" and convs_per_level < 2:
            raise UsageError("widen='pool' needs two convolutions per level", field="convs_per_level", found=1)
        steps = read_strides(strides, spatial_dims, len(channels) - 1)
        pad = int(padding == "same")
        axes = [
            make_axis([step[axis] for step in steps], convs_per_level, pad=pad, down=down, up=up)
            for axis in range(spatial_dims)
        ]
        super().__init__(spatial_dims, in_channels, out_channels, axes, exact=norm != "instance")
        crops = [tuple(axis.crops[level] for axis in axes) for level in range(len(steps))]
        self.crops = crops
        unit = {"norm": norm, "activation": activation}

        self.encoder = nn.ModuleList()
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        self.decoder = nn.ModuleList()
        features = in_channels
        for level, count in enumerate(channels):
            first = max(count // 2, 1) if widen == "pool" else count
            counts = [first] + [count] * (convs_per_level - 1)
            rate = dropout if level >= len(channels) - 2 else 0.0
            self.encoder.append(ConvStack(spatial_dims, features, counts, padding=pad, dropout=rate, **unit))
            features = count
            if level < len(steps):
                self.down.append(make_down(spatial_dims, count, steps[level], down, **unit))
                below = channels[level + 1]
                raised = count if up == "transpose" and widen == "level" else below
                self.up.append(make_up(spatial_dims, below, raised, steps[level], up, wide=down == "conv"))
                self.decoder.append(
                    ConvStack(spatial_dims, raised + count, [count] * convs_per_level, padding=pad, **unit)
                )
        self.head = CONVOLUTIONS[spatial_dims](channels[0], out_channels, 1)
        self.further_heads = nn.ModuleList(
            CONVOLUTIONS[spatial_dims](count, out_channels, 1) for count in channels[1 : deep_supervision + 1]
        )
        initialize(self, init)

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Logits; with deep supervision and in training mode a tuple of them, fine to coarse."""
        self.check_input(images)
        skips = []
        features = images
        for encode, down in zip(self.encoder, self.down, strict=False):  # the coarsest level has no step down
            features = encode(features)
            skips.append(features)
            features = down(features)
        features = self.encoder[-1](features)
        further = []
        for level in range(len(skips) - 1, -1, -1):
            raised = self.up[level](features)
            # pop: the list must not keep a skip alive that the decoder has used
            features = self.decoder[level](torch.cat([raised, crop_centre(skips.pop(), self.crops[level])], dim=1))
            if self.training and 0 < level <= len(self.further_heads):
                further.append(self.further_heads[level - 1](features))
        logits = self.head(features)
        return (logits, *reversed(further)) if further else logits


def read_strides(strides: int | Sequence[int | Sequence[int]], spatial_dims: int, steps: int) -> list[tuple[int, ...]]:
    """One tuple of strides per step between levels. Raises UsageError for another number of steps or axes."""
    given = [strides] * steps if isinstance(strides, int) else list(strides)
    if len(given) != steps:
        raise UsageError("wrong number of strides", field="strides", expected=f"{steps}, one per step", found=strides)
    return [per_axis(stride, spatial_dims, "strides") for stride in given]


def make_down(spatial_dims: int, channels: int, stride: tuple[int, ...], down: str, **unit: str | None) -> nn.Module:
    """Maximum pooling, or a strided convolution unit of kernel 3."""
    if down == "pool":
        return MAX_POOLS[spatial_dims](stride)
    return ConvUnit(spatial_dims, channels, channels, stride=stride, **unit)  # pyright: ignore[reportArgumentType]


def make_up(
    spatial_dims: int, in_channels: int, out_channels: int, stride: tuple[int, ...], up: str, *, wide: bool = False
) -> nn.Module:
    """Transposed convolution, kernel = stride or (`wide`) kernel 3; or linear interpolation, which keeps channels."""
    if up == "interpolate":
        return Upsample(stride)
    if wide:
        extra = tuple(step - 1 for step in stride)
        return TRANSPOSED[spatial_dims](in_channels, out_channels, 3, stride=stride, padding=1, output_padding=extra)
    return TRANSPOSED[spatial_dims](in_channels, out_channels, stride, stride=stride)


def make_axis(
    strides: Sequence[int], convolutions: int, *, pad: int, down: str, up: str, gates: bool = False, fused: bool = False
) -> Axis:
    """The geometry of a U-Net along one axis."""
    stack: tuple[Operation, ...] = (Window(3, 1, pad),) * convolutions
    encoder: list[tuple[Operation, ...]] = [stack]
    ups: list[tuple[Operation, ...]] = []
    product, factors = 1, []
    for stride in strides:
        encoder.append((Window(stride, stride) if down == "pool" else Window(3, stride, 1), *stack))
        if up == "transpose":
            ups.append((Spread(stride, stride) if down == "pool" else Spread(3, stride, 1, stride - 1),))
        elif up == "interpolate":
            ups.append((Interpolation(stride),))
        else:  # nearest neighbour and a convolution
            ups.append((Interpolation(stride, linear=False), Window(3, 1, pad)))
        product *= stride
        factors.append(product)
    # the finest skip passes no gate; the coarsest level has no logits of its own
    strides_of_gates = (0, *strides[1:]) if gates else ()
    return Axis(
        tuple(encoder),
        tuple(ups),
        (stack,) * len(strides),
        gates=strides_of_gates,
        fused=tuple(factors[:-1]) if fused else (),
    )


def _check_numbers(levels: int, convs_per_level: int, dropout: float, deep_supervision: int) -> None:
    if levels < 2:
        raise UsageError("too few levels", field="channels", expected="two numbers or more", found=levels)
    if convs_per_level < 1:
        raise UsageError("too few convolutions", field="convs_per_level", expected=">= 1", found=convs_per_level)
    if not 0 <= dropout < 1:
        raise UsageError("not a probability", field="dropout", expected="0 <= dropout < 1", found=dropout)
    if not 0 <= deep_supervision <= levels - 2:
        raise UsageError(
            "no such number of further outputs",
            field="deep_supervision",
            expected=f"0 to {levels - 2} (decoder levels below the finest)",
            found=deep_supervision,
        )


def _check_valid(down: str, up: str, deep_supervision: int) -> None:
    # interpolation and padded strided convolution would invent voxels at every tile's border
    for name, value, needed in (
        ("down", down, "pool"),
        ("up", up, "transpose"),
        ("deep_supervision", deep_supervision, 0),
    ):
        if value != needed:
            raise UsageError(
                "an unpadded U-Net cannot have this", field=name, expected=needed, found=value, fix="set padding: same"
            )
