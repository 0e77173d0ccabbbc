"""Images whose channels are files of their own: which inputs of `medseg predict` are one case."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medseg import files, volumes
from medseg.errors import MedsegError
from medseg.inference.outputs import Job, make_job, take_name

__all__ = ["join_channels"]

_PLACEHOLDER = re.compile(r"\{\w+\}")


def join_channels(jobs: Sequence[Job], spec: Any) -> list[Job]:
    """One job for the channels of a case, where the model takes several and each is a file; other jobs as they are.

    Files belong together that lie in one folder, are named as the patterns of the model's data set say
    (`{id}_t1.nii.gz`, `{id}_t2.nii.gz`) or as nnU-Net does (`_0000`, `_0001` ...), and hold one channel each. Where one
    is missing, the others stay as they are, and are refused when they are read.

    Raises:
        UsageError: E103, two cases with one output.
    """
    if spec.in_channels < 2:
        return list(jobs)
    ways = _ways(spec)
    groups: dict[tuple[int, Path, str], dict[int, Job]] = {}
    for job in jobs:
        for way, names in enumerate(ways):
            for channel, name in enumerate(names):
                if found := name.fullmatch(job.source.name):
                    groups.setdefault((way, job.source.parent, "_".join(found.groups())), {})[channel] = job
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
    """The names that the channels of a case may have, for each way of naming them."""
    ways = []
    for layout in spec.files:
        for part in (layout.training, layout.validation, layout.test):
            names = [Path(pattern).name for pattern in part.image] if part is not None else []
            if len(set(names)) == spec.in_channels and all(map(_PLACEHOLDER.search, names)):
                ways.append([_expression(name) for name in names])
    return [*ways, [re.compile(rf"(.+)_{channel:04d}(?:\.[^/]+)") for channel in range(spec.in_channels)]]


def _expression(name: str) -> re.Pattern[str]:
    return re.compile("(.+?)".join(map(re.escape, _PLACEHOLDER.split(name))))


def _is_one(job: Job, dims: int) -> bool:
    """Whether a file holds a single channel, so that another one's is no case of its own."""
    try:
        return volumes.read_geometry(job.source, dims=dims)[1] == 1
    except MedsegError:
        return False
