"""The images among what `medseg predict` is given: files, folders, patterns; a model is none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from medseg import volumes
from medseg.errors import MedsegError, UsageError, collect, counted
from medseg.inference.sources import RECORDS
from medseg.package import MODEL_FILE
from medseg.run import is_run
from medseg.volumes_inputs import NO_IMAGES, one_kind

__all__ = ["find_inputs", "tell_left_out"]

# images of formats that are not read, or that are known by another suffix (.nii.bz2, .jfif)
_UNREAD = (
    ".hdr", ".bmp", ".dib", ".webp", ".jp2", ".j2k", ".jpf", ".jxl", ".heic", ".avif", ".jfif", ".jpe", ".tga", ".pgm",
    ".ppm", ".pnm", ".svs", ".ndpi", ".scn", ".mrxs", ".vsi", ".czi", ".lif", ".nd2", ".oib", ".oif", ".lsm", ".stk",
    ".btf", ".mgz", ".mgh", ".mnc", ".gipl", ".nii.bz2", ".nii.xz", ".nii.zst", ".npy",
)  # fmt: skip


def find_inputs(inputs: Sequence[str | Path], output: Path) -> tuple[list[Path], list[tuple[str, MedsegError]]]:
    """Images out of files, folders and patterns, and (name, error) of those in which nothing is.

    What lies in the output folder is no input when that folder is below an input folder; nor are the masks of an
    earlier prediction there (`tell_left_out` tells of them).

    Raises:
        UsageError: E103 nothing is found at all; the output folder is an input folder; E101 an input is a model.
    """
    found: dict[tuple[str, str], Path] = {}
    refused: list[tuple[str, MedsegError]] = []
    for name in inputs:
        path = Path(name)
        if str(name):
            _refuse_model(path)
        if os.path.isdir(path) and path.resolve() == output.resolve():
            raise UsageError(
                "the output folder is an input folder: results would lie among the images",
                code="E103",
                field="output",
                file=output,
                fix="choose another output folder; one below the input folder will do",
            )
        try:
            images = volumes.list_inputs([name], skip=output, unique=False)
            if images != [path] and not (images := one_kind(images, images=True)):
                message = "there are segmentations of 3D Slicer and no images"
                raise UsageError(message, code="E103", file=path, expected="images")
            if os.path.isdir(path) and not (images := [i for i in images if not _is_predicted(i, path)]):
                message, fix = (
                    "there are masks of an earlier prediction and no images",
                    "name their own folder, if meant",
                )
                raise UsageError(message, code="E103", file=path, expected="images", fix=fix)
            for image in images:
                found.setdefault(volumes.same_file(image), image)
        except UsageError as error:
            if error.message == NO_IMAGES and (unread := _look([name], output)[0]):
                error.found, error.fix = unread, "save them as NIfTI, TIFF or PNG"
            refused.append((path.name or str(path), error))
    if not found:
        raise collect([error for _, error in refused] or [_nothing_named()])
    return list(found.values()), refused


def tell_left_out(inputs: Sequence[str | Path], output: Path) -> list[str]:
    """Notes on what is in input folders and gets no mask: images of formats that are not read, and earlier masks."""
    unread, earlier = _look(inputs, output)
    notes = []
    if earlier:
        notes.append(f"note: {counted(earlier, 'folder')} of earlier predictions below the inputs: left out")
    if unread:
        notes.append(f"note: {unread}: left out; save as NIfTI, TIFF or PNG")
    return notes


def _look(inputs: Sequence[str | Path], output: Path) -> tuple[str, int]:
    """What input folders hold in formats that are not read, in words, and how many folders of earlier masks."""
    found: set[Path] = set()
    earlier: set[Path] = set()
    for folder in (Path(name) for name in inputs if str(name) and os.path.isdir(name)):
        for base, folders, names in os.walk(folder):
            if Path(base) != folder and os.path.isdir(Path(base, RECORDS)):
                earlier.add(Path(base).resolve())
                folders.clear()
                continue
            folders[:] = [n for n in folders if not n.startswith(".") and Path(base, n).resolve() != output.resolve()]
            found |= {Path(base, n) for n in names if not n.startswith(".") and n.lower().endswith(_UNREAD)}
    kinds = sorted({next(end for end in _UNREAD if path.name.lower().endswith(end)) for path in found})
    unread = f"{counted(len(found), 'file')} in formats that medseg does not read ({', '.join(kinds)})" if found else ""
    return unread, len(earlier)


def _is_predicted(image: Path, folder: Path) -> bool:
    """Whether an image below an input folder lies in a folder in which predict has written."""
    between = image.parents[: max(0, len(image.parts) - len(folder.parts) - 1)]
    return any(os.path.isdir(part / RECORDS) for part in between)


def _refuse_model(path: Path) -> None:
    """A second model among the inputs is not a folder of images (its validation masks would be segmented)."""
    try:
        is_model = path.suffix in (".pt", ".onnx") or path.name == MODEL_FILE or is_run(path)
        is_model = is_model or (path / MODEL_FILE).is_file() or (path.is_dir() and any(map(is_run, path.iterdir())))
    except (OSError, ValueError):  # told when it is read
        return
    if is_model:
        raise UsageError(
            "an input is a model: a run, checkpoint or package", field="inputs", file=path, expected="images",
            fix=f"one model, then images; for an ensemble: --with {path}",
        )  # fmt: skip


def _nothing_named() -> UsageError:
    return UsageError("no inputs were named", code="E103", expected="files, folders or patterns")
