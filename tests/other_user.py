"""Work of a user who may not read everything: root may, so tests of missing permissions give its rights away."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medseg.errors import MedsegError

needs_other_user = pytest.mark.skipif(sys.platform != "linux", reason="forks, and takes another user's number")


def as_other_user(make: Callable[[Path], None], work: Callable[[Path], Any]) -> Any:
    """What `work` gives, or the error that it raises, in a folder of this user that `make` has filled and locked."""
    context = multiprocessing.get_context("fork")
    folder, results = Path(tempfile.mkdtemp()), context.Queue()

    def start() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setuid(65534)
        try:
            results.put(work(folder))
        except MedsegError as error:
            results.put(error)
        except BaseException as error:
            results.put(repr(error))

    try:
        folder.chmod(0o755)
        make(folder)
        process = context.Process(target=start)
        process.start()
        found = results.get(timeout=60)
        process.join(60)
        return found
    finally:
        for path in folder.iterdir():
            path.chmod(0o755)
        shutil.rmtree(folder)
