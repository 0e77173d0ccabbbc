"""A second device made of CPU tensors, for machines without a GPU: what mixes devices fails on it as on a GPU.

PyTorch lets Python code be a backend (`torch.utils.backend_registration`). Tensors of the one that is registered here
hold a CPU tensor and compute with it, but an operation that is given tensors of both devices is refused, and so is
numpy. Matrix products are rounded to TF32 where torch is told so. What it cannot show: speed, CUDA's own kernels and
number types.

    python tests/second_device.py        # runs all checks below, prints {"check": null or "what went wrong"} as JSON

Registering a backend cannot be taken back and changes what `torch.accelerator` says, so this runs in its own process.
"""

from __future__ import annotations

import copy
import json
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.utils.backend_registration as registration
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "second:0"
COPIES = ("aten::copy_", "aten::_to_copy", "aten::to")
PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class Second(torch.Tensor):
    """A tensor of the second device, around the CPU tensor `raw`."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Second:
        where = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "device": torch.device(DEVICE)}
        tensor = torch.Tensor._make_wrapper_subclass(cls, raw.size(), dtype=raw.dtype, **where)
        tensor.raw = raw
        return tensor

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert second:0 device type tensor to numpy")

    def tolist(self) -> Any:
        return self.raw.tolist()

    __array__ = numpy
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Everywhere(TorchDispatchMode):
    """For operations that take no tensor of the second device and may make one: `torch.zeros(3, device="second:0")`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Call `func` on the CPU tensors inside; refuse tensors of two devices, as CUDA does (single numbers may mix)."""
    leaves, form = tree.tree_flatten((args, kwargs))
    name = func._schema.name
    here = {id(leaf.raw): leaf for leaf in leaves if isinstance(leaf, Second)}
    # indices of the CPU are taken, indices for a tensor of the CPU are not
    free = name in COPIES or (name in INDEXED and isinstance(args[0], Second))
    for leaf in leaves if here and not free else ():
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Second) and leaf.ndim > 0:
            raise RuntimeError(f"tensors of two devices: {name} was given {tuple(leaf.shape)} on the CPU")
    asked = kwargs.get("device")
    there = bool(here) if asked is None else torch.device(asked).type == "second"
    if name == "aten::copy_":
        there = isinstance(args[0], Second)
    if name == "aten::is_pinned":
        return False
    plain = [leaf.raw if isinstance(leaf, Second) else _on_cpu(leaf) for leaf in leaves]
    if here and name in PRODUCTS and torch.get_float32_matmul_precision() != "highest":
        plain = [_rounded(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in plain]
    args, kwargs = tree.tree_unflatten(plain, form)
    found = func(*args, **kwargs)

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, Second):
            return value
        if asked is not None and not there:
            return value.clone() if id(value) in here else value
        if id(value) in here:  # in place
            return here[id(value)]
        # what comes from another device is a copy
        return Second(value.clone() if name == "aten::_to_copy" and not here else value) if there else value

    return tree.tree_map(wrap, found)


def _rounded(values: torch.Tensor) -> torch.Tensor:
    """As a GPU reads them for a product in TF32: 11 of 24 bits."""
    if values.dtype != torch.float32:
        return values
    return (((values.contiguous().view(torch.int32) + 0x1000) >> 13) << 13).view(torch.float32)


def _on_cpu(leaf: Any) -> Any:
    return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == "second" else leaf


def register() -> torch.library.Library:
    """Make `torch.device("second")` known; keep what comes back as long as it is used."""
    registration._setup_privateuseone_for_python_backend("second")
    library = torch.library.Library("aten", "IMPL")

    def empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> Second:
        return Second(torch.empty_strided(size, stride, dtype=dtype))

    def empty(size: Any, dtype: Any = None, **_: Any) -> Second:
        return Second(torch.empty(size, dtype=dtype))

    def copy_from(source: torch.Tensor, target: torch.Tensor, _: bool = False) -> torch.Tensor:
        first, second = (value.raw if isinstance(value, Second) else value for value in (source, target))
        second.copy_(first)
        return target

    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    return library


def check_that_mixing_fails() -> None:
    """The device itself: a tensor of the CPU is refused, a single number is not, and numpy is."""
    values = torch.arange(4.0).to(DEVICE)
    assert values.device.type == "second"
    assert (values * torch.tensor(2.0))[3].item() == 6
    for wrong in (lambda: values + torch.ones(4), lambda: torch.cat([values, torch.ones(1)]), lambda: values.numpy()):
        try:
            wrong()
        except (RuntimeError, TypeError):
            continue
        raise AssertionError("two devices were mixed")


def check_augmentations() -> None:
    """The transforms of all pipelines give on the device what they give on the CPU."""
    from medseg.augmentation import Augmentation, finish_targets
    from medseg.config import load_pipeline

    seen = set()
    for name in sorted(path.stem for path in Path("pipelines").glob("*.yaml")):
        pipeline = load_pipeline(name)
        dims = len(pipeline.train.patch)
        generator = torch.Generator().manual_seed(0)
        batch = {
            "image": torch.rand(2, 5 - dims, *[24] * dims, generator=generator),
            "label": torch.randint(0, 3, (2, 1, *[24] * dims), dtype=torch.uint8, generator=generator),
            "weight": torch.rand(2, 1, *[24] * dims, generator=generator),
        }
        for component in pipeline.augment:
            if (key := (component.name, dims, str(component.arguments))) in seen:
                continue
            seen.add(key)
            augmentation = Augmentation([component])
            around = augmentation.context([16] * dims, [4] * dims)
            # of the 24 voxels 16 and the context around them, for what takes one
            box = (slice(4 - c, 20 + c) for c in around) if around else (slice(None),) * dims
            cut = (slice(None), slice(None), *box)
            given = {key: values[cut] for key, values in batch.items()}
            options = ([1, 2], [[1.0] * dims] * 2, around)
            expected = finish_targets(augmentation(given, *options), 2)
            moved = {key: values.to(DEVICE) for key, values in given.items()}
            found = finish_targets(augmentation(moved, *options), 2)
            for key, values in found.items():
                assert values.device.type == "second", f"{name}, {component.name}: {key} is on the CPU"
                torch.testing.assert_close(values.cpu(), expected[key], rtol=1e-4, atol=1e-4)


def check_training_steps() -> None:
    """Every network and loss: equal losses and weights after two steps, clipped, averaged."""
    from medseg.batches import Batch
    from medseg.engine import TrainStep
    from medseg.hardware import Hardware
    from medseg.losses import DistanceWeightedCELoss, DistanceWeightedDiceCELoss
    from medseg.networks import FCN, AttentionUNet, ResUNet, UNet

    small: dict[str, Any] = {"in_channels": 3, "out_channels": 3}
    makes = [
        lambda: UNet(2, channels=(4, 8), padding="same", norm="batch", **small),
        lambda: UNet(3, channels=(4, 8), padding="same", norm="instance", dropout=0.0, **small),
        lambda: UNet(2, channels=(4, 8), dropout=0.0, **small),
        lambda: AttentionUNet(2, channels=(4, 8, 8), **small),
        lambda: AttentionUNet(3, channels=(4, 8, 8), gate="additive_full", **small),
        lambda: ResUNet(2, **small),
        lambda: FCN(2, **small),
    ]
    losses = [
        DistanceWeightedCELoss(class_weights=[1.0, 2.0, 3.0]), DistanceWeightedDiceCELoss(),
        DistanceWeightedDiceCELoss(per_image=True),
    ]  # fmt: skip
    for number, make in enumerate(makes):
        torch.manual_seed(0)
        network = make()
        criterion = losses[number % len(losses)]
        size = [32] * network.spatial_dims
        images, labels = torch.rand(2, 3, *size), torch.randint(0, 3, (2, 1, *size))
        weights = torch.rand(2, 1, *size)
        found = []
        for device in ("cpu", DEVICE):
            hardware = Hardware(torch.device(device), "fp32", 1, device)
            own = copy.deepcopy(network).to(device)
            step = TrainStep(
                own,
                copy.deepcopy(criterion).to(device),
                torch.optim.SGD(own.parameters(), 0.01),
                hardware,
                clip=1.0,
                ema=0.9,
            )
            tensors = {"image": images, "label": labels, "weight": weights}
            tensors = {key: values.to(device) for key, values in tensors.items()}
            batch = Batch((0, 0), ("a", "b"), (1, 2), tensors)
            values = [step(batch, seed=turn) for turn in range(2)]
            assert step.bad_steps() == 0
            found.append([float(value) for value in values] + [float(p.detach().sum()) for p in own.parameters()])
        torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


def check_inference() -> None:
    """Tiles, windows, mirror passes and ensembles: on the device what they are on the CPU."""
    from medseg.inference import GaussianTileInferer, OverlapTileInferer
    from medseg.networks import UNet

    for dims in (2, 3):
        network = UNet(dims, 1, 3, channels=(4, 8), padding="same", norm="batch").eval()
        image = torch.rand(1, 1, *[(50, 41), (25, 30, 20)][dims - 2])
        moved = copy.deepcopy(network).to(DEVICE)
        for inferer in (
            OverlapTileInferer(tile=32, mirror=True),
            GaussianTileInferer(roi_size=16, mirror=[0]),
            GaussianTileInferer(roi_size=16),
        ):
            found = inferer(image.to(DEVICE), moved)
            assert found.device.type == "second"
            torch.testing.assert_close(found.cpu(), inferer(image, network), rtol=1e-4, atol=1e-4)


def main() -> None:
    """Run the checks."""
    results = {}
    library = register()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # as training does
    with Everywhere():
        for name, check in list(globals().items()):
            if name.startswith("check_"):
                try:
                    check()
                    results[name] = None
                except Exception:
                    results[name] = traceback.format_exc(limit=-4)
    del library
    print(json.dumps(results))


if __name__ == "__main__":
    main()
