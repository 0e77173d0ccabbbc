"""`medseg predict`: images in, label images on exactly their grid out, for one image or a cohort."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medseg.cohort import Outcome, choose_shard, run_cohort, take_shard
from medseg.errors import MedsegError, UsageError
from medseg.errors_arguments import checked
from medseg.inference.channels import join_channels, leave_labels, name_case
from medseg.inference.inputs import find_inputs, tell_left_out
from medseg.inference.memory import parse_bytes
from medseg.inference.outputs import Job, is_complete, plan_outputs, protect
from medseg.inference.stages import Work

__all__ = ["CaseResult", "PredictionSummary", "predict"]

_NOTES = 20  # printed; as_dict has all


@dataclass(frozen=True)
class CaseResult:
    """`status`: done, skipped (already complete), failed or planned."""

    case: str
    status: str
    output: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    error: dict[str, Any] | None = None
    message: str | None = None
    cost: dict[str, Any] | None = None


@dataclass(frozen=True)
class PredictionSummary:
    """What became of every case of this process' shard."""

    cases: tuple[CaseResult, ...]
    exit_code: int
    certificate: dict[str, Any] | None = None
    lines: tuple[str, ...] = ()
    model: tuple[str, ...] = ()  # the checkpoint or package; several of an ensemble

    def as_dict(self) -> dict[str, Any]:
        cases = [{k: v for k, v in vars(case).items() if v not in (None, {}, ())} for case in self.cases]
        facts = {"exit_code": self.exit_code, "model": list(self.model), "lines": list(self.lines)}
        return {**facts, "cases": cases, "certificate": self.certificate}

    def text(self) -> str:
        rows = [*(f"model: {file}" for file in self.model), *self.lines]
        for case in self.cases:
            if case.status == "planned":
                continue
            total = sum(case.seconds.values())
            rows.append(f"{case.status:8}{total:8.1f} s  {case.case}" + (f" -> {case.output}" if case.output else ""))
            rows += [f"  {line}" for line in (case.message or "").splitlines()]
        rows += self._notes()
        counts = {status: sum(case.status == status for case in self.cases) for status in ("done", "skipped", "failed")}
        rows.append(
            ", ".join(f"{number} {status}" for status, number in counts.items() if number) or "nothing predicted"
        )
        return "\n".join(rows)

    def _notes(self) -> list[str]:
        """Each note once, with its case or the number of its cases."""
        told: dict[str, list[str]] = {}
        for case in self.cases:
            for text in dict.fromkeys(case.notes):
                told.setdefault(text, []).append(case.case)
        rows = [f"note: {text} ({c[0] if len(c) == 1 else f'{len(c)} cases'})" for text, c in told.items()]
        more = len(rows) - _NOTES
        return rows if more <= 0 else [*rows[:_NOTES], f"... and {more} more notes, in --json"]


@checked
def predict(
    model: Any,
    inputs: Sequence[str | Path] | str | Path,
    output: str | Path = "predictions",
    *,
    device: str = "auto",
    plan: bool = False,
    certify: bool = False,
    resume: bool = False,
    save_probabilities: bool = False,
    format: str | None = None,
    precision: str | None = None,
    max_ram: float | str | None = None,
    max_vram: float | str | None = None,
    shard: str | None = None,
    series: str | None = None,
    progress: bool | Callable[[CaseResult], None] = True,
) -> PredictionSummary:
    """Segment images with a trained model.

    Args:
        model: run folder, checkpoint, package, a loaded Model, or a list of runs whose probabilities are averaged.
        inputs: files, folders, glob patterns, DICOM series folders; files of the channels of one image, named as in the
            model's data set or `_0000`, `_0001` ..., are one case.
        output: folder for `<case>.nii.gz` (volumes), `<case>.png` (PNG, JPEG, GIF), `<case>.tif` (TIFF); pictures get a
            coloured overlay in `overlays/`.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        plan: tell the cost of each case (one tile is timed) and predict nothing.
        certify: compare tiled with whole-image output on a sample of the first case.
        resume: skip cases whose outputs are complete and made by this model, options and input.
        save_probabilities: also `<case>.probabilities.zarr`, (K, *shape) float16.
        format: "nifti", "tiff", "png" or "dicom-seg" instead of the format that follows from the input.
        precision: "fp32", "bf16" or "fp16" (autocast; GPUs only) of the network's passes; None: what the pipeline says.
            Half precision is faster and no longer exact.
        max_ram, max_vram: keep the process and the GPU below this many GB (2^30 bytes); text such as "512MB" too.
        shard: "K/N", this process' share of the cases; None: from torchrun's or SLURM's variables, when present.
        series: which series of a DICOM folder.
        progress: print a line per finished case to standard error, or a function that is called with its result.

    Returns:
        PredictionSummary; `exit_code` is 0, 4 when cases failed, 5 when one of them failed for lack of a resource.

    Raises:
        UsageError, CheckpointError, ResourceError: before the first case: nothing to predict, wrong options, a
            model that cannot be used, an output folder that cannot be written, or in which a file that is not a
            prediction would be replaced.

    >>> import medseg
    >>> medseg.predict("runs/liver", ["scans/p1.nii.gz", "scans/p2.nii.gz"], "masks").exit_code  # doctest: +SKIP
    0
    """
    share = choose_shard(shard)
    output, format = Path(output), None if format is None else format.lower()
    inputs = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    found, refused = find_inputs(inputs, output)
    chosen = _device(device, precision)
    ram, vram = _bytes(max_ram, "max_ram"), _bytes(max_vram, "max_vram")
    if not hasattr(model, "pipeline"):
        model = _load(model, chosen)
    found, told = leave_labels(found, inputs, model.dataset)
    told += tell_left_out(inputs, output)
    jobs = plan_outputs(found, output, format, partial(name_case, spec=model.dataset))
    jobs = take_shard(join_channels(jobs, model.dataset), *share)
    used = tuple(map(str, (getattr(model, "metadata", None) or {}).get("sources", ())))
    work = Work(model, chosen, series, save_probabilities, ram, vram, format, precision)
    missing = [_failed(name, error) for name, error in refused] if share[0] == 0 else []  # told by one shard
    report = progress if callable(progress) else (_print if progress else lambda result: None)
    if plan or certify:
        results, certificate, lines = _survey(work, jobs, plan=plan, certify=certify)
        results += missing
        if plan:
            return PredictionSummary(tuple(results), _exit_code(results), certificate, (*told, *lines), used)
    else:
        certificate, lines = None, []
    protect(output, jobs, alone=share[1] == 1)
    results: list[CaseResult] = []
    todo = []
    for job in jobs:
        if resume and is_complete(job, work.identity, work.options):
            results.append(CaseResult(job.case, "skipped", str(job.output)))
            report(results[-1])
        else:
            todo.append(job)
    for outcome in run_cohort(todo, work.read, work.compute, work.finish, ahead=work.reads_ahead(todo)):
        results.append(_result(outcome))
        report(results[-1])
    order = {job.case: number for number, job in enumerate(jobs)}
    results.sort(key=lambda result: order[result.case])
    for result in missing:
        results.append(result)
        report(result)
    return PredictionSummary(tuple(results), _exit_code(results), certificate, (*told, *lines), used)


@checked
def _load(model: str | Path | Sequence[str | Path], device: Any) -> Any:
    """`load_model`, whose argument has another name than here, where it is refused."""
    from medseg.checkpoint import load_model

    return load_model(model, device=device)


def _survey(work: Work, jobs: Sequence[Job], *, plan: bool, certify: bool) -> tuple[list[CaseResult], Any, list[str]]:
    """The cost of each case, and the certificate from the first that can be read; nothing is written."""
    from medseg.inference.cost import certify as compare
    from medseg.inference.cost import estimate
    from medseg.inference.grid_map import grid_map

    results: list[CaseResult] = []
    lines: list[str] = []
    certificate = None
    for job in jobs:
        try:
            sample = work.read(job)
            image, native = sample["image"], sample["native"]
            grid = grid_map(np.asarray(image.affine), tuple(image.shape[1:]), native.affine, native.shape)
            if certify and certificate is None:
                verdict = compare(image.as_tensor(), work.networks[0], work.inferer(), device=work.device)
                certificate = verdict.as_dict()
                lines.append(verdict.text())
            if not plan:
                break
            cost = estimate(
                job.case,
                image.as_tensor(),
                work.networks,
                work.inferer(),
                device=work.device,
                axis=grid.axis,
                native_voxels=math.prod(native.shape),
                exact_grid=grid.exact,
            )
            lines.append(cost.text())
            results.append(CaseResult(job.case, "planned", cost=cost.as_dict()))
        except MedsegError as error:
            results.append(_failed(job.case, error))
    return results, certificate, lines


def _device(name: str, precision: str | None) -> Any:
    from medseg.hardware import choose_hardware

    # not training's "auto": which labels come out must not depend on the machine
    if precision not in (None, "fp32", "bf16", "fp16"):
        raise UsageError("unknown precision", field="precision", expected="fp32, bf16, fp16", found=precision)
    return choose_hardware(name, precision or "fp32").device


def _bytes(value: float | str | None, field: str) -> int | None:
    return parse_bytes(value * 2**30 if isinstance(value, int | float) else value, field)


def _result(outcome: Outcome[Job]) -> CaseResult:
    if outcome.error is not None:
        return _failed(outcome.item.case, outcome.error, outcome.seconds)
    return CaseResult(
        outcome.item.case, "done", str(outcome.item.output), outcome.seconds or {}, tuple(outcome.result["notes"])
    )


def _failed(case: str, error: MedsegError, seconds: dict[str, float] | None = None) -> CaseResult:
    return CaseResult(
        case, "failed", None, seconds or {}, (), {**error.as_dict(), "exit_code": error.exit_code}, str(error)
    )


def _exit_code(results: Sequence[CaseResult]) -> int:
    codes = [case.error["exit_code"] for case in results if case.error is not None]
    return 0 if not codes else 5 if 5 in codes else 4


def _print(result: CaseResult) -> None:
    print(f"{result.status}: {result.case} ({sum(result.seconds.values()):.1f} s)", file=sys.stderr)
