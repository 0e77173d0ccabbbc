"""How many minutes to a given Dice: medseg and nnU-Net on the same fold, the same machine, one after the other.

    pip install nnunetv2
    python benchmarks/time_to_score.py hippocampus --data DATA --minutes 20
    python benchmarks/time_to_score.py drive --data DATA --minutes 20 --trainer nnUNetTrainer_5epochs
    python benchmarks/time_to_score.py hippocampus --data DATA --minutes 20 --short 8 20

medseg trains the pipeline for `--minutes`, validates often and reports the mean Dice of the validation cases (whole
images, their own grid) against the minutes of training. nnU-Net does what its own commands do
(`nnUNetv2_plan_and_preprocess`, `nnUNetv2_train CONFIGURATION 0`) on the same training and validation cases, stopped
after `--peer-minutes`; its score by epoch is the "Pseudo dice" of its log (on validation patches), and, when its
training ends in time, the Dice of its own final validation on whole images. `--trainer` picks another length of
nnU-Net's schedule (default: its own 1000 epochs of 250 iterations). On a CPU even one such epoch may not end in time:
`--short EPOCHS ITERATIONS` gives nnU-Net a schedule that does, nothing else changed. On a GPU:
`--device cuda --minutes 4 --peer-minutes 4`; there epochs are so short that medseg validates as often as it does by
itself. nnU-Net has a worker for each core, and does not compile (a minute of the four) unless `nnUNet_compile` says so.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import medseg
from medseg.config import DatasetSpec, load_dataset, load_pipeline
from medseg.data import Case, find_cases, load_sample
from medseg.hardware import real_cores

GOALS = {"drive": (0.80, 0.82), "hippocampus": (0.85, 0.87)}
CONFIGURATION = {"drive": "2d", "hippocampus": "3d_fullres"}
NUMBER = 901
SHORT = """from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerShort(nnUNetTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = {}, {}, 5
"""


def ours(name: str, data: Path, minutes: float, device: str, folder: Path) -> tuple[list[tuple[float, float]], Path]:
    """(minutes, mean Dice over labels) of each validation, and the run."""
    # on a GPU an epoch takes less time than its validation
    often = "1" if device == "cpu" else "auto"
    pipeline = load_pipeline(name, overrides=[f"train.minutes={minutes}", f"train.validate_every={often}"])
    started = time.monotonic()
    run = medseg.train(
        pipeline, data=data, output=folder / "runs", cache=folder / "cache", device=device, progress=False
    )
    print(f"medseg: {(time.monotonic() - started) / 60:.1f} min in all, preparing the cases and final scores included")
    curve = []
    with (run / "log.csv").open(newline="") as table:
        for row in csv.DictReader(table):
            values = [float(v) for k, v in row.items() if k.startswith("val Dice") and v]
            if values:
                curve.append((float(row["minutes"]), float(np.mean(values))))
    return curve, run


def write_case(case: Case, spec: DatasetSpec, folder: Path) -> None:
    """One case in nnU-Net's raw layout: NIfTI for volumes, PNG for pictures (what its two readers ask for)."""
    sample = load_sample(case, spec)
    label = np.asarray(sample["label"])[0].astype(np.uint8)
    image = np.asarray(sample["image"])
    if spec.dims == 3:
        import nibabel

        affine = np.asarray(sample["image"].affine)
        nibabel.save(nibabel.Nifti1Image(image[0], affine), folder / "imagesTr" / f"{case.id}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(label, affine), folder / "labelsTr" / f"{case.id}.nii.gz")
        return
    from PIL import Image

    picture = np.moveaxis(image, 0, -1).astype(np.uint8)
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(
        folder / "imagesTr" / f"{case.id}_0000.png"
    )
    Image.fromarray(label).save(folder / "labelsTr" / f"{case.id}.png")


def theirs(
    name: str,
    data: Path,
    run: Path,
    folder: Path,
    *,
    minutes: float,
    device: str,
    trainer: str,
    short: list[int] | None = None,
) -> tuple[list[tuple[float, float]], float | None]:
    """(minutes, pseudo Dice) of each epoch that nnU-Net finished, and its final Dice if its training ended in time."""
    spec = load_dataset(name)
    split = json.loads((run / "split.json").read_text(encoding="utf-8"))
    raw = folder / "raw" / f"Dataset{NUMBER}_{name}"
    for part in ("imagesTr", "labelsTr"):
        (raw / part).mkdir(parents=True)
    cases = [case for case in find_cases(spec, data) if case.id in {*split["training"], *split["validation"]}]
    for case in cases:
        write_case(case, spec, raw)
    facts = {
        "channel_names": {str(i): channel for i, channel in enumerate(spec.channels)},
        "labels": {label: index for index, label in spec.labels.items()},
        "numTraining": len(cases),
        "file_ending": ".nii.gz" if spec.dims == 3 else ".png",
    }
    (raw / "dataset.json").write_text(json.dumps(facts), encoding="utf-8")
    where = {key: str(folder / key.split("_")[1]) for key in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    cores = str(real_cores())
    environment = {"nnUNet_n_proc_DA": cores, "nnUNet_compile": "f", **os.environ, **where}
    if short:
        trainer, place = "nnUNetTrainerShort", folder / "trainer"
        place.mkdir()
        (place / f"{trainer}.py").write_text(SHORT.format(*short), encoding="utf-8")
        environment["nnUNet_extTrainer"] = str(place)
    started = time.monotonic()
    _call(["nnUNetv2_plan_and_preprocess", "-d", str(NUMBER), "-c", CONFIGURATION[name], "-np", cores], environment)
    print(f"nnU-Net: planning and preprocessing {(time.monotonic() - started) / 60:.1f} min")
    prepared = folder / "preprocessed" / raw.name
    parts = [{"train": split["training"], "val": split["validation"]}]
    (prepared / "splits_final.json").write_text(json.dumps(parts), encoding="utf-8")
    command = ["nnUNetv2_train", str(NUMBER), CONFIGURATION[name], "0", "-device", device, "-tr", trainer]
    finished = _call(command, environment, minutes=minutes)
    result = folder / "results" / raw.name / f"{trainer}__nnUNetPlans__{CONFIGURATION[name]}" / "fold_0"
    curve, spent = [], 0.0
    for log in sorted(result.glob("training_log_*.txt")):
        pseudo = None
        for line in log.read_text(encoding="utf-8").splitlines():
            if "Pseudo dice" in line:
                pseudo = float(np.mean([float(v) for v in re.findall(r"\d\.\d+", line.split("Pseudo dice")[1])]))
            if (found := re.search(r"Epoch time: ([\d.]+) s", line)) and pseudo is not None:
                spent += float(found[1]) / 60
                curve.append((spent, pseudo))
    summary = result / "validation" / "summary.json"
    if not (finished and summary.is_file()):
        return curve, None
    return curve, float(json.loads(summary.read_text(encoding="utf-8"))["foreground_mean"]["Dice"])


def _call(command: list[str], environment: dict[str, str], minutes: float | None = None) -> bool:
    """Run one of nnU-Net's commands; False if it was stopped because the time was over."""
    program = shutil.which(command[0], path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        raise SystemExit(f"{command[0]} is not installed: pip install nnunetv2")
    process = subprocess.Popen([program, *command[1:]], env=environment, start_new_session=True, stdout=sys.stderr)
    try:
        code = process.wait(None if minutes is None else minutes * 60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with its workers
        process.wait()
        return False
    if code:
        raise SystemExit(f"{' '.join(command)} ended with code {code}")
    return True


def reached(curve: list[tuple[float, float]], goal: float) -> str:
    """Minutes at which a curve first reaches the goal.

    >>> reached([(1.0, 0.7), (2.5, 0.86)], 0.85), reached([(1.0, 0.7)], 0.85)
    ('2.5', 'not in 1.0')
    """
    for minutes, score in curve:
        if score >= goal:
            return f"{minutes:.1f}"
    return f"not in {curve[-1][0]:.1f}" if curve else "no epoch ended"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=list(GOALS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--peer-minutes", type=float, help="as --minutes when not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trainer", default="nnUNetTrainer")
    parser.add_argument("--short", type=int, nargs=2, metavar=("EPOCHS", "ITERATIONS"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        curve, run = ours(options.name, options.data, options.minutes, options.device, folder)
        print("medseg: " + ", ".join(f"{m:.1f} min {s:.3f}" for m, s in curve), flush=True)
        peer_minutes = options.peer_minutes or options.minutes
        peer, final = theirs(
            options.name, options.data, run, folder,
            minutes=peer_minutes, device=options.device, trainer=options.trainer, short=options.short,
        )  # fmt: skip
    goals = GOALS[options.name]
    print(
        f"\n| {options.name}, fold 0, {options.device} | "
        + " | ".join(f"minutes to {g:.2f}" for g in goals)
        + " | last |"
    )
    print("|---|" + "---|" * (len(goals) + 1))
    trainer = "{} epochs of {} iterations".format(*options.short) if options.short else options.trainer
    for title, points in (("medseg", curve), (f"nnU-Net {CONFIGURATION[options.name]} ({trainer})", peer)):
        last = f"{points[-1][1]:.3f} at {points[-1][0]:.1f} min" if points else f"none in {peer_minutes:g} min"
        print(f"| {title} | " + " | ".join(reached(points, goal) for goal in goals) + f" | {last} |")
    if final is not None:
        print(f"\nnnU-Net's own final validation on whole images: Dice {final:.3f}")
    print("\nnnU-Net: " + (", ".join(f"{m:.1f} min {s:.3f}" for m, s in peer) or "no epoch ended"))


if __name__ == "__main__":
    main()
