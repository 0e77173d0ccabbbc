"""Facts about data sets, as datasets.yaml tells them: files, channels, labels, splitting, licence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from medseg.config_model import Strict, from_plain

__all__ = ["DatasetSpec", "Download", "Layout", "Objects", "PartFiles", "Select", "SplitRule"]

_PLACEHOLDER = re.compile(r"\{(\w*)\}")
_ONE_OR_MORE = BeforeValidator(lambda v: (v,) if isinstance(v, str | dict) else tuple(v) if isinstance(v, list) else v)
# `./a//b/` is `a/b`: what is found on disk is compared with the text
Pattern = Annotated[str, Field(min_length=1, max_length=500), AfterValidator(lambda text: Path(text).as_posix())]
Byte = Annotated[int, Field(ge=0, le=255)]


class PartFiles(Strict):
    """Where the files of one part (training, validation, test) are, as patterns below the data root.

    A pattern holds one or more placeholders such as `{id}` or `{video}`, each standing for a piece of a name without
    `/`. A case's id is the value of `{id}`, or of all placeholders joined by `_`; or `id` with these in their places
    (`{id}_train`), where the parts have files of one name. The same placeholders stand in the patterns of label,
    instances and fov. `*` is allowed in `instances` alone: one file for each instance.
    """

    image: Annotated[tuple[Pattern, ...], _ONE_OR_MORE] = Field(min_length=1)
    label: Pattern | None = None
    instances: Pattern | None = None
    fov: Pattern | None = None
    id: Pattern | None = None
    ids: Pattern | None = None  # a text file with one id in each line: only these cases count

    @model_validator(mode="after")
    def _check_placeholders(self) -> PartFiles:
        wanted = set(_PLACEHOLDER.findall(self.image[0]))
        if not wanted:
            raise ValueError(f"a pattern with {{id}} in `image`, not {self.image[0]!r}")
        for name in ("image", "label", "instances", "fov", "id"):
            patterns = self.image if name == "image" else (getattr(self, name) or self.image[0],)
            for pattern in patterns:
                _check_pattern(name, pattern, wanted)
        if self.ids is not None and _PLACEHOLDER.search(self.ids):
            raise ValueError("one file in `ids`, without placeholders")
        return self


class Layout(Strict):
    """One way in which a set lies on disk: patterns for each part, or a folder or table that describes itself."""

    training: PartFiles | None = None
    validation: PartFiles | None = None
    test: PartFiles | None = None
    msd: Pattern | None = None  # a folder with a Medical Segmentation Decathlon dataset.json
    nnunet: Pattern | None = None  # a folder with an nnU-Net (version 2) dataset.json
    csv: Pattern | None = None  # a table: image, label, perhaps id, instances, fov, group (or patient), split

    @model_validator(mode="after")
    def _check_one(self) -> Layout:
        ways = [name for name in ("training", "msd", "nnunet", "csv") if getattr(self, name) is not None]
        if len(ways) != 1:
            raise ValueError(f"exactly one of training, msd, nnunet, csv; found {', '.join(ways) or 'none'}")
        if ways != ["training"] and (self.validation or self.test):
            raise ValueError(f"validation and test only beside training; {ways[0]} tells its parts itself")
        if set("{}*") & set(self.nnunet or ""):
            raise ValueError(f"no {{, }} or * in `nnunet`; found {self.nnunet!r}")
        return self


class Select(Strict):
    """Only the cases that a table says: rows of `file` whose `column` holds `value` (or one of several)."""

    file: Pattern
    column: str
    value: Annotated[tuple[str, ...], _ONE_OR_MORE] = Field(min_length=1)
    id: str = "id"  # the column with the case's id


class SplitRule(Strict):
    """What must never stand on both sides of a split.

    unit: what a group is, for messages and reports. `group`: a regular expression searched in the case's id; its first
    parenthesis is the group (the whole match without one); each case is a group of its own when None. For
    `unit: sequence` the cases are frames or neighbouring slices in order: whole sequences are kept together when there
    are at least as many as folds; else each sequence is cut into contiguous blocks, and `gap` frames on both sides of
    the validation block are used for nothing.
    """

    unit: Literal["case", "patient", "volume", "sequence", "image"] = "case"
    group: str | None = Field(default=None, max_length=200)
    gap: int = Field(default=1, ge=0)

    @field_validator("group")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"a regular expression ({error})") from None
        return value


class Download(Strict):
    """An archive that `medseg data fetch` may load: its address, checksum and size."""

    url: str = Field(pattern=r"^https://")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(gt=0)
    folder: Pattern | None = None  # unpack here, below the data root


class Objects(Strict):
    """How single objects are told apart in a label without numbers: see `medseg.transforms.arrays.parted_components`.

    `neck`: necks up to twice this many voxels wide are cut; `min_size`: smaller objects, in voxels, are none.
    """

    neck: float = Field(default=0.0, ge=0)
    min_size: int = Field(default=1, ge=1)


class DatasetSpec(Strict):
    """Everything that the program needs to know about a data set; facts, not choices.

    `labels` maps the indices 0, 1, ... to names; `ignore` is the index of voxels that count for nothing. `encoding`
    says how a stored label value becomes an index: "index" as it is, "nonzero" (anything but 0 is 1), or a mapping
    {stored: index}, where a stored 0 stays 0 unless the mapping says otherwise. `colours` maps {index: [r, g, b]} for
    labels stored as colours. `instances: components` takes connected components (faces) of each label as instances
    where the files have no instance labels of their own; `instances: {neck: ..., min_size: ...}` does so after cutting
    thin necks, without specks. Outside of the field of view nothing is scored; `outside_fov: background` says that
    there is nothing to segment either (the black rim of a photograph), which networks then learn, while of `unknown`
    voxels they learn nothing and mark there what they like.
    """

    name: str
    title: str
    modality: str
    dims: Literal[2, 3]
    channels: tuple[str, ...] = Field(min_length=1)
    colour: Literal["grey", "luma", "rgb"] | None = None
    labels: dict[int, str]
    ignore: int | None = Field(default=None, ge=0, le=32767)
    outside_fov: Literal["unknown", "background"] = "unknown"
    unit: Literal["mm", "px"]
    files: Annotated[tuple[Layout, ...], _ONE_OR_MORE] = Field(min_length=1)
    encoding: Literal["index", "nonzero"] | dict[int, int] = "index"
    colours: dict[int, tuple[Byte, Byte, Byte]] | None = None
    instances: Literal["components"] | Objects | None = None
    select: Select | None = None
    split: SplitRule = SplitRule()
    nan: Literal["refuse"] | float = "refuse"
    affine: Literal["auto", "sform", "qform"] = "auto"
    links: bool = False  # links and paths may lead out of the data root
    protocol: str | dict[str, dict[str, Any]] | None = None
    licence: str = "unknown"
    citation: str = ""
    url: str = ""
    download: Download | None = None

    @model_validator(mode="after")
    def _check(self) -> DatasetSpec:
        indices = sorted(self.labels)
        if len(indices) < 2 or indices != list(range(len(indices))):
            raise ValueError(f"labels 0, 1, 2, ... without gaps, at least two; found {indices}")
        if len(set(self.labels.values())) != len(indices):
            raise ValueError("a name of its own for each label")
        if "all" in self.labels.values():
            raise ValueError("no label called `all`: scores of all labels stand under that name")
        if self.ignore is not None and self.ignore in self.labels:
            raise ValueError(f"an `ignore` that is not one of the labels; found {self.ignore}")
        if self.colour == "rgb" and len(self.channels) != 3:
            raise ValueError("three channels with `colour: rgb`")
        if self.colour in ("grey", "luma") and len(self.channels) != 1:
            raise ValueError("one channel with `colour: grey` or `luma`")
        known = {*indices, self.ignore}
        for key, targets in (("encoding", _targets(self.encoding)), ("colours", self.colours or {})):
            if unknown := sorted(set(targets) - known):
                raise ValueError(f"indices in `{key}` that are labels or `ignore`; found {unknown}")
        if self.colours and self.encoding != "index":
            raise ValueError("either `colours` or `encoding`")
        return self

    @property
    def in_channels(self) -> int:
        """Channels of the image."""
        return len(self.channels)

    @property
    def out_channels(self) -> int:
        """Classes, background included."""
        return len(self.labels)

    @property
    def has_instances(self) -> bool:
        """Whether single objects can be told apart in the reference."""
        parts = [p for way in self.files for p in (way.training, way.validation, way.test) if p is not None]
        return self.instances is not None or any(part.instances for part in parts)

    @classmethod
    def from_dict(cls, value: dict[str, Any], *, source: str = "data set facts of a checkpoint") -> DatasetSpec:
        """The spec from `to_dict`'s result (checkpoints carry it); `source` is what messages call the file.

        Raises:
            ConfigError: everything that is wrong with it.
        """
        return from_plain(cls, value, source)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON and YAML can hold; keys with their default value are left out."""
        return self.model_dump(mode="json", exclude_defaults=True)


def _check_pattern(name: str, pattern: str, wanted: set[str]) -> None:
    found = set(_PLACEHOLDER.findall(pattern))
    if "" in found or any(c in _PLACEHOLDER.sub("", pattern) for c in "{}"):
        raise ValueError(f"placeholders with a name, such as {{id}}, in `{name}`; found {pattern!r}")
    if found != wanted:
        raise ValueError(f"the placeholders of `image` ({', '.join(sorted(wanted))}) in `{name}`; found {pattern!r}")
    if "*" in pattern and name != "instances":
        raise ValueError(f"no * in `{name}`; found {pattern!r}")


def _targets(encoding: Any) -> list[int]:
    return list(encoding.values()) if isinstance(encoding, dict) else []
