"""Training: end to end, resumed bit for bit, stopped by signals, ended by budget and patience, told what goes wrong."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import tifffile
import torch
from tiny import ENTRY, tiny_pipeline, write_cases

from medseg import engine_session, engine_validation, handlers, training
from medseg.checkpoint import CheckpointStore, load_model, read_state
from medseg.component import Component
from medseg.config import DatasetSpec, to_yaml
from medseg.data import Case, find_cases, load_sample
from medseg.engine import TrainStep
from medseg.engine_budget import Budget, Progress
from medseg.engine_validation import Validator
from medseg.errors import CheckpointError, ConfigError, LabelError, ResourceError, TrainingError, UsageError
from medseg.evaluation import evaluate, pool_runs
from medseg.export import export_bundle
from medseg.export_card import model_card
from medseg.handlers_signals import Signals
from medseg.networks import ResUNet, UNet
from medseg.package import traced_network
from medseg.run import RunFolder
from medseg.training import find_learning_rate, train
from medseg.training_intensity import intensity_notices
from medseg.training_plan import Plan
from medseg.training_rate import suggest
from medseg.training_threshold import CANDIDATES

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_cases(folder / "data")
    return folder


def run(place: Path, pipeline, **options) -> Path:
    options = {"output": place / "runs", "progress": False, **options}
    return train(pipeline, data=place / "data", cache=place / "cache", device="cpu", **options)


@pytest.fixture(scope="module")
def reference(place) -> Path:
    """An uninterrupted run of two epochs, three iterations each."""
    return run(place, tiny_pipeline(ema=0.9))


def state_of(folder: Path) -> dict:
    return read_state(folder / "last.pt")


def assert_equal_runs(one: Path, two: Path) -> None:
    first, second = state_of(one), state_of(two)
    for part in ("network_state", "average_state"):
        if first[part] is None:
            assert second[part] is None
            continue
        assert first[part].keys() == second[part].keys()
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), name
    moments = zip(first["optimizer_state"]["state"].values(), second["optimizer_state"]["state"].values(), strict=True)
    for a, b in moments:
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert first["progress"]["best"] == second["progress"]["best"]
    losses = [[row["loss"] for row in state["progress"]["history"]] for state in (first, second)]
    assert losses[0] == losses[1]


def test_a_run_leaves_all_its_files(reference, place):
    names = {path.relative_to(reference).as_posix() for path in reference.rglob("*") if path.is_file()}
    assert {"best.pt", "last.pt", "index.json", "log.csv", "pipeline.yaml", "split.json", "provenance.json"} <= names
    assert json.loads((reference / "status.json").read_text())["state"] == "finished"
    split = json.loads((reference / "split.json").read_text())
    assert sorted(split["training"] + split["validation"]) == [f"c{n}" for n in range(6)]
    for case in split["validation"]:
        found = nibabel.load(reference / "validation" / f"{case}.nii.gz")
        image = nibabel.load(place / "data" / "images" / f"{case}.nii.gz")
        assert found.shape == image.shape
        assert np.array_equal(found.affine, image.affine)
        assert set(np.unique(found.dataobj)) <= {0, 1, 2}
    assert any(name.startswith("tensorboard/events") for name in names)
    assert not [name for name in names if ".medseg-" in name]


def test_the_log_has_one_row_for_each_epoch(reference):
    rows = list(csv.DictReader((reference / "log.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert [row["iteration"] for row in rows] == ["3", "6"]
    # PolynomialLR 0.9 before iterations 3 and 6 of 6
    assert float(rows[0]["lr"]) == pytest.approx(0.01 * (1 - 2 / 6) ** 0.9)
    assert float(rows[1]["lr"]) == pytest.approx(0.01 * (1 - 5 / 6) ** 0.9)
    for row in rows:
        mean = (float(row["val Dice ball"]) + float(row["val Dice core"])) / 2
        assert float(row["score"]) == pytest.approx(mean)
        assert 0 <= float(row["wait_share"]) <= 1
        assert float(row["images_per_second"]) > 0


def test_the_model_predicts_as_in_validation(reference, place):
    model = load_model(reference)
    assert model.metadata["out_channels"] == 3
    split = json.loads((reference / "split.json").read_text())
    headers = [nibabel.load(place / f"data/images/{case}.nii.gz") for case in split["training"]]
    zooms = np.array([header.header.get_zooms() for header in headers])
    np.testing.assert_allclose(model.metadata["seen"]["spacing"], [zooms.min(axis=0), zooms.max(axis=0)])
    assert sum(model.metadata["seen"]["axes"].values()) == len(headers)
    best = read_state(reference / "best.pt")
    assert all(torch.equal(v, best["network_state"][k]) for k, v in model.network.state_dict().items())
    assert not model.network.training
    ensemble = load_model([reference, reference / "last.pt"])
    assert len(ensemble.networks) == 2


def test_the_folder_of_pooled_scores_stands_for_the_ensemble(reference, tmp_path):
    other = tmp_path / "two"
    shutil.copytree(reference, other)
    shutil.copytree(reference, tmp_path / "one")
    (tmp_path / "cross_validation").mkdir()
    summary = tmp_path / "cross_validation" / "summary.json"
    summary.write_text(json.dumps({"runs": ["one", "two"], "scores": []}))
    model = load_model(tmp_path / "cross_validation")
    assert model.metadata["sources"] == [str(tmp_path / name / "best.pt") for name in ("one", "two")]
    assert len(model.networks) == 2
    shutil.rmtree(other)
    with pytest.raises(CheckpointError, match="two"):  # half of an ensemble is not taken for the whole
        load_model(tmp_path / "cross_validation")
    summary.write_text(json.dumps({"runs": ["../one"]}))
    with pytest.raises(CheckpointError):
        load_model(tmp_path / "cross_validation")


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_after_any_iteration_it_goes_on_bit_for_bit(reference, place, workers, monkeypatch):
    pipeline = tiny_pipeline(ema=0.9, workers=workers)
    # seen one iteration later: after 2 of 6, in the validation after 3, after 5
    stops = iter([1, 3, 4])
    wanted = [next(stops)]
    real = training._outputs

    def outputs(session, **options):
        class Stopper:
            def iterated(self, session):
                if session.progress.iteration == wanted[0]:
                    os.kill(os.getpid(), signal.SIGTERM)

            def finished_epoch(self, session, row): ...

            def close(self, session): ...

        return [Stopper(), *real(session, **options)]

    monkeypatch.setattr(training, "_outputs", outputs)
    with pytest.raises(SystemExit) as stopped:
        run(place, pipeline, output=place / f"stopped{workers}")
    assert stopped.value.code == 143
    folder = next((place / f"stopped{workers}" / "tiny").iterdir())
    assert json.loads((folder / "status.json").read_text())["exit_code"] == 143
    for wanted[0] in stops:
        with pytest.raises(SystemExit):
            run(place, None, resume=folder)
    wanted[0] = -1
    assert run(place, None, resume=folder) == folder
    assert_equal_runs(reference, folder)


def test_interrupted_during_validation_it_validates_when_resumed(reference, place, monkeypatch):
    from medseg import engine_validation

    real = engine_validation.Validator.measure
    calls = []

    def measure(self, *arguments):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *arguments)

    monkeypatch.setattr(engine_validation.Validator, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run(place, tiny_pipeline(ema=0.9), output=place / "validating")
    folder = next((place / "validating" / "tiny").iterdir())
    assert state_of(folder)["progress"]["step"] == 3
    run(place, None, resume=folder)
    assert_equal_runs(reference, folder)


class Killed(BaseException):
    """As if the process had ended here."""


@pytest.fixture(scope="module")
def kept(place) -> Path:
    """An uninterrupted run of two epochs that keeps each one's checkpoint."""
    return run(place, tiny_pipeline(keep_every=1), output=place / "kept")


def assert_same_record(one: Path, two: Path) -> None:
    """The same checkpoints, the same best weights, and a log that differs in what is measured with a clock alone."""
    assert {path.name for path in one.glob("*.pt")} == {path.name for path in two.glob("*.pt")}
    first, second = (read_state(folder / "best.pt") for folder in (one, two))
    assert (first["progress"]["epoch"], first["metrics"]) == (second["progress"]["epoch"], second["metrics"])
    assert all(torch.equal(value, second["network_state"][name]) for name, value in first["network_state"].items())
    clocked = ("minutes", "images_per_second", "wait_share", "memory_process_mb")
    logs = [list(csv.DictReader((folder / "log.csv").open())) for folder in (one, two)]
    logs = [[{k: v for k, v in row.items() if k not in clocked} for row in rows] for rows in logs]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("which", [1, 2])
def test_interrupted_in_a_validation_checkpoint_and_log_are_those_of_an_unbroken_run(
    kept, place, tmp_path, which, monkeypatch
):
    real, calls = Validator.predict, []

    def predict(*arguments, **options):
        calls.append(1)
        if len(calls) == 2 * which - 1:  # two cases are validated
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    monkeypatch.setattr(Validator, "predict", predict)
    with pytest.raises(SystemExit):
        run(place, tiny_pipeline(keep_every=1), output=tmp_path)
    folder = next((tmp_path / "tiny").iterdir())
    assert state_of(folder)["progress"]["step"] == 3
    run(place, None, resume=folder)
    assert_equal_runs(kept, folder)
    assert_same_record(kept, folder)
    row = list(csv.DictReader((folder / "log.csv").open()))[which - 1]
    assert row["images_per_second"] == ""  # no iteration of this session belongs to it


def test_killed_after_any_save_the_resumed_run_has_the_same_files(kept, place, tmp_path, monkeypatch):
    real, left = CheckpointStore.save, [0]

    def save(store, state, name="last", **options):
        path = real(store, state, name, **options)
        left[0] -= 1
        if not left[0]:
            raise Killed
        return path

    monkeypatch.setattr(CheckpointStore, "save", save)
    for count in range(1, 7):  # three saves an epoch
        left[0] = count
        with pytest.raises(Killed):
            run(place, tiny_pipeline(keep_every=1), output=tmp_path / str(count))
        folder = next((tmp_path / str(count) / "tiny").iterdir())
        if not (folder / "last.pt").exists():
            assert count == 1
            continue
        run(place, None, resume=folder)
        assert_equal_runs(kept, folder)
        assert_same_record(kept, folder)


def killed_after(epoch, scores, place, output, monkeypatch):
    """A run of four epochs, killed when last.pt of this one stands; validations take their scores from the list."""
    scores, real, save = list(scores), Validator.__call__, CheckpointStore.save

    def scored(*arguments, **options):
        return dataclasses.replace(real(*arguments, **options), score=scores.pop(0))

    def killed(store, state, name="last", **options):
        path = save(store, state, name, **options)
        if name == "last" and state["progress"]["epoch"] == epoch:
            raise Killed
        return path

    monkeypatch.setattr(handlers, "_SAVE_SHARE", 1e9)  # after every epoch
    monkeypatch.setattr(Validator, "__call__", scored)
    monkeypatch.setattr(CheckpointStore, "save", killed)
    with pytest.raises(Killed):
        run(place, tiny_pipeline(epochs=4, iterations_per_epoch=1), output=output)
    monkeypatch.setattr(CheckpointStore, "save", save)
    return next((output / "tiny").iterdir()), scores


@pytest.mark.parametrize("lost", [False, True])
def test_the_epoch_that_is_named_at_the_end_is_that_of_the_weights(place, tmp_path, monkeypatch, capsys, lost):
    """Killed after the third epoch, and continued with other scores; `lost`: last.pt was damaged as well."""
    folder, scores = killed_after(3, [0.5, 0.4, 0.9], place, tmp_path, monkeypatch)
    third = read_state(folder / "last.pt")["network_state"]
    if lost:
        CheckpointStore(folder).save(read_state(folder / "last.pt"), "best")
        (folder / "last.pt").write_bytes(b"")
    scores[:] = [0.3, 0.2]
    capsys.readouterr()
    run(place, None, resume=folder, progress=True)
    told = capsys.readouterr().err
    best = read_state(folder / "best.pt")
    # where last.pt stands, the third epoch is not trained again; from last.prev.pt it is, and was better than now
    assert best["progress"]["epoch"] == 3
    assert all(torch.equal(value, third[name]) for name, value in best["network_state"].items())
    assert "with the weights of epoch 3" in told
    assert ("best.pt is of epoch 3, but the checkpoint that is continued was best after epoch 1" in told) is lost
    assert state_of(folder)["progress"]["best"] == (0.5 if lost else 0.9)


def test_a_lost_best_is_found_anew(place, tmp_path, monkeypatch, capsys):
    """best.pt vanishes after the second epoch, which was worse than the first: the third counts, worse or not."""
    folder, scores = killed_after(2, [0.9, 0.4], place, tmp_path, monkeypatch)
    (folder / "best.pt").unlink()
    scores[:] = [0.3, 0.2]
    run(place, None, resume=folder, progress=True)
    assert "there is no whole best.pt (of epoch 1)" in capsys.readouterr().err
    assert read_state(folder / "best.pt")["progress"]["epoch"] == 3
    assert (state_of(folder)["progress"]["best"], state_of(folder)["progress"]["best_epoch"]) == (0.3, 3)


def test_a_finished_run_is_not_resumed_but_can_be_extended(reference, place, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(reference, copy)
    with pytest.raises(UsageError, match="nothing to continue"):
        run(place, None, resume=copy)
    for setting in ("batch=4", "validation_cases=1"):  # scores of other cases could not be compared with the best one
        with pytest.raises(ConfigError, match="cannot be changed"):
            run(place, None, resume=copy, overrides=[f"train.{setting}"])
    run(place, None, resume=copy, overrides=["train.epochs=4"])
    rows = state_of(copy)["progress"]["history"]
    assert [row["iteration"] for row in rows] == [3, 6, 9, 12]
    # the schedule spans the new budget: iteration 9 of 12 begins with 8/12 spent
    assert rows[2]["lr"] == pytest.approx(0.01 * (1 - 8 / 12) ** 0.9)
    notices = json.loads((copy / "provenance.json").read_text())["notices"]
    assert any("schedule now spans the new budget" in notice for notice in notices)


def test_resumed_on_other_processes_threads_or_number_type_it_says_that_it_is_inexact():
    saved = {"processes": 1, "threads": 4, "precision": "bf16", "replicas": 2, "layout": "channels last"}

    def told(processes, threads, precision, parts=2, layout="channels last"):
        hardware = SimpleNamespace(threads=threads, precision=precision)
        session = SimpleNamespace(
            group=SimpleNamespace(world=processes), hardware=hardware, progress=Progress(), run=RunFolder(Path()),
            step=SimpleNamespace(parts=parts, layout=layout),
        )  # fmt: skip
        here = Path()
        plan = Plan(tiny_pipeline(), SimpleNamespace(), here, here, "tiny", state=saved)  # pyright: ignore
        return plan.reopen(session, {"c1": "abc"})  # pyright: ignore

    assert told(1, 4, "bf16") == []
    rest = "the run goes on, but not bit for bit as it would have"
    assert told(2, 4, "bf16") == [f"processes: 1 before, 2 now: {rest}"]
    assert told(1, 2, "fp32") == [f"threads: 4 before, 2 now: {rest}", f"precision: bf16 before, fp32 now: {rest}"]
    assert told(1, 4, "bf16", 1) == [f"replicas: 2 before, 1 now: {rest}"]
    assert told(1, 4, "bf16", 2, "contiguous") == [f"layout: channels last before, contiguous now: {rest}"]
    del saved["replicas"], saved["layout"]  # an older run
    assert told(1, 4, "bf16", 1) == []


@pytest.mark.parametrize(("changed", "finished", "waited"), [("workers", "patience", 3), ("patience", "", 0)])
def test_a_run_that_stopped_early_trains_on_only_where_its_end_was_moved(changed, finished, waited):
    """Interrupted while its last predictions were made: continued with other workers it has nothing more to train."""
    step = SimpleNamespace(parts=1, layout="contiguous")
    session = SimpleNamespace(
        progress=Progress(epoch=5, best=0.5, waited=3, finished="patience"), budget=Budget(100, None, None, 10),
        step=step, run=SimpleNamespace(read_json=lambda name: None), group=SimpleNamespace(world=1),
        hardware=SimpleNamespace(threads=1, precision="fp32"),
    )  # fmt: skip
    state = {"processes": 1, "threads": 1, "precision": "fp32", "layout": "contiguous"}
    here = Path()
    plan = Plan(tiny_pipeline(), SimpleNamespace(), here, here, "tiny", state=state, changed=(changed,))  # pyright: ignore
    assert plan.reopen(session, {}) == []  # pyright: ignore
    assert (session.progress.finished, session.progress.waited) == (finished, waited)


def test_a_case_that_changed_since_the_run_began_is_told(reference, place, tmp_path):
    copy, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(reference, copy)
    shutil.copytree(place / "data", data)
    changed = data / "images/c2.nii.gz"
    image = nibabel.load(changed)
    nibabel.save(nibabel.Nifti1Image(image.get_fdata() + 1, image.affine), changed)
    train(None, resume=copy, data=data, cache=place / "cache", overrides=["train.epochs=3"], progress=False)
    facts = json.loads((copy / "provenance.json").read_text())
    (notice,) = [text for text in facts["notices"] if "not what they were" in text]
    assert notice.startswith("1 of 6 cases are not what they were when the run began (c2)")
    before = json.loads((reference / "provenance.json").read_text())["cases"]
    assert facts["earlier"][-1]["cases"] == {"c2": before["c2"]}
    assert facts["cases"]["c2"] != before["c2"]


def test_a_run_is_trained_by_one_process_at_a_time(reference, place, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(reference, copy)
    before = (copy / "last.pt").read_bytes()
    with RunFolder(copy).alone(), pytest.raises(ResourceError) as caught:
        run(place, None, resume=copy, overrides=["train.epochs=3"])
    assert caught.value.code == "E503"
    assert (copy / "last.pt").read_bytes() == before
    assert json.loads((copy / "status.json").read_text())["state"] == "finished"  # the other process's word stands
    run(place, None, resume=copy, overrides=["train.epochs=3"])


def test_nothing_to_resume_is_an_error(place, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no run here"):
        run(place, None, resume=tmp_path / "empty")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "status.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint to continue from") as caught:
        run(place, None, resume=tmp_path / "begun")
    assert caught.value.fix == "it ended before anything was saved: train it anew"


def test_a_damaged_last_checkpoint_costs_one_interval_and_is_told(reference, place, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(reference, copy)
    raw = bytearray((copy / "last.pt").read_bytes())
    raw[len(raw) // 2] ^= 1
    (copy / "last.pt").write_bytes(raw)
    run(place, None, resume=copy, overrides=["train.epochs=2"])
    assert any("last.prev.pt" in notice for notice in json.loads((copy / "provenance.json").read_text())["notices"])
    assert_equal_runs(reference, copy)


def test_a_last_checkpoint_of_another_model_is_not_taken(reference, place, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(reference, copy)
    wider = {"UNet": {"channels": [6, 8], "padding": "same", "norm": "batch"}}
    other = run(place, tiny_pipeline(epochs=1, network=wider), output=tmp_path / "other")
    shutil.copy(other / "last.pt", copy / "last.pt")
    run(place, None, resume=copy, overrides=["train.epochs=2"])
    assert any("last.prev.pt" in notice for notice in json.loads((copy / "provenance.json").read_text())["notices"])
    assert_equal_runs(reference, copy)
    mixed = {**state_of(reference), "network_state": state_of(other)["network_state"]}
    CheckpointStore(copy).save(mixed)
    before = sorted(path.name for path in copy.glob("*.pt"))
    with pytest.raises(CheckpointError, match="not one of this run's network") as caught:
        run(place, None, resume=copy, overrides=["train.epochs=3"])
    assert (caught.value.code, caught.value.exit_code) == ("E363", 3)
    assert sorted(path.name for path in copy.glob("*.pt")) == before


def test_budget_in_iterations_ends_within_an_epoch(place):
    folder = run(place, tiny_pipeline(iterations=4))
    progress = state_of(folder)["progress"]
    assert progress["iteration"] == 4
    assert progress["finished"] == "budget"
    assert [row["iteration"] for row in progress["history"]] == [3, 4]


def test_budget_in_minutes_ends_and_fits_the_schedule(place):
    folder = run(place, tiny_pipeline(minutes=0.02, schedule={"PolynomialLR": {"power": 1.0}}))
    progress = state_of(folder)["progress"]
    assert progress["finished"] == "budget"
    assert progress["minutes"] >= 0.02
    last = progress["history"][-1]
    assert 0 <= last["lr"] < 0.01


def test_validation_takes_a_twentieth_of_a_budget_in_minutes(place, monkeypatch):
    now = [0.0]  # a clock on which an iteration takes a minute, and a validation one too

    def slow(kind):
        plain = kind.__call__

        def call(self, *arguments, **named):
            now[0] += 60.0
            return plain(self, *arguments, **named)

        monkeypatch.setattr(kind, "__call__", call)

    monkeypatch.setattr(engine_session, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    slow(TrainStep)
    slow(Validator)
    folder = run(place, tiny_pipeline(minutes=100.0, iterations_per_epoch=2))
    history = state_of(folder)["progress"]["history"]
    # after the first epoch, whenever 19 minutes were trained since (epochs take two), and at the end, after 100 minutes
    assert [row["epoch"] for row in history if row["score"] is not None] == [1, 11, 21, 31, 41, 48]
    assert [row["minutes"] for row in history[:2]] == [3.0, 5.0]
    every = run(place, tiny_pipeline(epochs=4, iterations_per_epoch=2))
    assert all(row["score"] is not None for row in state_of(every)["progress"]["history"])


def test_a_run_that_ends_between_two_validations_is_validated_at_its_end(place, monkeypatch):
    now = [0.0]
    finish = handlers.finish_epoch

    def late(session, signals):
        gather = session.gather_loss

        def gathered():  # the last minute passes while an epoch without a validation is put on record
            gather()
            now[0] = 600.0 if session.progress.epoch == 1 else now[0]

        with monkeypatch.context() as patch:
            patch.setattr(session, "gather_loss", gathered)
            return finish(session, signals)

    monkeypatch.setattr(engine_session, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(handlers, "finish_epoch", late)
    progress = state_of(run(place, tiny_pipeline(minutes=10.0, iterations_per_epoch=2, validate_every=5)))["progress"]
    assert progress["validated"] == progress["epoch"] == 3


def test_accumulation_equals_the_larger_batch(place):
    # without batch norm, dropout and augmentation the mean of two half batches' gradients is the whole batch's
    network = {"UNet": {"channels": [4, 8], "padding": "same", "dropout": 0.0}}
    plain = {"network": network, "augment": [], "epochs": 1, "schedule": "ConstantLR"}
    loss = {"DistanceWeightedCELoss": {}}
    optimizer = {"SGD": {"lr": 0.05, "momentum": 0.9}}
    whole = run(place, tiny_pipeline(batch=2, iterations_per_epoch=2, loss=loss, optimizer=optimizer, **plain))
    halves = run(
        place, tiny_pipeline(batch=1, iterations_per_epoch=4, accumulate=2, loss=loss, optimizer=optimizer, **plain)
    )
    one, two = state_of(whole), state_of(halves)
    for name, value in one["network_state"].items():
        assert torch.allclose(value, two["network_state"][name], atol=1e-5), name


def test_early_stopping_after_patience_validations(place, capsys):
    folder = run(place, tiny_pipeline(epochs=30, patience=2, optimizer={"SGD": {"lr": 1e-9}}), progress=True)
    progress = state_of(folder)["progress"]
    assert progress["finished"] == "patience"
    assert progress["epoch"] == progress["best_epoch"] + 2 < 30
    told = f"stopped early: 2 validations without a better Dice than after epoch {progress['best_epoch']}\n"
    assert told in capsys.readouterr().err


def test_plateau_waits_for_no_validation_of_the_warm_up(place):
    plateau = {"ReduceLROnPlateau": {"factor": 0.1, "patience": 1, "threshold": 2.0, "warmup": 0.75}}
    folder = run(place, tiny_pipeline(epochs=5, iterations_per_epoch=1, schedule=plateau))
    rates = [float(row["lr"]) for row in csv.DictReader((folder / "log.csv").open())]  # of the beginning of each epoch
    assert rates == pytest.approx([1e-5, 0.01 * 0.2 / 0.75, 0.01 * 0.4 / 0.75, 0.01 * 0.6 / 0.75, 0.001])


def test_mlflow_is_looked_for_before_anything_is_prepared(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ResourceError, match="MLflow, or what"):
        train(tiny_pipeline(), data=tmp_path / "nowhere", output=tmp_path / "runs", mlflow=True, progress=False)
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_is_no_number_stops_and_names_the_cases(place, tmp_path):
    with pytest.raises(TrainingError, match="no number") as caught:
        run(place, tiny_pipeline(optimizer={"SGD": {"lr": 1e30}}, epochs=20), output=tmp_path)
    assert (caught.value.code, caught.value.field) == ("E601", "loss")
    assert re.fullmatch(r"the loss or its gradient is no number, \d+ steps in a row", caught.value.message)
    assert re.fullmatch(r"c\d(, c\d)*", str(caught.value.case))
    assert str(caught.value.found).startswith("iteration ")
    assert "a lower learning rate, train.clip or precision fp32" in str(caught.value.fix)
    assert "best.pt and last.pt, if any" in str(caught.value.fix)  # a run may fail before its first checkpoint
    assert "--init" not in str(caught.value.fix)
    folder = next((tmp_path / "tiny").iterdir())
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"


def test_fine_tuning_tells_what_was_loaded(reference, place):
    wider = {"UNet": {"channels": [4, 8, 16], "padding": "same", "norm": "batch", "dropout": 0.1}}
    folder = run(place, tiny_pipeline(epochs=1, network=wider), init=reference)
    notices = json.loads((folder / "provenance.json").read_text())["notices"]
    assert any("tensors loaded" in notice for notice in notices)
    assert any("not loaded" in notice for notice in notices)
    other = {"UNet": {"channels": [3, 6], "padding": "same", "norm": "instance"}}
    with pytest.raises(CheckpointError, match="no weight"):
        run(place, tiny_pipeline(network=other), init=reference)


def test_validation_cases_that_the_first_weights_know_are_told(reference, place):
    """The reference validates fold 0 alone, so its weights know every case of fold 1, and so do those begun with it."""
    trained = json.loads((reference / "split.json").read_text())["training"]
    fold_1 = run(place, tiny_pipeline(epochs=1), init=reference, fold=1)
    split = json.loads((fold_1 / "split.json").read_text())
    assert set(split["validation"]) <= set(trained)
    assert split["began_with"] == sorted(trained)
    last = run(place, tiny_pipeline(epochs=1), init=fold_1, fold=0)  # fold 1 was trained on the cases of fold 0
    for folder in (fold_1, last):
        cases = ", ".join(json.loads((folder / "split.json").read_text())["validation"])
        (told,) = (
            note for note in json.loads((folder / "provenance.json").read_text())["notices"] if "no test" in note
        )
        assert told.endswith(cases)
        assert told in evaluate(folder).summary["notes"]
        card = model_card(load_model(folder), folder)  # which is handed on, and names nobody
        assert f"Of them {len(cases.split(', '))} had trained" in card
        assert not any(f"{case}" in card for case in cases.split(", "))
    pooled = pool_runs([fold_1], output=place / "pooled").summary["notes"]
    assert any(cases in note for note in pooled for cases in split["validation"])
    clean = run(place, tiny_pipeline(epochs=1), init=reference, fold=0)
    assert not any("no test" in note for note in evaluate(clean).summary["notes"])
    longer = run(place, None, resume=fold_1, overrides=["train.epochs=2"])
    assert json.loads((longer / "split.json").read_text())["began_with"] == sorted(trained)


def test_a_patient_of_the_test_part_among_the_training_cases_is_told(tmp_path):
    data = write_cases(tmp_path / "data", 6)
    (data / "datasets.yaml").write_text(
        "tiny:\n  title: t\n  modality: none\n  dims: 3\n  channels: [image]\n  unit: mm\n"
        "  labels: {0: background, 1: ball, 2: core}\n  files: {csv: cases.csv}\n"
    )
    rows = [f"images/c{n}.nii.gz,labels/c{n}.nii.gz,p{n % 5},{'test' if n > 3 else ''}" for n in range(6)]
    (data / "cases.csv").write_text("\n".join(["image,label,patient,split", *rows]))  # c5 is of p0, as c0 is
    folder = run(tmp_path, tiny_pipeline(epochs=1, iterations_per_epoch=1, folds=2))
    notices = json.loads((folder / "provenance.json").read_text())["notices"]
    (told,) = [text for text in notices if "test case" in text]
    assert told.startswith("1 test case shares image or patient with training: c5;")


def test_an_unpadded_network_trains(place):
    network = {"UNet": {"channels": [4, 8], "padding": "valid"}}
    folder = run(place, tiny_pipeline(network=network, patch=[24, 24, 24], epochs=1))
    assert math.isfinite(state_of(folder)["progress"]["history"][0]["loss"])


def test_a_run_deforms_in_the_image_around_its_patches(tmp_path, monkeypatch):
    """From the file to the network: of a ramp that is turned a ramp remains, its mirror image would bend it."""
    ramp, label = np.tile(np.arange(48, dtype=np.float32)[:, None, None], (1, 48, 48)), np.zeros((48,) * 3, np.uint8)
    label[20:28, 20:28, 20:28] = 1  # patches are drawn around it: the whole context lies in the image
    for number in range(3):
        for name, array in (("images", ramp), ("labels", label)):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / f"data/{name}/c{number}.nii.gz")
    (tmp_path / "data/datasets.yaml").write_text(ENTRY)
    patches, forward = [], UNet.forward

    def watched(network, images):
        if network.training and images.device.type == "cpu":  # not the dry run that estimates memory
            patches.append(images.detach().clone())
        return forward(network, images)

    monkeypatch.setattr(UNet, "forward", watched)
    turn = [{"RandElasticDeformationd": {"sigma": 0.0, "rotate": 15}}]
    settings = {"dataset": "balls", "foreground": 1.0, "epochs": 1, "patch": [16, 16, 16]}
    run(tmp_path, tiny_pipeline(preprocess=[], augment=turn, **settings))
    seen = torch.cat(patches)
    assert seen.shape == (6, 1, 16, 16, 16)
    assert max(float(seen.diff(n=2, dim=axis).abs().max()) for axis in (2, 3, 4)) < 1e-4
    assert min(float(patch.amax() - patch.amin()) for patch in seen) > 15.1  # turned, all of them


def test_deep_supervision_and_recomputed_activations_train(place):
    network = {"UNet": {"channels": [4, 8, 8], "padding": "same", "norm": "instance", "deep_supervision": 1}}
    plain = run(place, tiny_pipeline(network=network, epochs=1))
    again = run(place, tiny_pipeline(network=network, epochs=1, checkpoint_activations=True))
    for name, value in state_of(plain)["network_state"].items():
        assert torch.allclose(value, state_of(again)["network_state"][name], atol=1e-6), name


def test_slices_of_volumes_train_a_network_in_two_dimensions(place):
    folder = run(place, tiny_pipeline(patch=[8, 8], epochs=1))
    assert load_model(folder).network.spatial_dims == 2
    assert list((folder / "validation").glob("*.nii.gz"))


TINY = {
    "attention": ({"AttentionUNet": {"channels": [4, 8, 8]}}, [16, 8]),
    "attention-3d": ({"AttentionUNet": {"channels": [4, 8, 8]}}, [8, 8, 8]),
    "resunet": ({"ResUNet": {"channels": [4, 4, 8, 8], "blocks": [1, 1, 1, 1]}}, [32, 32]),
    "fcn-8s": ({"FCN": {"channels": [4, 4, 4, 8, 8], "hidden": 8}}, [32, 32]),
    "unet-2015": ({"UNet": {"channels": [4, 8]}}, [28, 28]),
}


@pytest.mark.parametrize(("network", "patch"), TINY.values(), ids=TINY)
def test_every_network_trains(place, network, patch):
    folder = run(place, tiny_pipeline(network=network, patch=patch, epochs=1, iterations_per_epoch=1))
    (row,) = state_of(folder)["progress"]["history"]
    assert math.isfinite(row["loss"])
    assert math.isfinite(row["score"])


def test_the_file_of_weights_that_a_run_began_with_is_needed_no_more(place, tmp_path):
    """Checkpoints hold all weights: the file may be gone, or be on another machine."""
    options = {"channels": [4, 4, 8, 8], "blocks": [1, 1, 1, 1]}
    published = tmp_path / "published.pt"
    torch.save(ResUNet(2, 1, 3, **options).encoder.state_dict(), published)
    network = {"ResUNet": {**options, "weights": str(published)}}
    pipeline = tiny_pipeline(network=network, patch=[32, 32], epochs=1, iterations_per_epoch=1)
    folder = run(place, pipeline, output=tmp_path / "runs")
    published.unlink()
    loaded, saved = load_model(folder).network.state_dict(), read_state(folder / "best.pt")["network_state"]
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())
    assert evaluate(folder, workers=1, metrics=["Dice"], output=tmp_path / "scores").rows
    run(place, None, resume=folder, overrides=["train.epochs=2"])
    assert state_of(folder)["progress"]["epoch"] == 2
    configuration = export_bundle(folder, tmp_path / "bundle") / "configs" / "inference.json"
    assert all(str(tmp_path) not in path.read_text() for path in (tmp_path / "bundle").rglob("*.json"))
    network_def = json.loads(configuration.read_text())["network_def"]
    del network_def["_target_"]
    assert traced_network(**network_def)(torch.zeros(1, 1, 32, 32)).shape == (1, 3, 32, 32)


def test_channels_from_one_file_each_and_from_one_for_all_train_alike(place, tmp_path):
    entry = (place / "data" / "datasets.yaml").read_text().split("\nballs:")[0].replace("[image]", "[t1, t2]")
    data = tmp_path / "data"
    for name in ("labels", "t1", "t2", "both"):
        (data / name).mkdir(parents=True)
    for path in sorted((place / "data" / "images").glob("*.nii.gz")):
        first = nibabel.load(path)
        second = np.float32(np.asarray(first.dataobj) ** 2)
        shutil.copy(place / "data" / "labels" / path.name, data / "labels" / path.name)
        shutil.copy(path, data / "t1" / path.name)
        nibabel.save(nibabel.Nifti1Image(second, first.affine), data / "t2" / path.name)
        stacked = np.stack([np.asarray(first.dataobj), second], axis=-1)
        nibabel.save(nibabel.Nifti1Image(stacked, first.affine), data / "both" / path.name)
    found = []
    for images in ('["t1/{id}.nii.gz", "t2/{id}.nii.gz"]', '"both/{id}.nii.gz"'):
        (data / "datasets.yaml").write_text(entry.replace('"images/{id}.nii.gz"', images))
        folder = train(
            tiny_pipeline(), data=data, output=tmp_path / "runs", cache=tmp_path / "cache", device="cpu", progress=False
        )
        found.append(folder)
    assert load_model(found[0]).metadata["in_channels"] == 2
    assert_equal_runs(*found)


def test_a_union_of_labels_is_learnt_and_scored_as_one(place):
    # the entry `balls` reads 1 and 2 as 1
    folder = run(place, tiny_pipeline(dataset="balls", epochs=1))
    row = state_of(folder)["progress"]["history"][-1]
    assert [name for name in row if name.startswith("val ")] == ["val Dice ball"]
    scores = []
    for path in sorted((folder / "validation").glob("*.nii.gz")):
        found = np.asarray(nibabel.load(path).dataobj) == 1
        union = np.asarray(nibabel.load(place / "data" / "labels" / path.name).dataobj) > 0
        scores.append(2 * (found & union).sum() / (found.sum() + union.sum()))
    assert row["score"] == pytest.approx(np.mean(scores))


def test_neighbouring_slices_train_and_predict_alike(place):
    folder = run(place, tiny_pipeline(patch=[8, 8], epochs=1, context_slices=1))
    model = load_model(folder)
    assert model.network.in_channels == 3
    spec, split = model.dataset, json.loads((folder / "split.json").read_text())
    cases = {case.id: case for case in find_cases(spec, place / "data")}
    for name in split["validation"]:
        image = np.asarray(load_sample(cases[name], spec)["image"], np.float64)[0]
        image = np.pad((image - image.mean()) / image.std(), [(0, 0), (0, 0), (1, 1)], mode="reflect")
        written = np.asarray(nibabel.load(folder / "validation" / f"{name}.nii.gz").dataobj)
        with torch.inference_mode():
            for k in range(written.shape[2]):
                window = torch.from_numpy(np.moveaxis(image[..., k : k + 3], -1, 0)[None]).float()
                label = model.network(window)[0].argmax(0).numpy()
                assert (written[..., k] == label).mean() > 0.99


def test_a_limited_deformation_is_told(place):
    augment = [{"RandElasticDeformationd": {"sigma": 2.0, "grid": 3}}]
    told = json.loads((run(place, tiny_pipeline(epochs=1, augment=augment)) / "provenance.json").read_text())["notices"]
    # three points over eight voxels: 3.5 apart, 10/63.5 of which is 0.55; the last axis has voxels twice as long
    assert any("sigma 2 is limited to 0.55 x 0.55 x 0.55 voxels" in line for line in told), told
    augment[0]["RandElasticDeformationd"]["sigma"] = 0.3
    told = json.loads((run(place, tiny_pipeline(epochs=1, augment=augment)) / "provenance.json").read_text())["notices"]
    assert not any("limited" in line for line in told)


@pytest.mark.parametrize(
    ("patch", "padding", "told"),
    [
        # cases have 16 x 20 x 12 voxels: 3840 of the 8192 of a patch; the network halves once, so it takes even sizes
        ([16, 32, 16], "same", "53 % of what is computed for a patch of 16 x 32 x 16 lies beyond the images"),
        ([16, 20, 14], "same", None),  # 14 %
        # unpadded: the 2 + 2 * 2 + 2 voxels a side that are cut off are to lie beyond them: 32 x 36 x 28 of 40^3
        ([40, 40, 40], "valid", "50 % of what is computed"),
        ([32, 36, 28], "valid", None),
    ],
)
def test_a_patch_larger_than_the_cases_is_told(place, patch, padding, told):
    network = {"UNet": {"channels": [4, 8], "padding": padding, "norm": "batch", "dropout": 0.0}}
    folder = run(place, tiny_pipeline(epochs=1, batch=1, patch=patch, network=network))
    lines = [line for line in json.loads((folder / "provenance.json").read_text())["notices"] if "beyond" in line]
    assert len(lines) == (told is not None)
    if lines:
        assert told in lines[0]
        fitting = json.loads(re.search(r"train\.patch=(\[[\d,]+\])", lines[0])[1])
        assert "median size 16 x 20 x 12 after preprocessing" in lines[0]
        again = run(place, tiny_pipeline(epochs=1, batch=1, patch=fitting, network=network))
        assert "beyond the images" not in (again / "provenance.json").read_text()


@pytest.mark.parametrize(
    ("values", "limits", "told"),
    [
        (
            np.linspace(0, 1, 101),
            (0, 255, False),
            "fill only 0.38 % of 0 to 255",
        ),  # percentiles 0.01 and 0.99: 0.98 / 255
        (
            np.where(np.arange(1000) < 970, 5000, 100),
            (0, 255, True),
            "97 % of the images lie above a_max 255 and become",
        ),
        (np.where(np.arange(1000) < 970, 5000, 100), (0, 255, False), "97 % of the images lie above a_max 255 (1 %"),
        (np.where(np.arange(1000) < 700, -1000, 40), (-160, 240, True), None),  # CT: seven tenths air
        (np.arange(1000) % 256, (0, 255, True), None),
    ],
)
def test_a_range_of_intensities_that_does_not_suit_the_images_is_told(tmp_path, values, limits, told):
    tifffile.imwrite(tmp_path / "a.tif", np.asarray(values, np.float32)[None])
    cases = [Case("a", (tmp_path / "a.tif",))]
    spec = DatasetSpec.from_dict(
        {"name": "x", "title": "x", "modality": "x", "dims": 2, "channels": ["grey"], "unit": "px", "colour": "grey"}
        | {"labels": {0: "background", 1: "a"}, "files": [{"training": {"image": "{id}.tif", "label": "{id}.png"}}]}
    )
    scale = Component("ScaleIntensityRanged", dict(zip(("a_min", "a_max", "clip"), limits, strict=True)))
    notices = intensity_notices([Component("Spacingd", {"pixdim": [2, 2]}), scale], cases, spec)
    assert len(notices) == (told is not None)
    if told:
        assert told in notices[0]
    assert intensity_notices([Component("NormalizeIntensityd"), scale], cases, spec) == []


def test_a_run_tells_of_such_a_range_and_the_key_that_it_names_mends_it(place):
    scale = {"a_min": 1e6, "a_max": 2e6, "b_min": -1.0, "b_max": 1.0, "clip": True}
    pipeline = tiny_pipeline(epochs=1, preprocess=[{"ScaleIntensityRanged": scale}])
    told = json.loads((run(place, pipeline) / "provenance.json").read_text())["notices"]
    (line,) = (line for line in told if "preprocess.ScaleIntensityRanged.a_min" in line)
    assert "100 % of the images lie below a_min 1e+06" in line
    limits = [f"preprocess.ScaleIntensityRanged.{key}={value}" for key, value in (("a_min", -1), ("a_max", 4))]
    told = json.loads((run(place, pipeline, overrides=limits) / "provenance.json").read_text())["notices"]
    assert not [line for line in told if "ScaleIntensityRanged" in line]


def test_windows_of_validation_are_bounded(place, monkeypatch):
    seen, predict = [], engine_validation.predict_case

    def spy(*arguments, inferer, **options):
        seen.append(inferer.max_ram)
        return predict(*arguments, inferer=inferer, **options)

    monkeypatch.setattr(engine_validation, "predict_case", spy)
    run(place, tiny_pipeline(epochs=1))
    assert set(seen) == {2 * 2**30}
    seen.clear()
    run(place, tiny_pipeline(epochs=1, inference={"OverlapTileInferer": {"max_ram": 10**8}}))
    assert set(seen) == {10**8}


def test_a_threshold_is_chosen_on_validation_cases_and_used_in_prediction(place):
    pipeline = tiny_pipeline(dataset="balls", postprocess=[{"Threshold": {"value": "validation"}}], epochs=3)
    folder = run(place, pipeline)
    model = load_model(folder)
    assert model.threshold in CANDIDATES
    assert model.pipeline.postprocess[0].arguments == {"value": model.threshold}
    assert read_state(folder / "last.pt")["threshold"] is None
    # the definition: no other candidate gives a better mean Dice on the validation cases
    spec, split = model.dataset, json.loads((folder / "split.json").read_text())
    cases = {case.id: case for case in find_cases(spec, place / "data")}
    dice = dict.fromkeys(CANDIDATES, 0.0)
    for name in split["validation"]:
        sample = load_sample(cases[name], spec)
        image = (sample["image"] - sample["image"].mean()) / sample["image"].std(correction=0)
        with torch.inference_mode():
            shares = model.network(image.as_tensor()[None].float()).softmax(1)[0, 1].numpy()
        reference = np.asarray(sample["label"])[0] == 1
        for value in CANDIDATES:
            found = shares > value
            dice[value] += 2 * (found & reference).sum() / max(1, found.sum() + reference.sum())
        written = np.asarray(nibabel.load(folder / "validation" / f"{name}.nii.gz").dataobj)
        assert (written == (shares > model.threshold)).mean() > 0.999
    assert dice[model.threshold] == pytest.approx(max(dice.values()), abs=1e-3)


def test_compiling_on_request_equals_the_plain_network(place):
    whole = run(place, tiny_pipeline(epochs=1, compile="auto"))
    assert_equal_runs(whole, run(place, tiny_pipeline(epochs=1)))


@pytest.mark.slow
def test_a_compiled_network_trains_alike(place):
    # without dropout, whose random numbers are others when compiled
    network = {"UNet": {"channels": [4, 8], "padding": "same", "norm": "batch", "dropout": 0.0}}
    pipelines = (tiny_pipeline(epochs=1, network=network, compile=wish) for wish in (False, True))
    plain, compiled = (state_of(run(place, one))["progress"]["history"][0]["loss"] for one in pipelines)
    assert compiled == pytest.approx(plain, rel=1e-3)


def test_a_class_that_training_lacks_is_refused(tmp_path):
    write_cases(tmp_path / "data")
    for path in (tmp_path / "data" / "labels").iterdir():
        image = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image((np.asarray(image.dataobj) > 0).astype(np.uint8), image.affine), path)
    with pytest.raises(LabelError, match="without a voxel") as caught:
        train(tiny_pipeline(), data=tmp_path / "data", output=tmp_path / "runs", cache=tmp_path / "c", progress=False)
    assert "core" in str(caught.value.found)
    assert not (tmp_path / "runs" / "tiny").exists()


def test_wrong_arguments_are_refused_before_data_are_opened(place, tmp_path):
    texts = {"no such fold": (7, -1), "a value of the wrong type": ("0", "all", 1.5)}
    for text, fold in ((text, fold) for text, folds in texts.items() for fold in folds):
        with pytest.raises(UsageError, match=text) as caught:
            run(place, tiny_pipeline(), fold=fold)
        assert caught.value.field == "fold"
    with pytest.raises(UsageError, match="unknown device"):
        train(tiny_pipeline(), data=place / "data", device="tpu", output=tmp_path, progress=False)
    with pytest.raises(ConfigError, match="cannot take this patch"):
        run(place, tiny_pipeline(patch=[7, 8, 8]))


def test_the_suggested_rate_is_on_the_slope_whatever_the_first_batches_did():
    rates = np.geomspace(1e-6, 1, 80)
    losses = 1.0 - 0.5 / (1 + (3e-3 / rates) ** 2)  # falls most steeply at 3e-3 on a logarithmic axis
    losses[rates > 0.1] += np.linspace(0, 3, int((rates > 0.1).sum()))
    losses[:4] += [2.0, 1.0, 0.4, 0.1]  # a few bad batches
    assert suggest(list(zip(rates.tolist(), losses.tolist(), strict=True))) == pytest.approx(3e-3, rel=0.2)


def test_a_range_test_that_does_not_fit_into_memory_says_so(place, monkeypatch):
    def step(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(TrainStep, "__call__", step)
    with pytest.raises(ResourceError, match="looking for a learning rate") as caught:
        find_learning_rate(tiny_pipeline(), data=place / "data", cache=place / "cache", device="cpu", steps=20)
    assert (caught.value.code, caught.value.found) == ("E523", "patch [8, 8, 8], batch 2")


def test_the_learning_rate_finder_suggests_a_rate_in_its_range(place):
    found = find_learning_rate(tiny_pipeline(), data=place / "data", cache=place / "cache", device="cpu", steps=20)
    assert 1e-6 <= found.suggested <= 1
    assert found.optimizer == "AdamW"
    rates = [rate for rate, _ in found.rows]
    assert rates == sorted(rates)


def test_the_learning_rate_finder_begins_with_the_weights_and_on_the_fold_that_were_asked_for(reference, place):
    facts = {"data": place / "data", "cache": place / "cache", "device": "cpu", "steps": 4}
    plain, begun, other = (
        find_learning_rate(tiny_pipeline(foreground=1.0), **facts, **more).rows
        for more in ({}, {"init": reference}, {"fold": 1})
    )
    assert begun[0][1] < plain[0][1]  # nothing is learnt yet
    assert plain != other


def start(place: Path, arguments: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MEDSEG_DATA": str(place / "data")}
    return subprocess.Popen(
        [sys.executable, "-m", "medseg", "train", *arguments, "--device", "cpu", "--cache", str(place / "cache")],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def kill_and_resume(place: Path, output: Path, pipeline: Path, kills: int, seed: int) -> tuple[Path, int]:
    """Train in a process of its own, kill it `kills` times at random moments, and let the last session end."""
    generator, done = random.Random(seed), 0
    process = start(place, [str(pipeline), "-o", str(output), "--no-report"])
    for _ in range(kills):
        # training has begun when status.json names the process; the moment after that is random
        end = time.monotonic() + 400
        while process.poll() is None and not any(
            json.loads(path.read_text()).get("process") == process.pid for path in output.glob("*/*/status.json")
        ):
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 3))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), errors
        folder = next(output.glob("*/*"))
        if json.loads((folder / "status.json").read_text())["state"] == "finished":
            return folder, done  # it had ended, or was about to leave when the kill came: nothing was interrupted
        assert process.returncode == -signal.SIGKILL, errors
        done += 1
        if not (folder / "last.pt").exists():  # before the first save there is nothing to continue: begin again
            shutil.rmtree(folder)
            process = start(place, [str(pipeline), "-o", str(output), "--no-report"])
        else:
            process = start(place, ["--resume", str(folder), "--no-report"])
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return next(output.glob("*/*")), done


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_random_moments_it_ends_in_the_same_weights(place, tmp_path, workers):
    plan = tiny_pipeline(epochs=20, iterations_per_epoch=10, save_minutes=0.002, workers=workers, ema=0.9)
    (tmp_path / "tiny.yaml").write_text(to_yaml(plan))
    expected = run(place, plan, output=tmp_path / "whole")
    kills = 0
    for number in range(3):
        folder, done = kill_and_resume(place, tmp_path / f"killed{number}", tmp_path / "tiny.yaml", 4, seed=number)
        assert_equal_runs(expected, folder)
        kills += done
    assert kills >= 6


def test_a_second_signal_leaves_at_once(monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    signals = Signals()
    signals.handle(signal.SIGTERM)
    assert (signals.received, left) == (15, [])
    signals.handle(signal.SIGTERM)
    assert left == [143]


def test_checkpoints_stay_readable_by_the_store(reference):
    state, notices = CheckpointStore(reference).load("last")
    assert notices == []
    assert state["progress"]["finished"] == "budget"
