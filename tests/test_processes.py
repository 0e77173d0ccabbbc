"""A script without `if __name__ == "__main__":` runs once, whatever processes it makes medseg start."""

from __future__ import annotations

import subprocess
import sys
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
