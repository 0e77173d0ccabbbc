"""Every data set of datasets.yaml, drawn in its published layout: its own pipeline trains, predicts and scores on it.

Sizes and budgets are cut down; preprocessing, augmentation, network, loss, post-processing and scores are those of the
pipeline. The drawn objects are bright discs in noise, one grey value for each class.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from medseg.config import dataset_names, load_dataset, load_pipeline, resource_folder
from medseg.data import find_cases, load_sample
from medseg.evaluation import evaluate
from medseg.prediction import predict
from medseg.training import train
from medseg.volumes import read_label

CLASSES = {"esophagus": 5, "hippocampus": 3, "liver": 3, "voc2012": 21, "camvid": 12, "shapes": 4}


def draw(number: int, classes: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(image, class of each voxel, number of each disc) with discs of all classes but 0."""
    random = np.random.default_rng(number)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    label, discs = np.zeros(shape, np.uint8), np.zeros(shape, np.uint16)
    for index in range(max(3, classes - 1)):
        centre = np.array([random.uniform(0.15, 0.85) * n for n in shape])
        inside = ((grid - centre.reshape(-1, *[1] * len(shape))) ** 2).sum(0) < (min(shape) / 6) ** 2
        label[inside], discs[inside] = 1 + index % (classes - 1), index + 1
    image = 40 + 200.0 / classes * label + random.normal(0, 8, shape)
    return image, label, discs


def save(path: Path, array: np.ndarray) -> None:
    """A picture, or a volume of 1 x 1 x 2 mm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".nii.gz"):
        nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 2.0, 1.0])), path)
    elif array.dtype == np.uint16 and path.suffix == ".gif":
        raise AssertionError("GIF holds no 16 bits")
    else:
        Image.fromarray(array).save(path)


def rgb(image: np.ndarray) -> np.ndarray:
    return np.stack([image.clip(0, 255).astype(np.uint8)] * 3, axis=-1)


def grey(image: np.ndarray) -> np.ndarray:
    return image.clip(0, 255).astype(np.uint8)


def parts(name: str, root: Path) -> Iterator[None]:
    """Write five cases of a set, as it is published."""
    classes = CLASSES.get(name, 2)
    volume = name in ("liver", "hippocampus", "esophagus")
    listed = []
    for k in range(5):
        image, label, discs = draw(k, classes, (32, 36, 20) if volume else (72, 80))
        mask = (label > 0).astype(np.uint8) * 255
        void = label.copy()
        void[0:4] = 255
        if name in ("liver", "hippocampus"):
            folder = root / {"liver": "Task03_Liver", "hippocampus": "Task04_Hippocampus"}[name]
            save(folder / f"imagesTr/{name}_{k}.nii.gz", image.astype(np.float32))
            save(folder / f"labelsTr/{name}_{k}.nii.gz", label)
            listed.append({"image": f"./imagesTr/{name}_{k}.nii.gz", "label": f"./labelsTr/{name}_{k}.nii.gz"})
            names = {str(index): text for index, text in load_dataset(name).labels.items()}
            facts = {"name": name, "modality": {"0": "x"}, "labels": names, "training": listed, "test": []}
            (folder / "dataset.json").write_text(json.dumps(facts))
        elif name == "esophagus":
            save(root / f"SegTHOR/train/Patient_{k:02}/Patient_{k:02}.nii.gz", image.astype(np.float32))
            save(root / f"SegTHOR/train/Patient_{k:02}/GT.nii.gz", label)
        elif name == "liver_slices":
            save(root / f"liver_slices/images/{k}_60.png", grey(image))
            save(root / f"liver_slices/labels/{k}_60.png", mask)
        elif name == "lung":
            save(root / f"lung/2d_images/ID_{k:04}_Z_0100.tif", (image * 4 - 1000).astype(np.int32))
            save(root / f"lung/2d_masks/ID_{k:04}_Z_0100.tif", mask)
        elif name == "drive":
            save(root / f"DRIVE/training/images/{k + 21}_training.tif", rgb(image))
            save(root / f"DRIVE/training/1st_manual/{k + 21}_manual1.gif", mask)
            save(root / f"DRIVE/training/mask/{k + 21}_training_mask.gif", np.full_like(mask, 255))
        elif name == "chase_db1":
            save(root / f"CHASEDB1/Image_{k + 1:02}L.jpg", rgb(image))
            save(root / f"CHASEDB1/Image_{k + 1:02}L_1stHO.png", mask > 0)
        elif name == "corneal_nerve":
            save(root / f"corneal_nerve/training/images/{k}.png", grey(image))
            save(root / f"corneal_nerve/training/labels/{k}.png", mask)
        elif name.startswith("dsb2018"):
            rgba = np.concatenate([rgb(image), np.full((*image.shape, 1), 255, np.uint8)], axis=-1)
            save(root / f"dsb2018/stage1_train/n{k}/images/n{k}.png", rgba)
            for disc in np.unique(discs)[1:]:
                save(root / f"dsb2018/stage1_train/n{k}/masks/m{disc}.png", (discs == disc).astype(np.uint8) * 255)
            table = "id,type\n" + "".join(f"n{i},fluorescence\n" for i in range(5))
            (root / "dsb2018/types.csv").write_text(table)
        elif name == "isbi2012":
            save(root / f"ISBI2012/images/{k:02}.png", grey(image))
            save(root / f"ISBI2012/labels/{k:02}.png", mask)
        elif name in ("hela", "phc_u373"):
            folder = root / {"hela": "DIC-C2DH-HeLa", "phc_u373": "PhC-C2DH-U373"}[name]
            save(folder / f"{k + 1:02}/t000.tif", grey(image))
            save(folder / f"{k + 1:02}_ST/SEG/man_seg000.tif", discs)
        elif name == "voc2012":
            save(root / f"VOCdevkit/VOC2012/JPEGImages/2007_{k:06}.jpg", rgb(image))
            save(root / f"VOCdevkit/VOC2012/SegmentationClass/2007_{k:06}.png", void)
            lists = root / "VOCdevkit/VOC2012/ImageSets/Segmentation"
            lists.mkdir(parents=True, exist_ok=True)
            (lists / "train.txt").write_text("".join(f"2007_{i:06}\n" for i in range(3)))
            (lists / "val.txt").write_text("2007_000003\n2007_000004\n")
        elif name == "camvid":
            void = label - 1  # stored from 0, sky, to 10; 11 is void
            void[label == 0] = 11
            part = "train" if k < 3 else "val"
            save(root / f"CamVid/{part}/seq{k}_{k:06}.png", rgb(image))
            save(root / f"CamVid/{part}annot/seq{k}_{k:06}.png", void)
        elif name == "shapes":
            save(root / f"shapes/images/{k}.png", rgb(image))
            save(root / f"shapes/labels/{k}.png", void)
        else:
            raise AssertionError(f"{name}: draw this set too")
        yield


@pytest.mark.parametrize(
    "path",
    [p for p in sorted((resource_folder() / "pipelines").glob("*.yaml")) if not p.stem.endswith("_attention")],
    ids=lambda p: p.stem,
)
def test_a_pipeline_runs_on_its_set_as_published(path, tmp_path):
    name = load_pipeline(path).dataset
    root = tmp_path / "data"
    for _ in parts(name, root):
        pass
    spec = load_dataset(name)
    patch = "[16,16,16]" if spec.dims == 3 else "[32,32]"
    settings = ["iterations=2", "batch=2", f"patch={patch}", "workers=0", "samples_per_case=1", "validate_every=1"]
    run = train(
        path,
        data=root,
        output=tmp_path / "runs",
        cache=tmp_path / "cache",
        device="cpu",
        overrides=[f"train.{text}" for text in settings],
        progress=False,
    )
    pipeline = load_pipeline(path)
    scores = evaluate(run, data=root, workers=1).rows
    named = {score.metric.split(" ")[0] for score in scores}
    assert {metric.name for metric in pipeline.metrics} <= named | {"SurfaceDice"}
    split = json.loads((run / "split.json").read_text())
    assert split["training"]
    assert split["validation"]
    assert not set(split["training"]) & set(split["validation"])
    case = find_cases(spec, root)[0]
    predict(run, [case.images[0]], tmp_path / "masks", progress=False)
    (mask,) = [p for p in (tmp_path / "masks").iterdir() if p.suffix in (".png", ".gz", ".tif")]
    reference = load_sample(case, spec)
    assert read_label(mask, dims=spec.dims).array.shape == tuple(reference["label"].shape)
    if spec.ignore is not None:
        assert (np.asarray(reference["label"]) == spec.ignore).any()
        labels = {score.label for score in scores if score.metric == "IoU"}
        assert set(list(spec.labels.values())[1:]) <= labels


def test_every_set_is_drawn(tmp_path):
    for name in dataset_names(file=resource_folder() / "datasets.yaml"):
        for _ in parts(name, tmp_path / name):
            pass
        assert len(find_cases(load_dataset(name), tmp_path / name)) == 5
