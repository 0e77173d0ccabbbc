"""Do the separation term and elastic deformation help on nuclei? Equal minutes, several seeds, on real images.

    python benchmarks/nuclei_ablation.py separation --data DATA --minutes 4 --seeds 0 1 2
    python benchmarks/nuclei_ablation.py elastic --data DATA --minutes 4 --seeds 0 1 2

`separation` trains the pipeline `cell` on fold 0 with and without the weight map (touching nuclei are parted in both).
`elastic` takes 20 images, trains on 10 and validates on 10, with elastic deformation at the pipeline's setting
and at sigma 0 (rotation, scaling and flips stay). A seed also chooses the folds; the two runs of a seed share them.
Prints a Markdown row for each run: AP at IoU 0.5 and 0.75 and the number of merged nuclei, that is reference nuclei of
which more than half lies in a predicted object that also holds more than half of another.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import tempfile
from pathlib import Path

import numpy as np

import medseg
from medseg.config import load_dataset, load_pipeline
from medseg.data import find_cases, load_sample
from medseg.tables import read_cases
from medseg.volumes import read_label

CONDITIONS = {
    "separation": {"on": [], "off": ["loss.DistanceWeightedDiceCELoss.use_weight=false"]},
    "elastic": {"on": [], "off": ["augment.RandElasticDeformationd.sigma=0"]},
}


def count_merged(prediction: np.ndarray, reference: np.ndarray) -> int:
    """Reference objects that share a predicted object with another one, each by more than half of itself.

    >>> count_merged(np.array([[1, 1, 1, 0, 2]]), np.array([[1, 1, 2, 0, 3]]))
    2
    """
    rows, columns = int(reference.max()) + 1, int(prediction.max()) + 1
    shared = np.bincount(reference.ravel() * columns + prediction.ravel(), minlength=rows * columns)
    shared = shared.reshape(rows, columns)
    inside = shared[1:, 1:] * 2 > np.maximum(shared[1:].sum(axis=1, keepdims=True), 1)
    held = inside.sum(axis=0)
    return int(held[held > 1].sum())


def few_images(data: Path, folder: Path, number: int = 20) -> Path:
    """A data root with the first `number` fluorescence images by id."""
    source, target = data / "dsb2018", folder / "dsb2018"
    with (source / "types.csv").open(newline="") as table:
        rows = sorted((r for r in csv.DictReader(table) if r["type"] == "fluorescence"), key=lambda r: r["id"])[:number]
    for row in rows:
        shutil.copytree(source / "stage1_train" / row["id"], target / "stage1_train" / row["id"])
    with (target / "types.csv").open("w", newline="") as table:
        writer = csv.DictWriter(table, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def measure(run: Path, data: Path) -> tuple[float, float, int, int]:
    """(AP50, AP75, merged nuclei, nuclei) of a run's validation cases."""
    medseg.evaluate(run, progress=False)
    scores = read_cases(run / "validation" / "cases.csv")
    means = [float(np.mean([s.value for s in scores if s.metric == name])) for name in ("AP50", "AP75")]
    spec = load_dataset("dsb2018_fluorescence")
    merged = total = 0
    cases = {case.id: case for case in find_cases(spec, data)}
    for path in sorted((run / "validation").glob("*.[pt][ni][gf]")):
        reference = np.asarray(load_sample(cases[path.stem], spec)["instances"])[0].astype(np.int64)
        merged += count_merged(read_label(path, dims=2).array[0].astype(np.int64), reference)
        total += len(np.unique(reference)) - 1
    return means[0], means[1], merged, total


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=list(CONDITIONS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args()
    print("| term | seed | minutes | AP@0.5 | AP@0.75 | merged nuclei | of |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        data = options.data if options.what == "separation" else few_images(options.data, Path(folder) / "data")
        for seed in options.seeds:  # interleaved: whatever else the machine does meets both alike
            for name, overrides in CONDITIONS[options.what].items():
                chosen = load_pipeline(
                    "cell",
                    overrides=[
                        f"train.minutes={options.minutes}",
                        "train.validate_every=100",
                        "train.samples_per_case=2",
                        *(["train.folds=2"] if options.what == "elastic" else []),
                        f"train.seed={seed}",
                        *overrides,
                    ],
                )
                run = medseg.train(chosen, data=data, output=Path(folder) / "runs", cache=options.cache, progress=False)
                ap50, ap75, merged, total = measure(run, data)
                print(
                    f"| {name} | {seed} | {options.minutes:g} | {ap50:.3f} | {ap75:.3f} | {merged} | {total} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
