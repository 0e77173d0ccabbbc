"""The inferers against one pass over the whole image, an identity network, and a slow definition."""

from __future__ import annotations

import contextlib
import copy
import time

import numpy as np
import pytest
import torch
from monai.data.meta_tensor import MetaTensor
from monai.data.utils import collate_meta_tensor, decollate_batch
from monai.inferers import SlidingWindowInferer, sliding_window_inference
from monai.transforms import Flip

from medseg.errors import ResourceError, UsageError
from medseg.inference import GaussianTileInferer, OverlapTileInferer
from medseg.inference.convolutions import FastConvolutions
from medseg.inference.cost import estimate
from medseg.inference.memory import available_memory, bytes_per_voxel, parse_bytes, peak_activation_bytes
from medseg.inference.passes import Passes, mirror_axes
from medseg.inference.windows import constant_value, mirror_index, read_window
from medseg.networks import UNet


class Identity(torch.nn.Module):
    exact_under_tiling = True

    def __init__(self, dims, context=3, divisor=2):
        super().__init__()
        self.spatial_dims, self.context, self.divisor = dims, (context,) * dims, (divisor,) * dims
        self.sizes = []

    def forward(self, images):
        self.sizes.append(tuple(images.shape))
        return images


def small_unet(dims, padding, **options):
    torch.manual_seed(0)
    channels = (4, 8, 8) if dims == 2 else (4, 8)
    network = UNet(spatial_dims=dims, in_channels=1, out_channels=3, channels=channels, padding=padding, **options)
    return network.eval()


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mirror", [False, True, (0,)])
@pytest.mark.parametrize(
    "make",
    [
        lambda mirror: OverlapTileInferer(tile=12, mirror=mirror),
        lambda mirror: OverlapTileInferer(tile=12, mirror=mirror, border="mirror", batch=3),
        lambda mirror: OverlapTileInferer(mirror=mirror),
        lambda mirror: GaussianTileInferer(8, mirror=mirror),
        lambda mirror: GaussianTileInferer(8, 0.25, mirror=mirror, batch=4),
    ],
)
def test_identity_network_gives_the_input_back(dims, mirror, make):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn((2, 2, *(17, 23, 11)[:dims]), generator=generator)
    result = make(mirror)(image, Identity(dims))
    if mirror:  # probabilities are averaged
        result, image = result.softmax(1), image.softmax(1)
    assert torch.allclose(result, image, atol=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("mirror", [False, True])
def test_tiled_equals_whole(dims, padding, mirror):
    network = small_unet(dims, padding, norm="batch" if padding == "same" else None)
    size = (121, 90) if dims == 2 else (20, 17, 45)
    image = torch.randn((1, 1, *size), generator=torch.Generator().manual_seed(2))
    tile = [2 * c + (16 if dims == 2 else 8) for c in network.context]
    whole = OverlapTileInferer(mirror=mirror)(image, network)
    inferer = OverlapTileInferer(tile=tile, mirror=mirror, batch=3)
    assert len(inferer.plan(size, network).tiles) > 1
    scale = max(1.0, float(whole.abs().max()))
    assert float((inferer(image, network) - whole).abs().max()) <= 1e-5 * scale


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("make", [lambda: OverlapTileInferer(tile=20), lambda: GaussianTileInferer(16)])
def test_a_meta_tensor_keeps_what_monais_inferer_keeps(make, count):
    network, affine = small_unet(3, "same"), torch.diag(torch.tensor([-0.7, 0.7, 3.0, 1.0], dtype=torch.float64))
    affine[:3, 3] = torch.tensor([10.0, -20.0, 30.0])
    image = MetaTensor(torch.randn(1, 24, 20, 18), affine=affine, meta={"filename_or_obj": "a.nii.gz"})
    batch = collate_meta_tensor([Flip(0)(image) for _ in range(count)])  # as MONAI's loader hands it to an evaluator
    found = make()(batch, network)
    expected = SlidingWindowInferer((16, 16, 16))(batch, network)
    for one, other in zip(decollate_batch(found), decollate_batch(expected), strict=True):
        torch.testing.assert_close(one.affine, other.affine)
        assert one.applied_operations == other.applied_operations
        assert one.meta["filename_or_obj"] == "a.nii.gz"
    plain = make()(batch.as_tensor(), network)
    assert type(plain) is torch.Tensor
    torch.testing.assert_close(found.as_tensor(), plain)


EITHER = [
    lambda: OverlapTileInferer(),
    lambda: OverlapTileInferer(tile=56, mirror=True),
    lambda: GaussianTileInferer(16),
]


@pytest.mark.parametrize("make", EITHER)
def test_an_empty_batch_gives_an_empty_result(make):
    """As torch's modules do; it ended in an AssertionError."""
    network = small_unet(2, "same", norm="batch")
    empty = torch.zeros(0, 1, 60, 56)
    assert network(empty).shape == (0, 3, 60, 56)
    found = make()(empty, network)
    assert (found.shape, found.dtype) == ((0, 3, 60, 56), torch.float32)
    with pytest.raises(UsageError, match="input of this shape"):  # the network takes one channel
        make()(torch.zeros(0, 2, 60, 56), network)
    assert make()(MetaTensor(empty, affine=torch.diag(torch.tensor([2.0, 2.0, 1.0]))), network).affine[0, 0] == 2


@pytest.mark.parametrize("make", EITHER)
@pytest.mark.parametrize("count", [0, 1])
def test_images_without_a_voxel_are_refused(make, count):
    """Gaussian windows ended in an IndexError."""
    with pytest.raises(UsageError, match="at least one voxel") as caught:
        make()(torch.zeros(count, 1, 0, 36), small_unet(2, "same", norm="batch"))
    assert caught.value.field == "image_size"


def test_whole_is_the_networks_own_pass_when_padded():
    network = small_unet(2, "same", norm="batch")
    image = torch.randn((1, 1, 64, 48), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.allclose(OverlapTileInferer()(image, network), network(image), atol=1e-6)


def test_whole_is_the_mirrored_image_when_unpadded():
    network = small_unet(2, "valid")
    size = network.output_size(network.legal_size((100, 100)))
    image = torch.randn((1, 1, *size), generator=torch.Generator().manual_seed(3))
    around = network.context[0]
    padded = np.pad(image.numpy(), ((0, 0), (0, 0), (around, around), (around, around)), mode="reflect")
    with torch.no_grad():
        expected = network(torch.from_numpy(padded))
    assert torch.allclose(OverlapTileInferer()(image, network), expected, atol=1e-5)


def test_too_little_context_would_be_seen():
    network = small_unet(2, "same", norm="batch")
    image = torch.randn((1, 1, 96, 96), generator=torch.Generator().manual_seed(4))
    whole = OverlapTileInferer()(image, network)
    short = OverlapTileInferer(tile=40, context=4, divisor=4)(image, network)
    assert float((short - whole).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["numpy-like", "negative", "far"])
def test_mirrored_windows_equal_numpy_pad(name):
    image = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    start, size = {"numpy-like": ((-2, -3), (9, 12)), "negative": ((-20, -1), (6, 5)), "far": ((3, 30), (9, 4))}[name]
    wide = np.pad(image, ((0, 0), (40, 40), (40, 40)), mode="reflect")
    expected = wide[:, start[0] + 40 : start[0] + 40 + size[0], start[1] + 40 : start[1] + 40 + size[1]]
    assert np.array_equal(read_window(torch.from_numpy(image), start, size).numpy(), expected)


@pytest.mark.parametrize("size", [(37, 50), (48, 33), (64, 41)])
def test_gaussian_windows_pool_on_the_grid_of_one_pass(size):
    class Blocks(torch.nn.Module):
        """The maximum of each block of 4 x 4: nothing but the grid can differ."""

        divisor = (4, 4)

        def forward(self, images):
            pooled = torch.nn.functional.max_pool2d(images, 4)
            return torch.nn.functional.interpolate(pooled, scale_factor=4)

    image = torch.randn((1, 1, *size), generator=torch.Generator().manual_seed(6))
    rows, columns = (-n % 4 for n in size)
    padded = np.pad(image.numpy(), ((0, 0), (0, 0), (0, rows), (0, columns)), mode="reflect")
    expected = Blocks()(torch.from_numpy(padded))[:, :, : size[0], : size[1]]
    assert torch.allclose(GaussianTileInferer(16)(image, Blocks()), expected, atol=1e-5)


@pytest.mark.parametrize("inferer", [OverlapTileInferer(tile=24), GaussianTileInferer(16)])
def test_small_windows_are_convolved_by_onednn(monkeypatch, inferer):
    # torch's own choice for one window of 16 or 24 voxels a side is the slow kernel, for every convolution here
    network = small_unet(3, "same", norm="batch").to(memory_format=torch.channels_last_3d)
    image = torch.randn((1, 1, 40, 17, 20), generator=torch.Generator().manual_seed(5))
    calls = []
    fast = torch.mkldnn_convolution
    monkeypatch.setattr(torch, "mkldnn_convolution", lambda *args: calls.append(args[1].shape) or fast(*args))
    result = inferer(image, network)
    assert {tuple(m.weight.shape) for m in network.modules() if isinstance(m, torch.nn.Conv3d)} == set(
        map(tuple, calls)
    )
    monkeypatch.setattr("medseg.inference.passes.FastConvolutions", contextlib.nullcontext)
    calls.clear()
    assert torch.allclose(result, inferer(image, network), atol=1e-5 * float(result.abs().max()))
    assert not calls


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 1, 2), "stride": (1, 2, 1), "padding": (2, 0, 1)},
        {"kernel_size": 3, "dilation": 2, "groups": 2, "bias": False},
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
        {"kernel_size": 1},
    ],
)
def test_fast_convolutions_equal_those_of_float64(options, layout):
    torch.manual_seed(0)
    convolution = torch.nn.Conv3d(4, 6, **options)
    image = torch.randn(2, 4, 9, 10, 11).contiguous(memory_format=layout)
    double = copy.deepcopy(convolution).double()
    with torch.inference_mode(), FastConvolutions():
        result, exact = convolution(image), double(image.double())
    assert result.dtype == torch.float32
    assert exact.dtype == torch.float64
    assert torch.allclose(result.double(), exact, atol=1e-5)
    with FastConvolutions():  # gradients are torch's own affair
        convolution(image).sum().backward()
    assert convolution.weight.grad is not None


def test_mirror_of_one_voxel():
    assert mirror_index(-2, 4, 1).tolist() == [0, 0, 0, 0]


def test_gaussian_equals_its_slow_definition():
    network = small_unet(2, "same", norm="instance")
    image = torch.randn((1, 1, 40, 52), generator=torch.Generator().manual_seed(5))
    inferer = GaussianTileInferer(24, 0.5)
    plan = inferer.plan((40, 52), network)
    total, norm = np.zeros((3, 40, 52)), np.zeros((40, 52))
    position = np.arange(24) - 11.5
    weight = np.exp(-(position**2) / (2 * 3.0**2))
    weight = weight[:, None] * weight
    for i in plan.starts[0]:
        for j in plan.starts[1]:
            with torch.no_grad():
                out = network(image[..., i : i + 24, j : j + 24])[0].double().numpy()
            total[:, i : i + 24, j : j + 24] += out * weight
            norm[i : i + 24, j : j + 24] += weight
    assert np.allclose(inferer(image, network)[0].numpy(), total / norm, atol=1e-4)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_gaussian_equals_monai_given_the_same_weights(classes, layout):
    # the whole difference from MONAI's own Gaussian map is its floor under the product, which brings the result
    # further from one pass over the whole image: window borders count fully along the image's faces and edges
    torch.manual_seed(0)
    network = UNet(
        spatial_dims=3, in_channels=1, out_channels=classes, channels=(4, 8), padding="same", norm="batch"
    ).eval()
    image = torch.randn((1, 1, 36, 36, 48), generator=torch.Generator().manual_seed(0))  # both place windows alike here
    position = torch.arange(24.0) - 11.5
    line = torch.exp(-(position**2) / (2 * 3.0**2))
    weights = line[:, None, None] * line[:, None] * line

    class Laid(torch.nn.Module):
        def forward(self, windows):
            return network(windows).contiguous(memory_format=layout)

    with torch.no_grad():
        same = sliding_window_inference(image, (24,) * 3, 1, network, 0.5, mode="constant", roi_weight_map=weights)
        floored = sliding_window_inference(image, (24,) * 3, 1, network, 0.5, mode="gaussian")
        whole = network(image)
    result = GaussianTileInferer(24)(image, Laid())
    assert torch.allclose(result, same, atol=1e-5 * float(whole.abs().max()))
    assert float((result - whole).abs().max()) < float((floored - whole).abs().max()) / 3
    # slab by slab along another axis: the same numbers, each valid while its block is
    for axis in range(3):
        pieces = torch.full_like(same[0], float("nan"))
        for block in GaussianTileInferer(24).blocks(image[0], [Laid()], axis=axis):
            pieces[(slice(None), *(slice(a, b) for a, b in zip(block.start, block.stop, strict=True)))] = block.values
        assert torch.allclose(pieces, result[0], atol=1e-5 * float(whole.abs().max()))


def test_mirror_passes_and_ensembles_are_means_of_probabilities():
    one, two = small_unet(2, "same", norm="batch"), small_unet(2, "same", norm="batch")
    with torch.no_grad():
        for value in two.parameters():
            value.add_(0.05)
    image = torch.randn((1, 32, 24), generator=torch.Generator().manual_seed(6))
    blocks = list(OverlapTileInferer(mirror=True).blocks(image, [one, two]))
    expected = torch.zeros(1, 3, 32, 24)
    with torch.no_grad():
        for network in (one, two):
            for axes in ((), (2,), (3,), (2, 3)):
                expected += network(image[None].flip(axes)).softmax(1).flip(axes) / 8
    assert torch.allclose(blocks[0].values.softmax(0), expected[0], atol=1e-5)


def test_one_class_averages_sigmoids():
    def bias(images):
        return images * 0 + 2.0

    image = torch.zeros(1, 1, 8, 8)
    result = OverlapTileInferer(mirror=True)(image, bias)
    assert torch.allclose(result, torch.full_like(image, 2.0), atol=1e-5)


def test_constant_windows_are_computed_once_and_change_nothing():
    network = Identity(2)
    image = torch.zeros(1, 1, 96, 96)
    image[..., 40:50, 40:50] = 1.0
    assert torch.equal(OverlapTileInferer(tile=18)(image, network), image)
    tiles = len(OverlapTileInferer(tile=18).plan((96, 96), network).tiles)
    assert sum(size[0] for size in network.sizes) < tiles / 2
    assert constant_value(torch.ones(2, 3, 3)) == (1.0, 1.0)
    assert constant_value(torch.arange(9.0).view(1, 3, 3)) is None


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_several_constants_are_not_mixed_up(batch):
    image = torch.zeros(1, 1, 120, 60)
    for first in range(0, 120, 24):  # broad stripes of two values: windows of either value in one batch
        image[..., first : first + 12, :30] = 1.0
    image[..., 30:] = 2.0
    for inferer in (OverlapTileInferer(tile=10, batch=batch), GaussianTileInferer(4, batch=batch)):
        assert torch.allclose(inferer(image, Identity(2)), image, atol=1e-6)


def test_masked_tiles_are_skipped_and_labelled_ones_never():
    network = Identity(2)
    image = torch.randn((1, 64, 64), generator=torch.Generator().manual_seed(7))
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[30, 30] = True
    for inferer in (OverlapTileInferer(tile=18), GaussianTileInferer(16)):
        seen = torch.zeros(64, 64)
        for block in inferer.blocks(image, [network], mask=mask):
            if block.values is not None:
                box = tuple(slice(a, b) for a, b in zip(block.start, block.stop, strict=True))
                seen[box] = torch.isclose(block.values[0], image[(0, *box)], atol=1e-5).float()
        assert seen[30, 30] == 1


class Greedy(torch.nn.Module):
    """An identity that runs out of memory on windows above a size, as a small machine would."""

    spatial_dims, context, divisor, exact_under_tiling = 2, (2, 2), (2, 2), True

    def __init__(self, limit, error):
        super().__init__()
        self.limit, self.error, self.calls = limit, error, []

    def forward(self, images):
        if images.device.type != "meta":
            self.calls.append(images.shape)
            if images.numel() > self.limit:
                raise self.error
        return images * 1.0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_gives_a_smaller_plan(error):
    image = torch.randn((1, 1, 200, 150), generator=torch.Generator().manual_seed(8))
    network = Greedy(3000, error)
    assert torch.equal(OverlapTileInferer()(image, network), image)


def test_out_of_memory_keeps_finished_slabs():
    network = Greedy(10**9, MemoryError())
    image = torch.randn((1, 60, 200), generator=torch.Generator().manual_seed(9))
    result = torch.full((60, 200), float("nan"))
    inferer = OverlapTileInferer(max_ram=60 * 40 * 12)
    written = []
    for number, block in enumerate(inferer.blocks(image, [network])):
        box = tuple(slice(a, b) for a, b in zip(block.start, block.stop, strict=True))
        assert bool(torch.isnan(result[box]).all())  # nothing comes twice
        result[box] = block.values[0]
        written.append(block.complete)
        if number == 3:
            network.limit = 500  # memory became short half-way
    assert torch.equal(result, image[0])
    large = [size for size in network.calls if size.numel() > 500]
    assert len(large) <= 6  # the first four, and the one that failed (twice at most)


@pytest.mark.parametrize("make", [OverlapTileInferer, lambda **given: GaussianTileInferer(96, **given)])
def test_windows_that_go_to_a_gpu_together_fit_into_its_limit(make, monkeypatch):
    monkeypatch.setattr("medseg.inference.streams.available_memory", lambda _: 80 * 2**30)
    network = UNet(3, 1, 2, channels=[16, 32], padding="same", norm="batch").eval()
    window = (96, 96, 96)
    one = peak_activation_bytes(network, (1, 1, *window))  # of the meta device: as for any device
    found = {}
    for limit in (one // 2, 4 * one, 100 * one):
        inferer = make(max_vram=limit)
        passes = Passes([network], 3, mirror=inferer.mirror, device="cuda")
        found[limit] = count = inferer.at_once(passes, network, 1, window)
        assert count == 1 or peak_activation_bytes(network, (count, 1, *window)) <= limit
    assert found[one // 2] == 1
    assert 1 < found[4 * one] <= 4
    assert found[100 * one] == 8
    assert make(batch=5).at_once(passes, network, 1, window) == 5
    assert make().at_once(Passes([network], 3, device="cpu"), network, 1, window) == 1


def test_memory_that_torch_keeps_for_the_next_step_counts_as_free(monkeypatch):
    # of 80 GB a training step took 70, of which the weights are 2: validation can have 78
    for name, value in (("mem_get_info", (10, 80)), ("memory_reserved", 70), ("memory_allocated", 2)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert available_memory("cuda") == 78
    assert OverlapTileInferer().budget("cuda") == 39
    assert OverlapTileInferer(max_vram=20).budget("cuda") == 20


def test_the_cost_counts_all_windows_of_a_call():
    network, image = UNet(3, 1, 2, channels=[16, 32], padding="same", norm="batch").eval(), torch.zeros(1, 128, 96, 64)
    one, four = (
        estimate("x", image, [network], OverlapTileInferer(tile=(32, 32, 32), batch=batch), time_it=False)
        for batch in (1, 4)
    )
    assert one.window == four.window
    peaks = [peak_activation_bytes(network, (batch, 1, *one.window)) for batch in (1, 4)]
    assert four.peak_ram - one.peak_ram >= peaks[1] - peaks[0]


def test_the_memory_that_the_timed_tile_leaves_behind_is_not_counted_beside_what_tiles_take(monkeypatch):
    image, network, ran = torch.zeros(1, 40, 40, 40), small_unet(3, "same"), []
    network.register_forward_hook(lambda _, windows, __: None if windows[0].is_meta else ran.append(1))
    monkeypatch.setattr("medseg.inference.cost.resident_bytes", lambda: 2**30 if ran else 2**20)
    untimed, timed = (estimate("a", image, [network], OverlapTileInferer(), time_it=it) for it in (False, True))
    assert ran
    assert timed.peak_ram == untimed.peak_ram < 2**30


def test_the_cost_on_a_gpu_is_not_that_of_its_first_pass(monkeypatch):
    # whose kernels are loaded for half a second; 64 windows would come to 32 s
    calls = []

    def passes(window):
        calls.append(time.sleep(0.0 if calls else 0.5))
        return torch.zeros(1, 2, 8, 8, 8)

    passes.device, passes.flips, passes.count = torch.device("cuda"), ((),), 1
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr("medseg.inference.streams.available_memory", lambda device: 2**30)
    inferer = OverlapTileInferer(tile=8, context=0, divisor=1)
    monkeypatch.setattr(inferer, "passes", lambda *_: passes)
    cost = estimate("x", torch.zeros(1, 32, 32, 32), [torch.nn.Conv3d(1, 2, 1)], inferer, device="cuda")
    assert cost.tiles == 64
    assert cost.seconds < 8


def test_out_of_memory_for_good_is_told():
    image = torch.zeros(1, 1, 64, 64) + torch.arange(64.0)
    with pytest.raises(ResourceError, match="out of memory"):
        OverlapTileInferer()(image, Greedy(10, MemoryError()))
    with pytest.raises(ResourceError, match="out of memory"):
        GaussianTileInferer(16)(image, Greedy(10, MemoryError()))


def test_other_errors_are_not_hidden():
    def broken(images):
        raise RuntimeError("shape mismatch")  # on the meta device too

    with pytest.raises(RuntimeError, match="shape mismatch"):
        OverlapTileInferer(context=1)(torch.zeros(1, 1, 8, 8), broken)


def test_half_precision_accumulators_are_near():
    image = torch.randn((1, 1, 40, 40), generator=torch.Generator().manual_seed(10))
    network = Identity(2)
    result = GaussianTileInferer(16, accumulate="float16")(image, network)
    assert torch.allclose(result, image, atol=5e-3)


def test_network_without_context_is_taken_whole_or_refused():
    image = torch.randn((1, 1, 20, 20), generator=torch.Generator().manual_seed(11))
    assert torch.equal(OverlapTileInferer()(image, torch.nn.Identity()), image)
    with pytest.raises(UsageError, match="does not state its context"):
        OverlapTileInferer(tile=10)(image, torch.nn.Identity())


def test_wrong_dimensions_and_options_are_refused():
    network = small_unet(3, "same", norm="batch")
    with pytest.raises(UsageError, match="dimensions"):
        OverlapTileInferer()(torch.zeros(1, 1, 16, 16), network)
    with pytest.raises(UsageError, match="precision"):
        OverlapTileInferer(precision="fp8")(torch.zeros(1, 1, 16, 16), torch.nn.Identity())
    with pytest.raises(UsageError, match="batch"):
        OverlapTileInferer(batch=0)
    with pytest.raises(UsageError, match="mirror"):
        mirror_axes((3,), 2)
    with pytest.raises(UsageError, match="memory"):
        parse_bytes("three")


def test_activation_bytes_are_those_of_the_largest_moment():
    # the second convolution: input of 8 channels, output of 1, image of 1, workspace of 16, output of a batch before
    chain = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.ReLU(True), torch.nn.Conv2d(8, 1, 1))
    assert peak_activation_bytes(chain, (1, 1, 32, 32)) == 32 * 32 * 4 * (8 + 1 + 1 + 16 + 1)
    small, large = (bytes_per_voxel(small_unet(3, "same", norm="batch"), 1, (n,) * 3) for n in (32, 96))
    assert small == pytest.approx(large, rel=0.05)


def test_fp32_is_not_rounded_to_tf32_and_the_settings_come_back(monkeypatch):
    """On a GPU cuDNN rounds convolutions' inputs to 11 bits unless told otherwise; the setting exists on a CPU too."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    seen = []

    def network(windows):
        if not windows.is_meta:  # whose bytes are counted, nothing else
            seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))
        return windows

    try:
        OverlapTileInferer(tile=8, context=0, divisor=1)(torch.zeros(1, 1, 16, 16), network)
        after = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {(False, "highest")}
    assert after == (True, "high")


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_gpu_tiled_equals_whole_and_the_cpu(dims, padding):
    network = small_unet(dims, padding, norm="batch" if padding == "same" else None)
    image = torch.randn((1, 1, *((121, 90) if dims == 2 else (20, 17, 45))), generator=torch.Generator().manual_seed(2))
    tile = [2 * c + (16 if dims == 2 else 8) for c in network.context]
    expected = OverlapTileInferer(mirror=True)(image, network)
    network, image = network.cuda(), image.cuda()
    whole = OverlapTileInferer(mirror=True)(image, network)
    tiled = OverlapTileInferer(tile=tile, mirror=True, batch=3)(image, network)
    scale = max(1.0, float(expected.abs().max()))
    assert float((tiled - whole).abs().max()) <= 1e-5 * scale
    assert float((tiled.cpu() - expected).abs().max()) <= 1e-4 * scale
    windows = GaussianTileInferer(roi_size=[n // 2 for n in image.shape[2:]])(image, torch.nn.Identity())
    torch.testing.assert_close(windows, image, rtol=1e-5, atol=1e-5)
