"""All that issue 7 asks of a GPU, in one command of less than nine minutes.

    python benchmarks/training_gpu.py [--output results.txt]

One after the other, each in a process of its own and with a limit of time: the tests marked `gpu`, the training step
(PyTorch's defaults, MONAI's trainer, medseg with each lever, all together, and compiled), and the whole loop against
one constant batch, beside MONAI's. What they print, Markdown tables for RESULTS.md, is shown and kept in the output
file; a part that fails or runs out of time is said, and the others still run. Ends with 1 if one did not succeed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
# title, command, largest number of seconds: 510 together
PARTS = [
    ("tests", ["-m", "pytest", "-q", "-m", "gpu", str(HERE.parent / "tests")], 170),
    ("step", [str(HERE / "training_step.py"), "--device", "cuda", "--seconds", "1"], 200),
    ("loop", [str(HERE / "training_loop.py"), "--device", "cuda", "--seconds", "5", "--rounds", "2", "--monai"], 140),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("training_gpu.txt"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here")
    failed = []
    with options.output.open("w", encoding="utf-8") as file:

        def tell(text: str) -> None:
            print(text, flush=True)
            print(text, file=file, flush=True)

        tell(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        for title, arguments, limit in PARTS:
            begin = time.perf_counter()
            command = [sys.executable, *arguments]
            try:
                done = subprocess.run(
                    command, timeout=limit, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
                said, ended = done.stdout, f"exit code {done.returncode}"
            except subprocess.TimeoutExpired as error:
                out = error.stdout or b""
                said, ended = out.decode() if isinstance(out, bytes) else out, f"stopped after {limit} s"
            if ended != "exit code 0":
                failed.append(title)
            tell(f"\n## {title}: {ended}, {time.perf_counter() - begin:.0f} s\n\n{said}")
    sys.exit(f"did not succeed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
