"""`medseg data add`: look at a folder of images and labels, and write its entry into the data root's datasets.yaml."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from medseg.config import DatasetSpec, dataset_names, entry_of
from medseg.config_dataset import Layout
from medseg.config_place import data_root
from medseg.config_yaml import write_yaml
from medseg.data_case import Case
from medseg.data_columns import IMAGE_COLUMN, find_columns, tell_columns
from medseg.data_layout import list_cases
from medseg.data_pattern import match_images, match_pattern
from medseg.data_table import read_table
from medseg.entry_files import below, expand, no_outlines, other_channels, without_labels
from medseg.entry_folder import from_folder
from medseg.entry_labels import are_numbered
from medseg.entry_looking import look_at_files
from medseg.entry_pairing import instance_pattern, pair_patterns
from medseg.entry_parts import parts_of, tell_grouped, tell_groups, tell_parts
from medseg.errors import ConfigError, DataError, UsageError, counted, listed
from medseg.files import write_text
from medseg.volumes import natural_key

__all__ = ["AddedDataset", "add_dataset", "describe_files"]

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class AddedDataset:
    """What was written: the file, the entry as plain values, the number of labelled cases, and notes for the user."""

    name: str
    file: Path
    cases: int
    entry: dict[str, Any]
    notes: tuple[str, ...]


def add_dataset(
    name: str,
    root: str | Path,
    *,
    images: str | None = None,
    labels: str | None = None,
    instances: str | None = None,
    folder: str | Path | None = None,
    csv: str | Path | None = None,
    group: str | None = None,
    names: str | Mapping[int, str] | None = None,
    nan: str | float = "refuse",
    affine: str = "auto",
    links: bool = False,
) -> AddedDataset:
    """Describe a data set after looking at its files, and append the entry to `root`/datasets.yaml.

    Args:
        name: letters, digits, `_`, `-`; not yet the name of a set.
        root: the data root, inside which everything has to lie.
        images, labels: glob patterns below the root, or patterns with `{id}`.
        instances: instead of `labels`: one mask for each image, with a number for each object; or masks in a folder for
            each image, one file for each object.
        folder: instead of patterns: a folder with a Medical Segmentation Decathlon or nnU-Net dataset.json.
        csv: instead of patterns: a table with the columns image and label, perhaps id, instances, fov, group (or
            patient), split.
        group: regular expression that finds the patient in a case's id.
        names: names of the labels, `{1: "liver"}` or `"1=liver,2=tumour"`, by the values that the files hold (of
            colours: by their indices); 1 is the one structure of masks too.
        nan, affine: as in datasets.yaml, for images that would be refused: a number that replaces NaN and infinite
            voxels; "sform" or "qform" where the two of a NIfTI disagree. Written into the entry.
        links: links may lead out of the root, here and in the entry.

    Raises:
        UsageError: the name is taken or not allowed, not one way of describing was given, nothing matches, or images
            and labels cannot be paired. ConfigError: dataset.json, table or expression are wrong. DataError: a file is
            refused, a label or an image is missing, kinds are mixed. All that were found.
    """
    root = data_root(root)
    if not _NAME.fullmatch(name):
        raise UsageError(
            "not a name for a data set", field="NAME", expected="a letter, then letters, digits, _ or -", found=name
        )
    file = root / "datasets.yaml"
    if name in dataset_names(root=root):
        own = file.is_file() and name in dataset_names(file=file)
        fix = f"take another name, or remove its entry from {file} to add it anew" if own else "take another name"
        message = "a data set of this name is there already"
        raise UsageError(message, code="E121", field="NAME", found=name, fix=fix)
    if file.is_dir():
        fix = "rename the folder, or take another data root"
        raise ConfigError("a folder stands where data sets are described", code="E111", file=file, fix=fix)
    spec, cases, notes = describe_files(
        name, root, images=images, labels=labels, instances=instances, folder=folder, csv=csv, group=group, names=names,
        nan=nan, affine=affine, links=links,
    )  # fmt: skip
    entry = entry_of(spec.to_dict())
    before = (
        file.read_text(encoding="utf-8") if file.exists() else "# Data sets of this folder; see docs/own_data.md.\n"
    )
    write_text(file, f"{before.rstrip()}\n\n{write_yaml(entry)}")
    return AddedDataset(name, file, sum(case.labelled for case in cases), entry[name], tuple(notes))


def describe_files(
    name: str,
    root: Path,
    *,
    images: str | None = None,
    labels: str | None = None,
    instances: str | None = None,
    folder: str | Path | None = None,
    csv: str | Path | None = None,
    group: str | None = None,
    names: str | Mapping[int, str] | None = None,
    nan: str | float = "refuse",
    affine: str = "auto",
    links: bool = False,
) -> tuple[DatasetSpec, list[Case], list[str]]:
    """The facts of `add_dataset`, the cases, and notes, without writing anything."""
    told: dict[str, Any] = {}
    notes: list[str] = []
    columns: dict[str, str] = {}
    if sum(way is not None for way in (images, folder, csv)) != 1:
        raise UsageError("give one of --images, --folder, --csv", expected="one", found="several or none")
    if images is not None:
        layout, notes = _from_patterns(root, images, labels, instances, affine)
    elif folder is not None:
        layout, told = from_folder(root, below(root, folder, links=links))
    else:
        no_outlines([str(csv)], "--csv")
        layout = Layout(csv=below(root, csv or "", links=links))
        written, rows, _ = read_table(root / str(layout.csv))
        columns = find_columns(written, rows, root / str(layout.csv))
        notes = tell_columns(written, columns)
        count = sum(IMAGE_COLUMN.fullmatch(column) is not None for column in columns)
        told = {"channels": [f"channel {i}" for i in range(1, count + 1)]} if count > 1 else {}
    facts: dict[str, Any] = {
        "name": name, "title": name, "modality": "unknown", "dims": 2, "channels": ["image"], "unit": "px",
        "labels": {0: "background", 1: "structure"}, "files": [layout.model_dump(exclude_none=True)], **told,
    }  # fmt: skip
    told_here = {"nan": (nan, "refuse"), "affine": (affine, "auto"), "links": (links, False)}
    facts |= {key: value for key, (value, usual) in told_here.items() if value != usual}
    if group is not None:
        try:
            re.compile(group)
        except re.error as error:
            found, expected = f"{group} ({error})", "a regular expression, such as '^([^_]+)_'"
            message = "not a regular expression"
            raise UsageError(message, code="E114", field="--group", expected=expected, found=found) from None
        facts["split"] = {"unit": "patient", "group": group}
    source = "options of data add" if folder is None else str(root / below(root, folder, links=links) / "dataset.json")
    cases, problems = list_cases(DatasetSpec.from_dict(facts, source=source), root)
    labelled = [case for case in cases if case.labelled]
    if not labelled and not problems:
        found, fix = counted(len(cases), "image"), "give images labels; in a table, a row for each image with its label"
        place = root if layout.csv is None else root / layout.csv
        raise UsageError("no labelled case found", code="E103", file=place, expected="at least 1", found=found, fix=fix)
    in_json = told.get("labels", ())
    values = {0, *told.get("encoding", in_json), told.get("ignore")} - {None} if in_json else set()
    seen, known = look_at_files(
        cases, problems, told.get("channels", ()), nan=nan, affine=affine,
        named="labels" in told or names is not None, listed=values,
    )  # fmt: skip
    if known.segments and names is not None:
        message, fix = "segments of 3D Slicer have names of their own", "leave --names out, or rename them in 3D Slicer"
        raise UsageError(message, field="--names", expected=", ".join(known.labels.values()), found=names, fix=fix)
    if known.instances and layout.training is not None and layout.training.label is not None:
        parts = layout.model_dump(exclude_none=True)
        facts["files"] = [{part: {"image": p["image"], "instances": p["label"]} for part, p in parts.items()}]
    elif known.instances and labelled[0].label is not None:  # an entry with these would be refused by everything
        fix = "name the column instances" if csv is not None else "describe them with --images and --instances"
        message = "labels that hold the numbers of single objects"
        raise DataError(message, code="E332", file=labelled[0].label, expected="classes", found=known.notes[0], fix=fix)
    facts |= {"dims": seen.dims, "unit": "px" if seen.dims == 2 else "mm", "colour": seen.colour}
    facts["channels"] = told.get("channels") or _channel_names(seen.channels, seen.colour)
    facts["labels"] = _named(told.get("labels") or known.labels, told.get("encoding") or known.encoding, names)
    unlike_json = len(known.labels) != len(in_json) or "encoding" in told
    if in_json and not known.colours and set(known.labels) != values and unlike_json:
        found, expected = ", ".join(map(str, known.encoding or known.labels)), ", ".join(map(str, sorted(values)))
        message, fix = "labels have values that dataset.json does not list", "correct labels in dataset.json"
        raise DataError(message, code="E332", file=source, field="labels", expected=expected, found=found, fix=fix)
    for key in ("encoding", "colours", "ignore"):
        if facts.get(key) is None and (value := getattr(known, key)) is not None:
            facts[key] = value
    facts = {key: value for key, value in facts.items() if value is not None}
    spec = DatasetSpec.from_dict(facts, source=source)
    notes += [
        *seen.notes,
        *tell_parts(cases),
        *known.notes,
        f"labels: {', '.join(f'{i} {text}' for i, text in spec.labels.items())}",
    ]
    if group is not None or {"group", "patient"} & columns.keys():
        notes.append(tell_grouped(cases))
    else:
        notes += tell_groups(labelled)
    return spec, cases, notes


def _from_patterns(
    root: Path, images: str, labels: str | None, instances: str | None, affine: str
) -> tuple[Layout, list[str]]:
    if (labels is None) == (instances is None):
        raise UsageError("give --labels or --instances with --images", expected="one of the two", found="both or none")
    option = "--labels" if labels else "--instances"
    image_files, notes = expand(root, images, "--images")
    other_files, more = expand(root, labels or instances or "", option)
    image_files, both = without_labels(image_files, other_files, option)
    notes += [*more, *both, *other_channels(root, image_files)]
    if labels is not None:
        image, other = pair_patterns(image_files, other_files)
        files = {"image": image, "label": other}
    else:
        image, other = _pair_masks(root, image_files, other_files, affine)
        files = {"image": image, "instances": other}
    layout = Layout.model_validate({"training": files})
    assert layout.training is not None
    cases = [(frozenset(values.items()), path) for values, path in match_images(layout.training, root)]
    ids = {values for values, _ in cases}
    others = [] if "*" in other else match_pattern(other, root)
    matched = {path.relative_to(root).as_posix() for _, path in cases}
    labelled = {path.relative_to(root).as_posix() for values, path in others if frozenset(values.items()) in ids}
    for what, field, pattern, found, given in (
        ("images", "--images", image, matched, image_files), ("labels", option, other, labelled, other_files),
    ):  # fmt: skip
        if extra := sorted(found - set(given), key=natural_key):
            fix = "put images and labels into folders of their own, or give a table with --csv"
            message = f"{what} cannot be told from other files by their names"
            raise UsageError(message, code="E120", field=field, expected=pattern, found=", ".join(extra[:5]), fix=fix)
    if lost := [path for path in image_files if path not in matched]:
        fix = "name the files alike, or give a table with --csv"
        message = "images that no pattern finds together with the others"
        raise UsageError(message, code="E120", field="--images", expected=image, found=", ".join(lost[:5]), fix=fix)
    parts, more = parts_of(files, image_files)
    return Layout.model_validate(parts) if parts else layout, notes + more


def _pair_masks(root: Path, images: list[str], masks: list[str], affine: str) -> tuple[str, str]:
    """Patterns of images and of masks: for each image a folder of masks, or one mask of numbered objects."""
    try:
        patterns = instance_pattern(images, masks)
    except UsageError:
        if len(masks) > len(images):
            if len({PurePosixPath(mask).parent for mask in masks}) > 1:
                raise
            message, fix = "masks of single objects lie in one folder", "put those of each image into a folder named "
            fix += "as the image (masks/a_1/1.png), then --instances 'masks/*/*.png'; or number them in one mask"
            found = f"{counted(len(images), 'image')}, {counted(len(masks), 'mask')}: {listed(masks)}"
            raise UsageError(message, code="E120", field="--instances", found=found, fix=fix) from None
        return pair_patterns(images, masks)
    # one mask in each folder: of one object, or of all
    alone = len(masks) == len({PurePosixPath(mask).parent for mask in masks})
    numbered = alone and are_numbered([root / mask for mask in masks], affine=affine)
    return pair_patterns(images, masks) if numbered else patterns


def _channel_names(count: int, colour: str | None) -> list[str]:
    if colour == "rgb":
        return ["red", "green", "blue"]
    return ["grey" if colour else "image"] if count == 1 else [f"channel {i}" for i in range(1, count + 1)]


def _named(labels: Mapping[int, str], encoding: Any, names: str | Mapping[int, str] | None) -> dict[int, str]:
    stored = {index: index for index in labels}
    if isinstance(encoding, dict):  # the user knows what the files hold, not what becomes of it
        stored = {**({} if 0 in encoding.values() else {0: 0}), **encoding}
        if len(labels) == 2:
            stored.setdefault(1, 1)
    if isinstance(names, str):
        pairs = [part.partition("=") for part in names.split(",")]
        if not all(key.strip().isdecimal() and text.strip() for key, _, text in pairs):
            raise UsageError("not names of labels", field="--names", expected="1=liver,2=tumour", found=names)
        names = {int(key): text.strip() for key, _, text in pairs}
    if unknown := sorted(set(names or {}) - set(stored)):
        expected = ", ".join(map(str, stored))
        raise UsageError("names of labels that do not occur", field="--names", expected=expected, found=unknown)
    return {**labels, **{stored[value]: text for value, text in (names or {}).items()}}
