"""What the system refuses where nobody expected it: no permission, names that are too long, too many open files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from medseg.errors import DataError, MedsegError, ResourceError, UsageError

__all__ = ["open_files", "system_error"]


def system_error(error: OSError) -> MedsegError | None:
    """`error` with its file and a way out; None when it is about something else.

    >>> print(system_error(PermissionError(13, "Permission denied", "runs/a/best.pt")))
    E308: no permission to use this file or folder
      file: runs/a/best.pt
      found: Permission denied
      fix: allow it (chmod u+r, for a folder u+rx), or name one that you may use
    """
    if error.errno == errno.EMFILE:
        limit, fix = open_files()
        return ResourceError("too many open files", file=_name(error), found=limit, fix=fix)
    if (file := _name(error)) is None:
        return None
    if error.errno in (errno.EACCES, errno.EPERM):
        fix = "allow it (chmod u+r, for a folder u+rx), or name one that you may use"
        return DataError(
            "no permission to use this file or folder", code="E308", file=file, found=error.strerror, fix=fix
        )
    if error.errno == errno.ENAMETOOLONG:
        longest = max(len(os.fsencode(part)) for part in Path(file).parts)
        return UsageError(
            "a name is longer than files can have", file=file, expected="at most 255 bytes, a whole path 4095",
            found=f"{longest} bytes, the whole path {len(os.fsencode(file))}", fix="choose a shorter name",
        )  # fmt: skip
    return None


def open_files() -> tuple[str, str]:
    """How many files this process may open at once, and what to do where it is too few."""
    try:
        import resource  # not on Windows

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    except (ImportError, OSError, ValueError):
        return "an unknown limit", "allow more open files"
    wanted = max(4096, 2 * soft)
    most = "" if hard == resource.RLIM_INFINITY or wanted <= hard else f" (a new shell; this one may have {hard})"
    return f"a limit of {soft} open files (ulimit -n)", f"allow more open files: ulimit -n {wanted}{most}"


def _name(error: OSError) -> str | None:
    return None if error.filename is None else os.fsdecode(error.filename)
