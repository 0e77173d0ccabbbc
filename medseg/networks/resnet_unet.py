"""ResUNet: a ResNet-34 encoder (He et al. 2016, doi:10.1109/CVPR.2016.90) with LinkNet's light decoder.

Decoder blocks 1x1 - transposed 3x3 - 1x1 and skips that are added: Chaurasia and Culurciello 2017 (arXiv:1707.03718).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from medseg.errors import UsageError
from medseg.networks.blocks import (
    CONVOLUTIONS,
    MAX_POOLS,
    TRANSPOSED,
    ConvUnit,
    check_common,
    initialize,
    make_activation,
    make_norm,
)
from medseg.networks.geometry import Axis, Operation, SegmentationNetwork, Spread, Window
from medseg.networks.weights import Source, adapt_input, load_weights

__all__ = ["ResNetEncoder", "ResUNet"]


class _Thinned(nn.Module):
    """A strided convolution of kernel 1 as every n-th sample, then a convolution of stride 1: the same numbers.

    oneDNN's gradient of the weights of the strided one (channels last, fp32, AVX2 without AVX-512, 4 channels;
    torch 2.13.0) writes beyond its memory: the process dies some steps later, or computes with what lay there.
    """

    stride: tuple[int, ...]
    weight: torch.Tensor
    bias: torch.Tensor | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        thin = input[(..., *(slice(None, None, step) for step in self.stride))]
        convolve = F.conv2d if len(self.stride) == 2 else F.conv3d
        return convolve(thin, self.weight, self.bias)


class _Thinned2d(_Thinned, nn.Conv2d): ...


class _Thinned3d(_Thinned, nn.Conv3d): ...


_THINNED: dict[int, Callable[..., nn.Module]] = {2: _Thinned2d, 3: _Thinned3d}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut; names as in torchvision."""

    def __init__(self, spatial_dims: int, in_channels: int, channels: int, stride: int, norm: str | None) -> None:
        super().__init__()
        convolution = CONVOLUTIONS[spatial_dims]
        bias = norm is None
        self.conv1 = convolution(in_channels, channels, 3, stride=stride, padding=1, bias=bias)
        self.bn1 = make_norm(norm, spatial_dims, channels)
        self.relu = make_activation("relu")
        self.conv2 = convolution(channels, channels, 3, padding=1, bias=bias)
        self.bn2 = make_norm(norm, spatial_dims, channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                _THINNED[spatial_dims](in_channels, channels, 1, stride=stride, bias=bias),
                make_norm(norm, spatial_dims, channels),
            )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        shortcut = features if self.downsample is None else self.downsample(features)
        features = self.relu(self.bn1(self.conv1(features)))
        features = self.bn2(self.conv2(features))
        features += shortcut
        return self.relu(features)


class ResNetEncoder(nn.Module):
    """ResNet with basic blocks, without its classifier; state-dict names as torchvision's and MONAI's resnet34.

    (B, in_channels, *spatial) -> five feature maps, at 1/2, 1/4, 1/8, 1/16 and 1/32 of the size.
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, channels: Sequence[int], blocks: Sequence[int], norm: str | None
    ) -> None:
        super().__init__()
        first = channels[0]
        self.conv1 = CONVOLUTIONS[spatial_dims](in_channels, first, 7, stride=2, padding=3, bias=norm is None)
        self.bn1 = make_norm(norm, spatial_dims, first)
        self.relu = make_activation("relu")
        self.maxpool = MAX_POOLS[spatial_dims](3, stride=2, padding=1)
        features = first
        layers = []
        for level, (count, number) in enumerate(zip(channels, blocks, strict=True)):
            parts = []
            for block in range(number):
                stride = 2 if level > 0 and block == 0 else 1
                parts.append(BasicBlock(spatial_dims, features, count, stride, norm))
                features = count
            layers.append(nn.Sequential(*parts))
        self.layer1, self.layer2, self.layer3, self.layer4 = layers

    @property
    def stages(self) -> list[nn.Module]:
        """The residual blocks: what may be computed again for the gradient."""
        return [block for layer in (self.layer1, self.layer2, self.layer3, self.layer4) for block in layer]

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        features = [self.relu(self.bn1(self.conv1(images)))]
        features.append(self.layer1(self.maxpool(features[0])))
        for layer in (self.layer2, self.layer3, self.layer4):
            features.append(layer(features[-1]))
        return features


class ResUNet(SegmentationNetwork):
    """U-Net with a ResNet-34 encoder, decoder blocks 1x1 - transposed 3x3 - 1x1 and added skips; padded.

    Maps images (B, in_channels, *spatial) to logits (B, out_channels, *spatial); sides are multiples of 32.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: classes, background included (softmax), or 1 (sigmoid).
        channels: features of the four residual levels; ResNet-34's by default.
        blocks: residual blocks in each level; ResNet-34's by default.
        norm: None, "batch" or "instance".
        weights: encoder weights: a local file (torch.save or .safetensors) or a state dict, named as torchvision's
            resnet34 or MONAI's ResNet. The classifier (`fc.`) is ignored, the first convolution is adapted to
            `in_channels`; anything else that does not fit is an error. `.weight_report` then tells what fitted.
        init: "kaiming", "normal", "xavier" or "orthogonal", for all that is not loaded.

    Raises:
        UsageError: an argument is wrong; in `forward`: input of an illegal size.
        CheckpointError: the weights cannot be read or do not fit.

    >>> network = ResUNet(2, 1, 2, channels=(4, 8, 8, 16), blocks=(1, 1, 1, 1)).eval()
    >>> network(torch.zeros(1, 1, 64, 64)).shape, network.divisor
    (torch.Size([1, 2, 64, 64]), (32, 32))
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 2,
        channels: Sequence[int] = (64, 128, 256, 512),
        *,
        blocks: Sequence[int] = (3, 4, 6, 3),
        norm: str | None = "batch",
        weights: Source | None = None,
        init: str = "kaiming",
    ) -> None:
        channels, blocks = tuple(channels), tuple(blocks)
        check_common(spatial_dims, in_channels, out_channels, channels)
        for name, values in (("channels", channels), ("blocks", blocks)):
            if len(values) != 4 or min(values) < 1:
                raise UsageError("a residual encoder has four levels", field=name, expected="4 numbers", found=values)
        super().__init__(
            spatial_dims, in_channels, out_channels, [_make_axis(blocks)] * spatial_dims, exact=norm != "instance"
        )
        self.encoder = ResNetEncoder(spatial_dims, in_channels, channels, blocks, norm)
        skips = (channels[0], *channels)
        self.decoder = nn.ModuleList(
            _make_decoder(spatial_dims, below, count, norm) for count, below in zip(skips, channels, strict=False)
        )
        last = max(channels[0] // 2, 1)
        bias = norm is None
        self.head = nn.Sequential(
            TRANSPOSED[spatial_dims](channels[0], last, 3, stride=2, padding=1, output_padding=1, bias=bias),
            make_norm(norm, spatial_dims, last),
            make_activation("relu"),
            ConvUnit(spatial_dims, last, last, norm=norm),
            CONVOLUTIONS[spatial_dims](last, out_channels, 1),
        )
        initialize(self, init)
        self.weight_report = None
        if weights is not None:
            self.weight_report = load_weights(self.encoder, weights, ignore=("fc.",), adapt=_adapt)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits."""
        self.check_input(images)
        skips = self.encoder(images)
        features = skips.pop()
        for decode in reversed(self.decoder):
            features = decode(features) + skips.pop()  # not in place: both activations keep their results for backward
        return self.head(features)


def _make_decoder(spatial_dims: int, in_channels: int, out_channels: int, norm: str | None) -> nn.Sequential:
    inner = max(in_channels // 4, 1)
    bias = norm is None
    return nn.Sequential(
        ConvUnit(spatial_dims, in_channels, inner, kernel_size=1, padding=0, norm=norm),
        TRANSPOSED[spatial_dims](inner, inner, 3, stride=2, padding=1, output_padding=1, bias=bias),
        make_norm(norm, spatial_dims, inner),
        make_activation("relu"),
        ConvUnit(spatial_dims, inner, out_channels, kernel_size=1, padding=0, norm=norm),
    )


def _make_axis(blocks: Sequence[int]) -> Axis:
    same, up = Window(3, 1, 1), Spread(3, 2, 1, 1)
    encoder: list[tuple[Operation, ...]] = [(Window(7, 2, 3),), (Window(3, 2, 1), *[same] * (2 * blocks[0]))]
    encoder += [(Window(3, 2, 1), *[same] * (2 * number - 1)) for number in blocks[1:]]
    return Axis(tuple(encoder), ((up,),) * 4, ((),) * 4, head=(up, same))


def _adapt(name: str, given: torch.Tensor, own: torch.Tensor) -> torch.Tensor | None:
    return adapt_input(given, own) if name == "conv1.weight" else None
