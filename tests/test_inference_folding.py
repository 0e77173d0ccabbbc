"""What `medseg predict` does to a network before it runs it: norms folded, freed memory kept."""

from __future__ import annotations

import copy

import nibabel
import numpy as np
import pytest
import torch
from test_prediction import make_model, make_volume
from torch import nn

from medseg import hardware
from medseg.component import Component
from medseg.inference import GaussianTileInferer, OverlapTileInferer, stages
from medseg.inference.folding import fold_norms
from medseg.inference.keeping import keeps_memory
from medseg.inference.slices import SliceBlocks
from medseg.networks import NETWORKS, UNet
from medseg.prediction import predict

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def with_statistics(network):
    """Random running statistics, scales and shifts, as after training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for norm in network.modules():
            if isinstance(norm, NORMS):
                norm.running_mean.normal_(generator=generator)
                norm.running_var.uniform_(0.3, 3, generator=generator)
                norm.weight.normal_(generator=generator)
                norm.bias.normal_(generator=generator)
    return network.eval()


def count_norms(network):
    return sum(isinstance(layer, NORMS) for layer in network.modules())


CASES = [
    ("UNet", 2, {"channels": (4, 8, 8)}),
    ("UNet", 3, {"channels": (4, 8), "down": "conv", "up": "interpolate"}),
    ("AttentionUNet", 2, {"channels": (4, 8, 8)}),
]


@pytest.mark.parametrize(("name", "dims", "options"), CASES)
def test_folded_networks_give_the_same_without_norms(name, dims, options):
    torch.manual_seed(0)
    options = {"padding": "same", "norm": "batch"} | options if name == "UNet" else {"norm": "batch"} | options
    network = with_statistics(NETWORKS[name](spatial_dims=dims, in_channels=1, out_channels=3, **options))
    before = copy.deepcopy(network.state_dict())
    folded = fold_norms(network)
    units = sum(
        isinstance(part, nn.Sequential) and any(isinstance(m, NORMS) for m in part) for part in network.modules()
    )
    assert count_norms(folded) == count_norms(network) - units
    assert units > 3
    image = torch.randn((1, 1, *(32,) * dims), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = network(image)
        assert torch.allclose(folded(image), expected, atol=1e-5 * max(1.0, float(expected.abs().max())))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert (folded.context, folded.divisor) == (network.context, network.divisor)


def sequence(*layers):
    return with_statistics(nn.Sequential(*layers))


def hooked():
    network = sequence(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    network[0].register_forward_hook(lambda module, inputs, output: output * 2)
    return network


def shared():
    again = nn.ReLU()
    return sequence(again, nn.Conv2d(1, 2, 3), again, nn.BatchNorm2d(2))


class Backwards(nn.Sequential):
    def forward(self, images):
        for layer in reversed(self):
            images = layer(images)
        return images


@pytest.mark.parametrize(
    "make",
    [
        hooked,
        shared,  # the layer between them comes twice
        lambda: sequence(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).train(),
        lambda: sequence(nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2)),
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False)).eval(),
        lambda: with_statistics(Backwards(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1))),
        lambda: torch.nn.utils.parametrizations.weight_norm(sequence(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))[0]),
        lambda: lambda images: images,
    ],
)
def test_what_cannot_be_folded_is_left_alone(make):
    network = make()
    assert fold_norms(network) is network


def test_predict_folds_and_keeps_the_models_identity(tmp_path, monkeypatch):
    make_volume(tmp_path / "a.nii.gz", (40, 20, 18))
    torch.manual_seed(0)
    network = UNet(spatial_dims=3, in_channels=1, out_channels=3, channels=(4, 8), padding="same", norm="batch")
    network = with_statistics(network)
    model = make_model(networks=(network,), inference=Component("GaussianTileInferer", {"roi_size": 16}))
    with monkeypatch.context() as patch:
        patch.setattr(stages, "fold_norms", lambda network: network)
        predict(model, tmp_path / "a.nii.gz", tmp_path / "out", progress=False)
    expected = np.asanyarray(nibabel.load(tmp_path / "out" / "a.nii.gz").dataobj)
    resumed = predict(model, tmp_path / "a.nii.gz", tmp_path / "out", resume=True, progress=False)
    assert [case.status for case in resumed.cases] == ["skipped"]  # the same weights, folded or not
    monkeypatch.setattr(nn.functional, "batch_norm", lambda *args, **options: pytest.fail("a norm was not folded"))
    assert predict(model, tmp_path / "a.nii.gz", tmp_path / "out", progress=False).exit_code == 0
    labels = np.asanyarray(nibabel.load(tmp_path / "out" / "a.nii.gz").dataobj)
    assert len(np.unique(labels)) == 3
    assert (labels == expected).mean() > 0.999


class Plain(nn.Module):
    """64 bytes of activations a voxel and more (8 channels of 4 bytes, twice), 2 classes."""

    context, divisor, exact_under_tiling, spatial_dims, out_channels = (2, 2, 2), (1, 1, 1), True, 3, 2

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv3d(1, 8, 3, padding=1), nn.Conv3d(8, 2, 1)

    def forward(self, images):
        return self.last(self.first(images).relu())


@pytest.mark.parametrize(
    ("inferer", "size", "device", "kept"),
    [
        (GaussianTileInferer(32, max_ram="1GB"), (80, 80, 80), "cpu", True),
        (GaussianTileInferer(32, max_ram="1GB"), (32, 32, 40), "cpu", False),  # two windows
        (GaussianTileInferer(32, max_ram="4MB"), (80, 80, 80), "cpu", False),  # no room
        (GaussianTileInferer(32, max_ram="1GB"), (80, 80, 80), "cuda", False),
        (OverlapTileInferer(max_ram="1GB"), (80, 80, 80), "cpu", False),  # one tile
        (OverlapTileInferer(tile=24, max_ram="1GB"), (80, 80, 80), "cpu", True),
    ],
)
def test_memory_is_kept_where_windows_repeat_and_there_is_room(inferer, size, device, kept):
    network = Plain().eval()
    assert keeps_memory(inferer, inferer.plan(size, network), [network], 1, device=device) is kept


def test_a_network_that_cannot_be_measured_runs_all_the_same():
    def network(windows):
        if windows.is_meta or windows.shape[-1] < 33:
            raise ValueError("not this window")
        return windows

    image = torch.rand(1, 1, 90, 80)
    assert torch.allclose(GaussianTileInferer(40)(image, network), image, atol=1e-6)


@pytest.fixture
def calls(monkeypatch):
    """What was asked of glibc."""
    asked = []

    def keep_memory(keep=True):
        asked.append(keep)
        hardware._KEPT.clear()
        hardware._KEPT.update({"kept"} if keep else ())
        return True

    monkeypatch.setattr(hardware, "keep_memory", keep_memory)
    return asked


@pytest.mark.parametrize("inferer", [OverlapTileInferer(max_ram="1GB"), GaussianTileInferer(16, max_ram="1GB")])
def test_slices_of_a_volume_are_windows_of_one_block(calls, inferer):
    network = UNet(2, 3, 2, (4, 8), padding="same", norm="batch").eval()
    list(SliceBlocks(inferer).blocks(torch.rand(1, 24, 24, 6), [network]))
    assert calls == [True, False]
    calls.clear()
    inferer(torch.rand(1, 3, 16, 16), network)  # one window
    assert not calls


@pytest.mark.parametrize(
    "inferer", [Component("GaussianTileInferer", {"roi_size": 12}), Component("OverlapTileInferer", {"tile": 12})]
)
def test_memory_is_kept_while_a_case_is_computed_and_not_longer(tmp_path, calls, inferer):
    make_volume(tmp_path / "a.nii.gz", (40, 20, 18))
    predict(make_model(inference=inferer), tmp_path / "a.nii.gz", tmp_path / "out", progress=False)
    assert calls == [True, False]


def test_what_training_keeps_stays_kept(calls):
    network = Plain().eval()
    with hardware.kept_memory():  # its validation predicts, too
        GaussianTileInferer(8, max_ram="1GB")(torch.rand(1, 1, 20, 20, 20), network)
        assert calls == [True]
        assert hardware.memory_is_kept()
    assert calls == [True, False]
    assert not hardware.memory_is_kept()
