"""A data set and a pipeline that train in seconds: balls in noise, a network of a few hundred weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from medseg.config import Pipeline

ENTRY = """
tiny:
  title: balls in noise
  modality: none
  dims: 3
  channels: [image]
  labels: {0: background, 1: ball, 2: core}
  unit: mm
  files:
    training: {image: "images/{id}.nii.gz", label: "labels/{id}.nii.gz"}

balls:
  title: balls in noise, without their cores
  modality: none
  dims: 3
  channels: [image]
  labels: {0: background, 1: ball}
  encoding: {1: 1, 2: 1}
  unit: mm
  files:
    training: {image: "images/{id}.nii.gz", label: "labels/{id}.nii.gz"}
"""

# dataset.json of nnU-Net's colour pictures, one file with all channels for each; numTraining is to be added
NNUNET_COLOURS = {
    "channel_names": {"0": "R", "1": "G", "2": "B"},
    "labels": {"background": 0, "x": 1},
    "file_ending": ".png",
}


def write_cases(root: Path, count: int = 6, *, shape: tuple[int, int, int] = (16, 20, 12), seed: int = 0) -> Path:
    """Write `count` volumes with a ball (1) and its core (2), and the datasets.yaml that describes them."""
    random = np.random.default_rng(seed)
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "datasets.yaml").write_text(ENTRY)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    for number in range(count):
        centre = np.array([random.uniform(0.4, 0.6) * n for n in shape])
        distance = np.sqrt(((grid - centre[:, None, None, None]) ** 2).sum(0))
        label = (distance < 5).astype(np.uint8) + (distance < 2.5)
        image = label * 2.0 + random.normal(0, 0.3, shape)
        nibabel.save(nibabel.Nifti1Image(image.astype(np.float32), affine), root / f"images/c{number}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(label.astype(np.uint8), affine), root / f"labels/c{number}.nii.gz")
    return root


def tiny_pipeline(**changes: Any) -> Pipeline:
    """A pipeline for these cases; keyword arguments replace keys of `train`, or whole sections if they are none."""
    train = {
        "epochs": 2,
        "iterations_per_epoch": 3,
        "batch": 2,
        "patch": [8, 8, 8],
        "precision": "fp32",
        "workers": 0,
        "folds": 3,
        "foreground": 0.5,
    }
    plain = {
        "title": "tiny",
        "dataset": "tiny",
        "preprocess": [{"NormalizeIntensityd": {}}],
        "augment": [{"RandFlipd": {"prob": 0.5, "spatial_axis": 0}}, {"RandGaussianNoised": {"prob": 0.5, "std": 0.1}}],
        "network": {"UNet": {"channels": [4, 8], "padding": "same", "norm": "batch", "dropout": 0.1}},
        "loss": {"DistanceWeightedDiceCELoss": {}},
        "optimizer": {"AdamW": {"lr": 0.01}},
        "schedule": {"PolynomialLR": {"power": 0.9}},
        "metrics": ["Dice"],
        "best": "Dice",
    }
    sections = {name: value for name, value in changes.items() if name in {*plain, "inference", "postprocess"}}
    train |= {name: value for name, value in changes.items() if name not in sections}
    if {"iterations", "minutes"} & train.keys():
        train.pop("epochs")
    train = {name: value for name, value in train.items() if value is not None}
    return Pipeline.from_dict({**plain, **sections, "train": train})
