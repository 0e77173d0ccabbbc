"""Training steps per second: PyTorch's defaults, MONAI's trainer, and medseg with each lever alone and together.

    python benchmarks/training_step.py [--dims 2 3] [--device cpu] [--rounds 5] [--quick]

Same network, batch, loss and optimizer everywhere; a constant batch, so that only the step counts. The ways take turns
in one process (what the machine does besides hits all alike); medians of steps per second. The memory lever (mallopt)
acts on the whole process, so it is switched for each turn. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from medseg.batches import Batch
from medseg.engine import TrainStep
from medseg.hardware import Hardware, fast_layout, keep_memory, memory_format, real_cores, supports_bf16
from medseg.losses import DistanceWeightedDiceCELoss
from medseg.networks import UNet

SIZES = {2: ((4, 1, 256, 256), (32, 64, 128, 256)), 3: ((2, 1, 64, 64, 64), (16, 32, 64, 128))}
SMALL = {2: ((2, 1, 192, 192), (32, 64, 128)), 3: ((1, 1, 64, 64, 64), (16, 32, 64))}
PLAIN = "PyTorch's defaults"
QUICK = {2: ((2, 1, 64, 64), (8, 16)), 3: ((1, 1, 16, 16, 16), (8, 16))}


NORM = ["batch"]


def make(dims: int, channels: tuple[int, ...], device: torch.device) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    network = UNet(dims, 1, 3, channels=channels, padding="same", norm=NORM[0], dropout=0.0).to(device)
    return network.train(), DistanceWeightedDiceCELoss()


def plain_way(dims: int, images: torch.Tensor, label: torch.Tensor, channels: tuple[int, ...]) -> Callable[[], None]:
    """What a tutorial does: fp32, contiguous, AdamW."""
    network, loss = make(dims, channels, images.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        loss(network(images), label).backward()
        optimizer.step()

    return step


def our_way(
    dims: int,
    images: torch.Tensor,
    label: torch.Tensor,
    channels: tuple[int, ...],
    *,
    precision: str,
    last: bool | None,
    fused: bool,
    compiled: bool = False,
) -> Callable[[], None]:
    network, loss = make(dims, channels, images.device)
    hardware = Hardware(images.device, precision, real_cores(), "")
    layout = fast_layout(network, hardware) if last is None else torch.contiguous_format
    layout = memory_format(dims) if last else layout
    network = network.to(memory_format=layout)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=fused)
    train = TrainStep(network, loss, optimizer, hardware, forward=torch.compile(network) if compiled else None)
    train._layout = layout
    batch = Batch((0, 0), ("a",) * len(images), (0,) * len(images), {"image": images, "label": label})
    return lambda: train(batch, seed=0) and None


def monai_way(dims: int, images: torch.Tensor, label: torch.Tensor, channels: tuple[int, ...]) -> Callable[[], None]:
    """MONAI's SupervisedTrainer, one iteration at a time, as its documentation shows it."""
    from monai.engines import SupervisedTrainer

    network, loss = make(dims, channels, images.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    data = [{"image": images, "label": label}] * 10**6
    trainer = SupervisedTrainer(
        device=images.device, max_epochs=1, train_data_loader=data, network=network, optimizer=optimizer,
        loss_function=lambda output, target: loss(output, target), epoch_length=10**6,
    )  # fmt: skip
    trainer.logger.disabled = True
    trainer.state.dataloader = data
    return lambda: trainer._iteration(trainer, data[0]) and None


@contextlib.contextmanager
def memory(keep: bool) -> Iterator[None]:
    done = keep and keep_memory()
    try:
        yield
    finally:
        if done:
            keep_memory(False)


def measure(step: Callable[[], None], seconds: float, device: torch.device, clock: Callable[[], float]) -> float:
    step()
    count, begin = 0, clock()
    while count < 1 or clock() - begin < seconds:
        step()
        count += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count / (clock() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one turn of one way")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only to see that it runs")
    parser.add_argument("--small", action="store_true", help="a quarter of the work, for a busy machine")
    parser.add_argument(
        "--processor-time", action="store_true", help="one thread, its processor time: for a busy machine"
    )
    parser.add_argument("--size", type=int, nargs="+", help="of the batch, B C and the patch, instead of those above")
    parser.add_argument("--channels", type=int, nargs="+", help="of the network, with --size")
    parser.add_argument("--ends", action="store_true", help="only PyTorch's defaults and all levers together")
    parser.add_argument("--norm", default="batch", choices=["batch", "instance"])
    options = parser.parse_args()
    if options.size:
        options.dims = [len(options.size) - 2]
    NORM[:] = [options.norm]
    device = torch.device(options.device)
    torch.set_num_threads(1 if options.processor_time else real_cores())
    clock = time.process_time if options.processor_time else time.perf_counter
    half = "bf16" if supports_bf16(device) else "fp32"
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {device}, number type of auto: {half}\n")
    print("| network | way | steps/s (median) | factor |\n|---|---|---|---|")
    for dims in options.dims:
        size, channels = (QUICK if options.quick else SMALL if options.small else SIZES)[dims]
        size, channels = tuple(options.size or size), tuple(options.channels or channels)
        images = torch.rand(size, device=device)
        label = torch.randint(0, 3, size, device=device)
        base = {"precision": "fp32", "last": False, "fused": False}
        every = {"precision": half, "last": None, "fused": True}
        ways: dict[str, tuple[Callable[[], None], bool]] = {
            PLAIN: (plain_way(dims, images, label, channels), False),
            "MONAI SupervisedTrainer": (monai_way(dims, images, label, channels), False),
            "medseg, no lever": (our_way(dims, images, label, channels, **base), False),
            "+ memory kept": (our_way(dims, images, label, channels, **base), True),
            "+ channels last": (our_way(dims, images, label, channels, **{**base, "last": True}), False),
            f"+ {half}": (our_way(dims, images, label, channels, **{**base, "precision": half}), False),
            "+ fused optimizer": (our_way(dims, images, label, channels, **{**base, "fused": True}), False),
            "medseg, fp32": (our_way(dims, images, label, channels, **{**every, "precision": "fp32"}), True),
            "medseg": (our_way(dims, images, label, channels, **every), True),
        }
        if device.type == "cuda":
            ways["medseg, compiled"] = (our_way(dims, images, label, channels, **every, compiled=True), False)
        if options.ends:
            ways = {name: ways[name] for name in (PLAIN, "medseg")}
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, (step, keep) in ways.items():
                with memory(keep):
                    found[name].append(measure(step, options.seconds, device, clock))
                    print(f"{dims}-D {name}: {found[name][-1]:.3f}", file=sys.stderr, flush=True)
        medians = {name: statistics.median(values) for name, values in found.items()}
        shown = f"UNet {dims}-D {list(channels)}, {options.norm} norm, batch {'x'.join(map(str, size))}"
        for name, value in medians.items():
            print(f"| {shown} | {name} | {value:.2f} | {value / medians[PLAIN]:.2f} |")


if __name__ == "__main__":
    main()
