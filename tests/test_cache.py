"""The preprocessed store: the key, whole or absent, patches equal to slices, errors collected, a full disk."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data.meta_tensor import MetaTensor
from tiny import ENTRY, write_cases

from medseg import cache, component_table
from medseg.cache import BlockArray, CaseStore, MemoryCase, StoredCase, default_folder
from medseg.cache_blocks import mirror_index
from medseg.cache_case import KEPT, index_classes
from medseg.cache_steps import RESAMPLING, run_step
from medseg.cli_common import expand_home
from medseg.component import Component, build_component
from medseg.config import load_dataset
from medseg.data import find_cases, load_sample
from medseg.errors import DataError, FormatError, MedsegError, ResourceError
from medseg.files import FAIL_POINTS
from medseg.inference.memory import LiveBytes


@pytest.fixture
def place(tmp_path) -> Path:
    write_cases(tmp_path / "data", 3)
    return tmp_path


def store_of(place: Path, *steps: Component, **options) -> tuple[CaseStore, list]:
    spec = load_dataset("tiny", root=place / "data")
    return CaseStore(spec, steps, folder=place / "cache", **options), find_cases(spec, place / "data")


@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    block=st.tuples(*[st.integers(1, 5)] * 3),
    start=st.tuples(*[st.integers(-12, 12)] * 3),
    size=st.tuples(*[st.integers(1, 9)] * 3),
)
@settings(max_examples=60, deadline=None)
def test_a_box_is_what_numpy_reflect_padding_gives(tmp_path_factory, shape, block, start, size):
    array = np.arange(2 * np.prod(shape), dtype=np.int16).reshape(2, *shape)
    path = tmp_path_factory.mktemp("blocks") / "a.npy"
    stored = BlockArray.write(path, array, block)
    assert path.stat().st_size == stored.size_bytes
    reopened = BlockArray.of(path, json.loads(json.dumps(stored.describe())))
    assert np.array_equal(reopened.read(), array)
    # numpy pads step by step, which is the slow definition of mirroring as often as needed
    before = [max(0, -a) for a in start]
    after = [max(0, a + s - n) for a, s, n in zip(start, size, shape, strict=True)]
    modes = ["edge" if n == 1 else "reflect" for n in shape]
    padded = array
    for axis, mode in enumerate(modes):
        width = [(0, 0)] * 4
        width[axis + 1] = (before[axis], after[axis])
        padded = np.pad(padded, width, mode=mode)
    box = tuple(slice(a + b, a + b + s) for a, b, s in zip(start, before, size, strict=True))
    assert np.array_equal(reopened.read(start, size), padded[(slice(None), *box)])


def test_a_patch_touches_few_bytes_of_a_large_volume(tmp_path, monkeypatch):
    stored = BlockArray.write(tmp_path / "a.npy", np.zeros((1, 128, 128, 160), np.float32), (32, 32, 32))
    read = []
    real = BlockArray._fill
    monkeypatch.setattr(
        BlockArray, "_fill", lambda s, f, buffer, o: (read.append(buffer.nbytes), real(s, f, buffer, o))
    )
    stored.read((5, 40, 100), (32, 32, 32))
    assert sum(read) == 8 * 32**3 * 4  # two blocks along each axis


def test_the_file_is_a_plain_npy(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(1, 4, 6)
    BlockArray.write(tmp_path / "a.npy", array, (2, 3))
    blocks = np.load(tmp_path / "a.npy", allow_pickle=False)
    assert blocks.shape == (2, 2, 1, 2, 3)
    assert np.array_equal(blocks[1, 0, 0], array[0, 2:, :3])


def test_a_cut_off_array_is_told(tmp_path):
    stored = BlockArray.write(tmp_path / "a.npy", np.zeros((1, 8, 8), np.float32), (4, 4))
    os.truncate(tmp_path / "a.npy", 200)
    with pytest.raises(FormatError, match="cut off"):
        stored.read()


def test_stored_cases_hold_what_the_transforms_gave(place):
    store, cases = store_of(place, Component("NormalizeIntensityd"))
    stored = store.prepare(cases)
    assert list(stored) == ["c0", "c1", "c2"]
    for case in cases:
        sample = load_sample(case, store.spec)
        image = np.asarray(sample["image"])
        found = stored[case.id]
        assert np.allclose(found.read("image"), (image - image.mean()) / image.std(), atol=1e-5)
        assert np.array_equal(found.read("label"), sample["label"])
        assert np.array_equal(found.read("native_label"), sample["label"])
        assert np.allclose(found.affine, sample["image"].affine)
        assert found.native == sample["native"]
        label = np.asarray(sample["label"])[0]
        assert found.classes == {k: int((label == k).sum()) for k in range(3)}
        for k, share in itertools.product((1, 2), (0.0, 0.5, 0.999)):
            assert label[found.pick(k, share)] == k


def test_a_second_time_nothing_is_computed(place, monkeypatch):
    store, cases = store_of(place)
    store.prepare(cases)
    monkeypatch.setattr(CaseStore, "compute", lambda *_: pytest.fail("computed again"))
    assert set(store.prepare(cases)) == {"c0", "c1", "c2"}


def test_another_file_setting_fact_or_version_is_another_key(place, monkeypatch):
    store, cases = store_of(place)
    key = store.key(cases[0])
    assert key == store_of(place)[0].key(cases[0])
    assert key != store.key(cases[1])
    assert key != store_of(place, Component("NormalizeIntensityd"))[0].key(cases[0])
    assert key != store_of(place, dims=2)[0].key(cases[0])
    facts = CaseStore(store.spec.model_copy(update={"nan": 0.0}), folder=place / "cache")
    assert key != facts.key(cases[0])
    title = CaseStore(store.spec.model_copy(update={"title": "other", "licence": "x"}), folder=place / "cache")
    assert key == title.key(cases[0])
    monkeypatch.setattr("medseg.cache._versions", lambda: {"monai": "0"})
    assert key != store.key(cases[0])


def test_the_interpolation_that_medseg_chooses_is_in_the_key(place, monkeypatch):
    """`Resized` took labels half a voxel beside the image once: what was stored so must not be read any more."""
    store, (case, *_) = store_of(place, Component("Resized", {"spatial_size": [8, 8, 8]}))
    before = store.key(case)
    monkeypatch.setitem(component_table._MONAI_SPATIAL, "Resized", ("area", "nearest"))
    assert store.key(case) != before


def test_a_file_read_as_indices_and_as_one_mask_has_two_keys(place):
    """`*` in the pattern decides how the only file of instances is read."""
    values = np.zeros((16, 20, 12), np.uint8)
    values[2:4], values[8:12] = 100, 200
    (place / "data" / "instances").mkdir()
    for number in range(3):
        image = nibabel.Nifti1Image(values, np.diag([1.0, 1.0, 2.0, 1.0]))
        nibabel.save(image, place / f"data/instances/c{number}.nii.gz")
    found = {}
    for pattern in ("{id}.nii.gz", "{id}*.nii.gz"):
        files = 'label: "labels/{id}.nii.gz"'
        entry = ENTRY.replace(files, f'{files}, instances: "instances/{pattern}"')
        (place / "data" / "datasets.yaml").write_text(entry)
        spec = load_dataset("tiny", root=place / "data")
        store, case = CaseStore(spec, folder=place / "cache"), find_cases(spec, place / "data")[0]
        found[store.key(case)] = np.unique(store.compute(case)["arrays"]["native_instances"]).tolist()
    assert list(found.values()) == [[0, 100, 200], [0, 1]]


def test_the_versions_of_all_readers_are_in_the_key():
    readers = {"nibabel", "pillow", "tifffile", "imagecodecs", "pydicom", "simpleitk", "scikit-image"}
    assert readers <= set(cache._versions())


def test_a_changed_file_of_equal_size_and_time_is_noticed(place):
    store, cases = store_of(place)
    before = store.prepare(cases[:1])["c0"].read("label")
    path = cases[0].label
    times = path.stat()
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image((np.asarray(image.dataobj) == 1).astype(np.uint8), image.affine), path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = store.prepare(cases[:1])["c0"].read("label")
    assert not np.array_equal(before, after)


@pytest.mark.parametrize("name", ["stored array", "stored case"])
def test_stopped_at_any_point_there_is_no_half_case(place, name, monkeypatch):
    store, cases = store_of(place)

    def stop():
        raise KeyboardInterrupt

    monkeypatch.setitem(FAIL_POINTS, name, stop)
    with pytest.raises(KeyboardInterrupt):
        store.prepare(cases)
    assert not list((place / "cache").rglob("case.json"))
    monkeypatch.delitem(FAIL_POINTS, name)
    assert len(store.prepare(cases)) == 3


@pytest.mark.parametrize("damaged", [False, True])
def test_a_case_that_another_process_stored_meanwhile_stays(place, monkeypatch, damaged):
    """It may be read already: taking it away, even to put an equal one there, ends that process."""
    store, cases = store_of(place)
    folder = store.path(store.key(cases[0]))
    kept: list[int | None] = []

    def meanwhile(name):
        if name == "stored case" and not kept:
            kept.append(None)
            other, _ = store_of(place)
            other.prepare(cases[:1], workers=0)
            if damaged:
                (folder / "label.npy").unlink()
            kept[0] = folder.stat().st_ino

    monkeypatch.setattr("medseg.cache_case.fail_point", meanwhile)
    stored = store.prepare(cases[:1], workers=0)[cases[0].id]
    assert (folder.stat().st_ino == kept[0]) is not damaged
    assert stored.read("label").shape[0] == 1
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".medseg-")]


def test_a_damaged_case_is_made_again(place):
    store, cases = store_of(place)
    folder = store.prepare(cases)["c1"].folder
    os.truncate(folder / "image.npy", 100)
    with pytest.raises(DataError, match="damaged"):
        StoredCase.open(folder, "c1")
    again = store.prepare(cases)["c1"]
    assert again.folder == folder
    assert again.read("image").shape[1:] == (16, 20, 12)


def test_all_refused_cases_are_told_at_once(place):
    store, cases = store_of(place)
    for case in cases[:2]:
        case.images[0].write_bytes(b"")
    with pytest.raises(MedsegError) as caught:
        store.prepare(cases)
    assert [problem.case for problem in caught.value.problems] == ["c0", "c1"]


def test_several_processes_give_the_same(place, monkeypatch):
    store, cases = store_of(place, Component("NormalizeIntensityd"))
    here = {name: case.read("image") for name, case in store.prepare(cases, workers=1).items()}
    shutil.rmtree(place / "cache")
    there = store.prepare(cases, workers=2)
    assert all(np.array_equal(there[name].read("image"), image) for name, image in here.items())


def test_a_full_disk_costs_speed_alone(place, monkeypatch):
    store, cases = store_of(place)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    expected = {name: case.read("image") for name, case in store.prepare(cases).items()}
    shutil.rmtree(place / "cache")
    monkeypatch.setattr(BlockArray, "write", full)
    found = store.prepare(cases)
    assert all(isinstance(case, MemoryCase) for case in found.values())
    assert "cannot be written" in store.notices[0]
    assert not [path for path in (place / "cache").rglob("*") if path.is_file()]
    for name, case in found.items():
        assert np.array_equal(case.read("image"), expected[name])
        assert np.array_equal(case.read("image", (-3, 2, 1), (8, 8, 8))[0, 3:], expected[name][0, :5, 2:10, 1:9])
        assert case.read("label")[0][case.pick(2, 0.5)] == 2
    assert len(MemoryCase._held) <= 2


def test_a_failing_transform_names_case_and_transform(place):
    store, cases = store_of(place, Component("Resized", {"spatial_size": [8, 8, 8, 8]}))
    with pytest.raises(DataError, match="Resized fails") as caught:
        store.prepare(cases[:1])
    assert caught.value.case == "c0"


def test_class_lists_are_bounded_and_spread():
    label = np.zeros((1, 40, 40, 40), np.uint8)
    label[0, :, :, :20] = 1
    label[0, 0, 0, 39] = 2
    label[0, 1, 1, 39] = 255
    places, counts = index_classes(label, 255)
    assert counts == {0: 40**3 - 40 * 40 * 20 - 2, 1: 40 * 40 * 20, 2: 1}
    assert len(places[1]) == KEPT
    assert places[2].tolist() == [[0, 0, 39]]
    assert places[1][:, 0].min() == 0
    assert places[1][:, 0].max() == 39
    # a cube whose planes have as many voxels as places are kept: equal steps through it gave its diagonal plane alone
    cube = np.ones((1, 64, 64, 64), np.uint8)
    blocks = np.unique(index_classes(cube, None)[0][1] // 16, axis=0, return_counts=True)
    assert len(blocks[0]) == 4**3
    assert abs(blocks[1] - KEPT / 4**3).max() < 5 * (KEPT / 4**3) ** 0.5


def test_mirrored_indices_repeat_an_axis_of_one():
    assert mirror_index(-4, 9, 1).tolist() == [0] * 9


def test_the_default_folder_follows_the_platform(monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_folder() == Path("/x/medseg")
    monkeypatch.setattr("sys.platform", "darwin")
    assert default_folder().parts[-3:] == ("Library", "Caches", "medseg")
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert default_folder() == Path("/local/medseg")


def test_without_a_home_folder_a_place_for_the_store_has_to_be_named(monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)  # a user that the system does not know
    with pytest.raises(ResourceError, match="no home folder") as caught:
        default_folder()
    assert "--cache" in caught.value.fix
    assert expand_home(["--data=~/x", "y"]) == ["--data=~/x", "y"]  # the commands that need no store work


def write_far_apart(path: Path, voxels: int, spacing: float) -> Path:
    affine = np.diag([spacing, spacing, spacing, 1.0])
    nibabel.save(nibabel.Nifti1Image(np.zeros((voxels,) * 3, np.int16), affine), path)
    return path


def test_a_case_that_resampling_blows_up_is_refused_before_it_takes_the_memory(place):
    for part in ("images", "labels"):
        write_far_apart(place / f"data/{part}/c1.nii.gz", 5, 90.0)  # microns written as millimetres, say
    store, cases = store_of(place, Component("Spacingd", {"pixdim": [0.05, 0.05, 0.05]}))
    with pytest.raises(ResourceError) as caught:
        store.prepare([case for case in cases if case.id == "c1"], workers=1)
    told = caught.value.problems
    assert [error.code for error in told] == ["E526"]
    assert "7201 x 7201 x 7201" in str(told[0])  # 4 steps of 90 mm are 7200 of 0.05 mm
    assert "90 x 90 x 90" in str(told[0])


def test_an_allocation_that_fails_in_preprocessing_is_no_fault_of_the_image():
    def step(sample):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    with pytest.raises(ResourceError) as caught:
        run_step("Zoomd", step, {}, case="a", free=lambda: 0)
    assert caught.value.code == "E526"
    assert caught.value.exit_code == 5


def test_resampling_takes_the_memory_that_is_asked_for():
    image = MetaTensor(torch.rand(1, 10, 10, 10), affine=torch.diag(torch.tensor([8.0, 8, 8, 1], dtype=torch.float64)))
    step = build_component(Component("Spacingd", {"pixdim": [1.0, 1.0, 1.0]}), "transform")
    with LiveBytes() as live:
        result = run_step("Spacingd", step, {"image": image}, case="a", free=lambda: 10**12)["image"]
    assert result.shape == (1, 73, 73, 73)
    assert 0.5 < live.peak / result.numel() / RESAMPLING < 1  # what is not torch's is not seen; 57 is of the process
