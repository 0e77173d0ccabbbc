"""Names, places and identity of files: suffixes, legal names, paths that stay inside a folder, hashes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from medseg.errors import ConfigError, FormatError

__all__ = ["full_suffix", "inside", "require_file", "safe_stem", "sha256_file", "written_suffix"]

_LONG_SUFFIXES = (".nii.gz", ".seg.nrrd", ".ome.tif", ".ome.tiff", ".tar.gz", ".tar.bz2", ".tar.xz")
_NAME_BYTES = 255  # the longest file name on all common file systems


def full_suffix(path: str | Path) -> str:
    """The suffix that decides a file's format, in lower case, double ones whole.

    >>> full_suffix("a/liver.v2.NII.GZ"), full_suffix("x.tif"), full_suffix("none"), full_suffix(".hidden")
    ('.nii.gz', '.tif', '', '')
    """
    name = Path(path).name.lower()
    for suffix in _LONG_SUFFIXES:
        if name.endswith(suffix) and len(name) > len(suffix):
            return suffix
    return Path(name).suffix


def written_suffix(path: str | Path) -> str:
    """`full_suffix` in the letters that the name has.

    >>> written_suffix("a/liver.v2.NII.GZ"), written_suffix("none")
    ('.NII.GZ', '')
    """
    name = Path(path).name
    return name[len(name) - len(full_suffix(name)) :]


def safe_stem(name: str, suffix: str = ".nii.gz") -> str:
    """A case id as the stem of a file name: `safe_stem(name, suffix) + suffix` is one legal name of at most 255 bytes.

    Letters of any script, blanks, quotes and the like stay. `/`, NUL and backslash become `_`; what had to be changed
    or shortened gets ten digits of the name's SHA-256, so that two different names never give the same stem.

    >>> safe_stem("肝 'a' 100%"), safe_stem("a/b"), len(safe_stem("x" * 300))
    ("肝 'a' 100%", 'a_b-c14cddc033', 248)
    """
    clean = "".join("_" if c in "/\\\0" else c for c in name)
    raw = os.fsencode(clean)
    room = _NAME_BYTES - len(os.fsencode(suffix))
    if clean == name and len(raw) <= room and name not in ("", ".", ".."):
        return name
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:10]
    cut = raw[: room - len(digest) - 1].decode("utf-8", "ignore") if len(raw) > room - 11 else clean
    return f"{cut.strip('.') or 'case'}-{digest}"


def inside(root: str | Path, path: str | Path) -> Path:
    """`path` below `root`, links resolved.

    Raises:
        ConfigError: E104, the path leaves `root` by `..`, by a link or by being absolute.

    >>> inside("/data", "images/a.nii").as_posix().endswith("/data/images/a.nii")
    True
    """
    base = Path(root).resolve()
    try:
        target = (base / path).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # NUL inside, loop of links
        raise ConfigError("a path cannot be resolved", code="E104", file=str(path), found=error) from None
    if not target.is_relative_to(base):
        raise ConfigError(
            "a path leaves the data set's folder",
            code="E104",
            file=str(path),
            expected=f"inside {base}",
            found=target,
            fix="move the file into the folder, or name its own folder as the root",
        )
    return target


def require_file(path: str | Path, *, case: str | None = None) -> Path:
    """`path`, if it is a file that can be read and is not empty.

    Raises:
        FormatError: E308 missing, a folder, a pipe, a dangling link, not readable; E302 empty.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise FormatError("a folder stands where a file is expected", code="E308", case=case, file=path)
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever, a device never ends
            raise FormatError("a pipe or device stands where a file is expected", code="E308", case=case, file=path)
        with path.open("rb") as file:
            if not file.read(1):
                raise FormatError("the file is empty", code="E302", case=case, file=path, found="0 bytes")
    except (OSError, ValueError) as error:
        if os.path.islink(path) and not os.path.exists(path):
            what = "the file is a link to nothing"
        elif isinstance(error, FileNotFoundError):
            what = "the file does not exist"
        else:
            what = "the file cannot be read"
        reason = error.strerror if isinstance(error, OSError) else error
        raise FormatError(what, code="E308", case=case, file=path, found=reason) from None
    return path


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits; of an empty file too. Errors as `require_file`."""
    try:
        require_file(path)
    except FormatError as error:
        if error.code != "E302":
            raise
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
