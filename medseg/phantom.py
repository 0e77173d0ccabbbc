"""Images drawn by arithmetic that look like the real thing, written in the published layout of the real set.

The same code path is used with and without real data: `medseg data phantom liver -o DIR` makes a folder that
`medseg train liver --data DIR` reads as if it were the Medical Segmentation Decathlon's. Nothing here is a model of
disease; phantoms show that a pipeline works, never how well it would do on patients.

    liver   DIR/Task03_Liver/{dataset.json,imagesTr,labelsTr,imagesTs}     CT in HU, 1 liver, 2 tumour
    drive   DIR/DRIVE/{training,test}/{images,1st_manual,mask}             fundus photographs with a field of view
    cell    DIR/dsb2018/stage1_train/ID/{images,masks}, types.csv          nuclei, one mask file for each

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
from medseg.files import atomic_path, write_bytes, write_text

__all__ = ["KINDS", "draw_ct", "draw_fundus", "draw_nuclei", "write_phantom"]


def write_phantom(
    kind: str,
    output: str | Path,
    *,
    cases: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `cases` training cases (and one or more test cases) of a kind into `output`.

    Args:
        kind: "liver", "drive" or "cell".
        output: the data root to write into; the set's own folder is made inside it.
        cases: number of labelled training cases, at least 1.
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
    if target.exists() and any(target.iterdir()):
        raise UsageError(
            "the folder already holds files; a phantom never overwrites",
            file=target,
            fix="give another folder with -o, or remove this one",
        )
    total = 0
    for total, planned in enumerate(writer(target, cases, seed), start=1):
        if progress:
            progress(total, planned)
    return target


# --- CT ---------------------------------------------------------------------------------------------------------


def draw_ct(rng: np.random.Generator, *, oblique: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One abdominal CT: (image int16 HU (i, j, k), label uint8 (i, j, k), affine 4x4 voxel -> RAS mm).

    The anatomy is drawn in patient coordinates and sampled through the affine, so that an oblique or flipped grid shows
    the same body: 0.05 rad about each axis when `oblique`, voxels of 2.8-3.2 mm in the plane and 4-6 mm between slices.
    """
    shape = (112, 96, int(rng.integers(36, 48)))
    spacing = np.array([*(rng.uniform(2.8, 3.2) * np.ones(2)), rng.uniform(4.0, 6.0)])
    flips = rng.choice([-1.0, 1.0], size=3)
    rotation = _rotation(rng.uniform(-0.05, 0.05, 3) if oblique else np.zeros(3))
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag(flips * spacing)
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    # scanners put the origin anywhere: the anatomy stays centred on the grid, whose world position is shifted
    shift = rng.uniform(-120, 120, 3)
    grid = np.stack(np.meshgrid(*[np.arange(n, dtype=np.float32) for n in shape], indexing="ij"))
    x, y, z = np.tensordot(affine[:3, :3], grid, 1) + affine[:3, 3].reshape(3, 1, 1, 1)
    affine[:3, 3] += shift

    def blob(centre, radii, wobble: float = 0.12) -> np.ndarray:
        """Signed size of an ellipsoid (positive inside) whose surface waves smoothly by the share `wobble`."""
        centre = np.asarray(centre) + rng.normal(0, 3, 3)
        radii = np.asarray(radii) * rng.uniform(0.92, 1.08, 3)
        u, v, w = ((a - c) / r for a, c, r in zip((x, y, z), centre, radii, strict=True))
        phase = rng.uniform(0, 2 * np.pi, 3)
        wave = np.sin(2.3 * u + phase[0]) + np.sin(2.9 * v + phase[1]) + np.sin(2.6 * w + phase[2])
        return 1 + wobble * wave / 3 - np.sqrt(u**2 + v**2 + w**2)

    # patient coordinates, RAS: x to the patient's right is negative, y to the front positive, z up
    body = 1 - (np.abs(x / 155) ** 2.5 + np.abs(y / 112) ** 2.5) ** 0.4
    inside = body > 0
    hu = np.full(shape, -1000.0, np.float32)
    hu[inside] = -105.0
    hu[body > 0.09] = 45.0
    for side in (-1, 1):
        hu[(blob((side * 75, 5, 115), (62, 75, 62), 0.05) > 0) & inside] = -840.0
    hu[blob((75, -15, 40), (30, 42, 42)) > 0] = 118.0  # spleen
    hu[blob((52, 45, 25), (42, 32, 38)) > 0] = 25.0  # stomach
    hu[blob((50, 62, 30), (20, 12, 22)) > 0] = -900.0  # and the air in it
    for side in (-1, 1):
        hu[blob((side * 58, -48, -40), (24, 22, 46)) > 0] = 150.0
    hu[blob((12, -38, 0), (11, 11, 400), 0) > 0] = 160.0  # aorta
    spine = blob((0, -68, 0), (22, 20, 400), 0)
    hu[spine > 0] = 190.0 + 140.0 * (np.cos(z[spine > 0] / 5.5) > 0.6)
    hu[(spine > 0) & (spine < 0.15)] = 420.0
    ribs = (np.abs(body - 0.12) < 0.025) & (np.cos(z / 4.2 + y / 30) > 0.72) & (y < 75)
    hu[ribs] = 380.0

    liver = np.maximum(blob((-62, 8, 42), (72, 70, 62)), blob((0, 38, 52), (62, 38, 34)))
    liver = (liver > 0) & (body > 0.14) & (spine < -0.1) & (hu > -500)
    hu[liver] = rng.uniform(95, 125)
    label = liver.astype(np.uint8)
    hu[liver & (np.abs(np.sin(x / 17 + y / 23) * np.cos(z / 19 - y / 21)) < 0.045)] += 40  # its vessels
    voxels = np.argwhere(liver)
    for _ in range(int(rng.integers(1, 5))):
        i, j, k = voxels[rng.integers(len(voxels))]
        tumour = (blob((x[i, j, k], y[i, j, k], z[i, j, k]), rng.uniform(9, 22) * np.ones(3)) > 0) & liver
        hu[tumour] = rng.uniform(40, 65)
        label[tumour] = 2
    return _scanner(hu, rng), label, affine


def _scanner(hu: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur by the scanner's point spread and add noise that neighbours share, as a reconstruction's has."""
    from scipy.ndimage import gaussian_filter

    noise = gaussian_filter(rng.normal(0, 1, hu.shape).astype(np.float32), (0.7, 0.7, 0))
    noise *= rng.uniform(10, 20) / noise.std()
    return np.clip(gaussian_filter(hu, (0.6, 0.6, 0.3)) + noise, -1024, 3071).round().astype(np.int16)


def _rotation(angles: np.ndarray) -> np.ndarray:
    (ca, cb, cc), (sa, sb, sc) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]])
    about_y = np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
    about_z = np.array([[cc, -sc, 0], [sc, cc, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


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


# --- fundus -----------------------------------------------------------------------------------------------------


def draw_fundus(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One retinal photograph of DRIVE's size: (RGB uint8 (584, 565, 3), vessels bool, field of view bool)."""
    from scipy.ndimage import gaussian_filter

    height, width = 584, 565
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    view = (rows - height / 2) ** 2 + (columns - width / 2) ** 2 < 270**2
    disc = np.array([height / 2 + rng.uniform(-40, 40), width * rng.choice([0.27, 0.73])])

    from PIL import Image, ImageDraw

    # drawn at four times the size and averaged: widths below a pixel become partial grey, as in a photograph
    canvas = Image.new("L", (width * 4, height * 4))
    pen = ImageDraw.Draw(canvas)
    toward = 1.0 if disc[1] < width / 2 else -1.0
    stems = [(disc, a * toward, rng.uniform(5.5, 8.0)) for a in (-1.9, -1.2, -0.75, 0.75, 1.2, 1.9)]
    while stems:
        point, angle, calibre = stems.pop()
        curl = rng.normal(0, 0.012)
        for _ in range(int(rng.integers(14, 34) * (1 + calibre / 6))):
            curl = 0.9 * curl + rng.normal(0, 0.012)
            angle += curl
            step = point + 5 * np.array([np.sin(angle), toward * np.cos(angle)])
            pen.line([tuple(point[::-1] * 4), tuple(step[::-1] * 4)], fill=255, width=max(1, round(calibre * 4)))
            pen.ellipse([*(step[::-1] * 4 - calibre * 2), *(step[::-1] * 4 + calibre * 2)], fill=255)
            point, calibre = step, calibre * 0.99
            if calibre > 1.8 and rng.random() < 0.07:  # a side branch leaves under 30 to 70 degrees
                side = rng.choice([-1, 1]) * rng.uniform(0.5, 1.2)
                stems.append((point, angle + side, calibre * rng.uniform(0.4, 0.65)))
        if calibre > 1.3 and 0 < point[0] < height and 0 < point[1] < width:
            fork = rng.uniform(0.25, 0.6)
            stems += [
                (point, angle + fork, calibre * rng.uniform(0.6, 0.75)),
                (point, angle - fork / 2, calibre * 0.85),
            ]
    cover = np.asarray(canvas.resize((width, height), Image.Resampling.BOX), np.float32) / 255
    vessels = (cover > 0.5) & view

    glow = np.exp(-((rows - height / 2) ** 2 + (columns - width / 2) ** 2) / (2 * 260**2))
    spot = np.exp(-((rows - disc[0]) ** 2 + (columns - disc[1]) ** 2) / (2 * 26**2))
    macula = np.exp(-((rows - height / 2) ** 2 + (columns - width / 2 - toward * 30) ** 2) / (2 * 38**2))
    mottle = gaussian_filter(rng.normal(0, 1, (height, width)).astype(np.float32), 9) * 60
    tone = 0.75 * glow + 0.25 + 0.55 * spot - 0.25 * macula + 0.02 * mottle
    tone = tone * (1 - rng.uniform(0.3, 0.42) * gaussian_filter(cover, 0.8))
    colour = np.array([205, 112, 62], np.float32) * rng.uniform(0.85, 1.1, 3)
    noise = gaussian_filter(rng.normal(0, 1, (height, width, 3)).astype(np.float32), (0.7, 0.7, 0)) * 9
    picture = np.where(view[..., None], tone[..., None] * colour + noise, 2)
    return np.clip(picture, 0, 255).astype(np.uint8), vessels, view


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


# --- nuclei -----------------------------------------------------------------------------------------------------


def draw_nuclei(rng: np.random.Generator, size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """One fluorescence picture: (grey uint8 (size, size), instances int32 of the same shape, 0 background).

    About half the nuclei stand in clusters whose members touch: a later nucleus never covers an earlier one.
    """
    from scipy.ndimage import gaussian_filter

    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    instances = np.zeros((size, size), np.int32)
    light = np.zeros((size, size), np.float32)
    base = rng.uniform(7, 12)
    centres: list[np.ndarray] = []
    for _ in range(int(rng.integers(12, 45))):
        if centres and rng.random() < 0.5:  # beside a neighbour, about two radii away
            angle = rng.uniform(0, 2 * np.pi)
            centre = centres[int(rng.integers(len(centres)))] + 2 * base * np.array([np.sin(angle), np.cos(angle)])
        else:
            centre = rng.uniform(0, size, 2)
        a, b = base * rng.uniform(0.75, 1.3, 2)
        turn = rng.uniform(0, np.pi)
        u = (rows - centre[0]) * np.cos(turn) + (columns - centre[1]) * np.sin(turn)
        v = (columns - centre[1]) * np.cos(turn) - (rows - centre[0]) * np.sin(turn)
        bend = 1 + 0.08 * np.sin(2 * np.arctan2(v, u) + rng.uniform(0, 6)) + 0.05 * np.sin(3 * np.arctan2(v, u))
        whole = (u / a) ** 2 + (v / b) ** 2 < bend**2
        free = whole & (instances == 0)
        if free.sum() < 0.7 * whole.sum() or free.sum() < 30:
            continue
        centres.append(centre)
        instances[free] = len(centres)
        light[free] = rng.uniform(0.45, 1.0)
    texture = 1 + 1.1 * gaussian_filter(rng.normal(0, 1, light.shape).astype(np.float32), 2)
    picture = gaussian_filter(light * texture, 1.2) * rng.uniform(90, 190) + rng.uniform(4, 22)
    picture += rng.normal(0, 1, light.shape) * rng.uniform(1.5, 5)
    return np.clip(picture, 0, 255).astype(np.uint8), instances


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
}
