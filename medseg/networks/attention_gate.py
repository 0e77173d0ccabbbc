"""Attention gates: Oktay et al. 2018 (arXiv:1804.03999) on the coarse grid; the widespread one at full resolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from medseg.networks.blocks import CONVOLUTIONS, ConvUnit, Upsample, initialize, make_norm

__all__ = ["AttentionGate", "FullResolutionGate", "GateGroup"]

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
            nn.init.constant_(_bias(self.psi), OPEN_BIAS)

    def forward(self, x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gated skip (B, x_channels, *spatial) and alpha (B, 1, *spatial), between 0 and 1."""
        alpha = torch.sigmoid(self.psi(F.relu(self.W_x(x) + self.W_g(g), inplace=True)))
        alpha = self.upsample(alpha)
        return self.W(x * alpha), alpha


class GateGroup(nn.Module):
    """Several attention gates on the same skip, joined by a unit of kernel 1, as in the authors' CT networks.

    x (B, channels, *spatial) and g as for each gate -> (B, channels, *spatial), and alpha (B, gates, *spatial).
    """

    def __init__(
        self, spatial_dims: int, gates: Sequence[AttentionGate], channels: int, *, norm: str | None, activation: str
    ) -> None:
        super().__init__()
        self.gates = nn.ModuleList(gates)
        self.combine = ConvUnit(
            spatial_dims,
            channels * len(gates),
            channels,
            kernel_size=1,
            padding=0,
            norm=norm,
            activation=activation,
        )

    def initialize(self, scheme: str = "kaiming") -> None:
        """New random weights, see `blocks.initialize`; open gates stay open."""
        initialize(self.combine, scheme)
        for gate in self.gates:
            gate.initialize(scheme)  # pyright: ignore[reportCallIssue]

    def forward(self, x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = [gate(x, g) for gate in self.gates]
        gated, alphas = zip(*pairs, strict=True)
        return self.combine(torch.cat(gated, dim=1)), torch.cat(alphas, dim=1)


class FullResolutionGate(nn.Module):
    """The widespread gate: both inputs on the fine grid, each through a 1x1 convolution and a norm; x * alpha.

    Args:
        spatial_dims: 2 or 3.
        x_channels: features of the skip x and of the up-sampled gating signal g, both (B, x_channels, *spatial).
        inter_channels: features in between; half of x_channels when None.
        norm: None, "batch" or "instance".
        open_gates: the last bias starts at 3, so that the gates begin nearly open.

    >>> gated, alpha = FullResolutionGate(2, 4)(torch.zeros(1, 4, 16, 16), torch.zeros(1, 4, 16, 16))
    >>> gated.shape, alpha.shape
    (torch.Size([1, 4, 16, 16]), torch.Size([1, 1, 16, 16]))
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
            nn.init.constant_(_bias(self.psi[0] if isinstance(self.psi[1], nn.Identity) else self.psi[1]), OPEN_BIAS)

    def forward(self, x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gated skip (B, x_channels, *spatial) and alpha (B, 1, *spatial), between 0 and 1."""
        alpha = torch.sigmoid(self.psi(F.relu(self.W_x(x) + self.W_g(g), inplace=True)))
        return x * alpha, alpha


def _bias(module: nn.Module) -> torch.Tensor:
    bias = module.bias
    assert isinstance(bias, torch.Tensor)
    return bias
