"""Deterministic fuzz: whatever is flipped, cut or doubled in a file, a reader returns or raises MedsegError."""

from __future__ import annotations

import importlib.util
import io
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

import corpus
import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image

from medseg.errors import MedsegError
from medseg.volumes import read_geometry, read_image, read_label

MUTATIONS = 300


def _pillow(array: np.ndarray, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, format=format, **options)  # type: ignore[arg-type]
    return out.getvalue()


def _itk(folder: Path, suffix: str, compress: bool) -> bytes:
    corpus.write_itk(folder / f"x{suffix}", corpus.image(), compress)
    return (folder / f"x{suffix}").read_bytes()


def _dicom(folder: Path) -> bytes:
    return next(corpus.series(folder / "series", corpus.image((9, 8, 1))).iterdir()).read_bytes()


def _nifti_2(folder: Path) -> bytes:
    return nibabel.Nifti2Image(corpus.image(), np.eye(4)).to_bytes()


def _tiled(folder: Path) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(
        out, corpus.image((3, 40, 50), np.uint8), tile=(16, 16), compression="zlib", photometric="minisblack"
    )
    return out.getvalue()


GREY = corpus.image((20, 30), np.uint8)
READERS: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "nifti": (".nii", lambda _: corpus.nifti(corpus.image())),
    "nifti packed": (".nii.gz", lambda _: corpus.packed(corpus.nifti(corpus.image()))),
    "nifti 2": (".nii", _nifti_2),
    "metaimage": (".mha", lambda folder: _itk(folder, ".mha", False)),
    "metaimage packed": (".mha", lambda folder: _itk(folder, ".mha", True)),
    "nrrd": (".nrrd", lambda folder: _itk(folder, ".nrrd", False)),
    "nrrd packed": (".nrrd", lambda folder: _itk(folder, ".nrrd", True)),
    "dicom": (".dcm", _dicom),
    "tiff": (".tif", lambda _: corpus.tiff(GREY)),
    "tiff lzw": (".tif", lambda _: corpus.tiff(GREY, compression="lzw")),
    "tiff tiled": (".tif", _tiled),
    "png": (".png", lambda _: corpus.png(GREY)),
    "png palette": (".png", lambda _: _pillow(GREY, "PNG", bits=4)),
    "jpeg": (".jpg", lambda _: _pillow(GREY, "JPEG")),
    "gif": (".gif", lambda _: _pillow(GREY, "GIF")),
}


def mutate(data: bytes, random_: random.Random) -> bytes:
    """One of: 1 to 4 bytes set, a bit flipped in the first 400 bytes, cut off, a piece doubled or left out."""
    changed = bytearray(data)
    kind = random_.random()
    if kind < 0.45:
        for _ in range(random_.randint(1, 4)):
            changed[random_.randrange(len(changed))] = random_.choice((0, 1, 127, 128, 255, random_.randrange(256)))
    elif kind < 0.8:
        changed[random_.randrange(min(len(changed), 400))] ^= 1 << random_.randrange(8)
    elif kind < 0.9:
        del changed[random_.randrange(len(changed)) :]
    else:
        start = random_.randrange(len(changed))
        piece = changed[start : start + random_.randint(1, 64)]
        changed[start : start + len(piece)] = piece * 2 if random_.random() < 0.5 else b""
    return bytes(changed)


@pytest.mark.parametrize("name", READERS)
def test_a_mutated_file_is_read_or_refused(tmp_path: Path, name: str) -> None:
    suffix, make = READERS[name]
    good = make(tmp_path)
    path = tmp_path / f"fuzz{suffix}"
    path.write_bytes(good)
    read_image(path)  # the unchanged file is fine
    random_ = random.Random(f"medseg {name}")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused, slowest = 0, 0.0
    for n in range(MUTATIONS):
        data = mutate(good, random_)
        path.write_bytes(data)
        reader = (read_image, read_label, read_geometry)[0 if n % 3 else n // 3 % 3]
        start = time.perf_counter()
        try:
            reader(path)
        except MedsegError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"mutation {n} of {name}: {type(error).__name__}: {error}") from error
        slowest = max(slowest, time.perf_counter() - start)
    assert refused > 0
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    assert grown < 1024, "MB"
    print(f"{name}: {refused} of {MUTATIONS} refused, slowest {slowest:.3f} s, {grown:.0f} MB more")  # shown with -s


def test_the_nightly_harness_tells_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    import fuzz_atheris

    assert fuzz_atheris.main(["no such reader"]) == 2
    assert "nifti packed" in capsys.readouterr().err
    if importlib.util.find_spec("atheris") is None:
        assert fuzz_atheris.main(["nifti"]) == 5
        assert "pip install atheris" in capsys.readouterr().err
