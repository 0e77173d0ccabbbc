"""Writing files so that a reader only ever sees a whole one, and taking files in from outside without harm.

Everything that medseg writes goes through `atomic_write` or `atomic_path`: a temporary name in the same folder, write,
fsync, verify, rename, fsync of the folder. After a crash at any point the old file or the new one is there, never half
of one; an exception leaves nothing behind. Permission bits come from the umask. A full disk, a read-only folder and the
like become `ResourceError` with the path, the bytes needed and the bytes free.

`FAIL_POINTS` lets tests stop a process between the steps (names: "opened", "written", "synced", "verified", "renamed").
The parts stand in files_atomic (writer), files_space (room, permission, locks), files_names (names, hashes) and
files_transfer (archives, downloads); other modules import them from here.
"""

from __future__ import annotations

from medseg.files_atomic import (
    FAIL_POINTS,
    atomic_path,
    atomic_write,
    fail_point,
    probe_writable,
    remove_stale,
    write_bytes,
    write_json,
    write_text,
)
from medseg.files_names import full_suffix, inside, require_file, safe_stem, sha256_file, written_suffix
from medseg.files_space import lock, put_aside, require_space, resource_error
from medseg.files_transfer import download, safe_extract

__all__ = [
    "FAIL_POINTS",
    "atomic_path",
    "atomic_write",
    "download",
    "fail_point",
    "full_suffix",
    "inside",
    "lock",
    "probe_writable",
    "put_aside",
    "remove_stale",
    "require_file",
    "require_space",
    "resource_error",
    "safe_extract",
    "safe_stem",
    "sha256_file",
    "write_bytes",
    "write_json",
    "write_text",
    "written_suffix",
]
