"""Training step and inference time, memory and parameters of medseg's networks against their peers.

Question: at equal channels, on the same input, in the same precision, does a training step or an inference of ours take
longer than that of MONAI's BasicUNet, UNet and AttentionUnet and of segmentation_models_pytorch's Unet? See RESULTS.md.

    python benchmarks/networks.py [--device cpu|cuda] [--threads 1] [--rounds 3] [--only WORD]

Ours and the peer take turns in one process, each in both memory layouts; the shortest time of either side counts. With
one thread on the CPU it is that thread's processor time, which other programs on the machine disturb little; otherwise
it is wall time. Printed is the ratio peer / ours. Peers that are not installed are named and left out. GFLOP says where
equal channels are not equal work: MONAI's UNet has no level at full resolution, its AttentionUnet one convolution a
decoder level where the published network has two.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from medseg.networks import AttentionUNet, ResUNet, UNet


@dataclass
class Match:
    """Two networks with equal channels, and the input on which they meet."""

    name: str
    ours: Callable[[], nn.Module]
    peer: Callable[[], nn.Module]
    shape: tuple[int, ...]


def matches() -> Iterator[Match]:
    from monai.networks import nets

    small, wide = (32, 64, 128, 256), (32, 64, 128, 256, 512)
    relu = ("relu", {"inplace": True})

    def basic(dims: int, norm: str) -> nn.Module:
        return nets.BasicUNet(dims, 1, 2, (*wide, 32), act=relu, norm=(norm, {"affine": True}), upsample="deconv")

    def unet(dims: int, **options) -> UNet:
        return UNet(dims, 1, 2, **{"channels": wide, "padding": "same", "norm": "batch", "dropout": 0.0, **options})

    yield Match("BasicUNet 2-D, batch norm", lambda: unet(2), lambda: basic(2, "batch"), (1, 1, 192, 192))
    yield Match(
        "BasicUNet 2-D, instance norm", lambda: unet(2, norm="instance"), lambda: basic(2, "instance"), (1, 1, 192, 192)
    )
    yield Match("BasicUNet 3-D, batch norm", lambda: unet(3), lambda: basic(3, "batch"), (1, 1, 48, 48, 48))
    # MONAI's UNet has one convolution a level, or residual units of two, none of them at full resolution
    one = {"channels": small, "convs_per_level": 1, "down": "conv"}
    two = {"channels": small, "down": "conv"}
    for dims, shape in ((2, (1, 1, 192, 192)), (3, (1, 1, 48, 48, 48))):
        for units, options in ((0, one), (2, two)):
            yield Match(
                f"UNet {dims}-D, {units} residual units",
                lambda dims=dims, options=options: unet(dims, **options),
                lambda dims=dims, units=units: nets.UNet(
                    dims, 1, 2, small, (2, 2, 2), num_res_units=units, act=relu, norm="batch"
                ),
                shape,
            )
    for dims, shape in ((2, (1, 1, 128, 128)), (3, (1, 1, 32, 32, 32))):
        yield Match(
            f"AttentionUnet {dims}-D",
            lambda dims=dims: AttentionUNet(dims, 1, 2, wide, gate="additive_full", up="transpose"),
            lambda dims=dims: nets.AttentionUnet(dims, 1, 2, wide, (2, 2, 2, 2)),
            shape,
        )
        yield Match(
            f"AttentionUnet {dims}-D, grid gates",
            lambda dims=dims: AttentionUNet(dims, 1, 2, wide),
            lambda dims=dims: nets.AttentionUnet(dims, 1, 2, wide, (2, 2, 2, 2)),
            shape,
        )
    try:
        # timm asks torchvision for a class that stands beside operators; builds without their C++ part lack these
        for operator in ("nms", "qnms"):
            with contextlib.suppress(RuntimeError):
                torch.library.define(f"torchvision::{operator}", "(Tensor boxes, Tensor scores, float t) -> Tensor")
        import segmentation_models_pytorch as smp
    except (ImportError, RuntimeError) as error:
        print(f"left out: segmentation_models_pytorch ({error})")
        return
    yield Match(
        "smp Unet, resnet34",
        lambda: ResUNet(2, 3, 2),
        lambda: smp.Unet("resnet34", encoder_weights=None, in_channels=3, classes=2),
        (1, 3, 192, 192),
    )
    yield Match(
        "smp Linknet, resnet34",
        lambda: ResUNet(2, 3, 2),
        lambda: smp.Linknet("resnet34", encoder_weights=None, in_channels=3, classes=2),
        (1, 3, 192, 192),
    )


class Runner:
    """One network on one device in one layout, with its optimiser."""

    def __init__(self, network: nn.Module, images: torch.Tensor, last: bool) -> None:
        layout = torch.contiguous_format
        if last:
            layout = torch.channels_last if images.ndim == 4 else torch.channels_last_3d
        self.network = network.to(images.device, memory_format=layout)
        self.images = images.contiguous(memory_format=layout)
        self.target = torch.randint(0, 2, (images.shape[0], *images.shape[2:]), device=images.device)
        self.optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)

    def step(self) -> None:
        loss = F.cross_entropy(self.network(self.images), self.target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def infer(self) -> None:
        with torch.inference_mode():
            self.network(self.images)


def measure(runners: list[Runner], what: str, rounds: int) -> list[float]:
    """Shortest seconds of each runner, taking turns."""
    for runner in runners:
        runner.network.train(what == "step")
        getattr(runner, what)()
    times: list[list[float]] = [[] for _ in runners]
    cuda = runners[0].images.is_cuda
    # backward runs in the calling thread on the CPU, so that its clock sees the whole step
    clock = time.thread_time if torch.get_num_threads() == 1 and not cuda else time.perf_counter
    for _ in range(rounds):
        for runner, found in zip(runners, times, strict=True):
            start = clock()
            getattr(runner, what)()
            if cuda:
                torch.cuda.synchronize()
            found.append(clock() - start)
    return [min(found) for found in times]


def kept_mib(runner: Runner) -> float:
    """MiB that autograd keeps from the forward pass of a training step, weights not counted."""
    storages: dict[int, torch.UntypedStorage] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in runner.network.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    runner.network.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        runner.network(runner.images)
    return sum(storage.nbytes() for storage in storages.values()) / 2**20


def giga_flops(runner: Runner) -> float:
    counter = FlopCounterMode(display=False)
    runner.network.eval()
    with counter, torch.no_grad():
        runner.network(runner.images)
    return counter.get_total_flops() / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="part of a match's name")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} thread(s)")
    print("| peer | input | step ours / peer (ms) | step ratio | inference ours / peer (ms) | inference ratio |"
          " kept ours / peer (MiB) | GFLOP ours / peer | parameters ours / peer (M) |")  # fmt: skip
    print("|" + " --- |" * 9)
    for match in matches():
        if options.only not in match.name:
            continue
        torch.manual_seed(0)
        images = torch.randn(match.shape, device=options.device)
        runners = [Runner(make(), images, last) for make in (match.ours, match.peer) for last in (True, False)]
        times = {}
        for what in ("step", "infer"):
            found = measure(runners, what, options.rounds)
            times[what] = (min(found[:2]), min(found[2:]))
        pair = [runners[0], runners[3]]
        kept = [kept_mib(runner) for runner in pair]
        flops = [giga_flops(runner) for runner in pair]
        sizes = [sum(p.numel() for p in runner.network.parameters()) / 1e6 for runner in pair]
        cells = [match.name, "×".join(map(str, match.shape))]
        for ours, theirs in times.values():
            cells += [f"{1e3 * ours:.0f} / {1e3 * theirs:.0f}", f"{theirs / ours:.2f}"]
        cells += [f"{a:.{digits}f} / {b:.{digits}f}" for (a, b), digits in ((kept, 0), (flops, 1), (sizes, 2))]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
