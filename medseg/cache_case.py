"""One case in the preprocessed store: its folder written whole, its arrays read in pieces."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from medseg.cache_blocks import BlockArray, mirror_index
from medseg.errors import DataError
from medseg.files import fail_point, lock, resource_error
from medseg.files_atomic import temporary_name
from medseg.volumes import Geometry

__all__ = ["MemoryCase", "StoredCase", "index_classes", "write_case"]

KEPT = 4096  # voxels of each class whose places are stored; patches centred on them are as varied as on all
_HELD = 2  # cases that MemoryCase keeps in each process


@dataclass(frozen=True)
class StoredCase:
    """A case on disk.

    Attributes:
        id: the case's id.
        folder: its folder in the store.
        arrays: name -> array: image, label, weight, fov, native_label, native_instances, native_fov (those there are).
        affine: voxel of the preprocessed grid -> mm, 4x4.
        native: the grid of the file.
        classes: class -> number of voxels in the preprocessed label, background included, `ignore` left out.
        notes: what the reader wanted told.
    """

    id: str
    folder: Path
    arrays: dict[str, BlockArray]
    affine: np.ndarray
    native: Geometry
    classes: dict[int, int]
    notes: tuple[str, ...]
    places: dict[int, tuple[int, int]] = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial shape of the preprocessed grid."""
        return self.arrays["image"].shape[1:]

    @property
    def size_bytes(self) -> int:
        """Bytes of the arrays on disk."""
        return sum(array.size_bytes for array in self.arrays.values())

    def read(self, name: str, start: Sequence[int] | None = None, size: Sequence[int] | None = None) -> np.ndarray:
        """A box of the array `name`, (C, *size), mirrored beyond the borders; the whole array without arguments."""
        return self.arrays[name].read(start, size)

    def pick(self, label: int, number: float) -> tuple[int, ...]:
        """A voxel of class `label`: the one at share `number`, in [0, 1), of the stored list."""
        first, count = self.places[label]
        dims = len(self.shape)
        row = first + min(int(number * count), count - 1)
        with (self.folder / "places.bin").open("rb") as file:
            file.seek(row * dims * 4)
            return tuple(int(v) for v in np.frombuffer(file.read(dims * 4), "<i4"))

    @classmethod
    def exists(cls, folder: Path) -> bool:
        """Whether the folder is there and all its files have their size."""
        try:
            cls.open(folder, "")
        except DataError:
            return False
        return True

    @classmethod
    def open(cls, folder: Path, case: str) -> StoredCase:
        """Read the case's facts and compare the sizes of its files.

        Raises:
            DataError: E370, not there, or not whole.
        """
        try:
            facts = json.loads((folder / "case.json").read_text(encoding="utf-8"))
            arrays = {name: BlockArray.of(folder / f"{name}.npy", f) for name, f in facts["arrays"].items()}
            whole = all(array.path.stat().st_size == array.size_bytes for array in arrays.values())
            whole = whole and (folder / "places.bin").stat().st_size == facts["places_bytes"]
        except (OSError, ValueError, KeyError) as error:
            raise DataError("the case is not in the store", code="E370", case=case, file=folder) from error
        if not whole:
            fix = "remove this folder; it is made again"
            raise DataError("a stored case is damaged", code="E370", case=case, file=folder, fix=fix)
        native = facts["native"]
        return cls(
            id=case,
            folder=folder,
            arrays=arrays,
            affine=np.array(facts["affine"]),
            native=Geometry.of(tuple(native["shape"]), np.array(native["affine"]), native["unit"]),
            classes={int(k): int(v) for k, v in facts["classes"].items()},
            notes=tuple(facts["notes"]),
            places={int(k): (int(v[0]), int(v[1])) for k, v in facts["places"].items()},
        )


class MemoryCase:
    """A case that could not be stored: computed when it is needed; each process keeps the last two. Slow, but right."""

    _held: ClassVar[OrderedDict[str, dict[str, Any]]] = OrderedDict()

    def __init__(self, case: str, compute: Callable[[], dict[str, Any]], ignore: int | None) -> None:
        self.id, self._compute, self._ignore = case, compute, ignore
        self.notes: tuple[str, ...] = ()
        self._affine: np.ndarray | None = None
        self._mark = secrets.token_hex(8)

    def _facts(self) -> dict[str, Any]:
        held = MemoryCase._held
        if self._mark not in held:
            facts = self._compute()
            facts["places"], facts["classes"] = index_classes(facts["arrays"].get("label"), self._ignore)
            held[self._mark] = facts
            self._affine = facts["affine"]  # small, and asked for of all cases at once
            while len(held) > _HELD:
                held.popitem(last=False)
        held.move_to_end(self._mark)
        return held[self._mark]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return self._facts()["arrays"]

    @property
    def affine(self) -> np.ndarray:
        return self._facts()["affine"] if self._affine is None else self._affine

    @property
    def native(self) -> Geometry:
        return self._facts()["native"]

    @property
    def classes(self) -> dict[int, int]:
        return self._facts()["classes"]

    @property
    def places(self) -> dict[int, np.ndarray]:
        return self._facts()["places"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.arrays["image"].shape[1:]

    def read(self, name: str, start: Sequence[int] | None = None, size: Sequence[int] | None = None) -> np.ndarray:
        """As `StoredCase.read`."""
        array = self.arrays[name]
        if start is None or size is None:
            return array
        for axis, (first, extent) in enumerate(zip(start, size, strict=True), start=1):
            array = np.take(array, mirror_index(int(first), int(extent), array.shape[axis]), axis=axis)
        return array

    def pick(self, label: int, number: float) -> tuple[int, ...]:
        """As `StoredCase.pick`."""
        places = self.places[label]
        return tuple(int(v) for v in places[min(int(number * len(places)), len(places) - 1)])


def index_classes(label: np.ndarray | None, ignore: int | None) -> tuple[dict[int, np.ndarray], dict[int, int]]:
    """Places (at most KEPT, int32 (n, D), spread over all of its voxels) of each class but 0; counts.

    >>> places, counts = index_classes(np.array([[[0, 1], [1, 2]]]), None)
    >>> places[1].tolist(), counts
    ([[0, 1], [1, 0]], {0: 1, 1: 2, 2: 1})
    """
    places: dict[int, np.ndarray] = {}
    counts: dict[int, int] = {}
    if label is None:
        return places, counts
    values, numbers = np.unique(label[0], return_counts=True)
    for value, number in zip(values.tolist(), numbers.tolist(), strict=True):
        if ignore is not None and value == ignore:
            continue
        counts[int(value)] = int(number)
        if value == 0:
            continue
        flat = np.flatnonzero(label[0] == value)
        if len(flat) > KEPT:
            # one of each of KEPT equal parts, drawn: equal steps would follow the rows of a box
            shares = (np.arange(KEPT) + np.random.default_rng(0).random(KEPT)) / KEPT
            flat = flat[(shares * len(flat)).astype(np.int64)]
        places[int(value)] = np.stack(np.unravel_index(flat, label.shape[1:]), axis=1).astype(np.int32)
    return places, counts


def _put(temporary: Path, folder: Path) -> None:
    """Give the temporary folder its name. A whole case of that name, which another process may be reading, stays."""
    try:
        temporary.rename(folder)  # fails where there is one, unless it is empty
        return
    except OSError:
        if not folder.exists():
            raise
    if not StoredCase.exists(folder):
        # a damaged one is replaced by one process at a time: the next one finds it whole
        with lock(folder.with_suffix(".lock")):
            if not StoredCase.exists(folder):
                shutil.rmtree(folder, ignore_errors=True)
                with contextlib.suppress(OSError):  # another process, to which nothing was in the way, was quicker
                    temporary.rename(folder)
    if not StoredCase.exists(folder):
        temporary.rename(folder)
    shutil.rmtree(temporary, ignore_errors=True)


def write_case(folder: Path, case: str, facts: dict[str, Any], block: Sequence[int], ignore: int | None) -> None:
    """Write a preprocessed case (see `cache.preprocess_sample`) as `folder`, which appears whole or not at all.

    Raises:
        ResourceError: E501 no space, E502 not writable; nothing is left behind.
    """
    temporary = folder.parent / temporary_name()
    try:
        temporary.mkdir(parents=True)
        described = {}
        for name, array in facts["arrays"].items():
            described[name] = BlockArray.write(temporary / f"{name}.npy", array, block).describe()
            fail_point("stored array")
        places, classes = index_classes(facts["arrays"].get("label"), ignore)
        spans, start = {}, 0
        with (temporary / "places.bin").open("wb") as file:
            for label, rows in places.items():
                file.write(rows.astype("<i4").tobytes())
                spans[label] = (start, len(rows))
                start += len(rows)
            size = file.tell()
            file.flush()
            os.fsync(file.fileno())
        native = facts["native"]
        content = {
            "arrays": described,
            "affine": facts["affine"].tolist(),
            "native": {"shape": list(native.shape), "affine": native.affine.tolist(), "unit": native.unit},
            "classes": classes,
            "places": spans,
            "places_bytes": size,
            "notes": list(facts["notes"]),
        }
        with (temporary / "case.json").open("w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        fail_point("stored case")
        _put(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        failure = resource_error(error, folder, temporary=temporary)
        if failure is not None:
            failure.case = case
            raise failure from error
        raise
