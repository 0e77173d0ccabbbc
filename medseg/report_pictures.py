"""Pictures of cases inside the report: every plane a strip of slices; prediction, reference and error map over it.

A strip holds all shown slices of one plane below one another, so that a slider only has to move it behind a window;
that works offline, without a line of image code in the page, and prints.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from medseg.views import View

__all__ = ["COLOURS", "ERROR_COLOURS", "Layer", "Plane", "draw_planes", "error_map", "match_objects", "shows_objects"]

COLOURS = ("#35d3ff", "#ffd23f", "#ff7bd8", "#86f26a", "#ff9a4d", "#b9a1ff")  # per label, over grey images
ERROR_COLOURS = {"agree": "#d8dee6", "missed": "#3b9cff", "too much": "#ff8a1f", "wrong label": "#ff4fc3"}
SLICES = {"axial": 24, "coronal": 16, "sagittal": 16}
SIDE = {2: 900, 3: 300}  # pixels of the longer side of a drawn slice
# where the edges of a plane lie in the patient: left, right, top, bottom (radiological view)
EDGES = {"axial": ("R", "L", "A", "P"), "coronal": ("R", "L", "S", "I"), "sagittal": ("A", "P", "S", "I")}


@dataclass(frozen=True)
class Layer:
    """One panel of a plane: a name and the strip that lies over the image, as a data address of a PNG."""

    name: str
    strip: str


@dataclass(frozen=True)
class Plane:
    """One plane of one case: size of a slice in pixels, strip of the image, panels, and a line of text per slice."""

    name: str
    width: int
    height: int
    base: str
    layers: tuple[Layer, ...]
    captions: tuple[str, ...]
    start: int
    edges: tuple[str, ...]


def draw_planes(view: View, labels: Mapping[int, str], *, objects: bool | None = None) -> list[Plane]:
    """All planes of a case: one for a picture; axial, coronal and sagittal for a volume.

    Args:
        view: the case.
        labels: index -> name; values outside are instances: `match_objects` gives them their colours, and the error map
            shows as wrong what belongs to another object than the one that its own is matched to.
        objects: what `shows_objects` said of the case; None: it is asked.
    """
    if shows_objects(view, labels) if objects is None else objects:
        view = replace(view, prediction=match_objects(view.prediction, view.reference))
    error = error_map(view.prediction, view.reference)
    if not view.is_volume:
        return [_plane("picture", view, error, [0], lambda a, _: a, view.spacing, ("",))]
    planes = []
    for name, axis, (down, right) in (("axial", 2, (1, 0)), ("coronal", 1, (2, 0)), ("sagittal", 0, (2, 1))):
        indices = _choose(error, view, axis, SLICES[name])

        def cut(array: np.ndarray, index: int, axis: int = axis, down: int = down, right: int = right) -> np.ndarray:
            plane = np.take(array, index, axis=axis)  # axes left: ascending order of the others
            plane = plane.T if down > right else plane
            return plane[::-1, ::-1]

        captions = [f"slice {i + 1} of {view.prediction.shape[axis]}" for i in indices]
        size = (view.spacing[down], view.spacing[right])
        planes.append(_plane(name, view, error, indices, cut, size, captions))
    return planes


def shows_objects(view: View, labels: Mapping[int, str]) -> bool:
    """Whether the values are numbers of objects, not indices of labels."""
    return bool(labels) and not set(np.unique(view.prediction)) | set(np.unique(view.reference)) <= {0, *labels}


def match_objects(prediction: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Numbered objects, renumbered so that each gets the colour of the reference's object that it shares most with.

    Args:
        prediction, reference: numbered objects, 0 is background; of one shape.

    Returns:
        int64. The largest piece of an object of the reference gets its number, every other piece that number plus a
        multiple of the number of colours, so that a line stays between them and they are not taken for equal. One
        without a partner gets a number of its own above all others.

    >>> match_objects(np.array([5, 5, 0, 8, 9]), np.array([2, 2, 0, 3, 3])).tolist()
    [2, 2, 0, 3, 9]
    """
    from medseg.metrics.matching import instance_overlap

    table = instance_overlap(prediction, reference)
    # no number of the reference reaches it
    step = len(COLOURS) * (int(table.present.max(initial=0)) // len(COLOURS) + 1)
    given, used = np.zeros(table.predicted.size, np.int64), dict.fromkeys(table.present.tolist(), 0)
    # the largest share first: it decides an object's partner, and which piece keeps its partner's number
    for own, other in table.pairs[np.argsort(-table.shared, kind="stable")]:
        if given[own] == 0:
            partner = int(table.present[other])
            given[own] = partner + step * used[partner]
            used[partner] += 1
    alone = given == 0
    given[alone] = step * (given.size + 1) + np.arange(1, alone.sum() + 1)
    return np.r_[0, given][np.searchsorted(np.r_[0, table.predicted], prediction)]


def error_map(prediction: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Where two label arrays of one shape differ: 0 nothing in both, then the order of ERROR_COLOURS, 1 to 4.

    >>> error_map(np.array([0, 1, 0, 1, 2]), np.array([0, 1, 1, 0, 1])).tolist()
    [0, 1, 2, 3, 4]
    """
    p, r = prediction != 0, reference != 0
    error = np.where(p & r, 1, 0).astype(np.uint8)
    error[r & ~p] = 2
    error[p & ~r] = 3
    error[p & r & (prediction != reference)] = 4
    return error


def _choose(error: np.ndarray, view: View, axis: int, count: int) -> list[int]:
    # evenly spaced slices through the structures, and the one with the most error
    others = tuple(a for a in range(3) if a != axis)
    used = np.flatnonzero((error != 0).any(axis=others))
    low, high = (int(used[0]), int(used[-1])) if used.size else (0, error.shape[axis] - 1)
    chosen = set(np.linspace(low, high, min(count, high - low + 1)).round().astype(int).tolist())
    wrong = (error > 1).sum(axis=others)
    if wrong.any():
        chosen.add(int(wrong.argmax()))
    return sorted(chosen)


def _plane(name, view: View, error: np.ndarray, indices, cut, size, captions) -> Plane:
    first = cut(error, indices[0])
    scale = SIDE[error.ndim] / max(first.shape[0] * size[0], first.shape[1] * size[1])
    height, width = (max(1, round(n * s * scale)) for n, s in zip(first.shape, size, strict=True))
    rows = np.minimum((np.arange(height) + 0.5) * first.shape[0] / height, first.shape[0] - 1).astype(int)
    columns = np.minimum((np.arange(width) + 0.5) * first.shape[1] / width, first.shape[1] - 1).astype(int)

    def enlarge(array: np.ndarray) -> list[np.ndarray]:
        return [cut(array, i)[rows][:, columns] for i in indices]

    layers = [
        Layer("prediction", _label_strip(enlarge(view.prediction))),
        Layer("reference", _label_strip(enlarge(view.reference))),
        Layer("error map", _error_strip(enlarge(error))),
        *[Layer(f"attention: {key}", _heat_strip(enlarge(layer))) for key, layer in view.maps.items()],
    ]
    wrong = [int((cut(error, i) > 1).sum()) for i in indices]
    worst = np.flatnonzero(np.array(wrong) == max(wrong))  # the middle one of the slices with the most error
    start = int(worst[len(worst) // 2])
    base = _image_strip(view, indices, cut, (width, height))
    return Plane(name, width, height, base, tuple(layers), tuple(captions), start, EDGES.get(name, ()))


def _image_strip(view: View, indices, cut, size: tuple[int, int]) -> str:
    from PIL import Image

    if view.image is None:
        strip = Image.new("L", (size[0], size[1] * len(indices)), 40)
    else:
        strip = Image.new(
            "RGB" if view.image.shape[-1:] == (3,) and not view.is_volume else "L", (size[0], size[1] * len(indices))
        )
        for number, index in enumerate(indices):
            slice_ = Image.fromarray(np.ascontiguousarray(cut(view.image, index)))
            strip.paste(slice_.resize(size, Image.Resampling.BICUBIC), (0, number * size[1]))
    out = io.BytesIO()
    strip.save(out, "JPEG", quality=82)
    return _address("jpeg", out)


def _label_strip(slices: list[np.ndarray]) -> str:
    coloured = []
    for labels in slices:
        index = ((labels.astype(np.int32) - 1) % len(COLOURS)) * 2 + 1
        coloured.append(np.where(labels == 0, 0, index + _outline(labels)).astype(np.uint8))
    palette = [(0, 0, 0, 0)]
    for colour in COLOURS:
        palette += [(*_rgb(colour), 46), (*_rgb(colour), 255)]
    return _png(coloured, palette)


def _error_strip(slices: list[np.ndarray]) -> str:
    colours = [(*_rgb(colour), 90 if name == "agree" else 255) for name, colour in ERROR_COLOURS.items()]
    return _png(slices, [(0, 0, 0, 0), *colours])


def _heat_strip(slices: list[np.ndarray]) -> str:
    steps = np.linspace(0, 1, 16)
    palette = [(255, int(240 * (1 - s)), int(40 * (1 - s)), int(210 * s)) for s in steps]
    return _png([(s // 16).astype(np.uint8) for s in slices], palette)


def _outline(labels: np.ndarray) -> np.ndarray:
    # pixels whose neighbour at two pixels' distance is another label: a line that is seen on a phone
    wide = np.pad(labels, 2, mode="edge")
    line = np.zeros(labels.shape, bool)
    for down, right in ((0, 2), (4, 2), (2, 0), (2, 4), (1, 2), (3, 2), (2, 1), (2, 3)):
        line |= wide[down : down + labels.shape[0], right : right + labels.shape[1]] != labels
    return line


def _png(slices: list[np.ndarray], palette: list[tuple[int, int, int, int]]) -> str:
    from PIL import Image

    strip = Image.fromarray(np.ascontiguousarray(np.concatenate(slices)), mode="L")
    strip.putpalette([value for colour in palette for value in colour[:3]])
    out = io.BytesIO()
    strip.save(out, "PNG", transparency=bytes(colour[3] for colour in palette), optimize=True)
    return _address("png", out)


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _address(kind: str, data: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
