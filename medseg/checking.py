"""`medseg data check`: every file of a data set read and held against the others, every problem told.

Checked for each case: all files whole and readable, values finite, label values allowed, image, label, instances and
field of view on one grid. Checked across cases: the same image under two names (by content), one patient or file in two
parts, a class that no training case shows, pictures of different depth. Reading is spread over threads: unpacking and
hashing release the interpreter's lock.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medseg.cache_prepare import choose_workers
from medseg.component import nearest
from medseg.config import DatasetSpec
from medseg.data import Case, check_parts, data_root, find_cases, read_channels, read_fov, read_reference
from medseg.data_layout import list_cases
from medseg.errors import DataError, LabelError, MedsegError, UsageError, counted
from medseg.volumes_labels import value_counts
from medseg.waiting import progress_of

__all__ = ["CheckReport", "check_case", "check_cases", "check_dataset"]


@dataclass
class CheckReport:
    """What a check found.

    Attributes:
        cases: number of cases that were read.
        problems: what keeps the set from being used, in the order of the cases.
        warnings: what is odd, but may be right (a constant image, an empty label).
        bytes: size of the files that were read.
        seconds: how long it took.
    """

    cases: int = 0
    problems: list[MedsegError] = field(default_factory=list)
    warnings: list[MedsegError] = field(default_factory=list)
    bytes: int = 0
    seconds: float = 0.0


@dataclass
class _Finding:
    problems: list[MedsegError]
    warnings: list[MedsegError]
    digest: str | None = None
    depth: str | None = None
    classes: frozenset[int] = frozenset()
    bytes: int = 0


def check_dataset(
    spec: DatasetSpec,
    root: str | Path,
    *,
    only: Sequence[str] | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> CheckReport:
    """Read every case of every part of a data set and list all problems.

    Args:
        spec: the data set's facts.
        root: the data root.
        only: ids of the cases to read; checks across cases are then left out.
        workers: threads; as many as cores and memory allow when None.
        progress: show on the error stream how far it is: a bar, or without a terminal a line now and then.

    Raises:
        UsageError: no such folder, not one case, or an id in `only` that does not exist. Problems of the data are
            returned, not raised.
    """
    started = time.monotonic()
    root = data_root(root)
    cases, problems = list_cases(spec, root)
    if not cases and not problems:
        find_cases(spec, root)  # raises, telling where was looked
    chosen = _choose(cases, only)
    if only:
        problems = [problem for problem in problems if problem.case in (None, *only)]
    findings = _read_all(chosen, spec, workers or choose_workers(chosen), progress)
    report = CheckReport(len(chosen), problems)
    told = {problem.file for problem in problems if problem.code == "E350"}  # not once more as E308
    for case in chosen:
        finding = findings[case.id, case.split]
        report.problems += [
            problem for problem in finding.problems if problem.code != "E308" or problem.file not in told
        ]
        report.warnings += finding.warnings
        report.bytes += finding.bytes
    if not only:
        duplicates, warnings = _duplicates(chosen, findings)
        absent, unneeded = _absent_classes(chosen, findings, spec)
        report.problems += [*duplicates, *check_parts(chosen), *absent, *_depths(chosen, findings)]
        report.warnings += [*warnings, *unneeded]
    report.seconds = time.monotonic() - started
    return report


def check_cases(
    spec: DatasetSpec, root: str | Path, only: Sequence[str] | None = None, workers: int | None = None
) -> list[MedsegError]:
    """The problems of `check_dataset` alone; an empty list is a sound data set."""
    return check_dataset(spec, root, only=only, workers=workers).problems


def check_case(case: Case, spec: DatasetSpec) -> tuple[list[MedsegError], list[MedsegError]]:
    """(problems, warnings) of one case, all its files read."""
    finding = _inspect(case, spec)
    return finding.problems, finding.warnings


def _choose(cases: list[Case], only: Sequence[str] | None) -> list[Case]:
    if not only:
        return cases
    known = {case.id for case in cases}
    for name in only:
        if name not in known:
            near = nearest(name, known)
            fix = f"did you mean `{near}`?" if near else None
            raise UsageError("no such case", code="E103", field="--only", found=name, fix=fix)
    return [case for case in cases if case.id in only]


def _read_all(cases: list[Case], spec: DatasetSpec, workers: int, progress: bool) -> dict[tuple[str, str], _Finding]:
    findings = {}
    with (
        progress_of(f"reading {spec.name}", len(cases), shown=progress) as tick,
        ThreadPoolExecutor(max_workers=workers) as pool,
    ):
        waiting = {pool.submit(_inspect, case, spec): case for case in cases}
        for future in as_completed(waiting):
            case = waiting[future]
            findings[case.id, case.split] = future.result()
            tick()
    return findings


def _inspect(case: Case, spec: DatasetSpec) -> _Finding:
    finding = _Finding([], [])
    image = None
    try:
        finding.bytes = sum(path.stat().st_size for path in case.files if path.is_file())
        if case.images:
            image, notes = read_channels(case.images, spec, case.id)
            finding.digest = _digest(image.array)
            finding.depth = str(image.array.dtype) if image.geometry.kind == "picture" else None
            finding.warnings += [_warning(note, case) for note in notes]
    except MedsegError as error:
        finding.problems += error.problems
    for read in (read_reference, read_fov):
        try:
            arrays, notes = read(case, spec, None if image is None else image.geometry)
        except MedsegError as error:
            finding.problems += error.problems
            continue
        finding.warnings += [_warning(note, case) for note in notes]
        if "label" in arrays:
            finding.classes = frozenset(value_counts(arrays["label"])[0].tolist())
    return finding


def _digest(array: np.ndarray) -> str:
    # nibabel gives Fortran order: hash the memory as it lies instead of copying hundreds of megabytes
    flat = array if array.flags.c_contiguous else array.T if array.flags.f_contiguous else np.ascontiguousarray(array)
    state = hashlib.blake2b(f"{array.shape} {array.dtype} {array.flags.c_contiguous}".encode(), digest_size=20)
    state.update(flat.view(np.uint8).reshape(-1) if flat.size else b"")  # pyright: ignore[reportArgumentType]
    return state.hexdigest()


def _warning(note: str, case: Case) -> MedsegError:
    code, colon, text = note.partition(": ")
    if colon and len(code) == 4 and code.startswith("E"):
        return DataError(text, code=code, case=case.id, file=next(iter(case.images), None))
    return DataError(note, code="E300", case=case.id, file=next(iter(case.images), None))


def _duplicates(
    cases: list[Case], findings: dict[tuple[str, str], _Finding]
) -> tuple[list[MedsegError], list[MedsegError]]:
    problems: list[MedsegError] = []
    warnings: list[MedsegError] = []
    seen: dict[str, Case] = {}
    for case in cases:
        digest = findings[case.id, case.split].digest
        if digest is None:
            continue
        first = seen.setdefault(digest, case)
        if first is case:
            continue
        other_part = first.split != case.split
        message = "one image stands in two parts" if other_part else "one image under two names"
        together = first.group == case.group and case.frame is None
        problem = DataError(
            message,
            code="E354" if other_part else "E356",
            case=case.id,
            file=case.images[0],
            found=f"the same voxels as {first.id} ({first.split}): {first.images[0]}",
            fix="remove one of the two" if not together else "count it once, if it was not meant",
        )
        (warnings if together and not other_part else problems).append(problem)
    return problems, warnings


def _absent_classes(
    cases: list[Case], findings: dict[tuple[str, str], _Finding], spec: DatasetSpec
) -> tuple[list[MedsegError], list[MedsegError]]:
    """(problems, warnings): a structure that no case shows; a background that none has, as of fully labelled scenes."""
    training = [case for case in cases if case.split == "training" and case.labelled]
    read = [findings[case.id, case.split] for case in training]
    if not read or any(finding.problems for finding in read):
        return [], []  # a file that could not be read may show the class
    present = frozenset[int]().union(*(finding.classes for finding in read))
    told: tuple[list[MedsegError], list[MedsegError]] = [], []
    for index, name in spec.labels.items():
        if index not in present:
            error = LabelError(
                f"no training case shows the label {index} ({name})",
                code="E335",
                field="labels",
                expected="at least one voxel",
                found=f"0 voxels in {counted(len(read), 'case')}",
                fix="remove the label from datasets.yaml, or add a case that shows it"
                if index
                else "none where every voxel belongs to a structure; else mend `encoding` in datasets.yaml",
            )
            told[index == 0].append(error)
    return told


def _depths(cases: list[Case], findings: dict[tuple[str, str], _Finding]) -> list[MedsegError]:
    depths = Counter(depth for case in cases if (depth := findings[case.id, case.split].depth) is not None)
    if len(depths) < 2:
        return []
    rare = min(depths, key=lambda depth: depths[depth])
    example = next(case for case in cases if findings[case.id, case.split].depth == rare)
    return [
        DataError(
            "pictures of different depth in one set",
            code="E318",
            case=example.id,
            file=example.images[0],
            expected="one type of numbers",
            found=", ".join(f"{count} of {depth}" for depth, count in depths.most_common()),
            fix="convert them to one type",
        )
    ]
