"""Checkpoints: whole at every moment, known by their sums, fallen back from and told, never code."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_pipeline

from medseg.checkpoint import CheckpointStore, load_model, read_state
from medseg.checkpoint_run import FREE
from medseg.config import to_yaml
from medseg.errors import CheckpointError, ResourceError
from medseg.files import FAIL_POINTS
from medseg.networks import build_network


def state(number: int) -> dict:
    return {"number": number, "weights": torch.full((1000,), float(number))}


def test_last_previous_and_best_are_kept(tmp_path):
    store = CheckpointStore(tmp_path)
    for number in range(4):
        store.save(state(number))
    store.save(state(9), "best", facts={"epoch": 3})
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "last.prev.pt", "best.pt", "index.json"}
    assert read_state(tmp_path / "last.pt")["number"] == 3
    assert read_state(tmp_path / "last.prev.pt")["number"] == 2
    found, notices = store.load("best")
    assert (found["number"], notices) == (9, [])
    known = json.loads((tmp_path / "index.json").read_text())["known"]
    assert all(len(digest) == 64 for digest in known)
    assert {"name": "best.pt", "epoch": 3} in known.values()
    assert len(known) <= 8


def damage(path: Path, how: str) -> None:
    raw = path.read_bytes()
    middle = raw.index(b"\x00\x00\x80\x3f", len(raw) // 4) if b"\x00\x00\x80\x3f" in raw else len(raw) // 2
    changed = {
        "truncated": raw[: len(raw) // 2],
        "flipped": raw[:middle] + bytes([raw[middle] ^ 0x40]) + raw[middle + 1 :],
        "empty": b"",
        "text": b"<html>not found</html>",
    }
    path.write_bytes(changed[how])


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty", "text"])
@pytest.mark.parametrize("index", [True, False])
def test_a_damaged_last_falls_back_and_says_so(tmp_path, how, index):
    store = CheckpointStore(tmp_path)
    store.save(state(1))
    store.save(state(2))
    damage(tmp_path / "last.pt", how)
    if not index:
        (tmp_path / "index.json").unlink()
    found, notices = store.load()
    assert found["number"] == 1
    assert "last.pt cannot be used" in notices[0]
    assert "last.prev.pt" in notices[1]
    damage(tmp_path / "last.prev.pt", how)
    with pytest.raises(CheckpointError, match="no checkpoint to continue from") as caught:
        store.load()
    assert caught.value.exit_code == 3


def test_torch_itself_would_load_the_flipped_file(tmp_path):
    """The reason for the sums: this test fails when torch begins to check, and the sums could go."""
    store = CheckpointStore(tmp_path)
    store.save(state(1))
    damage(tmp_path / "last.pt", "flipped")
    assert isinstance(torch.load(tmp_path / "last.pt", weights_only=True), dict)
    with pytest.raises(CheckpointError, match="checksum"):
        read_state(tmp_path / "last.pt")


@pytest.mark.parametrize("point", ["opened", "written", "synced", "indexed", "rotated", "verified", "renamed", "saved"])
@pytest.mark.parametrize("before", [0, 1, 3])
def test_stopped_at_any_point_a_whole_checkpoint_is_there(tmp_path, point, before):
    """The process is killed inside the save, at each named point; a fresh process loads the old state or the new."""
    script = f"""
import os, signal, torch
from medseg.checkpoint import CheckpointStore
from medseg.files import FAIL_POINTS
from medseg.networks import build_network
store = CheckpointStore({str(tmp_path)!r})
for number in range({before}):
    store.save({{"number": number, "weights": torch.zeros(10)}})
calls = []
def stop():
    # the index is written through the same points: the checkpoint's own ones come first and last
    os.kill(os.getpid(), signal.SIGKILL)
FAIL_POINTS[{point!r}] = stop
store.save({{"number": {before}, "weights": torch.zeros(10)}})
"""
    pid = os.fork()
    if pid == 0:
        try:
            exec(compile(script, "save", "exec"), {})
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    store = CheckpointStore(tmp_path)
    done = point in ("renamed", "saved")
    if before == 0 and not (tmp_path / "last.pt").exists():
        with pytest.raises(CheckpointError):
            store.load()
    else:
        found, notices = store.load()
        assert found["number"] in ({before} if done and point == "saved" else {before - 1, before})
        assert notices == []
    store.save(state(before + 1))
    assert store.load()[0]["number"] == before + 1


@pytest.mark.parametrize("name", ["last", "best"])
def test_stopped_again_and_again_the_sums_of_what_stands_are_kept(tmp_path, monkeypatch, name):
    """Every stopped save leaves a sum of a file that never got its name."""
    store = CheckpointStore(tmp_path)
    for number in range(2):
        store.save(state(number), name)

    def stop():
        raise KeyboardInterrupt

    monkeypatch.setitem(FAIL_POINTS, "indexed", stop)
    for number in range(20):
        with pytest.raises(KeyboardInterrupt):
            store.save(state(10 + number), name)
    assert (store.load(name)[0]["number"], store.load(name)[1]) == (1, [])
    if name == "last":
        assert store.read(tmp_path / "last.prev.pt")["number"] == 0
    assert len(store.index["known"]) <= 9  # and it does not grow for ever


def test_a_damaged_file_does_not_take_the_place_of_the_one_before(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    for number in range(2):
        store.save(state(number))
    damage(tmp_path / "last.pt", "flipped")
    assert store.load()[0]["number"] == 0

    def stop():
        raise KeyboardInterrupt

    monkeypatch.setitem(FAIL_POINTS, "rotated", stop)
    with pytest.raises(KeyboardInterrupt):  # killed before the new file has its name
        store.save(state(2))
    assert store.load()[0]["number"] == 0
    monkeypatch.delitem(FAIL_POINTS, "rotated")
    store.save(state(2))
    assert [read_state(tmp_path / name)["number"] for name in ("last.pt", "last.prev.pt")] == [2, 0]


def test_a_full_disk_leaves_the_old_one(tmp_path):
    script = f"""
import resource, sys, torch
from medseg.checkpoint import CheckpointStore
from medseg.errors import ResourceError
store = CheckpointStore({str(tmp_path)!r})
store.save({{"number": 1, "weights": torch.zeros(10)}})
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    store.save({{"number": 2, "weights": torch.zeros(100_000)}})
except ResourceError as error:
    print(error.code, error.file)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["E501", str(tmp_path / "last.pt")]
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "index.json"}
    assert CheckpointStore(tmp_path).load()[0]["number"] == 1


def test_a_folder_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    def refuse():
        raise PermissionError(13, "Permission denied", str(tmp_path / "last.pt"))

    monkeypatch.setitem(FAIL_POINTS, "opened", refuse)
    with pytest.raises(ResourceError) as caught:
        CheckpointStore(tmp_path).save(state(1))
    assert caught.value.code == "E502"
    assert list(tmp_path.iterdir()) == []


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("variable", [None, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch, variable, legacy):
    if variable:
        monkeypatch.setenv(variable, "1")
    canary, path = tmp_path / "canary", tmp_path / "best.pt"
    if legacy:
        path.write_bytes(pickle.dumps({"format": "medseg-checkpoint-1", "x": Canary(str(canary))}))
    else:
        torch.save({"format": "medseg-checkpoint-1", "x": Canary(str(canary))}, path)
    for load in (read_state, load_model, lambda p: CheckpointStore(p.parent).load("best")):
        with pytest.raises(CheckpointError):
            load(path)
    assert not canary.exists()
    if not legacy:
        torch.load(path, weights_only=False)  # the canary works
        assert canary.exists()


def test_files_that_are_none_are_told(tmp_path):
    with pytest.raises(CheckpointError, match="no such"):
        read_state(tmp_path / "none.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="empty"):
        read_state(tmp_path / "empty.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("a.txt", "not tensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_state(tmp_path / "zip.pt")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of this program"):
        read_state(tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no run, checkpoint or package"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no run or checkpoint given"):
        load_model([])
    torch.save({"format": "medseg-checkpoint-1"}, tmp_path / "bare.pt")
    with pytest.raises(CheckpointError, match="lacks what a model needs"):
        load_model(tmp_path / "bare.pt")


@given(position=st.floats(0, 1), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_any_flipped_bit_is_noticed(tmp_path_factory, position, bit):
    folder = tmp_path_factory.mktemp("flip")
    store = CheckpointStore(folder)
    store.save(state(1))
    raw = bytearray((folder / "last.pt").read_bytes())
    raw[min(int(position * len(raw)), len(raw) - 1)] ^= 1 << bit
    (folder / "last.pt").write_bytes(raw)
    with pytest.raises(CheckpointError):
        store.load()
    (folder / "index.json").unlink()
    try:
        # without the index bits between the archive's members may change: the content may not
        found = store.load()[0]
    except CheckpointError:
        return
    assert torch.equal(found["weights"], state(1)["weights"])
    assert found["number"] == 1


def test_without_hard_links_the_previous_one_is_a_copy(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store = CheckpointStore(tmp_path)
    store.save(state(1))
    store.save(state(2))
    assert [read_state(tmp_path / name)["number"] for name in ("last.pt", "last.prev.pt")] == [2, 1]
    damage(tmp_path / "last.pt", "flipped")
    assert store.load()[0]["number"] == 1
    assert not list(tmp_path.glob(".medseg-*"))


def test_a_disk_that_changes_what_is_written_leaves_the_old_one(tmp_path, monkeypatch):
    store, save = CheckpointStore(tmp_path), torch.save
    store.save(state(1))

    def flip(value, path):
        save(value, path)
        damage(Path(path), "flipped")

    monkeypatch.setattr(torch, "save", flip)
    with pytest.raises(CheckpointError) as caught:
        store.save(state(2))
    assert caught.value.code == "E361"
    found, notices = store.load()
    assert (found["number"], notices) == (1, [])
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "index.json"}


SPLIT = {"seed": 0, "folds": 3, "fold": 0, "training": ["c0", "c1"], "validation": ["c2"]}


def of_run(number: int, split: dict | None = None, **changes) -> dict:
    return {**state(number), "pipeline": tiny_pipeline(**changes).to_dict(), "split": split or SPLIT}


@pytest.fixture
def begun(tmp_path) -> CheckpointStore:
    """A run that has saved twice, with the files that say what it is."""
    store = CheckpointStore(tmp_path)
    (tmp_path / "pipeline.yaml").write_text(to_yaml(tiny_pipeline()))
    (tmp_path / "split.json").write_text(json.dumps(SPLIT))
    store.save(of_run(1))
    store.save(of_run(2))
    assert store.load()[0]["number"] == 2
    return store


OTHERS = {
    "seed": (of_run(9, seed=1), "train.seed", "0 (pipeline.yaml)", "1"),
    "network": (of_run(9, network={"UNet": {"channels": [6, 8]}}), "network", "4, 8", "6, 8"),
    "dataset": (of_run(9, dataset="balls"), "dataset", "tiny (pipeline.yaml)", "balls"),
    "fold": (
        of_run(9, {**SPLIT, "fold": 1, "training": ["c1", "c2"], "validation": ["c0"]}),
        "fold and 2 more", "0 (split.json)", "1",
    ),
    "cases": (of_run(9, {**SPLIT, "training": ["c0", "c2"]}), "training", "c0, c1 (split.json)", "c0, c2"),
}  # fmt: skip


@pytest.mark.parametrize("known", [True, False], ids=["index", "no index"])
@pytest.mark.parametrize("which", OTHERS)
def test_a_checkpoint_of_another_run_is_not_taken(begun, which, known):
    other, field, expected, found = OTHERS[which]
    begun.save(other)  # last.pt of another run, with its sum in the index; this run's own is last.prev.pt
    if not known:
        (begun.folder / "index.json").unlink()
    taken, notices = begun.load()
    assert taken["number"] == 2
    assert "of another run than the folder" in notices[0]
    assert notices[1:] == ["continuing from last.prev.pt"]
    before = {path.name: path.read_bytes() for path in begun.folder.glob("*.pt")}
    (begun.folder / "last.prev.pt").unlink()
    with pytest.raises(CheckpointError) as caught:
        begun.load()
    error = caught.value
    assert (error.code, error.exit_code, error.field) == ("E366", 3, field)
    assert expected in (error.expected or "")
    assert found in (error.found or "")
    assert error.file == str(begun.folder / "last.pt")
    assert (begun.folder / "last.pt").read_bytes() == before["last.pt"]


def test_what_may_change_while_a_run_goes_on_is_no_other_run(begun):
    from medseg.training_plan import CHANGEABLE

    assert FREE == CHANGEABLE
    later = tiny_pipeline(epochs=None, minutes=3.0, patience=4, workers=2, save_minutes=1.0, title="said anew")
    (begun.folder / "pipeline.yaml").write_text(to_yaml(later))
    for _ in range(2):
        taken, notices = begun.load()
        assert (taken["number"], notices) == (2, [])
        (begun.folder / "index.json").unlink(missing_ok=True)


def test_without_any_file_that_tells_the_run_the_checkpoint_is_taken_and_that_is_told(begun):
    (begun.folder / "index.json").unlink()
    (begun.folder / "pipeline.yaml").write_text("train: [")  # damaged: split.json still tells
    assert begun.load()[1] == []
    (begun.folder / "split.json").write_bytes(b"{")
    taken, notices = begun.load()
    assert taken["number"] == 2
    assert len(notices) == 1
    assert "taken as it is" in notices[0]


def of_model(folder: Path, *, threshold=None, dims=3, labels=3, in_channels=1, width=4, **changes) -> Path:
    """A run with an untrained network that can predict."""
    pipeline = tiny_pipeline(**changes)
    part = {"image": "{id}.nii", "label": "l/{id}.nii"}
    facts = {
        "name": "tiny", "title": "t", "modality": "none", "dims": dims, "channels": ["image"], "unit": "mm",
        "labels": {n: f"l{n}" for n in range(labels)}, "files": {"training": part},
    }  # fmt: skip
    network = build_network(
        "UNet", spatial_dims=len(pipeline.train.patch), in_channels=in_channels, out_channels=labels,
        **{**pipeline.network.arguments, "channels": [width, 8]},
    )  # fmt: skip
    CheckpointStore(folder).save({
        "pipeline": pipeline.to_dict(), "dataset": facts, "in_channels": in_channels, "out_channels": labels,
        "network_state": network.state_dict(), "threshold": threshold, "progress": {"epoch": 7}, "versions": {},
    }, "best")  # fmt: skip
    return folder


def test_weights_of_another_network_are_told(tmp_path):
    with pytest.raises(CheckpointError, match="the weights are not those of its network") as caught:
        load_model(of_model(tmp_path, width=6))
    assert (caught.value.code, caught.value.exit_code) == ("E363", 3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"preprocess": [{"ScaleIntensityd": {}}]}, "preprocess"),
        ({"labels": 2}, "labels"),
        ({"in_channels": 2}, "channels"),
        ({"patch": [8, 8]}, "dimensions"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_models_that_differ_form_no_ensemble(tmp_path, change, named):
    one, other = of_model(tmp_path / "a"), of_model(tmp_path / "b", **change)
    with pytest.raises(CheckpointError, match=f"their {named} differ") as caught:
        load_model([one, other])
    assert (caught.value.code, caught.value.file) == ("E364", str(other / "best.pt"))


def test_an_ensemble_has_the_mean_threshold_or_none(tmp_path):
    runs = [of_model(tmp_path / str(t), threshold=t) for t in (0.3, 0.5)]
    both = load_model(runs)
    assert len(both.networks) == 2
    assert both.network is both.networks[0]
    assert both.threshold == pytest.approx(0.4)
    assert [member["epoch"] for member in both.metadata["members"]] == [7, 7]
    assert load_model([*runs, of_model(tmp_path / "none")]).threshold is None
    assert load_model(runs[0]).threshold == 0.3


def test_an_ensembles_pipeline_has_the_mean_threshold_too(tmp_path):
    steps = [{"Threshold": {"value": "training"}}, {"Threshold": {"value": 0.25}}]
    runs = [of_model(tmp_path / str(t), threshold=t, labels=2, postprocess=steps) for t in (0.3, 0.5)]
    values = [part.arguments["value"] for part in load_model(runs).pipeline.postprocess]
    assert values == [pytest.approx(0.4), 0.25]


def test_a_chosen_threshold_replaces_the_word_in_the_pipeline(tmp_path):
    steps = [{"Threshold": {"value": "validation"}}, {"Threshold": {"value": 0.25}}]
    model = load_model(of_model(tmp_path, threshold=0.7, labels=2, postprocess=steps))
    assert [part.arguments["value"] for part in model.pipeline.postprocess] == [0.7, 0.25]
