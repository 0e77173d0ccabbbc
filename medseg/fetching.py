"""`medseg data fetch`: bring a set whose archive, checksum and size datasets.yaml knows; say where to get the others.

Most medical data sets ask for an account or a signature, which no program should give in a user's name.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from medseg.config import DatasetSpec
from medseg.errors import UsageError
from medseg.files import download, inside, require_space, safe_extract

__all__ = ["fetch_dataset"]

_UNPACKED = 20  # an archive may grow to this many times its size; more is a bomb


def fetch_dataset(spec: DatasetSpec, root: str | Path) -> Path:
    """Download and unpack a set below the data root; it appears there only when whole.

    Args:
        spec: facts about the set; `spec.download` holds address, sha256, bytes and folder.
        root: the data root; made if it is not there.

    Returns:
        The folder that holds the set.

    Raises:
        UsageError: E102 the set cannot be fetched by a program (where to get it is told), or is there already.
        ResourceError: no room, no connection, or another file than datasets.yaml knows.
        FormatError: the archive holds something that is no plain file inside it.
    """
    root = Path(root)
    if spec.download is None:
        raise UsageError(
            f"{spec.name} cannot be fetched by a program",
            code="E102",
            fix=f"get it from {spec.url or 'its authors'} (licence: {spec.licence}) and unpack it in {root}",
        )
    root.mkdir(parents=True, exist_ok=True)
    target = inside(root, spec.download.folder or spec.name)
    if target.exists():
        raise UsageError("the folder is there already; nothing is overwritten", code="E102", file=target)
    require_space(root, spec.download.bytes * 3)
    with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as work:
        name = Path(spec.download.url.rsplit("/", 1)[-1].split("?", 1)[0]).name or "archive"
        archive = download(spec.download.url, Path(work) / name, spec.download.sha256, spec.download.bytes)
        unpacked = safe_extract(archive, Path(work) / "unpacked", spec.download.bytes * _UNPACKED)
        inner = list(unpacked.iterdir())
        # an archive of a single folder of the set's own name stands for that folder
        source = inner[0] if len(inner) == 1 and inner[0].name == target.name else unpacked
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source, target)
    return target
