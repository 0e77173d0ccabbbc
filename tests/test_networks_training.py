"""Every network learns two small cases by heart: Dice above 0.95."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from medseg.networks import FCN, AttentionUNet, ResUNet, SegmentationNetwork, UNet


def draw_blobs(dims: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two noisy images with a bright ball each, (2, 1, *size), and their labels (2, *size)."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.stack(torch.meshgrid(*[torch.arange(size)] * dims, indexing="ij")).float()
    labels = []
    for centre, radius in ((0.4, 0.22), (0.6, 0.28)):
        labels.append((places - centre * size).square().sum(0).sqrt() < radius * size)
    label = torch.stack(labels)
    images = label[:, None] + 0.5 * torch.randn(2, 1, *[size] * dims, generator=generator)
    return images, label.long()


def overfit(network: SegmentationNetwork, dims: int, size: int, steps: int, rate: float = 3e-3) -> float:
    images, labels = draw_blobs(dims, size, seed=0)
    crop = (slice(None), *[slice(c, size - c) for c in network.context]) if not network.padded else ...
    labels = labels[crop]
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    network.train()
    for _ in range(steps):
        logits = network(images)
        outputs = logits if isinstance(logits, tuple) else (logits,)
        loss = sum(
            F.cross_entropy(
                F.interpolate(part, size=labels.shape[1:]) if part.shape[2:] != labels.shape[1:] else part, labels
            )
            for part in outputs
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = network.eval()(images).argmax(1)
    return float(2 * (found * labels).sum() / (found.sum() + labels.sum()))


TRAINED = {
    "unet-paper": (lambda: UNet(2, 1, 2, (8, 16, 32), dropout=0.1), 2, 76, 100),
    "unet-strided": (lambda: UNet(2, 1, 2, (8, 16, 32), padding="same", norm="batch", down="conv"), 2, 48, 60),
    "unet-instance-deep": (
        lambda: UNet(2, 1, 2, (8, 16, 32), padding="same", norm="instance", activation="leaky_relu",
                     up="interpolate", deep_supervision=1), 2, 48, 60),
    "unet-3d": (lambda: UNet(3, 1, 2, (4, 8, 16), padding="same", norm="batch", dropout=0.0), 3, 24, 60),
    "attention": (lambda: AttentionUNet(2, 1, 2, (8, 16, 32)), 2, 48, 60),
    "attention-3d": (lambda: AttentionUNet(3, 1, 2, (4, 8, 16), open_gates=True), 3, 24, 60),
    "attention-full": (lambda: AttentionUNet(2, 1, 2, (8, 16, 32), gate="additive_full"), 2, 48, 60),
    "resunet": (lambda: ResUNet(2, 1, 2, (8, 16, 16, 32), blocks=(1, 1, 1, 1)), 2, 64, 100),
    "resunet-3d": (lambda: ResUNet(3, 1, 2, (8, 8, 16, 16), blocks=(1, 1, 1, 1), norm="instance"), 3, 64, 90),
    "fcn-8s": (lambda: FCN(2, 1, 2, (8, 8, 16, 16, 32), hidden=32, dropout=0.1), 2, 64, 200),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", TRAINED)
def test_network_learns_two_cases_by_heart(case):
    make, dims, size, steps = TRAINED[case]
    torch.manual_seed(0)
    assert overfit(make(), dims, size, steps) > 0.95


def test_a_network_that_does_not_learn_fails_the_test_above():
    torch.manual_seed(0)
    assert overfit(UNet(2, 1, 2, (2, 4), padding="same"), 2, 48, 0) < 0.9
