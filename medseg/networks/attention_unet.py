"""Attention U-Net: Oktay et al. 2018 (arXiv:1804.03999), and the widespread variant with gates at full resolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from medseg.errors import UsageError
from medseg.networks.attention_gate import AttentionGate, FullResolutionGate, GateGroup
from medseg.networks.blocks import (
    CONVOLUTIONS,
    MAX_POOLS,
    ConvStack,
    ConvUnit,
    Upsample,
    check_choice,
    check_common,
    initialize,
)
from medseg.networks.geometry import SegmentationNetwork
from medseg.networks.unet import make_axis, make_up, read_strides

__all__ = ["AttentionUNet"]


class AttentionUNet(SegmentationNetwork):
    """Padded U-Net whose skips pass attention gates; with spatial_dims=3 and default arguments Oktay's 3-D CT network.

    Maps images (B, in_channels, *spatial) to logits (B, out_channels, *spatial).

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: classes, background included (softmax), or 1 (sigmoid).
        channels: features of each level, fine to coarse; three or more. The widespread variant has 64 to 1024.
        gate: "grid": `GateGroup` of `AttentionGate` on all skips but the finest, gated by the level below; or
            "additive_full": `FullResolutionGate` on every skip.
        gates_per_skip: gates side by side on each skip; None: as published, 2 with "grid", 1 with "additive_full" (more
            are possible with "grid" only).
        norm: None, "batch" or "instance".
        up: "interpolate": linear, no weights, with gate="grid"; nearest neighbour and a convolution of kernel 3 with
            "additive_full"; or "transpose": transposed convolution, kernel = stride.
        activation: "relu", "relu6" or "leaky_relu".
        dropout: probability, after the last activation of the two coarsest encoder levels (training only).
        convs_per_level: convolutions in each level.
        strides: down-sampling between levels, see `UNet`.
        fuse_scales: the output is a 1x1 convolution of the logits of all decoder levels, up-sampled linearly. None: as
            published, with gate="grid" only.
        open_gates: start with nearly open gates.
        deep_supervision: number of further outputs in training mode, see `UNet`.
        init: "kaiming", "normal", "xavier" or "orthogonal".

    Raises:
        UsageError: an argument is wrong; in `forward`: input of an illegal size.

    >>> network = AttentionUNet(2, 1, 2, channels=(4, 8, 16)).eval()
    >>> logits, maps = network(torch.zeros(1, 1, 16, 16), return_attention=True)
    >>> logits.shape, [tuple(alpha.shape) for alpha in maps]
    (torch.Size([1, 2, 16, 16]), [(1, 2, 8, 8)])
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 1,
        out_channels: int = 2,
        channels: Sequence[int] = (16, 32, 64, 128, 256),
        *,
        gate: str = "grid",
        gates_per_skip: int | None = None,
        norm: str | None = "batch",
        up: str = "interpolate",
        activation: str = "relu",
        dropout: float = 0.0,
        convs_per_level: int = 2,
        strides: int | Sequence[int | Sequence[int]] = 2,
        fuse_scales: bool | None = None,
        open_gates: bool = False,
        deep_supervision: int = 0,
        init: str = "kaiming",
    ) -> None:
        channels = tuple(channels)
        check_common(spatial_dims, in_channels, out_channels, channels)
        check_choice("gate", gate, ("grid", "additive_full"))
        check_choice("up", up, ("transpose", "interpolate"))
        _check_numbers(len(channels), convs_per_level, dropout, deep_supervision)
        steps = read_strides(strides, spatial_dims, len(channels) - 1)
        if gates_per_skip is None:
            gates_per_skip = 2 if gate == "grid" else 1
        if gates_per_skip < 1 or (gate != "grid" and gates_per_skip > 1):
            raise UsageError(
                "number out of range",
                field="gates_per_skip",
                expected=">= 1; 1 unless gate is grid",
                found=gates_per_skip,
            )
        on_grid = gate == "grid"
        fuse = on_grid if fuse_scales is None else fuse_scales
        raise_by = "nearest" if up == "interpolate" and not on_grid else up
        axes = [
            make_axis(
                [step[axis] for step in steps],
                convs_per_level,
                pad=1,
                down="pool",
                up=raise_by,
                gates=on_grid,
                fused=fuse,
            )
            for axis in range(spatial_dims)
        ]
        super().__init__(spatial_dims, in_channels, out_channels, axes, exact=norm != "instance")
        unit = {"norm": norm, "activation": activation}
        convolution = CONVOLUTIONS[spatial_dims]

        self.encoder = nn.ModuleList()
        self.down = nn.ModuleList(MAX_POOLS[spatial_dims](step) for step in steps)
        features = in_channels
        for level, count in enumerate(channels):
            rate = dropout if level >= len(channels) - 2 else 0.0
            self.encoder.append(ConvStack(spatial_dims, features, [count] * convs_per_level, dropout=rate, **unit))
            features = count
        self.on_grid = on_grid
        self.up = nn.ModuleList()
        self.gates = nn.ModuleList()
        self.decoder = nn.ModuleList()
        for level, step in enumerate(steps):
            count, below = channels[level], channels[level + 1]
            if raise_by == "nearest":
                self.up.append(nn.Sequential(Upsample(step, "nearest"), ConvUnit(spatial_dims, below, count, **unit)))
            else:
                self.up.append(make_up(spatial_dims, below, count, step, up))
            raised = below if raise_by == "interpolate" else count
            if not on_grid:
                self.gates.append(FullResolutionGate(spatial_dims, count, norm=norm, open_gates=open_gates))
            elif level > 0:
                gates = [
                    AttentionGate(spatial_dims, count, below, stride=step, norm=norm, open_gates=open_gates)
                    for _ in range(gates_per_skip)
                ]
                self.gates.append(gates[0] if gates_per_skip == 1 else GateGroup(spatial_dims, gates, count, **unit))
            self.decoder.append(ConvStack(spatial_dims, raised + count, [count] * convs_per_level, **unit))

        self.head = convolution(channels[0], out_channels, 1)
        heads = len(channels) - 2 if fuse else deep_supervision
        self.further_heads = nn.ModuleList(convolution(count, out_channels, 1) for count in channels[1 : heads + 1])
        self.deep_supervision = deep_supervision
        self.fusion = convolution(out_channels * (heads + 1), out_channels, 1) if fuse else None
        factors = [1] * spatial_dims
        self.fusion_up = nn.ModuleList()
        for step in steps[:-1] if fuse else ():
            factors = [factor * stride for factor, stride in zip(factors, step, strict=True)]
            self.fusion_up.append(Upsample(factors))
        initialize(self, init)
        for part in self.gates:
            part.initialize(init)  # pyright: ignore[reportCallIssue]

    def forward(self, images: torch.Tensor, return_attention: bool = False):
        """Logits; with deep supervision and in training mode a tuple of them, fine to coarse.

        With `return_attention`, a pair: that, and the attention maps, fine to coarse, each (B, gates_per_skip, *size of
        its skip), between 0 and 1.
        """
        self.check_input(images)
        skips = []
        features = images
        for encode, down in zip(self.encoder, self.down, strict=False):  # the coarsest level has no step down
            features = encode(features)
            skips.append(features)
            features = down(features)
        features = self.encoder[-1](features)
        further, maps = [], []
        for level in range(len(skips) - 1, -1, -1):
            skip = skips.pop()
            raised = self.up[level](features)
            if not self.on_grid:
                skip, alpha = self.gates[level](skip, raised)
                maps.append(alpha)
            elif level > 0:
                skip, alpha = self.gates[level - 1](skip, features)
                maps.append(alpha)
            features = self.decoder[level](torch.cat([raised, skip], dim=1))
            if 0 < level <= len(self.further_heads) and (self.fusion is not None or self.training):
                further.append(self.further_heads[level - 1](features))
        further.reverse()
        logits = self.head(features)
        if self.fusion is not None:
            raised = [up(scores) for up, scores in zip(self.fusion_up, further, strict=True)]
            logits = self.fusion(torch.cat([logits, *raised], dim=1))
        supervised = self.training and self.deep_supervision > 0
        result = (logits, *further[: self.deep_supervision]) if supervised else logits
        return (result, tuple(reversed(maps))) if return_attention else result


def _check_numbers(levels: int, convs_per_level: int, dropout: float, deep_supervision: int) -> None:
    for name, value, fits, expected in (
        ("channels", levels, levels >= 3, "three numbers or more"),
        ("convs_per_level", convs_per_level, convs_per_level >= 1, ">= 1"),
        ("dropout", dropout, 0 <= dropout < 1, "0 <= dropout < 1"),
        ("deep_supervision", deep_supervision, 0 <= deep_supervision <= levels - 2, f"0 to {levels - 2}"),
    ):
        if not fits:
            raise UsageError("number out of range", field=name, expected=expected, found=value)
