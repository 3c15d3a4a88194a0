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


def twice_error(values: Sequence[float]) -> float:
    """Twice the standard error of the mean; 0 of one value."""
    return 2 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def spread(values: Sequence[float], digits: int = 4, signed: bool = False) -> str:
    """Mean ± twice its standard error; of one value, that alone, and of none nothing."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):{'+' if signed else ''}.{digits}f}"
    return f"{mean} ± {twice_error(values):.{digits}f}" if len(values) > 1 else mean
