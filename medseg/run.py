"""The folder of one run: made once, told what it is about, its state always readable from status.json."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from medseg.errors import CheckpointError, ResourceError, listed
from medseg.files import lock, probe_writable, remove_stale, resource_error, safe_stem, write_json, write_text

__all__ = [
    "RunFolder",
    "git_state",
    "is_run",
    "known_before",
    "newest_run",
    "provenance",
    "seen_before",
    "start_time",
    "versions",
]

STATES = ("running", "finished", "interrupted", "failed")
_WHEN = "%Y-%m-%d_%H%M%S"  # in names of runs: 17 characters
_MARKS = ("best.pt", "last.pt", "last.prev.pt", "status.json")


class RunFolder:
    """Paths and small files of a run.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def create(
        cls, root: str | Path, name: str, *, fold: int | None = 0, now: datetime.datetime | None = None
    ) -> RunFolder:
        """Make `root/name/<YYYY-MM-DD_HHMMSS>_foldK` (`_foldnone` without a fold).

        It is a new one even if several runs begin within one second.

        Raises:
            ResourceError: E501, E502: nothing can be written there.
        """
        when = (now or datetime.datetime.now()).strftime(_WHEN)
        parent, kept = Path(root) / safe_stem(name, ""), "none" if fold is None else fold
        try:
            parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise (resource_error(error, parent) or error) from error
        probe_writable(parent)
        for number in range(1, 1000):
            path = parent / f"{when}_fold{kept}{'' if number == 1 else f'_{number}'}"
            try:
                path.mkdir()
            except FileExistsError:
                continue
            except OSError as error:
                raise (resource_error(error, path) or error) from error
            return cls(path)
        raise ResourceError("too many runs of this second", code="E502", file=parent)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The run at `path`, or the newest run below it; leftovers of killed processes are removed.

        Raises:
            CheckpointError: E360, there is no run.
            ResourceError: E502, it cannot be written to.
        """
        run = newest_run(path)
        if not any((run / mark).is_file() for mark in _MARKS):
            fix = "name the folder that `medseg train` printed"
            raise CheckpointError("there is no run here", code="E360", file=run, fix=fix)
        probe_writable(run)
        remove_stale(run)
        return cls(run)

    @property
    def status(self) -> dict[str, Any]:
        """What status.json says; empty when there is none."""
        return self.read_json("status.json") or {}

    def set_status(self, state: str, *, exit_code: int | None = None, message: str | None = None, **more: Any) -> None:
        """Write status.json: state is one of running, finished, interrupted, failed."""
        if state not in STATES:
            raise ValueError(f"no such state: {state}")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        before = self.status
        content = {"state": state, "exit_code": exit_code, "message": message, "started": before.get("started", now)}
        write_json(self.path / "status.json", {**content, "changed": now, "process": os.getpid(), **more})

    @property
    def data(self) -> Any:
        """The data root that it was trained from, as provenance.json says; None where that is not known."""
        facts = self.read_json("provenance.json")
        return facts.get("data") if isinstance(facts, dict) else None

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """A block in which no other process trains this run.

        Raises:
            ResourceError: E503, another one does.
        """
        return lock(self.path / ".lock", timeout=1.0)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file of the run, atomically."""
        write_json(self.path / name, value)

    def read_json(self, name: str) -> Any:
        """Read a JSON file of the run; None when it is missing or unreadable."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        return None

    def write_text(self, name: str, text: str) -> None:
        """Write a text file of the run, atomically."""
        write_text(self.path / name, text)


def newest_run(path: str | Path) -> Path:
    """`path` if it is a run, else the newest run below it (folders of runs are `runs/` and `runs/<pipeline>/`).

    A folder without any run is returned as it is: who needs a run says so.

    Raises:
        CheckpointError: E360, runs of several pipelines lie below it: the newest of all would be one by chance.
    """
    path = Path(path)
    if not path.is_dir() or is_run(path):
        return path
    levels = ([run for run in path.glob(pattern) if run.is_dir() and is_run(run)] for pattern in ("*", "*/*"))
    found = next(filter(None, levels), [])  # runs kept in a folder beside others (`old/`) do not count
    parents = sorted({run.parent for run in found})
    if len(parents) > 1:
        raise CheckpointError(
            "runs of several pipelines lie below this folder", code="E360", file=path, expected="runs of one",
            found=listed(parents), fix="give one of them",
        )  # fmt: skip
    # a run that ended before its first checkpoint is only taken where there is no other
    return max(found, key=lambda run: (any(run.glob("*.pt")), start_time(run), run.name, str(run))) if found else path


def start_time(run: Path) -> datetime.datetime:
    """When a run began, to the second: as status.json says, else from its name, taken as this machine's local time.

    Names are local time, which goes back an hour every autumn and is another one inside of most containers. The time of
    the file itself would change when a run is copied.
    """
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return datetime.datetime.fromisoformat(RunFolder(run).status["started"]).astimezone(datetime.UTC)
    with contextlib.suppress(ValueError, OverflowError):
        return datetime.datetime.strptime(run.name[:17], _WHEN).astimezone(datetime.UTC)
    return datetime.datetime.min.replace(tzinfo=datetime.UTC)  # a run with a name of its own and without status.json


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result."""
    found = {"python": platform.python_version()}
    for name in ("medseg", "torch", "monai", "pytorch-ignite", "numpy", "scipy", "nibabel"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def git_state(folder: str | Path = ".") -> dict[str, Any] | None:
    """Commit of the working folder and whether it has changes; None outside of a repository or without git."""

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        changed = bool(ask("status", "--porcelain", "--untracked-files=no"))
        return {"commit": ask("rev-parse", "HEAD"), "changed": changed}
    return None


def provenance(**more: Any) -> dict[str, Any]:
    """Versions, system, command and git state of this process, and what else is given."""
    facts: Mapping[str, Any] = {
        "versions": versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git": git_state(),
    }
    return {**facts, **more}


def is_run(path: Path) -> bool:
    """Whether a folder is a run's."""
    return any((path / mark).is_file() for mark in _MARKS)


def known_before(split: Mapping[str, Any]) -> list[str]:
    """A split.json's validation cases that the weights training began with (--init) were trained on."""
    began = set(split.get("began_with", ()))
    return [case for case in split.get("validation", ()) if case in began]


def seen_before(split: Mapping[str, Any]) -> list[str]:
    """What to tell of the cases that `known_before` finds.

    >>> seen_before({"validation": ["a", "b"], "began_with": ["b", "c"]})[0].split(": ")[-1]
    'b'
    """
    if not (known := known_before(split)):
        return []
    shown = listed(known, 10)
    return [f"Scores of cases that the weights training began with (--init) were trained on are no test: {shown}"]
