"""The atomic writer: temporary name in the same folder, write, fsync, verify, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from medseg.errors import UsageError
from medseg.files_names import full_suffix
from medseg.files_space import require_space, resource_error

__all__ = [
    "FAIL_POINTS",
    "HOST",
    "TEMPORARY",
    "atomic_path",
    "atomic_write",
    "fail_point",
    "probe_writable",
    "remove_stale",
    "temporary_name",
    "write_bytes",
    "write_json",
    "write_text",
]

FAIL_POINTS: dict[str, Callable[[], Any]] = {}

TEMPORARY = ".medseg-"  # hidden, so that no listing takes a temporary file for a result
# this machine or container in such names: another one that writes to the same folder has process numbers of its own
HOST = hashlib.sha256(socket.gethostname().encode("utf-8", "surrogateescape")).hexdigest()[:8]
_OWNER = re.compile(rf"{re.escape(TEMPORARY)}(?:([0-9a-f]{{8}})-)?(\d+)-")  # names without a host are of older versions
_OLD = 24 * 3600  # seconds without a change after which what another machine left is stale


def temporary_name(suffix: str = "") -> str:
    """A name that nothing has yet, for a file or folder that is being made; `remove_stale` knows by it whose it is."""
    return f"{TEMPORARY}{HOST}-{os.getpid()}-{secrets.token_hex(6)}{suffix}"


def fail_point(name: str) -> None:
    """Call the function that a test has put under `name` in `FAIL_POINTS`; nothing otherwise."""
    if FAIL_POINTS and (action := FAIL_POINTS.get(name)) is not None:
        action()


@contextlib.contextmanager
def atomic_path(
    path: str | Path,
    suffix: str | None = None,
    *,
    verify: Callable[[Path], Any] | None = None,
    needed: int | None = None,
) -> Iterator[Path]:
    """A temporary path to write to; renamed to `path` when the block ends without an exception.

    Args:
        path: the final name; its folder is made when missing; a file of that name is replaced.
        suffix: suffix of the temporary name, for libraries that look at it; that of `path` when None.
        verify: called with the temporary path after the sync; an exception from it keeps the old file.
        needed: bytes that will be written, if known: checked before, and told when the disk is full.

    Raises:
        ResourceError: E501 no space left, E502 the folder cannot be written.

    >>> import tempfile; folder = Path(tempfile.mkdtemp())
    >>> with atomic_path(folder / "a.txt") as temporary:
    ...     _ = temporary.write_text("whole")
    >>> [p.name for p in folder.iterdir()], (folder / "a.txt").read_text()
    (['a.txt'], 'whole')
    """
    path = Path(path)
    folder = path.parent
    temporary = folder / temporary_name(full_suffix(path) if suffix is None else suffix)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise UsageError("a folder stands where a file is to be written", file=path)
        if needed is not None:
            require_space(folder, needed)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # 0o666 less the umask
        fail_point("opened")
        yield temporary
        fail_point("written")
        _sync(temporary)
        fail_point("synced")
        if verify is not None:
            verify(temporary)
        fail_point("verified")
        os.replace(temporary, path)
        fail_point("renamed")
        _sync(folder)
    except BaseException as error:
        size = _size(temporary)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        failure = resource_error(error, path, needed=needed or size or None, temporary=temporary)
        if failure is not None:
            raise failure from error
        raise


@contextlib.contextmanager
def atomic_write(
    path: str | Path,
    mode: str = "wb",
    *,
    verify: Callable[[Path], Any] | None = None,
    needed: int | None = None,
) -> Iterator[IO[Any]]:
    """An open file whose content appears under `path` when the block ends without an exception; see `atomic_path`."""
    if mode not in ("wb", "w"):
        raise UsageError("atomic_write writes whole files", field="mode", expected="'wb' or 'w'", found=mode)
    with atomic_path(path, verify=verify, needed=needed) as temporary:
        text = mode == "w"
        with temporary.open(mode, encoding="utf-8" if text else None, newline="\n" if text else None) as file:
            yield file


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, atomically."""
    with atomic_write(path, needed=len(data)) as file:
        file.write(data)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, atomically. Lone surrogates (undecodable file names) are kept as bytes."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, atomically; NaN and infinity are refused (they are not JSON)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False) + "\n")


def remove_stale(folder: str | Path) -> list[Path]:
    """Remove temporary files left in `folder` by processes of this machine that no longer run; returns them.

    Those of other machines and containers, whose processes cannot be seen, when nothing changed them for a day.
    """
    removed = []
    for path in sorted(Path(folder).glob(f"{TEMPORARY}*")):
        owner = _OWNER.match(path.name)
        if owner is not None and (not _runs(int(owner[2])) if owner[1] == HOST else _is_old(path)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def probe_writable(folder: str | Path) -> None:
    """Make `folder` when missing and write, sync and remove a small file in it, before work is spent on its content.

    Raises:
        ResourceError: E501 or E502.
    """
    folder = Path(folder)
    with contextlib.suppress(_Probed), atomic_path(folder / f"{TEMPORARY}probe") as temporary:
        temporary.write_bytes(b"medseg" * 64)
        _sync(temporary)
        raise _Probed  # the temporary file is removed; no final name ever appears


class _Probed(Exception):
    pass


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some file systems (network, FUSE) cannot sync a folder; their rename is still whole
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > _OLD
    except OSError:  # its process has just given it its name
        return False


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
