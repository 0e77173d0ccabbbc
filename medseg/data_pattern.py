"""Cases from patterns such as `images/{id}.png`, as datasets.yaml describes most sets."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from medseg.config import DatasetSpec
from medseg.config_dataset import Layout, PartFiles
from medseg.data_case import PARTS, Case, Problems, stay_inside
from medseg.errors import ConfigError, DataError, FormatError, MedsegError
from medseg.files import written_suffix
from medseg.volumes import case_id, natural_key
from medseg.volumes_inputs import SUFFIXES, closed_folders

__all__ = ["PLACEHOLDER", "by_pattern", "compile_pattern", "fill", "id_of", "match_images", "match_pattern"]

PLACEHOLDER = re.compile(r"\{(\w+)\}")


def by_pattern(layout: Layout, spec: DatasetSpec, root: Path) -> tuple[list[Case], Problems]:
    cases: list[Case] = []
    problems: Problems = []
    for part in PARTS:
        files: PartFiles | None = getattr(layout, part)
        if files is None:
            continue
        if closed := _closed(files, root):
            problems += closed
            continue
        found = [(id_of(values, path, files.id), values, path) for values, path in match_images(files, root)]
        if not found and files.ids is not None and not (root / files.ids).exists():
            continue  # the set is not here at all, or in another layout
        wanted = None if files.ids is None else _read_ids(files.ids, spec, root, problems)
        if wanted is not None:
            problems += [
                DataError(
                    "an id of the list has no image",
                    code="E350",
                    case=name,
                    file=files.ids,
                    expected=files.image[0],
                    fix="add the image, or take its id out of the list",
                )
                for name in sorted(wanted - {name for name, _, _ in found}, key=natural_key)
            ]
        chosen = [entry for entry in found if wanted is None or entry[0] in wanted]
        for name, values, path in chosen:
            cases.append(_pattern_case(name, values, path, files, part, spec, root, problems))
        if part != "test" and wanted is None and chosen:
            problems += _orphans(files, [values for _, values, _ in chosen], root)
    return cases, problems


def _closed(files: PartFiles, root: Path) -> Problems:
    """Folders of a part that may not be looked into: what lies there would be missing without a word."""
    patterns = (text for text in (*files.image, files.label, files.instances, files.fov) if text is not None)
    folders = dict.fromkeys(folder for text in patterns for folder in closed_folders(_wildcard(text), root))
    text, fix = "a folder of the data set cannot be read", "let your user read it, or move it out of the data set"
    return [FormatError(text, code="E308", file=folder, found="Permission denied", fix=fix) for folder in folders]


def _pattern_case(
    name: str,
    values: dict[str, str],
    path: Path,
    files: PartFiles,
    part: str,
    spec: DatasetSpec,
    root: Path,
    problems: Problems,
) -> Case:
    def one(pattern: str | None, what: str, *, needed: bool) -> Path | None:
        if pattern is None:
            return None
        target = root / fill(pattern, values)
        if not target.exists() and not target.is_symlink():
            if needed:
                fix = f"add the {what}, or remove the image"
                problems.append(
                    DataError(f"the {what} of an image is missing", code="E350", case=name, file=target, fix=fix)
                )
            return None
        return stay_inside(target, root, spec, problems, name)

    needed = part != "test"
    images = [stay_inside(path, root, spec, problems, name)]
    images += [
        one(pattern, f"image of channel {spec.channels[i]}", needed=True)
        for i, pattern in enumerate(files.image[1:], 1)
    ]
    instances: list[Path] = []
    if files.instances is not None and "*" in files.instances:
        # of what is written, `*` alone means more than itself; nothing in a case's own names does
        written = "*".join(map(glob.escape, files.instances.split("*")))
        pattern = fill(written, {name: glob.escape(value) for name, value in values.items()})
        instances = sorted((root / text for text in glob.glob(pattern, root_dir=root)), key=natural_key)
        instances = [p for p in (stay_inside(path, root, spec, problems, name) for path in instances) if p is not None]
        if not instances and needed:
            place, fix = root / fill(files.instances, values), "add its masks; for no objects, one mask that is all 0"
            problems.append(DataError("no instance mask for an image", code="E350", case=name, file=place, fix=fix))
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


def _orphans(files: PartFiles, found: list[dict[str, str]], root: Path) -> Iterator[MedsegError]:
    pattern = files.label or files.instances
    if pattern is None or "*" in pattern:
        return
    ids = {id_of(values, None, files.id) for values in found}
    known = {tuple(values.items()) for values in found}  # a DICOM folder's id is none of its own
    for values, path in match_pattern(pattern, root):
        text = path.relative_to(root).as_posix()
        own = tuple((key, values[key]) for key in found[0])
        if own not in known and not _is_of(files.image[0], text, values, _fixed(pattern) + 1):
            name, fix = id_of(values, None, files.id), "add the image, or remove the label"
            expected = fill(files.image[0], values)
            other = _other_kind(root / expected)
            if any(name.startswith(start) and not name[len(start)].isalnum() for start in ids):
                fix = "an image has one label: move those of other observers elsewhere, or add the image"
            if other is not None:
                fix = "the images of a set have one suffix: convert this one, or add a table with --csv"
            yield DataError(
                "a label has no image", code="E351", case=name, file=path, expected=expected,
                found=other and other.relative_to(root), fix=fix,
            )  # fmt: skip


def _other_kind(image: Path) -> Path | None:
    """An image under the same name with another suffix."""
    stem = image.name[: len(image.name) - len(written_suffix(image))]
    found = image.parent.glob(f"{glob.escape(stem)}.*") if image.parent.is_dir() else ()
    return next((path for path in sorted(found) if written_suffix(path).lower() in SUFFIXES), None)


def match_images(files: PartFiles, root: Path) -> list[tuple[dict[str, str], Path]]:
    """`match_pattern` for the images of a part, without the files that are its labels, masks or further channels.

    Where the pattern of images fits these too (`{id}.png` beside `{id}_mask.png`), a file belongs to the pattern with
    more fixed text: `x1_mask.png` is the label of `x1` and no image `x1_mask`.
    """
    first = files.image[0]
    others = [text for text in (files.label, files.instances, files.fov, *files.image[1:]) if text and "*" not in text]
    return [
        (values, path)
        for values, path in match_pattern(first, root)
        if not any(_is_of(other, path.relative_to(root).as_posix(), values, _fixed(first)) for other in others)
    ]


def match_pattern(pattern: str, root: Path) -> list[tuple[dict[str, str], Path]]:
    """(values of the placeholders, path) for everything below `root` that fits the pattern, in natural order."""
    compiled = compile_pattern(pattern)
    matches = glob.glob(_wildcard(pattern), root_dir=root)
    pairs = ((compiled.fullmatch(Path(text).as_posix()), root / text) for text in matches)
    found = [(match.groupdict(), path) for match, path in pairs if match]
    return sorted(found, key=lambda pair: natural_key(pair[1]))


def _wildcard(pattern: str) -> str:
    return "*".join(map(glob.escape, PLACEHOLDER.split(pattern)[::2]))


@lru_cache(maxsize=64)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """What a path has to look like, with a group for each placeholder."""
    literal = PLACEHOLDER.split(pattern)  # text, name, text, name, ..., text
    seen: set[str] = set()
    expression = re.escape(literal[0])
    for name, text in zip(literal[1::2], literal[2::2], strict=True):
        # a name's second appearance has to hold the same text as its first
        expression += (f"(?P={name})" if name in seen else f"(?P<{name}>[^/]+?)") + re.escape(text)
        seen.add(name)
    return re.compile(expression)


def _fixed(pattern: str) -> int:
    return len(PLACEHOLDER.sub("", pattern))


def _is_of(pattern: str, text: str, values: dict[str, str], least: int) -> bool:
    """Whether a file with these values fits another pattern of at least so much fixed text as another case's file."""
    match = compile_pattern(pattern).fullmatch(text) if _fixed(pattern) >= least else None
    return match is not None and match.groupdict() != values


def fill(pattern: str, values: Mapping[str, str]) -> str:
    """The pattern with a text in the place of each placeholder."""
    return PLACEHOLDER.sub(lambda match: values[match[1]], pattern)


def id_of(values: dict[str, str], path: Path | None, pattern: str | None = None) -> str:
    """The id of the case with these values of the placeholders, whose image lies at `path`; `pattern`: of the ids."""
    if path is not None and path.is_dir():
        return case_id(path)  # names of DICOM folders may hold the patient's
    if pattern is not None:
        return fill(pattern, values)
    return values["id"] if "id" in values else "_".join(values.values())


def _read_ids(pattern: str, spec: DatasetSpec, root: Path, problems: Problems) -> set[str]:
    path = stay_inside(root / pattern, root, spec, problems, None)
    try:
        text = path.read_text(encoding="utf-8") if path else ""
    except (OSError, UnicodeDecodeError) as error:
        problems.append(ConfigError("cannot read the list of ids", code="E111", file=path, found=error))
        return set()
    return {line.split()[0] for line in text.splitlines() if line.strip()}
