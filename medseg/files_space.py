"""Room, permission and locks: what the environment refuses, told as a ResourceError with path and numbers."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medseg.errors import ResourceError

__all__ = ["lock", "put_aside", "require_space", "resource_error"]

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_WRITABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.EEXIST,
    errno.EIO,
}
_TORCH_WRITER = ("inline_container", "PytorchStreamWriter", "unexpected pos", "iostream error")
_RUST = re.compile(r"\(os error (\d+)\)$")  # how libraries in Rust (safetensors) name what the system refused


@contextlib.contextmanager
def lock(path: str | Path, timeout: float = 10.0) -> Iterator[None]:
    """Hold the lock file `path` for the block, against other processes and threads.

    Raises:
        ResourceError: E503, not free within `timeout` seconds (`timeout=-1` waits for ever).
    """
    import filelock

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    held = filelock.FileLock(str(path))
    try:
        held.acquire(timeout=timeout)
    except filelock.Timeout:
        fix = "wait for the other process to end, or remove the lock if none runs"
        raise ResourceError("another process holds the lock", code="E503", file=path, fix=fix) from None
    except OSError as error:
        raise (resource_error(error, Path(path), temporary=Path(path)) or error) from error
    try:
        yield
    finally:
        held.release()


def require_space(folder: str | Path, needed: int) -> None:
    """Raise ResourceError E501 unless `needed` bytes are free where `folder` is, or will be."""
    free = _free(Path(folder))
    if free is not None and free < needed:
        raise _full(Path(folder), needed, free)


def resource_error(
    error: BaseException, path: Path, *, needed: int | None = None, temporary: Path | None = None
) -> ResourceError | None:
    """`error` as a ResourceError about writing `path`, or None when it is about something else.

    torch.save reports a full disk as a RuntimeError that names its `inline_container.cc` or its stream.
    """
    if isinstance(error, RuntimeError) and any(mark in str(error) for mark in _TORCH_WRITER):
        return _full(path, needed, _free(path))
    if (told := _RUST.search(str(error))) is not None:
        error = OSError(int(told[1]), os.strerror(int(told[1])))
    if not isinstance(error, OSError):
        return None
    if error.errno in _DISK_FULL:
        return _full(path, needed, _free(path))
    own = {str(path), str(path.parent), str(temporary)}
    named = {str(name) for name in (error.filename, error.filename2) if name is not None}
    # an error that names some other file (an input that vanished) is not about this output
    if error.errno in _NOT_WRITABLE and (not named or any(name in own or str(path).startswith(name) for name in named)):
        fix = "choose an output folder that you may write to"
        return ResourceError("cannot write", code="E502", file=path, found=error.strerror, fix=fix)
    return None


def _full(path: Path, needed: int | None, free: int | None) -> ResourceError:
    return ResourceError(
        "no space left, or a size limit was reached",
        code="E501",
        file=path,
        expected=None if needed is None else f"{needed} bytes",
        found=None if free is None else f"{free} bytes free",
        fix="free space or choose another folder",
    )


def _free(path: Path) -> int | None:
    for folder in (path, *path.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(folder).free
    return None


def put_aside(array: Any) -> bool:
    """Take the pages of the mapped file that `array` (NumPy) lies in out of this process; its values stay in the file.

    Pages of a mapping count as the process's memory while they are mapped in, whether anyone needs them or not; they
    come back when they are touched. For shared mappings: changes to a copy-on-write one would be lost. Returns False,
    and does nothing, for other arrays and where the system has no such call.
    """
    base = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None)
    advice = getattr(mmap, "MADV_DONTNEED", None)
    if base is None or advice is None:
        return False
    base.madvise(advice)
    return True
