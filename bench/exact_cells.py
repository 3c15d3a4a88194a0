"""What `bench/exact.py` compares: one frozen cell per configuration, and the grid of all of them.

A cell is trained for all seeds at once. Its digest names its result, so that a run that was stopped goes on, and a cell
whose configuration changes is done anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from evidence_cells import NAMES as OBJECTIVES

NAMES = OBJECTIVES | {"bernoulli-reverse-kl": "Reverse CALM with entropy"}


@dataclass(frozen=True)
class Setting:
    """Text and tokenizers. Lengths in symbols; `teacher` and `student`: symbols per token of each."""

    name: str
    symbols: int
    teacher: int
    student: int
    length: int

    @property
    def chunk(self) -> int:
        """Symbols between common boundaries: the least common multiple of 1, 2, 3 and the like."""
        return next(n for n in range(1, self.teacher * self.student + 1) if not (n % self.teacher or n % self.student))


SETTINGS = {
    "same": Setting("same", symbols=16, teacher=1, student=1, length=48),
    "cross": Setting("cross", symbols=4, teacher=2, student=3, length=96),
}


@dataclass(frozen=True)
class Cell:
    """One configuration. `draws`: stored draws per document, of which epoch e uses number e mod draws; 16 epochs with 16
    draws use each once, which is what the teacher in the loop would do.
    """

    setting: str
    objective: str = (
        "kl"  # none, calm, reverse-calm, bernoulli-reverse-kl, kl, reverse-kl; KL is over the events of k candidates
    )
    temperature: float = 1.0
    k: int = 16
    tail: str = "other"  # other: one event for all other fillings; none: renormalised over the k on both sides
    draws: int = 16
    fresh: float = 0.0
    context: str = "plain"  # or compdemo, or halves: compdemo, and a draw used again masks one half, then the other
    tidal: str = "none"  # none, weight, interpolate
    axis: str = (
        "both"  # or training, timestep, or measured: by training progress and the teacher's measured reliability
    )
    weight: float = 1.0  # of distillation beside cross-entropy
    learning_rate: float = 1e-2

    def to_json(self) -> dict[str, Any]:
        """One value per field."""
        return dataclasses.asdict(self)

    def digest(self, run: Any) -> str:
        """16 digits for this cell under the run's own settings (a dataclass)."""
        text = json.dumps([self.to_json(), dataclasses.asdict(run)], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def label(self) -> str:
        """The fields that differ from the default, for tables."""
        default = Cell(self.setting)
        fields = [
            f"{f.name}={getattr(self, f.name):g}"
            if isinstance(getattr(self, f.name), float)
            else f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)
            if f.name not in ("setting", "objective") and getattr(self, f.name) != getattr(default, f.name)
        ]
        return " ".join([NAMES[self.objective], *fields])


def grid(setting: str) -> Iterator[tuple[str, Cell]]:
    """(question, cell) in the order of the tables; a cell may answer several questions."""
    base = Cell(setting)
    change = dataclasses.replace
    none = change(base, objective="none")

    for rate in (3e-3, 1e-2, 3e-2):
        yield "learning rate of cross-entropy", change(none, learning_rate=rate)
        yield "learning rate of cross-entropy", change(base, learning_rate=rate)

    for draws in (1, 2, 4, 8, 16):
        for fresh in (0.0, 0.5):
            yield "draws and fresh rows", change(none, draws=draws, fresh=fresh)
            yield "draws and fresh rows", change(base, draws=draws, fresh=fresh)

    for draws in (1, 2, 4):
        for fresh in (0.0, 0.5):
            for context in ("compdemo", "halves"):
                yield "halves of a draw", change(base, draws=draws, fresh=fresh, context=context)
    yield "halves of a draw", change(base, context="compdemo")

    yield "objectives", none
    for temperature in (1.0, 2.0, 5.0):
        for objective in ("calm", "reverse-calm", "bernoulli-reverse-kl"):
            yield "objectives", change(base, objective=objective, temperature=temperature)
    for temperature in (1.0, 2.0):
        for objective in ("kl", "reverse-kl"):
            yield "objectives", change(base, objective=objective, temperature=temperature)

    for weight in (0.2, 1.0, 5.0, 25.0):
        for objective in ("calm", "reverse-calm", "kl"):
            yield "weight of distillation", change(base, objective=objective, weight=weight)

    for k in (1, 4, 16, 64) if setting == "cross" else (1, 2, 4, 8, 16):
        for tail in ("other", "none"):
            if k > 1 or tail == "other":
                yield "candidates and tail", change(base, k=k, tail=tail)

    for context in ("plain", "compdemo"):
        for objective in ("calm", "reverse-calm", "kl", "reverse-kl"):
            yield "contexts by direction", change(base, objective=objective, context=context)

    # At matched mean weight: λ is ½ on average over training, and λ_max = 0.9 on the timestep's axis.
    for objective in ("reverse-calm", "calm", "kl"):
        yield "TIDAL", change(base, objective=objective)
        for axis, mean in (("both", 0.5), ("training", 0.5), ("timestep", 0.9), ("measured", 0.5)):
            yield "TIDAL", change(base, objective=objective, tidal="weight", axis=axis, weight=round(1 / mean, 4))
        yield "TIDAL", change(base, objective=objective, tidal="interpolate")
