"""The examples in docstrings give what stands under them, and every public function and part has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import pytest
from torch import nn

ROOT = Path(__file__).parents[1]
PACKAGES = ("medseg", *(f"medseg.{name}" for name in ("networks", "transforms", "losses", "inference", "metrics")))
PATHS = sorted(path for path in (ROOT / "medseg").rglob("*.py") if ">>> " in path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("name", [name_of(path) for path in PATHS])
def test_examples_give_what_is_written(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what an example writes without saying where
    module = importlib.import_module(name)
    found = doctest.testmod(module, report=False)
    assert found.attempted > 0
    assert found.failed == 0, "see above"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_function_and_part_has_an_example(package):
    module = importlib.import_module(package)
    values = {name: getattr(module, name) for name in module.__all__}
    parts = {
        name: value
        for name, value in values.items()
        if inspect.isfunction(value) or (inspect.isclass(value) and issubclass(value, nn.Module))
    }
    assert parts
    assert [name for name, value in parts.items() if ">>> " not in (value.__doc__ or "")] == []
