"""Segmentations of 3D Slicer: what is expected is drawn on the whole grid, files are written byte by byte."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from medseg.config import load_dataset
from medseg.data import find_cases, load_sample
from medseg.errors import FormatError, GeometryError, LabelError, MedsegError, UsageError
from medseg.volumes import check_pair, read_geometry, read_image, read_label

SHAPE = (9, 8, 7)  # i, j, k of the image
# axes turned about z and one of them flipped, in RAS+
TURNED = np.array([[-0.8, 0.9, 0.0, 12.5], [-0.6, -1.2, 0.0, -3.25], [0.0, 0.0, 2.5, 40.0], [0, 0, 0, 1.0]])
PARAMETERS = "Collapse labelmaps|1|Merge.&Reference image geometry|{};|Describes it.&Smoothing factor|0.5|Range.&"


def nrrd(path: Path, array: np.ndarray, affine: np.ndarray, fields: dict[str, object]) -> Path:
    """Write (i, j, k) or, on layers, (layer, i, j, k): the first index runs fastest; positions are LPS."""
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    vectors = [f"({','.join(repr(float(v)) for v in column)})" for column in lps[:3, :3].T]
    layers = array.ndim == 4
    header = [
        "NRRD0004", f"type: {'unsigned char' if array.dtype == np.uint8 else 'short'}", f"dimension: {array.ndim}",
        "space: left-posterior-superior", f"sizes: {' '.join(map(str, array.shape))}",
        f"space directions: {' '.join((['none'] if layers else []) + vectors)}",
        f"kinds: {'list ' if layers else ''}domain domain domain", "endian: little", "encoding: gzip",
        f"space origin: ({','.join(repr(float(v)) for v in lps[:3, 3])})",
        *(f"{key}:={value}" for key, value in fields.items()),
    ]  # fmt: skip
    path.write_bytes("\n".join([*header, "", ""]).encode() + gzip.compress(array.tobytes(order="F")))
    return path


def reference(affine: np.ndarray, shape: tuple[int, ...] = SHAPE, first: tuple[int, ...] = (0, 0, 0)) -> str:
    """The image's grid as 3D Slicer writes it: the matrix by rows (RAS+), then first and last index of each axis."""
    ends = [str(n) for low, count in zip(first, shape, strict=True) for n in (low, low + count - 1)]
    return PARAMETERS.format(";".join([*(repr(float(v)) for v in affine.ravel()), *ends]))


def segments(*listed: tuple[str, int, int]) -> dict[str, object]:
    """Fields of segments (name, number, layer)."""
    fields: dict[str, object] = {}
    for number, (name, value, layer) in enumerate(listed):
        own = {"ID": f"Segment_{number + 1}", "Name": name, "LabelValue": value, "Layer": layer, "Color": "0.5 0.7 0.4"}
        fields |= {f"Segment{number}_{key}": text for key, text in own.items()}
    return fields


def cut(path: Path, whole: np.ndarray, start: tuple[int, ...], stop: tuple[int, ...], fields: dict, **how) -> Path:
    """The box of a label image as a segmentation, with the grid of the whole among its parameters."""
    box = whole[tuple(map(slice, start, stop))]
    affine = TURNED.copy()
    affine[:3, 3] += affine[:3, :3] @ np.array(start)
    text = how.get("text", reference(TURNED))
    return nrrd(path, box, affine, {**fields, "Segmentation_ConversionParameters": text})


def drawing(liver: int = 1, tumour: int = 2) -> np.ndarray:
    whole = np.zeros(SHAPE, np.uint8)
    whole[2:6, 3:7, 1:4] = liver
    whole[3, 4:6, 2] = tumour
    return whole


NAMES = {0: "background", 1: "liver", 2: "tumour"}


@pytest.mark.parametrize("numbers", [(1, 2), (2, 1), (7, 3)])
def test_segments_are_found_by_name_on_the_grid_of_their_image(tmp_path: Path, numbers: tuple[int, int]) -> None:
    listed = segments((" Liver", numbers[0], 0), ("TUMOUR", numbers[1], 0))
    path = cut(tmp_path / "a.seg.nrrd", drawing(*numbers), (2, 3, 1), (6, 7, 4), listed)
    label = read_label(path, dims=3, names=NAMES, allowed=NAMES, mapping={1: 1})
    np.testing.assert_array_equal(label.array[0], drawing())
    image = read_image(nrrd(tmp_path / "a.nrrd", drawing().astype(np.int16), TURNED, {}))
    check_pair(image, label)
    np.testing.assert_allclose(label.geometry.affine, TURNED, atol=1e-9)
    assert read_geometry(path)[0] == label.geometry
    assert (label.segments, label.notes) == ({}, ())
    stored = read_label(path)  # nobody names labels: numbers as they are, with what they are called
    np.testing.assert_array_equal(stored.array[0], drawing(*numbers))
    assert dict(stored.segments) == {numbers[0]: "Liver", numbers[1]: "TUMOUR"}


def test_the_image_may_begin_at_another_index_and_the_box_stick_out_of_it(tmp_path: Path) -> None:
    whole = drawing()
    affine = TURNED.copy()
    affine[:3, 3] -= affine[:3, :3] @ [4, 0, 0]  # index 4 is the image's first along i
    fields = segments(("liver", 1, 0), ("tumour", 2, 0))
    path = cut(tmp_path / "a.seg.nrrd", whole, (2, 3, 1), (6, 7, 4), fields, text=reference(affine, first=(4, 0, 0)))
    label = read_label(path, names=NAMES)
    np.testing.assert_array_equal(label.array[0], whole)
    np.testing.assert_allclose(label.geometry.affine, TURNED, atol=1e-9)
    small = reference(TURNED, shape=(4, 8, 3))  # i up to 3, k up to 2
    label = read_label(cut(tmp_path / "b.seg.nrrd", whole, (2, 3, 1), (6, 7, 4), fields, text=small), names=NAMES)
    np.testing.assert_array_equal(label.array[0], whole[:4, :, :3])
    affine = TURNED.copy()
    affine[:3, 3] += affine[:3, :3] @ [3, 0, 2]  # the box begins before the image
    inner = reference(affine, shape=(6, 8, 5))
    label = read_label(cut(tmp_path / "c.seg.nrrd", whole, (2, 3, 1), (6, 7, 4), fields, text=inner), names=NAMES)
    np.testing.assert_array_equal(label.array[0], whole[3:, :, 2:])


def test_of_overlapping_segments_the_later_one_has_the_voxel(tmp_path: Path) -> None:
    layers = np.zeros((2, *SHAPE), np.uint8)
    layers[0][drawing() > 0] = 1  # the liver with its tumour
    layers[1][drawing() == 2] = 1
    layers[0][0, 0, 0] = 2  # a third segment on the first layer
    fields = segments(("liver", 1, 0), ("tumour", 1, 1), ("vessel", 2, 0))
    path = nrrd(tmp_path / "a.seg.nrrd", layers, TURNED, fields)
    names = {**NAMES, 3: "vessel"}
    expected = drawing()
    expected[0, 0, 0] = 3
    label = read_label(path, dims=3, names=names)
    np.testing.assert_array_equal(label.array[0], expected)
    assert label.notes == ("2 voxels are in several segments; the later one has them",)
    assert read_geometry(path)[0].shape == SHAPE
    assert read_geometry(path)[1] == 1
    old = {f"Segment{n}_Name": name for n, name in enumerate(("liver", "tumour"))}  # before layers and numbers
    label = read_label(nrrd(tmp_path / "b.seg.nrrd", (layers == 1).astype(np.uint8), TURNED, old), names=NAMES)
    np.testing.assert_array_equal(label.array[0], drawing())


def test_a_segment_that_is_no_label_is_refused_only_where_it_is_drawn(tmp_path: Path) -> None:
    fields = segments(("liver", 1, 0), ("cyst", 2, 0), ("unused", 3, 0))
    path = nrrd(tmp_path / "a.seg.nrrd", drawing(), TURNED, fields)
    with pytest.raises(LabelError) as caught:
        read_label(path, names=NAMES, case="a")
    assert (caught.value.code, caught.value.case) == ("E332", "a")
    assert caught.value.found == "`cyst` in 2 voxels"
    assert read_label(path, names={0: "background", 1: "liver", 2: "Cyst"}).array.max() == 2
    with pytest.raises(LabelError, match="E332") as caught:  # a number alone does not say which is which
        read_label(path, names={0: "background", 1: "organ", 2: "lesion"})
    assert caught.value.found == "`liver` in 46 voxels, `cyst` in 2 voxels"
    one = nrrd(tmp_path / "b.seg.nrrd", np.minimum(drawing(), 1), TURNED, segments(("Segment_1", 1, 0)))
    label = read_label(one, names={0: "outside", 1: "organ"})  # one structure, whatever it was called
    np.testing.assert_array_equal(label.array[0], drawing() > 0)
    assert "1 = Segment_1" in label.notes[0]


def test_nothing_drawn_is_one_voxel_and_an_empty_label(tmp_path: Path) -> None:
    fields = {**segments(("liver", 1, 0)), "Segmentation_ConversionParameters": reference(TURNED)}
    path = nrrd(tmp_path / "a.seg.nrrd", np.ones((1, 1, 1), np.uint8), np.eye(4), fields)
    label = read_label(path, names=NAMES)
    assert label.array.shape == (1, *SHAPE)
    assert not label.array.any()
    assert any("E333" in note for note in label.notes)


@pytest.mark.parametrize(
    "text",
    [
        "",
        reference(TURNED * [[1.01], [1.01], [1.01], [1]]),  # other voxels
        reference(TURNED + np.array([[0, 0, 0, 0.3], [0] * 4, [0] * 4, [0] * 4])),  # between voxels
        reference(TURNED, shape=(100000, 100000, 100000)),  # a header's claim
        reference(TURNED, shape=(0, 8, 7)),
        reference(np.zeros((4, 4))),
        reference(np.full((4, 4), np.nan)),
        reference(TURNED).replace("0;8", "0;inf"),
        reference(TURNED).replace("0;8", "-1e300;1e300"),
        PARAMETERS.format("1;0;0"),
        PARAMETERS.format("a;b"),
    ],
)
def test_without_a_grid_that_fits_the_box_stays_where_it_is(tmp_path: Path, text: str) -> None:
    fields = segments(("liver", 1, 0), ("tumour", 2, 0))
    path = cut(tmp_path / "a.seg.nrrd", drawing(), (2, 3, 1), (6, 7, 4), fields, text=text)
    label = read_label(path, names=NAMES)
    np.testing.assert_array_equal(label.array[0], drawing()[2:6, 3:7, 1:4])
    assert read_geometry(path)[0] == label.geometry
    with pytest.raises(GeometryError, match="E320"):
        check_pair(read_image(nrrd(tmp_path / "a.nrrd", drawing().astype(np.int16), TURNED, {})), label)


@pytest.mark.parametrize(("field", "value"), [("LabelValue", "one"), ("LabelValue", "0"), ("Layer", "9")])
def test_a_damaged_list_of_segments_is_refused(tmp_path: Path, field: str, value: str) -> None:
    layers = np.stack([drawing() > 0, drawing() > 1]).astype(np.uint8)
    fields = segments(("liver", 1, 0), ("tumour", 1, 1)) | {f"Segment1_{field}": value}
    with pytest.raises(FormatError, match="E305"):
        read_label(nrrd(tmp_path / "a.seg.nrrd", layers, TURNED, fields), names=NAMES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, whose segmentations number liver and tumour in two ways."""
    rng = np.random.default_rng(0)
    for number in range(3):
        whole = drawing(*((1, 2) if number < 2 else (2, 1)))
        image = rng.integers(0, 50, SHAPE).astype(np.int16) + drawing() * np.int16(100)
        nrrd(tmp_path / f"p{number}.nrrd", image, TURNED, {})
        listed = [("liver", int(whole[2, 3, 1]), 0), ("tumour", int(whole[3, 4, 2]), 0)]
        cut(
            tmp_path / f"p{number}.seg.nrrd", whole, (2, 3, 1), (6, 7, 4), segments(*sorted(listed, key=lambda s: s[1]))
        )
    return tmp_path


def test_data_add_takes_names_of_segments_and_reads_them_as_one_set(folder: Path) -> None:
    from medseg.checking import check_dataset
    from medseg.entry import add_dataset

    with pytest.raises(UsageError, match="names of their own"):  # renamed, they would not be found in the files
        add_dataset("own", folder, images="p*.nrrd", labels="p*.seg.nrrd", names="1=organ,2=lesion")
    add_dataset("own", folder, images="p*.nrrd", labels="p*.seg.nrrd")
    facts = yaml.safe_load((folder / "datasets.yaml").read_text())["own"]
    assert facts["labels"] == {0: "background", 1: "liver", 2: "tumour"}
    assert "encoding" not in facts
    spec = load_dataset("own", root=folder)
    assert check_dataset(spec, folder).problems == []
    for case in find_cases(spec, folder):
        np.testing.assert_array_equal(np.asarray(load_sample(case, spec)["label"])[0], drawing())


def test_evaluate_reads_references_by_their_names(folder: Path) -> None:
    from medseg import evaluate

    (folder / "masks").mkdir()
    (folder / "references").mkdir()
    for number in range(3):
        nrrd(folder / "masks" / f"p{number}.nrrd", drawing(), TURNED, {})
        (folder / f"p{number}.seg.nrrd").rename(folder / "references" / f"p{number}.seg.nrrd")
        (folder / f"p{number}.nrrd").rename(folder / "references" / f"p{number}.nrrd")  # images are no references
    masks, references, out = folder / "masks", folder / "references", folder / "out"
    known = {"labels": "1=liver,2=tumour", "metrics": ["Dice"], "output": out}
    found = evaluate(masks, references, images=references, **known)
    assert [(row.label, row.value) for row in found.rows] == [("liver", 1.0), ("tumour", 1.0)] * 3
    told = json.loads((out / "summary.json").read_text())["notes"]
    assert not [note for note in told if "image" in note]  # each was shown under its masks
    with pytest.raises(UsageError, match="do not mean the same") as caught:
        evaluate(masks, references, metrics=["Dice"], output=out)
    assert "1 = liver" in str(caught.value.found)
    assert "1 = tumour" in str(caught.value.found)
    for path in (references / "p2.seg.nrrd", references / "p2.nrrd", masks / "p2.nrrd"):
        path.unlink()
    found = evaluate(masks, references, metrics=["Dice"], output=out)
    assert [(row.label, row.value) for row in found.rows] == [("liver", 1.0), ("tumour", 1.0)] * 2


def test_predict_takes_no_segmentation_in_a_folder_for_an_image(folder: Path) -> None:
    from medseg.inference.inputs import find_inputs

    found, refused = find_inputs([folder], folder / "out")
    assert [path.name for path in found] == ["p0.nrrd", "p1.nrrd", "p2.nrrd"]
    assert not refused
    with pytest.raises(UsageError, match="segmentations of 3D Slicer and no images"):
        find_inputs([str(folder / "*.seg.nrrd")], folder / "out")
    named, _ = find_inputs([folder / "p0.seg.nrrd"], folder / "out")  # what is named is always taken
    assert [path.name for path in named] == ["p0.seg.nrrd"]


def test_labels_with_and_without_segments_in_one_set_are_refused(folder: Path) -> None:
    from medseg.entry import add_dataset

    nrrd(folder / "p2.seg.nrrd", drawing(), TURNED, {})
    with pytest.raises(MedsegError, match="with and without names of segments"):
        add_dataset("own", folder, images="p*.nrrd", labels="p*.seg.nrrd")
