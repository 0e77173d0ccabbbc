"""A training step with the weighted loss against the same step with torch's plain cross-entropy: interleaved, medians.

    python benchmarks/weighted_loss.py [cpu-seconds]

Claim: at most 10 % slower. Forward, loss, backward and AdamW of the same small U-Net on the same batch, 2-D and 3-D.
"""

from __future__ import annotations

import os
import statistics
import sys
import time

import torch
from torch import nn

from medseg.losses import DistanceWeightedCELoss, DistanceWeightedDiceCELoss
from medseg.networks import UNet

REPEATS = 15
clock = time.process_time if "cpu-seconds" in sys.argv else time.perf_counter


class Plain(nn.Module):
    """torch's cross-entropy, called like ours."""

    def forward(self, logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        del weight
        return nn.functional.cross_entropy(logits, target[:, 0])


def compare(dims: int, batch: int, size: int, channels: tuple[int, ...], classes: int) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (size,) * dims
    network = UNet(
        spatial_dims=dims, in_channels=1, out_channels=classes, channels=channels, padding="same", norm="batch"
    ).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)
    image = torch.randn((batch, 1, *shape), device=device)
    target = torch.randint(0, classes, (batch, 1, *shape), device=device)
    weight = 1 + 10 * torch.rand((batch, 1, *shape), device=device)
    losses = {"plain": Plain(), "weighted": DistanceWeightedCELoss(), "weighted + Dice": DistanceWeightedDiceCELoss()}
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for turn in range(REPEATS + 1):
        for name, loss in losses.items():
            begin = clock()
            optimizer.zero_grad()
            loss(network(image), target, weight).backward()
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(clock() - begin)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in median.items():
        print(
            f"| {batch} x {size}^{dims}, {classes} classes, {device} | {name} | {1e3 * value:.0f} ms | "
            f"{100 * (value / median['plain'] - 1):+.1f} % |",
            flush=True,
        )


def main() -> None:
    if clock is time.process_time:
        torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {clock.__name__}, load {os.getloadavg()[0]:.1f}"
    )
    print("| step | loss | median | against plain |\n|---|---|---|---|")
    compare(2, 8, 160, (16, 32, 64, 128), 2)
    compare(3, 2, 48, (16, 32, 64), 3)


if __name__ == "__main__":
    main()
