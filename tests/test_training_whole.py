"""Training on every case, with none kept for validation: `--fold none`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli_train import call
from tiny import tiny_pipeline, write_cases

from medseg import handlers
from medseg.checkpoint import load_model, read_state
from medseg.cli import main
from medseg.config import to_yaml
from medseg.engine_session import Session
from medseg.errors import ConfigError, UsageError
from medseg.evaluation import evaluate
from medseg.prediction import predict
from medseg.training import train

CASES = [f"c{number}" for number in range(4)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_cases(folder / "data", len(CASES))
    return folder


def run(place: Path, pipeline, *, fold: int | None = None, **options) -> Path:
    folders = {"data": place / "data", "output": place / "runs", "cache": place / "cache"}
    return train(pipeline, fold=fold, device="cpu", **{"progress": False, **folders, **options})


@pytest.fixture(scope="module")
def whole(place) -> Path:
    return run(place, tiny_pipeline(epochs=3))


def weights(state) -> dict[str, torch.Tensor]:
    return state["network_state"]


def test_the_newest_weights_are_those_that_an_interrupted_run_predicts_with(place, tmp_path, monkeypatch, capsys):
    class Killed(BaseException):
        pass

    iterate = Session.iterate

    def killed(session, batch):
        if session.progress.epoch == 3 and session.progress.step == 1:
            raise Killed
        return iterate(session, batch)

    monkeypatch.setattr(handlers, "_SAVE_SHARE", 1e-9)  # last.pt waits
    monkeypatch.setattr(Session, "iterate", killed)
    with pytest.raises(Killed):
        run(place, tiny_pipeline(epochs=4, iterations_per_epoch=2), output=tmp_path)
    folder = next((tmp_path / "tiny").iterdir())
    assert read_state(folder / "best.pt")["progress"]["epoch"] == 3
    monkeypatch.setattr(Session, "iterate", iterate)
    capsys.readouterr()
    train(None, resume=folder, data=place / "data", cache=place / "cache", device="cpu", progress=True)
    assert "best.pt is of epoch" not in capsys.readouterr().err  # nothing is compared without validation
    assert read_state(folder / "best.pt")["progress"]["epoch"] == 4


def test_every_case_is_trained_on_and_the_last_weights_are_kept(whole):
    assert whole.name.endswith("_foldnone")
    split = json.loads((whole / "split.json").read_text())
    assert (split["training"], split["validation"], split["fold"], split["folds"]) == (CASES, [], None, None)
    best, last = read_state(whole / "best.pt"), read_state(whole / "last.pt")
    assert best["progress"]["best_epoch"] == 3
    assert all(torch.equal(value, weights(last)[name]) for name, value in weights(best).items())
    with (whole / "log.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert [row["score"] for row in rows] == ["", "", ""]
    assert not [name for name in rows[0] if name.startswith("val ")]
    assert not (whole / "validation").exists()


def test_it_trains_as_a_fold_of_the_same_training_cases_does(place, tmp_path):
    """Keeping nothing back changes who is trained on and nothing else: equal cases give equal weights."""
    pipeline = tiny_pipeline(folds=4)
    fold = run(place, pipeline)  # the four cases
    kept = json.loads((fold / "split.json").read_text())["training"]
    assert kept == CASES
    one = run(place, pipeline, fold=0)
    names = json.loads((one / "split.json").read_text())["training"]
    few = tmp_path / "few"
    for part in ("images", "labels"):
        (few / part).mkdir(parents=True)
        for name in names:
            (few / part / f"{name}.nii.gz").write_bytes((place / "data" / part / f"{name}.nii.gz").read_bytes())
    (few / "datasets.yaml").write_bytes((place / "data" / "datasets.yaml").read_bytes())
    blind = run(place, pipeline, data=few)
    expected, found = weights(read_state(one / "last.pt")), weights(read_state(blind / "last.pt"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_run_predicts_new_images_and_says_why_it_has_no_scores(whole, place, tmp_path):
    assert load_model(whole).pipeline.dataset == "tiny"
    result = predict(whole, place / "data" / "images" / "c0.nii.gz", tmp_path / "masks", device="cpu", progress=False)
    assert [case.status for case in result.cases] == ["done"]
    with pytest.raises(UsageError, match="kept no case for validation"):
        evaluate(whole, data=place / "data")


def test_scores_of_validation_cannot_decide_anything(place, whole):
    with pytest.raises(ConfigError, match="needs the score") as patience:
        run(place, tiny_pipeline(patience=2))
    with pytest.raises(ConfigError, match="needs the score") as plateau:
        run(place, tiny_pipeline(schedule={"ReduceLROnPlateau": {}}))
    assert (patience.value.field, plateau.value.field) == ("train.patience", "schedule")
    with pytest.raises(ConfigError, match="needs the score"):
        run(place, None, resume=whole, overrides=["train.epochs=4", "train.patience=2"])


def test_a_threshold_is_chosen_on_the_training_cases_and_says_so(place, capsys):
    pipeline = tiny_pipeline(dataset="balls", postprocess=[{"Threshold": {"value": "validation"}}])
    found = run(place, pipeline, progress=True)
    before, _, after = capsys.readouterr().err.partition(f"choosing the threshold on {len(CASES)} training cases\n")
    assert "threshold 0" not in before
    assert after.startswith("threshold 0.")
    facts = json.loads((found / "threshold.json").read_text())
    assert (facts["chosen_on"], facts["cases"]) == ("training", len(CASES))
    assert load_model(found).threshold == facts["value"]


def test_interrupted_it_goes_on_and_can_be_extended(place, whole, monkeypatch):
    from medseg import handlers

    real, seen = handlers._check_gradient, []

    def stop_once(session):
        seen.append(1)
        if len(seen) == 4:
            session.save()
            raise KeyboardInterrupt
        real(session)

    monkeypatch.setattr(handlers, "_check_gradient", stop_once)
    runs = set((place / "runs" / "tiny").iterdir())
    with pytest.raises(KeyboardInterrupt):
        run(place, tiny_pipeline(epochs=3))
    (broken,) = set((place / "runs" / "tiny").iterdir()) - runs
    run(place, None, resume=broken)
    expected, found = weights(read_state(whole / "best.pt")), weights(read_state(broken / "best.pt"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    run(place, None, resume=broken, overrides=["train.epochs=4"])
    assert read_state(broken / "best.pt")["progress"]["best_epoch"] == 4
    assert any(not np.array_equal(weights(read_state(broken / "best.pt"))[name], expected[name]) for name in expected)


def test_the_command_trains_reports_and_scores_nothing(place, tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(to_yaml(tiny_pipeline(epochs=1, iterations_per_epoch=1)))
    command = ["train", tmp_path / "tiny.yaml", "--data", place / "data", "-o", tmp_path / "runs", "--fold", "none"]
    assert call(*command, "--cache", place / "cache", "--device", "cpu") == 0
    said = capsys.readouterr()
    assert "tiny, no validation: cpu" in said.err
    assert "nothing is scored" in said.err
    assert "Scores" not in said.out
    (page,) = (tmp_path / "runs" / "tiny").glob("*_foldnone/report.html")
    text = page.read_text()
    assert "no validation: 4 cases trained on" in text
    assert "trained on all of them and scores none" in text
    assert "have not been evaluated" not in text
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path / "tiny.yaml"), "--data", str(place / "data"), "--fold", "nothing"])
    assert "all or none" in capsys.readouterr().err
