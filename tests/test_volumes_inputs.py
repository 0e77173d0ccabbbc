"""Names and listings: odd names work everywhere, order is natural, ids are unique."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import corpus
import nibabel
import numpy as np
import pytest
from other_user import as_other_user, needs_other_user

from medseg.config import DatasetSpec
from medseg.data import find_cases
from medseg.entry_files import expand
from medseg.errors import MedsegError, UsageError
from medseg.volumes import case_id, list_inputs, read_image, read_label, write_label

ODD_NAMES = [
    "with blank", "Ünïcode é", "肝脏", "'quoted' \"twice\"", "line\nbreak", "100% %s %(x)s", "-leading",
    "<script>x<script>",
    "[brackets] *?", "a" * 248, "$HOME `id` ; &", "..dots", "tab\there", "\u202eright",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_work_everywhere(tmp_path: Path, name: str) -> None:
    file = tmp_path / "in" / f"{name}.nii.gz"
    file.parent.mkdir()
    file.write_bytes(corpus.packed(corpus.nifti(corpus.image())))
    volume = read_image(file)
    assert case_id(file) == name
    if not name.startswith("."):  # hidden files are not listed in folders
        assert list_inputs([file.parent]) == [file]
    assert list_inputs([file]) == [file]
    target = tmp_path / "out" / file.name
    write_label(target, np.ones(volume.geometry.shape, np.uint8), volume)
    assert [p.name for p in target.parent.iterdir()] == [file.name]
    assert read_label(target, allowed={1}).array.all()
    for suffix in (".mha", ".png", ".tif"):
        other = tmp_path / f"{name[:240]}{suffix}"
        if suffix == ".mha":
            corpus.write_itk(tmp_path / "plain.mha", corpus.image())
            os.replace(tmp_path / "plain.mha", other)
        else:
            other.write_bytes((corpus.png if suffix == ".png" else corpus.tiff)(corpus.image((9, 8), np.uint8)))
        assert read_image(other).array.size


def test_listing_folders_patterns_and_clashes(tmp_path: Path) -> None:
    for name in ("liver_10.nii.gz", "liver_2.nii", "liver_1.nii.gz", ".hidden.nii", "notes.txt"):
        (tmp_path / name).write_bytes(corpus.nifti(corpus.image()))
    names = [path.name for path in list_inputs([tmp_path])]
    assert names == ["liver_1.nii.gz", "liver_2.nii", "liver_10.nii.gz"]
    assert [p.name for p in list_inputs([str(tmp_path / "*_1*.nii.gz"), tmp_path / "liver_1.nii.gz"])] == [
        "liver_1.nii.gz",
        "liver_10.nii.gz",
    ]
    (tmp_path / "liver_2.nii.gz").write_bytes(b"")
    with pytest.raises(UsageError, match="liver_2"):
        list_inputs([tmp_path])
    (tmp_path / "empty").mkdir()
    for wrong in (tmp_path / "empty", tmp_path / "none*", tmp_path / "none.nii"):
        with pytest.raises(UsageError) as caught:
            list_inputs([wrong])
        assert caught.value.code == "E103"
    with pytest.raises(UsageError):
        list_inputs([])


def test_an_input_in_two_spellings_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.nii.gz").write_bytes(corpus.packed(corpus.nifti(corpus.image())))
    (tmp_path / "link").symlink_to("in")
    monkeypatch.chdir(tmp_path)
    named = ["in/a.nii.gz", f"../{tmp_path.name}/in/a.nii.gz", "link", tmp_path / "in"]
    assert list_inputs(named) == [Path("in/a.nii.gz"), Path("link/b.nii.gz")]
    # a link with a name of its own is a case of its own
    (tmp_path / "in" / "c.nii.gz").symlink_to("a.nii.gz")
    assert [case_id(path) for path in list_inputs(["in"])] == ["a", "b", "c"]


def make_locked_patients(folder: Path) -> None:
    for name in ("p1", "p2", "p3"):
        (folder / name).mkdir()
        for part in ("ct", "seg"):
            (folder / name / f"{name}_{part}.nii.gz").write_bytes(corpus.packed(corpus.nifti(corpus.image())))
    (folder / "p2").chmod(0o000)  # neither its names nor its files
    (folder / "p3").chmod(0o444)  # its names, but not its files


def told(found: Any) -> Any:
    """Code and file of each problem, where there are any."""
    if isinstance(found, MedsegError):
        return [(problem.code, Path(problem.file or "").name) for problem in found.problems]
    return found


@needs_other_user
@pytest.mark.parametrize("pattern", ["", "*", "*/*_ct.nii.gz"])
def test_folders_that_cannot_be_read_are_inputs_that_fail(pattern: str) -> None:
    def work(folder: Path) -> list[str]:
        told = []
        for path in list_inputs([str(folder / pattern)]):
            try:
                read_image(path)
                told.append(path.name)
            except MedsegError as error:
                told.append(f"{path.name} {error.code}")
        return told

    files = ["p1_ct.nii.gz"] if "_ct" in pattern else ["p1_ct.nii.gz", "p1_seg.nii.gz"]
    assert as_other_user(make_locked_patients, work) == [*files, "p2 E308", "p3 E308"]


@needs_other_user
@pytest.mark.parametrize("pattern", ["{id}/{id}", "p2/{id}"])
def test_cases_in_folders_that_cannot_be_read_are_not_left_out_of_a_data_set(pattern: str) -> None:
    facts = {"name": "set", "title": "A set", "modality": "CT", "dims": 3, "channels": ["ct"], "unit": "mm"}
    files = [{"training": {"image": f"{pattern}_ct.nii.gz", "label": f"{pattern}_seg.nii.gz"}}]
    spec = DatasetSpec.from_dict({**facts, "labels": {0: "background", 1: "thing"}, "files": files})
    wanted = [("E308", name) for name in (["p2", "p3"] if pattern.startswith("{") else ["p2"])]
    found = as_other_user(make_locked_patients, lambda folder: [case.id for case in find_cases(spec, folder)])
    assert told(found) == wanted
    # nor of one that is to be described
    image = files[0]["training"]["image"]
    found = as_other_user(make_locked_patients, lambda folder: expand(folder, image, "--images"))
    assert told(found) == wanted[:1]


def test_common_files_of_other_kinds_are_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "a.hdr").write_bytes(b"\\\x01\x00\x00" + bytes(344))
    nibabel.Nifti1Image(np.zeros((4, 4, 3), np.uint8), np.eye(4)).to_filename(tmp_path / "v.nii")
    nibabel.Nifti1Image(np.zeros((4, 4, 3, 2), np.uint8), np.eye(4)).to_filename(tmp_path / "hot.nii")
    tried = [
        (lambda: read_image(tmp_path / "a.hdr"), "one .nii file"),
        (lambda: read_image(tmp_path / "v.nii", dims=2), "its slices as pictures"),
        (lambda: read_label(tmp_path / "hot.nii"), "argmax"),
    ]
    for read, fix in tried:
        with pytest.raises(MedsegError) as caught:
            read()
        assert fix in str(caught.value.fix)
