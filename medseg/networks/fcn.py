"""Fully convolutional networks on VGG-16: Long, Shelhamer, Darrell 2015 (doi:10.1109/CVPR.2015.7298965)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

from medseg.errors import UsageError
from medseg.networks.blocks import (
    CONVOLUTIONS,
    MAX_POOLS,
    TRANSPOSED,
    check_choice,
    check_common,
    initialize,
    make_activation,
)
from medseg.networks.geometry import Axis, Operation, SegmentationNetwork, Spread, Window
from medseg.networks.weights import Source, adapt_input, load_weights

__all__ = ["FCN"]

CONVOLUTIONS_PER_STAGE = (2, 2, 3, 3, 3)
VARIANTS = {"32s": 1, "16s": 2, "8s": 3}  # number of score maps that are added


class VGG16(nn.Module):
    """VGG-16 (arXiv:1409.1556), its dense layers as convolutions; names as torchvision's vgg16.

    `features.0` to `.30`; `classifier.0` is fc6 with kernel 7, `classifier.3` is fc7 with kernel 1.
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, channels: Sequence[int], hidden: int, dropout: float
    ) -> None:
        super().__init__()
        convolution = CONVOLUTIONS[spatial_dims]
        layers: list[nn.Module] = []
        self.ends = []  # where each stage ends, its pooling included
        for count, number in zip(channels, CONVOLUTIONS_PER_STAGE, strict=True):
            for _ in range(number):
                layers += [convolution(in_channels, count, 3, padding=1), make_activation("relu")]
                in_channels = count
            layers.append(MAX_POOLS[spatial_dims](2))
            self.ends.append(len(layers))
        self.features = nn.Sequential(*layers)
        self.through: Callable[[nn.Module, torch.Tensor], torch.Tensor] = _plainly  # how features pass a stage
        self.classifier = nn.Sequential(
            convolution(in_channels, hidden, 7, padding=3),
            make_activation("relu"),
            nn.Dropout(dropout),
            convolution(hidden, hidden, 1),
            make_activation("relu"),
            nn.Dropout(dropout),
        )

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Features at 1/8 and 1/16 of the size, and the last ones at 1/32."""
        found = []
        features = images
        for first, last in pairwise((0, *self.ends)):
            features = self.through(self.features[first:last], features)
            found.append(features)
        return [*found[2:4], self.classifier(features)]


def _plainly(stage: nn.Module, features: torch.Tensor) -> torch.Tensor:
    return stage(features)


class FCN(SegmentationNetwork):
    """FCN-32s, FCN-16s or FCN-8s; padded at every layer, so that the output has the input's size.

    Maps images (B, in_channels, *spatial) to logits (B, out_channels, *spatial); sides are multiples of 32. The authors
    pad the image by 100 and crop the scores; here each layer is padded, the same values away from the border.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: classes, background included (softmax), or 1 (sigmoid).
        channels: features of VGG's five stages.
        variant: "8s", "16s" or "32s": scores from strides 32, and 16, and 8 are added up.
        hidden: features of fc6 and fc7.
        dropout: probability, after fc6 and fc7 (training only).
        weights: VGG-16 weights: a local file (torch.save or .safetensors) or a state dict named as torchvision's vgg16.
            fc6 and fc7 are reshaped to convolutions, the ImageNet classifier is ignored, the first convolution is
            adapted to `in_channels`; anything else that does not fit is an error. `.weight_report` tells what fitted.
        init: "kaiming", "normal", "xavier" or "orthogonal", for VGG when no weights are given. Score layers start at
            zero and up-sampling as linear interpolation, as the authors have it; without weights the score layers are
            initialised too, since zero scores of random features would hold back learning.

    Raises:
        UsageError: an argument is wrong; in `forward`: input of an illegal size.
        CheckpointError: the weights cannot be read or do not fit.

    >>> network = FCN(2, 1, 2, channels=(4, 4, 8, 8, 8), hidden=16, variant="16s").eval()
    >>> network(torch.zeros(1, 1, 32, 64)).shape
    torch.Size([1, 2, 32, 64])
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 2,
        channels: Sequence[int] = (64, 128, 256, 512, 512),
        *,
        variant: str = "8s",
        hidden: int = 4096,
        dropout: float = 0.5,
        weights: Source | None = None,
        init: str = "kaiming",
    ) -> None:
        channels = tuple(channels)
        check_common(spatial_dims, in_channels, out_channels, channels)
        check_choice("variant", variant, tuple(VARIANTS))
        if len(channels) != 5 or hidden < 1 or not 0 <= dropout < 1:
            raise UsageError(
                "VGG-16 has five stages, hidden features, and dropout below 1",
                field="channels, hidden, dropout",
                expected="5 numbers, >= 1, 0 <= dropout < 1",
                found=(channels, hidden, dropout),
            )
        scores = VARIANTS[variant]
        super().__init__(spatial_dims, in_channels, out_channels, [_make_axis(scores)] * spatial_dims, exact=True)
        self.encoder = VGG16(spatial_dims, in_channels, channels, hidden, dropout)
        counts = (channels[2], channels[3], hidden)[-scores:]
        convolution = CONVOLUTIONS[spatial_dims]
        self.score = nn.ModuleList(convolution(count, out_channels, 1) for count in counts)
        factors = [2 ** (6 - scores), *[2] * (scores - 1)]  # the finest map first, to the image; then map to map
        self.up = nn.ModuleList(
            TRANSPOSED[spatial_dims](
                out_channels, out_channels, 2 * factor, stride=factor, padding=factor // 2, bias=False
            )
            for factor in factors
        )
        initialize(self, init)
        for up, factor in zip(self.up, factors, strict=True):
            _fill_linear(up, factor)
        self.weight_report = None
        if weights is not None:
            self.weight_report = load_weights(self.encoder, weights, ignore=("classifier.6.",), adapt=_adapt)
            for score in self.score:
                for parameter in score.parameters():
                    nn.init.zeros_(parameter)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits."""
        self.check_input(images)
        features = self.encoder(images)[-len(self.score) :]
        scores = [score(part) for score, part in zip(self.score, features, strict=True)]
        logits = scores.pop()
        for level in range(len(scores), 0, -1):
            logits = self.up[level](logits) + scores.pop()
        return self.up[0](logits)


def _fill_linear(layer: nn.Module, factor: int) -> None:
    """Make a transposed convolution of kernel 2 * factor the linear interpolation of each channel by itself."""
    ramp = 1 - (torch.arange(2 * factor) + 0.5 - factor).abs() / factor
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    kernel = ramp
    for _ in range(weight.ndim - 3):
        kernel = kernel[..., None] * ramp
    with torch.no_grad():
        weight.zero_()
        for channel in range(weight.shape[0]):
            weight[channel, channel] = kernel


def _make_axis(scores: int) -> Axis:
    stages: list[tuple[Operation, ...]] = [
        (*[Window(3, 1, 1)] * number, Window(2, 2)) for number in CONVOLUTIONS_PER_STAGE
    ]
    stages[-1] = (*stages[-1], Window(7, 1, 3))
    first = 6 - scores  # stages before the first score
    encoder = [sum(stages[:first], ()), *stages[first:]]
    factor = 2**first
    ups = ((Spread(4, 2, 1),),) * (scores - 1)
    return Axis(tuple(encoder), ups, ((),) * (scores - 1), head=(Spread(2 * factor, factor, factor // 2),))


def _adapt(name: str, given: torch.Tensor, own: torch.Tensor) -> torch.Tensor | None:
    if name == "features.0.weight":
        return adapt_input(given, own)
    if name.startswith("classifier.") and given.numel() == own.numel():
        return given.reshape(own.shape)  # a dense layer over 512 x 7 x 7 is a convolution of kernel 7
    return None
