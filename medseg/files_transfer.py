"""Archives and downloads: bytes from outside, counted and checked before they get a name."""

from __future__ import annotations

import contextlib
import hashlib
import io
import lzma
import os
import shutil
import stat
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import urlsplit

from medseg.errors import FormatError, ResourceError, UsageError
from medseg.files_atomic import atomic_path, temporary_name
from medseg.files_names import full_suffix, require_file
from medseg.files_space import require_space, resource_error

__all__ = ["download", "safe_extract"]

_BLOCK = 1 << 20
_PADDING = 1 << 26  # bytes behind a tar's mark of its end: zeros up to a full block, and no more
_MEMBERS = 1_000_000  # a bomb may also be made of names


def safe_extract(archive: str | Path, folder: str | Path, max_bytes: int) -> Path:
    """Unpack a zip or tar (plain, gz, bz2, xz) archive, member by member, into the new folder `folder`.

    Only files and folders are made, with permission bits from the umask. The folder appears under its name only when
    all is unpacked.

    Args:
        archive: file to unpack.
        folder: must not exist yet, or be empty.
        max_bytes: limit of the unpacked size, counted while unpacking, whatever the archive says about itself.

    Raises:
        FormatError: E315 not an archive or corrupt; E316 a member is absolute, has `..`, is a link, a device, encrypted
            or comes twice; E317 larger than `max_bytes`.
        UsageError: E101 `folder` exists and is not empty.
        ResourceError: E501, E502.
    """
    archive, folder = require_file(archive), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError("the folder to unpack into exists already", file=folder, fix="name a new folder")
    temporary = folder.parent / temporary_name(".unpack")
    try:
        temporary.mkdir(parents=True)
        with _corrupt_is_refused(archive):
            _unpack(archive, temporary, max_bytes)
        if folder.exists():
            folder.rmdir()
        os.rename(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        failure = resource_error(error, folder, temporary=temporary)
        if failure is not None:
            raise failure from error
        raise
    return folder


def _unpack(archive: Path, folder: Path, max_bytes: int) -> None:
    seen: set[str] = set()
    total = 0
    for name, is_folder, source in _members(archive):
        parts = _safe_parts(archive, name)
        key = "/".join(parts).casefold()  # on some file systems `A` and `a` are one file
        if not is_folder and (key in seen or len(seen) >= _MEMBERS):
            raise _refused(archive, name, "a name comes twice" if key in seen else "too many members")
        seen.add(key)
        target = folder.joinpath(*parts)
        try:
            if is_folder:
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            output = target.open("xb")
        except (FileExistsError, IsADirectoryError, NotADirectoryError):
            raise _refused(archive, name, "a name is a file and a folder") from None
        with output:
            while block := source.read(_BLOCK):
                total += len(block)
                if total > max_bytes:
                    message, found = "the archive is larger than allowed", f"more than {max_bytes} bytes"
                    expected = f"at most {max_bytes} bytes"
                    raise FormatError(message, code="E317", file=archive, expected=expected, found=found)
                output.write(block)


def download(url: str, path: str | Path, sha256: str, max_bytes: int, *, timeout_s: float = 60.0) -> Path:
    """Fetch `url` (https only, redirects too) to `path`; the file appears there only when whole and of the right hash.

    Args:
        url: https address.
        path: final name.
        sha256: expected SHA-256, 64 hexadecimal digits.
        max_bytes: the transfer is broken off beyond.
        timeout_s: seconds without a byte before giving up.

    Raises:
        UsageError: E101 not https, no sha256.
        ResourceError: E504 the content has another hash or is too large; E505 the server cannot be reached.
    """
    if urlsplit(url).scheme != "https":
        raise UsageError("downloads need https", field="url", expected="https://...", found=url)
    if len(sha256) != 64 or set(sha256.lower()) - set("0123456789abcdef"):
        raise UsageError("a download needs its SHA-256", field="sha256", expected="64 hexadecimal digits", found=sha256)
    digest, total = hashlib.sha256(), 0
    opener = urllib.request.build_opener(_HttpsOnly)
    with atomic_path(path) as temporary:
        try:
            with opener.open(url, timeout=timeout_s) as response, temporary.open("wb") as output:
                announced = int(response.headers.get("Content-Length") or 0)
                if announced > max_bytes:
                    raise _wrong_download(url, f"at most {max_bytes} bytes", f"{announced} bytes announced")
                require_space(temporary.parent, announced)
                while block := response.read(_BLOCK):
                    total += len(block)
                    if total > max_bytes:
                        raise _wrong_download(url, f"at most {max_bytes} bytes", f"more than {max_bytes} bytes")
                    digest.update(block)
                    output.write(block)
        except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError) as error:
            raise ResourceError("the download failed", code="E505", file=url, found=error) from None
        if digest.hexdigest() != sha256.lower():
            raise _wrong_download(url, f"sha256 {sha256.lower()}", f"sha256 {digest.hexdigest()}, {total} bytes")
    return Path(path)


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):  # the names are urllib's
        if urlsplit(newurl).scheme != "https":
            raise urllib.error.URLError("redirected away from https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _wrong_download(url: str, expected: str, found: str) -> ResourceError:
    return ResourceError("the download is not the expected file", code="E504", file=url, expected=expected, found=found)


def _refused(archive: Path, name: str, reason: str) -> FormatError:
    return FormatError(f"the archive is refused: {reason}", code="E316", file=archive, field="member", found=name)


def _safe_parts(archive: Path, name: str) -> tuple[str, ...]:
    plain = name.replace("\\", "/")
    drive = len(plain) > 1 and plain[1] == ":"
    parts = tuple(part for part in PurePosixPath(plain).parts if part != ".")
    if plain.startswith("/") or drive or ".." in parts or "\0" in plain:
        raise _refused(archive, name, "a member lies outside the folder")
    return parts


def _members(archive: Path) -> Iterator[tuple[str, bool, IO[bytes]]]:
    is_zip = full_suffix(archive) == ".zip" or zipfile.is_zipfile(archive)
    return _zip_members(archive) if is_zip else _tar_members(archive)


_CORRUPT = (
    zipfile.BadZipFile,
    tarfile.TarError,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    NotImplementedError,
    ValueError,
    UnicodeError,
)


@contextlib.contextmanager
def _corrupt_is_refused(archive: Path) -> Iterator[None]:
    try:
        yield
    except _CORRUPT as error:
        raise FormatError("the archive is corrupt or none", code="E315", file=archive, found=error) from None
    except (OSError, RuntimeError) as error:
        # gzip, bz2 and lzma report bad data as an OSError without a number; the real ones have one
        if getattr(error, "errno", None) is not None:
            raise
        raise FormatError("the archive is corrupt or none", code="E315", file=archive, found=error) from None


def _zip_members(archive: Path) -> Iterator[tuple[str, bool, IO[bytes]]]:
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _refused(archive, member.filename, "a member is a link or a device")
            if member.flag_bits & 1:
                raise _refused(archive, member.filename, "a member is encrypted")
            with contextlib.closing(opened.open(member)) as source:
                yield member.filename, member.is_dir(), source


def _tar_members(archive: Path) -> Iterator[tuple[str, bool, IO[bytes]]]:
    with tarfile.open(archive, "r:*") as opened:
        for member in opened:
            if not (member.isreg() or member.isdir()):
                raise _refused(archive, member.name, "a member is a link or a device")
            source = opened.extractfile(member) if member.isreg() else None
            yield member.name, member.isdir(), source or io.BytesIO()
        # tarfile stops at the mark of the end, before the checksum that gzip, bzip2 and xz keep behind it
        left = _PADDING
        while (file := opened.fileobj) is not None and (block := file.read(_BLOCK)):
            if (left := left - len(block)) < 0:
                raise _refused(archive, "the rest", "data after the last member")
