"""Fixtures that several test modules share, and the table of docs/reliability.md, written from a real run.

    pytest -m "" --reliability-table docs/reliability.md

runs the tests that tests/reliability_rows.py names, and no others, and puts row, tests and result into the page.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from pathlib import Path

import pytest
from reliability_rows import ROWS, node

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products, if a GPU is there

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real images: MEDSEG_DATA, else ../shared/data; the test is skipped where there is none."""
    folder = Path(os.environ.get("MEDSEG_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "README.md").is_file():
        pytest.skip(f"no real images: neither MEDSEG_DATA nor {folder} holds them")
    return folder


MARKS = ("<!-- table: written by pytest --reliability-table -->", "<!-- end of table -->")


# the files that take longest, longest first: with a file for each process none of them is left alone to the end
LONG = ("test_processes", "test_second_device", "test_export", "test_training", "test_evaluation", "test_layouts")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "run the tests that docs/reliability.md rests on, and write its table into this page"
    parser.addoption("--reliability-table", metavar="PATH", type=Path, help=text)


def pytest_configure(config: pytest.Config) -> None:
    if (page := config.getoption("--reliability-table")) is not None:
        if not all(mark in page.read_text(encoding="utf-8") for mark in MARKS):
            raise pytest.UsageError(f"{page} lacks the lines {MARKS}")
        config.pluginmanager.register(_Table(page), "reliability table")


class _Table:
    """Selects the tests of the rows, collects what became of them, writes the table."""

    def __init__(self, page: Path) -> None:
        self.page = page
        self.wanted = {node(test) for row in ROWS.values() for test in row.tests}
        self.results: dict[tuple[str, str], Counter[str]] = {test: Counter() for test in self.wanted}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept = [item for item in items if self._name(item.nodeid) in self.wanted]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.results[self._name(report.nodeid)][report.outcome] += 1

    def pytest_sessionfinish(self) -> None:
        text = self.page.read_text(encoding="utf-8")
        head, rest = text.split(MARKS[0])
        tail = rest.split(MARKS[1])[1]
        self.page.write_text("\n".join([head + MARKS[0], *self._lines(), MARKS[1]]) + tail, encoding="utf-8")

    def _lines(self) -> list[str]:
        import torch

        when = f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}"
        lines = [f"{len(ROWS)} rows, {sum(map(Counter.total, self.results.values()))} tests, {when}."]
        part = ""
        for name, row in ROWS.items():
            if row.part != part:
                part = row.part
                lines += ["", f"### {part}", "", "| row | promise | tests | result |", "|---|---|---|---|"]
            tests = [node(test) for test in row.tests]
            shown = ", ".join(f"`{file[5:-3]}`: {function[5:].replace('_', ' ')}" for file, function in tests)
            lines.append(f"| {name} | {row.text} | {shown} | {self._result(tests)} |")
        return [*lines, ""]

    def _result(self, tests: list[tuple[str, str]]) -> str:
        total = sum((self.results[test] for test in tests), Counter())
        idle = sum(not self.results[test] for test in tests)
        words = [f"{total[outcome]} {outcome}" for outcome in ("failed", "passed", "skipped") if total[outcome]]
        return ", ".join(words + [f"{idle} not run"] * bool(idle))

    @staticmethod
    def _name(nodeid: str) -> tuple[str, str]:
        file, _, function = nodeid.partition("::")
        return Path(file).name, function.partition("[")[0]
