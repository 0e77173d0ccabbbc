"""Thresholds that training chooses, and scores that look for their own in probabilities."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import zarr
from tiny import ENTRY, tiny_pipeline, write_cases

import medseg.batches
from medseg.checkpoint import load_model, read_state
from medseg.data import find_cases, load_sample
from medseg.evaluation import evaluate
from medseg.metrics import membrane_curve, views
from medseg.prediction import predict
from medseg.report import write_report
from medseg.training import train
from medseg.training_threshold import CANDIDATES

FOV = """
  protocol: drive
  files:
    training: {image: "images/{id}.nii.gz", label: "labels/{id}.nii.gz", fov: "fov/{id}.nii.gz"}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Balls with a field of view: the half of each image on one side, outside of which the labels lie (all ball)."""
    folder = tmp_path_factory.mktemp("threshold")
    data = write_cases(folder / "data")
    (data / "fov").mkdir()
    for path in sorted((data / "labels").iterdir()):
        image = nibabel.load(path)
        label = np.asarray(image.dataobj).copy()
        fov = np.ones_like(label)
        fov[:, 12:] = 0
        label[:, 12:] = 1
        nibabel.save(nibabel.Nifti1Image(fov, image.affine), data / "fov" / path.name)
        nibabel.save(nibabel.Nifti1Image(label, image.affine), path)
    entry = ENTRY.split("balls:")[1].rsplit("  files:", 1)[0]
    (data / "datasets.yaml").write_text("balls:" + entry + FOV.lstrip("\n"))
    return folder


def run(place: Path, **changes) -> Path:
    pipeline = tiny_pipeline(dataset="balls", **changes)
    return train(
        pipeline, data=place / "data", output=place / "runs", cache=place / "cache", device="cpu", progress=False
    )


@pytest.fixture(scope="module")
def trained(place) -> Path:
    steps = [{"Threshold": {"value": "training"}}]
    return run(place, postprocess=steps, epochs=2, metrics=["Dice", "AUC"])


def shares_of(folder: Path, place: Path, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probability, reference and field of view of a case, by the plain network."""
    model = load_model(folder)
    case = {case.id: case for case in find_cases(model.dataset, place / "data")}[name]
    sample = load_sample(case, model.dataset)
    image = (sample["image"] - sample["image"].mean()) / sample["image"].std(correction=0)
    with torch.inference_mode():
        shares = model.network(image.as_tensor()[None].float()).softmax(1)[0, 1].numpy()
    return shares, np.asarray(sample["label"])[0] == 1, np.asarray(sample["fov"])[0] != 0


def test_the_threshold_of_the_training_images_has_the_best_pooled_dice(trained, place):
    split = json.loads((trained / "split.json").read_text())
    parts = [shares_of(trained, place, name) for name in split["training"]]
    shares = np.concatenate([p[fov] for p, _, fov in parts])
    reference = np.concatenate([r[fov] for _, r, fov in parts])

    def dice(value: float) -> float:
        found = shares > value
        return 2 * (found & reference).sum() / (found.sum() + reference.sum())

    model = load_model(trained)
    assert model.threshold is not None
    assert dice(model.threshold) == pytest.approx(max(dice(v) for v in np.arange(0.0005, 1, 0.001)), abs=5e-4)
    assert dice(model.threshold) > dice(0.5) + 0.01  # a network of two epochs: 0.5 is another place
    # outside the field of view everything is ball: with it another threshold would win
    everything = np.concatenate([p.ravel() for p, _, _ in parts]), np.concatenate([r.ravel() for _, r, _ in parts])
    best = max(np.arange(0.01, 1, 0.01), key=lambda v: _dice(everything[0] > v, everything[1]))
    assert abs(best - model.threshold) > 0.02
    assert model.pipeline.postprocess[0].arguments == {"value": model.threshold}
    assert read_state(trained / "last.pt")["threshold"] is None  # the state of training is as it was


def _dice(found: np.ndarray, reference: np.ndarray) -> float:
    return 2 * (found & reference).sum() / (found.sum() + reference.sum())


def test_it_is_used_by_prediction_and_named_in_scores_and_report(trained, place, tmp_path):
    value = load_model(trained).threshold
    assert value is not None
    name = json.loads((trained / "split.json").read_text())["validation"][0]
    shares, _, fov = shares_of(trained, place, name)
    written = np.asarray(nibabel.load(trained / "validation" / f"{name}.nii.gz").dataobj)
    assert ((written != 0) == ((shares > value) & fov)).mean() > 0.999
    predict(trained, [place / "data" / "images" / f"{name}.nii.gz"], tmp_path / "masks", device="cpu", progress=False)
    found = np.asarray(nibabel.load(tmp_path / "masks" / f"{name}.nii.gz").dataobj)
    assert ((found != 0) == (shares > value)).mean() > 0.999
    facts = json.loads((trained / "threshold.json").read_text())
    assert facts == {"value": value, "chosen_on": "training", "cases": 4, "rule": "highest pooled Dice"}
    result = evaluate(trained, data=place / "data", output=tmp_path / "scores", workers=1)
    assert result.summary["threshold"] == facts
    assert not [note for note in result.summary["notes"] if "threshold" in note]
    page = write_report(trained).read_text() if (trained / "validation" / "cases.csv").is_file() else None
    assert page is None
    evaluate(trained, data=place / "data", workers=1)
    assert f"{value:.4g}, chosen on the 4 training cases (highest pooled Dice)" in write_report(trained).read_text()


def test_auc_comes_from_the_stored_probabilities(trained, place, tmp_path):
    result = evaluate(trained, data=place / "data", output=tmp_path / "scores", workers=1)
    for row in result.rows:
        if row.metric == "AUC" and row.case != "all cases":
            shares, reference, fov = shares_of(trained, place, row.case)
            inside, outside = shares[fov & reference], shares[fov & ~reference]
            # the definition: all pairs of a pixel inside and one outside
            above = (inside[:, None] > outside).mean() + 0.5 * (inside[:, None] == outside).mean()
            assert row.value == pytest.approx(above, abs=1e-3)
            assert 0.5 < row.value < 1
    assert {row.metric for row in result.rows} >= {"AUC", "PooledAUC", "clDice", "MCC"}


def test_a_run_without_a_threshold_says_so(place, tmp_path):
    folder = run(place, epochs=1)
    assert not (folder / "threshold.json").exists()
    summary = evaluate(folder, data=place / "data", output=tmp_path, workers=1).summary
    assert "threshold" not in summary
    assert [note for note in summary["notes"] if "training images" in note and "0.5" in note]


def test_membranes_are_scored_from_probabilities(place, monkeypatch):
    kinds = set()
    monkeypatch.setattr(
        views, "membrane_curve", lambda found, *more: (kinds.add(found.dtype.kind), membrane_curve(found, *more))[1]
    )
    folder = run(place, epochs=2, metrics=["V_rand", "Dice"], best="V_rand")
    rows = list(csv.DictReader((folder / "log.csv").open()))
    epoch = int(load_model(folder).metadata["epoch"])
    split = json.loads((folder / "split.json").read_text())
    curves = []
    for name in split["validation"]:
        shares, reference, fov = shares_of(folder, place, name)
        truth = (reference & fov).astype(np.uint8)
        curves.append(membrane_curve(shares.astype(np.float32), truth).v_rand)
        stored = zarr.open(str(folder / "validation" / f"{name}.probabilities.zarr"), mode="r")
        assert np.abs(np.asarray(stored[1]) - shares)[fov].max() < 1e-3
    assert float(rows[epoch - 1]["val V_rand all"]) == pytest.approx(np.mean(curves), abs=0.01)  # bf16 and fp32
    assert kinds == {"f"}  # never a mask; a few steps of training do not promise that the two differ


def test_a_threshold_for_membranes_is_chosen_by_the_labels_it_gives(place):
    steps = [{"Threshold": {"value": "validation"}}]
    folder = run(place, epochs=2, metrics=["PooledV_rand", "Dice"], best="PooledV_rand", postprocess=steps)
    value = load_model(folder).threshold
    assert value is not None
    names = json.loads((folder / "split.json").read_text())["validation"]
    parts = [shares_of(folder, place, name) for name in names]

    def score(threshold: float) -> float:
        return float(np.mean([membrane_curve((p > threshold) & fov, r & fov).v_rand for p, r, fov in parts]))

    scores = [score(v) for v in CANDIDATES]
    smooth = np.convolve(np.pad(scores, 1, mode="edge"), [0.25, 0.5, 0.25], mode="valid")
    assert smooth[CANDIDATES.index(value)] == pytest.approx(smooth.max(), abs=1e-3)


def test_slices_of_a_patient_are_scored_together_in_training_and_after(tmp_path):
    """Two cases of each of four patients; the score from the written labels, with numpy alone."""
    data = write_cases(tmp_path / "data", 8)
    for path in sorted(data.glob("*/c*.nii.gz")):
        number = int(path.name[1])
        path.rename(path.with_name(f"{'abcd'[number // 2]}_{number}.nii.gz"))
    entry = ENTRY.split("balls:")[1].rstrip() + "\n  split: {unit: patient, group: '^([a-d])_'}\n"
    (data / "datasets.yaml").write_text("balls:" + entry)
    folder = run(tmp_path, folds=2, epochs=3, metrics=["PatientDice", "Dice"], best="PatientDice")
    sums: dict[str, np.ndarray] = {}
    for name in json.loads((folder / "split.json").read_text())["validation"]:
        found = np.asarray(nibabel.load(folder / "validation" / f"{name}.nii.gz").dataobj) == 1
        truth = np.asarray(nibabel.load(data / "labels" / f"{name}.nii.gz").dataobj) > 0
        sums[name[0]] = sums.get(name[0], 0) + np.array([2 * (found & truth).sum(), found.sum() + truth.sum()])
    assert len(sums) == 2
    expected = np.mean([shared / both for shared, both in sums.values()])
    assert 0 < expected < 1
    result = evaluate(folder, data=data, output=tmp_path / "scores", progress=False)
    assert [row.value for row in result.rows if row.metric == "PatientDice"] == pytest.approx([expected])
    rows = list(csv.DictReader((folder / "log.csv").open()))
    epoch = int(load_model(folder).metadata["epoch"])
    assert float(rows[epoch - 1]["val PatientDice ball"]) == pytest.approx(expected, abs=2e-6)
    cases = [row.value for row in result.rows if row.metric == "Dice"]
    assert abs(np.mean(cases) - expected) > 1e-5  # another number than the mean over cases


def test_calibration_equals_its_definition(trained, place, tmp_path):
    """Pixel by pixel: ten bins of the probability; those below 0.001 and those outside of the view are left out."""
    result = evaluate(trained, data=place / "data", output=tmp_path / "scores", workers=1)
    bins = [[0, 0.0, 0] for _ in range(10)]
    for path in sorted((trained / "validation").glob("*.probabilities.zarr")):
        name = path.name.removesuffix(".probabilities.zarr")
        shares = np.asarray(zarr.open(str(path), mode="r")[1], np.float64)
        _, reference, fov = shares_of(trained, place, name)
        for p, right, inside in zip(shares.ravel(), reference.ravel(), fov.ravel(), strict=True):
            if inside and p >= 0.001:
                one = bins[min(int(p * 10), 9)]
                one[0], one[1], one[2] = one[0] + 1, one[1] + p, one[2] + int(right)
    (found,) = result.summary["calibration"]
    total = sum(n for n, _, _ in bins)
    assert total > 1000
    assert [b["count"] for b in found["bins"]] == [n for n, _, _ in bins]
    for b, (n, p, right) in zip(found["bins"], bins, strict=True):
        assert b["probability"] == pytest.approx(p / n if n else 0, rel=1e-6)
        assert b["frequency"] == pytest.approx(right / n if n else 0, rel=1e-6)
    assert found["error"] == pytest.approx(sum(abs(p - right) for _, p, right in bins) / total, rel=1e-6)
    evaluate(trained, data=place / "data", workers=1)
    assert f"Expected calibration error {found['error']:.3f}" in write_report(trained).read_text()


@pytest.mark.parametrize("there", ["unknown", "background"])
def test_training_learns_outside_of_the_field_of_view_what_the_entry_says(place, tmp_path, monkeypatch, there):
    entry = (place / "data" / "datasets.yaml").read_text() + f"  outside_fov: {there}\n"
    root = tmp_path / "data"
    root.mkdir()
    for name in ("images", "labels", "fov"):
        shutil.copytree(place / "data" / name, root / name)
    (root / "datasets.yaml").write_text(entry)
    learnt = set()
    real = medseg.batches.finish_targets

    def watched(batch, *rest):
        found = real(batch, *rest)
        outside = batch["fov"] == 0
        assert not found["weight"][outside].any()  # all these labels are ball out there, which nobody can know
        blank = real(batch | {"label": torch.zeros_like(batch["label"])}, *rest)
        learnt.update(blank["weight"][outside].unique().tolist())
        return found

    monkeypatch.setattr(medseg.batches, "finish_targets", watched)
    pipeline = tiny_pipeline(dataset="balls", epochs=1, iterations_per_epoch=3, foreground=0.0, augment=[])
    train(pipeline, data=root, output=tmp_path / "runs", cache=tmp_path / "cache", device="cpu", progress=False)
    assert learnt == ({0.0} if there == "unknown" else {1.0})
