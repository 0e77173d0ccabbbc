"""U-Net against Attention U-Net with as many parameters, on real data: equal minutes, several seeds, `medseg compare`.

    python benchmarks/attention.py drive --data DATA --minutes 3 --seeds 0 1 2

Trains NAME and NAME_attention in turns on fold 0 (a seed also chooses the folds; the two runs of a seed share them),
scores the validation cases and compares them in pairs. Prints for each seed the mean of the best score over the
cases, and what `medseg compare` says about it.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

import numpy as np

import medseg
from medseg.config import load_pipeline
from medseg.metrics import parse_metrics
from medseg.tables import read_cases


def train(name: str, seed: int, minutes: float, data: Path, folder: Path, cache: Path | None) -> tuple[Path, int]:
    """A finished run and its number of iterations."""
    overrides = [f"train.minutes={minutes}", f"train.seed={seed}", "train.validate_every=100"]
    pipeline = load_pipeline(name, overrides=overrides)
    run = medseg.train(pipeline, data=data, output=folder / "runs", cache=cache or folder / "cache", progress=False)
    medseg.evaluate(run, data=data, progress=False)
    with (run / "log.csv").open(newline="") as table:
        return run, int([row["iteration"] for row in csv.DictReader(table)][-1])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args()
    pipeline = load_pipeline(options.name)
    metric, arguments = parse_metrics([part for part in pipeline.metrics if part.name == pipeline.best])[0]
    score = metric.shown(**arguments).removeprefix("Pooled")  # a score of all cases together has no pairs
    print(
        f"| {options.name}, {options.minutes:g} min | seed | cases | {score} U-Net | {score} attention | iterations | ",
        end="",
    )
    print("verdict (label: difference, 95 % interval) |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            names = (options.name, f"{options.name}_attention")
            runs = [train(name, seed, options.minutes, options.data, Path(folder), options.cache) for name in names]
            means, cases = [], 0
            for run, _ in runs:
                rows = [s for s in read_cases(run / "validation" / "cases.csv") if s.metric == score]
                means.append(float(np.mean([row.value for row in rows])))
                cases = len({row.case for row in rows})
            compared = medseg.compare(runs[0][0], runs[1][0])
            verdicts = "; ".join(
                f"{d.verdict} ({d.label}: {d.difference:+.4f}, {d.low:+.4f} to {d.high:+.4f})"
                for d in compared.differences
                if d.metric == score
            )
            iterations = " / ".join(str(count) for _, count in runs)
            print(
                f"| {options.name} | {seed} | {cases} | {means[0]:.4f} | {means[1]:.4f} | {iterations} | {verdicts} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
