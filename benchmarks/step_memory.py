"""The estimate of a step's memory (`medseg.training_memory.step_bytes`) against what real steps make a process grow by.

    python benchmarks/step_memory.py [--networks UNet ResUNet ...] [--precision fp32 bf16]

Each step runs in a process of its own, on the CPU, with memory kept as in training. What is compared is the difference
between two sizes of patch: the growth of resident memory in the larger step minus that in the smaller one, beside the
same difference of the estimates. Memory does not depend on how busy the machine is. For Linux. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from medseg.batches import Batch
from medseg.config import Pipeline
from medseg.engine import TrainStep, build_network
from medseg.engine_recompute import recompute_activations
from medseg.hardware import Hardware, choose_hardware, configured, fast_layout
from medseg.losses import DistanceWeightedDiceCELoss
from medseg.training_memory import step_bytes

# name -> arguments, smaller and larger (B, C, *patch)
CASES = {
    "UNet": ({"channels": [16, 32, 64], "padding": "same", "dropout": 0.0}, (1, 1, 64, 64, 64), (1, 1, 64, 128, 128)),
    "AttentionUNet": ({"channels": [16, 32, 64], "dropout": 0.0}, (1, 1, 48, 48, 48), (1, 1, 48, 96, 96)),
    "ResUNet": ({}, (2, 3, 192, 192), (2, 3, 384, 384)),
    "FCN": ({"hidden": 256}, (2, 3, 160, 160), (2, 3, 320, 320)),
}


def make(name: str) -> torch.nn.Module:
    arguments, size, _ = CASES[name]
    train = {"epochs": 1, "batch": size[0], "patch": list(size[2:])}
    plain = {"dataset": "none", "network": {name: arguments}, "loss": "DistanceWeightedDiceCELoss", "train": train}
    pipeline = Pipeline.from_dict({**plain, "optimizer": {"AdamW": {"lr": 1e-4}}, "metrics": ["Dice"], "best": "Dice"})
    return build_network(pipeline, in_channels=size[1], out_channels=3, seed=0).train()


def step(name: str, large: bool, hardware: Hardware, recompute: bool) -> None:
    """Two steps; prints by how many bytes the process grew at most."""
    network, size = make(name), CASES[name][2 if large else 1]
    if recompute:
        recompute_activations(network)
    with configured(hardware):
        network = network.to(memory_format=fast_layout(network, hardware))  # pyright: ignore[reportCallIssue]
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)
        train = TrainStep(network, DistanceWeightedDiceCELoss(), optimizer, hardware)
        tensors = {"image": torch.rand(size), "label": torch.randint(0, 3, (size[0], 1, *size[2:]))}
        batch = Batch((0, 0), ("a",) * size[0], (0,) * size[0], tensors)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the largest so far was that of the imports
        for _ in range(2):
            train(batch, seed=0)
        print(resident("VmHWM") - before)


def resident(name: str) -> int:
    """Bytes: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--recompute", action="store_true", help="with recomputed activations")
    parser.add_argument("--one", choices=["small", "large"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        hardware = choose_hardware("cpu", options.precision[0])
        step(options.networks[0], options.one == "large", hardware, options.recompute)
        return
    print("| network | number type | growth estimated | growth measured | ratio |\n|---|---|---|---|---|")
    for name in options.networks:
        for precision in options.precision:
            found = []
            for one in ("small", "large"):
                command = [sys.executable, __file__, "--networks", name, "--precision", precision, "--one", one]
                command += ["--recompute"] if options.recompute else []
                found.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            network = make(name)
            if options.recompute:
                recompute_activations(network)
            low, high = (step_bytes(network, CASES[name][k], half=precision != "fp32") for k in (1, 2))
            grown = found[1] - found[0]
            told = f"{(high - low) / 1e6:.0f} MB | {grown / 1e6:.0f} MB | {(high - low) / grown:.2f}"
            print(f"| {name} | {precision} | {told} |", flush=True)


if __name__ == "__main__":
    main()
