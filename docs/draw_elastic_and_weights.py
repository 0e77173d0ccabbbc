"""Draw the pictures of docs/elastic_and_weights.md from generated cells: `python docs/draw_elastic_and_weights.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from scipy import ndimage

from medseg.transforms import RandElasticDeformationd, boundary_weight_map, part_instances

mpl.use("Agg")
from matplotlib import pyplot as plt

FOLDER = Path(__file__).parent / "images"
SIZE = 160


def draw_cells(seed: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """A picture of cells, some of them touching, and its instances."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    instances, number = np.zeros((SIZE, SIZE), np.int32), 0
    for row in np.arange(18, SIZE, 27):
        for column in np.arange(18, SIZE, 27):
            if rng.random() < 0.12:
                continue
            centre = np.array([row, column]) + rng.normal(scale=3.5, size=2)
            radii, angle = rng.uniform(9, 14, size=2), rng.uniform(0, np.pi)
            dy, dx = y - centre[0], x - centre[1]
            u, v = dy * np.cos(angle) + dx * np.sin(angle), dx * np.cos(angle) - dy * np.sin(angle)
            number += 1
            instances[((u / radii[0]) ** 2 + (v / radii[1]) ** 2 < 1) & (instances == 0)] = number
    inside = np.asarray(ndimage.distance_transform_edt(part_instances(instances)[0]))
    image = 0.15 + 0.5 * np.minimum(inside / 6, 1) * (0.8 + 0.3 * rng.random(number + 1)[instances])
    image = ndimage.gaussian_filter(image, 1.0) + rng.normal(scale=0.03, size=image.shape)
    return image.astype(np.float32), instances


def colours(instances: np.ndarray) -> np.ndarray:
    table = np.random.default_rng(1).uniform(0.25, 1.0, size=(int(instances.max()) + 1, 3))
    table[0] = 0.06
    return table[instances]


def show(axis, picture: np.ndarray, title: str, **arguments) -> None:
    axis.imshow(picture, interpolation="nearest", **arguments)
    axis.set_title(title, fontsize=9)
    axis.set_axis_off()


def draw_weights(image: np.ndarray, instances: np.ndarray) -> None:
    parted, _ = part_instances(instances)
    figure, axes = plt.subplots(1, 4, figsize=(10.4, 2.9), layout="constrained")
    show(axes[0], image, "image", cmap="gray")
    show(axes[1], colours(parted), "instances, parted")
    show(axes[2], boundary_weight_map(instances), "weight: separation", cmap="inferno", vmin=0, vmax=11)
    whole = (instances > 0).astype(np.uint8)
    show(
        axes[3],
        boundary_weight_map(whole, mode="contour", sigma=3.0),
        "weight: contour",
        cmap="inferno",
        vmin=0,
        vmax=11,
    )
    figure.colorbar(axes[3].images[0], ax=axes[3], shrink=0.8)
    figure.savefig(FOLDER / "weight_map.png", dpi=70)


def draw_deformations(image: np.ndarray, instances: np.ndarray) -> None:
    lines = np.zeros_like(image)
    lines[::16], lines[:, ::16] = 1, 1
    lines = ndimage.gaussian_filter(lines, 0.6)
    sample = {
        "image": torch.from_numpy(image[None]), "label": torch.from_numpy(instances[None]),
        "weight": torch.from_numpy(lines[None].astype(np.float32)),
    }  # fmt: skip
    kinds = {
        "elastic: 3x3, sigma 10": RandElasticDeformationd(),
        "with rotation, scale, flips": RandElasticDeformationd(rotate=30, scale=[0.8, 1.25], flip=True),
        "smoothed noise (Simard)": RandElasticDeformationd(form="simard", sigma=5, smooth=16),
    }
    figure, axes = plt.subplots(3, 4, figsize=(10.4, 8.0), layout="constrained")
    for column, (title, deform) in enumerate([("as it was", None), *kinds.items()]):
        out = sample if deform is None else deform.set_random_state(11)(sample)
        show(axes[0, column], out["image"][0].numpy(), title, cmap="gray")
        show(axes[1, column], colours(out["label"][0].numpy()), "label (nearest)")
        show(axes[2, column], out["weight"][0].numpy(), "grid (linear)", cmap="gray")
    figure.savefig(FOLDER / "deformations.png", dpi=70)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    image, instances = draw_cells()
    draw_weights(image, instances)
    draw_deformations(image, instances)


if __name__ == "__main__":
    main()
