"""The exact sandbox's part of `docs/evidence.md`, from the result lines of `bench/exact.py`."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import Any

from evidence_found import markdown
from evidence_results import Results, spread
from exact_cells import SETTINGS, Cell, grid
from exact_corpus import Run

NOTES = {
    "draws and fresh rows": "16 epochs; 16 draws use each once, as the teacher in the loop would.",
    "objectives": "*With entropy*: with the term that Reverse CALM leaves out of the reverse KL of \"the gold or something else\".",
    "weight of distillation": "Reverse CALM alone has no minimum at the teacher: its loss falls as long as a likelihood below "
        "one half falls, so more of it does harm; the entropy term or another direction mends that.",
    "TIDAL": "At matched mean weight, so that an axis is no hidden change of the weight. `measured`: by training progress and "
        "the teacher's reliability (`--timestep-weight measured`).",
}  # fmt: skip


@dataclass(frozen=True)
class Exact:
    """Results of `bench/exact.py` with the settings of one run."""

    results: Results
    run: Run

    def record(self, cell: Cell) -> dict[str, Any] | None:
        """The result of all seeds."""
        return self.results.cells.get(cell.digest(self.run))

    def kl(self, cell: Cell) -> list[float]:
        """KL(posterior ‖ student) in nats per masked token, one per seed; empty where it was not measured."""
        found = self.record(cell)
        return [] if found is None else [float(value) for value in found["kl"]]

    def gain(self, cell: Cell) -> list[float]:
        """KL minus cross-entropy's by seed."""
        reference = self.kl(Cell(cell.setting, "none"))
        return [a - b for a, b in zip(self.kl(cell), reference, strict=False)]


def questions() -> list[str]:
    """In the order of the grid."""
    return list(dict.fromkeys(question for setting in SETTINGS for question, _ in grid(setting)))


def table(exact: Exact, question: str) -> str:
    """One row per cell, both settings side by side."""
    cells = dict.fromkeys(replace(c, setting="same") for s in SETTINGS for q, c in grid(s) if q == question)
    head = ["student"]
    for name in ("same tokenizer", "two tokenizers"):
        head += [f"{name}: KL", "− cross-entropy's", "top-1 %"]
    rows = []
    for cell in cells:
        row = [cell.label]
        for setting in SETTINGS:
            here = replace(cell, setting=setting)
            found = exact.record(here)
            if found is None or not any(c == here for _, c in grid(setting)):
                row += ["", "", ""]
                continue
            difference = "" if here == Cell(setting, "none") else spread(exact.gain(here), signed=True)
            row += [spread(exact.kl(here)), difference, f"{100 * statistics.mean(found['accuracy']):.2f}"]
        if any(row[1:]):
            rows.append(row)
    return markdown(head, rows) if rows else "Not measured yet."


def kept(exact: Exact) -> str:
    """How much of the gain of the teacher in the loop few draws keep."""
    rows = []
    for draws in (1, 2, 4, 8):
        for fresh in (0.0, 0.5):
            row = [str(draws), f"{fresh:g}"]
            for setting in SETTINGS:
                whole, part = (
                    exact.gain(Cell(setting, "kl", **fields)) for fields in ({}, {"draws": draws, "fresh": fresh})
                )
                row.append(f"{statistics.mean(part) / statistics.mean(whole):.0%}" if whole and part else "")
            rows.append(row)
    return markdown(["draws", "fresh rows", "same tokenizer", "two tokenizers"], rows)


def section(exact: Exact) -> list[str]:
    """Everything of the exact sandbox but for its plots, as Markdown parts."""
    run = exact.run
    parts = [
        "## An exactly known teacher\n",
        f"`python bench/exact.py --seeds {run.seeds}`: text from a random hidden-Markov source of {run.states} states, so that "
        "the teacher is the exact posterior and a student's error is KL(posterior ‖ student) on held-out text, nats per masked "
        f"token. {run.documents} documents, {run.epochs} epochs, {run.seeds} seeds, each with its own source, corpus, masks and "
        "weights. *Same tokenizer*: chunks of one token; *two tokenizers*: chunks of three teacher and two student tokens.\n",
        "Share of the gain of event KL with the teacher in the loop over cross-entropy that few draws keep:\n",
        kept(exact) + "\n",
    ]
    for question in questions():
        parts.append(f"### {question[0].upper()}{question[1:]}\n")
        if question in NOTES:
            parts.append(NOTES[question] + "\n")
        parts.append(table(exact, question) + "\n")
    return parts
