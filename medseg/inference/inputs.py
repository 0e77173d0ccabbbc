"""The images among what `medseg predict` is given: files, folders, patterns; a model is none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from medseg import volumes
from medseg.errors import MedsegError, UsageError, collect
from medseg.package import MODEL_FILE
from medseg.run import is_run
from medseg.volumes_inputs import one_kind

__all__ = ["find_inputs"]


def find_inputs(inputs: Sequence[str | Path], output: Path) -> tuple[list[Path], list[tuple[str, MedsegError]]]:
    """Images out of files, folders and patterns, and (name, error) of those in which nothing is.

    What lies in the output folder is no input when that folder is below an input folder.

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
            for image in images:
                found.setdefault(volumes.same_file(image), image)
        except UsageError as error:
            refused.append((path.name or str(path), error))
    if not found:
        raise collect([error for _, error in refused] or [_nothing_named()])
    return list(found.values()), refused


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
