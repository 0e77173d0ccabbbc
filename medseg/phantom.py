"""Images drawn by arithmetic that look like the real thing, written in the published layout of the real set.

The same code path is used with and without real data: `medseg data phantom liver -o DIR` makes a folder that
`medseg train liver --data DIR` reads as if it were the Medical Segmentation Decathlon's. Nothing here is a model of
disease; phantoms show that a pipeline works, never how well it would do on patients.

    liver   DIR/Task03_Liver/{dataset.json,imagesTr,labelsTr,imagesTs}     CT in HU, 1 liver, 2 tumour
    drive   DIR/DRIVE/{training,test}/{images,1st_manual,mask}             fundus photographs with a field of view
    cell    DIR/dsb2018/stage1_train/ID/{images,masks}, types.csv          nuclei, one mask file for each
    shapes  DIR/shapes/{images,labels}                                     circles, squares, triangles; outlines void

A case depends on (kind, seed, number of the case) only: asking for more cases does not change the first ones.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from medseg.errors import UsageError
from medseg.files import atomic_path, probe_writable, write_bytes, write_text
from medseg.phantom_ct import draw_ct
from medseg.phantom_pictures import draw_fundus, draw_nuclei, draw_shapes

__all__ = ["KINDS", "draw_ct", "draw_fundus", "draw_nuclei", "draw_shapes", "write_phantom"]


def write_phantom(
    kind: str,
    output: str | Path,
    *,
    cases: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `cases` training cases of a kind into `output`.

    Args:
        kind: "liver", "drive", "cell" or "shapes".
        output: the data root to write into; the set's own folder is made inside it.
        cases: number of labelled training cases, at least 1. Liver and drive get test cases too, a quarter as many.
        seed: any integer; the same seed gives the same voxels. Two names of one kind never share a file.
        progress: called with (done, total) after each case.

    Returns:
        The folder of the set inside `output`.

    Raises:
        UsageError: unknown kind, fewer than one case, or a folder that already holds this set.

    >>> import tempfile
    >>> folder = write_phantom("cell", tempfile.mkdtemp(), cases=1, seed=3)
    >>> folder.name, len(list(folder.glob("stage1_train/*/images/*.png")))
    ('dsb2018', 1)
    """
    if kind not in KINDS:
        raise UsageError("unknown phantom", field="kind", expected=", ".join(KINDS), found=kind)
    if cases < 1:
        raise UsageError("a phantom needs at least one case", field="cases", expected=">= 1", found=cases)
    folder, writer = KINDS[kind]
    target = Path(output) / folder
    if target.is_dir() and any(target.iterdir()):
        raise UsageError(
            "the folder already holds files; a phantom never overwrites",
            file=target,
            fix="give another folder with -o, or remove this one",
        )
    probe_writable(target)
    total = 0
    for total, planned in enumerate(writer(target, cases, seed), start=1):
        if progress:
            progress(total, planned)
    return target


def _write_liver(target: Path, cases: int, seed: int) -> Iterator[int]:
    tests = max(1, cases // 4)
    listed = []
    for number in range(cases + tests):
        image, label, affine = draw_ct(_rng("liver", seed, number), oblique=number % 3 == 2)
        name = f"liver_{number}.nii.gz"
        where = "Tr" if number < cases else "Ts"
        _write_nifti(target / f"images{where}" / name, image, affine)
        # the real set keeps the labels of its test half to itself; the phantom's are beside, for evaluation
        _write_nifti(target / f"labels{where}" / name, label, affine)
        listed.append(name)
        yield cases + tests
    facts = {
        "name": "Liver",
        "description": "phantom drawn by medseg, not patients",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver", "2": "cancer"},
        "numTraining": cases,
        "numTest": tests,
        "training": [{"image": f"./imagesTr/{n}", "label": f"./labelsTr/{n}"} for n in listed[:cases]],
        "test": [f"./imagesTs/{n}" for n in listed[cases:]],
    }
    write_text(target / "dataset.json", json.dumps(facts, indent=1) + "\n")


def _write_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    import nibabel as nib

    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine, dtype=array.dtype)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    with atomic_path(path) as temporary:
        nib.save(image, temporary)


def _write_drive(target: Path, cases: int, seed: int) -> Iterator[int]:
    tests = max(1, cases // 4)
    # as in DRIVE, the test half has the small numbers and the training half starts at 21
    names = [(21 + n, "training") for n in range(cases)] + [(1 + n, "test") for n in range(tests)]
    for number, half in names:
        picture, vessels, view = draw_fundus(_rng(f"drive-{half}", seed, number))
        where = target / half
        _write_picture(where / "images" / f"{number:02d}_{half}.tif", picture, "TIFF")
        _write_picture(where / "1st_manual" / f"{number:02d}_manual1.gif", vessels * np.uint8(255), "GIF")
        _write_picture(where / "mask" / f"{number:02d}_{half}_mask.gif", view * np.uint8(255), "GIF")
        yield cases + tests


def _write_cell(target: Path, cases: int, seed: int) -> Iterator[int]:
    rows = []
    for number in range(cases):
        picture, instances = draw_nuclei(_rng("cell", seed, number))
        name = hashlib.sha256(f"medseg cell {seed} {number}".encode()).hexdigest()
        rgba = np.dstack([picture] * 3 + [np.full_like(picture, 255)])
        _write_picture(target / "stage1_train" / name / "images" / f"{name}.png", rgba, "PNG")
        count = int(instances.max())
        for instance in range(1, count + 1):
            part = hashlib.sha256(f"{name} {instance}".encode()).hexdigest()
            mask = (instances == instance) * np.uint8(255)
            _write_picture(target / "stage1_train" / name / "masks" / f"{part}.png", mask, "PNG")
        rows.append((name, "fluorescence", count))
        yield cases
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("id", "type", "n_nuclei"), *rows])
    write_text(target / "types.csv", table.getvalue())


def _write_shapes(target: Path, cases: int, seed: int) -> Iterator[int]:
    for number in range(cases):
        picture, label = draw_shapes(_rng("shapes", seed, number))
        _write_picture(target / "images" / f"{number:04d}.png", picture, "PNG")
        _write_picture(target / "labels" / f"{number:04d}.png", label, "PNG")
        yield cases


def _write_picture(path: Path, array: np.ndarray, kind: str) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **({"compression": "tiff_lzw"} if kind == "TIFF" else {}))
    write_bytes(path, buffer.getvalue())


def _rng(kind: str, seed: int, number: int) -> np.random.Generator:
    digest = hashlib.sha256(kind.encode()).digest()
    return np.random.default_rng([int.from_bytes(digest[:4], "little"), seed % 2**32, number])


KINDS: dict[str, tuple[str, Callable[[Path, int, int], Iterator[int]]]] = {
    "liver": ("Task03_Liver", _write_liver),
    "drive": ("DRIVE", _write_drive),
    "cell": ("dsb2018", _write_cell),
    "shapes": ("shapes", _write_shapes),
}
