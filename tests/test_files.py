"""The atomic writer under every failure, names, locks, archives, downloads."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg import files, files_atomic
from medseg.errors import ConfigError, FormatError, ResourceError, UsageError

STEPS = ("opened", "written", "synced", "verified", "renamed")


@pytest.fixture(autouse=True)
def _no_fail_points() -> Iterator[None]:
    yield
    files.FAIL_POINTS.clear()


def test_content_and_mode_follow_the_umask(tmp_path: Path) -> None:
    for umask, mode in ((0o022, 0o644), (0o027, 0o640), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            files.write_text(tmp_path / "new" / "a.txt", "grüß\n")
        finally:
            os.umask(before)
        path = tmp_path / "new" / "a.txt"
        assert path.read_bytes() == "grüß\n".encode()
        assert stat.S_IMODE(path.stat().st_mode) == mode
        assert os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1), MemoryError(), OSError(errno.EIO, "x")]
)
def test_any_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.bin"
    files.write_bytes(path, b"old")
    with pytest.raises((type(error), ResourceError)), files.atomic_write(path) as file:  # noqa: PT012
        file.write(b"new and half")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("existed", [True, False])
def test_a_failure_at_each_step_is_all_or_nothing(tmp_path: Path, step: str, existed: bool) -> None:
    path = tmp_path / "a.bin"
    if existed:
        files.write_bytes(path, b"old")

    def fail() -> None:
        raise RuntimeError(step)

    files.FAIL_POINTS[step] = fail
    with pytest.raises(RuntimeError, match=step):
        files.write_bytes(path, b"new")
    expected = {"a.bin": b"new"} if step == "renamed" else {"a.bin": b"old"} if existed else {}
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == expected


@pytest.mark.parametrize("step", STEPS)
def test_kill_minus_nine_at_each_step_is_all_or_nothing_and_swept_up(tmp_path: Path, step: str) -> None:
    path = tmp_path / "a.bin"
    files.write_bytes(path, b"old" * 1000)
    code = (
        "import os, signal, sys\nfrom medseg import files\n"
        f"files.FAIL_POINTS[{step!r}] = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"files.write_bytes(sys.argv[1], b'new' * 1000)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert path.read_bytes() == (b"new" if step == "renamed" else b"old") * 1000
    files.remove_stale(tmp_path)
    assert os.listdir(tmp_path) == ["a.bin"]


def test_stale_files_of_running_processes_stay(tmp_path: Path) -> None:
    with files.atomic_path(tmp_path / "a.bin") as temporary:
        assert files.remove_stale(tmp_path) == []
        assert temporary.exists()
        assert temporary.name.startswith(".")


def test_what_another_machine_writes_stays_until_it_is_a_day_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process is not one of this machine's, so that there may be none of that number here."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    monkeypatch.setattr(os, "getpid", lambda: dead.pid)
    own = tmp_path / files_atomic.temporary_name()
    with monkeypatch.context() as patch:
        patch.setattr(files_atomic, "HOST", "0" * 8, raising=False)
        foreign = [tmp_path / files_atomic.temporary_name() for _ in range(2)]
    for path, hours in zip((own, *foreign), (0, 23, 25), strict=True):
        path.mkdir()
        os.utime(path, (time.time() - 3600 * hours,) * 2)
    assert set(files.remove_stale(tmp_path)) == {own, foreign[1]}
    assert list(tmp_path.iterdir()) == [foreign[0]]


def test_verify_runs_on_the_temporary_file_and_can_refuse(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    files.write_bytes(path, b"old")
    seen = []

    def verify(temporary: Path) -> None:
        seen.append((temporary.read_bytes(), temporary.name.endswith(".nii.gz"), temporary != path))
        raise FormatError("bad")

    with pytest.raises(FormatError), files.atomic_path(path, verify=verify) as temporary:
        temporary.write_bytes(b"new")
    assert seen == [(b"new", True, True)]
    assert path.read_bytes() == b"old"


@given(data=st.binary(max_size=200), at=st.integers(0, 200))
@settings(max_examples=40, deadline=None)
def test_property_an_exception_at_any_byte_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, at: int
):
    folder = tmp_path_factory.mktemp("w")
    path = folder / "a"
    files.write_bytes(path, b"old")
    try:
        with files.atomic_write(path) as file:
            for n, byte in enumerate(data):
                if n == at:
                    raise ZeroDivisionError
                file.write(bytes([byte]))
    except ZeroDivisionError:
        assert path.read_bytes() == b"old"
    else:
        assert path.read_bytes() == data
    assert os.listdir(folder) == ["a"]


def test_a_full_disk_names_path_needed_and_free(tmp_path: Path) -> None:
    path = tmp_path / "big.bin"
    files.write_bytes(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(ResourceError) as caught:
            files.write_bytes(path, bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    error = caught.value
    assert (error.code, error.exit_code) == ("E501", 5)
    assert error.file == str(path)
    assert error.expected == f"{1 << 20} bytes"
    assert "bytes free" in (error.found or "")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["big.bin"]


def test_torchs_own_report_of_a_full_disk(tmp_path: Path) -> None:
    text = "[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0"
    with pytest.raises(ResourceError) as caught, files.atomic_path(tmp_path / "a.pt"):
        raise RuntimeError(text)
    assert caught.value.code == "E501"


@pytest.mark.parametrize("writer", ["torch", "safetensors"])
def test_libraries_own_reports_of_a_full_disk(tmp_path: Path, writer: str) -> None:
    import torch
    from safetensors.torch import save_file

    state = {f"weight{n}": torch.zeros(1000) for n in range(10)}
    save = torch.save if writer == "torch" else save_file
    save(state, tmp_path / "whole")
    size = (tmp_path / "whole").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (0, 1000, size // 2, size - 2000, size - 200, size - 1):  # torch has several words
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(ResourceError) as caught, files.atomic_path(tmp_path / "a") as temporary:
                save(state, temporary)
            assert caught.value.code == "E501", limit
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == ["whole"]


def test_errors_about_other_files_are_not_called_output_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), files.atomic_write(tmp_path / "a"):
        Path("/no/such/input").read_bytes()
    with pytest.raises(ResourceError) as caught:
        files.write_bytes(tmp_path / "a" / "b" / ("x" * 300), b"")
    assert caught.value.code == "E502"
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ResourceError):
        files.write_bytes(tmp_path / "file" / "a", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError):
        files.write_bytes(tmp_path / "folder", b"")
    with pytest.raises(UsageError), files.atomic_write(tmp_path / "a", "a"):
        pass


def test_probe_and_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.probe_writable(tmp_path / "new" / "deep")
    assert os.listdir(tmp_path / "new" / "deep") == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ResourceError) as caught:
        files.probe_writable(tmp_path / "file")
    assert caught.value.code == "E502"
    real = os.open

    def read_only(path, flags, *rest, **more):  # root may write anywhere, so the refusal is made
        if flags & os.O_CREAT:
            raise PermissionError(errno.EROFS, "Read-only file system", str(path))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(ResourceError, match="cannot write"):
        files.probe_writable(tmp_path / "new")
    monkeypatch.undo()
    files.require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(ResourceError) as caught:
        files.require_space(tmp_path, 1 << 60)
    assert caught.value.expected == f"{1 << 60} bytes"


def test_lock_excludes_a_second_process(tmp_path: Path) -> None:
    path = tmp_path / "x" / ".lock"
    code = "import sys\nfrom medseg.files import lock\nwith lock(sys.argv[1], timeout=0.1): pass\n"
    with files.lock(path):
        ended = subprocess.run([sys.executable, "-c", code, str(path)], check=False, capture_output=True, text=True)
        assert "E503" in ended.stderr
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_json_is_strict(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"肝": [1, None]})
    assert (tmp_path / "a.json").read_text().startswith("{")
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", float("nan"))
    assert os.listdir(tmp_path) == ["a.json"]


# ---------------------------------------------------------------------------------------------- names and paths


def test_safe_stem_gives_one_legal_name_and_never_the_same_for_two(tmp_path: Path) -> None:
    names = [
        "a/b",
        "a_b",
        "a\\b",
        "..",
        ".",
        "",
        "x" * 249,
        "x" * 250,
        "肝" * 100,
        "肝" * 101,
        "n\nl",
        "a\0b",
        "-a",
        "%s",
    ]
    stems = [files.safe_stem(name) for name in names]
    assert len(set(stems)) == len(names)
    for stem in stems:
        path = tmp_path / f"{stem}.nii.gz"
        path.write_bytes(b"")
        assert path.parent == tmp_path
        assert len(os.fsencode(path.name)) <= 255
    assert [files.safe_stem(name) for name in ("a_b", "n\nl", "-a", "%s", "x" * 248)] == [
        "a_b",
        "n\nl",
        "-a",
        "%s",
        "x" * 248,
    ]


def test_inside_stops_dots_links_and_absolute_paths(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"")
    os.symlink(tmp_path / "secret", root / "link")
    os.symlink(root / "loop", root / "loop")
    assert files.inside(root, "a/b") == (root / "a" / "b").resolve()
    for path in ("../secret", "a/../../secret", str(tmp_path / "secret"), "link", "a\0b", "loop/x"):
        if path == "loop/x" and sys.version_info >= (3, 13):
            continue  # resolve no longer raises; opening does
        with pytest.raises(ConfigError) as caught:
            files.inside(root, path)
        assert caught.value.code == "E104"


def test_sha256_and_required_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "empty").write_bytes(b"")
    assert files.sha256_file(tmp_path / "a") == sha256(b"abc").hexdigest()
    assert files.sha256_file(tmp_path / "empty") == sha256(b"").hexdigest()
    with pytest.raises(FormatError):
        files.sha256_file(tmp_path / "none")
    with pytest.raises(FormatError) as caught:
        files.require_file(tmp_path / "empty")
    assert caught.value.code == "E302"


def test_the_content_is_synced_before_it_gets_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    sync, replace = os.fsync, os.replace

    def syncing(handle: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        sync(handle)

    def replacing(old: object, new: object) -> None:
        steps.append("rename")
        replace(old, new)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    files.write_bytes(tmp_path / "a", b"x")
    assert steps == ["file", "rename", "folder"]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/statm, and madvise, elsewhere are others")
def test_pages_of_a_mapped_file_are_put_aside_and_come_back(tmp_path):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    mapped = np.memmap(tmp_path / "a", np.uint8, "w+", shape=(64, 2**20))
    mapped[:] = np.arange(64, dtype=np.uint8)[:, None]
    before = resident()
    assert files.put_aside(np.asarray(mapped)[3:, ::2])
    assert before - resident() > 60 * 2**20
    assert (mapped == np.arange(64, dtype=np.uint8)[:, None]).all()
    assert not files.put_aside(np.zeros(10)[2:])
