"""Where the data are: the one question that is answered before anything heavy is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from medseg.errors import UsageError

__all__ = ["data_root"]


def data_root(option: str | Path | None = None, *, must_exist: bool = True) -> Path:
    """The data root: `option` (--data), else the environment's MEDSEG_DATA, nothing more.

    Raises:
        UsageError: E102, neither is given, or there is no such folder.

    >>> data_root("no/such/folder")
    Traceback (most recent call last):
    medseg.errors.UsageError: E102: no such data folder
      field: --data
      file: no/such/folder
      expected: a folder
      found: nothing
    """
    given = option or os.environ.get("MEDSEG_DATA")
    if not given:
        fix = "--data DIR, or set MEDSEG_DATA"
        raise UsageError("the data folder is not given", code="E102", field="--data", fix=fix)
    root = Path(given)
    if must_exist and not root.is_dir():
        found = "a file" if root.exists() else "nothing"
        raise UsageError(
            "no such data folder", code="E102", field="--data", file=root, expected="a folder", found=found
        )
    return root
