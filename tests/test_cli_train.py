"""`medseg train` as typed: every fold with pooled scores and the ensemble; several processes that tell a run once."""

from __future__ import annotations

import csv

import pytest
from tiny import tiny_pipeline, write_cases

from medseg import training
from medseg.checkpoint import load_model
from medseg.cli import main
from medseg.config import to_yaml


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.fixture
def place(tmp_path):
    write_cases(tmp_path / "data", 4)
    (tmp_path / "tiny.yaml").write_text(to_yaml(tiny_pipeline(epochs=1, iterations_per_epoch=1, folds=2)))
    return tmp_path


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


def test_only_the_first_of_several_processes_tells_the_run(place, capsys, monkeypatch):
    monkeypatch.setattr(training, "train", lambda *_, **__: place / "runs" / "one")
    for rank, times in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert call("train", place / "tiny.yaml", "--data", place / "data", "--no-report") == 0
        assert capsys.readouterr().out.count("run:") == times
