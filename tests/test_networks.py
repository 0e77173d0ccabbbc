"""The contract that every network passes by being named in CASES."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import nn

from medseg.errors import UsageError
from medseg.networks import FCN, NETWORKS, AttentionUNet, ResUNet, SegmentationNetwork, UNet, build_network

SMALL = (4, 6, 8)
RESIDUAL = {"channels": (4, 4, 6, 8), "blocks": (1, 1, 2, 1)}
VGG = {"channels": (4, 4, 6, 6, 8), "hidden": 12}
PADDED = {"padding": "same", "norm": "batch", "dropout": 0.0}

CASES = {
    "unet-paper": lambda: UNet(2, 1, 2, SMALL),
    "unet-paper-3d": lambda: UNet(3, 1, 2, SMALL),
    "unet-widen-3d": lambda: UNet(3, 2, 3, SMALL, widen="pool"),
    "unet-valid-one-conv": lambda: UNet(2, 1, 2, SMALL, convs_per_level=1, norm="batch"),
    "unet-same": lambda: UNet(2, 3, 1, SMALL, padding="same"),
    "unet-batch": lambda: UNet(2, 2, 3, SMALL, **PADDED),
    "unet-batch-3d": lambda: UNet(3, 1, 2, SMALL, **PADDED),
    "unet-instance": lambda: UNet(2, 1, 2, SMALL, padding="same", norm="instance", activation="leaky_relu"),
    "unet-strided": lambda: UNet(2, 1, 2, SMALL, down="conv", activation="relu6", **PADDED),
    "unet-strided-3d": lambda: UNet(3, 1, 2, SMALL, down="conv", **PADDED),
    "unet-interpolate": lambda: UNet(2, 1, 2, SMALL, up="interpolate", **PADDED),
    "unet-anisotropic": lambda: UNet(3, 1, 2, SMALL, strides=((2, 2, 1), 2), **PADDED),
    "unet-anisotropic-strided": lambda: UNet(3, 1, 2, SMALL, strides=((2, 2, 1), (2, 1, 3)), down="conv", **PADDED),
    "unet-three-one-conv": lambda: UNet(2, 1, 2, SMALL, strides=(3, 2), up="interpolate", convs_per_level=1, **PADDED),
    "unet-deep": lambda: UNet(2, 1, 2, (*SMALL, 8), deep_supervision=2, **PADDED),
    "attention": lambda: AttentionUNet(2, 1, 2, SMALL),
    "attention-3d": lambda: AttentionUNet(3, 1, 3, SMALL),
    "attention-single": lambda: AttentionUNet(2, 1, 2, SMALL, gates_per_skip=1, fuse_scales=False, up="transpose"),
    "attention-anisotropic": lambda: AttentionUNet(3, 1, 2, (*SMALL, 8), strides=((2, 2, 1), 2, (2, 1, 2))),
    "attention-deep": lambda: AttentionUNet(2, 1, 2, (*SMALL, 8), deep_supervision=2),
    "attention-instance": lambda: AttentionUNet(2, 1, 2, SMALL, norm="instance"),
    "attention-full": lambda: AttentionUNet(2, 2, 2, SMALL, gate="additive_full"),
    "attention-full-transpose": lambda: AttentionUNet(2, 1, 2, SMALL, gate="additive_full", up="transpose"),
    "attention-full-3d": lambda: AttentionUNet(3, 1, 2, SMALL, gate="additive_full", norm=None),
    "resunet": lambda: ResUNet(2, 3, 2, **RESIDUAL),
    "resunet-3d": lambda: ResUNet(3, 1, 2, **RESIDUAL),
    "fcn-8s": lambda: FCN(2, 3, 2, **VGG),
    "fcn-16s": lambda: FCN(2, 1, 2, variant="16s", **VGG),
    "fcn-32s": lambda: FCN(2, 1, 3, variant="32s", **VGG),
    "fcn-8s-3d": lambda: FCN(3, 1, 2, **VGG),
}
ONE_PER_FAMILY = ("unet-paper", "unet-anisotropic", "attention", "attention-full", "resunet", "fcn-8s")
every_case = pytest.mark.parametrize("case", CASES)
# the 3-D forms of these have the same geometry per axis as their 2-D forms, but need large volumes to show it
HEAVY = ("resunet-3d", "fcn-8s-3d")
lighter_first = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in HEAVY else case for case in CASES]
)


def make(case: str, seed: int = 0) -> SegmentationNetwork:
    torch.manual_seed(seed)
    network = CASES[case]()
    for module in network.modules():  # running means and scales as after training, not the neutral ones
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def size_for(network: SegmentationNetwork) -> tuple[int, ...]:
    """A small legal size with more than one voxel at the coarsest level (a norm in training needs them)."""
    return network.legal_size(
        [
            2 * step if network.padded else axis.smallest + step
            for step, axis in zip(network.divisor, network.axes, strict=True)
        ]
    )


def images_for(network: SegmentationNetwork, size=None, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, network.in_channels, *(size or size_for(network)), generator=generator)


@every_case
def test_forward_and_backward(case):
    network = make(case).train()
    images = images_for(network)
    output = network(images)
    outputs = output if isinstance(output, tuple) else (output,)
    assert outputs[0].shape == (2, network.out_channels, *network.output_size(images.shape[2:]))
    for level, logits in enumerate(outputs[1:], start=1):  # deep supervision: half, quarter ...
        assert logits.shape[2:] == tuple(side // 2**level for side in images.shape[2:])
    assert len(outputs) == (3 if "deep" in case else 1)
    sum(logits.square().mean() for logits in outputs).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        # a bias before a norm would be a weight that does nothing: its gradient is rounding only
        assert parameter.grad.abs().max() > 1e-12, name


@every_case
def test_eval_is_repeatable_and_state_dict_round_trips(case, tmp_path):
    network = make(case).eval()
    images = images_for(network)
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        first, second = network(images), network(images)
    assert isinstance(first, torch.Tensor)
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    other = make(case, seed=7).eval()
    with torch.no_grad():
        assert not torch.equal(other(images), first)
        other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        assert torch.equal(other(images), first)


@every_case
def test_output_size_and_legal_sizes(case):
    network = make(case).eval()
    long_axis = network.axes[0]
    rest = size_for(network)[1:]
    legal = {n for n in range(1, long_axis.smallest + 2 * long_axis.divisor + 1) if long_axis.trace(n)[0]}
    assert max(legal) - long_axis.divisor in legal
    for size in range(long_axis.smallest - 1, max(legal) + 1):
        images = torch.zeros(1, network.in_channels, size, *rest)
        if size in legal:
            with torch.no_grad():
                assert tuple(network(images).shape[2:]) == network.output_size((size, *rest))
        else:
            with pytest.raises(UsageError) as caught:
                network(images)
            larger = min(n for n in legal if n > size)
            smaller = max((n for n in legal if n < size), default=larger)
            assert str((larger, *rest)) in caught.value.expected
            assert str((smaller, *rest)) in caught.value.expected
            assert network.legal_size((size, *rest)) == (larger, *rest)
    with pytest.raises(UsageError, match="shape"):
        network(torch.zeros(1, network.in_channels + 1, *size_for(network)))
    with pytest.raises(UsageError, match="shape"):
        network(torch.zeros(network.in_channels, *size_for(network)))


def smooth(network: SegmentationNetwork) -> SegmentationNetwork:
    """The same network with positive weights, averages for maxima and no norm: gradients show every dependency."""
    network = copy.deepcopy(network).double().eval()
    averages = {nn.MaxPool2d: nn.AvgPool2d, nn.MaxPool3d: nn.AvgPool3d}
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in averages:
                setattr(parent, name, averages[type(child)](child.kernel_size, child.stride, child.padding))
            elif isinstance(child, nn.BatchNorm2d | nn.BatchNorm3d | nn.InstanceNorm2d | nn.InstanceNorm3d):
                setattr(parent, name, nn.Identity())
    for parameter in network.parameters():
        nn.init.constant_(parameter, 1 / max(parameter[0].numel(), 1) if parameter.ndim > 1 else 0.01)
    return network


@lighter_first
def test_geometry_is_what_gradients_measure(case):
    network = smooth(make(case))
    size = list(size_for(network))
    for axis in range(1 if len(set(network.divisor)) == 1 else network.spatial_dims):
        geometry = network.axes[axis]
        divisor = geometry.divisor
        reach = geometry.receptive_field // divisor + 2
        long = list(size)
        long[axis] = geometry.legal(geometry.smallest + (2 * reach + 1) * divisor)
        images = torch.rand(1, network.in_channels, *long, dtype=torch.float64, requires_grad=True)
        output = network(images)
        start = reach * divisor
        for first, last in ((start, start + divisor - 1), (start, start), (start + divisor // 2, start + divisor // 2)):
            block = output.narrow(axis + 2, first, last - first + 1)
            (gradient,) = torch.autograd.grad(block.sum(), images, retain_graph=True)
            others = [d for d in range(gradient.ndim) if d != axis + 2]
            touched = gradient.abs().sum(dim=others).nonzero().flatten()
            assert (int(touched[0]), int(touched[-1])) == geometry.needs(first, last)
        if network.padded:
            low, high = geometry.needs(0, divisor - 1)
            needed = max(-low, high - divisor + 1)
            assert network.context[axis] - divisor < needed <= network.context[axis]
            assert network.context[axis] % divisor == 0
        else:
            assert 2 * network.context[axis] == long[axis] - output.shape[axis + 2]
            assert geometry.needs(0, output.shape[axis + 2] - 1) == (0, long[axis] - 1)


def tile_difference(network: SegmentationNetwork, shift: int) -> float:
    """Largest difference between a tile's output and the whole image's, relative to the output's scale."""
    divisor, context = network.divisor[0], network.context[0]
    rest = size_for(network)[1:]
    block = 2 * divisor
    start = -(-context // divisor) * divisor + divisor + shift
    if network.padded:
        size = -(-(start + block + context + divisor) // divisor) * divisor
        tile = slice(start - context, start + block + context)
    else:
        tile = slice(start, start + network.axes[0].smallest + block)
        size = network.axes[0].legal(tile.stop + divisor)
    images = images_for(network, (size, *rest))
    with torch.no_grad():
        whole = network(images)
        part = network(images[:, :, tile])
    part = part[:, :, context : context + block] if network.padded else part
    same = whole[:, :, start : start + part.shape[2]]
    return float((part - same).abs().max() / whole.abs().max())


@lighter_first
def test_tiles_equal_the_whole_image_where_the_network_says_so(case):
    network = make(case).eval()
    assert network.exact_under_tiling == ("instance" not in case)
    on_grid = tile_difference(network, 0)
    if network.exact_under_tiling:
        assert on_grid <= 1e-5
    else:
        assert on_grid > 1e-3
    if network.divisor[0] > 1:
        assert tile_difference(network, 1) > 1e-3  # so that the test above can fail


@every_case
def test_autocast_and_channels_last(case):
    network = make(case).eval()
    images = images_for(network)
    with torch.no_grad():
        expected = network(images)
        with torch.autocast("cpu", torch.bfloat16):
            rough = network(images).float()
        layout = torch.channels_last if network.spatial_dims == 2 else torch.channels_last_3d
        other = network.to(memory_format=layout)(images.to(memory_format=layout))
    scale = expected.abs().max()
    assert (other - expected).abs().max() <= 1e-5 * scale
    assert (rough - expected).abs().mean() <= 0.05 * scale
    assert (rough != expected).any()


@pytest.mark.parametrize("case", ONE_PER_FAMILY)
def test_export_and_whole_graph(case):
    network = make(case).eval()
    images = images_for(network)
    with torch.no_grad():
        expected = network(images)
        exported = torch.export.export(network, (images,)).module()
        torch.testing.assert_close(exported(images), expected)
        torch._dynamo.reset()
        whole = torch.compile(network, backend="eager", fullgraph=True)  # raises where the graph would break
        torch.testing.assert_close(whole(images), expected)


def check_onnx(case, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    network = make(case).eval()
    images = images_for(network)
    with torch.no_grad():
        expected = network(images)
    path = tmp_path / "network.onnx"
    torch.onnx.export(network, (images,), path, dynamo=True, verbose=False)
    onnx.checker.check_model(path, full_check=True)
    assert onnx.load(path).opset_import[0].version >= 18
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert (torch.from_numpy(found) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("case", ["attention"])
def test_onnx(case, tmp_path):
    check_onnx(case, tmp_path)


@pytest.mark.slow
@every_case
def test_onnx_of_every_case(case, tmp_path):
    check_onnx(case, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("case", ONE_PER_FAMILY)
def test_compiled_network_is_the_same(case):
    network = make(case).eval()
    images = images_for(network)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(network)(images), network(images), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@every_case
def test_gpu_gives_the_same(case):
    network = make(case).eval().double()
    images = images_for(network).double()
    with torch.no_grad():
        expected = network(images)
        found = network.cuda()(images.cuda()).cpu()
    torch.testing.assert_close(found, expected)


def test_build_network_names_the_nearest():
    assert set(NETWORKS) == {"UNet", "AttentionUNet", "ResUNet", "FCN"}
    network = build_network("UNet", spatial_dims=3, in_channels=1, out_channels=2, channels=[4, 8], padding="same")
    assert isinstance(network, UNet)
    with pytest.raises(UsageError) as caught:
        build_network("AttentionUnet")
    assert "AttentionUNet" in caught.value.fix
    with pytest.raises(UsageError) as caught:
        build_network("UNet", chanels=[4, 8])
    assert "channels" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "arguments", "field"),
    [
        ("UNet", {"spatial_dims": 4}, "spatial_dims"),
        ("UNet", {"in_channels": 0}, "in_channels"),
        ("UNet", {"out_channels": 0}, "out_channels"),
        ("UNet", {"channels": ()}, "channels"),
        ("UNet", {"channels": (8,)}, "channels"),
        ("UNet", {"channels": (8, 0)}, "channels"),
        ("UNet", {"padding": "zero"}, "padding"),
        ("UNet", {"norm": "layer"}, "norm"),
        ("UNet", {"activation": "gelu"}, "activation"),
        ("UNet", {"up": "bilinear"}, "up"),
        ("UNet", {"down": "conv"}, "down"),  # not with padding="valid"
        ("UNet", {"up": "interpolate"}, "up"),
        ("UNet", {"deep_supervision": 1}, "deep_supervision"),
        ("UNet", {"deep_supervision": 4, "padding": "same"}, "deep_supervision"),
        ("UNet", {"dropout": 1.0}, "dropout"),
        ("UNet", {"convs_per_level": 0}, "convs_per_level"),
        ("UNet", {"convs_per_level": 1, "widen": "pool"}, "convs_per_level"),
        ("UNet", {"strides": (2, 2)}, "strides"),
        ("UNet", {"strides": ((2, 2, 1), 2, 2, 2)}, "strides"),
        ("UNet", {"strides": 0}, "strides"),
        ("UNet", {"init": "uniform"}, "init"),
        ("AttentionUNet", {"channels": (4, 8)}, "channels"),
        ("AttentionUNet", {"gate": "full"}, "gate"),
        ("AttentionUNet", {"gate": "additive_full", "gates_per_skip": 2}, "gates_per_skip"),
        ("AttentionUNet", {"gates_per_skip": -1}, "gates_per_skip"),
        ("AttentionUNet", {"gates_per_skip": 0}, "gates_per_skip"),
        ("ResUNet", {"channels": (4, 8)}, "channels"),
        ("ResUNet", {"blocks": (1, 1, 0, 1)}, "blocks"),
        ("FCN", {"variant": "4s"}, "variant"),
        ("FCN", {"channels": (4, 8)}, "channels, hidden, dropout"),
    ],
)
def test_wrong_arguments_are_named(name, arguments, field):
    arguments = {"channels": (4, 4, 4, 4, 4)[: 4 if name == "ResUNet" else 5], **arguments}
    with pytest.raises(UsageError) as caught:
        build_network(name, **arguments)
    assert caught.value.field == field


@pytest.mark.parametrize("dims", [2, 3])
def test_the_shortcut_of_resunet_equals_a_strided_convolution(dims):
    from medseg.networks.resnet_unet import _THINNED

    torch.manual_seed(0)
    plain = (torch.nn.Conv2d if dims == 2 else torch.nn.Conv3d)(4, 6, 1, stride=2)
    ours = _THINNED[dims](4, 6, 1, stride=2)
    ours.load_state_dict(plain.state_dict())
    image = torch.rand(2, 4, *[7, 8, 6][:dims])
    outputs, grads = [], []
    for layer in (plain, ours):
        outputs.append(layer(image))
        (grad,) = torch.autograd.grad(outputs[-1].square().sum(), layer.weight)
        grads.append(grad)
    assert torch.allclose(*outputs, atol=1e-6)
    assert torch.allclose(*grads, rtol=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("variant", ["8s", "16s", "32s"])
def test_fcn_begins_with_linear_interpolation(dims, variant):
    """As the authors initialise up-sampling; compared with torch's, away from the border."""
    network = FCN(dims, 1, 2, variant=variant, **VGG)
    factors = [up.stride[0] for up in network.up]
    assert factors == {"8s": [8, 2, 2], "16s": [16, 2], "32s": [32]}[variant]
    for up, factor in zip(network.up, factors, strict=True):
        scores = torch.rand((1, 2, *[4] * dims), generator=torch.Generator().manual_seed(0))
        mode = "bilinear" if dims == 2 else "trilinear"
        wanted = torch.nn.functional.interpolate(scores, scale_factor=factor, mode=mode, align_corners=False)
        inner = (..., *[slice(factor, -factor)] * dims)
        with torch.no_grad():
            torch.testing.assert_close(up(scores)[inner], wanted[inner])
