"""What is sent to others says neither where files lay nor who the patients are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nibabel
import numpy as np
from corpus import series as write_dicom
from tiny import tiny_pipeline, write_cases

from medseg.evaluation import evaluate, pool_runs
from medseg.export import export_bundle, export_package
from medseg.prediction import predict
from medseg.report import write_report
from medseg.report_facts import hide_paths
from medseg.training import train

PERSON = "Jane Müller"


def words_in(folder: Path) -> str:
    """The bytes of every file below, and the names of the files."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()] if folder.is_dir() else [folder]
    return "\n".join(path.name + "\n" + path.read_bytes().decode("latin-1") for path in files)


def test_reports_scores_and_exports_have_no_folder_and_no_patient(tmp_path, monkeypatch):
    home = tmp_path / PERSON / "home"
    monkeypatch.setenv("HOME", str(home))
    root, runs = home / "hospital data", home / "runs"
    data, target = str(write_cases(root)), str(runs)
    monkeypatch.setattr(sys, "argv", ["/opt/bin/medseg", "train", "tiny", "--data", data, f"--output={target}"])
    run = train(tiny_pipeline(epochs=1), data=root, output=runs, cache=home / "cache", device="cpu", progress=False)
    assert json.loads((run / "provenance.json").read_text())["data"] == data  # evaluating the run again needs it
    evaluate(run, workers=1)
    page = write_report(run)
    pool_runs([run], output=tmp_path / "pooled")
    export_package(run, tmp_path / "package")
    export_bundle(run, tmp_path / "bundle")
    # a DICOM series: predicted, and the prediction scored against itself
    volume = np.random.default_rng(0).integers(-100, 100, (16, 20, 12)).astype(np.int16)
    scan = write_dicom(tmp_path / "dicom" / "CANARY-FOLDER", volume, patient="CANARY^NAME")
    assert predict(run, [scan], tmp_path / "masks", device="cpu", progress=False).exit_code == 0
    (mask,) = (tmp_path / "masks").glob("*.nii.gz")
    (tmp_path / "first").mkdir()
    image = nibabel.load(mask)
    label = np.zeros(image.shape, np.uint8)
    label[4:9, 4:9, 4:9] = 1
    nibabel.save(nibabel.Nifti1Image(label, image.affine), tmp_path / "first" / mask.name)
    evaluate(tmp_path / "masks", tmp_path / "first", labels={1: "ball", 2: "core"}, output=tmp_path / "dicom scores")
    write_report(tmp_path / "dicom scores")
    sent = [
        page, run / "validation" / "summary.json", run / "validation" / "cases.csv", tmp_path / "pooled",
        tmp_path / "package", tmp_path / "bundle", tmp_path / "dicom scores",
    ]  # fmt: skip
    secrets = (str(home), str(root), str(tmp_path), PERSON, "Müller", "CANARY", "19000101")
    for place in sent:
        text = words_in(place)
        assert len(text) > 100
        for secret in secrets:
            for spelled in (secret, secret.encode().decode("latin-1"), secret.encode("unicode-escape").decode()):
                assert spelled not in text, (place.name, spelled)
    assert "hospital data" in page.read_text()  # the name alone stays: it helps, and tells nothing


def test_paths_in_texts_are_shortened():
    assert hide_paths("/data/ct") == "ct"
    assert hide_paths("C:\\Users\\jane\\ct") == "ct"
    assert hide_paths("cannot read '/home/jane/x.nii.gz': empty") == "cannot read 'x.nii.gz': empty"
    assert hide_paths({"data": ["~/scans", 3]}) == {"data": ["scans", 3]}
    assert hide_paths("a /home/jane doe/scans b", ["/home/jane doe"]) == "a scans b"
    for harmless in ("images/s / batch 4", "labels/{id}.png", "https://example.org/a/b", "doi:10.1/x", "1/2", "mm/px"):
        assert hide_paths(harmless) == harmless
