"""`data add`: a new folder described after looking at it, and readable as any other data set afterwards."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import corpus
import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image
from tiny import NNUNET_COLOURS

from medseg.checking import check_cases, check_dataset
from medseg.config import load_dataset
from medseg.data import find_cases, load_sample
from medseg.entry import add_dataset
from medseg.entry_pairing import instance_pattern, pair_patterns
from medseg.errors import MedsegError, UsageError


def save(path: Path, array, mode=np.uint8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, mode)).save(path)
    return path


def blob(value=255, shape=(16, 18)) -> np.ndarray:
    array = np.zeros(shape, np.uint8)
    array[4:9, 5:12] = value
    return array


def noise(seed, shape=(16, 18)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, shape)


def three(first, second, third, *, outside=0) -> np.ndarray:
    return np.where(blob() > 0, np.where(noise(1) > 128, first, np.where(noise(2) > 128, second, third)), outside)


def fill(root: Path, *, label=None, count=4) -> Path:
    for i in range(count):
        save(root / f"img/p{i}_x.png", noise(i))
        save(root / f"msk/p{i}_x_mask.png", blob() if label is None else label)
    return root


def refused(action, exit_code) -> list[MedsegError]:
    with pytest.raises(MedsegError) as caught:
        action()
    assert caught.value.exit_code == exit_code, str(caught.value)
    return list(caught.value.problems)


# --- pairing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "labels", "expected"),
    [
        (["i/a_1.png", "i/a_2.png"], ["m/a_1.png", "m/a_2.png"], ("i/{id}.png", "m/{id}.png")),
        (["i/a_1.png", "i/a_2.png"], ["m/a_1_mask.png", "m/a_2_mask.png"], ("i/{id}.png", "m/{id}_mask.png")),
        (["i/1_im.tif", "i/2_im.tif"], ["m/1_man.gif", "m/2_man.gif"], ("i/{id}_im.tif", "m/{id}_man.gif")),
        (["i/im_1.png", "i/im_2.png"], ["i/lab_1.png", "i/lab_2.png"], ("i/im_{id}.png", "i/lab_{id}.png")),
        (["p1/ct.nii.gz", "p2/ct.nii.gz"], ["p1/seg.nii.gz", "p2/seg.nii.gz"], ("{id}/ct.nii.gz", "{id}/seg.nii.gz")),
        (["p1/ct.nii.gz", "p2/ct.nii.gz"], ["seg/p1.nii.gz", "seg/p2.nii.gz"], ("{id}/ct.nii.gz", "seg/{id}.nii.gz")),
        (["d1/i/3.png", "d2/i/3.png"], ["d1/m/3.png", "d2/m/3.png"], ("{id}/i/3.png", "{id}/m/3.png")),
        (
            ["d1/i/3.png", "d2/i/3.png", "d2/i/4.png"],
            ["d1/m/3.png", "d2/m/3.png", "d2/m/4.png"],
            ("{folder}/i/{name}.png", "{folder}/m/{name}.png"),
        ),
        (["i/x.png"], ["m/x_mask.png"], ("i/{id}.png", "m/{id}_mask.png")),
        (["i/1.png", "i/2.png", "i/3.png"], ["m/1.png", "m/2.png", "m/9.png"], ("i/{id}.png", "m/{id}.png")),
        (["i/10.png", "i/11.png"], ["m/10.png", "m/11.png"], ("i/{id}.png", "m/{id}.png")),
    ],
)
def test_pairs_by_name(images, labels, expected):
    assert pair_patterns(images, labels) == expected


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (["i/apple.png", "i/pear.png"], ["m/1.png", "m/2.png"], "cannot be paired"),
        (["i/1.png", "i/2.png"], ["m/1_a.png", "m/1_b.png", "m/2_a.png", "m/2_b.png"], "several labels"),
        (["i/1.png", "i/2.jpg"], ["m/1.png", "m/2.png"], "several kinds"),
        (["i/1.png", "i/x/2.png"], ["m/1.png", "m/2.png"], "different depths"),
    ],
)
def test_what_cannot_be_paired(images, labels, message):
    with pytest.raises(UsageError, match=message) as caught:
        pair_patterns(images, labels)
    assert caught.value.fix


def test_folders_of_masks():
    images = ["s/a/images/a.png", "s/b/images/b.png"]
    masks = ["s/a/masks/1.png", "s/a/masks/2.png", "s/b/masks/7.png"]
    assert instance_pattern(images, masks) == ("s/{id}/images/{id}.png", "s/{id}/masks/*.png")
    assert instance_pattern(["i/a.png", "i/b.png"], ["m/a/1.tif", "m/b/1.tif"]) == ("i/{id}.png", "m/{id}/*.tif")


# --- entries ----------------------------------------------------------------------------------------------------


def test_pictures_with_masks(tmp_path):
    fill(tmp_path)
    result = add_dataset("mine", tmp_path, images="img/*.png", labels="msk/*.png", names="1=cell", group="^p[0-9]")
    assert (result.cases, result.file) == (4, tmp_path / "datasets.yaml")
    spec = load_dataset("mine", root=tmp_path)
    assert (spec.dims, spec.colour, spec.unit, spec.labels) == (2, "grey", "px", {0: "background", 1: "cell"})
    assert spec.encoding == {255: 1}
    assert spec.split.unit == "patient"
    sample = load_sample(find_cases(spec, tmp_path)[0], spec)
    assert sample["label"].unique().tolist() == [0, 1]
    assert check_cases(spec, tmp_path) == []
    assert any("16 x 18 pixels" in note for note in result.notes)
    # a second set goes below the first, and the first stays as it was
    before = (tmp_path / "datasets.yaml").read_text()
    add_dataset("other", tmp_path, images="img/{id}.png", labels="msk/{id}_mask.png")
    assert (tmp_path / "datasets.yaml").read_text().startswith(before.rstrip())
    assert load_dataset("mine", root=tmp_path) == spec


@pytest.mark.parametrize(
    ("label", "labels", "encoding", "ignore"),
    [
        (blob(1), {0, 1}, "index", None),
        (blob(255), {0, 1}, {255: 1}, None),
        (blob(7), {0, 1}, {7: 1}, None),
        (np.where(noise(1) > 128, 1, 2) * (blob() > 0), {0, 1, 2}, "index", None),
        (np.where(noise(1) > 128, 85, 170) * (blob() > 0), {0, 1, 2}, {85: 1, 170: 2}, None),
        (three(1, 2, 255), {0, 1, 2}, "index", 255),
        (three(1, 5, 255), {0, 1, 2}, {1: 1, 5: 2}, 255),
        (three(85, 170, 255), {0, 1, 2, 3}, {85: 1, 170: 2, 255: 3}, None),
        (three(60, 120, 255), {0, 1, 2, 3}, {60: 1, 120: 2, 255: 3}, None),
        (three(1, 2, 255, outside=1), {0, 1}, {1: 0, 2: 1}, 255),
        (np.where(blob() > 0, 2, 1), {0, 1}, {1: 0, 2: 1}, None),
    ],
)
def test_what_label_values_mean(tmp_path, label, labels, encoding, ignore):
    fill(tmp_path, label=label)
    add_dataset("mine", tmp_path, images="img/*.png", labels="msk/*.png")
    spec = load_dataset("mine", root=tmp_path)
    assert (set(spec.labels), spec.encoding, spec.ignore) == (labels, encoding, ignore)
    assert check_cases(spec, tmp_path) == []
    assert check_cases(spec, tmp_path) == []


def test_a_class_whose_palette_colour_is_grey_is_one_class_in_all_files(tmp_path):
    """Index 2 is grey: two files show it beside red, two show it alone."""
    fill(tmp_path)
    for i in range(4):
        index = blob(2)
        index[10:12] = i // 2
        picture = Image.fromarray(index).convert("P")
        picture.putpalette([0, 0, 0, 128, 0, 0, 128, 128, 128])
        picture.putdata(index.ravel().tolist())
        picture.save(tmp_path / f"msk/p{i}_x_mask.png")
    add_dataset("mine", tmp_path, images="img/*.png", labels="msk/*.png")
    spec = load_dataset("mine", root=tmp_path)
    assert (set(spec.labels), spec.encoding) == ({0, 1, 2}, "index")
    for case in find_cases(spec, tmp_path):
        label = load_sample(case, spec)["label"]
        assert int((label == 2).sum()) == 5 * 7  # the blob


@pytest.mark.parametrize(("low", "type"), [(np.uint8(1), np.uint8), (True, np.uint8), (np.uint8(255), np.uint16)])
def test_masks_of_1_in_some_files_and_255_in_others_are_one_structure(tmp_path, low, type):
    fill(tmp_path)
    for i in (1, 2):
        Image.fromarray(blob(1).astype(bool) if low is True else blob(low)).save(tmp_path / f"msk/p{i}_x_mask.png")
    for i in (0, 3):
        save(tmp_path / f"msk/p{i}_x_mask.png", blob(1).astype(type) * np.iinfo(type).max, type)
    high = 65535 if type is np.uint16 else 255
    added = add_dataset("mine", tmp_path, images="img/*.png", labels="msk/*.png", names=f"{high}=cell")
    assert any("taken as one structure" in note for note in added.notes)
    spec = load_dataset("mine", root=tmp_path)
    assert spec.labels == {0: "background", 1: "cell"}
    assert check_cases(spec, tmp_path) == []
    for case in find_cases(spec, tmp_path):
        np.testing.assert_array_equal(load_sample(case, spec)["label"][0], blob(1))


def test_1_and_255_in_one_file_are_two_classes(tmp_path):
    label = blob(1)
    label[10:12] = 255
    fill(tmp_path, label=label)
    add_dataset("mine", tmp_path, images="img/*.png", labels="msk/*.png")
    assert load_dataset("mine", root=tmp_path).encoding == {1: 1, 255: 2}


def test_numbered_objects_are_instances(tmp_path):
    fill(tmp_path, label=np.arange(16 * 18).reshape(16, 18) % 100)
    add_dataset("mine", tmp_path, images="img/*.png", labels="msk/*.png")
    spec = load_dataset("mine", root=tmp_path)
    assert spec.has_instances
    sample = load_sample(find_cases(spec, tmp_path)[0], spec)
    assert int(sample["instances"].max()) == 99
    assert sample["label"].unique().tolist() == [0, 1]


def numbered(count: int) -> np.ndarray:
    """Rows of single objects, with a row of background below."""
    array = np.zeros((16, 18), np.uint8)
    for number in range(1, count + 1):
        array[2 * number - 1] = number
    return array


@pytest.mark.parametrize("layout", ["msk/p{}_x_mask.png", "s/p{}_x/masks/m.png", "s/p{}_x/masks/p{}_x.png"])
def test_one_mask_of_numbered_objects_for_each_image(tmp_path, layout):
    for i in range(4):
        save(tmp_path / f"s/p{i}_x/image.png", noise(i))
        save(tmp_path / layout.format(i, i), numbered(i + 1))
    pattern = layout.replace("p{}_x", "*")
    result = add(tmp_path, images="s/*/image.png", labels=None, instances=pattern)
    written = {"image": "s/{id}/image.png", "instances": layout.replace("p{}_x", "{id}")}
    assert (result.cases, result.entry["files"]) == (4, {"training": written})
    spec = load_dataset("mine", root=tmp_path)
    cases = find_cases(spec, tmp_path)
    assert [int(load_sample(case, spec)["instances"].max()) for case in cases] == [1, 2, 3, 4]
    assert spec.labels == {0: "background", 1: "object"}
    assert check_cases(spec, tmp_path) == []
    assert not any("one object" in note for note in result.notes)


def test_one_mask_of_one_object_for_each_image_is_told(tmp_path):
    result = add(fill(tmp_path), labels=None, instances="msk/*.png")
    assert result.entry["files"]["training"]["instances"] == "msk/{id}_mask.png"
    assert any("each picture is taken to show one object" in note for note in result.notes)


@pytest.mark.parametrize(
    ("counts", "names", "told"),
    [
        ((2, 3, 1), None, "1 to 3"),
        ((0, 4), None, "0 to 4"),
        ((3, 3, 3), None, None),
        ((2, 1), None, None),
        ((2, 3), "1=a", None),
    ],
)
def test_labels_that_may_be_numbers_of_objects_are_told(tmp_path, counts, names, told):
    for i, count in enumerate(counts):
        save(tmp_path / f"img/p{i}.png", noise(i))
        save(tmp_path / f"msk/p{i}.png", numbered(count))
    notes = [note for note in add(tmp_path, names=names).notes if "--instances" in note]
    assert [note.split(" label")[0] for note in notes] == ([told] if told else [])


def test_coloured_labels(tmp_path):
    for i in range(3):
        save(tmp_path / f"img/{i}.png", np.stack([noise(i), noise(i + 9), noise(i + 20)], -1))
        colour = np.zeros((16, 18, 3))
        colour[:4], colour[4:6] = (255, 0, 0), (0, 0, 200)
        save(tmp_path / f"msk/{i}.png", colour)
    add_dataset("mine", tmp_path, images="img/*.png", labels="msk/*.png")
    spec = load_dataset("mine", root=tmp_path)
    assert spec.colours == {0: (0, 0, 0), 1: (255, 0, 0), 2: (0, 0, 200)}
    assert (spec.colour, spec.in_channels) == ("rgb", 3)
    label = load_sample(find_cases(spec, tmp_path)[0], spec)["label"][0]
    assert [int(label[0, 0]), int(label[5, 0]), int(label[9, 0])] == [1, 2, 0]


def painted(colour, shape=(16, 18)) -> np.ndarray:
    return (blob(1)[..., None] * np.array(colour)).astype(np.uint8)


@pytest.mark.parametrize("empty", [painted((0, 0, 0)), blob(0)])
def test_coloured_labels_some_of_which_show_no_colour(tmp_path, empty):
    """Red in two files, grey alone in one, nothing in the first."""
    fill(tmp_path)
    for i, label in enumerate((empty, painted((255, 0, 0)), painted((90, 90, 90)), painted((255, 0, 0)))):
        save(tmp_path / f"msk/p{i}_x_mask.png", label)
    add_dataset("mine", tmp_path, images="img/*.png", labels="msk/*.png")
    spec = load_dataset("mine", root=tmp_path)
    assert spec.colours == {0: (0, 0, 0), 1: (255, 0, 0), 2: (90, 90, 90)}
    shown = [set(load_sample(case, spec)["label"].unique().tolist()) for case in find_cases(spec, tmp_path)]
    assert shown == [{0}, {0, 1}, {0, 2}, {0, 1}]
    assert check_cases(spec, tmp_path) == []


def test_values_beside_colours_are_refused_by_name(tmp_path):
    fill(tmp_path, label=painted((255, 0, 0)))
    save(tmp_path / "msk/p2_x_mask.png", blob(1))
    (problem,) = refused(lambda: add_dataset("mine", tmp_path, images="img/*.png", labels="msk/*.png"), 3)
    assert problem.code == "E334"
    assert str(problem.file).endswith("p2_x_mask.png")
    many = np.stack([np.arange(288).reshape(16, 18) % 256, *np.zeros((2, 16, 18))], -1)
    save(tmp_path / "msk/p2_x_mask.png", many)
    (problem,) = refused(lambda: add_dataset("mine", tmp_path, images="img/*.png", labels="msk/*.png"), 3)
    assert str(problem.file).endswith("p2_x_mask.png")


def test_an_orientation_tag_is_told_when_adding_and_checking(tmp_path):
    fill(tmp_path)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(noise(2).astype(np.uint8)).save(tmp_path / "img/p2_x.png", exif=exif)
    added = add_dataset("mine", tmp_path, images="img/*.png", labels="msk/*.png")
    (note,) = (note for note in added.notes if note.startswith("E319"))
    assert "orientation tag 6 is not applied" in note
    assert "1 of 4 images" in note
    warnings = check_dataset(load_dataset("mine", root=tmp_path), tmp_path).warnings
    assert [(warning.code, warning.case) for warning in warnings] == [("E319", "p2_x")]


def test_grey_pictures_saved_in_colour_are_grey(tmp_path):
    fill(tmp_path)
    for i in range(4):
        save(tmp_path / f"img/p{i}_x.png", np.stack([noise(i)] * 3, -1))
    result = add_dataset("mine", tmp_path, images="img/*.png", labels="msk/*.png")
    assert result.entry["colour"] == "grey"
    assert any("read as grey" in note for note in result.notes)


def test_pictures_whose_palettes_hold_colours_are_coloured(tmp_path):
    fill(tmp_path)
    for i in range(4):
        image = Image.fromarray(noise(i).astype(np.uint8) % 4, mode="P")
        image.putpalette([0, 0, 0, 200, 30, 30, 30, 200, 30, 90, 90, 90])
        image.save(tmp_path / f"img/p{i}_x.png")
    entry = add_dataset("mine", tmp_path, images="img/*.png", labels="msk/*.png").entry
    assert (entry["colour"], entry["channels"]) == ("rgb", ["red", "green", "blue"])
    assert not check_dataset(load_dataset("mine", root=tmp_path), tmp_path).problems
    save(tmp_path / "img/p1_x.png", np.stack([noise(i) for i in range(3)], -1))
    (problem,) = refused(lambda: add_dataset("more", tmp_path, images="img/*.png", labels="msk/*.png"), 3)
    assert problem.code == "E314"


@pytest.mark.parametrize("stored_as", ["samples", "pages"])
@pytest.mark.parametrize("count", [2, 4, 5])
def test_samples_and_pages_that_are_no_colours_are_channels(tmp_path, count, stored_as):
    how = {"planarconfig": "separate"} if stored_as == "samples" else {"imagej": True, "metadata": {"axes": "CYX"}}
    fill(tmp_path)
    stored = {}
    for i in range(4):
        stored[f"p{i}_x"] = np.stack([noise(i + 10 * c) for c in range(count)]).astype(np.uint8)
        file, pixels = tmp_path / f"img/p{i}_x.tif", stored[f"p{i}_x"]
        tifffile.imwrite(file, pixels, photometric="minisblack", **how)
    added = add_dataset("mine", tmp_path, images="img/*.tif", labels="msk/*.png")
    assert f"{count} values in each pixel that are no colours: taken as channels" in added.notes
    assert added.entry["channels"] == [f"channel {i + 1}" for i in range(count)]
    assert "colour" not in added.entry
    spec = load_dataset("mine", root=tmp_path)
    for case in find_cases(spec, tmp_path):
        np.testing.assert_array_equal(load_sample(case, spec)["image"].numpy(), stored[case.id])


def test_pages_that_nobody_calls_channels_beside_pictures_as_labels_are_refused_with_what_to_do(tmp_path):
    fill(tmp_path)
    for i in range(4):
        pixels = np.stack([noise(i + 10 * c) for c in range(3)]).astype(np.uint8)
        tifffile.imwrite(tmp_path / f"img/p{i}_x.tif", pixels, photometric="minisblack", metadata=None)
    with pytest.raises(MedsegError, match="a stack where a picture is expected") as caught:
        add_dataset("mine", tmp_path, images="img/*.tif", labels="msk/*.png")
    assert len(caught.value.problems) == 4
    assert "if its pages are channels" in str(caught.value.problems[0])


def test_folders_of_instance_masks(tmp_path):
    for i in range(3):
        save(tmp_path / f"s/c{i}/images/c{i}.png", noise(i))
        save(tmp_path / f"s/c{i}/masks/1.png", blob())
        save(tmp_path / f"s/c{i}/masks/2.png", blob()[::-1])
    add_dataset("mine", tmp_path, images="s/*/images/*.png", instances="s/*/masks/*.png")
    spec = load_dataset("mine", root=tmp_path)
    assert load_sample(find_cases(spec, tmp_path)[0], spec)["instances"].unique().tolist() == [0, 1, 2]


def test_an_image_without_objects_in_a_folder_of_masks(tmp_path):
    for i in range(3):
        save(tmp_path / f"s/c{i}/images/c{i}.png", noise(i))
        save(tmp_path / f"s/c{i}/masks/1.png", blob() * (i > 0))
    save(tmp_path / "s/c2/masks/2.png", blob()[::-1])
    add_dataset("mine", tmp_path, images="s/*/images/*.png", instances="s/*/masks/*.png")
    spec = load_dataset("mine", root=tmp_path)
    assert check_cases(spec, tmp_path) == []
    sample = load_sample(find_cases(spec, tmp_path)[0], spec)
    assert (int(sample["instances"].max()), int(sample["label"].max())) == (0, 0)
    (tmp_path / "s/c0/masks/1.png").unlink()
    (problem,) = check_cases(spec, tmp_path)
    assert problem.code == "E350"
    assert "one mask that is all 0" in str(problem.fix)
    save(tmp_path / "s/c0/masks/1.png", blob(0))
    save(tmp_path / "s/c2/masks/2.png", blob(0))  # beside another mask it is a mistake, as before
    assert [(problem.code, problem.case) for problem in check_cases(spec, tmp_path)] == [("E336", "c2")]


def test_a_table_of_numbered_objects_needs_the_column_instances(tmp_path):
    fill(tmp_path, label=np.arange(288).reshape(16, 18) % 101)
    rows = "".join(f"img/p{i}_x.png,msk/p{i}_x_mask.png\n" for i in range(4))
    (tmp_path / "cases.csv").write_text("image,label\n" + rows)
    (problem,) = refused(lambda: add_dataset("mine", tmp_path, csv=tmp_path / "cases.csv"), 3)
    assert problem.fix == "name the column instances"
    assert not (tmp_path / "datasets.yaml").exists()
    (tmp_path / "cases.csv").write_text("image,instances\n" + rows)
    add_dataset("mine", tmp_path, csv=tmp_path / "cases.csv")
    assert check_cases(load_dataset("mine", root=tmp_path), tmp_path) == []


def test_names_are_those_of_stored_values(tmp_path):
    fill(tmp_path, label=three(2, 3, 3))
    data = {"images": "img/*.png", "labels": "msk/*.png"}
    (problem,) = refused(lambda: add_dataset("mine", tmp_path, names="1=liver", **data), 2)
    assert problem.expected == "0, 2, 3"
    add_dataset("mine", tmp_path, names="2=liver,0=rest", **data)
    spec = load_dataset("mine", root=tmp_path)
    assert (spec.labels, spec.encoding) == ({0: "rest", 1: "liver", 2: "label 3"}, {2: 1, 3: 2})
    fill(tmp_path, label=np.where(blob() > 0, 2, 1))  # 1 is the background
    add_dataset("other", tmp_path, names={1: "rest", 2: "liver"}, **data)
    assert load_dataset("other", root=tmp_path).labels == {0: "rest", 1: "liver"}
    for number, key in enumerate((1, 255)):
        fill(tmp_path)
        add_dataset(f"masks{number}", tmp_path, names={key: "cell"}, **data)
        assert load_dataset(f"masks{number}", root=tmp_path).labels == {0: "background", 1: "cell"}


def test_what_is_told_of_a_table(tmp_path):
    fill(tmp_path)
    rows = [f"img/p{i}_x.png,msk/p{i}_x_mask.png,g{i // 2}" for i in range(4)]
    table = tmp_path / "cases.csv"
    table.write_text("\n".join(["image,label,group", "", *rows]))
    notes = add_dataset("mine", tmp_path, csv=table).notes
    assert any("4 cases in 2 groups" in note for note in notes)
    assert not any("case of its own" in note for note in notes)
    table.write_text("\n".join(["image,label,group", "", *rows[:3], "img/p3_x.png,gone.png,g"]))
    (problem,) = refused(lambda: add_dataset("other", tmp_path, csv=table), 3)
    assert problem.field == "line 6"  # of the file: a header, a blank line, three rows, and this one
    parts = ["first", "first", "first", "held-out"]
    table.write_text("\n".join(["image,label,group,split", *map(",".join, zip(rows, parts, strict=True))]))
    (problem,) = refused(lambda: add_dataset("other", tmp_path, csv=table), 2)
    assert (problem.field, problem.found) == ("split", "first (3 rows), held-out (1 row)")
    assert problem.expected == "training, validation, test"


def test_mistakes_are_told_with_their_place(tmp_path):
    home = fill(tmp_path) / "Dataset001_x"
    save(home / "imagesTr/a_0000.png", noise(1))
    save(home / "labelsTr/a.png", blob(1))
    data = {"images": "img/*.png", "labels": "msk/*.png"}
    (problem,) = refused(lambda: add_dataset("mine", tmp_path, group="(", **data), 2)
    assert problem.field == "--group"
    good = {"channel_names": {"0": "grey"}, "labels": {"background": 0, "a": 1}, "file_ending": ".png"}
    for change, field, said in (
        ({"file_ending": ".tif"}, "file_ending", ".png"),
        ({"labels": ["background", "a"]}, "labels", '"liver": 1'),
        ({"labels": {"a": 1, "b": 2}}, None, "labels 0, 1, 2"),
        ({"labels": {"0": "a", "1": "a"}}, None, "a name of its own"),
    ):
        (home / "dataset.json").write_text(json.dumps({**good, **change}))
        (problem,) = refused(lambda: add_dataset("mine", tmp_path, folder="Dataset001_x"), 2)
        assert (problem.field, "dataset.json" in str(problem.file)) == (field, True)
        assert said in str(problem.expected)
    (tmp_path / "datasets.yaml").mkdir()
    (problem,) = refused(lambda: add_dataset("mine", tmp_path, **data), 2)
    assert (problem.file, problem.code) == (str(tmp_path / "datasets.yaml"), "E111")


@pytest.fixture
def scans(tmp_path) -> Path:
    """An MSD folder with two cases."""
    affine = np.diag([0.5, 0.5, 2.0, 1.0])
    for part, kind in (("imagesTr", np.int16), ("labelsTr", np.uint8)):
        (tmp_path / "T" / part).mkdir(parents=True)
        for name in "ab":
            array = (np.arange(4 * 5 * 6).reshape(4, 5, 6) % 3).astype(kind) + (ord(name) if kind is np.int16 else 0)
            nibabel.Nifti1Image(array, affine).to_filename(tmp_path / f"T/{part}/{name}.nii.gz")
    table = {
        "name": "Organ",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "organ", "2": "lesion"},
        "numTraining": 2,
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in "ab"],
    }
    (tmp_path / "T/dataset.json").write_text(json.dumps(table))
    return tmp_path


def test_an_msd_folder(scans):
    result = add_dataset("organ", scans, folder="T")
    spec = load_dataset("organ", root=scans)
    assert (spec.dims, spec.unit, spec.modality, spec.channels) == (3, "mm", "CT", ("CT",))
    assert spec.labels == {0: "background", 1: "organ", 2: "lesion"}
    assert any("0.5 x 0.5 x 2 mm" in note for note in result.notes)
    assert check_cases(spec, scans) == []


def test_an_nnunet_folder_with_void(scans):
    for name in "ab":
        (scans / f"T/imagesTr/{name}.nii.gz").rename(scans / f"T/imagesTr/{name}_0000.nii.gz")
    table = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "organ": 1, "ignore": 2},
        "file_ending": ".nii.gz",
    }
    (scans / "T/dataset.json").write_text(json.dumps(table))
    add_dataset("organ", scans, folder=scans / "T")
    spec = load_dataset("organ", root=scans)
    assert (spec.labels, spec.ignore) == ({0: "background", 1: "organ"}, 2)
    assert check_cases(spec, scans) == []
    (scans / "T/dataset.json").write_text(json.dumps({**table, "labels": {"background": 0, "whole": [1, 2]}}))
    (problem,) = refused(lambda: add_dataset("organ2", scans, folder="T"), 2)
    assert "regions" in (problem.fix or "")


def test_an_nnunet_folder_of_version_1(scans):
    for name in "ab":
        (scans / f"T/imagesTr/{name}.nii.gz").rename(scans / f"T/imagesTr/{name}_0000.nii.gz")
    add_dataset("organ", scans, folder="T")
    assert len(find_cases(load_dataset("organ", root=scans), scans)) == 2


@pytest.mark.parametrize("grey", [False, True])
def test_an_nnunet_folder_of_colour_pictures(tmp_path, grey):
    for i in range(4):
        bands = [noise(i)] * 3 if grey else [noise(i), noise(i + 9), noise(i + 20)]
        save(tmp_path / f"D/imagesTr/p{i}_0000.png", np.stack(bands, -1))
        save(tmp_path / f"D/labelsTr/p{i}.png", blob(1))
    (tmp_path / "D/dataset.json").write_text(json.dumps({**NNUNET_COLOURS, "numTraining": 4}))
    assert add_dataset("mine", tmp_path, folder="D").cases == 4
    spec = load_dataset("mine", root=tmp_path)
    assert (spec.colour, spec.channels) == ("rgb", ("R", "G", "B"))
    assert check_cases(spec, tmp_path) == []
    # the folder itself as the root, and a folder whose name is no text for a pattern
    assert add_dataset("same", tmp_path / "D", folder=".").cases == 4
    (tmp_path / "D").rename(tmp_path / "D{x}")
    (problem,) = refused(lambda: add_dataset("other", tmp_path, folder="D{x}"), 2)
    assert (problem.code, problem.found) == ("E120", "D{x}")


def nnunet_folder(root, label, labels):
    """Four grey pictures in nnU-Net's layout, with these labels in dataset.json."""
    home = fill(root, label=label) / "Dataset001_x"
    for i in range(4):
        for old, new in (
            (f"img/p{i}_x.png", f"imagesTr/p{i}_0000.png"),
            (f"msk/p{i}_x_mask.png", f"labelsTr/p{i}.png"),
        ):
            (home / new).parent.mkdir(parents=True, exist_ok=True)
            (root / old).rename(home / new)
    table = {"channel_names": {"0": "grey"}, "file_ending": ".png", "numTraining": 4, "labels": labels}
    (home / "dataset.json").write_text(json.dumps(table))


@pytest.mark.parametrize(
    ("values", "listed", "encoding", "names"),
    [
        ((0, 2), 2, "index", {0: "background", 1: "l1", 2: "named"}),  # 2 is named, though 1 does not occur
        ((0, 1, 2), 104, "index", None),
        (tuple(range(101)), 104, "index", None),  # so many are classes where dataset.json names them
        ((0, 100, 200, 250), 3, {100: 1, 200: 2, 250: 3}, None),
        ((0, 255), 1, {255: 1}, None),
        ((0, 1, 5), 3, None, None),
        ((0, 1, 2, 3), 2, None, None),
    ],
)
def test_values_of_a_folder_are_those_of_its_dataset_json(tmp_path, values, listed, encoding, names):
    label = np.zeros(16 * 18, np.uint8)
    label[: len(values)] = values
    nnunet_folder(tmp_path, label.reshape(16, 18), {"background": 0, **{f"l{i}": i for i in range(1, listed + 1)}})
    action = partial(add_dataset, "mine", tmp_path, folder="Dataset001_x", names="2=named" if names else None)
    if encoding is None:
        (problem,) = refused(action, 3)
        assert (problem.code, problem.field) == ("E332", "labels")
        assert problem.file.endswith("dataset.json")
        assert not (tmp_path / "datasets.yaml").exists()
        return
    assert not any("objects" in note for note in action().notes)
    spec = load_dataset("mine", root=tmp_path)
    assert (spec.encoding, len(spec.labels)) == (encoding, listed + 1)
    assert names is None or spec.labels == names
    assert {problem.code for problem in check_cases(spec, tmp_path)} <= {"E335"}  # a class that no case shows


def test_a_class_that_no_label_shows_moves_no_other(tmp_path):
    nnunet_folder(tmp_path, three(1, 3, 3), {"background": 0, "a": 1, "b": 2, "c": 3})
    add_dataset("mine", tmp_path, folder="Dataset001_x")
    spec = load_dataset("mine", root=tmp_path)
    for case in find_cases(spec, tmp_path):
        np.testing.assert_array_equal(load_sample(case, spec)["label"][0], three(1, 3, 3))


@pytest.mark.parametrize("values", [1, 2])
def test_a_fourth_axis_that_is_taken_as_channels_is_told(tmp_path, values):
    label = np.zeros((9, 8, 7), np.uint8)
    label[2:5, 2:5, 2:5] = 1
    (tmp_path / "im").mkdir()
    (tmp_path / "la").mkdir()
    for number in range(3):
        image = np.random.default_rng(number).normal(size=(*label.shape, values)).astype(np.float32)
        nibabel.Nifti1Image(image, np.eye(4)).to_filename(tmp_path / "im" / f"{number}.nii.gz")
        nibabel.Nifti1Image(label, np.eye(4)).to_filename(tmp_path / "la" / f"{number}.nii.gz")
    notes = add_dataset("scans", tmp_path, images="im/*.nii.gz", labels="la/*.nii.gz").notes
    assert len(load_dataset("scans", root=tmp_path).channels) == values
    assert any("points in time" in note for note in notes) == (values == 2)


def test_an_msd_folder_that_tells_other_channels_than_its_files_have(scans):
    file = scans / "T/dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "modality": {"0": "T1", "1": "T2"}}))
    (problem,) = refused(lambda: add_dataset("organ", scans, folder="T"), 3)
    assert (problem.code, problem.expected, problem.found) == ("E310", "2: T1, T2", "1")


def test_a_table(tmp_path):
    fill(tmp_path)
    rows = ["image;label;group", *(f"img/p{i}_x.png;msk/p{i}_x_mask.png;{i % 2}" for i in range(4))]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    add_dataset("mine", tmp_path, csv="t.csv")
    cases = find_cases(load_dataset("mine", root=tmp_path), tmp_path)
    assert [case.group for case in cases] == ["0", "1", "0", "1"]
    (tmp_path / "t.csv").write_text("\n".join(rows).replace("label", "truth"))
    (problem,) = refused(lambda: add_dataset("mine2", tmp_path, csv="t.csv"), 2)
    assert problem.field == "label"


@pytest.mark.parametrize(
    ("head", "message", "field"),
    [
        ("image;label", "cells without a column", "line 2"),  # patients whose column has no name: not passed over
        ("image;label;image", "several columns of one name", None),
    ],
)
def test_a_table_whose_cells_do_not_fit_its_columns(tmp_path, head, message, field):
    fill(tmp_path)
    rows = [head, *(f"img/p{i}_x.png;msk/p{i}_x_mask.png;p{i % 2};;" for i in range(4))]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    (problem,) = refused(lambda: add_dataset("mine", tmp_path, csv="t.csv"), 2)
    assert (problem.code, problem.message, problem.field) == ("E119", message, field)
    (tmp_path / "t.csv").write_text("\n".join(["image;label;group", *rows[1:]]))  # empty ones are nothing
    assert "2 groups" in add_dataset("mine", tmp_path, csv="t.csv").notes[-1]


# --- refusals ---------------------------------------------------------------------------------------------------


def add(root, **more):
    return add_dataset("mine", root, **{"images": "img/*.png", "labels": "msk/*.png", **more})


def test_missing_masks_and_images_are_told_together(tmp_path):
    fill(tmp_path)
    (tmp_path / "msk/p1_x_mask.png").unlink()
    (tmp_path / "img/p2_x.png").unlink()
    found = refused(lambda: add(tmp_path), 3)
    assert sorted((p.code, p.case) for p in found) == [("E350", "p1_x"), ("E351", "p2_x")]
    assert not (tmp_path / "datasets.yaml").exists()


@pytest.mark.parametrize(
    ("more", "exit_code", "code"),
    [
        ({"images": "none/*.png"}, 2, "E103"),
        ({"labels": None}, 2, "E101"),
        ({"instances": "msk/*.png"}, 2, "E101"),
        ({"csv": "x.csv"}, 2, "E101"),
        ({"images": None, "labels": None}, 2, "E101"),
        ({"images": None, "labels": None, "csv": "x.csv"}, 2, "E104"),
        ({"images": None, "labels": None, "folder": "img"}, 2, "E119"),
        ({"names": "cell"}, 2, "E101"),
        ({"names": "3=cell"}, 2, "E101"),
        ({"group": "("}, 2, "E114"),
        ({"group": "^q"}, 3, "E353"),
        ({"labels": "*/*.png"}, 2, "E120"),
    ],
)
def test_wrong_requests(tmp_path, more, exit_code, code):
    fill(tmp_path)
    found = refused(lambda: add(tmp_path, **more), exit_code)
    assert {problem.code for problem in found} == {code}
    assert not (tmp_path / "datasets.yaml").exists()


@pytest.mark.parametrize("name", ["", "a b", "../x", "1x", "x" * 80, "-x"])
def test_names_that_are_none(tmp_path, name):
    fill(tmp_path)
    refused(lambda: add_dataset(name, tmp_path, images="img/*.png", labels="msk/*.png"), 2)


def test_a_name_that_is_taken(tmp_path):
    fill(tmp_path)
    add(tmp_path)
    (problem,) = refused(lambda: add(tmp_path), 2)
    assert (problem.code, problem.fix) == (
        "E121", f"take another name, or remove its entry from {tmp_path / 'datasets.yaml'} to add it anew",
    )  # fmt: skip
    (problem,) = refused(lambda: add_dataset("liver", tmp_path, images="img/*.png", labels="msk/*.png"), 2)
    assert problem.fix == "take another name"


def test_mixed_kinds_are_refused_with_counts(tmp_path):
    fill(tmp_path)
    save(tmp_path / "img/p0_x.png", np.stack([noise(1), noise(2), noise(3)], -1))
    (problem,) = refused(lambda: add(tmp_path), 3)
    assert (problem.code, problem.found) == ("E314", "3 with 1 channels, 1 with 3 channels: p0_x")
    assert problem.file == str(tmp_path / "img/p0_x.png")
    save(tmp_path / "img/p0_x.png", noise(1), np.uint16)
    (problem,) = refused(lambda: add(tmp_path), 3)
    assert problem.code == "E318"


def test_everything_that_is_wrong_is_told_at_once(tmp_path):
    fill(tmp_path, count=9)
    (tmp_path / "msk/p0_x_mask.png").unlink()
    save(tmp_path / "img/p1_x.png", np.stack([noise(1), noise(2), noise(3)], -1))
    save(tmp_path / "img/p2_x.png", noise(2), np.uint16)
    save(tmp_path / "msk/p3_x_mask.png", blob(shape=(12, 18)))
    for name in ("img/p4_x.png", "msk/p5_x_mask.png"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:-30])
    (tmp_path / "img/p6_x.png").write_bytes(b"")
    found = refused(lambda: add(tmp_path), 3)
    assert sorted((p.code, Path(str(p.file)).name) for p in found) == [
        ("E302", "p6_x.png"), ("E303", "p4_x.png"), ("E303", "p5_x_mask.png"), ("E314", "p1_x.png"),
        ("E318", "p2_x.png"), ("E320", "p3_x_mask.png"), ("E350", "p0_x_mask.png"),
    ]  # fmt: skip
    assert all(p.fix for p in found)


def test_labels_that_compression_has_blurred(tmp_path):
    for i in range(3):
        save(tmp_path / f"img/{i}.png", noise(i))
        save(tmp_path / f"msk/{i}.jpg", blob())
        Image.open(tmp_path / f"msk/{i}.jpg").save(tmp_path / f"msk/{i}.png")  # the values are those of the JPEG
        save(tmp_path / f"one/{i}/a.png", blob())
        save(tmp_path / f"one/{i}/b.png", np.asarray(Image.open(tmp_path / f"msk/{i}.png")))
    for masks in ({"labels": "msk/*.jpg"}, {"labels": "msk/*.png"}, {"labels": None, "instances": "msk/*.png"}):
        problems = refused(lambda masks=masks: add(tmp_path, **masks), 3)
        assert all(problem.code == "E330" and "JPEG" in problem.message for problem in problems)
    entry = add(tmp_path, labels=None, instances="one/*/*.png")
    problems = check_cases(load_dataset(entry.name, root=tmp_path), tmp_path)
    assert [(problem.code, Path(problem.file).name) for problem in problems] == [("E330", "b.png")] * 3


def test_masks_that_were_halved_are_told_from_classes_of_the_same_greys(tmp_path):
    """Means of four pixels of 0 and 255 are 64, 128 and 191: five classes, it was said."""
    y, x = np.mgrid[:64, :64]
    thick = np.select([x < 12 * n for n in range(1, 5)], [0, 64, 128, 191], 255)
    for i in range(3):
        save(tmp_path / f"img/{i}.png", noise(i, (32, 32)))
        disc = Image.fromarray(np.where((y - 30) ** 2 + (x - 33) ** 2 < (18 + i) ** 2, 255, 0).astype(np.uint8))
        save(tmp_path / f"half/{i}.png", np.asarray(disc.reduce(2)))
        save(tmp_path / f"line/{i}.png", np.where((y == x) & (i == 1), 128, np.asarray(disc))[16:48, 16:48])
        save(tmp_path / f"thick/{i}.png", thick[::2, ::2])
        save(tmp_path / f"mixed/{i}.png", thick[::2, ::2] if i == 2 else np.asarray(disc.reduce(2)))
    (problem,) = refused(lambda: add(tmp_path, labels="half/*.png"), 3)
    assert (problem.code, Path(problem.file).name) == ("E330", "0.png")
    assert problem.found.startswith("0, 64, 128, 191, 255: ")
    add_dataset("half", tmp_path, images="img/*.png", labels="half/*.png", names="64=a,128=b,191=c,255=d")
    for folder, count in (("thick", 5), ("mixed", 5), ("line", 3)):
        add_dataset(folder, tmp_path, images="img/*.png", labels=f"{folder}/*.png")
        assert len(load_dataset(folder, root=tmp_path).labels) == count


def test_labels_that_are_all_empty(tmp_path):
    fill(tmp_path, label=np.zeros((16, 18)))
    (problem,) = refused(lambda: add(tmp_path), 3)
    assert problem.code == "E335"
    assert "see whether these are the label images" in str(problem.fix)


def test_images_that_cannot_be_told_from_other_files(tmp_path):
    for i in range(3):
        save(tmp_path / f"all/{i}.png", noise(i))
        save(tmp_path / f"all/{i}_mask.png", blob())
    save(tmp_path / "all/overview.png", noise(9))
    (problem,) = refused(lambda: add(tmp_path, images="all/?.png", labels="all/*_mask.png"), 2)
    assert (problem.code, problem.found) == ("E120", "all/overview.png")


def test_labels_that_were_not_named_are_not_taken(tmp_path):
    """The pattern that the two named labels fit is that of all four: half of them must not come in without a word."""
    fill(tmp_path)
    (problem,) = refused(lambda: add_dataset("mine", tmp_path, images="img/*.png", labels="msk/p[01]*.png"), 2)
    assert (problem.code, problem.field) == ("E120", "--labels")
    assert problem.found == "msk/p2_x_mask.png, msk/p3_x_mask.png"


@pytest.mark.parametrize(("images", "labels"), [("PNG", "PNG"), ("png", "Png")])
def test_suffixes_in_capitals(tmp_path, images, labels):
    fill(tmp_path)
    for file in [*tmp_path.glob("img/*"), *tmp_path.glob("msk/*")]:
        file.rename(file.with_suffix(f".{images if file.parent.name == 'img' else labels}"))
    result = add(tmp_path, images=f"img/*.{images}", labels=f"msk/*.{labels}")
    expected = {"image": f"img/{{id}}.{images}", "label": f"msk/{{id}}_mask.{labels}"}
    assert (result.cases, result.entry["files"]) == (4, {"training": expected})
    assert check_cases(load_dataset("mine", root=tmp_path), tmp_path) == []
    # asked for in the other spelling
    (problem,) = refused(lambda: add_dataset("other", tmp_path, images="img/*.pnG", labels="msk/*"), 2)
    assert (problem.code, "img/p0_x." + images in (problem.fix or "")) == ("E103", True)


def test_suffixes_in_capitals_and_small_letters_lose_no_file_silently(tmp_path):
    fill(tmp_path, count=6)
    for i in range(2):
        (tmp_path / f"img/p{i}_x.png").rename(tmp_path / f"img/p{i}_x.PNG")
    (problem,) = refused(lambda: add(tmp_path, images="img/*"), 2)
    assert (problem.code, problem.found) == ("E120", "4 of .png, 2 of .PNG")
    assert "rename" in (problem.fix or "")
    for i in range(2):
        (tmp_path / f"msk/p{i}_x_mask.png").rename(tmp_path / f"msk/p{i}_x_mask.PNG")
    result = add(tmp_path)  # img/*.png: what was asked for, and a line that says what was not
    assert result.cases == 4
    left = [note for note in result.notes if "left out" in note]
    assert ["2 (img/p0_x.PNG, img/p1_x.PNG)" in left[0], "msk/p0_x_mask.PNG" in left[1]] == [True, True]


def test_masks_with_suffixes_in_capitals():
    masks = ["m/a/1.TIF", "m/b/1.TIF"]
    assert instance_pattern(["i/a.PNG", "i/b.PNG"], masks) == ("i/{id}.PNG", "m/{id}/*.TIF")
    with pytest.raises(UsageError, match="capitals"):
        instance_pattern(["i/a.png", "i/b.png"], ["m/a/1.TIF", "m/b/1.tif"])


@pytest.mark.parametrize("folder", ["img [1]", "a[bc]", "x{y}", "what?", "st*r"])
def test_a_folder_whose_name_looks_like_a_pattern(tmp_path, folder, monkeypatch):
    fill(tmp_path)
    (tmp_path / "img").rename(tmp_path / folder)
    monkeypatch.chdir(tmp_path.parent)
    for number, before in enumerate(("", f"{tmp_path.name}/", f"{tmp_path}/")):
        name, images = f"set{number}", f"{before}{folder}/*.png"
        if set("{}*") & set(folder):
            (problem,) = refused(partial(add_dataset, name, tmp_path, images=images, labels="msk/*.png"), 2)
            assert (problem.code, problem.file) == ("E120", f"{folder}/p0_x.png")
            assert "rename" in (problem.fix or "")
        else:
            assert add_dataset(name, tmp_path, images=images, labels="msk/*.png").cases == 4
            assert check_cases(load_dataset(name, root=tmp_path), tmp_path) == []


def test_a_folder_where_files_are_expected(tmp_path):
    fill(tmp_path, count=3)
    save(tmp_path / "img/extra.tif", noise(1))
    (tmp_path / "img/notes.txt").write_text("x")
    for images in ("img", "img/", "im?"):
        (problem,) = refused(lambda images=images: add(tmp_path, images=images), 2)
        assert (problem.code, problem.field, problem.file) == ("E103", "--images", "img")
        assert problem.found == "a folder with 3 .png, 1 .tif, 1 .txt"
        assert problem.fix == "name the files in it: --images 'img/*.png'"
    (problem,) = refused(lambda: add(tmp_path, labels="msk", images="img/*.png"), 2)
    assert (problem.field, "'msk/*.png'" in (problem.fix or "")) == ("--labels", True)
    (tmp_path / "empty").mkdir()
    (problem,) = refused(lambda: add(tmp_path, images="empty"), 2)
    assert problem.found == "a folder with no files"


def test_folders_of_slices_are_images(tmp_path):
    for name in "ab":
        for number in range(3):
            (tmp_path / f"ct/{name}").mkdir(parents=True, exist_ok=True)
            (tmp_path / f"ct/{name}/1.2.{number}").write_bytes(bytes(128) + b"DICM")
        save(tmp_path / f"ct/{name}/preview.jpg", noise(1))
        save(tmp_path / f"seg/{name}.png", blob())
    found = refused(lambda: add(tmp_path, images="ct/*", labels="seg/*.png"), 3)
    assert {problem.code for problem in found} == {"E340"}  # taken for series, whose headers are none


def test_series_with_a_label_for_each(tmp_path):
    """Their ids are hashes, but labels are found by what the folders are called."""
    affine = np.diag([-0.8, -0.8, 2.0, 1.0])
    label = np.zeros((8, 6, 4), np.uint8)
    label[2:5, 1:4, 1:3] = 1
    stored = {}
    for number, name in enumerate(("anna", "bert", "cara")):
        stored[name] = np.random.default_rng(number).integers(-900, 900, label.shape).astype(np.int16)
        corpus.series(tmp_path / name / "ct", stored[name], affine, uid=f"1.2.3.{number + 4}")
        nibabel.save(nibabel.Nifti1Image(np.roll(label, number, 0), affine), tmp_path / name / "seg.nii.gz")
    assert add(tmp_path, images="*/ct", labels="*/seg.nii.gz").cases == 3
    spec = load_dataset("mine", root=tmp_path)
    for case in find_cases(spec, tmp_path):
        name = case.images[0].parent.name
        assert (name in case.id, case.label) == (False, tmp_path / name / "seg.nii.gz")
        np.testing.assert_array_equal(load_sample(case, spec)["image"][0].numpy(), stored[name])
    (tmp_path / "dora").mkdir()
    nibabel.save(nibabel.Nifti1Image(label, affine), tmp_path / "dora" / "seg.nii.gz")
    corpus.series(tmp_path / "emil" / "ct", stored["anna"], affine, uid="1.2.3.4")  # the same once more
    (tmp_path / "emil" / "seg.nii.gz").write_bytes((tmp_path / "anna" / "seg.nii.gz").read_bytes())
    found = refused(lambda: find_cases(spec, tmp_path), 3)
    assert sorted((problem.code, str(problem.file)) for problem in found) == [
        ("E351", str(tmp_path / "dora" / "seg.nii.gz")),
        ("E352", str(tmp_path / "emil" / "ct")),
    ]


def test_two_images_of_one_id_lose_none_of_them(tmp_path):
    for folder, name in (("p1", "2_3"), ("p1_2", "3")):  # both p1_2_3
        save(tmp_path / folder / "img" / f"{name}.png", noise(1))
        save(tmp_path / folder / "msk" / f"{name}.png", blob())
    (problem,) = refused(lambda: add(tmp_path, images="*/img/*.png", labels="*/msk/*.png"), 2)
    assert (problem.code, problem.case) == ("E352", "p1_2_3")


def test_labels_with_transparency_are_refused_as_data_check_refuses_them(tmp_path):
    fill(tmp_path)
    for i in range(4):
        save(tmp_path / f"msk/p{i}_x_mask.png", np.stack([blob()] * 4, -1))  # nothing where nothing is
    found = refused(lambda: add(tmp_path), 3)
    assert [problem.code for problem in found] == ["E334"] * 4
    assert "without transparency" in (found[0].fix or "")
    opaque = [np.full((16, 18), 255)]
    for i in range(4):
        save(tmp_path / f"msk/p{i}_x_mask.png", np.stack([blob(), blob() // 5, blob(), *opaque], -1))
    assert set(add(tmp_path).entry["colours"]) == {0, 1}
    assert check_cases(load_dataset("mine", root=tmp_path), tmp_path) == []


def test_one_case_is_no_cases(tmp_path, capsys):
    from medseg import cli

    fill(tmp_path, count=1)
    words = ["--data", str(tmp_path), "--images", "img/*.png", "--labels", "msk/*.png", "--group", "^p[0-9]"]
    for line in (["data", "add", "mine", *words], ["data", "check", "mine", "--data", str(tmp_path)]):
        with pytest.raises(SystemExit):
            cli.main(line)
    shown = "".join(capsys.readouterr())
    assert [text in shown for text in (": 1 case\n", "ok: 1 case of mine", "1 image of 16", "1 case in 1 group:")] == [
        True
    ] * 4
    assert "1 images" not in str(
        refused(lambda: add_dataset("x", tmp_path, images="img/*", labels="img/p0_x.png"), 2)[0]
    )


def test_brackets_that_match_nothing_are_explained(tmp_path):
    fill(tmp_path)
    (problem,) = refused(lambda: add(tmp_path, images="img/p[7-9]*.png"), 2)
    assert (problem.code, "[[]" in (problem.fix or "")) == ("E103", True)
    assert add(tmp_path, images="img/p[0-3]*.png", labels="msk/p[0-3]*.png").cases == 4


@pytest.mark.parametrize(
    ("image", "mask", "images", "labels", "patterns", "told"),
    [
        ("x{}", "x{}_mask", "*", "*_mask", ("{id}", "{id}_mask"), True),
        ("x{}", "x{}_mask", "x?", "*_mask", ("{id}", "{id}_mask"), False),
        ("cell_{}_image", "cell_{}_label", "*", "*_label", ("{id}_image", "{id}_label"), True),
        ("{}_im", "{}", "*_im", "?", ("{id}_im", "{id}"), False),  # here the label's pattern fits the images
    ],
)
def test_images_and_labels_in_one_folder(tmp_path, image, mask, images, labels, patterns, told):
    for i in range(6):
        save(tmp_path / f"all/{image.format(i)}.png", noise(i))
        save(tmp_path / f"all/{mask.format(i)}.png", blob())
    result = add(tmp_path, images=f"all/{images}.png", labels=f"all/{labels}.png")
    files = dict(zip(("image", "label"), (f"all/{text}.png" for text in patterns), strict=True))
    assert (result.cases, result.entry["files"]) == (6, {"training": files})
    assert ("6 files that match both are labels: taken out of the images" in result.notes) == told
    cases = find_cases(load_dataset("mine", root=tmp_path), tmp_path)
    pairs = [(case.images[0].name, case.label.name) for case in cases]
    assert pairs == [(f"{image.format(i)}.png", f"{mask.format(i)}.png") for i in range(6)]
    assert check_cases(load_dataset("mine", root=tmp_path), tmp_path) == []
    # a mask whose image is missing, and an image whose mask is missing, are called what they are
    (tmp_path / f"all/{image.format(1)}.png").unlink()
    (tmp_path / f"all/{mask.format(2)}.png").unlink()
    found = refused(lambda: find_cases(load_dataset("mine", root=tmp_path), tmp_path), 3)
    names = [(problem.code, Path(problem.file or "").name) for problem in found]
    assert sorted(names) == [("E350", f"{mask.format(2)}.png"), ("E351", f"{mask.format(1)}.png")]


@pytest.mark.parametrize("option", ["labels", "instances"])
def test_images_that_are_all_labels(tmp_path, option):
    fill(tmp_path)
    (problem,) = refused(lambda: add(tmp_path, **{"images": "img/*.png", "labels": None, option: "img/*.png"}), 2)
    assert (problem.code, problem.field) == ("E120", f"--{option}")
    assert problem.found == "img/p0_x.png, img/p1_x.png, img/p2_x.png, img/p3_x.png"


def test_files_outside_the_data_folder(tmp_path):
    fill(tmp_path / "outside")
    (tmp_path / "data").mkdir()
    (problem,) = refused(lambda: add(tmp_path / "data", images=str(tmp_path / "outside/img/*.png")), 2)
    assert problem.code == "E104"


def test_a_path_into_the_data_folder_may_start_anywhere(tmp_path, monkeypatch):
    fill(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert add(Path("data"), images="data/img/*.png", labels=str(tmp_path / "data/msk/*.png")).cases == 4


@pytest.fixture
def linked(tmp_path) -> Path:
    """A data root whose files are links out of it, under names that pair where the files' own names do not."""
    (tmp_path / "data/img").mkdir(parents=True)
    (tmp_path / "data/msk").mkdir()
    for i in range(4):
        (tmp_path / f"data/img/p{i}.png").symlink_to(save(tmp_path / f"store/{i * 7}.png", noise(i)))
        (tmp_path / f"data/msk/p{i}.png").symlink_to(save(tmp_path / f"store/m{i}.png", blob()))
    return tmp_path


@pytest.mark.parametrize("before", ["", "data/", "{}/data/"])
def test_linked_images(linked, before, monkeypatch):
    monkeypatch.chdir(linked)
    root, start = linked / "data", before.format(linked)
    more = {"images": f"{start}img/*.png", "labels": f"{start}msk/*.png"}
    found = refused(lambda: add(root, **more), 2)
    assert {problem.code for problem in found} == {"E104"}
    assert "data add --links" in (found[0].fix or "")
    result = add(root, **more, links=True)
    assert (result.cases, result.entry["links"]) == (4, True)
    assert result.entry["files"] == {"training": {"image": "img/{id}.png", "label": "msk/{id}.png"}}
    assert check_cases(load_dataset("mine", root=root), root) == []


def test_a_linked_folder_and_a_linked_table(linked, scans):
    (linked / "data/organ").symlink_to(scans / "T", target_is_directory=True)
    (linked / "store/t.csv").write_text("image,label\nimg/p1.png,msk/p1.png\n")
    (linked / "data/t.csv").symlink_to(linked / "store/t.csv")
    for way in ({"folder": "organ"}, {"csv": "t.csv"}):
        name = next(iter(way))
        (problem,) = refused(partial(add_dataset, name, linked / "data", **way), 2)
        assert (problem.code, "--links" in (problem.fix or "")) == ("E104", True)
        add_dataset(name, linked / "data", **way, links=True)
        spec = load_dataset(name, root=linked / "data")
        assert spec.links
        assert check_cases(spec, linked / "data") == []


# --- what would be refused, decided by the user ------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".nii", ".tif"])
def test_nan_is_replaced_as_data_add_was_told(tmp_path, suffix):
    """Without `nan` the image is refused, with it the entry says so and the sample holds that number in its place."""
    for i in range(3):
        image = np.random.default_rng(i).normal(size=(16, 18, 6) if suffix == ".nii" else (16, 18)).astype(np.float32)
        image[2, 3] = np.nan
        label = np.zeros(image.shape, np.uint8)
        label[4:9, 5:12] = 1
        for kind, array in (("img", image), ("msk", label)):
            (tmp_path / kind).mkdir(exist_ok=True)
            if suffix == ".nii":
                nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / kind / f"c{i}.nii")
            else:
                tifffile.imwrite(tmp_path / kind / f"c{i}.tif", array)
    patterns = {"images": f"img/*{suffix}", "labels": f"msk/*{suffix}"}
    problems = refused(lambda: add_dataset("set", tmp_path, **patterns), 3)
    assert {problem.code for problem in problems} == {"E311"}
    assert "--nan" in str(problems[0])
    added = add_dataset("set", tmp_path, **patterns, nan=-7.0)
    assert added.entry["nan"] == -7.0
    spec = load_dataset("set", root=tmp_path)
    sample = load_sample(find_cases(spec, tmp_path)[0], spec)
    assert np.all(sample["image"][0, 2, 3] == -7.0)
    assert np.isfinite(sample["image"]).all()


def test_the_affine_that_counts_is_the_one_that_data_add_was_told(tmp_path):
    turned = np.diag([1.0, 1.0, 2.0, 1.0])
    turned[:3, 3] = 30
    for i in range(3):
        image = np.random.default_rng(i).normal(size=(16, 18, 6)).astype(np.float32)
        label = np.zeros(image.shape, np.uint8)
        label[4:9, 5:12] = 1
        for kind, array in (("img", image), ("msk", label)):
            (tmp_path / kind).mkdir(exist_ok=True)
            stored = nibabel.Nifti1Image(array, np.eye(4))
            stored.set_sform(turned, 1)
            stored.set_qform(np.eye(4), 1)
            nibabel.save(stored, tmp_path / kind / f"c{i}.nii")
    patterns = {"images": "img/*.nii", "labels": "msk/*.nii"}
    problems = refused(lambda: add_dataset("set", tmp_path, **patterns), 3)
    assert {problem.code for problem in problems} == {"E321"}
    assert "--affine" in str(problems[0])
    added = add_dataset("set", tmp_path, **patterns, affine="sform")
    assert added.entry["affine"] == "sform"
    assert "voxels of 1 x 1 x 2 mm" in added.notes
    assert check_dataset(load_dataset("set", root=tmp_path), tmp_path, workers=1).problems == []
