"""What the pages of the evidence look at: results by cell and seed, the metrics of a result, and Markdown tables.

Lower is better for bits per byte and calibration error. Shares are in percent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from evidence_cells import Cell, Scale
from evidence_results import Results

Metric = Callable[[dict[str, Any]], float]


def bits(record: dict[str, Any]) -> float:
    """Bits per byte, averaged over timesteps."""
    return float(record["bits_per_byte"])


def accuracy(record: dict[str, Any]) -> float:
    """Share of masked chunks whose best filling is the gold."""
    return 100 * float(record["quality"]["all"]["accuracy"])


def calibration(record: dict[str, Any]) -> float:
    """Expected calibration error."""
    return float(record["quality"]["all"]["calibration_error"])


def infilled(step: int, name: str = "exact") -> Metric:
    """Share of spans that are right, or `valid`, at the given place among the numbers of steps."""
    return lambda record: 100 * float(record["infilling"][step][name])


def completed(step: int, name: str) -> Metric:
    """Share of functions that are `valid`, `exact`, or go on with the right `next_line`."""
    return lambda record: 100 * float(record["completion"][step][name])


def chunk_length(record: dict[str, Any]) -> float:
    """Teacher tokens per masked chunk of the cache."""
    return float(record["cache"]["tokens_per_chunk"])


def cut(record: dict[str, Any]) -> float:
    """Documents of the cache that are too long for one of the tokenizers, and end early."""
    return float(record["cache"]["cut"])


def bits_in(place: int) -> Metric:
    """Bits per byte of one range of timesteps."""
    return lambda record: float(record["quality"]["bins"][place]["bits_per_byte"])


@dataclass(frozen=True)
class Found:
    """The results of one scale, by cell."""

    scale: Scale
    results: Results

    def record(self, first: Cell, seed: int) -> dict[str, Any] | None:
        """The result of a cell with this seed, if it is there."""
        return self.results.cells.get(dataclasses.replace(first, seed=seed).digest(self.scale))

    def records(self, first: Cell) -> list[dict[str, Any]]:
        """One record per seed that is there."""
        found = [self.record(first, seed) for seed in range(self.scale.seeds)]
        return [record for record in found if record is not None]

    def paired(self, a: Cell, b: Cell, metric: Metric) -> list[float]:
        """metric(a) − metric(b) by seed, of all seeds that both have."""
        pairs = [(self.record(a, seed), self.record(b, seed)) for seed in range(self.scale.seeds)]
        return [metric(x) - metric(y) for x, y in pairs if x is not None and y is not None]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text."""
    line = "|" + "|".join([" --- ", *[" ---: " for _ in head[1:]]]) + "|"
    return "\n".join(["| " + " | ".join(head) + " |", line, *["| " + " | ".join(row) + " |" for row in rows]])
