"""Processes that medseg starts: they run no script again, and none outlives the one that started it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

# as in the README, in a file of its own
SCRIPT = """
print("script runs", flush=True)
import multiprocessing
import sys
from pathlib import Path

import medseg.cache_prepare

sys.path.insert(0, {tests!r})
from tiny import tiny_pipeline, write_cases

root = write_cases(Path({folder!r}) / "data", 6)
{start}
medseg.cache_prepare.choose_workers = lambda cases: 2  # which it would for larger files
medseg.train(tiny_pipeline(workers=1, epochs=1), data=root, output="runs", cache="cache", progress=False)
medseg.evaluate(root / "labels", root / "labels", output="scores", workers=2)
print("script ends with", multiprocessing.active_children())
"""
# as on macOS and Windows, where nothing is forked
FRESH = """
multiprocessing.set_start_method("spawn", force=True)
medseg.cache_prepare.sys = type("system", (), {"platform": "darwin"})
"""


@pytest.mark.parametrize("start", ["", FRESH], ids=["as here", "nothing forked"])
def test_a_script_without_a_guard_runs_once(tmp_path: Path, start: str) -> None:
    script = tmp_path / "my script.py"
    script.write_text(SCRIPT.format(tests=str(TESTS), folder=str(tmp_path), start=start), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["script runs", "script ends with []"]


POOL = """
import signal
import sys
from types import SimpleNamespace

sys.path[:0] = [{folder!r}]
from medseg.cache_prepare import run_jobs
from medseg.cli_common import exit_codes
from medseg.evaluation_pool import map_cases

signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores Ctrl-C
with exit_codes():
    import work

    cases = [SimpleNamespace(id=str(number), images=[]) for number in range(4)]
    if {kind!r} == "prepare":
        list(run_jobs(work.wait, cases, 2))
    else:
        map_cases(work.wait, cases, workers=2, progress=False, title="")
"""
WORK = """
import os, time
from pathlib import Path

def wait(case):
    (Path(__file__).parent / f"{os.getpid()}.began").touch()
    time.sleep(300)
"""


@pytest.mark.parametrize("kind", ["prepare", "score"])
@pytest.mark.parametrize(
    ("number", "group", "code"),
    [
        (signal.SIGKILL, False, -9),
        (signal.SIGTERM, False, 143),
        (signal.SIGINT, True, 130),
    ],
    ids=["killed", "terminated", "Ctrl-C"],
)
def test_no_process_outlives_the_one_that_started_it(tmp_path: Path, kind: str, number: int, group: bool, code: int):
    script = tmp_path / "script.py"
    script.write_text(POOL.format(folder=str(tmp_path), kind=kind))
    (tmp_path / "work.py").write_text(WORK)
    with subprocess.Popen([sys.executable, script], start_new_session=True, stderr=subprocess.PIPE, text=True) as main:
        while len(begun := [int(path.stem) for path in tmp_path.glob("*.began")]) < 2:
            assert main.poll() is None
            time.sleep(0.05)
        (os.killpg if group else os.kill)(main.pid, number)
        try:
            said = main.communicate(timeout=60)[1]  # ends when the last process has closed its standard error
        except subprocess.TimeoutExpired:
            for process in (main.pid, *begun):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            raise
    assert main.returncode == code
    assert "Traceback" not in said
    assert code < 0 or f"medseg: {'terminated' if code == 143 else 'interrupted'}" in said
