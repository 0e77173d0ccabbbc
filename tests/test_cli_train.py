"""`medseg train` as typed: every fold with pooled scores and the ensemble; several processes that tell a run once."""

from __future__ import annotations

import csv
import errno
import json
import shlex
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from tiny import tiny_pipeline, write_cases

from medseg import evaluation, files, report, training
from medseg.checkpoint import load_model, read_state
from medseg.cli import main
from medseg.config import to_yaml
from medseg.engine_session import Session
from medseg.errors import ResourceError
from medseg.training import LearningRates


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def told(capsys) -> dict:
    """The only error of a call with --json."""
    (problem,) = json.loads(capsys.readouterr().out)["error"]
    return problem


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """Starting processes that score takes longer than scoring four tiny cases."""
    monkeypatch.setattr(evaluation, "count_workers", lambda workers, cases, voxels: 1)


@pytest.fixture
def place(tmp_path):
    write_cases(tmp_path / "data", 4)
    (tmp_path / "tiny.yaml").write_text(to_yaml(tiny_pipeline(epochs=1, iterations_per_epoch=1, folds=2)))
    return tmp_path


def test_find_lr_looks_at_the_fold_and_the_weights_that_were_named(place, monkeypatch):
    asked = []

    def find(*_, **options):
        asked.append((options["fold"], options["init"]))
        return LearningRates(((1e-3, 1.0),), 1e-3, "AdamW")

    monkeypatch.setattr(training, "find_learning_rate", find)
    command = ["train", place / "tiny.yaml", "--data", place / "data", "--find-lr", "--init", "x"]
    for fold in ("1", "none", "all"):
        assert call(*command, "--fold", fold) == 0
    assert asked == [(1, Path("x")), (None, Path("x")), (0, Path("x"))]


def test_a_full_disk_names_the_command_that_goes_on(place, capsys, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    saved = []

    def written():
        saved.extend(path for path in place.glob("runs/tiny/*/last.pt") if path not in saved)
        if saved:  # the one of the first epoch is there
            raise full

    monkeypatch.setitem(files.FAIL_POINTS, "written", written)
    command = ["train", place / "tiny.yaml", "--data", place / "data", "-o", place / "runs", "--set", "train.epochs=2"]
    assert call(*command, "--cache", place / "cache", "--device", "cpu") == 5
    (run,) = (place / "runs" / "tiny").iterdir()
    assert f"fix: free space, then: medseg train --resume {run}" in capsys.readouterr().err
    files.FAIL_POINTS.clear()
    monkeypatch.setattr(report, "write_text", Mock(side_effect=ResourceError("full", code="E501")))
    assert call("train", "--resume", run) == 5
    said = capsys.readouterr()
    assert "continuing after iteration 1" in said.err
    assert f"its scores and report: medseg evaluate {run}" in said.err
    assert "ball" in said.out


def test_every_fold_with_pooled_scores_and_their_ensemble(place, capsys):
    command = ["train", place / "tiny.yaml", "--data", place / "data", "-o", place / "runs", "--fold", "all"]
    assert call(*command, "--cache", place / "cache", "--device", "cpu") == 0
    said = capsys.readouterr()
    assert [said.out.count(title) for title in ("Scores, fold 0", "Scores, fold 1", "Scores, all folds")] == [1, 1, 1]
    assert "tiny, fold 0: cpu" in said.err
    assert "tiny, fold 1: cpu" in said.err
    pooled = place / "runs" / "tiny" / "cross_validation"
    # every case once, scored by the model that had not seen it
    with (pooled / "cases.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "Dice"]
    assert sorted((row["case"], row["label"]) for row in rows) == [
        (f"c{number}", label) for number in range(4) for label in ("ball", "core")
    ]
    assert len(load_model(pooled).networks) == 2


def test_a_series_of_folds_goes_on_where_it_stopped(place, capsys, monkeypatch):
    options = ["--cache", place / "cache", "--device", "cpu"]
    command = [
        "train",
        place / "tiny.yaml",
        "--data",
        place / "data",
        "-o",
        place / "my runs",
        "--fold",
        "all",
        *options,
    ]
    train = training.train
    made = []

    def stop_in_the_second(*arguments, **more):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(train(*arguments, **more))
        return made[-1]

    monkeypatch.setattr(training, "train", stop_in_the_second)
    assert call(*command) == 130
    said = capsys.readouterr()
    assert "Scores, fold 0" in said.out  # scored although the series did not end
    assert (made[0] / "report.html").is_file()
    (line,) = [text for text in said.err.splitlines() if text.startswith("all folds: ")]
    monkeypatch.setattr(training, "train", train)
    before = (made[0] / "last.pt").stat().st_mtime_ns
    # a run of other choices beside it, and one of the same fold that was begun and left
    runs = set((place / "my runs" / "tiny").iterdir())
    assert call(*command[:-6], *options, "-o", place / "my runs", "--set", "train.seed=9") == 0
    (other,) = set((place / "my runs" / "tiny").iterdir()) - runs  # begun in the same second, it has another suffix
    other.rename(other.with_name("0000-00-00_000000_fold0"))
    begun = train(place / "tiny.yaml", data=place / "data", output=place / "my runs", fold=1, progress=False)
    (begun / "status.json").write_text('{"state": "interrupted"}')
    (begun / "best.pt").unlink()
    resumed = []
    monkeypatch.setattr(training, "train", lambda *a, **m: resumed.append(m.get("resume")) or begun)
    assert call(*shlex.split(line.removeprefix("all folds: medseg ")), *options) == 0
    assert resumed == [begun]
    assert (made[0] / "last.pt").stat().st_mtime_ns == before
    pooled = json.loads((place / "my runs/tiny/cross_validation/summary.json").read_text())
    assert pooled["runs"] == [made[0].name, begun.name]


def test_a_fold_that_was_killed_before_its_first_checkpoint_is_trained_anew(place, capsys, monkeypatch):
    at = ["--cache", place / "cache", "--device", "cpu", "--no-report"]
    command = ["train", place / "tiny.yaml", "--data", place / "data", "-o", place / "runs", *at]
    assert call(*command, "--fold", "1") == 0
    (whole,) = (place / "runs" / "tiny").iterdir()
    whole.rename(place / "whole")
    iterate, done = Session.iterate, []

    def killed(session, batch):
        if done:
            raise KeyboardInterrupt
        done.append(batch)
        return iterate(session, batch)

    monkeypatch.setattr(Session, "iterate", killed)
    assert call(*command, "--fold", "all") == 130
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("all folds: ")]
    monkeypatch.setattr(Session, "iterate", iterate)
    assert call(*shlex.split(line.removeprefix("all folds: medseg ")), *at) == 0
    anew = max((place / "runs" / "tiny").glob("*_fold1*"))
    expected, found = (read_state(run / "last.pt")["network_state"] for run in (place / "whole", anew))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_second_series_of_folds_leaves_the_pooled_scores_of_the_first(place, capsys):
    command = ["train", place / "tiny.yaml", "--data", place / "data", "-o", place / "runs", "--fold", "all"]
    for seed in (0, 1):
        assert call(*command, "--cache", place / "cache", "--device", "cpu", "--set", f"train.seed={seed}") == 0
    said = capsys.readouterr().out
    for name in ("cross_validation", "cross_validation_2"):
        assert str(place / "runs" / "tiny" / name / "report.html") in said
        assert (place / "runs" / "tiny" / name / "cases.csv").is_file()


def test_a_series_of_folds_begins_with_the_weights_that_were_named(place, capsys, monkeypatch):
    """Not with those of its own first fold, and also where it goes on."""
    at = ["--cache", place / "cache", "--device", "cpu", "--no-report"]
    series = ["train", place / "tiny.yaml", "--data", place / "data", "-o", place / "runs"]
    assert call(*series, *at) == 0
    (first,) = (place / "runs" / "tiny").iterdir()
    train, inits = training.train, []

    def stop_in_the_second(*arguments, **more):
        inits.append(more.get("init"))
        if len(inits) == 2:
            raise KeyboardInterrupt
        return train(*arguments, **more)

    monkeypatch.setattr(training, "train", stop_in_the_second)
    assert call(*series, "--init", place / "runs" / "tiny", "--fold", "all", *at) == 130
    assert inits == [first, first]
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("all folds: ")]
    assert call(*shlex.split(line.removeprefix("all folds: medseg ")), *at) == 0
    assert inits[2:] == [str(first.resolve())]  # of the second fold; the first is finished
    second = max((place / "runs" / "tiny").glob("*_fold1"))
    facts = json.loads((second / "provenance.json").read_text())
    assert facts["init"] == str(first.resolve())
    assert any("tensors loaded from" in notice for notice in facts["notices"])


@pytest.mark.parametrize("left", [("cases.csv",), ("cases.csv", "summary.json")])
def test_a_pooling_that_was_stopped_is_done_anew_in_its_place(place, left):
    at = ["--cache", place / "cache", "--device", "cpu"]
    command = ["train", place / "tiny.yaml", "--data", place / "data", "-o", place / "runs", "--fold", "all", *at]
    assert call(*command) == 0
    pooled = place / "runs" / "tiny" / "cross_validation"
    whole = (pooled / "cases.csv").read_bytes()
    for path in pooled.iterdir():
        if path.name not in left:
            path.unlink()
    (pooled / "cases.csv").write_bytes(whole[:50])
    assert call("train", "--resume", place / "runs" / "tiny", "--fold", "all", *at) == 0
    assert (pooled / "cases.csv").read_bytes() == whole
    assert (pooled / "report.html").is_file()
    assert not pooled.with_name("cross_validation_2").exists()


@pytest.mark.parametrize(
    ("also", "found"),
    [
        (["--fold", "1"], "--fold"),
        (["-o", "elsewhere"], "--output"),
        (["--pipeline", "cell", "--init", "x"], "--pipeline, --init"),
        (["liver"], "NAME"),
        (["--find-lr"], "--find-lr"),
        (["--pipelines", "."], "--pipelines"),
    ],
)
def test_what_a_run_that_goes_on_would_ignore_is_refused(capsys, also, found):
    assert call("train", "--resume", "runs/x", "--json", *also) == 2
    problem = told(capsys)
    assert (problem["code"], problem["field"], problem["found"]) == ("E101", "--resume", found)


def test_a_run_goes_on_with_its_own_data_whatever_the_environment_says(place, capsys, monkeypatch):
    at = ["--cache", place / "cache", "--device", "cpu", "--no-report"]
    command = ["train", place / "tiny.yaml", "--data", place / "data", "-o", place / "runs", *at]
    assert call(*command) == 0
    (run,) = (place / "runs" / "tiny").iterdir()
    write_cases(place / "other", 4, seed=1)
    monkeypatch.setenv("MEDSEG_DATA", str(place / "other"))
    assert call("train", "--resume", run, "--set", "train.epochs=2", *at) == 0
    assert json.loads((run / "provenance.json").read_text())["data"] == str(place / "data")
    assert "not what they were" not in capsys.readouterr().err
    (place / "data").rename(place / "moved")
    monkeypatch.delenv("MEDSEG_DATA")
    assert call("train", "--resume", run, "--set", "train.epochs=3", *at) == 2
    said = capsys.readouterr().err
    assert "the run's data are not where they were" in said
    assert str(place / "data") in said
    assert call("train", "--resume", run, "--set", "train.epochs=3", "--data", place / "moved", *at) == 0


def test_a_data_set_s_name_is_not_taken_for_a_pipeline_s(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    ask = ["--data", "data", "--json"]

    def problem(*arguments):
        assert call("train", *arguments) == 2
        return told(capsys)

    assert "there is no pipeline of that name" in problem("tiny", *ask)["message"]
    # a typing error in the folder's name is not one in the data set's
    wrong = problem("tiny", "--pipeline", "cell", "--data", "dta", "--json")
    assert (wrong["code"], wrong["file"]) == ("E102", "dta")
    # `medseg pipelines copy liver pipelines/tiny.yaml`, its data set not yet changed
    (place / "pipelines").mkdir()
    assert call("pipelines", "copy", "liver", "pipelines/tiny.yaml") == 0
    capsys.readouterr()
    wrong = problem("tiny", *ask)
    assert "also a pipeline for another one, liver" in wrong["message"]
    assert "`dataset: tiny`" in wrong["fix"]


def test_two_budgets_on_the_command_line_are_blamed_on_it(place, capsys):
    asked = ["--minutes", "0.1", "--set", "train.epochs=3"]
    assert call("train", place / "tiny.yaml", "--data", place / "data", "--json", *asked) == 2
    problem = told(capsys)
    assert (problem["code"], problem["field"], problem["found"]) == ("E114", "--set", "train.epochs, train.minutes")
    assert problem["file"] is None


def test_only_the_first_of_several_processes_tells_the_run(place, capsys, monkeypatch):
    monkeypatch.setattr(training, "train", lambda *_, **__: place / "runs" / "one")
    for rank, times in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert call("train", place / "tiny.yaml", "--data", place / "data", "--no-report") == 0
        assert capsys.readouterr().out.count("run:") == times
