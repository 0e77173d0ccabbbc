"""What the patterns of a model's data set say of the inputs of `medseg predict`: names of cases, files of one case."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medseg import files, volumes
from medseg.data_pattern import compile_pattern, id_of
from medseg.errors import MedsegError
from medseg.inference.outputs import Job, make_job, take_name

__all__ = ["join_channels", "name_case"]

_PLACEHOLDER = re.compile(r"\{\w+\}")


def name_case(source: Path, spec: Any) -> str | None:
    """The id of a case whose folder bears it (`{id}/t1.nii.gz`), as the patterns say; None where its file does.

    Of several channels each has the name of its file behind it, until they are joined.
    """
    for patterns in _patterns(spec):
        for pattern in patterns:
            if "/" in _tail(pattern) and source.is_file() and (found := _fit(_expression(pattern), source)):
                return f"{found[1]}_{volumes.case_id(source)}" if len(patterns) > 1 else found[1]
    return None


def join_channels(jobs: Sequence[Job], spec: Any) -> list[Job]:
    """One job for the channels of a case, where the model takes several and each is a file; other jobs as they are.

    Files belong together that lie in one folder, are named as the patterns of the model's data set say
    (`{id}_t1.nii.gz`, `{id}_t2.nii.gz`; `{id}/t1.nii.gz`, `{id}/t2.nii.gz`) or as nnU-Net does (`_0000`, `_0001` ...),
    and hold one channel each. Where one is missing, the others stay as they are, and are refused when they are read.

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


def _ways(spec: Any) -> list[list[re.Pattern[str]]]:
    """What the files of the channels may look like, for each way of naming them."""
    told = [names for names in _patterns(spec) if len(set(map(_tail, names))) == spec.in_channels]
    nnunet = [re.compile(rf"(.*/)(?P<id>[^/]+)_{k:04d}\.[^/]+") for k in range(spec.in_channels)]
    return [*(list(map(_expression, names)) for names in told), nnunet]


def _patterns(spec: Any) -> list[Sequence[str]]:
    """The patterns of the images of each part, where they tell cases apart."""
    parts = [part for layout in spec.files for part in (layout.training, layout.validation, layout.test)]
    return [part.image for part in parts if part is not None and all(map(_PLACEHOLDER.search, part.image))]


def _tail(pattern: str) -> str:
    """What of a pattern tells cases apart wherever they lie: the last name, and where that is the same for all
    (`t1.nii.gz`) the folders from the first with a placeholder on."""
    parts = pattern.split("/")
    told = [number for number, part in enumerate(parts) if _PLACEHOLDER.search(part)]
    return parts[-1] if not told or told[-1] == len(parts) - 1 else "/".join(parts[told[0] :])


def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile("(.*/)" + compile_pattern(_tail(pattern)).pattern)


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
