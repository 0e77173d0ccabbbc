"""Refusals and detours that no other module shows: configuration, cases, files, archives, images."""

from __future__ import annotations

import errno
import io
import os
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import pytest
import tifffile
from PIL import Image
from test_config import DATASETS, PIPELINE
from test_data import make_spec, picture, square

import medseg
from medseg import files, files_transfer
from medseg.config import load_dataset, load_pipeline, parse_settings
from medseg.data import find_cases, load_image_sample, load_sample
from medseg.errors import ConfigError, DataError, FormatError, MedsegError, ResourceError, UsageError
from medseg.files_atomic import HOST, TEMPORARY
from medseg.volumes import Geometry, check_pair, list_inputs, read_geometry, read_image, read_window
from medseg.volumes_tiff import has_windows


def refusal(kind: type[MedsegError], code: str, call: Any, *arguments: Any, **options: Any) -> MedsegError:
    """The one problem that a call is refused for."""
    with pytest.raises(kind) as caught:
        call(*arguments, **options)
    problems = caught.value.problems
    assert [problem.code for problem in problems] == [code], str(caught.value)
    return problems[0]


# ------------------------------------------------------------------------------------- the public functions


@pytest.mark.parametrize("wrong", [None, 5, True, b"scan.nii", np.zeros((4, 4, 4)), [np.zeros(2)], [None], [["a"]]])
def test_what_is_no_path_is_refused_in_each_function(tmp_path: Path, wrong: Any) -> None:
    for call in (
        lambda: medseg.predict("run", wrong, tmp_path),
        lambda: medseg.predict(wrong, corpus.__file__, tmp_path),
        lambda: medseg.predict("run", "scan.nii", wrong),
        lambda: medseg.evaluate(wrong, "labels"),
        lambda: medseg.evaluate("masks", [wrong]),  # pyright: ignore[reportArgumentType]
        lambda: medseg.compare("a", wrong),
        lambda: medseg.load_model(wrong),
        lambda: medseg.export_onnx(wrong, tmp_path),
        lambda: medseg.load_pipeline(wrong),
    ):
        assert refusal(UsageError, "E101", call).expected is not None


def test_what_fits_is_not_refused(tmp_path: Path) -> None:
    refusal(UsageError, "E103", medseg.predict, "run", (path for path in [Path("no")]), tmp_path)
    refusal(UsageError, "E103", medseg.predict, "run", np.array(["no.nii"]), tmp_path, max_ram=np.float32(2))
    refusal(ConfigError, "E112", medseg.load_pipeline, "such", overrides="train.epochs=5")
    told = refusal(UsageError, "E101", medseg.predict, "run", np.zeros((4, 4, 4)), tmp_path)
    assert told.field == "inputs"
    assert "files" in (told.fix or "")


def test_options_of_the_wrong_type_or_size(tmp_path: Path) -> None:
    image = Path(corpus.__file__)
    for options in ({"device": None}, {"shard": 2}, {"format": 5}, {"max_vram": []}, {"max_vram": "much"}):
        told = refusal(UsageError, "E101", medseg.predict, "run", image, tmp_path, **options)
        assert told.field == next(iter(options))
    refusal(UsageError, "E101", medseg.predict, "run", image, tmp_path, max_ram=float("inf"))
    for options in ({"labels": 3}, {"workers": "2"}, {"formats": 5}, {"ignore": [255]}):
        told = refusal(UsageError, "E101", medseg.evaluate, tmp_path, tmp_path, **options)
        assert told.field == next(iter(options))


# --------------------------------------------------------------------------------------------- configuration


def test_files_of_data_sets_without_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets.yaml").write_text("# nothing yet\n")
    assert refusal(ConfigError, "E112", load_dataset, "mine", root=tmp_path).found == "mine"
    (tmp_path / "datasets.yaml").write_text("- mine\n")
    assert "datasets.yaml" in (refusal(ConfigError, "E111", load_dataset, "mine", root=tmp_path).file or "")


def test_pipelines_that_are_no_keys_or_have_no_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets.yaml").write_text(DATASETS)
    path = tmp_path / "p.yaml"
    path.write_text("- dataset\n- tiny\n")
    assert "keys and values" in refusal(ConfigError, "E111", load_pipeline, path, check=False).message
    assert "holds no keys" in refusal(ConfigError, "E117", load_pipeline, path, overrides=["train.epochs=1"]).message
    # a fault elsewhere does not hide that there are two budgets, and both are told with their places
    twice = PIPELINE.replace("  epochs: 3\n  batch: 2\n", "  epochs: 3\n  minutes: 2\n  batch: two\n")
    path.write_text(twice.replace("dataset: tiny", "dataset: [tiny]"))
    with pytest.raises(ConfigError) as caught:
        load_pipeline(path)
    told = {problem.field: problem for problem in caught.value.problems}
    assert told["train"].found == "epochs, minutes"
    assert "exactly one of" in (told["train"].expected or "")
    assert {"dataset", "train.batch"} < told.keys()


def test_settings_that_contradict_each_other() -> None:
    found = refusal(ConfigError, "E117", parse_settings, ["train=1", "train.epochs=5"])
    assert "train=1, train.epochs=5" in str(found.found)


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        ({"training": {"image": "{id}.png", "label": "l/{id}.png", "ids": "{id}.txt"}}, "without placeholders"),
        ({"msd": "Task", "validation": {"image": "{id}.png", "label": "l/{id}.png"}}, "msd tells its parts itself"),
    ],
)
def test_layouts_that_contradict_themselves(layout: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_spec(layout)
    assert told in str(caught.value)


def test_colours_and_encoding_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="either `colours` or `encoding`"):
        make_spec({"training": {"image": "{id}.png", "label": "l/{id}.png"}}, colours={1: [255, 0, 0]})


def test_a_wrong_key_deep_inside_is_told_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError) as caught:
        make_spec([{"training": {"image": "{id}.png", "lable": "l/{id}.png"}}])
    assert "label" in str(caught.value)


# ------------------------------------------------------------------------------------------------------ cases


def test_parts_and_folders_that_are_not_there(tmp_path: Path) -> None:
    spec = make_spec({"training": {"image": "i/{id}.png", "label": "l/{id}.png"}})
    with pytest.raises(UsageError, match="no such part"):
        find_cases(spec, tmp_path, part="trainin")
    for layout in ({"msd": "Task01"}, {"nnunet": "Dataset001"}, {"csv": "cases.csv"}):
        problem = refusal(UsageError, "E103", find_cases, make_spec(layout), tmp_path)
        assert problem.expected == next(iter(layout.values()))


@pytest.mark.parametrize("kind", ["msd", "nnunet"])
def test_descriptions_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    spec = make_spec({kind: "set"})
    (tmp_path / "set/dataset.json").mkdir(parents=True)
    assert refusal(ConfigError, "E119", find_cases, spec, tmp_path).message == "cannot read dataset.json"
    (tmp_path / "set/dataset.json").rmdir()
    (tmp_path / "set/dataset.json").write_text("[1]")
    assert refusal(ConfigError, "E119", find_cases, spec, tmp_path).message == "dataset.json is broken"


def test_tables_that_cannot_be_read(tmp_path: Path) -> None:
    spec = make_spec({"csv": "cases.csv"})
    (tmp_path / "cases.csv").write_bytes("image,label\nä.png,b.png\n".encode("latin-1"))
    assert refusal(ConfigError, "E119", find_cases, spec, tmp_path).message == "cannot read the table"
    (tmp_path / "cases.csv").write_bytes(b"")
    assert refusal(ConfigError, "E119", find_cases, spec, tmp_path).message == "the table is empty"


def test_lists_of_ids(tmp_path: Path) -> None:
    spec = make_spec({"training": {"image": "i/{id}.png", "label": "l/{id}.png", "ids": "ids.txt"}})
    refusal(UsageError, "E103", find_cases, spec, tmp_path)  # the set is not here at all: its list is not missed
    for folder in "il":
        picture(tmp_path / folder / "a.png", square())
    refusal(ConfigError, "E111", find_cases, spec, tmp_path)
    (tmp_path / "ids.txt").write_text("a\n\n")
    assert [case.id for case in find_cases(spec, tmp_path)] == ["a"]


def test_masks_of_objects(tmp_path: Path) -> None:
    masks = make_spec({"training": {"image": "{id}/i.png", "instances": "{id}/m/*.png"}})
    picture(tmp_path / "a/i.png", square())
    assert refusal(DataError, "E350", find_cases, masks, tmp_path).case == "a"
    assert masks.has_instances
    picture(tmp_path / "a/m/1.png", square(shape=(8, 9)))
    (tmp_path / "a/m/2.png").write_bytes(b"<html>")
    picture(tmp_path / "a/m/3.png", square(0))
    with pytest.raises(DataError) as caught:
        load_sample(find_cases(masks, tmp_path)[0], masks)
    told = {Path(problem.file or "").name: problem.code for problem in caught.value.problems}
    assert told == {"1.png": "E320", "2.png": "E301", "3.png": "E336"}

    one = make_spec({"training": {"image": "{id}/i.png", "instances": "{id}/index.png"}}, encoding="index")
    index = np.zeros((8, 10), np.uint8)
    index[1:3, 1:3], index[4:6, 5:9] = 7, 3
    picture(tmp_path / "a/index.png", index)
    sample = load_sample(find_cases(one, tmp_path)[0], one)
    np.testing.assert_array_equal(sample["instances"][0].numpy(), index)
    np.testing.assert_array_equal(sample["label"][0].numpy(), index > 0)


def test_other_numbers_of_channels_and_a_field_of_view(tmp_path: Path) -> None:
    spec = make_spec({"training": {"image": ["{id}_0.png", "{id}_1.png"], "label": "l/{id}.png"}}, channels=["a", "b"])
    paths = [picture(tmp_path / f"x_{n}.png", square(n)) for n in range(3)]
    with pytest.raises(UsageError, match="another number of files than channels") as caught:
        load_image_sample(paths, spec)
    assert (caught.value.expected, caught.value.found) == ("2: a, b", "3")
    fov = make_spec({"training": {"image": "i/{id}.png", "label": "l/{id}.png", "fov": "f/{id}.png"}})
    for folder, box in (("i", slice(0, 8)), ("l", slice(2, 4)), ("f", slice(1, 7))):
        picture(tmp_path / folder / "a.png", square(box=(box, slice(2, 9))))
    found = load_sample(find_cases(fov, tmp_path)[0], fov)["fov"].numpy()
    np.testing.assert_array_equal(found[0], square(1, box=(slice(1, 7), slice(2, 9))))
    assert found.dtype == np.uint8
    picture(tmp_path / "f/a.png", square(shape=(9, 10)))
    refusal(DataError, "E320", load_sample, find_cases(fov, tmp_path)[0], fov)


# ------------------------------------------------------------------------------------------------------ files


def test_leftovers_of_processes_that_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, others = 999_999_998, 999_999_999

    def kill(process: int, _: int) -> None:
        raise ProcessLookupError if process == gone else PermissionError  # another user's process is a process

    monkeypatch.setattr(os, "kill", kill)
    for process in (gone, others):
        (tmp_path / f"{TEMPORARY}{HOST}-{process}-a.unpack").mkdir()
        (tmp_path / f"{TEMPORARY}{HOST}-{process}-a.unpack/x").write_bytes(b"x")
        (tmp_path / f"{TEMPORARY}{HOST}-{process}-b").write_bytes(b"x")
    (tmp_path / f"{TEMPORARY}notes").write_bytes(b"a user's own")
    removed = files.remove_stale(tmp_path)
    assert [path.name for path in removed] == [f"{TEMPORARY}{HOST}-{gone}-a.unpack", f"{TEMPORARY}{HOST}-{gone}-b"]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_disks_that_cannot_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def sync(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}") or number == errno.EIO:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", sync)
    (tmp_path / "a").write_bytes(b"old")
    if number == errno.EIO:
        assert refusal(ResourceError, "E502", files.write_bytes, tmp_path / "a", b"new").found == "Input/output error"
        assert (tmp_path / "a").read_bytes() == b"old"
    else:  # a folder that has no sync: the file itself was synced, and its rename is whole
        files.write_bytes(tmp_path / "a", b"new")
        assert (tmp_path / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


def test_locks_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with files.lock(tmp_path / "lock"):
        assert refusal(ResourceError, "E503", files.lock(tmp_path / "lock", 0.01).__enter__).exit_code == 5
    import filelock

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "lock"))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    refusal(ResourceError, "E502", files.lock(tmp_path / "lock").__enter__)


def test_a_disk_that_does_not_tell_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    files.require_space(tmp_path / "not yet" / "there", 1)
    refusal(ResourceError, "E501", files.require_space, tmp_path, 1 << 62)
    monkeypatch.setattr(shutil, "disk_usage", refuse)
    files.require_space(tmp_path, 1 << 62)  # nothing is known, so nothing is refused


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    assert refusal(FormatError, "E308", files.require_file, tmp_path, case="c").case == "c"


def test_archives_into_an_empty_folder_with_folders_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.mkdir("set/empty")
        archive.writestr("set/a", b"one")
    (tmp_path / "out").mkdir()
    files.safe_extract(tmp_path / "a.zip", tmp_path / "out", 100)
    assert (tmp_path / "out/set/empty").is_dir()
    assert (tmp_path / "out/set/a").read_bytes() == b"one"
    real = Path.mkdir

    def full(self: Path, *arguments: Any, **options: Any) -> None:
        if self.name == "empty":
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        real(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", full)
    refusal(ResourceError, "E501", files.safe_extract, tmp_path / "a.zip", tmp_path / "new", 100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "out"]


@pytest.mark.parametrize("packing", ["gz", "bz2", "xz"])
def test_archives_whose_checksum_is_wrong_or_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    # the sums stand behind the tar's mark of its end, where tarfile itself does not look
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{packing}") as archive:  # type: ignore[call-overload]
        info = tarfile.TarInfo("a")
        info.size = 100_000
        archive.addfile(info, io.BytesIO(np.random.default_rng(0).bytes(100_000)))
    whole, path = buffer.getvalue(), tmp_path / f"a.tar.{packing}"
    for damaged in (corpus.flipped(whole, len(whole) - 6), whole[:-3]):
        path.write_bytes(damaged)
        refusal(FormatError, "E315", files.safe_extract, path, tmp_path / "out", 1 << 20)
        assert list(tmp_path.iterdir()) == [path]
    path.write_bytes(whole)
    assert (files.safe_extract(path, tmp_path / "out", 1 << 20) / "a").stat().st_size == 100_000
    monkeypatch.setattr(files_transfer, "_PADDING", 100)
    error = refusal(FormatError, "E316", files.safe_extract, path, tmp_path / "more", 1 << 20)
    assert "data after the last member" in error.message


def test_locked_archives(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a", b"one")
    raw = bytearray((tmp_path / "a.zip").read_bytes())
    raw[raw.index(b"PK\1\2") + 8] |= 1  # "encrypted", in the central directory
    (tmp_path / "a.zip").write_bytes(raw)
    error = refusal(FormatError, "E316", files.safe_extract, tmp_path / "a.zip", tmp_path / "out", 100)
    assert "encrypted" in error.message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip"]


# ----------------------------------------------------------------------------------------------------- images


def test_inputs_without_or_with_impossible_names(tmp_path: Path) -> None:
    assert "without a name" in refusal(UsageError, "E103", list_inputs, [""]).message
    assert "no possible name" in refusal(UsageError, "E103", list_inputs, ["a" * 300 + ".nii"]).message


def test_results_inside_the_pattern_are_no_inputs(tmp_path: Path) -> None:
    for name in ("a.nii", "masks/a.nii", "masks/deep/b.nii"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(corpus.nifti(corpus.image()))
    found = list_inputs([str(tmp_path / "**/*.nii")], skip=tmp_path / "masks")
    assert found == [tmp_path / "a.nii"]


def test_a_grey_volume_as_rgb_has_it_three_times(tmp_path: Path) -> None:
    array = corpus.image()
    (tmp_path / "a.nii").write_bytes(corpus.nifti(array))
    np.testing.assert_array_equal(read_image(tmp_path / "a.nii", colour="rgb").array, np.stack([array] * 3))


def test_pictures_of_five_bands_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((8, 9, 5), np.uint8), photometric="minisblack", planarconfig="contig")
    assert refusal(DataError, "E310", read_image, tmp_path / "a.tif", dims=2).found.startswith("5 ")


def test_grids_in_pixels_and_in_millimetres_share_their_shape_alone() -> None:
    volume = Geometry.of((9, 8, 4), np.diag([0.5, 0.5, 3.0, 1.0]))
    check_pair(volume, Geometry.of((9, 8, 4), unit="px"))
    refusal(DataError, "E320", check_pair, volume, Geometry.of((9, 8, 3), unit="px"))
    refusal(DataError, "E325", check_pair, volume, Geometry.of((9, 8, 4)))


def test_volumes_with_axes_too_many_and_types_that_have_no_number(tmp_path: Path) -> None:
    import SimpleITK

    array = corpus.image((4, 5, 6))
    four = SimpleITK.JoinSeries([SimpleITK.GetImageFromArray(array.transpose(2, 1, 0))])
    SimpleITK.WriteImage(four, tmp_path / "one.nrrd")
    np.testing.assert_array_equal(read_image(tmp_path / "one.nrrd").array[0], array)
    two = SimpleITK.JoinSeries([SimpleITK.GetImageFromArray(array)] * 2)
    SimpleITK.WriteImage(two, tmp_path / "two.nrrd")
    assert refusal(DataError, "E310", read_geometry, tmp_path / "two.nrrd").found == "size [6, 5, 4, 2]"
    header = "NRRD0004\ntype: short\ndimension: 3\nsizes: 400 500 600\nencoding: gzip\nendian: little\n\n"
    (tmp_path / "claims.nrrd").write_bytes(header.encode() + b"\x1f\x8b" + bytes(100))
    assert refusal(FormatError, "E303", read_image, tmp_path / "claims.nrrd").expected == "240000000 bytes"


def test_palettes_with_alpha_and_sixteen_bits_in_thirty_two(tmp_path: Path) -> None:
    wide = np.arange(72).reshape(8, 9) * 900
    Image.fromarray(wide.astype(np.uint16)).save(tmp_path / "wide.png")
    np.testing.assert_array_equal(read_image(tmp_path / "wide.png").array[0], wide)
    index = (np.arange(72).reshape(8, 9) % 3).astype(np.uint8)
    colours = np.zeros((3, 256), np.uint16)
    colours[:, :3] = np.array([[0, 0, 0], [255, 0, 0], [0, 128, 64]]).T * 257
    tifffile.imwrite(tmp_path / "a.tif", index, photometric="palette", colormap=colours)
    found = read_image(tmp_path / "a.tif", colour="rgb").array
    np.testing.assert_array_equal(found, (colours[:, index] >> 8))


def test_tiffs_that_claim_more_than_they_hold(tmp_path: Path) -> None:
    tile = zlib.compress(bytes(4096 * 4096), 9)
    tifffile.imwrite(
        tmp_path / "a.tif", (tile for _ in range(100)), shape=(40_000, 40_000), dtype=np.uint8, tile=(4096, 4096),
        compression="zlib",
    )  # fmt: skip
    error = refusal(FormatError, "E306", read_image, tmp_path / "a.tif")
    assert "40000" in (error.found or "") or "1600000000" in (error.found or "")
    assert not read_window(tmp_path / "a.tif", (slice(39_990, 40_000), slice(0, 5))).any()


def test_a_series_that_a_segmentation_cannot_refer_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    highdicom = pytest.importorskip("highdicom")
    from medseg.volumes import write_segmentation

    volume = read_image(corpus.series(tmp_path / "s", corpus.image((7, 6, 5))))

    def refuse(**_: Any) -> None:
        raise AttributeError("patient CANARY^NAME has no such attribute")

    monkeypatch.setattr(highdicom.seg, "Segmentation", refuse)
    label = np.ones((7, 6, 5), np.uint8)
    error = refusal(DataError, "E340", write_segmentation, tmp_path / "a.dcm", label, volume, {1: "liver"})
    assert (error.found, "CANARY" in str(error)) == ("AttributeError", False)
    assert not (tmp_path / "a.dcm").exists()


def test_which_pictures_have_windows(tmp_path: Path) -> None:
    grey = corpus.image((64, 48), np.uint8)
    colours = np.zeros((3, 256), np.uint16)
    for name, options, expected in (
        ("tiled", {"tile": (16, 16), "compression": "zlib"}, True),
        ("plain", {}, True),
        ("palette", {"photometric": "palette", "colormap": colours}, False),
    ):
        tifffile.imwrite(tmp_path / f"{name}.tif", grey, **options)
        assert has_windows(tmp_path / f"{name}.tif") is expected, name
    tifffile.imwrite(tmp_path / "stack.tif", np.stack([grey, grey]), photometric="minisblack")
    assert not has_windows(tmp_path / "stack.tif")
    # one packed strip of 68 MB: a window of it would need all of it
    rows = zlib.compress(bytes(68_000_000))
    tifffile.imwrite(
        tmp_path / "strip.tif", iter([rows]), shape=(68_000, 1000), dtype=np.uint8, rowsperstrip=68_000,
        compression="zlib",
    )  # fmt: skip
    assert not has_windows(tmp_path / "strip.tif")
