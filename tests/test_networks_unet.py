"""The U-Nets' numbers, against the papers and against slow definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medseg.networks import UNet
from medseg.networks.blocks import crop_centre, initialize

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def convolutions(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, CONVOLUTIONS)]


def on_meta(*arguments, **options) -> UNet:
    with torch.device("meta"):
        return UNet(*arguments, **options)


def test_the_papers_network():
    with torch.device("meta"):
        network = UNet()
    assert count(network) == 31_030_658
    assert len(convolutions(network)) == 23
    assert network.output_size((572, 572)) == (388, 388)
    assert network(torch.empty(1, 1, 572, 572, device="meta")).shape == (1, 2, 388, 388)
    assert (network.context, network.divisor) == ((92, 92), (16, 16))
    assert network.crops == [(88, 88), (40, 40), (16, 16), (4, 4)]  # 568-392, 280-200, 136-104, 64-56, halved
    assert network.exact_under_tiling
    assert not network.padded
    same = on_meta(padding="same")
    assert count(same) == 31_030_658
    assert (same.context, same.output_size((512, 512))) == ((96, 96), (512, 512))


def test_sizes_inside_the_papers_network():
    """The sizes printed in figure 1 of the paper."""
    network = on_meta()
    seen = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.MaxPool2d):
            module.register_forward_hook(lambda _m, _i, output: seen.append((output.shape[1], output.shape[2])))
    network(torch.empty(1, 1, 572, 572, device="meta"))
    assert seen == [
        *((64, 570), (64, 568), (64, 284), (128, 282), (128, 280), (128, 140), (256, 138), (256, 136), (256, 68)),
        *((512, 66), (512, 64), (512, 32), (1024, 30), (1024, 28)),
        *((512, 56), (512, 54), (512, 52), (256, 104), (256, 102), (256, 100)),
        *((128, 200), (128, 198), (128, 196), (64, 392), (64, 390), (64, 388), (2, 388)),
    ]


def test_three_dimensional_unet():
    """Çiçek 2016: 132 x 132 x 116 -> 44 x 44 x 28; 19 069 955 parameters without the up-convolutions' biases."""
    network = on_meta(3, 3, 3, (64, 128, 256, 512), widen="pool")
    assert network.output_size((132, 132, 116)) == (44, 44, 28)
    assert network(torch.empty(1, 3, 132, 132, 116, device="meta")).shape == (1, 3, 44, 44, 28)
    assert count(network) - (512 + 256 + 128) == 19_069_955
    assert network.context == (44, 44, 44)
    assert on_meta(3, 1, 2, (64, 128, 256, 512)).output_size((132, 132, 132)) == (44, 44, 44)


def test_oktays_plain_unet_for_ct_has_5_88_million():
    network = on_meta(3, 1, 2, (16, 32, 64, 128, 256), padding="same", norm="batch", up="interpolate", dropout=0.0)
    assert round(count(network) / 1e6, 2) == 5.89  # 5.88 in their table, without the norms' 4.7 thousand


def slow_unet(network: UNet, images: torch.Tensor) -> torch.Tensor:
    """The paper's figure 1, written down with functions only, weights in the order of the figure."""
    weights = {name: list(getattr(network, name)) for name in ("encoder", "up", "decoder")}
    skips = []
    for level, stack in enumerate(weights["encoder"]):
        if level:
            images = F.max_pool2d(images, 2)
        for unit in list(stack)[:2]:
            images = torch.relu(F.conv2d(images, unit[0].weight, unit[0].bias))
        skips.append(images)
    for level in reversed(range(len(skips) - 1)):
        up = weights["up"][level]
        images = F.conv_transpose2d(images, up.weight, up.bias, stride=2)
        cut = (skips[level].shape[2] - images.shape[2]) // 2
        images = torch.cat([images, skips[level][:, :, cut:-cut, cut:-cut]], 1)
        for unit in weights["decoder"][level]:
            images = torch.relu(F.conv2d(images, unit[0].weight, unit[0].bias))
    return F.conv2d(images, network.head.weight, network.head.bias)


def test_forward_equals_the_figure():
    torch.manual_seed(0)
    network = UNet(2, 1, 3, (4, 8, 16)).eval()
    for parameter in network.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
    images = torch.randn(2, 1, 76, 92)
    with torch.no_grad():
        torch.testing.assert_close(network(images), slow_unet(network, images))


def test_dropout_follows_the_last_activation_of_the_two_coarsest_encoder_levels():
    network = UNet(channels=(2, 4, 8, 16))
    found = [name for name, module in network.named_modules() if isinstance(module, nn.Dropout)]
    assert found == ["encoder.2.2", "encoder.3.2"]  # after units 0 and 1
    assert {module.p for module in network.modules() if isinstance(module, nn.Dropout)} == {0.5}
    images = torch.randn(1, 1, 140, 140)
    assert not torch.equal(network.train()(images), network(images))
    assert not [m for m in UNet(channels=(2, 4), dropout=0.0).modules() if isinstance(m, nn.Dropout)]


def test_weights_start_with_sd_sqrt_2_over_n():
    torch.manual_seed(0)
    for network in (UNet(2, 1, 2, (32, 64, 128)), UNet(3, 1, 2, (16, 32, 64))):
        for module in convolutions(network):
            if module.weight.numel() < 2000:
                continue
            incoming = module.in_channels * math.prod(module.kernel_size)
            if module.transposed:  # kernel = stride: each output voxel sees one input voxel
                incoming = module.in_channels
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / incoming), rel=0.05)
            assert abs(module.weight.mean().item()) < 0.1 * math.sqrt(2 / incoming)
            assert not module.bias.any()


def test_he_initialisation_keeps_the_scale_of_activations():
    torch.manual_seed(0)
    network = UNet(2, 1, 2, (32, 64, 128), dropout=0.0).eval()
    with torch.no_grad():
        assert 0.3 < network(torch.randn(1, 1, 108, 108)).std() < 10


def test_other_initialisations():
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 32, 3)
    initialize(layer, "normal")
    assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
    initialize(layer, "xavier")
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2) * math.sqrt(2 / (9 * 96)), rel=0.05)
    initialize(layer, "orthogonal")
    rows = layer.weight.detach().flatten(1)
    torch.testing.assert_close(rows @ rows.T, 2 * torch.eye(32), atol=1e-4, rtol=0)


def test_strided_variant_is_convolution_norm_activation_and_output_padding():
    network = UNet(2, 1, 2, (4, 8, 16), padding="same", norm="batch", down="conv", dropout=0.0)
    for down, up in zip(network.down, network.up, strict=True):
        assert [type(part) for part in down] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
        assert (down[0].kernel_size, down[0].stride, down[0].padding) == ((3, 3), (2, 2), (1, 1))
        assert (up.kernel_size, up.stride, up.padding, up.output_padding) == ((3, 3), (2, 2), (1, 1), (1, 1))
    assert not any(isinstance(module, nn.MaxPool2d) for module in network.modules())


def test_activations_and_norms_are_what_they_are_called():
    def kinds(**options) -> set[type]:
        return {type(module) for module in UNet(channels=(2, 4), **options).modules()}

    assert nn.ReLU in kinds()
    assert nn.ReLU6 in kinds(activation="relu6")
    assert nn.LeakyReLU in kinds(activation="leaky_relu")
    assert nn.BatchNorm2d in kinds(norm="batch")
    assert nn.InstanceNorm2d in kinds(norm="instance")
    assert not kinds() & {nn.BatchNorm2d, nn.InstanceNorm2d}


def test_no_bias_before_a_norm():
    for module in UNet(2, 1, 2, (2, 4), padding="same", norm="batch").encoder.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None


@pytest.mark.parametrize("channels", [(8, 16, 32, 64, 128), (32, 64, 128, 256), (32, 64, 128, 256, 512)])
def test_channel_lists_in_use(channels):
    network = on_meta(2, 3, 1, channels, padding="same", norm="batch")
    assert network(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 1, 64, 64)
    assert network.divisor[0] == 2 ** (len(channels) - 1)


def test_crop_is_centred():
    features = torch.arange(10.0)[None, None]
    assert crop_centre(features, (3,)).tolist() == [[[3, 4, 5, 6]]]
