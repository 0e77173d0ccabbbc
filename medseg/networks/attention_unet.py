"""Attention U-Net: Oktay et al. 2018 (arXiv:1804.03999), and the widespread variant with gates at full resolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from medseg.errors import UsageError
from medseg.networks.blocks import (
    CONVOLUTIONS,
    MAX_POOLS,
    ConvStack,
    ConvUnit,
    Upsample,
    check_choice,
    check_common,
    initialize,
    make_norm,
)
from medseg.networks.geometry import SegmentationNetwork
from medseg.networks.unet import make_axis, make_up, read_strides

__all__ = ["AttentionGate", "AttentionUNet", "FullResolutionGate"]

OPEN_BIAS = 3.0  # sigmoid(3) = 0.95


class AttentionGate(nn.Module):
    """Oktay's additive attention gate on the grid of the gating signal (arXiv:1804.03999, equations 1 and 2).

    q = psi(relu(W_x x + W_g g + b_g)) + b_psi, alpha = sigmoid(q), up-sampled linearly to x; x_hat = W(alpha * x).
    W_x is a convolution with kernel = stride and no bias; W_g (bias b_g), psi (bias b_psi) and W have kernel 1.

    Args:
        spatial_dims: 2 or 3.
        x_channels: features of the skip x, (B, x_channels, *spatial).
        g_channels: features of the gating signal g, (B, g_channels, *(spatial / stride)).
        inter_channels: features in between; x_channels when None, as in the authors' networks.
        stride: ratio of the two grids, a number or one per axis.
        norm: None, "batch" or "instance" after W.
        open_gates: b_psi starts at 3, so that the gates begin nearly open (alpha about 0.95).

    >>> gate = AttentionGate(2, 4, 8)
    >>> gated, alpha = gate(torch.zeros(1, 4, 16, 16), torch.zeros(1, 8, 8, 8))
    >>> gated.shape, alpha.shape
    (torch.Size([1, 4, 16, 16]), torch.Size([1, 1, 16, 16]))
    """

    def __init__(
        self,
        spatial_dims: int,
        x_channels: int,
        g_channels: int,
        inter_channels: int | None = None,
        *,
        stride: int | Sequence[int] = 2,
        norm: str | None = None,
        open_gates: bool = False,
    ) -> None:
        super().__init__()
        inter_channels = inter_channels or x_channels
        factors = (stride,) * spatial_dims if isinstance(stride, int) else tuple(stride)
        convolution = CONVOLUTIONS[spatial_dims]
        self.W_x = convolution(x_channels, inter_channels, factors, stride=factors, bias=False)
        self.W_g = convolution(g_channels, inter_channels, 1)
        self.psi = convolution(inter_channels, 1, 1)
        self.upsample = Upsample(factors)
        self.W = nn.Sequential(convolution(x_channels, x_channels, 1, bias=norm is None))
        if norm is not None:
            self.W.append(make_norm(norm, spatial_dims, x_channels))
        self.open_gates = open_gates
        self.initialize()

    def initialize(self, scheme: str = "kaiming") -> None:
        """New random weights, see `blocks.initialize`; open gates stay open."""
        initialize(self, scheme)
        if self.open_gates:
            nn.init.constant_(self.psi.bias, OPEN_BIAS)

    def forward(self, x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gated skip (B, x_channels, *spatial) and alpha (B, 1, *spatial), between 0 and 1."""
        alpha = torch.sigmoid(self.psi(F.relu(self.W_x(x) + self.W_g(g), inplace=True)))
        alpha = self.upsample(alpha)
        return self.W(x * alpha), alpha


class FullResolutionGate(nn.Module):
    """The widespread gate: both inputs on the fine grid, each through a 1x1 convolution and a norm; x * alpha.

    Args:
        spatial_dims: 2 or 3.
        x_channels: features of the skip x and of the up-sampled gating signal g, both (B, x_channels, *spatial).
        inter_channels: features in between; half of x_channels when None.
        norm: None, "batch" or "instance".
        open_gates: the last bias starts at 3, so that the gates begin nearly open.
    """

    def __init__(
        self,
        spatial_dims: int,
        x_channels: int,
        inter_channels: int | None = None,
        *,
        norm: str | None = "batch",
        open_gates: bool = False,
    ) -> None:
        super().__init__()
        inter_channels = inter_channels or max(x_channels // 2, 1)

        def project(in_channels: int, out_channels: int) -> nn.Sequential:
            convolution = CONVOLUTIONS[spatial_dims](in_channels, out_channels, 1, bias=norm is None)
            return nn.Sequential(convolution, make_norm(norm, spatial_dims, out_channels))

        self.W_x = project(x_channels, inter_channels)
        self.W_g = project(x_channels, inter_channels)
        self.psi = project(inter_channels, 1)
        self.open_gates = open_gates
        self.initialize()

    def initialize(self, scheme: str = "kaiming") -> None:
        """New random weights, see `blocks.initialize`; open gates stay open."""
        initialize(self, scheme)
        if self.open_gates:
            last = self.psi[0] if isinstance(self.psi[1], nn.Identity) else self.psi[1]
            nn.init.constant_(last.bias, OPEN_BIAS)

    def forward(self, x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gated skip (B, x_channels, *spatial) and alpha (B, 1, *spatial), between 0 and 1."""
        alpha = torch.sigmoid(self.psi(F.relu(self.W_x(x) + self.W_g(g), inplace=True)))
        return x * alpha, alpha


class AttentionUNet(SegmentationNetwork):
    """Padded U-Net whose skips pass attention gates; with spatial_dims=3 and default arguments Oktay's 3-D CT network.

    Maps images (B, in_channels, *spatial) to logits (B, out_channels, *spatial).

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: classes, background included (softmax), or 1 (sigmoid).
        channels: features of each level, fine to coarse; three or more. The widespread variant has 64 to 1024.
        gate: "grid": `AttentionGate` on all skips but the finest, the coarsest gated by the bottleneck after a 1x1
            convolution; or "additive_full": `FullResolutionGate` on every skip.
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
    (torch.Size([1, 2, 16, 16]), [(1, 1, 8, 8)])
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 1,
        out_channels: int = 2,
        channels: Sequence[int] = (16, 32, 64, 128, 256),
        *,
        gate: str = "grid",
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
        bottom = channels[-1]
        self.gating = ConvUnit(spatial_dims, bottom, bottom, kernel_size=1, padding=0, **unit) if on_grid else None
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
                self.gates.append(
                    AttentionGate(spatial_dims, count, below, stride=step, norm=norm, open_gates=open_gates)
                )
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
            part.initialize(init)  # type: ignore[operator]

    def forward(self, images: torch.Tensor, return_attention: bool = False):
        """Logits; with deep supervision and in training mode a tuple of them, fine to coarse.

        With `return_attention`, a pair: that, and the attention maps, fine to coarse, each (B, 1, *size of its skip).
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
            signal = self.gating(features) if self.gating is not None and level == len(self.up) - 1 else features
            features = self.up[level](features)
            gate = self.gates[level] if self.gating is None else (self.gates[level - 1] if level else None)
            if gate is not None:
                skip, alpha = gate(skip, features if self.gating is None else signal)
                if return_attention:
                    maps.append(alpha)
            features = self.decoder[level](torch.cat([features, skip], dim=1))
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
