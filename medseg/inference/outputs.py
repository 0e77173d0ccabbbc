"""Where predictions go: names that never collide, files that appear only when complete, a record of each."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medseg import files, volumes
from medseg.errors import DataError, ResourceError, UsageError
from medseg.files_atomic import temporary_name
from medseg.inference.sources import RECORDS, contents_of

__all__ = [
    "FORMATS",
    "Job",
    "fingerprint",
    "header_of",
    "is_complete",
    "make_job",
    "plan_outputs",
    "probability_file",
    "protect",
    "record",
    "remove",
    "replaced",
    "take_name",
]

FORMATS = {"nifti": ".nii.gz", "tiff": ".tif", "png": ".png", "dicom-seg": ".dcm"}
_PICTURES = ("png", "jpeg", "gif")
_CHUNK = 64


@dataclass(frozen=True)
class Job:
    """One input and its outputs; `more` are the files of further channels, where each is one of its own."""

    case: str
    source: Path
    output: Path
    record: Path
    more: tuple[Path, ...] = ()

    def state(self) -> str:
        """Of the input: its `fingerprint`, which changes when one of its files does."""
        return ";".join(map(fingerprint, (self.source, *self.more)))

    @property
    def probabilities(self) -> Path:
        return self.output.with_name(_named(self.output, ".probabilities.zarr"))

    @property
    def overlay(self) -> Path:
        return self.output.parent / "overlays" / _named(self.output, "_overlay.png")


def protect(output: Path, jobs: Sequence[Job], *, alone: bool = True) -> None:
    """Mark `output` as a folder of predictions; in a folder that is none yet, no file may be replaced.

    `alone`: no other process writes there, so that temporary files of killed ones can be removed. (Shards may run on
    several machines, and whether a process of another one lives cannot be seen.)

    Raises:
        UsageError: E103, a file that `medseg predict` did not write has the name of an output.
        ResourceError: E502, the folder cannot be written, or `output` is a file.
    """
    if output.exists() and not output.is_dir():
        raise ResourceError(
            "the output is a file, and a folder is needed", code="E502", field="output", file=output,
            fix="name a folder: each image has a mask of its own in it",
        )  # fmt: skip
    files.probe_writable(output)
    marker = output / RECORDS
    if marker.is_dir():
        for folder in (output, marker, output / "overlays") if alone else ():
            files.remove_stale(folder)
        return
    taken = [p for job in jobs for p in (job.output, job.probabilities, job.overlay) if p.exists() or p.is_symlink()]
    if taken:
        raise UsageError(
            "an output would replace a file that medseg predict did not write",
            code="E103",
            field="output",
            file=taken[0],
            found=f"{len(taken)} such files",
            fix="choose another output folder, or move them away",
        )
    marker.mkdir(exist_ok=True)


def plan_outputs(
    inputs: Sequence[Path],
    output: Path,
    format: str | None = None,
    name: Callable[[Path], str | None] = lambda path: None,
) -> list[Job]:
    """One output for each input: NIfTI for volumes, TIFF for TIFF, PNG for other pictures, unless `format` says else.

    `name`: of the case that a file holds; None: that of the file.

    Raises:
        UsageError: E101 an unknown format, two inputs with one output, or an output that is an input.
    """
    if format is not None and format not in FORMATS:
        raise UsageError("unknown output format", field="format", expected=", ".join(FORMATS), found=format)
    jobs: list[Job] = []
    taken: dict[str, Path] = {}
    sources = {os.path.realpath(path) for path in inputs}  # of a loop of links too: it is refused when it is read
    for path in inputs:
        try:
            case, kind = name(path) or volumes.case_id(path), volumes.find_format(path)
        except DataError:
            # refused with its own message when it is read
            case, kind = volumes.hidden_id(path) or path.name.split(".")[0] or path.name, "nifti"
        suffix = FORMATS[format] if format else {"tiff": ".tif"}.get(kind, ".png" if kind in _PICTURES else ".nii.gz")
        job = make_job(case, path, output, suffix)
        take_name(taken, job)
        if os.path.realpath(job.output) in sources:
            raise UsageError(
                "an output would overwrite an input", code="E103", file=job.output, fix="choose another output folder"
            )
        jobs.append(job)
    return jobs


def make_job(case: str, source: Path, folder: Path, suffix: str, more: tuple[Path, ...] = ()) -> Job:
    """The job of a case whose outputs go into a folder."""
    name = files.safe_stem(case, suffix)
    return Job(case, source, folder / (name + suffix), folder / RECORDS / f"{name}.json", more)


def take_name(taken: dict[str, Path], job: Job) -> None:
    """Note the name of a job's outputs; refused (E103) when another input has it, also with another suffix (`a.png`,
    `a.tif`): overlay, probabilities and record would be one."""
    # case-insensitive file systems would write both to one file
    if (other := taken.setdefault(job.record.name.lower(), job.source)) != job.source:
        message, fix = "two inputs would be written to one output", "rename one, or predict them into two folders"
        raise UsageError(message, code="E103", file=job.source, found=other, fix=fix)


def fingerprint(path: Path) -> str:
    """Size and time of change of a file, or of every file of a folder: what tells that an input is another one now."""
    if path.is_dir():
        parts = sorted(part for part in path.iterdir() if part.is_file())
        return ";".join(f"{part.name}:{part.stat().st_size}:{part.stat().st_mtime_ns}" for part in parts)
    state = path.stat()
    return f"{state.st_size}:{state.st_mtime_ns}"


def record(job: Job, model: str, options: dict[str, Any], outputs: Sequence[Path], state: str) -> None:
    """Note that the outputs of a job are complete: which model and options made them from which state of the input.

    `state`: the input's, when it was read.
    """
    value = {
        "case": job.case,
        "model": model,
        "options": options,
        "input": _hashed(state),
        "place": _hashed(os.path.realpath(job.source)),
        "contents": contents_of((job.source, *job.more)),
        "outputs": {os.path.relpath(p, job.output.parent): _size(p) for p in outputs},
    }
    files.write_json(job.record, value)


def replaced(job: Job, state: str) -> tuple[str, ...]:
    """A note where the outputs that are there were made from another input, elsewhere, of the same name (not which:
    of places and states only hashes are kept). `state`: the input's.
    """
    try:
        value = json.loads(job.record.read_text(encoding="utf-8"))
        place, before = value["place"], value["input"]
    except (OSError, ValueError, KeyError, TypeError):
        return ()
    other = place != _hashed(os.path.realpath(job.source)) and before != _hashed(state)
    return ("it replaced the mask of another input of this name",) if other else ()


def is_complete(job: Job, model: str, options: dict[str, Any]) -> bool:
    """Whether the outputs are there, whole, and made by this model with these options from the input as it is now."""
    try:
        value = json.loads(job.record.read_text(encoding="utf-8"))
        same = (value["model"], value["options"], value["input"]) == (model, options, _hashed(job.state()))
        return same and all(_size(job.output.parent / name) == size for name, size in value["outputs"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def header_of(source: Path, geometry: volumes.Geometry, channels: int, affine: str = "auto") -> volumes.Volume:
    """The input without its voxels: what a writer of labels needs to give back the same grid."""
    from medseg.volumes_nifti import read_nifti_header

    kind = volumes.find_format(source)
    header: Any = read_nifti_header(source, affine=affine).header if kind == "nifti" else {}
    return volumes.Volume(np.empty(0, np.uint8), geometry, source, kind, header, channels)


@contextlib.contextmanager
def probability_file(path: Path, shape: tuple[int, ...]) -> Iterator[Callable[[tuple[slice, ...], np.ndarray], None]]:
    """A Zarr array (K, *shape), float16, filled box by box; the folder appears under its name when the block ends.

    float16 keeps three digits of a probability at half of the size. K is known with the first box.
    """
    import zarr

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_name(path.suffix))
    temporary.mkdir()
    arrays: list[Any] = []

    def put(box: tuple[slice, ...], values: np.ndarray) -> None:
        if not arrays:
            extent = tuple(min(_CHUNK, n) for n in shape)
            arrays.append(
                zarr.create_array(
                    store=str(temporary),
                    shape=(values.shape[0], *shape),
                    # one file for all classes of a box, from which each can be read by itself
                    chunks=(1, *extent),
                    shards=(values.shape[0], *extent),
                    dtype="float16",
                    overwrite=True,
                    attributes={"axes": "class, then the axes of the label image"},
                )
            )
            if values.shape[0] > 1:  # what no box covers is background
                arrays[0][0] = np.float16(1.0)
        arrays[0][(slice(None), *box)] = values.astype(np.float16)

    try:
        yield put
        remove(path)
        os.replace(temporary, path)
    except OSError as error:
        raise files.resource_error(error, path, temporary=temporary) or error from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove an output of a case, wholly or not at all.

    Raises:
        ResourceError: it cannot be removed.
    """
    if not path.exists():
        return
    # renamed first: a Zarr folder that was removed in part reads as zeros
    gone = path.with_name(temporary_name(path.suffix))
    try:
        os.replace(path, gone)
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    except OSError as error:
        raise files.resource_error(error, path, temporary=gone) or error from error


def _named(path: Path, suffix: str) -> str:
    stem = path.name[: len(path.name) - len(files.full_suffix(path))]
    return files.safe_stem(stem, suffix) + suffix  # a name that just fits with .nii.gz may be too long with this


def _hashed(state: str) -> str:
    import hashlib

    # names of DICOM files may hold identifiers: only the hash is kept
    return hashlib.sha256(state.encode("utf-8", "surrogateescape")).hexdigest()


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size
