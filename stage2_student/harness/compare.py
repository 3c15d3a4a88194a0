"""How sure a difference between two checkpoints is: standard errors, and the bootstrap over the same questions.

164 questions have a standard error of 3.9 points, so two HumanEval scores that differ by three say little by themselves.
On the same questions the errors are shared to a good part; drawing questions with replacement, both answers together,
shows how far the difference could have come from the choice of questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from shared.errors import TidecacheError

RESAMPLES = 10_000
CHUNK = 4_000_000  # drawn question numbers held at once


@dataclass(frozen=True)
class Score:
    """One checkpoint's result on one benchmark: question id → its score, 0 to 1."""

    questions: Mapping[str, float]

    @property
    def percent(self) -> float:
        """Mean, in percent."""
        return 100.0 * sum(self.questions.values()) / len(self.questions)

    @property
    def error(self) -> float:
        """Standard error of the mean, in points; 0 for a single question."""
        count = len(self.questions)
        values = np.fromiter(self.questions.values(), np.float64, count)
        return float(100.0 * values.std(ddof=1) / math.sqrt(count)) if count > 1 else 0.0


@dataclass(frozen=True)
class Comparison:
    """Ours minus theirs, in points, with a 95% interval; `p`: two-sided, of no difference."""

    questions: int
    difference: float
    low: float
    high: float
    p: float


def paired_bootstrap(ours: Score, theirs: Score, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Compare two results on the same questions.

    Raises:
        TidecacheError: the questions differ.
    """
    if ours.questions.keys() != theirs.questions.keys():
        only = len(ours.questions.keys() ^ theirs.questions.keys())
        raise TidecacheError(
            f"a paired comparison needs the same questions; {only} are in one result only: evaluate both with the same "
            "--limit and --questions"
        )
    difference_Q = 100.0 * np.array([ours.questions[name] - theirs.questions[name] for name in sorted(ours.questions)])
    return _bootstrap([difference_Q], resamples, seed)


def paired_bootstrap_of_average(
    ours: Mapping[str, Score], theirs: Mapping[str, Score], resamples: int = RESAMPLES, seed: int = 0
) -> Comparison:
    """The same for the mean over benchmarks: questions are drawn within each of them."""
    parts = []
    for name, score in ours.items():
        other = theirs[name].questions
        parts.append(100.0 * np.array([score.questions[q] - other[q] for q in sorted(score.questions)]))
    return _bootstrap(parts, resamples, seed)


def _bootstrap(parts: list[np.ndarray], resamples: int, seed: int) -> Comparison:
    random = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for difference_Q in parts:
        count = len(difference_Q)
        rows = max(1, CHUNK // count)
        for start in range(0, resamples, rows):
            stop = min(start + rows, resamples)
            drawn = random.integers(0, count, size=(stop - start, count))
            means[start:stop] += difference_Q[drawn].mean(axis=1) / len(parts)
    low, high = np.quantile(means, [0.025, 0.975])
    tail = min(float(np.mean(means <= 0.0)), float(np.mean(means >= 0.0)))
    return Comparison(
        questions=sum(len(part) for part in parts),
        difference=float(np.mean([part.mean() for part in parts])),
        low=float(low),
        high=float(high),
        p=float(min(1.0, 2.0 * max(tail, 1.0 / resamples))),
    )
