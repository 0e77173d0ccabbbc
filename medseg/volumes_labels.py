"""Label values: exact integers out of whatever type they were stored in, or a refusal that names value and count."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from medseg.errors import LabelError, UsageError
from medseg.volumes_colour import apply_palette, is_grey
from medseg.volumes_image import Raw

__all__ = ["WHITE", "check_values", "colours_to_index", "interpret", "smallest_type", "to_integers", "value_counts"]

WHITE = {1, 255, 65535}  # what programs write for the foreground of a mask: one, or the largest value of the type
_TOLERANCE = 1e-3  # what a scale factor in float32 leaves of a whole number; interpolated labels are far above it
_FEW = 16  # values in a row that are counted one by one
_RINGING = 3  # so many values next to the 0, and next to the 255, are no classes but what blurring left of a mask
_BLOCK = 1 << 22  # voxels whose int64 copy is held at a time
_SHOWN = 8


def interpret(
    raw: Raw,
    spatial: int,
    mapping: Mapping | str | None,
    palette: str,
    *,
    path: Path | None = None,
    case: str | None = None,
) -> list[tuple[np.ndarray, Mapping | str | None]]:
    """The integer arrays (*spatial) that a stored label may stand for, the likeliest first, each with what maps it.

    Raises:
        LabelError: E310 four dimensions, E330 fractions, E332 a colour not in the table, E334 colour without a table,
            transparency.
    """
    if palette not in ("auto", "index", "grey"):
        raise UsageError("unknown palette use", field="palette", expected='"auto", "index" or "grey"', found=palette)
    array = raw.array
    colours = mapping if isinstance(mapping, Mapping) and any(not _number(key) for key in mapping) else None
    if raw.kind == "axis":
        kind, expected = ("four dimensions", "3 dimensions") if spatial == 3 else ("several channels", "1 channel")
        fix = "make one label of them, with a value for each class (of probabilities and one-hot labels numpy's argmax)"
        raise _refused(f"a label with {kind}", "E310", path, case, expected, f"shape {array.shape}", fix)
    if raw.kind == "palette":
        assert raw.palette is not None
        shown = apply_palette(array, raw.palette)
        if colours is None:
            if palette == "grey" and shown.ndim > spatial:
                raise _refused("the palette has colours", "E334", path, case, "grey values", "colours")
            greys = [(shown, mapping)] if shown.ndim == spatial and palette != "index" else []
            indices = [(array, mapping)] if palette != "grey" else []
            # the whole palette decides, used or not: the colours in use may be grey in some files of a set alone. But a
            # mask in black and white is one, also where index 0 is white and other colours stand there unused
            mask = shown.ndim == spatial and bool(raw.palette[0].any()) and set(np.unique(shown)) <= {0, 255}
            return greys + indices if mask or is_grey(raw.palette) else indices + greys
        array = shown
    if array.ndim > spatial and array.shape[-1] in (2, 4):
        if not (array[..., -1] == np.iinfo(array.dtype).max).all():
            found, fix = "alpha below its maximum", "save it without transparency, painted where it was transparent"
            raise _refused("a label with transparent pixels", "E334", path, case, "opaque pixels", found, fix)
        array = array[..., :-1]
    if colours is not None:
        bands = array if array.ndim > spatial else np.repeat(array[..., None], 3, axis=-1)
        return [(colours_to_index(bands, colours, path=path, case=case), None)]
    if array.ndim > spatial:
        if array.shape[-1] != 1 and not (array.shape[-1] == 3 and is_grey(array)):
            fix = (
                "tell what the colours mean: `colours` in datasets.yaml (`data add` writes it); in evaluation give "
                "--run RUN or the set's name as reference"
            )
            found = f"{array.shape[-1]} bands that differ"
            raise _refused("a colour picture where labels are expected", "E334", path, case, "one band", found, fix)
        array = array[..., 0]
    array = to_integers(array, path=path, case=case)
    if raw.bits in (1, 2, 4):  # few bits may be indices, or grey values from 0 to 255
        return [(array, mapping), (array * np.uint8(255 // ((1 << raw.bits) - 1)), mapping)]
    return [(array, mapping)]


def to_integers(array: np.ndarray, *, path: Path | None = None, case: str | None = None) -> np.ndarray:
    """The array as integers (bool becomes 0 and 1), if its values are whole.

    Raises:
        LabelError: E330, with the values and their voxel counts.

    >>> to_integers(np.array([0.0, 2.0])).tolist()
    [0, 2]
    """
    if array.dtype.kind in "iu":
        return array
    if array.dtype.kind == "b":
        return array.astype(np.uint8)
    if array.dtype.kind != "f":
        raise _refused("label values are no numbers", "E330", path, case, "whole numbers", array.dtype)
    with np.errstate(invalid="ignore"):
        whole = np.rint(array)
        wrong = ~(np.abs(array - whole) <= _TOLERANCE)
        wrong |= np.abs(whole) > 2**31
    if wrong.any():
        found = _counts_text(array[wrong])
        fix = "labels were interpolated or are probabilities: resample with nearest neighbour, or threshold them"
        raise _refused("label values are not whole numbers", "E330", path, case, "whole numbers", found, fix)
    return whole.astype(np.int64 if np.abs(whole).max(initial=0) > 2**30 else np.int32)


def check_values(
    array: np.ndarray,
    *,
    allowed: Collection[int] | None = None,
    ignore: int | None = None,
    mapping: Mapping | str | None = None,
    path: Path | None = None,
    case: str | None = None,
) -> np.ndarray:
    """Map raw integer values to label indices and make sure that each is allowed.

    Args:
        array: integers, any shape.
        allowed: label indices that may occur; any non-negative ones when None.
        ignore: raw value of void voxels; allowed as it is.
        mapping: raw value -> index; 0 stays 0 unless named; "nonzero" makes 1 of every other value; None maps nothing.

    Returns:
        uint8 when all values are at most 255, else int16 or int32.

    Raises:
        LabelError: E330 where nobody said what values mean, those of a mask that compression blurred; E331 negative,
            E332 not allowed or not in the mapping; with values and voxel counts.

    >>> check_values(np.array([0, 255]), mapping={255: 1}, allowed={0, 1}).tolist()
    [0, 1]
    """
    values, counts = value_counts(array)
    present = dict(zip(values.tolist(), counts.tolist(), strict=True))
    if mapping is None and allowed is None and _is_blurred(present):
        found = f"{len(present)} values, most voxels 0 or near 255"
        fix = "make a mask of what is above 127, save it as PNG or TIFF"
        raise _refused("a mask that JPEG or resizing has blurred", "E330", path, case, "0 and one value", found, fix)
    if mapping == "nonzero":
        table = {value: value if value == ignore else int(value != 0) for value in present}
    elif isinstance(mapping, str):
        raise UsageError("unknown label mapping", field="mapping", expected='a table or "nonzero"', found=mapping)
    elif mapping is None:
        table = {value: value for value in present}
    else:
        known = {0: 0, **{int(raw): int(index) for raw, index in mapping.items()}}
        if ignore is not None:
            known.setdefault(ignore, ignore)
        strange = {value: n for value, n in present.items() if value not in known}
        if strange:
            raise _not_allowed(strange, sorted(known), path, case)
        table = {value: known[value] for value in present}
    negative = {value: n for value, n in present.items() if table[value] < 0 and value != ignore}
    if negative:
        found = _table_text(negative)
        fix = "as void: medseg.evaluate(ignore=-1), or in datasets.yaml `encoding: {-1: 255, 1: 1}` and `ignore: 255`"
        raise _refused("label values are negative", "E331", path, case, "0 or more", found, fix)
    if allowed is not None:
        permitted = set(allowed) | ({ignore} if ignore is not None else set())
        strange = {value: n for value, n in present.items() if table[value] not in permitted}
        if strange:
            raise _not_allowed(strange, sorted(permitted), path, case)
    kind = smallest_type(min(table.values(), default=0), max(table.values(), default=0), path, case)
    if all(raw == index for raw, index in table.items()):
        return array.astype(kind, copy=False)
    return _translate(array, table, kind)


def _is_blurred(present: Mapping[int, int]) -> bool:
    """Whether these values (and how many voxels hold each) are what JPEG or resizing made of a mask of 0 and 255.

    Numbers of objects and of classes are not so few between both ends.
    """
    dark, white = ([value for value in present if value in end] for end in (range(1, 32), range(224, 255)))
    between = sum(count for value, count in present.items() if 32 <= value < 224)
    ringing = min(len(dark), len(white)) >= _RINGING and max(present) == 255
    return ringing and sum(present[value] for value in (*white, 255)) > between


def value_counts(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted values of an integer array and how often each occurs; by counting where the range is small."""
    if not array.size:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    low, high = int(array.min()), int(array.max())
    if high - low > 1 << 20:
        return np.unique(array, return_counts=True)
    flat = array.reshape(-1, order="F" if array.flags.f_contiguous else "C")
    if high - low < _FEW:  # a comparison for each value is many times faster than bincount, which needs int64
        found = [np.count_nonzero(flat == value) for value in range(low, high)]
        counts = np.array([*found, flat.size - sum(found)], np.int64)
    else:
        counts = np.zeros(high - low + 1, np.int64)
        for start in range(0, flat.size, _BLOCK):
            counts += np.bincount(flat[start : start + _BLOCK].astype(np.int64) - low, minlength=counts.size)
    values = np.flatnonzero(counts)
    return values + low, counts[values]


def smallest_type(low: int, high: int, path: Path | None = None, case: str | None = None) -> np.dtype:
    """uint8, int16 or int32: the first that holds `low` to `high`."""
    for kind in (np.uint8, np.int16, np.int32):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return np.dtype(kind)
    raise _refused("label values are too large", "E332", path, case, "at most 2147483647", high)


def colours_to_index(
    array: np.ndarray, mapping: Mapping, *, path: Path | None = None, case: str | None = None
) -> np.ndarray:
    """(..., 3) colours to indices by a table {(r, g, b): index}.

    Raises:
        LabelError: E332, a colour that is not in the table, with its pixel count.
    """
    packed = (array[..., 0].astype(np.int64) << 16) | (array[..., 1].astype(np.int64) << 8) | array[..., 2]
    table = {(int(c[0]) << 16) | (int(c[1]) << 8) | int(c[2]): int(i) for c, i in mapping.items() if not _number(c)}
    values, counts = np.unique(packed, return_counts=True)
    strange = [(int(v), int(n)) for v, n in zip(values, counts, strict=True) if int(v) not in table]
    if strange:
        found = ", ".join(f"({v >> 16}, {v >> 8 & 255}, {v & 255}) in {n} pixels" for v, n in strange[:_SHOWN])
        raise _refused("a label colour is not in the table", "E332", path, case, f"{len(table)} colours", found)
    return _translate(packed, table, np.dtype(np.int32))


def _translate(array: np.ndarray, table: Mapping[int, int], kind: np.dtype) -> np.ndarray:
    low, high = min(table), max(table)
    if high - low <= 1 << 24:
        lookup = np.zeros(high - low + 1, kind)
        lookup[np.array(list(table)) - low] = list(table.values())
        if low == 0 and array.dtype.kind == "u":
            return lookup[array]
        return lookup[array.astype(np.int64) - low]
    keys = np.array(sorted(table))
    return np.array([table[key] for key in keys.tolist()], kind)[np.searchsorted(keys, array)]


def _number(key: object) -> bool:
    return isinstance(key, int | np.integer)


def _not_allowed(strange: dict, permitted: list, path: Path | None, case: str | None) -> LabelError:
    expected = ", ".join(map(str, permitted[:20])) + (", ..." if len(permitted) > 20 else "")
    fix = (
        "map it in datasets.yaml (encoding, ignore); in evaluation give --run RUN or the set's name as reference, if a "
        "model's masks are numbered by its data set, else name the value: --labels 1=liver,2=tumour"
    )
    return _refused("label values are not in the list", "E332", path, case, expected, _table_text(strange), fix)


def _table_text(table: Mapping) -> str:
    parts = [f"{value} in {n} voxel{'s' * (n != 1)}" for value, n in list(table.items())[:_SHOWN]]
    more = len(table) - len(parts)
    return ", ".join(parts) + (f", and {more} more values" if more > 0 else "")


def _counts_text(values: np.ndarray) -> str:
    unique, counts = np.unique(values, return_counts=True)
    return _table_text({f"{v:.6g}": int(n) for v, n in zip(unique[:1000], counts[:1000], strict=True)})


def _refused(
    message: str,
    code: str,
    path: Path | None,
    case: str | None,
    expected: object,
    found: object,
    fix: str | None = None,
) -> LabelError:
    return LabelError(message, code=code, case=case, file=path, field="label", expected=expected, found=found, fix=fix)
