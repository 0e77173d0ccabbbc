"""The folder of an evaluation's results: all files of one evaluation, or those of the one before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medseg.errors import MedsegError
from medseg.files import probe_writable, remove_stale
from medseg.files_atomic import temporary_name
from medseg.views import remove_views

__all__ = ["results_folder"]

_OTHERS = ("observer.csv", "scores.md", "scores.tex", "report.html")  # not written by every evaluation


@contextmanager
def results_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder for all that one evaluation writes, put in its place in `folder` when the block ends.

    An exception leaves what an earlier evaluation wrote there. Otherwise all of that goes, its summary.json first, and
    the new one comes last: killed at any moment, no summary stands beside the table or the pictures of another.

    Raises:
        ResourceError: the folder cannot be written or the disk is full.
    """
    probe_writable(folder)
    remove_stale(folder)
    temporary = folder / temporary_name()
    try:
        temporary.mkdir()
        yield temporary
        (folder / "summary.json").unlink(missing_ok=True)
        for name in _OTHERS:
            (folder / name).unlink(missing_ok=True)
        remove_views(folder / "views")
        files = [path for path in temporary.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == "summary.json"):
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)
    except MedsegError as error:
        error.file = error.file and str(error.file).replace(str(temporary), str(folder))
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
