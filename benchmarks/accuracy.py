"""The accuracy table of RESULTS.md: train pipelines on real data within a budget, over folds and seeds.

    python benchmarks/accuracy.py drive cell em --data DATA --minutes 20 --folds 0 1 --seeds 0 1 2
    python benchmarks/accuracy.py hippocampus --data DATA --minutes 8 --device cuda     # the column of the GPU

Prints for each run the iterations that fitted into the minutes and the mean of the pipeline's first two scores over the
validation cases (their weights were chosen on the same cases: a little optimistic), then mean and sd over the runs.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
from pathlib import Path

import medseg
from medseg.config import load_dataset, load_pipeline
from medseg.metrics import parse_metrics
from medseg.tables import POOLED


def measure(
    name: str, *, minutes: float, fold: int, seed: int, data: Path, device: str, folder: Path, cache: Path | None
) -> tuple[int, dict[str, float]]:
    """Iterations, and score -> mean over cases and labels (a pooled score as it is)."""
    pipeline = load_pipeline(name, overrides=[f"train.minutes={minutes}", f"train.seed={seed}"])
    places = {"output": folder / "runs", "cache": cache or folder / "cache"}
    run = medseg.train(pipeline, data=data, fold=fold, device=device, progress=False, **places)
    rows = medseg.evaluate(run, data=data).rows
    means, unit = {}, load_dataset(pipeline.dataset, root=data).unit
    for kind, arguments in parse_metrics(pipeline.metrics[:2]):
        metric = kind.shown(unit, **arguments)
        single = [row.value for row in rows if row.metric == metric and row.case != POOLED]
        means[metric] = statistics.fmean(single or [row.value for row in rows if row.metric == metric])
    with (run / "log.csv").open(newline="") as table:
        return int([row["iteration"] for row in csv.DictReader(table)][-1]), means


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="+", help="pipelines")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--folds", type=int, nargs="+", default=[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args()
    print("| pipeline | minutes | fold | seed | iterations | scores |\n|---|---|---|---|---|---|")
    for name in options.names:
        found: dict[str, list[float]] = {}
        for seed in options.seeds:
            for fold in options.folds:
                with tempfile.TemporaryDirectory() as folder:
                    iterations, means = measure(
                        name, minutes=options.minutes, fold=fold, seed=seed, data=options.data,
                        device=options.device, folder=Path(folder), cache=options.cache,
                    )  # fmt: skip
                text = ", ".join(f"{metric} {value:.4f}" for metric, value in means.items())
                print(f"| {name} | {options.minutes:g} | {fold} | {seed} | {iterations} | {text} |", flush=True)
                for metric, value in means.items():
                    found.setdefault(metric, []).append(value)
        if len(options.seeds) * len(options.folds) > 1:
            text = ", ".join(f"{m} {statistics.fmean(v):.4f} (sd {statistics.stdev(v):.4f})" for m, v in found.items())
            print(f"| **{name}** | {options.minutes:g} | all | all | | {text} |", flush=True)


if __name__ == "__main__":
    main()
