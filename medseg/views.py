"""Pictures of cases for reports: a small copy of image, prediction and reference around the structures.

Evaluation writes views, the report draws them; they hold voxels and a case id, nothing else of the input's header.
One view is one `.npz` of plain arrays, opened with `allow_pickle=False`.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medseg.errors import FormatError, UsageError
from medseg.files import atomic_write, safe_stem
from medseg.volumes import reorient
from medseg.volumes_geometry import voxel_size

__all__ = ["View", "make_view", "read_views", "remove_views", "write_view"]

LONGEST = {2: 900, 3: 320}  # dimensions -> voxels per axis that are kept; a screen shows no more
MARGIN = 0.35  # of the structures' extent, shown around them
LEAST_EXTENT = 96  # voxels per axis that are shown at least, where the image has them


@dataclass(frozen=True)
class View:
    """One case, ready to draw.

    Attributes:
        case: id of the case.
        role: why it is shown: "best", "median", "worst" or any other word.
        score: value of the score that chose it; None when there is none.
        metric: that score's name.
        image: uint8, (row, column) or (row, column, 3) of a picture, (x, y, z) of a volume in RAS+ order; None if
            unknown.
        prediction, reference: uint16 labels or instances of the same spatial shape.
        spacing: size of a kept voxel along each spatial axis, in `unit`.
        unit: "mm" or "px".
        part: extent shown, a sentence ("voxels 10 to 90 of 512, ...").
        maps: name -> uint8 map of the spatial shape (attention; 255 is most).
    """

    case: str
    role: str
    score: float | None
    metric: str
    image: np.ndarray | None
    prediction: np.ndarray
    reference: np.ndarray
    spacing: tuple[float, ...]
    unit: str
    part: str = ""
    maps: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def is_volume(self) -> bool:
        """Whether three planes are drawn."""
        return self.prediction.ndim == 3


def make_view(
    case: str,
    *,
    prediction: np.ndarray,
    reference: np.ndarray,
    image: np.ndarray | None = None,
    affine: np.ndarray | None = None,
    spacing: Sequence[float] = (),
    unit: str = "mm",
    role: str = "",
    score: float | None = None,
    metric: str = "",
    maps: Mapping[str, np.ndarray] | None = None,
) -> View:
    """Crop, orient, window and thin out one case so that a report can carry it.

    Args:
        case: id.
        prediction, reference: integer arrays (*spatial); 2-D or 3-D.
        image: (C, *spatial) or (*spatial), any number type; three channels are colour, of others the first is
            shown.
        affine: 4x4, voxel to mm; volumes are turned to RAS+ with it and take their spacing from it.
        spacing: per spatial axis as stored, where there is no affine; 1 where not given.
        unit: of the spacing.
        role, score, metric: see `View`.
        maps: name -> float map (*spatial) in [0, 1].

    Raises:
        UsageError: shapes differ or are not 2-D or 3-D.
    """
    dims = prediction.ndim
    if dims not in (2, 3) or reference.shape != prediction.shape:
        raise UsageError(
            "a view needs a prediction and a reference of one 2-D or 3-D shape", case=case,
            expected=reference.shape, found=prediction.shape,
        )  # fmt: skip
    layers = {"prediction": prediction, "reference": reference, **{f"map {k}": v for k, v in (maps or {}).items()}}
    if image is not None:
        channels = image if image.ndim > dims else image[None]
        if channels.shape[1:] != prediction.shape:
            raise UsageError(
                "image and labels of a view differ in shape", case=case, expected=prediction.shape, found=image.shape
            )
        channels = channels if len(channels) == 3 and dims == 2 else channels[:1]
        layers |= {f"image {i}": channel for i, channel in enumerate(channels)}
    size = np.array(spacing if len(spacing) else (1.0,) * dims, float)
    if dims == 3 and affine is not None:
        layers = {name: reorient(layer, affine, "RAS")[0] for name, layer in layers.items()}
        size = voxel_size(reorient(prediction, affine, "RAS")[1])
    box, part = _box(
        (layers["prediction"] != 0) | (layers["reference"] != 0), "xyz" if dims == 3 else ("row", "column")
    )
    steps = tuple(max(1, -(-(b.stop - b.start) // LONGEST[dims])) for b in box)
    cut = tuple(slice(b.start, b.stop, s) for b, s in zip(box, steps, strict=True))
    layers = {name: layer[cut] for name, layer in layers.items()}
    shown = [layers[name] for name in layers if name.startswith("image")]
    marked = (layers["prediction"] != 0) | (layers["reference"] != 0)
    grey = _window(np.stack([np.asarray(layer, np.float32) for layer in shown], axis=-1), marked) if shown else None
    return View(
        case=case, role=role, score=score, metric=metric,
        image=None if grey is None else grey[..., 0] if grey.shape[-1] == 1 else grey,
        prediction=_small(layers["prediction"]), reference=_small(layers["reference"]),
        spacing=tuple(float(v) for v in size * steps), unit=unit, part=part,
        maps={n[4:]: (np.clip(v, 0, 1) * 255).astype(np.uint8) for n, v in layers.items() if n.startswith("map ")},
    )  # fmt: skip


def write_view(folder: str | Path, view: View, number: int = 0) -> Path:
    """Write one view as `NN_case.npz` into `folder`, atomically.

    Raises:
        ResourceError: the folder cannot be written or the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {name: getattr(view, name) for name in ("case", "role", "score", "metric", "spacing", "unit", "part")}
    arrays = {"prediction": view.prediction, "reference": view.reference}
    if view.image is not None:
        arrays["image"] = view.image
    arrays |= {f"map_{i}": layer for i, layer in enumerate(view.maps.values())}
    facts["maps"] = list(view.maps)
    packed = io.BytesIO()
    facts_bytes = np.frombuffer(json.dumps(facts).encode("utf-8", "surrogatepass"), np.uint8)
    np.savez_compressed(packed, facts=facts_bytes, **arrays)  # pyright: ignore[reportArgumentType]
    path = folder / f"{number:02d}_{safe_stem(view.case)}.npz"
    with atomic_write(path) as file:
        file.write(packed.getbuffer())
    return path


def read_views(folder: str | Path) -> list[View]:
    """All views of a folder, in the order of their numbers; none if the folder is absent.

    Raises:
        FormatError: a view is broken.
    """
    views = []
    for path in sorted(Path(folder).glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as stored:
                facts = json.loads(stored["facts"].tobytes().decode("utf-8", "surrogatepass"))
                names = facts.pop("maps")
                facts["spacing"] = tuple(facts["spacing"])
                views.append(
                    View(
                        prediction=stored["prediction"], reference=stored["reference"],
                        image=stored.get("image"),
                        maps={name: stored[f"map_{i}"] for i, name in enumerate(names)}, **facts,
                    )
                )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise FormatError(
                "a picture for the report is broken", file=path, found=error, fix="evaluate again"
            ) from error
    return views


def remove_views(folder: str | Path) -> None:
    """Remove the views of an earlier evaluation from `folder`."""
    for path in Path(folder).glob("[0-9][0-9]_*.npz"):
        path.unlink()


def _box(mask: np.ndarray, names: Sequence[str]) -> tuple[tuple[slice, ...], str]:
    if not mask.any():
        return tuple(slice(0, n) for n in mask.shape), "the whole image"
    box = []
    for axis, size in enumerate(mask.shape):
        used = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        low, high = int(used[0]), int(used[-1]) + 1
        extent = min(size, max(LEAST_EXTENT, round((high - low) * (1 + 2 * MARGIN))))
        start = min(max(0, (low + high - extent) // 2), size - extent)
        box.append(slice(start, start + extent))
    if all(b.stop - b.start == size for b, size in zip(box, mask.shape, strict=True)):
        return tuple(box), "the whole image"
    parts = [f"{n} {b.start + 1} to {b.stop} of {size}" for n, b, size in zip(names, box, mask.shape, strict=True)]
    return tuple(box), "part around the structures: " + ", ".join(parts)


def _window(image: np.ndarray, marked: np.ndarray) -> np.ndarray:
    finite = image[np.isfinite(image)]
    low, high = (float(v) for v in np.percentile(finite, (0.5, 99.8))) if finite.size else (0.0, 1.0)
    inside = image[marked]
    inside = inside[np.isfinite(inside)]
    if image.ndim == 4 and inside.size:
        # the structures' own range and as much again on both sides: soft tissue is told apart beside air and metal
        first, last = (float(v) for v in np.percentile(inside, (1, 99)))
        low, high = max(low, first - 1.5 * (last - first)), min(high, last + 1.0 * (last - first))
    if not high > low:
        low, high = low - 0.5, low + 0.5
    return (np.clip((np.nan_to_num(image, nan=low) - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def _small(labels: np.ndarray) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.dtype.kind == "f" or labels.min(initial=0) < 0 or labels.max(initial=0) > 65535:
        labels = np.where(labels > 0, (labels.astype(np.int64) - 1) % 65535 + 1, 0)
    return np.ascontiguousarray(labels.astype(np.uint16))
