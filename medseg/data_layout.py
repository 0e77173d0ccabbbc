"""Which cases a data set has: patterns, Medical Segmentation Decathlon and nnU-Net folders, tables."""

from __future__ import annotations

import csv
import glob
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medseg.config import DatasetSpec
from medseg.config_dataset import Layout, PartFiles
from medseg.errors import ConfigError, DataError, MedsegError
from medseg.files import inside
from medseg.volumes import case_id, natural_key

__all__ = ["PARTS", "Case", "list_cases"]

PARTS = ("training", "validation", "test")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
Problems = list[MedsegError]


@dataclass(frozen=True)
class Case:
    """One image (of several files, if each channel has its own) with all that belongs to it.

    Attributes:
        id: unique in its data set; a keyed hash for DICOM series.
        images: one file with all channels, or one file for each channel.
        label, fov: label image and field-of-view mask, where there are any.
        instances: one index image, or one mask for each instance.
        group: cases of one group never stand on both sides of a split.
        split: "training", "validation" or "test".
        frame: position in the sequence called `group`, for frames and neighbouring slices; else None.
        gap: frames that are left out on both sides of a validation block of a sequence.
    """

    id: str
    images: tuple[Path, ...]
    label: Path | None = None
    instances: tuple[Path, ...] = ()
    fov: Path | None = None
    group: str = ""
    split: str = "training"
    frame: int | None = None
    gap: int = 0

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the case."""
        more = (self.label, self.fov)
        return (*self.images, *self.instances, *(path for path in more if path is not None))

    @property
    def labelled(self) -> bool:
        """Whether there is a reference to train on or to score against."""
        return self.label is not None or bool(self.instances)


def list_cases(spec: DatasetSpec, root: Path) -> tuple[list[Case], Problems]:
    """All cases of all parts in natural order of their ids, from the first layout whose images are there."""
    problems: Problems = []
    for layout in spec.files:
        reader = next(read for name, read in _READERS.items() if getattr(layout, name) is not None)
        cases, found = reader(layout, spec, root)
        if cases or found:
            cases, problems = _unique(cases), [*found, *_repeated(cases)]
            break
    else:
        return [], problems
    if spec.select is not None:
        cases, more = _select(cases, spec, root)
        problems = [p for p in problems if p.case is None or p.case in {c.id for c in cases}] + more
    cases.sort(key=lambda case: (PARTS.index(case.split), natural_key(case.id)))
    return _group(cases, spec, problems), problems


# --- patterns ---------------------------------------------------------------------------------------------------


def _by_pattern(layout: Layout, spec: DatasetSpec, root: Path) -> tuple[list[Case], Problems]:
    cases: list[Case] = []
    problems: Problems = []
    for part in PARTS:
        files: PartFiles | None = getattr(layout, part)
        if files is None:
            continue
        found = {_id_of(values, path): (values, path) for values, path in _matches(files.image[0], root)}
        if not found and files.ids is not None and not (root / files.ids).exists():
            continue  # the set is not here at all, or in another layout
        wanted = None if files.ids is None else _read_ids(files.ids, spec, root, problems)
        if wanted is not None:
            problems += [
                DataError("an id of the list has no image", code="E350", case=name, file=files.ids, expected=files.image[0])
                for name in wanted
                if name not in found
            ]
        chosen = {name: v for name, v in found.items() if wanted is None or name in wanted}
        for name, (values, path) in chosen.items():
            cases.append(_pattern_case(name, values, path, files, part, spec, root, problems))
        if part != "test" and wanted is None and chosen:
            problems += _orphans(files, chosen, root)
    return cases, problems


def _pattern_case(
    name: str, values: dict[str, str], path: Path, files: PartFiles, part: str, spec: DatasetSpec, root: Path, problems: Problems
) -> Case:
    def one(pattern: str | None, what: str, *, needed: bool) -> Path | None:
        if pattern is None:
            return None
        target = root / _fill(pattern, values)
        if not target.exists() and not target.is_symlink():
            if needed:
                fix = f"add the {what}, or remove the image"
                problems.append(DataError(f"the {what} of an image is missing", code="E350", case=name, file=target, fix=fix))
            return None
        return _safe(target, root, spec, problems, name)

    needed = part != "test"
    images = [_safe(path, root, spec, problems, name)]
    images += [one(pattern, f"image of channel {spec.channels[i]}", needed=True) for i, pattern in enumerate(files.image[1:], 1)]
    instances: list[Path] = []
    if files.instances is not None and "*" in files.instances:
        pattern = _to_glob(_fill(files.instances, values, escape=True), star=True)
        instances = sorted((Path(p) for p in glob.glob(str(Path(glob.escape(str(root)), pattern)))), key=natural_key)
        instances = [p for p in (_safe(path, root, spec, problems, name) for path in instances) if p is not None]
        if not instances and needed:
            problems.append(
                DataError("no instance mask for an image", code="E350", case=name, file=root / _fill(files.instances, values))
            )
    elif (single := one(files.instances, "instance label", needed=needed)) is not None:
        instances = [single]
    return Case(
        id=name,
        images=tuple(path for path in images if path is not None),
        label=one(files.label, "label", needed=needed),
        instances=tuple(instances),
        fov=one(files.fov, "field-of-view mask", needed=True),
        split=part,
    )


def _orphans(files: PartFiles, found: dict[str, Any], root: Path) -> Iterator[MedsegError]:
    pattern = files.label or files.instances
    if pattern is None or "*" in pattern:
        return
    for values, path in _matches(pattern, root):
        name = _id_of(values, None)
        if name not in found:
            fix = "add the image, or remove the label"
            expected = _fill(files.image[0], values)
            yield DataError("a label has no image", code="E351", case=name, file=path, expected=expected, fix=fix)


def _matches(pattern: str, root: Path) -> list[tuple[dict[str, str], Path]]:
    """(values of the placeholders, path) for everything below `root` that fits the pattern, in natural order."""
    seen: set[str] = set()

    def group(match: re.Match) -> str:
        name = match[1]
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return f"(?P<{name}>[^/]+?)"

    literal = _PLACEHOLDER.split(pattern)
    expression = "".join(re.escape(t) if i % 2 == 0 else group(_PLACEHOLDER.match(f"{{{t}}}")) for i, t in enumerate(literal))  # pyright: ignore[reportArgumentType]
    compiled = re.compile(expression)
    wildcard = "".join(glob.escape(t) if i % 2 == 0 else "*" for i, t in enumerate(literal))
    found = []
    for text in glob.glob(wildcard, root_dir=root):
        if match := compiled.fullmatch(Path(text).as_posix()):
            found.append((match.groupdict(), root / text))
    return sorted(found, key=lambda pair: natural_key(pair[1]))


def _fill(pattern: str, values: dict[str, str], *, escape: bool = False) -> str:
    return _PLACEHOLDER.sub(lambda match: glob.escape(values[match[1]]) if escape else values[match[1]], pattern)


def _to_glob(pattern: str, *, star: bool) -> str:
    return pattern if star else glob.escape(pattern)


def _id_of(values: dict[str, str], path: Path | None) -> str:
    if path is not None and path.is_dir():
        return case_id(path)  # names of DICOM folders may hold the patient's
    return values["id"] if "id" in values else "_".join(values.values())


def _read_ids(pattern: str, spec: DatasetSpec, root: Path, problems: Problems) -> set[str]:
    path = _safe(root / pattern, root, spec, problems, None)
    try:
        text = path.read_text(encoding="utf-8") if path else ""
    except (OSError, UnicodeDecodeError) as error:
        problems.append(ConfigError("cannot read the list of ids", code="E111", file=path, found=error))
        return set()
    return {line.split()[0] for line in text.splitlines() if line.strip()}


# --- folders that describe themselves ---------------------------------------------------------------------------


def _by_msd(layout: Layout, spec: DatasetSpec, root: Path) -> tuple[list[Case], Problems]:
    folder = root / str(layout.msd)
    if not folder.is_dir():
        return [], []
    table, problems = _read_json(folder / "dataset.json", ("training",))
    cases: list[Case] = []
    for part, count in (("training", "numTraining"), ("test", "numTest")):
        entries = table.get(part, [])
        file = folder / "dataset.json"
        if not isinstance(entries, list):
            problems.append(ConfigError("not a list", code="E119", field=part, file=file, found=type(entries).__name__))
            continue
        if count in table and table[count] != len(entries):
            fix = "one of the two is wrong: count the cases"
            problems.append(
                ConfigError(f"{count} differs from the list", code="E119", field=count, file=file, expected=len(entries), found=table[count], fix=fix)
            )
        for index, entry in enumerate(entries):
            case = _msd_case(entry, f"{part}[{index}]", part, folder, spec, root, problems)
            cases += [case] if case else []
    return cases, problems


def _msd_case(
    entry: Any, where: str, part: str, folder: Path, spec: DatasetSpec, root: Path, problems: Problems
) -> Case | None:
    file = folder / "dataset.json"
    entry = {"image": entry} if isinstance(entry, str) else entry
    needed = ("image", "label") if part == "training" else ("image",)
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in needed):
        expected = " and ".join(f'"{key}"' for key in needed)
        problems.append(ConfigError("an entry is not complete", code="E119", field=where, file=file, expected=expected, found=entry))
        return None
    name = case_id(Path(entry["image"]).name)
    paths: dict[str, Path | None] = {}
    for key in ("image", "label"):
        if not isinstance(entry.get(key), str):
            continue
        path = _safe(folder / entry[key], root, spec, problems, name)
        if path is not None and not path.exists():
            fix = "add the file, or remove the entry from dataset.json"
            problems.append(DataError(f"the {key} of a case is missing", code="E350", case=name, field=where, file=folder / entry[key], fix=fix))
            path = None
        paths[key] = path
    if paths["image"] is None:
        return None
    return Case(id=name, images=(paths["image"],), label=paths.get("label"), split=part)


def _by_nnunet(layout: Layout, spec: DatasetSpec, root: Path) -> tuple[list[Case], Problems]:
    folder = root / str(layout.nnunet)
    if not folder.is_dir():
        return [], []
    table, problems = _read_json(folder / "dataset.json", ("channel_names", "labels", "file_ending"))
    if problems:
        return [], problems
    ending = str(table["file_ending"])
    images = [f"{layout.nnunet}/images{{part}}/{{{{id}}}}_{i:04d}{ending}" for i in range(len(spec.channels))]
    parts = {}
    for part, suffix in (("training", "Tr"), ("test", "Ts")):
        label = f"{layout.nnunet}/labels{suffix}/{{id}}{ending}"
        files = PartFiles(image=tuple(text.format(part=suffix) for text in images), label=label)
        parts[part] = files
    cases, more = _by_pattern(Layout(training=parts["training"], test=parts["test"]), spec, root)
    count, listed = table.get("numTraining"), sum(case.split == "training" for case in cases)
    if count is not None and count != listed:
        problems.append(
            ConfigError(
                "numTraining differs from the cases in imagesTr", code="E119", field="numTraining",
                file=folder / "dataset.json", expected=listed, found=count,
            )  # fmt: skip
        )
    return cases, problems + more


def _read_json(path: Path, needed: tuple[str, ...]) -> tuple[dict[str, Any], Problems]:
    try:
        table = json.loads(path.read_bytes())
    except OSError as error:
        return {}, [ConfigError("cannot read dataset.json", code="E119", file=path, found=error.strerror)]
    except (UnicodeDecodeError, RecursionError) as error:
        return {}, [ConfigError("dataset.json is broken", code="E119", file=path, found=error)]
    except json.JSONDecodeError as error:
        place = f"{path}:{error.lineno}:{error.colno}"
        return {}, [ConfigError("dataset.json is broken", code="E119", file=place, found=error.msg)]
    if not isinstance(table, dict):
        return {}, [ConfigError("dataset.json is broken", code="E119", file=path, expected="keys and values")]
    missing = [key for key in needed if key not in table]
    return table, [ConfigError("a key is missing", code="E119", field=key, file=path) for key in missing]


def _by_csv(layout: Layout, spec: DatasetSpec, root: Path) -> tuple[list[Case], Problems]:
    problems: Problems = []
    path = _safe(root / str(layout.csv), root, spec, problems, None)
    if path is None or not path.exists():
        return [], problems
    columns, rows = read_table(path)
    many = [f"image_{i}" for i in range(1, len(spec.channels) + 1)]
    images = many if len(spec.channels) > 1 and set(many) <= set(columns) else ["image"]
    if missing := [name for name in (*images, "label") if name not in columns and not (name == "label" and "instances" in columns)]:
        found = ", ".join(columns)
        return [], [ConfigError("a column is missing", code="E119", field=name, file=path, found=found) for name in missing]
    cases = []
    for number, row in enumerate(rows, start=2):
        where = f"line {number}"
        part = row.get("split") or "training"
        if part not in PARTS or not all(row.get(name) for name in images):
            expected = f"split: {', '.join(PARTS)}; an image in each row"
            problems.append(ConfigError("a row is not complete", code="E119", field=where, file=path, expected=expected))
            continue
        name = row.get("id") or case_id(Path(row[images[0]]).name)
        paths = {}
        for key in (*images, "label", "instances", "fov"):
            text = row.get(key)
            if not text:
                if key == "label" and part != "test" and not row.get("instances"):
                    problems.append(DataError("the label of an image is missing", code="E350", case=name, field=where, file=path))
                continue
            paths[key] = _safe(path.parent / text, root, spec, problems, name)
            if paths[key] is not None and not paths[key].exists():
                problems.append(DataError(f"the {key} of a case is missing", code="E350", case=name, field=where, file=paths[key]))
        cases.append(
            Case(
                id=name, images=tuple(paths[key] for key in images if paths.get(key)), label=paths.get("label"),
                instances=(paths["instances"],) if paths.get("instances") else (), fov=paths.get("fov"),
                group=row.get("group") or "", split=part,
            )  # fmt: skip
        )
    return cases, problems


def read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Column names and rows of a CSV file (commas, semicolons or tabs; UTF-8).

    Raises:
        ConfigError: not readable, not UTF-8, no header.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        separator = max(",;\t", key=text.partition("\n")[0].count)
        reader = csv.DictReader(text.splitlines(), delimiter=separator, strict=True)
        rows = [{(key or "").strip(): (value or "").strip() for key, value in row.items() if isinstance(value, str | None)} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError("cannot read the table", code="E119", file=path, found=error) from None
    columns = [name.strip() for name in reader.fieldnames or []]
    if not columns:
        raise ConfigError("the table is empty", code="E119", file=path, expected="a first line with the columns' names")
    return columns, rows


_READERS: dict[str, Callable[[Layout, DatasetSpec, Path], tuple[list[Case], Problems]]] = {
    "training": _by_pattern,
    "msd": _by_msd,
    "nnunet": _by_nnunet,
    "csv": _by_csv,
}


# --- what all have in common ------------------------------------------------------------------------------------


def _safe(path: Path, root: Path, spec: DatasetSpec, problems: Problems, case: str | None) -> Path | None:
    """The path, if it stays inside the data root after resolving links (or the set allows it to leave)."""
    if spec.links:
        return path
    try:
        inside(root, path)
    except ConfigError as error:
        error.case, error.fix = case, "move the file into the data root, or set `links: true` for this set in datasets.yaml"
        problems.append(error)
        return None
    return path


def _select(cases: list[Case], spec: DatasetSpec, root: Path) -> tuple[list[Case], Problems]:
    rule = spec.select
    assert rule is not None
    columns, rows = read_table(root / rule.file)
    if missing := [name for name in (rule.id, rule.column) if name not in columns]:
        found = ", ".join(columns)
        return [], [ConfigError("a column is missing", code="E119", field=name, file=root / rule.file, found=found) for name in missing]
    wanted = {row[rule.id] for row in rows if row[rule.column] in rule.value}
    return [case for case in cases if case.id in wanted], []


def _unique(cases: list[Case]) -> list[Case]:
    return list({(case.split, case.id): case for case in reversed(cases)}.values())


def _repeated(cases: list[Case]) -> Iterator[MedsegError]:
    seen: set[str] = set()
    for case in cases:
        if case.id in seen:
            fix = "give each case an id of its own"
            yield ConfigError("two cases have the same id", code="E352", case=case.id, file=next(iter(case.images), None), fix=fix)
        seen.add(case.id)


def _group(cases: list[Case], spec: DatasetSpec, problems: Problems) -> list[Case]:
    rule = spec.split
    expression = None if rule.group is None else re.compile(rule.group)
    sequence = rule.unit == "sequence"
    result: list[Case] = []
    counts: dict[tuple[str, str], int] = {}
    for case in cases:
        group = case.group
        if not group and expression is not None and (match := expression.search(case.id)):
            group = match[1] if expression.groups else match[0]
        elif not group and expression is not None and not sequence:
            problems.append(
                DataError(f"no {rule.unit} can be read from the id", code="E353", case=case.id, field="split.group", expected=rule.group)
            )
        if sequence:
            key = (case.split, group)
            frame = counts[key] = counts.get(key, -1) + 1
            case = replace(case, group=group, frame=frame, gap=rule.gap)
        else:
            case = replace(case, group=group or case.id)
        result.append(case)
    return result
