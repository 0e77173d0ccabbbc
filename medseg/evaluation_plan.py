"""What an evaluation is going to do: pairs of files, labels, scores, and where results go; decided before scoring."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medseg.config import parse_yaml
from medseg.errors import CheckpointError, ConfigError, DataError, UsageError
from medseg.evaluation_attention import has_attention
from medseg.evaluation_pairs import Pair, Reading, match_folders, pair_cases, parse_labels
from medseg.evaluation_scoring import Scoring
from medseg.run import RunFolder, newest_run, seen_before

__all__ = ["DEFAULT_METRICS", "Plan", "make_plan"]

DEFAULT_METRICS: tuple[Any, ...] = (
    "Dice", "IoU", "Sensitivity", "Precision", "HD", "HD95", "ASSD", ("SurfaceDice", {"tolerance": 1.0}), "VolumeError",
    "AbsoluteVolumeError", "PooledDice",
)  # fmt: skip
OBJECT_METRICS = ("AP50", "AP75", "PQ", "AJI")  # of sets that tell single objects apart


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first image is opened."""

    pairs: list[Pair]
    extra: list[str]
    reading: Reading
    scoring: Scoring
    output: Path
    title: str
    predictions: str
    references: str
    dataset: str | None = None
    protocol: str | None = None
    notes: list[str] = field(default_factory=list)
    threshold: Mapping[str, Any] | None = None  # value, chosen_on, cases, rule: of the run that predicted
    run: Path | None = None  # whose network shows where it looks
    encoding: Any = None  # of the run's data set: how a folder's references may be stored


def make_plan(
    predictions: str | Path,
    reference: str | Path | None,
    *,
    output: str | Path | None,
    data: str | Path | None,
    images: str | Path | None,
    run: str | Path | None,
    part: str,
    protocol: str | Mapping[str, Any] | None,
    metrics: Sequence[Any] | None,
    labels: str | Mapping[int, str] | None,
    ignore: int | None,
) -> Plan:
    """Decide; see `medseg.evaluation.evaluate` for the arguments.

    Raises:
        UsageError, DataError: as there.
    """
    predictions, run = Path(predictions), None if run is None else newest_run(run)
    protocol = parse_yaml(protocol, source="protocol").value if isinstance(protocol, str) else protocol
    if reference is None and run is None and images is None:
        return _plan_run(
            newest_run(predictions), output=output, data=data, protocol=protocol, metrics=metrics,
            told={"labels": labels, "ignore": ignore},
        )  # fmt: skip
    pipeline, spec = _facts_of_run(run, data) if run is not None else (None, None)
    target = Path(output) if output is not None else predictions / "scores"
    if images is not None and (reference is None or not Path(reference).exists()):
        raise UsageError(
            "a data set and a run know their images themselves", field="images", found=images,
            expected="a folder of labels as reference", fix="leave --images out",
        )  # fmt: skip
    if reference is None:
        raise UsageError(
            "no reference was given", field="reference", expected="a folder of labels or the name of a data set"
        )
    named = None if Path(reference).exists() else _dataset(str(reference), data)
    encoding = None
    if named is None:
        pairs, extra, names_told = match_folders(predictions, reference, images)
        names = parse_labels(labels) if labels is not None else {} if spec is None else _names(spec)
        given: dict[str, Any] = {} if spec is None else {"ignore": spec.ignore, "affine": spec.affine}
        reading = Reading(names, **(given if ignore is None else {**given, "ignore": ignore}))
        title = f"Scores of {predictions.resolve().name} against {Path(reference).resolve().name}"
        dataset = None if spec is None else spec.name
        encoding = _encoding(spec)
    else:
        _refuse({"ignore": ignore})
        (pairs, extra), names_told = pair_cases(_cases_of(named, data, part), predictions), []
        reading = Reading(
            parse_labels(labels) if labels is not None else _names(named),
            ignore=named.ignore,
            affine=named.affine,
            spec=named,
        )
        title, dataset, spec = f"{named.title}: scores of {predictions.resolve().name}", named.name, named
    chosen, protocol = _scoring(metrics, protocol, pipeline, spec)
    threshold, notes = _threshold(run, protocol)
    notes += names_told
    if named is not None and part == "training":
        notes.append("These are training cases: scores of a model that was trained on them are no test of it.")
    return Plan(
        pairs, extra, reading, chosen, target, title, predictions.resolve().name, Path(reference).name, dataset,
        protocol, notes, threshold, encoding=encoding,
    )  # fmt: skip


def _plan_run(
    folder: Path,
    *,
    output: str | Path | None,
    data: str | Path | None,
    protocol: str | Mapping[str, Any] | None,
    metrics: Sequence[Any] | None,
    told: Mapping[str, Any],
) -> Plan:
    from medseg.data import find_cases

    if not (folder / "pipeline.yaml").is_file():
        raise UsageError(
            "no reference was given, and this is no run",
            field="reference",
            file=folder,
            fix="medseg evaluate PREDICTIONS REFERENCES",
        )
    _refuse(told)
    pipeline, spec = _facts_of_run(folder, data)
    if output is None and (metrics is not None or protocol not in (None, spec.protocol)):
        raise UsageError(
            "other scores would replace the run's own, which compare, report and pooled folds read",
            field="output", file=folder / "validation", fix="give another folder: -o scores",
        )  # fmt: skip
    try:
        split = json.loads((folder / "split.json").read_text(encoding="utf-8"))
        wanted = split["validation"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError("the run's split cannot be read", file=folder / "split.json", found=error) from error
    if not wanted:
        raise UsageError(
            "this run kept no case for validation: it was trained on all of them (--fold none)",
            file=folder,
            fix="medseg predict on images it has not seen, then medseg evaluate PREDICTIONS REFERENCES --run RUN",
        )
    place = next((p for p in (folder / "validation" / "predictions", folder / "validation") if p.is_dir()), None)
    if place is None:
        raise DataError(
            "the run has no predictions of its validation cases",
            code="E302",
            file=folder / "validation",
            fix="let the training finish",
        )
    cases = find_cases(spec, _root_of_run(folder, data), part="all")
    pairs, extra = pair_cases(cases, place, only=wanted)
    reading = Reading(_names(spec), ignore=spec.ignore, affine=spec.affine, spec=spec)
    chosen, protocol = _scoring(metrics, protocol, pipeline, spec)
    target = Path(output) if output is not None else folder / "validation"
    threshold, notes = _threshold(folder, protocol)
    return Plan(
        pairs, extra, reading, chosen, target, pipeline.title or spec.title, "validation cases of the run", spec.title,
        spec.name, protocol, [*seen_before(split), *notes], threshold,
        run=folder if has_attention(pipeline.network.name) else None,
    )  # fmt: skip


def _refuse(told: Mapping[str, Any]) -> None:
    """Raise where something is told of labels that are described already."""
    for option, found in told.items():
        if found is not None:
            message, fix = "a run and a data set know this of their labels themselves", f"leave --{option} out"
            raise UsageError(message, field=option, expected="a folder of labels as reference", found=found, fix=fix)


def _threshold(run: Path | None, protocol: str | None) -> tuple[dict[str, Any] | None, list[str]]:
    """The threshold that the run chose, and what to note when the protocol asks for another."""
    from medseg.metrics import get_protocol

    if run is None:
        return None, []
    try:
        found = json.loads((run / "threshold.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = None
    except (OSError, ValueError) as error:
        raise CheckpointError("the run's threshold cannot be read", file=run / "threshold.json", found=error) from error
    asked = get_protocol(protocol).threshold if protocol else None
    if asked is None or (found is not None and found.get("chosen_on") == asked):
        return found, []
    used = "0.5" if found is None else f"{found['value']:.4g}, chosen on the {found['chosen_on']} cases"
    note = f"The protocol {protocol} asks for a threshold chosen on the {asked} images; these predictions used {used}."
    return found, [f"{note} Put `Threshold: {{value: {asked}}}` into the pipeline's postprocess to follow it."]


def _facts_of_run(folder: Path, data: str | Path | None) -> tuple[Any, Any]:
    from medseg.config import load_dataset, load_pipeline

    if not (folder / "pipeline.yaml").is_file():
        raise CheckpointError("this is no run", code="E360", field="run", file=folder, expected="pipeline.yaml in it")
    missing = root = None
    try:
        root = _root_of_run(folder, data, must_exist=False)
    except UsageError as error:  # names and scores of the sets that come with medseg are known without a folder
        missing = error
    try:
        # what it trained with need not be there any more: the weights that its network began with, for one
        pipeline = load_pipeline(folder / "pipeline.yaml", root=root, check=False)
        return pipeline, load_dataset(pipeline.dataset, root=root)
    except ConfigError:
        if missing is not None:
            raise missing from None
        raise


def _root_of_run(folder: Path, data: str | Path | None, *, must_exist: bool = True) -> Path:
    """The data root: as given, else the one that the run was trained from."""
    from medseg.data import data_root

    return data_root(data, known=RunFolder(folder).data, must_exist=must_exist)


def _dataset(name: str, data: str | Path | None) -> Any:
    from medseg.config import dataset_names, load_dataset

    if name not in dataset_names(root=data) and ("/" in name or "." in name):
        raise DataError("there is no such folder of references", code="E302", file=name)
    return load_dataset(name, root=data)


def _cases_of(spec: Any, data: str | Path | None, part: str) -> list[Any]:
    """The cases of a part; where it has none, the refusal names the parts that have some."""
    from medseg.data import data_root, find_cases

    root = data_root(data)
    try:
        return find_cases(spec, root, part=part)
    except UsageError as error:
        if error.code != "E103":
            raise
        split = {case.split for case in find_cases(spec, root, part="all")}
        has = [name for name in ("training", "validation", "test") if name in split]
        best = "validation" if "validation" in has else has[0]
        error.field, error.expected, error.fix = "--part", f"a part that it has: {', '.join(has)}", f"--part {best}"
        if best == "training":
            error.fix += " (no test of a model that was trained on these cases)"
        raise


def _names(spec: Any) -> dict[int, str]:
    return {index: name for index, name in spec.labels.items() if index != 0}


def _encoding(spec: Any) -> Any:
    """What turns the stored values of a data set's references into indices; None when they are indices."""
    if spec is not None and spec.colours:
        return {tuple(rgb): index for index, rgb in spec.colours.items()}
    return None if spec is None or spec.encoding == "index" else spec.encoding


def _separate(metric: Any) -> list[Any]:
    """The scores in one text, "Dice, SurfaceDice: {tolerance: 7}"; anything else as it is."""
    return parse_yaml(f"[{metric}]", source="metrics").value if isinstance(metric, str) else [metric]


def _scoring(metrics: Sequence[Any] | None, protocol: Any, pipeline: Any, spec: Any) -> tuple[Scoring, str | None]:
    """Scores asked for, else those of the protocol, of the pipeline with the data set's protocol, or the usual ones."""
    from medseg.metrics import METRICS, parse_metrics

    regions = None
    unit = None if spec is None else spec.unit
    skip = metrics is None
    objects = spec is not None and spec.has_instances
    if metrics is None:
        protocol = protocol or (None if spec is None else spec.protocol)
        own = tuple(pipeline.metrics) if pipeline is not None else ()
        chosen: tuple[Any, ...] = own
        if protocol is not None:
            from medseg.metrics import get_protocol

            rules = get_protocol(protocol)
            protocol, regions = rules.name, rules.regions
            chosen = (*own, *rules.metrics)
        usual = (*OBJECT_METRICS, "Dice") if objects else DEFAULT_METRICS
        chosen = chosen or tuple(m for m in usual if (m if isinstance(m, str) else m[0]) in METRICS)
    else:
        chosen, protocol = tuple(part for one in metrics for part in _separate(one)), None
    parsed = parse_metrics(chosen)
    chosen_before = parse_metrics(pipeline.metrics) if pipeline is not None else []
    unique = tuple(dict.fromkeys((metric.name, tuple(sorted(arguments.items()))) for metric, arguments in parsed))
    # of a set, and of a pipeline, that tells objects apart, predictions hold numbered objects, whatever is scored
    needs = objects or any(metric.needs == "instances" for metric, _ in (*parsed, *chosen_before))
    named = tuple((name, dict(arguments)) for name, arguments in unique)
    # what the pipeline chose its best weights by, unless other scores were asked for
    main = None if pipeline is None or not skip else next((one for one in named if one[0] == pipeline.best), None)
    return Scoring(named, regions, unit, skip, needs, main=main), protocol
