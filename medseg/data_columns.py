"""What the columns of a table of cases are, in the spellings that people and other programs use."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from medseg.data_case import PART_NAMES
from medseg.errors import ConfigError, listed

__all__ = ["IMAGE_COLUMN", "canonical_name", "find_columns", "rename_columns", "tell_columns", "unread_columns"]

IMAGE_COLUMN = re.compile("image_[0-9]+")
_EXACT = ("id", "fov", "group")  # `ID` is often a patient's, `FOV` a size, `Group` an arm of a study
_SPELLINGS = {
    "image": "image images img imgs imagepath imagefile imagefilename imgpath imgfile",
    "label": "label labels mask masks seg segmentation labelpath labelfile maskpath maskfile maskfilename "
    "segpath segmentationpath segmentationfile",
    "instances": "instances",
    "patient": "patient patientid patientidentifier subject subjectid participant participantid",  # the last as in BIDS
    "split": "split subset partition set",
}
_CANONICAL = {spelling: name for name, text in _SPELLINGS.items() for spelling in text.split()}


def find_columns(columns: Sequence[str], rows: Sequence[Mapping[str, str]], path: Path) -> dict[str, str]:
    """Canonical name -> the column that is read as it, as the table spells it.

    Upper and lower case, spaces, dashes and underscores do not matter. A column with the canonical name itself comes
    before other spellings of images and labels; a split under another name counts where all it says are parts. Beside
    `group` no patient is read.

    Raises:
        ConfigError: E119, several columns may be meant and say different things.

    >>> find_columns(["image", "Mask", "Patient ID", "age"], [], Path("t.csv"))
    {'image': 'image', 'label': 'Mask', 'patient': 'Patient ID'}
    """
    found: dict[str, list[str]] = {}
    for column in columns:
        name = canonical_name(column)
        if name and not (name == "split" != column and not _are_parts(column, rows)):
            found.setdefault(name, []).append(column)
    if "group" in found:
        found.pop("patient", None)
    if "instances" in found and "label" not in columns:
        found.pop("label", None)  # `Mask` beside `instances` may be the same objects: told as not read
    return {name: _one(name, given, rows, path) for name, given in found.items()}


def canonical_name(column: str) -> str:
    """What a column of this name may be; "" for one that says nothing to medseg.

    >>> canonical_name("Patient ID"), canonical_name("img-2"), canonical_name("ID")
    ('patient', 'image_2', '')
    """
    plain = _plain(column)
    if column in _EXACT:
        return column
    if number := re.fullmatch("(?:image|img)([0-9]+)", plain):
        return f"image_{number[1]}"
    return _CANONICAL.get(plain, "")


def rename_columns(row: Mapping[str, str], known: Mapping[str, str]) -> dict[str, str]:
    """The cells of a row that are read, by the canonical names of `find_columns`."""
    return {name: row.get(column, "") for name, column in known.items()}


def unread_columns(columns: Sequence[str], known: Mapping[str, str]) -> list[str]:
    """The columns of a table that `find_columns` took for nothing."""
    return [column for column in columns if column and column not in known.values()]


def tell_columns(columns: Sequence[str], known: Mapping[str, str]) -> list[str]:
    """Notes for the user: which column was taken for what, and which are not read.

    >>> tell_columns(["image", "mask", "age"], {"image": "image", "label": "mask"})[0]
    'columns that are read: image, mask as label'
    """
    taken = [column if name == column else f"{column} as {name}" for name, column in known.items()]
    notes = [f"columns that are read: {', '.join(taken)}"]
    if unread := unread_columns(columns, known):
        notes.append(f"columns that are not read: {', '.join(unread)} (a patient's is called group or patient)")
    return notes


def _plain(column: str) -> str:
    return re.sub(r"[\s_-]", "", column).lower()


def _are_parts(column: str, rows: Sequence[Mapping[str, str]]) -> bool:
    """Whether all cells name parts; of another spelling of `split` itself who reads the parts says what is none."""
    return _plain(column) == "split" or all((row.get(column) or "train").lower() in PART_NAMES for row in rows)


def _one(name: str, given: Sequence[str], rows: Sequence[Mapping[str, str]], path: Path) -> str:
    if name in given and name != "patient":
        return name
    cells = {column: [row.get(column, "") for row in rows] for column in given}
    full = [column for column in given if any(cells[column])] or list(given)
    for other in full[1:]:
        if not _alike(cells[full[0]], cells[other], as_groups=name == "patient"):
            fix = f"leave one of them, or call it `{name}` and rename the others"
            if name == "patient":
                fix = "leave the column that tells patients apart, or call it `group`: then the others are not read"
            message = f"several columns that may be the {name}, and they differ"
            raise ConfigError(message, code="E119", field=name, file=path, found=listed(full), fix=fix)
    return full[0]


def _alike(first: Sequence[str], second: Sequence[str], *, as_groups: bool) -> bool:
    """Whether two columns say the same; of patients, whether the same rows belong together whatever they are called."""
    if not as_groups:
        return list(first) == list(second)
    return len(set(first)) == len(set(second)) == len(set(zip(first, second, strict=True)))
