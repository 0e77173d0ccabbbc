"""What runs on a GPU is tried on a pretended second device (second_device.py): nothing may be left on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration

HERE = Path(__file__).resolve().parent
CHECKS = ("that_mixing_fails", "augmentations", "training_steps", "inference")


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch takes no backend written in Python")
    command = [sys.executable, str(HERE / "second_device.py")]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", CHECKS)
def test_second_device(check, results):
    assert results[f"check_{check}"] is None, results[f"check_{check}"]


def test_every_check_is_looked_at(results):
    assert set(results) == {f"check_{check}" for check in CHECKS}
