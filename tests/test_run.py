"""Run folders: made once, found again, their state readable; the newest of a folder of runs."""

from __future__ import annotations

import datetime
import json

import pytest

from medseg import run as module
from medseg.errors import CheckpointError, ResourceError
from medseg.files_atomic import HOST
from medseg.run import RunFolder, git_state, newest_run, provenance, versions

NOW = datetime.datetime(2026, 11, 21, 10, 15)


def test_two_runs_of_one_second_have_two_folders(tmp_path):
    first = RunFolder.create(tmp_path / "runs", "liver", fold=2, now=NOW)
    second = RunFolder.create(tmp_path / "runs", "liver", fold=2, now=NOW)
    assert first.path == tmp_path / "runs" / "liver" / "2026-11-21_101500_fold2"
    assert second.path.name == "2026-11-21_101500_fold2_2"


def test_a_name_cannot_leave_the_folder(tmp_path):
    path = RunFolder.create(tmp_path / "runs", "../../x", now=NOW).path
    assert path.resolve().is_relative_to(tmp_path / "runs")


def test_a_folder_that_cannot_be_written_is_found_first(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError):
        RunFolder.create(tmp_path / "file" / "runs", "liver")


def test_the_state_is_readable_at_any_time(tmp_path):
    folder = RunFolder.create(tmp_path, "liver", now=NOW)
    assert folder.status == {}
    folder.set_status("running")
    began = folder.status["started"]
    folder.set_status("interrupted", exit_code=143, message="SIGTERM")
    status = json.loads((folder.path / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["started"]) == ("interrupted", 143, began)
    with pytest.raises(ValueError, match="no such state"):
        folder.set_status("done")
    (folder.path / "status.json").write_text("{")
    assert folder.status == {}


def test_the_newest_run_with_weights_stands_for_a_folder_of_runs(tmp_path):
    for name in ("2026-11-20_090000_fold0", "2026-11-21_090000_fold0", "2026-11-22_090000_fold0"):
        (tmp_path / "runs" / "liver" / name).mkdir(parents=True)
        (tmp_path / "runs" / "liver" / name / "status.json").write_text("{}")
    for name in ("2026-11-20_090000_fold0", "2026-11-21_090000_fold0"):
        (tmp_path / "runs" / "liver" / name / "best.pt").write_bytes(b"")
    newest = tmp_path / "runs" / "liver" / "2026-11-21_090000_fold0"
    assert newest_run(tmp_path / "runs") == newest_run(tmp_path / "runs" / "liver") == newest_run(newest) == newest
    assert newest_run(tmp_path / "none") == tmp_path / "none"
    assert RunFolder.open(tmp_path / "runs").path == newest


def test_the_newest_run_began_last_whatever_the_clock_of_its_name(tmp_path):
    # the hour that is told twice in autumn, and a container with another time zone: the name of the later run is less
    first, second = (RunFolder.create(tmp_path, "liver", now=NOW.replace(hour=hour)) for hour in (2, 1))
    for folder, began in ((first, "2026-10-25T00:50:00+00:00"), (second, "2026-10-25T01:10:00+00:00")):
        folder.write_json("status.json", {"state": "finished", "started": began})
    assert first.path.name > second.path.name
    assert newest_run(tmp_path) == second.path
    first.write_json("status.json", {"state": "finished", "started": "2026-10-25T03:20:00+02:00"})  # later in UTC
    assert newest_run(tmp_path) == first.path


def test_opening_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no run here"):
        RunFolder.open(tmp_path)


def test_leftovers_of_dead_processes_are_removed(tmp_path):
    (tmp_path / "last.pt").write_bytes(b"")
    (tmp_path / f".medseg-{HOST}-999999999-abc.pt").write_bytes(b"half")
    RunFolder.open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_provenance_is_plain(tmp_path, monkeypatch):
    facts = provenance(data="x")
    assert json.loads(json.dumps(facts)) == facts
    assert facts["versions"] == versions()
    assert facts["data"] == "x"
    assert git_state(tmp_path) is None
    monkeypatch.setattr(module.subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError()))
    assert git_state() is None


def test_the_newest_of_several_pipelines_is_not_guessed(tmp_path):
    for name in ("liver", "lung"):
        RunFolder.create(tmp_path / "runs", name, now=NOW).set_status("finished")
    with pytest.raises(CheckpointError, match="several pipelines") as caught:
        newest_run(tmp_path / "runs")
    assert caught.value.code == "E360"
    assert caught.value.found == f"{tmp_path / 'runs' / 'liver'}, {tmp_path / 'runs' / 'lung'}"
    assert newest_run(tmp_path / "runs" / "lung").parent.name == "lung"
    RunFolder.create(tmp_path / "runs" / "lung", "old", now=NOW.replace(year=2030)).set_status("finished")
    assert newest_run(tmp_path / "runs" / "lung").parent.name == "lung"
