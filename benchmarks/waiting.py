"""Training steps per second for each way in which OpenMP's threads may wait, beside other work and without.

    python benchmarks/waiting.py [--load 0 1 2] [--seconds 4] [--rounds 2]

Each turn is a process of its own, because OpenMP reads its settings once. `--load` is the number of processes of one
busy thread each that run beside it. Prints a Markdown table of medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

WAYS = {
    "OpenMP's default": {},
    "OMP_WAIT_POLICY=PASSIVE (medseg)": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=2000": {"GOMP_SPINCOUNT": "2000"},
    "GOMP_SPINCOUNT=30000": {"GOMP_SPINCOUNT": "30000"},
}
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
STEP = """
import sys, time, torch
from medseg.batches import Batch
from medseg.engine import TrainStep
from medseg.hardware import choose_hardware, fast_layout, keep_memory, real_cores
from medseg.losses import DistanceWeightedDiceCELoss
from medseg.networks import UNet

torch.set_num_threads(real_cores())
keep_memory()
hardware, size = choose_hardware("cpu"), (2, 1, 128, 128)
network = UNet(2, 1, 3, channels=(16, 32, 64), padding="same", norm="batch").train()
network = network.to(memory_format=fast_layout(network, hardware))
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
step = TrainStep(network, DistanceWeightedDiceCELoss(), optimizer, hardware)
batch = Batch((0, 0), ("a", "b"), (0, 1), {"image": torch.rand(size), "label": torch.randint(0, 3, size)})
for _ in range(3):
    step(batch, seed=0)
count, begin = 0, time.perf_counter()
while time.perf_counter() - begin < float(sys.argv[1]):
    step(batch, seed=0)
    count += 1
print(count / (time.perf_counter() - begin))
"""


def measure(settings: dict[str, str], seconds: float) -> float:
    plain = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", STEP, str(seconds)]
    return float(subprocess.run(command, env={**plain, **settings}, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    print("| busy processes beside it | way | steps/s (median) |\n|---|---|---|")
    for load in options.load:
        beside = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(load)]
        found: dict[str, list[float]] = {name: [] for name in WAYS}
        try:
            for _ in range(options.rounds):
                for name, settings in WAYS.items():
                    found[name].append(measure(settings, options.seconds))
        finally:
            for process in beside:
                process.kill()
        for name, values in found.items():
            print(f"| {load} | {name} | {statistics.median(values):.2f} |", flush=True)


if __name__ == "__main__":
    main()
