"""The preprocessed store: each case's deterministic part is computed once, kept on disk, and read patch by patch.

    store = CaseStore(spec, pipeline.preprocess, folder=None, dims=3)
    stored = store.prepare(cases)                  in parallel; what is there already is not done again
    stored["liver_7"].read("image", (0, 0, 0), (96, 96, 96))

A case's folder is named by the SHA-256 of its files' contents, the preprocessing, the data set's facts, the code that
does it, and the versions of the libraries below: another file, another setting or another version is another folder. A
folder appears under its name when it is whole, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from medseg.cache_blocks import BlockArray
from medseg.cache_case import MemoryCase, StoredCase, write_case
from medseg.cache_prepare import run_jobs
from medseg.cache_steps import run_step
from medseg.component import Component, build_component, to_target
from medseg.config import DatasetSpec
from medseg.data import Case, load_sample
from medseg.data_reading import is_single_mask
from medseg.errors import MedsegError, ResourceError, collect
from medseg.files import remove_stale, require_space, sha256_file

__all__ = ["BlockArray", "CaseStore", "MemoryCase", "StoredCase", "default_folder", "preprocess_sample"]

FORMAT = 1
# a block is read whole: small enough that little is read in vain, large enough that each is one quick read
_BLOCKS = {(3, 3): (32, 32, 32), (2, 2): (128, 128), (3, 2): (128, 128, 1)}
# what decides how a file becomes an array; titles, licences and the like do not
_FACTS = ("dims", "channels", "colour", "labels", "ignore", "encoding", "colours", "instances", "nan", "affine")


class CaseStore:
    """The store of one data set under one preprocessing.

    Args:
        spec: the data set's facts.
        preprocess: the pipeline's transforms, done once for each case.
        folder: where cases are kept; `default_folder()` when None.
        dims: axes of the patches: 2 for slices of volumes, which are then stored slice by slice.

    Raises:
        ConfigError: a transform is unknown or refuses its arguments.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        preprocess: Sequence[Component] = (),
        *,
        folder: str | Path | None = None,
        dims: int | None = None,
    ) -> None:
        self.spec, self.preprocess = spec, tuple(preprocess)
        self.folder = default_folder() if folder is None else Path(folder)
        self.block = _BLOCKS[spec.dims, dims or spec.dims]
        self.notices: list[str] = []
        for component in self.preprocess:
            build_component(component, "transform")

    def key(self, case: Case) -> str:
        """SHA-256 (hex) of all that decides what is stored for `case`; reads its files.

        Raises:
            FormatError: a file is missing or cannot be read.
        """
        files = {name: [sha256_file(path) for path in _paths(getattr(case, name))] for name in _ROLES}
        facts = self.spec.model_dump(mode="json", include=set(_FACTS))
        # with what medseg itself gives them, such as the interpolation of labels
        steps = [to_target(component, "transform") for component in self.preprocess]
        content = {"format": FORMAT, "files": files, "facts": facts, "preprocess": steps, "block": self.block}
        content |= {"single": is_single_mask(self.spec), "versions": _versions(), "code": _code()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def path(self, key: str) -> Path:
        """The folder of the case with this key."""
        return self.folder / "cases" / key[:2] / key

    def open(self, case: Case, *, key: str | None = None) -> StoredCase:
        """The stored case.

        Raises:
            DataError: E370, it has not been prepared, or its folder is damaged.
        """
        return StoredCase.open(self.path(key or self.key(case)), case.id)

    def prepare(
        self,
        cases: Sequence[Case],
        *,
        workers: int | str = "auto",
        progress: Callable[[int, int, str], None] | None = None,
    ) -> dict[str, StoredCase | MemoryCase]:
        """Store every case that is not stored yet.

        Args:
            cases: the cases.
            workers: processes; "auto": as many as cores and memory allow, none for little work.
            progress: called with (done, all, id) after each case.

        Returns:
            id -> stored case. If the store cannot be written (disk full, no permission) the remaining cases come as
            `MemoryCase`, which computes them again whenever they are needed; `self.notices` tells so.

        Raises:
            MedsegError: all cases that were refused, collected.
        """
        found: dict[str, StoredCase | MemoryCase] = {}
        problems: list[MedsegError] = []
        self._clean()
        for number, (case, result) in enumerate(run_jobs(self._prepare_one, cases, workers), start=1):
            if isinstance(result, ResourceError) and result.code in ("E501", "E502"):
                self._tell_full(result)
                found[case.id] = MemoryCase(case.id, partial(self.compute, case), self.spec.ignore)
            elif isinstance(result, MedsegError):
                problems += result.problems
            else:
                found[case.id] = StoredCase.open(result, case.id)
            if progress is not None:
                progress(number, len(cases), case.id)
        if problems:
            raise collect(problems)
        return {case.id: found[case.id] for case in cases}

    def compute(self, case: Case) -> dict[str, Any]:
        """The case after preprocessing, as `write_case` stores it (MemoryCase keeps it in memory)."""
        return preprocess_sample(load_sample(case, self.spec), self.preprocess, ignore=self.spec.ignore)

    def _prepare_one(self, case: Case) -> Path:
        folder = self.path(self.key(case))
        if not StoredCase.exists(folder):
            arrays = self.compute(case)
            needed = sum(array.nbytes for array in arrays["arrays"].values())
            require_space(self.folder, int(needed * 1.05) + 2**20)
            write_case(folder, case.id, arrays, self.block, self.spec.ignore)
        return folder

    def _clean(self) -> None:
        for folder in (self.folder / "cases").glob("*"):
            remove_stale(folder)

    def _tell_full(self, error: ResourceError) -> None:
        text = f"the store {self.folder} cannot be written ({error.message}): cases are computed anew whenever needed"
        if text not in self.notices:
            self.notices.append(text)


def preprocess_sample(
    sample: Mapping[str, Any], preprocess: Sequence[Component], *, ignore: int | None = None
) -> dict[str, Any]:
    """Run the deterministic transforms on a raw sample; those that ask for it are told the label index to `ignore`.

    Returns:
        `arrays`: name -> array (C, *spatial): image float32, label, weight, fov on the preprocessed grid, and
        native_label, native_instances, native_fov on the grid of the file; `affine` 4x4 of the preprocessed grid;
        `native`: the Geometry of the file; `notes`.

    Raises:
        DataError: E371, a transform fails on this case. ResourceError: E526, it needs more memory than there is.
    """
    from medseg.inference.memory import memory_with_swap

    arrays: dict[str, np.ndarray] = {}
    for name in ("label", "instances", "fov"):
        if name in sample:
            arrays[f"native_{name}"] = _array(sample[name])
    data = dict(sample)
    for component in preprocess:
        transform = build_component(component, "transform", ignore=ignore)
        data = run_step(component.name, transform, data, case=str(sample.get("case")), free=memory_with_swap)
    affine = np.asarray(data["image"].affine, dtype=np.float64)
    for name in ("image", "label", "weight", "fov"):
        if name in data:
            arrays[name] = _array(data[name])
    arrays["image"] = arrays["image"].astype(np.float32, copy=False)
    return {"arrays": arrays, "affine": affine, "native": sample["native"], "notes": list(sample.get("notes", ()))}


def default_folder() -> Path:
    """The platform's place for caches: ~/.cache/medseg, ~/Library/Caches/medseg or %LOCALAPPDATA%\\medseg.

    Raises:
        ResourceError: E500, the user has no home folder (a container's number without a name, and no HOME).
    """
    try:
        return _default_folder()
    except RuntimeError as error:
        fix = "name a folder with --cache, or set HOME"
        raise ResourceError("there is no home folder for preprocessed cases", field="--cache", fix=fix) from error


def _default_folder() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "medseg"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "medseg"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medseg"


# that read or compute what is stored
_LIBRARIES = (
    "monai", "torch", "numpy", "scipy", "scikit-image", "nibabel", "pillow", "tifffile", "imagecodecs", "pydicom",
    "simpleitk",
)  # fmt: skip
_ROLES = ("images", "label", "instances", "fov")


def _paths(value: Any) -> list[Path]:
    if value is None:
        return []
    paths = [value] if isinstance(value, str | Path) else list(value)
    # a DICOM series is a folder of files
    return [file for path in paths for file in (sorted(Path(path).iterdir()) if Path(path).is_dir() else [Path(path)])]


def _array(tensor: Any) -> np.ndarray:
    array = np.asarray(tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor)
    if array.dtype == np.int64 or array.dtype == np.float64:
        array = array.astype(np.int32 if array.dtype == np.int64 else np.float32)
    return array


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in _LIBRARIES}


@cache
def _code() -> str:
    """Hash of the modules that read and transform, so that a mended reader never meets its old results."""
    package = Path(__file__).parent
    names = sorted([*package.glob("volumes*.py"), *package.glob("data*.py"), *package.glob("cache*.py"),
                    *(package / "transforms").glob("*.py")])  # fmt: skip
    digest = hashlib.sha256()
    for path in names:
        digest.update(path.read_bytes())
    return digest.hexdigest()
