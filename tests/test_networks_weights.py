"""Loading encoders from local weights: torchvision's and MONAI's names, adapted shapes, refusals."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from medseg.errors import CheckpointError
from medseg.networks import FCN, ResUNet
from medseg.networks.fcn import VGG16
from medseg.networks.resnet_unet import ResNetEncoder

VGG = {"channels": (4, 4, 6, 6, 8), "hidden": 12}


def full_resnet34() -> ResNetEncoder:
    with torch.device("meta"):
        return ResNetEncoder(2, 3, (64, 128, 256, 512), (3, 4, 6, 3), "batch")


def test_resnet34_has_torchvisions_names_and_size():
    """21 797 672 parameters in torchvision, of which the classifier has 513 000; names as in its published file."""
    encoder = full_resnet34()
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 21_797_672 - 513_000
    names = set(encoder.state_dict())
    assert len(names) == 218 - 2  # torchvision's file, less fc.weight and fc.bias
    assert {
        "conv1.weight",
        "bn1.running_mean",
        "layer1.0.conv1.weight",
        "layer2.0.downsample.0.weight",
        "layer2.0.downsample.1.num_batches_tracked",
        "layer3.5.bn2.bias",
        "layer4.2.conv2.weight",
    } <= names
    assert not [name for name in names if name.startswith("layer1.") and "downsample" in name]


def test_resnet34_loads_from_monai_and_computes_the_same():
    from monai.networks.nets import ResNet

    torch.manual_seed(0)
    theirs = ResNet(
        "basic",
        [3, 4, 6, 3],
        [4, 8, 16, 32],
        spatial_dims=2,
        n_input_channels=3,
        conv1_t_stride=2,
        num_classes=5,
        bias_downsample=False,
    ).eval()
    network = ResUNet(2, 3, 2, (4, 8, 16, 32), weights=theirs.state_dict()).eval()
    assert set(network.weight_report.ignored) == {"fc.weight", "fc.bias"}
    assert network.weight_report.adapted == ()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = theirs.maxpool(theirs.act(theirs.bn1(theirs.conv1(images))))
        for layer in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
            features = layer(features)
        torch.testing.assert_close(network.encoder(images)[-1], features)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_from_a_file_with_prefix_and_grey_input(tmp_path, suffix):
    options = {"channels": (4, 4, 6, 8), "blocks": (1, 1, 1, 1)}
    torch.manual_seed(0)
    source = ResUNet(2, 3, 2, **options).eval()
    path = tmp_path / f"encoder{suffix}"
    tensors = {f"module.{name}": value for name, value in source.encoder.state_dict().items()}
    if suffix == ".pt":
        torch.save({"state_dict": tensors, "epoch": 3}, path)
    else:
        from safetensors.torch import save_file

        save_file(tensors, path)
    grey = ResUNet(2, 1, 2, weights=path, **options).eval()
    assert grey.weight_report.adapted == ("conv1.weight",)
    image = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(grey.encoder(image), source.encoder(image.expand(1, 3, 64, 64)), strict=True):
            torch.testing.assert_close(ours, theirs)
    four = ResUNet(2, 4, 2, weights=path, **options)
    weight = source.encoder.conv1.weight
    torch.testing.assert_close(four.encoder.conv1.weight, weight[:, [0, 1, 2, 0]] * 0.75)


def test_weights_that_do_not_fit_are_refused_with_names():
    options = {"channels": (4, 4, 6, 8), "blocks": (1, 1, 1, 1)}
    state = ResUNet(2, 3, 2, **options).encoder.state_dict()
    wrong = dict(state)
    del wrong["bn1.weight"]
    wrong["layer9.weight"] = torch.zeros(1)
    wrong["layer1.0.conv1.weight"] = torch.zeros(5, 5, 3, 3)
    with pytest.raises(CheckpointError) as caught:
        ResUNet(2, 3, 2, weights=wrong, **options)
    found = caught.value.found
    for part in (
        "1 missing: bn1.weight",
        "1 unknown: layer9.weight",
        "1 other shape: layer1.0.conv1.weight (5, 5, 3, 3)",
    ):
        assert part in found
    with pytest.raises(CheckpointError, match="no weights by name"):
        ResUNet(2, 3, 2, weights={"epoch": 3}, **options)


@pytest.mark.filterwarnings("error")
def test_weights_are_checked_on_a_stand_in_without_a_word_of_torch():
    """A pipeline is checked with a network without memory: torch warned once for each of 218 tensors."""
    options = {"channels": (4, 4, 6, 8), "blocks": (1, 1, 1, 1)}
    state = ResUNet(2, 3, 2, **options).encoder.state_dict()
    with torch.device("meta"):
        network = ResUNet(2, 1, 2, weights=state, **options)
        assert network.weight_report.adapted == ("conv1.weight",)
        with pytest.raises(CheckpointError, match="do not fit"):
            ResUNet(2, 1, 2, weights={**state, "more.weight": torch.zeros(1)}, **options)


def test_weights_files_that_cannot_be_read_are_refused(tmp_path):
    options = {"channels": (4, 4, 6, 8), "blocks": (1, 1, 1, 1)}
    with pytest.raises(CheckpointError, match="no such file"):
        ResUNet(2, 3, 2, weights=tmp_path / "none.pt", **options)
    for name in ("broken.pt", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"no weights at all")
        with pytest.raises(CheckpointError, match="cannot be read"):
            ResUNet(2, 3, 2, weights=tmp_path / name, **options)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="no weights by name"):
        ResUNet(2, 3, 2, weights=tmp_path / "list.pt", **options)


def test_vgg16_has_torchvisions_names_and_size():
    """138 357 544 parameters in torchvision; the ImageNet classifier has 4 097 000 of them."""
    with torch.device("meta"):
        encoder = VGG16(2, 3, (64, 128, 256, 512, 512), 4096, 0.5)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 138_357_544 - 4_097_000
    convolutions = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    expected = {f"features.{i}.{part}" for i in convolutions for part in ("weight", "bias")}
    expected |= {f"classifier.{i}.{part}" for i in (0, 3) for part in ("weight", "bias")}
    assert set(encoder.state_dict()) == expected
    assert encoder.ends == [5, 10, 17, 24, 31]


def test_dense_layers_become_convolutions():
    """At the middle of a 7 x 7 map, fc6 and fc7 as convolutions give what the dense layers give."""
    torch.manual_seed(0)
    network = FCN(2, 3, 2, **VGG).eval()
    state = network.encoder.state_dict()
    dense = dict(state)
    dense["classifier.0.weight"] = torch.randn(12, 8 * 49) * 0.1
    dense["classifier.3.weight"] = torch.randn(12, 12) * 0.1
    dense["classifier.6.weight"], dense["classifier.6.bias"] = torch.randn(1000, 12), torch.randn(1000)
    loaded = FCN(2, 3, 2, weights=dense, **VGG).eval()
    assert set(loaded.weight_report.ignored) == {"classifier.6.weight", "classifier.6.bias"}
    assert set(loaded.weight_report.adapted) == {"classifier.0.weight", "classifier.3.weight"}
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        pooled = loaded.encoder.features(images)
        hidden = torch.relu(F.linear(pooled.flatten(1), dense["classifier.0.weight"], dense["classifier.0.bias"]))
        hidden = torch.relu(F.linear(hidden, dense["classifier.3.weight"], dense["classifier.3.bias"]))
        torch.testing.assert_close(loaded.encoder(images)[-1][:, :, 3, 3], hidden)
        assert not loaded(images).any()  # scores start at zero on pretrained features


@pytest.mark.parametrize(("variant", "factors"), [("32s", [32]), ("16s", [16, 2]), ("8s", [8, 2, 2])])
def test_fcn_starts_with_linear_up_sampling_and_adds_scores(variant, factors):
    network = FCN(2, 3, 3, variant=variant, **VGG).eval()
    assert [up.stride[0] for up in network.up] == factors
    scores = torch.randn(1, 3, 6, 5)
    for up, factor in zip(network.up, factors, strict=True):
        with torch.no_grad():
            raised = up(scores)
        expected = F.interpolate(scores, scale_factor=factor, mode="bilinear", align_corners=False)
        inside = (..., slice(factor, -factor), slice(factor, -factor))  # at the rim interpolation repeats, padding is 0
        torch.testing.assert_close(raised[inside], expected[inside])
    images = torch.randn(1, 3, 64, 64)
    assert len(network.score) == len(factors)
    with torch.no_grad():
        before = network(images)
        for score in network.score:
            kept = score.bias.clone()
            score.bias += 1
            assert not torch.equal(network(images), before)
            score.bias.copy_(kept)
