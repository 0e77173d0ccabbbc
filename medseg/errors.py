"""Every error that medseg raises on purpose, with the exit code that the command line turns it into.

    MedsegError                     exit 1 unless a subclass says otherwise
    ├── UsageError                  2   a command, an option or an argument of the Python API is wrong
    │   └── ConfigError             2   a pipeline, datasets.yaml, dataset.json or --set is wrong
    ├── DataError                   3   an input file is refused
    │   ├── FormatError             3   ... because it is not what its name says, cut off, or corrupt
    │   ├── GeometryError           3   ... because of shape, spacing, origin, direction or affine
    │   ├── LabelError              3   ... because of the values in a label image
    │   └── CheckpointError         3   a checkpoint, package or run folder cannot be used
    ├── CasesFailed                 4   the work finished, but some cases failed
    ├── ResourceError               5   disk, permission, memory, GPU or an optional package is missing
    └── TrainingError               1   training went wrong by itself (NaN loss)

A message is one line of what happened, followed by indented lines `case`, `field`, `file`, `expected`, `found`, `fix`:

>>> print(DataError("image has NaN voxels", code="E311", case="liver_7", file="liver_7.nii.gz", found="12 NaN",
...                 fix="set `nan: 0` in datasets.yaml"))
E311: image has NaN voxels
  case: liver_7
  file: liver_7.nii.gz
  found: 12 NaN
  fix: set `nan: 0` in datasets.yaml

Several problems found together are one error: `collect(problems)` returns it, with `.problems` holding each.
Codes: E1xx usage and config, E3xx data (E30x file, E31x values, E32x geometry, E33x labels, E34x DICOM, E35x pairs and
splits, E36x checkpoints), E4xx cases failed, E5xx environment. docs/errors.md lists them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = [
    "CasesFailed",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FormatError",
    "GeometryError",
    "LabelError",
    "MedsegError",
    "ResourceError",
    "TrainingError",
    "UsageError",
    "collect",
    "counted",
    "listed",
]

SHOWN = 20  # problems printed on screen; all of them are in `.problems`


class MedsegError(Exception):
    """Base of all errors that medseg raises on purpose.

    Args:
        message: one line, what happened.
        code: `E` and three digits, stable across versions; the class's own code when None.
        case: id of the case concerned.
        field: key, header field or argument concerned.
        file: path of the file concerned.
        expected: what would have been right.
        found: what was there instead.
        fix: how to mend it, in the imperative.
    """

    exit_code = 1
    default_code = "E100"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        case: str | None = None,
        field: str | None = None,
        file: str | Path | None = None,
        expected: object = None,
        found: object = None,
        fix: str | None = None,
    ) -> None:
        self.message = message
        self.code = code or self.default_code
        self.case = case
        self.field = field
        self.file = None if file is None else str(file)
        self.expected = None if expected is None else str(expected)
        self.found = None if found is None else str(found)
        self.fix = fix
        self.problems: tuple[MedsegError, ...] = (self,)
        super().__init__(message)

    def __str__(self) -> str:
        if len(self.problems) > 1:
            shown = [str(problem) for problem in self.problems[:SHOWN]]
            more = len(self.problems) - len(shown)
            tail = [f"... and {more} more"] if more else []
            return "\n".join([self.message, *shown, *tail])
        details = [
            f"  {name}: {_one_line(value)}"
            for name in ("case", "field", "file", "expected", "found", "fix")
            if (value := getattr(self, name)) is not None
        ]
        return "\n".join([f"{self.code}: {self.message}", *details])

    def __reduce__(self):  # errors cross process borders (data workers, pools) with all their fields
        return _rebuild, (type(self), self.message, self.as_dict(), self.problems if len(self.problems) > 1 else ())

    def as_dict(self) -> dict[str, str | None]:
        """The error as plain strings, for check.json, status.json and `--json`."""
        names = ("code", "case", "field", "file", "expected", "found", "fix")
        return {"message": self.message, **{name: getattr(self, name) for name in names}}


class UsageError(MedsegError):
    """A command, option or argument is wrong."""

    exit_code = 2
    default_code = "E101"


class ConfigError(UsageError):
    """A pipeline, datasets.yaml, dataset.json or `--set` is wrong."""

    default_code = "E110"


class DataError(MedsegError):
    """An input file is refused."""

    exit_code = 3
    default_code = "E300"


class FormatError(DataError):
    """A file is not what its name says, cut off, or corrupt."""

    default_code = "E301"


class GeometryError(DataError):
    """Shape, spacing, origin, direction or affine are wrong or do not match."""

    default_code = "E320"


class LabelError(DataError):
    """Values of a label image are wrong."""

    default_code = "E330"


class CheckpointError(DataError):
    """A checkpoint, package or run folder cannot be used."""

    default_code = "E360"


class CasesFailed(MedsegError):
    """The work finished, but some cases failed."""

    exit_code = 4
    default_code = "E400"


class ResourceError(MedsegError):
    """Disk, permission, memory, GPU or an optional package is missing."""

    exit_code = 5
    default_code = "E500"


class TrainingError(MedsegError):
    """Training went wrong by itself: the loss is not a number, or a data worker died."""

    default_code = "E600"


def collect(problems: Sequence[MedsegError]) -> MedsegError:
    """One error out of several, of the class with the highest exit code among them; the only one as it is.

    Raises:
        ValueError: `problems` is empty.
    """
    if not problems:
        raise ValueError("collect needs at least one problem")
    if len(problems) == 1:
        return problems[0]
    worst = max(problems, key=lambda problem: problem.exit_code)
    error = type(worst)(f"{len(problems)} problems found", code=worst.code)
    error.problems = tuple(part for problem in problems for part in problem.problems)
    return error


def counted(number: int, what: str) -> str:
    """How many of what, for messages.

    >>> counted(1, "case"), counted(2, "case"), counted(0, "image")
    ('1 case', '2 cases', '0 images')
    """
    return f"{number} {what}{'s' * (number != 1)}"


def listed(names: Iterable[object], most: int = 5) -> str:
    """The first names, and how many there are where that is not all, for messages.

    >>> listed(["a", "b"]), listed("abcd", most=2)
    ('a, b', 'a, b ... 4 in all')
    """
    texts = list(map(str, names))
    return ", ".join(texts[:most]) + (f" ... {len(texts)} in all" if len(texts) > most else "")


def _one_line(text: str) -> str:
    # names may hold newlines and control characters; a message stays one line a field
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _rebuild(kind: type[MedsegError], message: str, fields: dict, problems: tuple) -> MedsegError:
    fields = {name: value for name, value in fields.items() if name != "message"}
    error = kind(message, **fields)
    if problems:
        error.problems = problems
    return error
