"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products, if a GPU is there

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real images: MEDSEG_DATA, else ../shared/data; the test is skipped where there is none."""
    folder = Path(os.environ.get("MEDSEG_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "README.md").is_file():
        pytest.skip(f"no real images: neither MEDSEG_DATA nor {folder} holds them")
    return folder
