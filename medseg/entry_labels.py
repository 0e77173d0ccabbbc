"""What the label files of a new data set hold: values, colours, segments or single objects, and what they mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medseg.data_case import Case
from medseg.errors import LabelError, MedsegError, collect
from medseg.errors import listed as listed_names
from medseg.files import full_suffix
from medseg.volumes import read_geometry, read_image, read_label
from medseg.volumes_labels import WHITE
from medseg.volumes_slicer import fold_name

__all__ = ["LabelFacts", "are_numbered", "look_at_labels", "may_be_objects", "spread", "unread_labels"]

_LABELS_READ = 200  # label files read whole to learn their values; `data check` reads all
_OBJECTS = 3  # so many values that are not alike in all images may be the numbers of objects
_HALVED = {0, 63, 64, 127, 128, 191, 255}  # means of four pixels that are 0 or 255, rounded one way or the other
_SMOOTH = 6  # so many values between 0 and 255 that lie along borders of the two alone are no classes
_MOST = 0.8  # share of voxels from which on it is worth asking whether a structure is the background
_SHOWN = "see whether these are the label images; one of them at least has to show background and a structure"
_CLASSES = 64  # more values than this are objects with numbers, not classes


@dataclass
class LabelFacts:
    """How stored values become label indices: at most one of `encoding`, `colours`, `instances`, `segments` says it."""

    labels: dict[int, str]
    encoding: dict[int, int] | None = None
    colours: dict[int, list[int]] | None = None
    ignore: int | None = None
    instances: bool = False
    segments: bool = False
    notes: list[str] = field(default_factory=list)


def look_at_labels(
    cases: Sequence[Case], dims: int, *, named: bool = False, listed: Collection[int] = (), affine: str = "auto"
) -> LabelFacts:
    """Read label files and decide what their values mean.

    Values that are all `listed` (by a dataset.json) are what that says. Else 0 and one other value is background and
    one structure, also where that is 1 in some files and 255 (or 65535) in others; 0, 1, 2 ... are classes; 255 beside
    two or more below 64 is void; up to 64 other values become classes in their order; more are single objects with
    numbers. Colours become classes in the order of their frequency, black (or the most frequent) first. Segments of 3D
    Slicer become classes with their names. 0, 1, 2, 3 ..., not as many in each image, may also be numbers of objects,
    which is told unless the labels are `named`.

    Raises:
        DataError: a label is refused, or holds what compression left of it (JPEG), or halving of a mask of 0 and 255.
    """
    if cases[0].label is None:
        masks = [path for case in cases for path in case.instances]
        facts = LabelFacts({0: "background", 1: "object"}, instances=True)
        if len(masks) == len(cases) and not are_numbered(masks, dims, affine=affine):
            facts.notes.append("no mask holds more than one number: each picture is taken to show one object")
        alike = {frozenset(path.stem for path in case.instances) for case in cases}
        if len(cases) > 1 == len(alike) and len(some := next(iter(alike))) > 1 and not any(map(str.isdigit, some)):
            text = f"masks are called {listed_names(sorted(some))} for each image: taken as single objects of one kind"
            facts.notes.append(f"{text}; if these are classes, merge them into one label image with a value for each")
        return facts
    chosen = spread([case for case in cases if case.label is not None], _LABELS_READ)
    values: Counter[int] = Counter()
    colours: Counter[tuple[int, ...]] = Counter()
    numbers: set[int] = set()  # how many values a label has
    kinds: set[frozenset[int]] = set()  # which values a label has beside 0
    grey: list[Case] = []  # those with values
    most = (0, Path())  # colours in a file, and which
    problems: list[MedsegError] = []
    halved: dict[Path, bool] = {}  # labels with values between 0 and 255: whether these lie along borders of the two
    segments: dict[str, str] = {}  # names of segments, by their folded names
    for case in chosen:
        assert case.label is not None
        try:
            volume = read_label(case.label, dims=dims, affine=affine, case=case.id)
        except LabelError as error:
            if error.code != "E334":
                problems += error.problems
                continue
            shown = _colours_of(case, dims)
            try:  # with a table of its own colours, as `data check` will read it: that refuses transparency
                read_label(case.label, dims=dims, mapping=dict.fromkeys(shown, 0), case=case.id)
            except MedsegError as error:
                problems += error.problems
            colours.update(shown)
            most = max(most, (len(shown), case.label))
            continue
        except MedsegError as error:
            problems += error.problems
            continue
        found, counts = np.unique(volume.array, return_counts=True)
        segments.update({fold_name(name := volume.segments.get(int(v), "")): name for v in found if v})
        numbers.add(len(found[found != 0]))
        kinds.add(frozenset(found[found != 0].tolist()))
        values.update({int(v): int(n) for v, n in zip(found, counts, strict=True)})
        grey.append(case)
        if dims == 2 and found[-1] == 255 and np.any((found > 0) & (found < 255)):
            halved[case.label] = _between_both(volume.array[0], sharp=_HALVED.issuperset(found.tolist()))
    if problems:
        raise collect(problems)
    told = named or values.keys() <= set(listed)
    half = len(_HALVED & values.keys()) == 5 and _HALVED.issuperset(values)
    smooth = len(values.keys() - {0, 255}) >= _SMOOTH and max(values) == 255
    if halved and all(halved.values()) and (half or smooth) and not told:
        text = "masks that were halved with smoothing" if half else "masks whose borders were smoothed"
        fix = "make masks of what is above 127, saved as PNG or TIFF; if these are classes, name them (--names)"
        found = f"{listed_names(sorted(values), 8)}: the values between lie along borders of 0 and 255 alone"
        raise LabelError(text, code="E330", file=next(iter(halved)), expected="0 and one value", found=found, fix=fix)
    fix = "save the labels as PNG or TIFF with one value for each class"
    if full_suffix(chosen[0].label or "") in (".jpg", ".jpeg") and (len(values) > 2 or len(colours) > 2):
        found, kind = f"{len(values)} values, {len(colours)} colours", "JPEG blurs label values"
        raise LabelError(kind, code="E334", file=chosen[0].label, expected="a few values", found=found, fix=fix)
    known = {*colours, (0, 0, 0), (255, 255, 255)}
    for case in grey if colours else ():  # colours that happen to be grey, such as the black of a case without objects
        assert case.label is not None
        shown = _colours_of(case, dims)
        if read_geometry(case.label)[1] == 1 and (strange := sorted({colour[0] for colour in shown.keys() - known})):
            found, kind = f"grey values {strange[:5]}", "a label of values where others are colours"
            raise LabelError(kind, code="E334", file=case.label, expected="colours", found=found, fix=fix)
        colours.update(shown)
        most = max(most, (len(shown), case.label))
    if len(colours) > _CLASSES:
        found, kind = f"{len(colours)}; {most[0]} in this file", "labels have too many colours"
        expected = f"at most {_CLASSES} colours"
        raise LabelError(kind, code="E334", file=most[1], expected=expected, found=found, fix=fix)
    if any(segments):
        facts = _from_segments(segments)
    else:
        facts = _from_colours(colours) if colours else _from_values(values, max(numbers, default=0), listed)
    apart = len(kinds) > 1 and min(numbers) > 1 and not frozenset.intersection(*kinds)
    if not (named or facts.segments or facts.ignore) and may_be_objects(len(facts.labels) - 1, numbers, apart=apart):
        many = " to ".join(map(str, sorted({min(numbers), max(numbers)})))
        facts.notes.append(
            f"{many} label values in an image: if they are not classes but the numbers of single "
            "objects, use --instances instead of --labels (in a table: the column instances)"
        )
    if len(chosen) < len(cases):
        facts.notes.append(f"label values are those of {len(chosen)} of {len(cases)} cases; `data check` reads all")
    return facts


def unread_labels(cases: Sequence[Case], affine: str) -> list[MedsegError]:
    """Problems of label files whose headers cannot be read, to be told together with those of images."""
    problems: list[MedsegError] = []
    for case in cases:
        for path in (case.label, *case.instances):
            try:
                if path is not None:
                    read_geometry(path, affine=affine)
            except MedsegError as error:
                problems += error.problems
    return problems


def _between_both(label: np.ndarray, *, sharp: bool = True) -> bool:
    """Whether what is neither 0 nor 255 lies (but for a tenth) within one pixel of both, where no class would.

    Not `sharp`: what is near neither of the two lies within three pixels of what is near each, as blurring leaves it.

    >>> _between_both(np.array([[0, 64, 255], [0, 191, 255]])), _between_both(np.array([[0, 64, 64, 64, 255]]))
    (True, False)
    >>> _between_both(np.array([[0, 0, 5, 60, 128, 195, 250, 255]]), sharp=False)
    True
    """
    from scipy import ndimage  # wrong arguments are told before it is loaded

    ends = (label == 0, label == 255) if sharp else (label < 32, label >= 224)
    black, white = (np.asarray(ndimage.maximum_filter(end, 3 if sharp else 7), bool) for end in ends)
    middle = ~(ends[0] | ends[1])
    return not middle.any() or bool((black & white)[middle].mean() >= 0.9)


def may_be_objects(values: int, counts: Collection[int], *, apart: bool = False) -> bool:
    """Whether labels of so many `values` but 0, with `counts` of them in each file, may be numbers of single objects.

    `apart`: no value is in all files.

    >>> may_be_objects(40, {12, 28, 40}), may_be_objects(40, {40}), may_be_objects(2, {1, 2})
    (True, False, False)
    """
    return values >= _OBJECTS and (apart or len(set(counts)) > 1)


def are_numbered(masks: Sequence[Path], dims: int | None = None, *, affine: str = "auto") -> bool:
    """Whether a mask holds several numbers, one for each object, so that it is no mask of a single one.

    Raises:
        DataError: a mask is refused.
    """
    for path in spread(masks, _LABELS_READ):
        array = read_label(path, dims=dims, palette="index", affine=affine).array
        if len(np.unique(array[array > 0])) > 1:
            return True
    return False


def _from_values(values: Counter[int], together: int, listed: Collection[int] = ()) -> LabelFacts:
    """What the values of all files mean; `together` of them that are not 0 stand in one file at most."""
    found = sorted(values)
    others = [value for value in found if value != 0]
    if not others:
        expected, where = "voxels that are not 0", f"values {found}"
        raise LabelError("all labels are empty", code="E335", expected=expected, found=where, fix=_SHOWN)
    if values.keys() <= set(listed):
        return LabelFacts({index: f"label {index}" for index in listed})
    if len(others) > _CLASSES:
        note = f"{len(others)} label values: taken as the numbers of single objects"
        return LabelFacts({0: "background", 1: "object"}, instances=True, notes=[note])
    if 0 in values and together == 1 < len(others) and set(others) <= WHITE:
        note = f"labels are masks, of {' in some files and '.join(map(str, others))} in others: taken as one structure"
        return LabelFacts({0: "background", 1: "structure"}, encoding=dict.fromkeys(others, 1), notes=[note])
    facts = LabelFacts({0: "background"})
    classes = list(others)
    if len(others) > 2 and others[-1] == 255 and others[-2] < _CLASSES:  # 85, 170, 255 are painted greys
        facts.ignore, classes = 255, others[:-1]
        found.remove(255)
        facts.notes.append("label value 255: taken as void, which counts for nothing")
    elif 0 in values and len(others) == 2 and others[1] == 255 and others[0] < _CLASSES:
        how = "write `ignore: 255` into the entry, and take 255 out of its labels and encoding"
        facts.notes.append(f"label value 255 beside {others[0]}: taken as a class; if it is void (not labelled), {how}")
    if 0 not in values:
        facts.notes.append(f"no voxel is 0: label value {found[0]} is taken as background")
        facts.encoding = {value: index for index, value in enumerate(found)}
        classes = found[1:]
    elif classes != list(range(1, len(classes) + 1)):
        facts.encoding = {value: index for index, value in enumerate(classes, start=1)}
    if not classes:
        message, expected = "the labels have one value alone", "two values or more"
        raise LabelError(message, code="E335", expected=expected, found=found, fix=_SHOWN)
    plain = len(classes) == 1
    if plain and 0 in values and (share := values[classes[0]] / values.total()) > _MOST:
        swap = f"encoding: {{0: 1, {classes[0]}: 0}}"
        facts.notes.append(
            f"label value {classes[0]}, taken as the structure, covers {share:.0%} of all labels: if it is the "
            f"background, write `{swap}` into the entry"
        )
    facts.labels |= {i: "structure" if plain else f"label {value}" for i, value in enumerate(classes, start=1)}
    return facts


def _from_segments(segments: dict[str, str]) -> LabelFacts:
    """Segments of 3D Slicer, which have names; "" stands for numbers without one."""
    names = [name for folded, name in segments.items() if folded != "background"]
    if "" in names:
        fix = "export all labels in one way: as segmentations (.seg.nrrd), or as label maps"
        raise LabelError("labels with and without names of segments in one set", code="E332", found=names, fix=fix)
    note = "labels are segments of 3D Slicer, found by their names, whatever their numbers"
    return LabelFacts({0: "background", **dict(enumerate(names, start=1))}, segments=True, notes=[note])


def _colours_of(case: Case, dims: int) -> dict[tuple[int, ...], int]:
    """The colours of a label, and how many pixels have each."""
    assert case.label is not None
    pixels = read_image(case.label, dims=dims, colour="rgb", case=case.id).array.reshape(3, -1)
    found, counts = np.unique(pixels, axis=1, return_counts=True)
    return {tuple(map(int, c)): int(n) for c, n in zip(found.T, counts, strict=True)}


def _from_colours(colours: Counter[tuple[int, ...]]) -> LabelFacts:
    order = [colour for colour, _ in colours.most_common()]
    order.sort(key=lambda colour: colour != (0, 0, 0))  # stable: black is background where it occurs
    if len(order) < 2:
        message, expected = "the labels have one colour alone", "two colours or more"
        raise LabelError(message, code="E335", expected=expected, found=order, fix=_SHOWN)
    names = {i: "background" if i == 0 else "colour " + " ".join(map(str, colour)) for i, colour in enumerate(order)}
    note = f"labels are colours: {len(order)} of them, {order[0]} is taken as background"
    return LabelFacts(names, colours={i: list(colour) for i, colour in enumerate(order)}, notes=[note])


def spread(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly from the first to the last."""
    if len(items) <= count:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]
