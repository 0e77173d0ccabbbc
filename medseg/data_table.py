"""Cases from a table (CSV) with the columns image and label, perhaps id, instances, fov, group, split."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

from medseg.config import DatasetSpec
from medseg.config_dataset import Layout
from medseg.data_case import PARTS, Case, Problems, stay_inside
from medseg.errors import ConfigError, DataError, counted
from medseg.volumes import case_id

__all__ = ["by_csv", "read_table"]

_MORE = "\n"  # under which the cells beyond the header are found: no column can be called so


def by_csv(layout: Layout, spec: DatasetSpec, root: Path) -> tuple[list[Case], Problems]:
    problems: Problems = []
    path = stay_inside(root / str(layout.csv), root, spec, problems, None)
    if path is None or not path.exists():
        return [], problems
    columns, rows, lines = read_table(path)
    many = [f"image_{i}" for i in range(1, len(spec.channels) + 1)]
    images = many if len(spec.channels) > 1 and set(many) <= set(columns) else ["image"]
    if missing := [
        name for name in (*images, "label") if name not in columns and not (name == "label" and "instances" in columns)
    ]:
        found = ", ".join(columns)
        return [], [
            ConfigError("a column is missing", code="E119", field=name, file=path, found=found) for name in missing
        ]
    parts = Counter(row.get("split") or "training" for row in rows)
    if odd := [f"{part} ({counted(count, 'row')})" for part, count in parts.items() if part not in PARTS]:
        message, expected = "parts that are none", ", ".join(PARTS)
        found = ", ".join(odd[:5])
        problems.append(ConfigError(message, code="E119", field="split", file=path, expected=expected, found=found))
    cases = []
    for line, row in zip(lines, rows, strict=True):
        where = f"line {line}"
        part = row.get("split") or "training"
        if part not in PARTS:
            continue
        if not all(row.get(name) for name in images):
            expected = "an image in each row"
            problems.append(
                ConfigError("a row is not complete", code="E119", field=where, file=path, expected=expected)
            )
            continue
        name = row.get("id") or case_id(Path(row[images[0]]).name)
        paths = {}
        for key in (*images, "label", "instances", "fov"):
            text = row.get(key)
            if not text:
                if key == "label" and part != "test" and not row.get("instances"):
                    problems.append(
                        DataError("the label of an image is missing", code="E350", case=name, field=where, file=path)
                    )
                continue
            paths[key] = stay_inside(path.parent / text, root, spec, problems, name)
            if paths[key] is not None and not paths[key].exists():
                problems.append(
                    DataError(f"the {key} of a case is missing", code="E350", case=name, field=where, file=paths[key])
                )
        cases.append(
            Case(
                id=name,
                images=tuple(paths[key] for key in images if paths.get(key)),
                label=paths.get("label"),
                instances=(paths["instances"],) if paths.get("instances") else (),
                fov=paths.get("fov"),
                group=row.get("group") or "",
                split=part,
            )
        )
    return cases, problems


def read_table(path: Path) -> tuple[list[str], list[dict[str, str]], list[int]]:
    """Column names, rows and the line of each in a CSV file (commas, semicolons or tabs; UTF-8).

    Raises:
        ConfigError: not readable, not UTF-8, no header, two columns of one name, a row with more cells than columns.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        separator = max(",;\t", key=text.partition("\n")[0].count)
        reader = csv.DictReader(text.splitlines(), restkey=_MORE, delimiter=separator, strict=True)
        columns = [name.strip() for name in reader.fieldnames or []]
        rows, lines, longer = [], [], []
        for row in reader:  # blank lines are passed over, so rows do not count them
            if any(more := [cell for cell in row.pop(_MORE, ()) if cell.strip()]):
                longer.append((reader.line_num, more))
            rows.append({(name or "").strip(): (text or "").strip() for name, text in row.items()})
            lines.append(reader.line_num)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        fix = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else None
        raise ConfigError("cannot read the table", code="E119", file=path, found=error, fix=fix) from None
    if not columns:
        raise ConfigError("the table is empty", code="E119", file=path, expected="a first line with the columns' names")
    if twice := [name for name, count in Counter(columns).items() if name and count > 1]:
        raise ConfigError("several columns of one name", code="E119", file=path, found=", ".join(twice))
    if longer:  # what stands there would be passed over, a patient perhaps
        line, more = longer[0]
        message, fix = "cells without a column", "name every column; put what holds a separator into quotes"
        found = f"{', '.join(more)}; {counted(len(longer), 'such row')}"
        expected = f"{len(columns)} cells: {', '.join(columns)}"
        raise ConfigError(
            message, code="E119", field=f"line {line}", file=path, expected=expected, found=found, fix=fix
        )
    return columns, rows, lines
