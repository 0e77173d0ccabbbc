"""Archives and downloads: nothing outside the folder, nothing before it is whole."""

from __future__ import annotations

import email.message
import io
import os
import tarfile
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest

from medseg import files
from medseg.errors import FormatError, ResourceError, UsageError


def make_zip(path: Path, members: dict[str, bytes], *, mode: int = 0o100644) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, data)
    return path


def make_tar(path: Path, members: list[tuple[str, bytes, bytes]]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(data), "/etc/passwd"
            info.mode = 0o4777
            archive.addfile(info, io.BytesIO(data))
    return path


def test_archives_are_unpacked_whole(tmp_path: Path) -> None:
    members = {"set/a.txt": b"one", "set/deep/ü b.txt": b"two", "./c": b"three"}
    archives = [
        make_zip(tmp_path / "a.zip", members),
        make_tar(tmp_path / "a.tar.gz", [(name, data, tarfile.REGTYPE) for name, data in members.items()]),
    ]
    for n, archive in enumerate(archives):
        out = files.safe_extract(archive, tmp_path / f"out{n}", 100)
        found = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
        assert found == {"set/a.txt": b"one", "set/deep/ü b.txt": b"two", "c": b"three"}
        assert not any(p.stat().st_mode & 0o7111 for p in out.rglob("*") if p.is_file())
        with pytest.raises(UsageError):
            files.safe_extract(archive, out, 100)


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../b", "..\\a", "C:\\a", "\\a", "a/.."])
def test_members_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    for archive in (
        make_zip(tmp_path / "a.zip", {name: b"x"}),
        make_tar(tmp_path / "a.tgz", [(name, b"x", tarfile.REGTYPE)]),
    ):
        with pytest.raises(FormatError) as caught:
            files.safe_extract(archive, tmp_path / "out", 100)
        assert caught.value.code == "E316"
        assert sorted(os.listdir(tmp_path)) in (["a.tgz", "a.zip"], ["a.zip"])


def test_links_devices_duplicates_bombs_and_broken_archives_are_refused(tmp_path: Path) -> None:
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
    cases = [(make_tar(tmp_path / f"{n}.tgz", [("a", b"", kind)]), "E316") for n, kind in enumerate(kinds)]
    cases.append((make_zip(tmp_path / "link.zip", {"a": b"/etc/passwd"}, mode=0o120777), "E316"))
    cases.append(
        (make_tar(tmp_path / "twice.tgz", [("a", b"1", tarfile.REGTYPE), ("a", b"2", tarfile.REGTYPE)]), "E316")
    )
    cases.append((make_zip(tmp_path / "case.zip", {"a": b"1", "A": b"2"}), "E316"))
    cases.append((make_zip(tmp_path / "both.zip", {"a": b"1", "a/b": b"2"}), "E316"))
    cases.append((make_zip(tmp_path / "bomb.zip", {"a": bytes(1 << 22)}), "E317"))
    (tmp_path / "text.zip").write_bytes(b"no archive at all")
    cases.append((tmp_path / "text.zip", "E315"))
    good = make_tar(tmp_path / "good.tgz", [("a", os.urandom(5000), tarfile.REGTYPE)]).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(good[: len(good) // 2])
    cases.append((tmp_path / "cut.tar.gz", "E315"))
    whole = make_zip(tmp_path / "whole.zip", {"a": os.urandom(5000)}).read_bytes()
    (tmp_path / "flip.zip").write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    cases.append((tmp_path / "flip.zip", "E315"))
    for archive, code in cases:
        with pytest.raises(FormatError) as caught:
            files.safe_extract(archive, tmp_path / "out", 1 << 20)
        assert caught.value.code == code, archive.name
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".medseg-*"))


class Response(io.BytesIO):
    headers = email.message.Message()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    content: dict[str, bytes] = {}

    class Opener:
        def open(self, url: str, timeout: float) -> Response:
            if url not in content:
                raise OSError("connection refused") if url.endswith("raise") else ConnectionError("refused")
            return Response(content[url])

    monkeypatch.setattr("urllib.request.build_opener", lambda *handlers: Opener())
    return content


def test_downloads_need_https_hash_and_size(tmp_path: Path, served: dict[str, bytes]) -> None:
    url, data = "https://example.org/a", b"content"
    served[url] = data
    good = sha256(data).hexdigest()
    assert files.download(url, tmp_path / "a", good, 100).read_bytes() == data
    for wrong, code in (((url, "0" * 64, 100), "E504"), ((url, good, 3), "E504"), (("https://no", good, 9), "E505")):
        with pytest.raises(ResourceError) as caught:
            files.download(wrong[0], tmp_path / "b", *wrong[1:])
        assert caught.value.code == code
    for address, digest in (("http://example.org/a", good), ("file:///etc/passwd", good), (url, ""), (url, "zz" * 32)):
        with pytest.raises(UsageError):
            files.download(address, tmp_path / "b", digest, 100)
    assert os.listdir(tmp_path) == ["a"]


def test_redirects_away_from_https_are_refused() -> None:
    import urllib.error
    import urllib.request

    from medseg.files_transfer import _HttpsOnly

    request = urllib.request.Request("https://example.org/a")
    with pytest.raises(urllib.error.URLError):
        _HttpsOnly().redirect_request(request, None, 302, "", {}, "http://example.org/a")
    assert _HttpsOnly().redirect_request(request, None, 302, "", {}, "https://example.org/b") is not None
