"""Batches: no sample twice, none missing; the same whatever the workers, the start and the processes; losses named."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_pipeline, write_cases

from medseg import engine_stream
from medseg.augmentation import Augmentation, finish_targets
from medseg.batches import BatchMaker
from medseg.cache import CaseStore
from medseg.component import Component
from medseg.config import load_dataset
from medseg.data import find_cases
from medseg.engine_stream import BatchStream
from medseg.errors import DataError, ResourceError, TrainingError
from medseg.patches import Draw, PatchReader, stack
from medseg.training_patch import patch_reader

NOISE = (Component("RandGaussianNoised", {"prob": 1.0, "std": 0.5}), Component("RandFlipd", {"prob": 0.5}))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    place = tmp_path_factory.mktemp("batches")
    write_cases(place / "data", 5)
    spec = load_dataset("tiny", root=place / "data")
    return CaseStore(spec, folder=place / "cache").prepare(find_cases(spec, place / "data"))


def maker(stored, *, samples=10, batch=3, components=NOISE, **options) -> BatchMaker:
    reader = PatchReader((8, 8, 8), options.pop("margin", (0, 0, 0)), options.pop("foreground", 0.5))
    augmentation = Augmentation(components)
    return BatchMaker(stored, samples, reader, batch=batch, seed=7, augmentation=augmentation, **options)


def take(stream, count):
    batches = [next(stream) for _ in range(count)]
    stream.close()
    return batches


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_no_sample_twice_and_none_missing(stored, workers, world):
    epochs = 2
    seen = Counter()
    for rank in range(world):
        one = maker(stored, rank=rank, world=world)
        for batch in take(BatchStream(one, workers=workers), one.iterations * epochs):
            if batch.share > 0:
                seen.update((batch.key[0], seed) for seed in batch.seeds)
    assert set(seen.values()) == {1}
    assert len(seen) == 10 * epochs
    # every case twice in each epoch of ten samples
    whole = maker(stored)
    for epoch in range(epochs):
        cases = Counter(case for it in range(whole.iterations) for case in whole.cases((epoch, it)))
        assert set(cases.values()) == {2}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_begun_later_gives_what_was_left(stored, workers):
    whole = take(BatchStream(maker(stored)), 12)
    for skipped in (1, 4, 7):
        epoch, step = divmod(skipped, 4)
        rest = take(BatchStream(maker(stored), (epoch, step), workers=workers), 12 - skipped)
        for one, two in zip(whole[skipped:], rest, strict=True):
            assert (one.key, one.cases, one.seeds) == (two.key, two.cases, two.seeds)
            assert all(torch.equal(one.tensors[k], two.tensors[k]) for k in one.tensors)


def test_processes_share_a_batch(stored):
    whole = maker(stored)[0, 0]
    parts = [maker(stored, rank=rank, world=2)[0, 0] for rank in range(2)]
    assert [len(part.cases) for part in parts] == [2, 1]
    assert sum(part.share for part in parts) == pytest.approx(1)
    joined = {seed: part.tensors["image"][i] for part in parts for i, seed in enumerate(part.seeds)}
    for i, seed in enumerate(whole.seeds):
        assert torch.equal(whole.tensors["image"][i], joined[seed])
    # the last iteration has one sample: the second process takes the step with nothing of its own
    last = maker(stored, rank=1, world=2)[0, 3]
    assert (last.share, len(last.cases)) == (0.0, 1)


def test_epochs_differ_and_so_do_samples(stored):
    one = maker(stored)
    first, second = one[0, 0], one[1, 0]
    assert set(first.seeds).isdisjoint(second.seeds)
    assert not torch.equal(first.tensors["image"], second.tensors["image"])


def test_patches_centred_on_structures_are_balanced_over_classes(stored):
    reader = PatchReader((4, 4, 4), (0, 0, 0), 1.0)
    hits = Counter()
    for seed in range(300):
        case = stored[f"c{seed % 5}"]
        start = reader.start(case, Draw.of(seed, 3))
        hits[int(reader.read(case, start)["label"][0, 2, 2, 2])] += 1
    # the core has an eighth of the ball's voxels, but half of the patches (sd of 300 draws: 8.7)
    assert hits[0] == 0
    assert 110 < hits[2] < 190


def test_positions_cover_the_image_and_nothing_else(stored):
    reader = PatchReader((8, 8, 8), (2, 0, 0), 0.0)
    starts = np.array([reader.start(stored["c0"], Draw.of(seed, 3)) for seed in range(2000)])
    assert starts.min(0).tolist() == [-2, 0, 0]
    assert starts.max(0).tolist() == [16 - 8 + 2, 20 - 8, 12 - 8]


def test_an_image_smaller_than_the_patch_stands_in_its_middle(stored):
    reader = PatchReader((32, 8, 13), (0, 0, 0), 1.0)
    start = reader.start(stored["c0"], Draw.of(0, 3))
    assert (start[0], start[2]) == (-8, -1)
    assert reader.read(stored["c0"], start)["image"].shape == (1, 32, 8, 13)


def test_context_is_what_lies_around_a_patch_and_is_mirrored_beyond_the_image(stored):
    case = stored["c1"]
    reader, wider = PatchReader((8, 8, 8), (0, 0, 0), 0.5), PatchReader((8, 8, 8), (0, 0, 0), 0.5, context=(4, 0, 3))
    pad = [(0, 0), (4, 4), (0, 0), (3, 3)]
    for seed in range(20):
        start = reader.start(case, Draw.of(seed, 3))
        assert wider.start(case, Draw.of(seed, 3)) == start
        found = wider.read(case, start)
        for name in ("image", "label"):
            whole = np.pad(case.read(name), pad, mode="reflect")
            wanted = whole[:, start[0] : start[0] + 16, start[1] : start[1] + 8, start[2] : start[2] + 14]
            assert np.array_equal(found[name], wanted)
    slices = PatchReader((8, 8), (0, 0), 0.5, slices=1, context=(2, 3)).read(case, (3, 4, 5))
    whole = np.pad(case.read("image")[0], [(2, 2), (3, 3), (0, 0)], mode="reflect")
    assert np.array_equal(slices["image"], whole[3:15, 4:18, 4:7].transpose(2, 0, 1))


class Ramp:
    """An image that holds its own first coordinate: what is mirrored in is seen by its value."""

    def __init__(self):
        self.shape, self.places, self.affine = (64, 64, 64), {}, np.eye(4)
        self.arrays = {"image": None, "label": None}

    def read(self, name, start, size):
        at = np.arange(start[0], start[0] + size[0], dtype=np.float32 if name == "image" else np.int32)
        return np.tile(at[:, None, None], (1, 1, *size[1:]))


def test_patches_are_turned_in_the_image_itself():
    turn = Augmentation([Component("RandElasticDeformationd", {"sigma": 0.0, "rotate": 15})])
    reader = PatchReader((16, 16, 16), (0, 0, 0), 0.0)
    context = turn.context((16, 16, 16), (48, 48, 48))
    assert context == (4, 4, 4)  # 7.5 (cos 15 + 2 sin 15) = 11.1 from the centre at most, the border 7.5
    for around, beyond in (((), False), (context, True)):
        one = BatchMaker({"a": Ramp()}, 20, replace(reader, context=around), batch=20, seed=1, augmentation=turn)
        image = one[0, 0].tensors["image"]
        assert image.shape == (20, 1, 16, 16, 16)
        starts = torch.tensor([reader.start(Ramp(), Draw.of(s.seed, 3))[0] for s in one.samples((0, 0))])
        low, high = image.flatten(1).amin(1) - starts, image.flatten(1).amax(1) - starts - 15
        assert bool(((low < -0.1) & (high > 0.1)).all()) == bool(((low < -0.1) | (high > 0.1)).any()) == beyond
        # of a ramp that is turned a ramp remains, all second differences are 0; mirrors bend it
        bent = max(float(image.diff(n=2, dim=axis).abs().max()) for axis in (2, 3, 4))
        assert bent < 1e-4 if beyond else bent > 0.1


def test_a_runs_reader_has_the_context_that_its_first_transform_asks_for():
    def context(patch, shapes, components):
        cases = {str(n): SimpleNamespace(shape=shape, affine=np.diag([2.0, 1, 1, 1])) for n, shape in enumerate(shapes)}
        reader = patch_reader(tiny_pipeline(patch=patch), (0,) * len(patch), Augmentation(components), cases)
        assert reader.patch == tuple(patch)
        return reader.context

    turn = Component("RandElasticDeformationd", {"sigma": 0.0, "rotate": [0, 0, 90]})
    # about the last axis, rows twice as far apart: 15 mm and 7.5 mm to a side, 16.8 mm to a corner
    assert context([16, 16, 16], [(64, 64, 64)], [turn]) == (1, 4, 0)  # a quarter of a patch instead of 10
    assert context([16, 16, 16], [(64, 16, 64), (16, 19, 64)], [turn, *NOISE]) == (1, 3, 0)
    assert context([16, 16, 16], [(16, 16, 16), (8, 8, 64)], [turn]) == ()
    assert context([16, 16], [(64, 64, 1)], [Component("RandElasticDeformationd", {"sigma": 0.0, "rotate": 90})]) == (
        1,
        8,
    )
    assert context([16, 16, 16], [(64, 64, 64)], [*NOISE, turn]) == ()  # noise would be made for all of it
    assert context([16, 16, 16], [(64, 64, 64)], NOISE) == context([16, 16, 16], [(64, 64, 64)], []) == ()


def test_slices_lie_on_the_last_axis(stored):
    reader = PatchReader((8, 8), (0, 0), 1.0)
    for seed in range(20):
        start = reader.start(stored["c1"], Draw.of(seed, 3))
        patch = reader.read(stored["c1"], start)
        assert patch["image"].shape == (1, 8, 8)
        label = stored["c1"].read("label")[0, :, :, start[2]]
        assert np.array_equal(patch["label"][0], label[start[0] : start[0] + 8, start[1] : start[1] + 8])
        assert patch["label"][0, 4, 4] > 0 or start[0] in (0, 8) or start[1] in (0, 12)


def test_neighbouring_slices_come_as_channels(stored):
    case = stored["c1"]
    image, label = case.read("image")[0], case.read("label")[0]
    two = np.stack([image, -image])

    class Twice:
        shape, arrays = case.shape, {"image": None, "label": None}

        def read(self, name, start, size):
            box = tuple(slice(a, a + n) for a, n in zip(start[:2], size[:2], strict=True))
            # numpy's reflection is the definition of what lies beyond the last slice
            padded = np.pad({"image": two, "label": label[None]}[name], [(0, 0)] * 3 + [(4, 4)], mode="reflect")
            return padded[(slice(None), *box, slice(start[2] + 4, start[2] + 4 + size[2]))]

    reader = PatchReader((8, 8), (0, 0), 1.0, slices=2)
    for k, places in ((0, [2, 1, 0, 1, 2]), (5, [3, 4, 5, 6, 7]), (11, [9, 10, 11, 10, 9])):
        found = reader.read(Twice(), (3, 4, k))
        wanted = [sign * image[3:11, 4:12, place] for sign in (1, -1) for place in places]
        assert np.array_equal(found["image"], np.stack(wanted))
        assert np.array_equal(found["label"], label[None, 3:11, 4:12, k])
        assert np.array_equal(reader.read(case, (3, 4, k))["image"], np.stack(wanted[:5]))


def test_void_and_outside_have_no_weight():
    label = torch.tensor([[[[0, 1, 255, 2]]]], dtype=torch.uint8)
    fov = torch.tensor([[[[0, 1, 1, 1]]]], dtype=torch.uint8)
    image = torch.zeros(1, 1, 1, 4)
    found = finish_targets({"image": image, "label": label, "fov": fov}, 255)
    assert found["label"].tolist() == [[[[0, 1, 0, 2]]]]
    assert found["weight"].tolist() == [[[[0, 1, 0, 1]]]]
    assert "weight" not in finish_targets({"image": image, "label": label}, None)
    weight = torch.tensor([[[[2.0, 3.0, 4.0, 5.0]]]])
    found = finish_targets({"image": image, "label": label, "weight": weight, "fov": fov}, 255)
    assert found["weight"].tolist() == [[[[0, 3, 0, 5]]]]


def test_background_outside_is_learnt_and_labels_there_are_not():
    label = torch.tensor([[[[0, 1, 255, 0, 1]]]], dtype=torch.uint8)
    fov = torch.tensor([[[[0, 0, 0, 1, 1]]]], dtype=torch.uint8)
    given = {"image": torch.zeros(1, 1, 1, 5), "label": label, "fov": fov}
    found = finish_targets(given, 255, "background")
    assert found["weight"].tolist() == [[[[1, 0, 0, 1, 1]]]]
    assert found["label"].tolist() == [[[[0, 1, 0, 0, 1]]]]
    weight = torch.tensor([[[[2.0, 3.0, 4.0, 5.0, 6.0]]]])
    assert finish_targets(given | {"weight": weight}, 255, "background")["weight"].tolist() == [[[[2, 0, 0, 5, 6]]]]
    assert finish_targets(given, 255)["weight"].tolist() == [[[[0, 0, 0, 1, 1]]]]


def test_a_missing_weight_is_one():
    image = torch.zeros((1, 2, 2))
    with_, without = {"image": image, "weight": torch.full((1, 2, 2), 3.0)}, {"image": image}
    assert stack([with_, without])["weight"][:, 0, 0, 0].tolist() == [3.0, 1.0]


def test_each_sample_is_deformed_by_its_own_seed_and_spacing():
    augmentation = Augmentation([Component("RandElasticDeformationd", {"sigma": 2.0, "rotate": 30})])
    batch = {"image": torch.rand(3, 1, 16, 16, 16), "label": torch.randint(0, 3, (3, 1, 16, 16, 16)).byte()}
    spacings = [(1.0, 1.0, 1.0), (1.0, 1.0, 3.0), (1.0, 1.0, 1.0)]
    whole = augmentation(batch, [5, 6, 7], spacings)
    for position, seed in enumerate((5, 6, 7)):
        one = {name: values[position : position + 1] for name, values in batch.items()}
        alone = augmentation(one, [seed], [spacings[position]])
        assert torch.allclose(alone["image"][0], whole["image"][position], atol=1e-6)
        assert torch.equal(alone["label"][0], whole["label"][position])
    assert not torch.equal(whole["image"], batch["image"])


class Failing:
    """A stored case whose image cannot be read, or whose reading kills or stops the process."""

    def __init__(self, case, how):
        self.case, self.how = case, how

    def __getattr__(self, name):
        return getattr(self.__dict__["case"], name)

    def read(self, *arguments):
        if self.how == "raises":
            raise ZeroDivisionError("broken transform")
        if self.how == "unreadable":
            raise OSError(5, "Input/output error")
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


@pytest.mark.parametrize("how", ["raises", "unreadable", "killed", "hangs"])
def test_a_lost_worker_is_named_with_its_cases(stored, how, monkeypatch):
    monkeypatch.setattr(engine_stream, "TIMEOUT", 2.0)
    broken = {name: Failing(case, how) if name == "c3" else case for name, case in stored.items()}
    stream = BatchStream(maker(broken), workers=1)
    begin = time.monotonic()
    with pytest.raises((TrainingError, DataError)) as caught:
        take(stream, 8)
    stream.close()
    assert "c3" in str(caught.value.case)
    assert time.monotonic() - begin < 20
    if how in ("killed", "hangs"):
        assert "train.workers=0" in str(caught.value.fix)


def test_without_workers_an_error_names_its_case(stored):
    broken = {name: Failing(case, "unreadable") if name == "c3" else case for name, case in stored.items()}
    with pytest.raises(DataError) as caught:
        take(BatchStream(maker(broken)), 4)
    assert caught.value.case == "c3"


def test_a_failing_augmentation_names_transform_and_cases(stored):
    one = maker(stored, components=(Component("CenterSpatialCropd", {"roi_size": [1, 2, 3, 4]}),))
    one.augmentation.transforms[0] = lambda sample: 1 / 0
    with pytest.raises(DataError, match="CenterSpatialCropd fails: ZeroDivisionError") as caught:
        one[0, 0]
    assert set(caught.value.case.split(", ")) == set(one.cases((0, 0)))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_running_out_of_memory_is_no_fault_of_the_data(stored, error):
    """On a GPU batches are augmented beside the step; what helps then is told as for the step (E523)."""
    one = maker(stored, components=(Component("RandIntensityd"),))

    def fails(*_):
        raise error

    one.augmentation.transforms[0].apply_batch = fails
    with pytest.raises(type(error)):
        one[0, 0]


def test_workers_that_cannot_be_started_are_told(stored, monkeypatch):
    real, made = torch.multiprocessing.Queue, []

    def second_fails():  # /dev/shm is full, where the workers' queues have their locks
        if made:
            raise OSError(errno.ENOSPC, "No space left on device")
        made.append(real())
        return made[0]

    monkeypatch.setattr("torch.multiprocessing.Queue", second_fails)
    with pytest.raises(ResourceError, match="data workers cannot be started") as caught:
        BatchStream(maker(stored), workers=1)
    assert "/dev/shm" in (caught.value.fix or "")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
def test_too_few_open_files_are_told_with_the_limit(stored, monkeypatch):
    """A worker was lost for want of memory, it said, and torch's own advice was the whole of what was found."""
    import resource

    real, made = torch.multiprocessing.Queue, []

    def second_fails():
        if made:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        made.append(real())
        return made[0]

    monkeypatch.setattr(resource, "getrlimit", lambda which: (20, 50 if which == resource.RLIMIT_NOFILE else 7))
    stream = BatchStream(maker(stored))
    stream.workers, stream._source = 1, Raising("Too many open files. Communication with the workers is no longer ...")
    with pytest.raises(TrainingError, match="lost: too many open files") as lost:
        next(stream)
    monkeypatch.setattr("torch.multiprocessing.Queue", second_fails)
    with pytest.raises(ResourceError, match="cannot be started") as unstarted:
        BatchStream(maker(stored), workers=1)
    assert lost.value.code == "E610"
    for error in (lost.value, unstarted.value):
        assert "a limit of 20 open files (ulimit -n)" in error.found
        assert error.fix.startswith("allow more open files: ulimit -n 4096 (a new shell; this one may have 50)")
        assert "--set train.workers=0" in error.fix


class Raising:
    def __init__(self, text):
        self.text = text

    def __next__(self):
        raise RuntimeError(self.text)


def test_workers_that_were_started_end_when_the_next_one_cannot_be():
    """They ignore SIGTERM, and Python waits at its end for all that it has started: in a process of its own."""
    script = textwrap.dedent("""
        import time

        import torch

        from medseg.engine_stream import BatchStream
        from medseg.errors import ResourceError

        class Maker(torch.utils.data.Dataset):
            on_gpu, iterations = False, 3

            def __getitem__(self, key):
                return key

        real, made = torch.multiprocessing.Queue, []

        def third_fails():  # of the results, of the first worker, of the second
            if len(made) == 2:
                time.sleep(2)  # the first worker begins
                raise OSError(24, "Too many open files")
            made.append(real())
            return made[-1]

        torch.multiprocessing.Queue = third_fails
        try:
            BatchStream(Maker(), workers=2)
        except ResourceError as error:
            print(error.message, flush=True)
    """)
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "data workers cannot be started\n"
