"""What the patterns of a model's data set say of the inputs of `medseg predict`: names of cases, files of one case."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medseg import files, volumes
from medseg.data_pattern import PLACEHOLDER, compile_pattern, fill, id_of
from medseg.errors import MedsegError, counted
from medseg.inference.outputs import Job, make_job, take_name

__all__ = ["join_channels", "leave_labels", "name_case"]


def name_case(source: Path, spec: Any) -> str | None:
    """The id of a case where folders tell cases or channels apart (`{id}/t1.nii.gz`, `t1/{id}.nii.gz`), as the patterns
    say; None where names of files do.

    Where folder and file bear it together (`videos/{video}/t{frame}.tif`), only files that lie as in the data set have
    it: one called t7 may lie anywhere. Of several channels each has its name behind it, until they are joined.
    """
    for patterns in _patterns(spec):
        tails = patterns if any(map(_is_shared, patterns)) else _tails(patterns)
        for channel, tail in enumerate(tails):
            if "/" in tail and source.is_file() and (found := _fit(_expression(tail), source)):
                return f"{found[1]}_{spec.channels[channel]}" if len(tails) > 1 else found[1]
    return None


def join_channels(jobs: Sequence[Job], spec: Any) -> list[Job]:
    """One job for the channels of a case, where the model takes several and each is a file; other jobs as they are.

    Files belong together that lie in one folder and are named as the patterns of the model's data set say
    (`{id}_t1.nii.gz`, `{id}_t2.nii.gz`; `{id}/t1.nii.gz`, `{id}/t2.nii.gz`; `t1/{id}.nii.gz`, `t2/{id}.nii.gz`) or as
    nnU-Net does (`_0000`, `_0001` ...), and hold one channel each. Where one is missing, the others stay as they are,
    and are refused when they are read.

    Raises:
        UsageError: E103, two cases with one output.
    """
    if spec.in_channels < 2:
        return list(jobs)
    ways = _ways(spec)
    groups: dict[tuple[int, str, str], dict[int, Job]] = {}
    for job in jobs:
        for way, names in enumerate(ways):
            for channel, name in enumerate(names):
                if found := _fit(name, job.source):
                    groups.setdefault((way, *found), {})[channel] = job
    joined: dict[Path, Job] = {}  # of each channel's file
    for (_, _, case), channels in groups.items():
        parts = [channels[k] for k in sorted(channels)]
        if (
            len(parts) == spec.in_channels
            and not joined.keys() & {part.source for part in parts}
            and _is_one(parts[0], spec.dims)
        ):
            first, *others = (part.source for part in parts)
            folder, suffix = parts[0].output.parent, files.full_suffix(parts[0].output)
            whole = make_job(case, first, folder, suffix, tuple(others))
            joined |= {part.source: whole for part in parts}
    result = list(dict.fromkeys(joined.get(job.source, job) for job in jobs))
    taken: dict[str, Path] = {}
    for job in result:
        take_name(taken, job)
    return result


def leave_labels(found: Sequence[Path], named: Sequence[str | Path], spec: Any) -> tuple[list[Path], list[str]]:
    """The inputs without the labels and masks beside their images, named as in the model's data set; and notes.

    Where that has `{id}.tif` and `{id}_mask.tif`, `a_mask.tif` beside `a.tif` is none; where it has `{id}/ct.nii.gz`
    and `{id}/seg.nii.gz`, no `seg.nii.gz` beside a `ct.nii.gz` is. What was `named` by its own path stays, and a note
    says so.
    """
    by_name = {Path(os.path.abspath(path)).as_posix(): path for path in found}
    labels: dict[Path, None] = {}
    for image, others in _beside(spec):
        for other in others:
            pattern = compile_pattern(other)
            for text, path in by_name.items():
                parts, start = text.split("/"), -other.count("/") - 1
                if match := pattern.fullmatch("/".join(parts[start:])):
                    own = "/".join([*parts[:start], fill(image, match.groupdict())])
                    if own in by_name and own != text:
                        labels[path] = None
    kept = labels.keys() & {Path(name) for name in named}
    notes = []
    if kept:
        count = counted(len(kept), "input")
        notes.append(f"note: {count} named like a label of another input, as in {spec.name}: computed like any image")
    if left := labels.keys() - kept:
        notes.append(f"note: {counted(len(left), 'file')} named like a label of an input, as in {spec.name}: left out")
    return [path for path in found if path not in labels or path in kept], notes


def _beside(spec: Any) -> list[tuple[str, list[str]]]:
    """Last names in the patterns of images, and of those labels and masks that have more text and lie beside them.

    With the folder's name where that alone tells a label's case: `{id}/ct.nii.gz`, `{id}/seg.nii.gz`.
    """
    result = []
    for part in (part for layout in spec.files for part in (layout.training, layout.validation, layout.test)):
        if part is None or len(part.image) > 1:
            continue
        folder, _, image = part.image[0].rpartition("/")
        others = [text.rpartition("/") for text in (part.label, part.instances, part.fov) if text and "*" not in text]
        fixed = len(PLACEHOLDER.sub("", image))
        names = [
            name
            for place, _, name in others
            if place == folder and len(PLACEHOLDER.sub("", name)) > fixed
            and set(PLACEHOLDER.findall(name)) == set(PLACEHOLDER.findall(image)) != set()
        ]  # fmt: skip
        result.append((image, names))
        last = folder.rpartition("/")[2]
        if set(PLACEHOLDER.findall(image)) <= set(PLACEHOLDER.findall(last)) != set():
            plain = [n for place, _, n in others if place == folder and n != image and not PLACEHOLDER.search(n)]
            result.append((f"{last}/{image}", [f"{last}/{name}" for name in plain]))
    return result


def _ways(spec: Any) -> list[list[re.Pattern[str]]]:
    """What the files of the channels may look like, for each way of naming them."""
    told = [tails for tails in map(_tails, _patterns(spec)) if len(set(tails)) == spec.in_channels]
    nnunet = [re.compile(rf"(.*/)(?P<id>[^/]+)_{k:04d}\.[^/]+") for k in range(spec.in_channels)]
    return [*(list(map(_expression, tails)) for tails in told), nnunet]


def _patterns(spec: Any) -> list[Sequence[str]]:
    """The patterns of the images of each part, where they tell cases apart."""
    parts = [part for layout in spec.files for part in (layout.training, layout.validation, layout.test)]
    return [part.image for part in parts if part is not None and all(map(PLACEHOLDER.search, part.image))]


def _tails(patterns: Sequence[str]) -> list[str]:
    """What of the channels' patterns tells cases and channels apart wherever they lie: the last name; where that is
    the same for all cases (`t1.nii.gz`) the folders from the first with a placeholder on; where it is the same for all
    channels (`{id}.nii.gz`) as many folders as it takes."""
    split = [pattern.split("/") for pattern in patterns]
    tails = [parts[_start(parts) :] for parts in split]
    while len(set(map(tuple, tails))) < len(set(patterns)):
        tails = [parts[-len(tail) - 1 :] for parts, tail in zip(split, tails, strict=True)]
    return list(map("/".join, tails))


def _start(parts: Sequence[str]) -> int:
    """The number of the part of a pattern from which on it tells cases apart."""
    told = [number for number, part in enumerate(parts) if PLACEHOLDER.search(part)]
    return len(parts) - 1 if told[-1] == len(parts) - 1 else told[0]


def _is_shared(pattern: str) -> bool:
    """Whether the name of a file is a part of its case's id alone, the folders above it the rest."""
    whole, name = (set(PLACEHOLDER.findall(part)) for part in (pattern, pattern.split("/")[-1]))
    return "id" not in whole and bool(name) and name != whole


def _expression(tail: str) -> re.Pattern[str]:
    return re.compile("(.*/)" + compile_pattern(tail).pattern)


def _fit(expression: re.Pattern[str], source: Path) -> tuple[str, str] | None:
    """The folder, and the id of the case, of a file that looks so."""
    found = expression.fullmatch(Path(os.path.abspath(source)).as_posix())
    return None if found is None else (found[1], id_of(found.groupdict(), None))


def _is_one(job: Job, dims: int) -> bool:
    """Whether a file holds a single channel, so that another one's is no case of its own."""
    try:
        return volumes.read_geometry(job.source, dims=dims)[1] == 1
    except MedsegError:
        return False
