"""What all commands share: options, output as text or JSON, and the way from an error to an exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from medseg.errors import MedsegError, ResourceError, listed
from medseg.errors_system import system_error

DataOption = Annotated[
    Path | None,
    # the environment is looked at where nothing else is known: a run that goes on has its own data folder
    typer.Option("--data", help="Folder that holds the data sets (or MEDSEG_DATA).", show_default=False),
]
PipelinesOption = Annotated[
    Path | None,
    typer.Option("--pipelines", help="Folder of pipelines to look in before the others.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Override one key: --set train.epochs=5 --set network.UNet.channels=[16,32].", show_default=False
    ),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", is_eager=True)]

state: dict[str, bool] = {"debug": False, "json": False}

# Threads that wait for one another sleep instead of spinning: beside other work on the machine a spinning thread keeps
# the one that it waits for off its core, and steps take ten times as long (benchmarks/waiting.py). OpenMP reads this
# when torch is loaded, so it is set here, where nothing heavy has been imported; the user's own choice stays.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def expand_home(arguments: Sequence[str]) -> list[str]:
    """The arguments with `~` as the home folder, where a shell leaves it: `--data=~/images`, `'~/images'`.

    >>> expand_home(["--data=~/x", "--set", "a~b=c"]) == [f"--data={Path.home()}/x", "--set", "a~b=c"]
    True
    """
    home = Path(os.path.expanduser("~")).as_posix()  # Path.home() fails where a user has none
    return [re.sub(r"^(--[\w-]+=)?~(?=/|$)", lambda found: (found[1] or "") + home, text) for text in arguments]


def call(app: typer.Typer, arguments: Sequence[str]) -> Any:
    """Run a command and return what it returns; wrong options end with typer's own words and code."""
    try:
        return app(args=expand_home(arguments), standalone_mode=False)
    except typer.Abort as aborted:  # what Ctrl-C becomes in some versions of typer; in others it is code 130
        raise KeyboardInterrupt from aborted
    except Exception as error:
        # typer's own error class has moved between versions, its two methods have not
        if not (hasattr(error, "show") and hasattr(error, "exit_code")):
            raise
        error.show()
        sys.exit(error.exit_code)


def examples(*lines: str) -> str:
    """The end of a command's help: its examples, one a line, not wrapped."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def say(text: str = "") -> None:
    """A line of result on standard output; nothing when JSON was asked for."""
    if not state["json"]:
        print(text)


def note(text: str) -> None:
    """A line about the work on standard error."""
    print(text, file=sys.stderr)


def show_json(value: Any) -> None:
    """The result for programs: one JSON document on standard output."""
    print(json.dumps(value, indent=1, default=str, ensure_ascii=False))


def table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """A table on standard output."""
    if state["json"]:
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=title, title_justify="left", header_style="bold")
    for number, name in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[number], int | float) for row in rows)
        shown.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        # Text, not str: names of files and labels may look like rich's markup
        shown.add_row(*[Text(f"{cell:.4g}" if isinstance(cell, float) else str(cell)) for cell in row])
    Console(soft_wrap=False, width=None if sys.stdout.isatty() else 140).print(shown)


def report_error(error: MedsegError) -> None:
    """Print an error: as text on standard error, and as JSON on standard output when that was asked for."""
    if state["json"]:
        show_json({"error": [problem.as_dict() for problem in error.problems], "exit_code": error.exit_code})
    print(f"medseg: {error}", file=sys.stderr)


class _Terminated(SystemExit):
    """SIGTERM came. It ends a command as Ctrl-C does, so that nothing half-written stays; training saves instead."""


def _terminate(number: int, _frame: Any) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one leaves at once
    raise _Terminated(128 + number)


@contextmanager
def kept(text: str, *errors: type[MedsegError]) -> Iterator[None]:
    """Say what stays and how to go on when Ctrl-C or SIGTERM ends the block, or one of `errors`."""
    try:
        yield
    except (KeyboardInterrupt, _Terminated, *errors):
        note(text)
        raise


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn what escapes from a command into medseg's exit codes (0 done ... 143 terminated)."""
    main = threading.current_thread() is threading.main_thread()  # Python sets handlers nowhere else
    before = signal.signal(signal.SIGTERM, _terminate) if main else None
    try:
        yield
    except MedsegError as error:
        if state["debug"]:
            raise
        report_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        note("medseg: interrupted")
        sys.exit(130)
    except _Terminated:
        note("medseg: terminated")
        raise
    except BrokenPipeError:  # the reader of our output (head, less) has gone: nothing is wrong
        sys.stderr.close()
        sys.exit(0)
    except (MemoryError, OSError) as error:
        if state["debug"]:
            raise
        told = system_error(error) if isinstance(error, OSError) else None
        told = told or ResourceError(f"{type(error).__name__}: {error}")
        report_error(told)
        sys.exit(told.exit_code)
    except Exception as error:
        if state["debug"]:
            raise
        fix = "run again with --debug before the command's name and report what it prints"
        report_error(MedsegError(f"this is a bug in medseg: {type(error).__name__}: {error}", fix=fix))
        sys.exit(MedsegError.exit_code)
    finally:
        if main:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def newest(run: Path) -> Path:
    """A folder of runs stands for its newest run, which is named."""
    from medseg.run import newest_run

    found = newest_run(run)
    if found != run:
        say(f"run: {found}")
    return found


def show_summary(result: Any, metrics: Sequence[str] | None = None, *, title: str = "Scores") -> None:
    """The table of scores that an evaluation ended with; only those of `metrics` when given."""
    columns, rows = result.table()
    score = columns.index("Score")
    if metrics is not None:
        rows = [row for row in rows if str(row[score]).split(" ")[0].split("@")[0] in metrics]
    table(title, columns, rows)
    cases = result.summary.get("cases", {})
    for name, text in (
        ("missing", "without a prediction, counted as missed"),
        ("extra", "predictions without a reference, not scored"),
        ("resampled", "predictions on another grid, resampled as asked"),
    ):
        if found := cases.get(name):
            say(f"{text}: {listed(found, 10)}")
    for text in dict.fromkeys(result.summary.get("notes", ())):
        say(f"note: {text}")
