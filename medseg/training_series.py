"""All folds of a cross-validation that was begun: which runs belong to it, and what is left to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.checkpoint_run import choices_of
from medseg.config import Pipeline, load_pipeline
from medseg.data import data_root
from medseg.errors import CheckpointError
from medseg.run import RunFolder, is_run, newest_run, start_time

__all__ = ["Series", "take_up"]


@dataclass(frozen=True)
class Series:
    """A cross-validation that goes on.

    Attributes:
        pipeline: of all its runs, named like their folder.
        root: the data root of the newest run.
        output: the folder of runs, which holds the folder of this pipeline's.
        runs: fold -> its newest run that can go on or is finished.
        init: the run or checkpoint whose weights its folds began with, if any.
    """

    pipeline: Pipeline
    root: Path
    output: Path
    runs: dict[int, Path]
    init: str | None = None

    def is_finished(self, fold: int) -> bool:
        """Whether the fold's run came to its end."""
        return fold in self.runs and RunFolder(self.runs[fold]).status.get("state") == "finished"


def take_up(folder: str | Path, *, data: str | Path | None = None) -> Series:
    """The series to which the newest run in `folder` belongs: runs beside it of the same choices, split and `init`.

    How long a run is trained may differ, as it may where a single run is continued. Of several runs of one fold the
    newest counts; one that ended before its first checkpoint does not, its fold is trained anew.

    Args:
        folder: `runs/NAME`, or one of its runs.
        data: the data root; the newest run's own when None.

    Raises:
        CheckpointError: E360, there is no run, or it is not one of several folds.
        UsageError: E102, the data are not where they were.
    """
    newest = newest_run(folder)
    if not is_run(newest):
        raise CheckpointError("there is no run here", code="E360", file=newest, fix="give the folder of its runs")
    wanted = _choices(newest)
    if wanted is None or wanted[1] is None:
        raise CheckpointError("this run is none of several folds", code="E360", file=newest)
    runs = {}
    for run in sorted(filter(is_run, newest.parent.iterdir()), key=lambda path: (start_time(path), path.name)):
        found = _choices(run)
        begun = any(run.glob("last*.pt")) or RunFolder(run).status.get("state") == "finished"
        if begun and found is not None and found[0] == wanted[0] and found[1] is not None:
            runs[found[1]] = run
    root = data_root(data, known=RunFolder(newest).data)
    # checked when the series began; what only a new fold needs (a file of weights) is looked for by that fold
    pipeline = load_pipeline(newest / "pipeline.yaml", root=root, check=False)
    pipeline = pipeline.model_copy(update={"name": newest.parent.name})
    return Series(pipeline, root, newest.parent.parent, runs, wanted[0]["init"])


def _choices(run: Path) -> tuple[dict[str, Any], int | None] | None:
    """What was chosen, without what may change in a run, and its fold; None where that cannot be read."""
    folder = RunFolder(run)
    chosen, split = choices_of(run / "pipeline.yaml"), folder.read_json("split.json")
    if chosen is None:
        return None
    try:
        more = {
            "split": (split["seed"], split["folds"]),
            "init": (folder.read_json("provenance.json") or {}).get("init"),
        }
        return {**chosen, **more}, split["fold"]
    except (KeyError, TypeError, AttributeError):
        return None
