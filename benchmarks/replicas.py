"""A training step on a CPU whose threads share every operation, against one whose threads share out the batch.

    python benchmarks/replicas.py [drive cell em liver_slices hippocampus] [--rounds 10] [--precision auto]

Network, loss, optimizer, patch and batch of each pipeline, a constant batch, both ways in one process in turns (what
the machine does besides hits both alike). Prints medians of seconds a step and the median of the ratios of a turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the medseg command does

import torch

from medseg.batches import Batch
from medseg.component import build_component
from medseg.config import load_dataset, load_pipeline
from medseg.engine import TrainStep, build_network, build_optimizer
from medseg.engine_replicas import choose_replicas
from medseg.hardware import choose_hardware, configured, fast_layout


def make(name: str, precision: str, *, split: bool) -> tuple[Callable[[], object], int]:
    """A step of the pipeline on a constant batch, and in how many parts it is computed."""
    pipeline, hardware = load_pipeline(name), choose_hardware("cpu", precision)
    spec, train = load_dataset(pipeline.dataset), pipeline.train
    facts = {"in_channels": spec.in_channels, "out_channels": spec.out_channels}
    network = build_network(pipeline, seed=0, **facts).train()
    network = network.to(memory_format=fast_layout(network, hardware))  # pyright: ignore[reportCallIssue]
    count, _ = choose_replicas(network, "auto" if split else 1, train.batch, hardware, alone=True)
    loss = build_component(pipeline.loss, "loss", spatial_dims=len(train.patch), **facts)
    step = TrainStep(network, loss, build_optimizer(pipeline, network, hardware.device), hardware, replicas=count)
    size = (train.batch, 1, *train.patch)
    tensors = {
        "image": torch.rand(train.batch, spec.in_channels, *train.patch),
        "label": torch.randint(0, spec.out_channels, size),
        "weight": torch.ones(size),
    }
    batch = Batch((0, 0), ("case",) * train.batch, (0,) * train.batch, tensors)
    return lambda: step(batch, seed=0), count


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=["drive", "cell", "em", "liver_slices", "hippocampus"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    hardware = choose_hardware("cpu", options.precision)
    print(f"{hardware.describe()}, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}\n")
    print("| pipeline | parts | whole batch s | in parts s | ratio |\n|---|---|---|---|---|")
    with configured(hardware):
        for name in options.names:
            (whole, _), (parts, count) = (make(name, options.precision, split=split) for split in (False, True))
            seconds: list[list[float]] = [[], []]
            for turn in range(options.rounds + 2):
                for way, step in enumerate((whole, parts)):
                    begin = time.perf_counter()
                    step()
                    if turn > 1:
                        seconds[way].append(time.perf_counter() - begin)
            ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
            first, second = (statistics.median(values) for values in seconds)
            print(f"| {name} | {count} | {first:.3f} | {second:.3f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
