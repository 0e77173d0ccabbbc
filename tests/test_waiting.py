"""Work that takes long shows that it goes on, also where standard error is a file."""

from __future__ import annotations

import sys

from test_entry import blob, fill, save

from medseg import waiting
from medseg.checking import check_dataset
from medseg.config import load_dataset
from medseg.entry import add_dataset
from medseg.evaluation import evaluate


def test_without_a_terminal_a_line_each_half_minute(capsys):
    times = iter([0, 10, 29, 31, 31, 40, 62, 62, 70])  # one for the start, one for each case, one more for each line
    with waiting.progress_of("reading mine", 7, shown=True, clock=lambda: next(times)) as tick:
        for _ in range(7):
            tick()
    assert capsys.readouterr().err.splitlines() == ["reading mine: 3 of 7 cases", "reading mine: 5 of 7 cases"]


def test_who_does_not_want_to_see_anything_sees_nothing(capsys, monkeypatch):
    monkeypatch.setattr(waiting, "_SECONDS", 0)
    with waiting.progress_of("reading mine", 3, shown=False) as tick:
        tick()
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_a_bar_and_no_lines(capsys, monkeypatch):
    monkeypatch.setattr(waiting, "_SECONDS", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with waiting.progress_of("reading mine", 3, shown=True) as tick:
        tick()
    assert "1 of 3 cases" not in capsys.readouterr().err


def test_check_and_evaluation_say_how_far_they_are(tmp_path, capsys, monkeypatch):
    fill(tmp_path, count=3)
    add_dataset("mine", tmp_path, images="img/*.png", labels="msk/*.png")
    for i in range(3):
        save(tmp_path / f"out/p{i}_x.png", blob(1))
    monkeypatch.setattr(waiting, "_SECONDS", 0)
    check_dataset(load_dataset("mine", root=tmp_path), tmp_path, progress=True)
    assert "reading mine: 2 of 3 cases" in capsys.readouterr().err
    arguments = {"data": tmp_path, "part": "training", "metrics": "Dice", "output": tmp_path / "scores"}
    evaluate(tmp_path / "out", "mine", **arguments, progress=True)
    assert "scoring: 2 of 3 cases" in capsys.readouterr().err
