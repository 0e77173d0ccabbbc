"""Fetching a data set: only what is whole, of the right hash, and asked for."""

from __future__ import annotations

import hashlib
import io
import zipfile

import pytest

from medseg import fetching
from medseg.config import DatasetSpec
from medseg.errors import ResourceError, UsageError


def archive(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name in names:
            packed.writestr(name, b"content of " + name.encode())
    return buffer.getvalue()


def spec_for(data: bytes | None) -> DatasetSpec:
    facts = {
        "name": "tiny", "title": "Tiny", "modality": "CT", "dims": 3, "channels": ["CT"], "unit": "mm",
        "labels": {0: "background", 1: "organ"}, "files": {"msd": "tiny"}, "url": "https://example.org/tiny",
        "licence": "CC0-1.0",
    }  # fmt: skip
    if data is not None:
        facts["download"] = {
            "url": "https://example.org/tiny.zip", "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data),
        }  # fmt: skip
    return DatasetSpec.from_dict(facts)


@pytest.fixture
def server(monkeypatch):
    """Stands for the network: `served` is what comes over the wire."""
    served = {}

    def download(url, path, sha256, max_bytes):
        data = served[url]
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ResourceError("the download is not the file that was expected", code="E504", file=url)
        path.write_bytes(data)
        return path

    monkeypatch.setattr(fetching, "download", download)
    return served


def test_a_fetched_set_stands_below_the_root(tmp_path, server):
    data = archive("tiny/dataset.json", "tiny/imagesTr/a.nii.gz")
    server["https://example.org/tiny.zip"] = data
    folder = fetching.fetch_dataset(spec_for(data), tmp_path / "root")
    assert folder == tmp_path / "root" / "tiny"
    assert (folder / "imagesTr" / "a.nii.gz").read_bytes() == b"content of tiny/imagesTr/a.nii.gz"
    assert [p.name for p in (tmp_path / "root").iterdir()] == ["tiny"], "nothing is left behind"
    with pytest.raises(UsageError, match="there already"):
        fetching.fetch_dataset(spec_for(data), tmp_path / "root")


def test_a_wrong_archive_leaves_nothing(tmp_path, server):
    server["https://example.org/tiny.zip"] = b"<html>not found</html>"
    with pytest.raises(ResourceError, match="not the file"):
        fetching.fetch_dataset(spec_for(archive("tiny/a")), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_set_without_a_known_archive_tells_where_to_get_it(tmp_path):
    with pytest.raises(UsageError) as caught:
        fetching.fetch_dataset(spec_for(None), tmp_path)
    assert "https://example.org/tiny" in str(caught.value)
    assert "CC0-1.0" in str(caught.value)
    assert caught.value.exit_code == 2
