"""Handlers: pictures, times, the log, TensorBoard, MLflow's absence, signals, the profile."""

from __future__ import annotations

import csv
import os
import resource
import signal
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medseg import handlers
from medseg.engine_budget import Progress
from medseg.engine_session import Session
from medseg.errors import ResourceError, TrainingError
from medseg.handlers_output import (
    BarOutput,
    LineOutput,
    MlflowOutput,
    TableOutput,
    TensorBoardOutput,
    format_minutes,
    overlay,
    write_profile,
)
from medseg.handlers_signals import Signals, Stopped, listen
from medseg.hardware import Hardware
from medseg.run import RunFolder


def session(tmp_path, **more):
    """What outputs look at, and nothing else."""
    progress = Progress(epoch=1, iteration=5, minutes=0.5, best_epoch=1, validated=1)
    progress.history = [
        {"epoch": 1, "iteration": 5, "minutes": 0.5, "lr": 0.1, "loss": None, "score": 0.5, "val Dice a": 0.5}
    ]
    budget = SimpleNamespace(share=lambda p: 0.5, minutes_left=lambda p: 0.5)
    picture = (np.random.rand(1, 8, 10), np.eye(8, 10, dtype=np.uint8), np.zeros((8, 10), np.uint8))
    facts = {
        "progress": progress,
        "budget": budget,
        "run": RunFolder(tmp_path),
        "validator": SimpleNamespace(shown="Dice"),
        "validation": SimpleNamespace(picture=picture),
        "seconds": {"step": 20.0, "wait": 1.0, "validate": 8.0, "save": 1.0},
    }
    return SimpleNamespace(**{**facts, **more})


def test_an_overlay_shows_reference_prediction_and_both():
    image = np.linspace(0, 1, 400, dtype=np.float32).reshape(1, 20, 20)
    label, prediction = np.zeros((20, 20), np.uint8), np.zeros((20, 20), np.uint8)
    label[2:8, 2:8] = 1
    prediction[2:8, 5:15] = 1
    drawn = overlay(image, label, prediction)
    assert drawn.shape == (20, 40, 3)
    right = drawn[:, 20:]
    assert right[5, 2].tolist() == [0, 255, 0]  # the reference's left edge
    assert right[5, 14].tolist() == [255, 0, 0]  # the prediction's right edge
    assert right[2, 6].tolist() == [255, 255, 0]  # the top edge of both
    assert right[15, 15].tolist() == drawn[15, 15].tolist()
    assert overlay(np.ones((3, 4, 4)), label[:4, :4], prediction[:4, :4]).shape == (4, 8, 3)


def test_the_log_keeps_columns_of_all_rows(tmp_path):
    one = session(tmp_path)
    one.progress.history.append({"epoch": 2, "iteration": 9, "minutes": 1.0, "lr": 0.1, "loss": 1.5, "score": None})
    TableOutput().finished_epoch(one, {})
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [(row["loss"], row["val Dice a"]) for row in rows] == [("", "0.5"), ("1.5", "")]


def test_tensorboard_has_numbers_and_a_picture(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    one = session(tmp_path)
    output = TensorBoardOutput(one)
    output.finished_epoch(one, one.progress.history[0])
    output.close(one)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert found.Scalars("validation/Dice_a")[0].step == 5
    assert found.Scalars("score")[0].value == 0.5
    assert found.Images("validation/case")[0].width == 20


def test_a_full_disk_ends_tensorboards_record_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # TensorBoard writes in a thread of its own
    one = session(tmp_path)
    output = TensorBoardOutput(one)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        for _ in range(2):
            output.finished_epoch(one, one.progress.history[0])
        output.close(one)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert capsys.readouterr().err == "note: TensorBoard's file cannot be written any more (File too large)\n"


def test_lines_and_bar_tell_score_and_time_left(tmp_path, capsys):
    one = session(tmp_path)
    LineOutput().finished_epoch(one, one.progress.history[0])
    text = capsys.readouterr().err
    assert "Dice 0.5000  (best)" in text
    assert "30 s left" in text
    bar = BarOutput(one)
    bar.iterated(one)
    assert bar.bar.tasks[0].completed == 0.5
    assert bar.bar.tasks[0].fields["left"] == "30 s left"
    bar.close(one)


def test_without_mlflow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ResourceError, match="not installed") as caught:
        MlflowOutput(session(tmp_path))
    assert "medseg[mlflow]" in caught.value.fix


def test_mlflow_keeps_parameters_and_numbers(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = RunFolder.create(tmp_path / "runs", "tiny", fold=1)
    pipeline = SimpleNamespace(dataset="tiny", to_dict=lambda: {"train": {"batch": 2}, "best": "Dice"})
    one = session(tmp_path, run=run, pipeline=pipeline, split={"fold": 1})
    output = MlflowOutput(one)
    output.finished_epoch(one, one.progress.history[0])
    output.close(one)
    assert (tmp_path / "runs" / "mlflow.db").is_file()
    kept = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    [found] = kept.search_runs([kept.get_experiment_by_name("tiny").experiment_id])
    assert found.data.params == {"fold": "1", "train.batch": "2", "best": "Dice"}
    numbers = {"epoch": 1.0, "iteration": 5.0, "minutes": 0.5, "lr": 0.1, "score": 0.5, "val_Dice_a": 0.5}
    assert found.data.metrics == numbers
    mlflow.set_tracking_uri(None)


def test_times_are_told_as_people_say_them():
    assert format_minutes(89.4) == "89 min"
    assert format_minutes(90) == "1 h 30 min"


def test_the_pace_on_a_gpu_counts_the_time_for_which_its_steps_are_waited_for(tmp_path):
    # begun in no time, computed in 0.2 s for which the look at the gradients waits: 20 patches, none of them waited for
    step = SimpleNamespace(bad_steps=lambda: time.sleep(0.2) or 0)
    one = session(tmp_path, step=step, hardware=Hardware(torch.device("cuda"), "bf16", 1, ""), per_epoch=100)
    one.seconds, one.mark, one.images, one.stream = {"step": 0.0, "wait": 0.0}, {}, 20, None
    one.progress.iteration = 20
    handlers._check_gradient(one)
    assert 60 < handlers._pace(one)["images_per_second"] <= 100


@pytest.mark.parametrize(("precision", "most"), [("fp32", 4), ("bf16", 4), ("fp16", 20)])
def test_a_scale_that_is_still_looked_for_ends_nothing(tmp_path, precision, most):
    """Gradients of fp16 overflow until GradScaler has halved its scale, from 65536 on, as often as they need."""
    assert torch.amp.GradScaler("cpu").get_scale() == 2**16
    hardware = Hardware(torch.device("cuda"), precision, 1, "")
    one = session(tmp_path, hardware=hardware, per_epoch=5, seconds={"step": 0.0}, recent=[("a",)])
    one.progress.step, one.train = 5, SimpleNamespace(accumulate=1)
    one.step = SimpleNamespace(bad_steps=lambda: most)
    handlers._check_gradient(one)
    one.step = SimpleNamespace(bad_steps=lambda: most + 1)
    with pytest.raises(TrainingError, match=f"{most + 1} steps in a row"):
        handlers._check_gradient(one)


def test_the_profile_adds_up(tmp_path):
    one = Session.__new__(Session)  # of a run that goes on after two minutes
    one.progress, one.seconds = Progress(minutes=2.0), session(tmp_path).seconds
    one.start_clock()
    one.progress.minutes += 0.5
    text = write_profile(one, tmp_path / "profile.txt")
    assert "steps                   20.0 s  66.7 %" in text
    assert (tmp_path / "profile.txt").read_text() == text


def test_signals_are_noted_for_the_block_alone():
    before = signal.getsignal(signal.SIGTERM)
    with listen() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert Stopped(15).name == "SIGTERM"


def test_in_a_thread_signals_are_left_alone():
    found = []

    def work():
        with listen() as signals:
            found.append(signals)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(found[0], Signals)
