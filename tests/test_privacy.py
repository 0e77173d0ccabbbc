"""Patient data: canary strings in every text of DICOM and NIfTI, then a search of every byte that medseg writes."""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import corpus
import nibabel
import numpy as np
import pytest
from tiny import tiny_pipeline, write_cases

from medseg.cli import main
from medseg.config import to_yaml

CANARIES = (b"CANARY", b"19000101", b"19000102", b"1.2.3.4")


def contents(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """The bytes of a file and, unpacked, those inside of it."""
    yield name, data
    if data[:2] == b"\x1f\x8b":
        yield from contents(f"{name}, unpacked", gzip.decompress(data))
    if data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.namelist():
                yield from contents(f"{name}: {member}", archive.read(member))


def found_in(folder: Path) -> list[str]:
    """Names and files below `folder` that hold a canary, in bytes or as UTF-16."""
    found = [str(path) for path in folder.rglob("*") if any(c.decode() in path.name for c in CANARIES)]
    for path in folder.rglob("*"):
        if path.is_file():
            for name, data in contents(str(path), path.read_bytes()):
                found += [f"{name}: {c!r}" for c in CANARIES if c in data or c.decode().encode("utf-16-le") in data]
    return found


def mark(path: Path) -> None:
    """Fill every free text of a NIfTI file."""
    image = nibabel.load(path)
    header = image.header
    for field in ("descrip", "aux_file", "intent_name", "db_name", "data_type"):
        header[field] = b"CANARY"
    header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"CANARY^NAME born 19000101"))
    marked = nibabel.Nifti1Image(np.asarray(image.dataobj), image.affine, header)
    data = marked.to_bytes()
    assert data.count(b"CANARY") >= 6
    path.write_bytes(gzip.compress(data))


def test_the_search_finds_what_is_hidden(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x/CANARY.txt").write_text("")
    with zipfile.ZipFile(tmp_path / "x/a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("in.gz", gzip.compress(b"..CANARY.."))
    (tmp_path / "x/wide").write_bytes("1.2.3.4".encode("utf-16-le"))
    assert len(found_in(tmp_path)) == 3


def test_no_patient_data_in_anything_that_is_written_or_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = write_cases(tmp_path / "data", 3), tmp_path / "out"
    for path in [*data.glob("images/*"), *data.glob("labels/*")]:
        mark(path)
    # a scanner's export: folder and files are called after the patient
    array = corpus.image((16, 20, 12))
    corpus.series(tmp_path / "CANARY^NAME 19000101", array, prefix="CANARY-")
    broken = tmp_path / "CANARY broken"
    corpus.series(broken, array, prefix="CANARY-", edit=lambda k, data: k != 5)
    out.mkdir()
    monkeypatch.chdir(out)
    (tmp_path / "tiny.yaml").write_text(to_yaml(tiny_pipeline(epochs=1)))
    said: list[str] = []

    def medseg(*arguments: Any, code: int = 0) -> None:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        shown = capfd.readouterr()
        said.extend((shown.out, shown.err))
        assert int(ended.value.code or 0) == code, shown.err

    where = ["--data", data]
    medseg("data", "check", "tiny", *where, "-o", "check.json")
    medseg("train", tmp_path / "tiny.yaml", *where, "-o", "runs", "--cache", "cache", "--device", "cpu")
    images = [data / "images", tmp_path / "CANARY^NAME 19000101"]
    medseg("predict", "runs", *images, "-o", "masks", "--save-probabilities")
    assert len(list((out / "masks").glob("*.nii.gz"))) == 4
    medseg("predict", "runs", data / "images", "-o", "again")
    medseg("evaluate", "again", "tiny", *where, "--part", "training", "-o", "scores", "--workers", "1")
    medseg("report", "runs", "-o", "report.html")
    for form in ("package", "bundle", "onnx"):
        pytest.importorskip("onnxruntime")
        medseg("export", "runs", "--format", form, "-o", f"as_{form}")
    # an error names the input by its path, as the user did, on the screen; nothing of it goes into a file
    medseg("predict", "runs", broken, "-o", "failed", code=4)
    told = said.pop()
    assert "CANARY broken" in told or "CANARY broken" in said.pop()
    assert found_in(out) == []
    assert [text for text in said if any(canary.decode() in text for canary in CANARIES)] == []
