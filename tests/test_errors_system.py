"""What the system refuses where nobody expected it is told with the file and a way out, in Python and on the screen."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from other_user import as_other_user, needs_other_user
from test_cli import run

import medseg
from medseg.checkpoint import load_model
from medseg.errors import MedsegError
from medseg.errors_system import open_files, system_error
from medseg.volumes_inputs import list_inputs

LONG = "x" * 300


def make_unreadable(folder: Path) -> None:
    for name in ("run/best.pt", "run/pipeline.yaml", "locked/best.pt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"PK, no more than its beginning")
    (folder / "run" / "best.pt").chmod(0o000)
    (folder / "locked").chmod(0o000)


@needs_other_user
@pytest.mark.parametrize(
    ("work", "code", "file"),
    [
        (lambda folder: load_model(folder / "run"), "E308", "best.pt"),
        (lambda folder: load_model(folder / "locked" / "best.pt"), "E308", "best.pt"),
        (lambda folder: medseg.compare(folder / "locked" / "a", folder / "locked" / "b"), "E308", "a"),
        (lambda folder: list_inputs([folder / "locked" / "best.pt"]), "E103", "best.pt"),
    ],
)
def test_what_may_not_be_read_is_named(work, code, file):
    """Python's own PermissionError, or on the screen E500 with its text."""
    error = as_other_user(make_unreadable, work)
    assert isinstance(error, MedsegError), error
    assert (error.code, Path(error.file or "").name, error.found) == (code, file, "Permission denied")
    assert "no permission" in error.message
    assert "chmod u+r" in (error.fix or "")


@pytest.mark.parametrize(
    "work",
    [
        lambda: medseg.load_pipeline(LONG),
        lambda: medseg.load_model(LONG),
        lambda: medseg.evaluate(LONG),
        lambda: medseg.compare(LONG, LONG),
        lambda: medseg.export_package(LONG, "out"),
    ],
)
def test_names_that_no_file_can_have_are_refused_by_name(work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MedsegError) as caught:
        work()
    assert LONG in str(caught.value)


def test_the_length_of_a_name_is_told_in_bytes():
    error = system_error(OSError(errno.ENAMETOOLONG, "File name too long", "runs/" + "肝" * 100))
    assert error is not None
    assert (error.code, error.exit_code, error.found) == ("E101", 2, "300 bytes, the whole path 305")


def test_the_command_line_tells_what_the_system_refuses(capsys, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise refusal

    monkeypatch.setattr("medseg.config.pipeline_names", refuse)
    for number, code, exit_code in ((errno.EACCES, "E308", 3), (errno.EMFILE, "E500", 5), (errno.EIO, "E500", 5)):
        refusal = OSError(number, os.strerror(number), "runs/a/last.pt")
        ended, _, told = run(capsys, "pipelines", "list")
        assert ended == exit_code
        assert f"medseg: {code}: " in told
        assert "runs/a/last.pt" in told
        assert ("OSError" in told or "PermissionError" in told) == (number == errno.EIO)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
def test_a_limit_that_is_no_obstacle_is_not_blamed(monkeypatch):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (5000, resource.RLIM_INFINITY))
    assert open_files() == ("a limit of 5000 open files (ulimit -n)", "allow more open files: ulimit -n 10000")
    assert system_error(OSError(errno.EIO, "I/O error", "a")) is None
    assert system_error(PermissionError(errno.EACCES, "Permission denied")) is None  # of no file that it names
