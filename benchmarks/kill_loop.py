"""Kill a real `medseg train` again and again with SIGKILL, resume it each time, compare with the uninterrupted run.

OMP_NUM_THREADS=1 python benchmarks/kill_loop.py [--resumes 200] [--seed 0] [--folder FOLDER] [--fresh]
python benchmarks/kill_loop.py --sum FOLDER...

Every kill comes at a seeded random moment of training; every second one waits for the next checkpoint that is being
written and strikes up to 4 ms into it. After each kill the checkpoint on disk is loaded and its weights and optimizer
state are compared, bit for bit, with those of the uninterrupted run after the same iteration; at the end of each run,
with its last ones. Prints Markdown for docs/reliability.md, and a line of JSON for each kill to FOLDER/kills.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from tiny import tiny_pipeline, write_cases

from medseg import training
from medseg.checkpoint import CheckpointStore
from medseg.cli import main
from medseg.config import to_yaml
from medseg.files_atomic import TEMPORARY

KILLS_A_RUN = 25
LONGEST = 1.2  # seconds of processor time until a kill
SAVE_SECONDS = 0.12
PLAN = {"epochs": 20, "iterations_per_epoch": 20, "save_minutes": SAVE_SECONDS / 60, "ema": 0.9, "validate_every": 5}


def digest(state: Mapping[str, Any]) -> str:
    """SHA-256 of the weights, their average and the optimizer's moments."""
    total = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Mapping):
            for key in value:
                total.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, torch.Tensor):
            total.update(f"{value.dtype} {tuple(value.shape)}".encode())
            total.update(value.detach().cpu().contiguous().numpy().tobytes())

    for part in ("network_state", "average_state"):
        add(state[part])
    add(state["optimizer_state"]["state"])
    return total.hexdigest()


class Process:
    """`medseg train ARGUMENTS` in a process of its own.

    It is forked from this one, which has imported everything but has trained nothing: beginning anew each time would
    spend 9 of 10 seconds on imports. `fresh` begins anew all the same.
    """

    def __init__(self, folder: Path, arguments: list[str], *, fresh: bool) -> None:
        where = ["--no-report", "--device", "cpu", "--cache", str(folder / "cache"), "--data", str(folder / "data")]
        arguments = ["train", *arguments, *where]
        self.errors, self.code = folder / "errors.txt", None
        with self.errors.open("w") as errors:
            if fresh:
                command = [sys.executable, "-m", "medseg", *arguments]
                self.pid = subprocess.Popen(command, process_group=0, stdout=errors, stderr=errors).pid
            elif (pid := os.fork()) == 0:
                code = 1
                try:
                    os.setpgid(0, 0)  # a group of its own, so that its loading processes die with it
                    os.dup2(errors.fileno(), 1)
                    os.dup2(errors.fileno(), 2)
                    main(arguments)
                except SystemExit as end:
                    code = int(end.code or 0)
                finally:
                    os._exit(code)
            else:
                self.pid = pid

    def poll(self, options: int = os.WNOHANG) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, options)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def seconds(self) -> float:
        """Its processor time, its loading processes not counted."""
        try:
            return sum(psutil.Process(self.pid).cpu_times()[:2])
        except psutil.NoSuchProcess:
            return math.inf

    def kill(self) -> float:
        """SIGKILL to it and its workers; the time."""
        os.killpg(self.pid, signal.SIGKILL)
        moment = time.time()
        self.poll(0)
        return moment


def reference(folder: Path) -> dict[int, str]:
    """Train without interruption; the digest after each iteration."""
    found = folder / "whole.json"
    if (pid := os.fork()) == 0:
        code = 1
        try:
            found.write_text(json.dumps(_record(folder)))
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0, "the uninterrupted run failed"
    return {int(iteration): value for iteration, value in json.loads(found.read_text()).items()}


def _record(folder: Path) -> dict[int, str]:
    found: dict[int, str] = {}

    class Recorder:
        def iterated(self, session: Any) -> None:
            found[session.progress.iteration] = digest(session.step.state_dict())

        def finished_epoch(self, session: Any, row: Any) -> None: ...

        def close(self, session: Any) -> None: ...

    real = training._outputs
    training._outputs = lambda session, **options: [Recorder(), *real(session, **options)]
    run = training.train(
        tiny_pipeline(workers=0, **PLAN), data=folder / "data", cache=folder / "cache", output=folder / "whole",
        device="cpu", progress=False,
    )  # fmt: skip
    state, _ = CheckpointStore(run).load()
    assert digest(state) == found[state["progress"]["iteration"]], "what was saved is not what was trained"
    return found


def wait_until_training(process: Process, output: Path) -> None:
    """Return when status.json names the process, or when the process has ended."""
    while process.poll() is None:
        for path in output.glob("*/*/status.json"):
            if json.loads(path.read_text()).get("process") == process.pid:
                return
        time.sleep(0.005)


def being_written(output: Path) -> bool:
    """Whether a checkpoint under its temporary name is there."""
    return any(path.suffix == ".pt" for path in output.glob(f"*/*/{TEMPORARY}*"))


def strike(process: Process, output: Path, draw: random.Random, *, while_saving: bool) -> float | None:
    """Kill the process group; the time of the kill, or None when the process had ended by itself.

    The moment is drawn in the process's own processor time, so that a busy machine does not shift it to the start.
    """
    end = process.seconds() + draw.uniform(0, LONGEST)
    while process.poll() is None and process.seconds() < end:
        time.sleep(0.002)
    if while_saving:
        while process.poll() is None and not being_written(output):
            time.sleep(0.0003)
        time.sleep(draw.uniform(0, 0.004))
    return process.kill() if process.poll() is None else None


def one_run(
    folder: Path, number: int, draw: random.Random, whole: dict[int, str], *, fresh: bool
) -> Iterator[dict[str, Any]]:
    """Kill one training `KILLS_A_RUN` times and let it end; a record for each kill, and one for the end."""
    output, plan = folder / f"killed{number}", folder / "tiny.yaml"
    plan.write_text(to_yaml(tiny_pipeline(workers=0, **PLAN)))
    begin = [str(plan), "-o", str(output)]
    process, kills, iteration = Process(folder, begin, fresh=fresh), 0, 0
    while True:
        moment, while_saving = None, kills % 2 == 1
        if kills < KILLS_A_RUN:
            wait_until_training(process, output)
            moment = strike(process, output, draw, while_saving=while_saving)
        if moment is None:
            break
        kills += 1
        run = next(output.glob("*/*"))
        record = {"run": number, "aimed_at_save": while_saving, "partial": being_written(output)}
        if not (run / "last.pt").exists():  # nothing to continue yet: begin again
            yield {**record, "resume": False}
            shutil.rmtree(output)
            process = Process(folder, begin, fresh=fresh)
            continue
        age = moment - (run / "last.pt").stat().st_mtime
        state, notices = CheckpointStore(run).load()
        now = state["progress"]["iteration"]
        yield {
            **record, "resume": True, "iteration": now, "advanced": now - iteration, "fell_back": bool(notices),
            "equal": digest(state) == whole[now], "age": round(age, 3),
        }  # fmt: skip
        iteration = now
        process = Process(folder, ["--resume", str(run)], fresh=fresh)
    assert process.poll(0) == 0, process.errors.read_text()
    run = next(output.glob("*/*"))
    state, _ = CheckpointStore(run).load()
    done = state["progress"]["iteration"]
    left = [path.name for path in run.rglob(f"{TEMPORARY}*")]
    yield {"run": number, "end": True, "equal": done == max(whole) and digest(state) == whole[done], "left": left}


def loop(resumes: int, seed: int, folder: Path, *, fresh: bool) -> list[dict[str, Any]]:
    """Runs, killed and resumed, until there were enough resumes."""
    write_cases(folder / "data")
    whole, draw = reference(folder), random.Random(seed)
    records: list[dict[str, Any]] = []
    with (folder / "kills.jsonl").open("w") as log:
        for number in range(resumes):
            for record in one_run(folder, number, draw, whole, fresh=fresh):
                records.append(record)
                print(json.dumps(record), file=log, flush=True)
            if sum(record.get("resume", False) for record in records) >= resumes:
                break
    return records


def summary(records: list[dict[str, Any]]) -> str:
    """The Markdown table of what happened."""
    ends = [record for record in records if "end" in record]
    kills = [record for record in records if "end" not in record]
    resumed = [record for record in kills if record["resume"]]
    ages = [record["age"] for record in resumed if record["advanced"] > 0]
    iterations = PLAN["epochs"] * PLAN["iterations_per_epoch"]
    rows = {
        "kills": len(kills),
        "of them before the first checkpoint (begun again)": len(kills) - len(resumed),
        "resumes": len(resumed),
        "resumes from weights and optimizer state equal to the uninterrupted run's, bit for bit": sum(
            record["equal"] for record in resumed
        ),
        "checkpoints older than the one before the kill": sum(record["advanced"] < 0 for record in resumed),
        "kills aimed at a checkpoint being written": sum(record["aimed_at_save"] for record in kills),
        "kills that left a half-written checkpoint behind": sum(record["partial"] for record in kills),
        "fell back to last.prev.pt": sum(record["fell_back"] for record in resumed),
        f"age of the checkpoint at the kill, saved every {SAVE_SECONDS} s (sessions that had saved one)": (
            f"median {statistics.median(ages):.2f} s, at most {max(ages):.2f} s"
        ),
        f"runs of {iterations:.0f} iterations that ended": len(ends),
        "of them in the uninterrupted run's weights, bit for bit": sum(record["equal"] for record in ends),
        "temporary files left at the end": sum(len(record["left"]) for record in ends),
    }
    return "\n".join(["| what | number |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resumes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--fresh", action="store_true", help="a new interpreter for each session")
    parser.add_argument("--sum", type=Path, nargs="+", help="add up the records of earlier calls, by their folders")
    asked = parser.parse_args()
    if asked.sum:
        lines = [line for folder in asked.sum for line in (folder / "kills.jsonl").read_text().splitlines()]
        records = [json.loads(line) for line in lines]
    else:
        torch.set_num_threads(1)
        folder = asked.folder or Path(tempfile.mkdtemp(prefix="medseg-kills-"))
        records = loop(asked.resumes, asked.seed, folder, fresh=asked.fresh)
    print(summary(records))


if __name__ == "__main__":
    run()
