"""Where the data are: the one question that is answered before anything heavy is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from medseg.errors import UsageError

__all__ = ["data_root", "known_root"]


def data_root(option: str | Path | None = None, *, known: object = None, must_exist: bool = True) -> Path:
    """The data root: `option` (--data), else `known`, else the environment's MEDSEG_DATA, nothing more.

    Args:
        option: what the user said; a `~` at its beginning is the home folder.
        known: the root that a run was trained from, if it knows; looked at only where it is still there.
        must_exist: refuse a folder that is not there.

    Raises:
        UsageError: E102, none is given, or there is no such folder.

    >>> data_root("no/such/folder")
    Traceback (most recent call last):
    medseg.errors.UsageError: E102: no such data folder
      field: --data
      file: no/such/folder
      expected: a folder
      found: nothing
    """
    told = known if isinstance(known, str) and known else None
    if not option and told and Path(told).is_dir():
        return Path(told)
    given = option or os.environ.get("MEDSEG_DATA")
    if not given:
        fix = "--data DIR, or set MEDSEG_DATA"
        text = "the run's data are not where they were" if told else "the data folder is not given"
        raise UsageError(text, code="E102", field="--data", file=told, fix=fix)
    root = Path(given).expanduser()
    if must_exist and not root.is_dir():
        found = "a file" if root.exists() else "nothing"
        field = "--data" if option else "MEDSEG_DATA"
        raise UsageError("no such data folder", code="E102", field=field, file=root, expected="a folder", found=found)
    return root


def known_root(option: str | Path | None = None, *, must_exist: bool = False) -> Path | None:
    """The data root as `data_root` finds it, or None where nothing is said of it.

    Raises:
        UsageError: E102, `must_exist` and there is no such folder.
    """
    return data_root(option, must_exist=must_exist) if option or os.environ.get("MEDSEG_DATA") else None
