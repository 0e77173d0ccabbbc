"""A plain PyTorch script beside medseg: what a blog's script reaches in the same minutes on the same fold.

    python benchmarks/plain_script.py drive --data DATA --minutes 8 --folds 0 1
    python benchmarks/accuracy.py drive --data DATA --minutes 8 --folds 0 1        # ours

Nothing of medseg trains or predicts here: a small U-Net (0.3 M parameters) with batch norm, random crops with flips,
rotation, scaling and elastic deformation, cross-entropy and Dice, AdamW with one cycle, bf16 and channels last, four
mirror passes. It is kept to what such scripts have: no weight map, no choice of weights, no validation in
between. Only files, split and scores are medseg's, so that both sides are judged alike: drive by Dice in the field of
view with the threshold of the training images and AUC, em by V_rand and V_info after thinning at the best of nine
thresholds for all slices together (which flatters it: the slices choose), liver_slices by Dice at 0.5.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from medseg.config import load_dataset
from medseg.data import find_cases, load_sample, make_split
from medseg.metrics.membranes import membrane_curve
from medseg.metrics.overlap import confusion_of_masks
from medseg.metrics.vessels import best_threshold, probability_counts

# data set, patch, batch
SETS = {"drive": ("drive", 128, 8), "em": ("isbi2012", 192, 4), "liver_slices": ("liver_slices", 256, 4)}
CHANNELS = (16, 32, 64, 96)


def convolutions(inside: int, outside: int) -> nn.Sequential:
    """Two convolutions with batch norm and ReLU."""
    parts: list[nn.Module] = []
    for source in (inside, outside):
        parts += [nn.Conv2d(source, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(inplace=True)]
    return nn.Sequential(*parts)


class SmallUNet(nn.Module):
    """A U-Net with four levels and one output (logit)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(map(convolutions, (channels, *CHANNELS), CHANNELS))
        pairs = list(zip(CHANNELS[1:], CHANNELS, strict=False))[::-1]
        self.up = nn.ModuleList(nn.ConvTranspose2d(deep, flat, 2, stride=2) for deep, flat in pairs)
        self.join = nn.ModuleList(convolutions(2 * flat, flat) for _, flat in pairs)
        self.last = nn.Conv2d(CHANNELS[0], 1, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits (B, 1, H, W) of images (B, C, H, W); sides are multiples of 8."""
        kept = []
        for level, block in enumerate(self.down):
            image = block(image if level == 0 else F.max_pool2d(image, 2))
            kept.append(image)
        for up, join, skip in zip(self.up, self.join, kept[-2::-1], strict=True):
            image = join(torch.cat([skip, up(image)], dim=1))
        return self.last(image)


def draw(images: list[torch.Tensor], patch: int, batch: int, generator: np.random.Generator) -> torch.Tensor:
    """Random patches (B, C + 2, patch, patch): image channels, label (0, 1), scored pixels; all deformed alike."""
    out = []
    axis = torch.linspace(-1, 1, patch)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    for _ in range(batch):
        image = images[generator.integers(len(images))]
        size = np.array(image.shape[1:])
        angle, scale = generator.uniform(0, 2 * math.pi), generator.uniform(0.85, 1.18)
        y, x = math.cos(angle) * rows - math.sin(angle) * columns, math.sin(angle) * rows + math.cos(angle) * columns
        if generator.random() < 0.5:
            x = -x
        field = torch.from_numpy(generator.normal(0, 3.0, (1, 2, 4, 4))).float()
        shift = F.interpolate(field, (patch, patch), mode="bicubic", align_corners=True)[0]
        centre = [generator.uniform(0, 1) * max(n - patch, 0) + min(n, patch) / 2 for n in size]
        y = centre[0] + scale * y * patch / 2 + shift[0]
        x = centre[1] + scale * x * patch / 2 + shift[1]
        grid = torch.stack([2 * (x + 0.5) / size[1] - 1, 2 * (y + 0.5) / size[0] - 1], dim=-1)[None]
        picked = F.grid_sample(image[None], grid, padding_mode="reflection", align_corners=False)[0]
        picked[:-2] = picked[:-2] * generator.uniform(0.8, 1.2) + generator.uniform(-0.2, 0.2)
        picked[-2:] = (picked[-2:] > 0.5).float()
        out.append(picked)
    return torch.stack(out)


def train(images: list[torch.Tensor], *, minutes: float, patch: int, batch: int, seed: int) -> tuple[nn.Module, int]:
    """The network after `minutes`, and its iterations."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    network = SmallUNet(images[0].shape[0] - 2).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    started, count, share = time.monotonic(), 0, 0.0
    while (share := (time.monotonic() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(share / 0.05, 0.5 * (1 + math.cos(math.pi * share)) + 1e-3)
        drawn = draw(images, patch, batch, generator)
        image, label, scored = drawn[:, :-2], drawn[:, -2:-1], drawn[:, -1:]
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(image.contiguous(memory_format=torch.channels_last)).float()
        cross = (F.binary_cross_entropy_with_logits(logits, label, reduction="none") * scored).sum() / scored.sum()
        p = logits.sigmoid() * scored
        loss = cross + 1 - (2 * (p * label).sum() + 1) / (p.sum() + (label * scored).sum() + 1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        count += 1
    return network.eval(), count


@torch.inference_mode()
def predict(network: nn.Module, image: torch.Tensor) -> np.ndarray:
    """Probability (H, W) of a whole image (C, H, W): mean of four mirror passes."""
    height, width = image.shape[1:]
    padded = F.pad(image[None], (0, -width % 8, 0, -height % 8), mode="reflect")
    total = torch.zeros(padded.shape[-2:])
    for dims in ((), (2,), (3,), (2, 3)):
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(padded.flip(dims).contiguous(memory_format=torch.channels_last))
        total += logits.float().sigmoid().flip(dims)[0, 0] / 4
    return total[:height, :width].numpy()


def measure(name: str, *, data: Path, minutes: float, fold: int, seed: int) -> tuple[int, dict[str, float]]:
    """Iterations, and score -> mean over the validation cases of the fold that medseg would use."""
    dataset, patch, batch = SETS[name]
    spec = load_dataset(dataset, root=data)
    cases = find_cases(spec, data)
    split = make_split(cases, folds=5, seed=seed)[fold]
    stacks: dict[str, torch.Tensor] = {}
    for case in (case for case in cases if case.id in {*split.training, *split.validation}):
        sample = load_sample(case, spec)
        image = torch.as_tensor(np.asarray(sample["image"]), dtype=torch.float32)
        image = (image - image.mean(dim=(1, 2), keepdim=True)) / image.std(dim=(1, 2), keepdim=True).clamp(min=1e-6)
        label = torch.as_tensor(np.asarray(sample["label"])[:1] == 1, dtype=torch.float32)
        scored = torch.as_tensor(np.asarray(sample["fov"]) > 0).float() if "fov" in sample else torch.ones_like(label)
        stacks[case.id] = torch.cat([image, label, scored])
    training = [stacks[case] for case in split.training]
    network, count = train(training, minutes=minutes, patch=patch, batch=batch, seed=seed)
    triples = {case: (predict(network, s[:-2]), s[-2].numpy() > 0, s[-1].numpy() > 0) for case, s in stacks.items()}
    scored_cases = [triples[case] for case in split.validation]
    if name == "em":
        curves = [membrane_curve(p, label) for p, label, _ in scored_cases]
        total = sum(curves[1:], start=curves[0])
        return count, {
            "V_rand": total.v_rand, "V_info": total.v_info, "threshold": total.best_threshold,
            "V_rand, each slice at its best": statistics.fmean(curve.v_rand for curve in curves),
        }  # fmt: skip
    level = 0.5
    if name == "drive":
        level = best_threshold([probability_counts(*triples[case]) for case in split.training])
    found = [confusion_of_masks(p >= level, label, fov).dice for p, label, fov in scored_cases]
    scores = {"Dice": statistics.fmean(found), "threshold": level}
    if name == "drive":
        scores["AUC"] = statistics.fmean(probability_counts(*triple).auc for triple in scored_cases)
    return count, scores


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=SETS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--folds", type=int, nargs="+", default=[0])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("| set | minutes | fold | iterations | scores of the plain script |\n|---|---|---|---|---|")
    for fold in options.folds:
        count, scores = measure(options.name, data=options.data, minutes=options.minutes, fold=fold, seed=options.seed)
        text = ", ".join(f"{metric} {value:.4f}" for metric, value in scores.items())
        print(f"| {options.name} | {options.minutes:g} | {fold} | {count} | {text} |", flush=True)


if __name__ == "__main__":
    main()
