"""A case: the files that belong to one image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medseg.config import DatasetSpec
from medseg.errors import ConfigError, MedsegError
from medseg.files import inside

__all__ = ["PARTS", "PART_NAMES", "Case", "Problems", "stay_inside"]

PARTS = ("training", "validation", "test")
# how they are called in tables and folders made elsewhere
PART_NAMES = {"train": "training", "val": "validation", "valid": "validation", "testing": "test"}
PART_NAMES |= {part: part for part in PARTS}
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


def stay_inside(path: Path, root: Path, spec: DatasetSpec, problems: Problems, case: str | None) -> Path | None:
    """The path, if it stays inside the data root after resolving links (or the set allows it to leave)."""
    if spec.links:
        return path
    try:
        inside(root, path.absolute())  # both may be relative to the working folder, and `inside` joins what is relative
    except ConfigError as error:
        error.case, error.fix = (
            case,
            "move the file into the data root, or set `links: true` for this set in datasets.yaml "
            "(`medseg data add --links`)",
        )
        problems.append(error)
        return None
    return path
