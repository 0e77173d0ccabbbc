"""`data pages`: each page of a stack is a picture with the very numbers of that page."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

from medseg.checking import check_dataset
from medseg.cli import app
from medseg.config import load_dataset
from medseg.data import find_cases, load_sample
from medseg.entry import add_dataset
from medseg.entry_pages import split_stacks
from medseg.errors import DataError, UsageError


@pytest.mark.parametrize(
    ("kind", "imagej"),
    [
        (np.uint8, False),
        (np.uint16, False),
        (np.int16, False),
        (np.float32, False),
        (np.uint8, True),
        (np.uint16, True),
    ],
)
def test_pages_hold_the_numbers_of_the_stack(tmp_path, kind, imagej):
    stack = (np.random.default_rng(0).random((12, 9, 14)) * 200).astype(kind)
    tifffile.imwrite(tmp_path / "a.tif", stack, imagej=imagej, photometric="minisblack")
    files = split_stacks([tmp_path / "a.tif"], tmp_path / "pages")
    assert [file.name for file in files] == [f"a_{page:02d}.tif" for page in range(12)]
    for file, page in zip(files, stack, strict=True):
        found = tifffile.imread(file)
        assert found.dtype == kind
        np.testing.assert_array_equal(found, page)


def test_pages_in_colour(tmp_path):
    stack = np.random.default_rng(0).integers(0, 255, (4, 9, 14, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="rgb")
    files = split_stacks([tmp_path / "a.tif"], tmp_path / "pages")
    np.testing.assert_array_equal([tifffile.imread(file) for file in files], stack)


def test_nothing_is_replaced_and_nothing_half_written(tmp_path):
    for name in ("a", "b"):
        tifffile.imwrite(tmp_path / f"{name}.tif", np.zeros((3, 8, 8), np.uint8), photometric="minisblack")
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "b_2.tif").write_bytes(b"mine")
    with pytest.raises(UsageError, match="there already") as caught:
        split_stacks([tmp_path / "a.tif", tmp_path / "b.tif"], tmp_path / "pages")
    assert caught.value.file.endswith("b_2.tif")
    assert [path.name for path in (tmp_path / "pages").iterdir()] == ["b_2.tif"]
    with pytest.raises(UsageError, match="there already"):  # two stacks of one name
        split_stacks([tmp_path / "a.tif", tmp_path / "a.tif"], tmp_path / "other")
    assert not (tmp_path / "other").exists()
    tifffile.imwrite(tmp_path / "one.tif", np.zeros((8, 8), np.uint8))
    with pytest.raises(DataError, match="E310"):
        split_stacks([tmp_path / "a.tif", tmp_path / "one.tif"], tmp_path / "other")
    with pytest.raises(DataError, match="E308"):
        split_stacks([tmp_path / "none.tif"], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_published_stack_becomes_a_2d_set(tmp_path):
    folder = tmp_path / "ISBI2012"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 255, (11, 32, 40), dtype=np.uint8)
    labels = np.zeros((11, 32, 40), np.uint8)
    for page in range(11):
        labels[page, 4 : 10 + page, 8:30] = 255
    stacks = {folder / "train-volume.tif": images, folder / "train-labels.tif": labels}
    for path, stack in stacks.items():
        tifffile.imwrite(path, stack, photometric="minisblack")
    found = CliRunner().invoke(app, ["data", "pages", *map(str, stacks), "-o", str(folder / "pages")])
    assert found.exit_code == 0, found.output
    add_dataset("own", tmp_path, images="ISBI2012/pages/*volume*.tif", labels="ISBI2012/pages/*labels*.tif")
    for spec in (load_dataset("own", root=tmp_path), load_dataset("isbi2012")):
        assert check_dataset(spec, tmp_path).problems == []
        cases = find_cases(spec, tmp_path)
        assert [case.id for case in cases] == [f"{page:02d}" for page in range(11)]
        for page, case in enumerate(cases):
            sample = load_sample(case, spec)
            np.testing.assert_array_equal(np.asarray(sample["image"])[0], images[page])
            np.testing.assert_array_equal(np.asarray(sample["label"])[0], labels[page] // 255)
