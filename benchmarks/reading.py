"""Verified reading of gzipped NIfTI against nibabel, which verifies nothing, and against reading the bytes alone.

python benchmarks/reading.py IMAGE.nii.gz [repeats]    prints a Markdown table row; interleaved, medians, one process
python benchmarks/reading.py --check [repeats]         `data check` of 8 CT-like cases, 2 workers, against gunzip
"""

from __future__ import annotations

import gzip
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from medseg.checking import check_dataset
from medseg.config import DatasetSpec
from medseg.volumes import read_image


def check(repeats: int) -> None:
    """`data check` against unpacking the same files in two threads."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for part in ("images", "labels"):
            (root / part).mkdir()
        for number in range(8):
            values = np.random.default_rng(number).normal(0, 12, (512, 512, 24)).astype(np.int16)
            nibabel.Nifti1Image(values, np.eye(4)).to_filename(root / f"images/c{number}.nii.gz")
            label = (values > 10).astype(np.uint8)
            label[:, :, ::2] = 0
            nibabel.Nifti1Image(label, np.eye(4)).to_filename(root / f"labels/c{number}.nii.gz")
        files = sorted(root.rglob("*.nii.gz"))
        size = sum(path.stat().st_size for path in files) / 1e6
        spec = DatasetSpec.from_dict({
            "name": "ct", "title": "CT-like noise", "modality": "CT", "dims": 3, "channels": ["ct"], "unit": "mm",
            "labels": {0: "background", 1: "organ"},
            "files": {"training": {"image": "images/{id}.nii.gz", "label": "labels/{id}.nii.gz"}},
        })  # fmt: skip

        def bare(path: Path) -> int:
            return len(gzip.decompress(path.read_bytes()))

        def checked() -> None:
            assert check_dataset(spec, root, workers=2).problems == []

        def unpacked() -> None:
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(bare, files))

        ways = {"data check": checked, "gunzip in 2 threads": unpacked}
        seconds = medians(ways, repeats)
        rates = " | ".join(f"{size / seconds[way]:.0f} MB/s" for way in ways)
        ratio = seconds["gunzip in 2 threads"] / seconds["data check"]
        print(f"| {len(files)} files, {size:.0f} MB packed | {rates} | {ratio:.2f} x gunzip |")


def medians(ways: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each way; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    if "--check" in sys.argv:
        rest = [word for word in sys.argv[1:] if word != "--check"]
        return check(int(rest[0]) if rest else 3)
    repeats = int(sys.argv[2]) if len(sys.argv) > 2 else 9
    with tempfile.TemporaryDirectory() as folder:
        path = Path(sys.argv[1]) if len(sys.argv) > 1 else _phantom(Path(folder) / "ct.nii.gz")
        size = path.stat().st_size / 1e6
        ways = {
            "medseg": lambda: read_image(path),
            "nibabel": lambda: np.asarray(nibabel.load(path).dataobj),
            "gzip": lambda: gzip.decompress(path.read_bytes()),
            "bytes": path.read_bytes,
        }
        median = medians(ways, repeats)
        shown = " | ".join(f"{median[name]:.3f} s" for name in ways)
        ratio = median["nibabel"] / median["medseg"]
        print(f"| {size:.1f} MB | {shown} | {size / median['medseg']:.0f} MB/s a core | {ratio:.2f} x nibabel |")


def _phantom(path: Path) -> Path:
    """CT-like noise that gzip halves."""
    values = np.random.default_rng(0).normal(0, 12, (512, 512, 120)).astype(np.int16)
    nibabel.Nifti1Image(values, np.eye(4)).to_filename(path)
    return path


if __name__ == "__main__":
    main()
