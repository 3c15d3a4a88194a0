"""Results of `bench/evidence.py` and `bench/exact.py`: JSON lines under digests, and means with their spread.

The last line of a digest counts, and a line that a kill cut short is dropped.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Results:
    """The lines of one file; `add` appends at once, so that a kill loses nothing that was printed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: dict[str, dict[str, Any]] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                record = json.loads(line)
                self.cells[record["digest"]] = record
            except (ValueError, KeyError):
                continue

    def add(self, digest: str, record: dict[str, Any]) -> None:
        """Keep a record under its digest, its numbers to 6 digits."""
        line = {"digest": digest, **rounded(record)}
        if self.cells.get(digest) == line:
            return
        self.cells[digest] = line
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"\n", b"")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("" if whole else "\n") + json.dumps(self.cells[digest]) + "\n")


def rounded(value: Any) -> Any:
    """JSON values with every fraction to 6 significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


# Student's t for 95 % by degrees of freedom, from 1 on; beyond, the normal distribution's 1.96 is near enough.
T_95 = (
    12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09, 2.09,
    2.08, 2.07, 2.07, 2.06, 2.06, 2.06, 2.05, 2.05, 2.05,
)  # fmt: skip


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean, by Student's t; 0 of one value."""
    count = len(values)
    if count < 2:
        return 0.0
    quantile = T_95[count - 2] if count - 2 < len(T_95) else 1.96
    return quantile * statistics.stdev(values) / math.sqrt(count)


def spread(values: Sequence[float], digits: int = 4, signed: bool = False) -> str:
    """Mean ± half of its 95 % interval; of one value, that alone, and of none nothing."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):{'+' if signed else ''}.{digits}f}"
    return f"{mean} ± {half_width(values):.{digits}f}" if len(values) > 1 else mean
