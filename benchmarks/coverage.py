"""Claim: intervals of paired differences cover the truth in 95 % +- 1.5 % of repetitions; false calls are at most 5 %.

Run: python benchmarks/coverage.py [repetitions]. 60 cases, differences shaped like those of Dice and others that are
harder; for each repetition the interval of `compare_paired` is compared with the known mean, and the verdict is taken
when there is no difference. Beside it the percentile bootstrap, the interval that is in wide use.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import numpy as np

from medseg.metrics.statistics import compare_paired

CASES, RESAMPLES = 60, 2000


def shapes() -> Iterator[tuple[str, Callable[[np.random.Generator], np.ndarray]]]:
    """Distributions of differences, each with mean 0."""
    n = CASES
    yield "normal", lambda rng: rng.normal(0, 0.05, n)
    yield "Dice-like, two independent columns", lambda rng: rng.beta(9, 1, n) - rng.beta(9, 1, n)
    yield "skewed gain (gamma, shape 0.8)", lambda rng: rng.gamma(0.8, 0.05, n) - 0.04
    yield "skewed loss (beta 9, 1)", lambda rng: rng.beta(9, 1, n) - 0.9
    yield "lognormal, sigma 0.7", lambda rng: 0.05 * (np.exp(rng.normal(0, 0.7, n)) - np.exp(0.245))
    yield (
        "one case in twenty lost",
        lambda rng: np.where(rng.random(n) < 0.05, -0.5, 0.0) + 0.025 + rng.normal(0, 0.02, n),
    )


def main() -> None:
    """Print a Markdown table row for each distribution."""
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    print("| differences | coverage % | false calls % | percentile bootstrap's coverage % |")
    print("|---|---|---|---|")
    for number, (name, draw) in enumerate(shapes()):
        covered = called = plain = 0
        for repetition in range(repetitions):
            rng = np.random.default_rng([number, repetition])
            first, differences = 0.8 + 0.1 * rng.random(CASES), draw(rng)
            found = compare_paired(first, first + differences, seed=repetition, resamples=RESAMPLES)
            covered += found.low <= 0 <= found.high
            called += found.verdict != "no difference shown"
            means = differences[rng.integers(0, CASES, (RESAMPLES, CASES))].mean(axis=1)
            low, high = np.percentile(means, [2.5, 97.5])
            plain += bool(low <= 0 <= high)
        print(
            f"| {name} | " + " | ".join(f"{100 * count / repetitions:.1f}" for count in (covered, called, plain)) + " |"
        )


if __name__ == "__main__":
    main()
