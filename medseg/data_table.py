"""Cases from a table (CSV) with the columns image and label, perhaps id, instances, fov, group (or patient), split."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from medseg.component import nearest
from medseg.config import DatasetSpec
from medseg.config_dataset import Layout
from medseg.data_case import PART_NAMES, PARTS, Case, Problems, stay_inside
from medseg.data_columns import canonical_name, find_columns, rename_columns, unread_columns
from medseg.errors import ConfigError, DataError, counted
from medseg.volumes import case_id

__all__ = ["by_csv", "read_table"]

_OTHERS = {"image": ("filename", "file", "img", "scan"), "label": ("mask", "segmentation", "annotation", "target")}
_MORE = "\n"  # under which the cells beyond the header are found: no column can be called so


def by_csv(layout: Layout, spec: DatasetSpec, root: Path) -> tuple[list[Case], Problems]:
    problems: Problems = []
    path = stay_inside(root / str(layout.csv), root, spec, problems, None)
    if path is None or not path.exists():
        return [], problems
    written, rows, lines = read_table(path)
    try:
        columns = find_columns(written, rows, path)
    except ConfigError as error:
        return [], list(error.problems)
    rows = [rename_columns(row, columns) for row in rows]
    unread = unread_columns(written, columns)
    many = [f"image_{i}" for i in range(1, len(spec.channels) + 1)]
    images = many if len(spec.channels) > 1 and set(many) <= set(columns) else ["image"]
    missing = [
        name for name in (*images, "label") if name not in columns and not (name == "label" and "instances" in columns)
    ]
    problems += [_missing_column(name, written, unread, path) for name in missing]
    parts = Counter(map(_part, rows))
    if odd := [f"{part} ({counted(count, 'row')})" for part, count in parts.items() if part not in PARTS]:
        message, expected = "parts that are none", ", ".join(PARTS)
        found, fix = ", ".join(odd[:5]), "write one of these into the column split (empty is training)"
        problems.append(
            ConfigError(message, code="E119", field="split", file=path, expected=expected, found=found, fix=fix)
        )
    if set(images) & set(missing):
        return [], problems
    cases = []
    named: dict[str, int] = {}  # the line in which an id stands first
    for line, row in zip(lines, rows, strict=True):
        where = f"line {line}"
        part = _part(row)
        if part not in PARTS:
            continue
        if not all(row.get(name) for name in images):
            expected, fix = "an image in each row", "name the image, or remove the row"
            problems.append(
                ConfigError("a row is not complete", code="E119", field=where, file=path, expected=expected, fix=fix)
            )
            continue
        name = row.get("id") or case_id(Path(row[images[0]]).name)
        if name in named:
            fix = "give each row an id of its own in the column `id`, or remove one of the two"
            message, found = "two cases have the same id", f"the same id in line {named[name]}"
            problems.append(ConfigError(message, code="E352", case=name, field=where, file=path, found=found, fix=fix))
        named.setdefault(name, line)
        paths = {}
        for key in (*images, "label", "instances", "fov"):
            text = row.get(key)
            if not text:
                if key == "label" and part != "test" and not row.get("instances") and "label" not in missing:
                    message, fix = "the label of an image is missing", "name the label, or remove the row"
                    problems.append(DataError(message, code="E350", case=name, field=where, file=path, fix=fix))
                continue
            paths[key] = stay_inside(path.parent / text, root, spec, problems, name)
            if paths[key] is not None and not paths[key].exists():
                message, fix = f"the {key} of a case is missing", _way_to(text, path, root)
                if beside := [name for name in unread if canonical_name(name) == key]:
                    fix += (
                        f"; the column `{beside[0]}` is not read beside `{columns[key]}`: rename both, if it is meant"
                    )
                problems.append(
                    DataError(message, code="E350", case=name, field=where, file=paths[key], found=text, fix=fix)
                )
        cases.append(
            Case(
                id=name,
                images=tuple(paths[key] for key in images if paths.get(key)),
                label=paths.get("label"),
                instances=(paths["instances"],) if paths.get("instances") else (),
                fov=paths.get("fov"),
                group=row.get("group" if "group" in columns else "patient") or "",
                split=part,
            )
        )
    return [] if missing else cases, problems


def _part(row: Mapping[str, str]) -> str:
    text = row.get("split") or "training"
    return PART_NAMES.get(text.lower(), text)


def _missing_column(name: str, columns: Sequence[str], unread: Sequence[str], path: Path) -> ConfigError:
    """E119, with the column among the unread ones that was probably meant."""
    left = {column.lower(): column for column in unread}
    likely = [column for word in (name, *_OTHERS.get(name, ())) for column in left if word in column]
    near = left[likely[0]] if likely else left.get(nearest(name, left) or "")
    fix = f"rename the column `{near}` to `{name}`, if that is meant" if near else f"add a column `{name}`"
    found = ", ".join(columns)
    return ConfigError("a column is missing", code="E119", field=name, file=path, found=found, fix=fix)


def _way_to(text: str, table: Path, root: Path) -> str:
    """How a path that is not there should have been written."""
    if "\\" in text:
        return "write / instead of \\ in the table's paths"
    for folder, what in ((root, "the data root"), (Path(), "the working folder")):
        if (folder / text).exists():
            return f"paths are relative to the table's own folder, not to {what}"
    return f"correct the path, which is relative to the table's own folder {table.parent}, or remove the row"


def read_table(path: Path) -> tuple[list[str], list[dict[str, str]], list[int]]:
    """Column names, rows and the line of each in a CSV file (commas, semicolons or tabs; UTF-8).

    Raises:
        ConfigError: not readable, not UTF-8, no header, two columns of one name, a row with more cells than columns.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = text.splitlines()
        told = int(re.fullmatch("sep=.", content[0].strip()) is not None) if content else 0  # Excel's line above all
        separator = max(",;\t", key=content[told].count) if content[told:] else ","
        reader = csv.DictReader(content[told:], restkey=_MORE, delimiter=separator, strict=True)
        columns = [name.strip() for name in reader.fieldnames or []]
        rows, lines, longer = [], [], []
        for row in reader:  # blank lines are passed over, so rows do not count them
            if any(more := [cell for cell in row.pop(_MORE, ()) if cell.strip()]):
                longer.append((reader.line_num + told, more))
            rows.append({(name or "").strip(): (text or "").strip() for name, text in row.items()})
            lines.append(reader.line_num + told)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        fix = None if isinstance(error, OSError) else "save it as text (CSV) in UTF-8"
        raise ConfigError("cannot read the table", code="E119", file=path, found=error, fix=fix) from None
    if not columns:
        expected, fix = "a first line with the columns' names", "write image,label above a row for each image"
        raise ConfigError("the table is empty", code="E119", file=path, expected=expected, fix=fix)
    if twice := [name for name, count in Counter(columns).items() if name and count > 1]:
        fix = "rename all but the one that is meant, or remove them"
        raise ConfigError("several columns of one name", code="E119", file=path, found=", ".join(twice), fix=fix)
    if longer:  # what stands there would be passed over, a patient perhaps
        line, more = longer[0]
        message, fix = "cells without a column", "name every column; put what holds a separator into quotes"
        found = f"{', '.join(more)}; {counted(len(longer), 'such row')}"
        expected = f"{len(columns)} cells: {', '.join(columns)}"
        raise ConfigError(
            message, code="E119", field=f"line {line}", file=path, expected=expected, found=found, fix=fix
        )
    return columns, rows, lines
