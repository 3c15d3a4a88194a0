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
    "weight of distillation": "Reverse CALM alone has no minimum at the teacher: where the teacher's likelihood is below one half, "
        "its loss falls with the student's.",
    "TIDAL": "At matched mean weight over timesteps. `measured`: by training progress and "
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
        head += [f"{name}: KL", "− reference", "top-1 %"]
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


def reached(exact: Exact, cell: Cell) -> str:
    """KL, and what share it is of the gain over cross-entropy that event KL has with the teacher in the loop (compdemo), if
    that is a tenth of cross-entropy's error at least.
    """
    found, part = exact.kl(cell), exact.gain(cell)
    whole, none = exact.gain(Cell(cell.setting, context="compdemo")), exact.kl(Cell(cell.setting, "none"))
    if not found or not whole:
        return ""
    gained = -statistics.mean(whole) > 0.1 * statistics.mean(none)
    return f"{statistics.mean(found):.4f}" + (
        f" ({statistics.mean(part) / statistics.mean(whole):.0%})" if gained else ""
    )


def kept(exact: Exact) -> str:
    """What event KL reaches from few draws."""
    head, rows = ["draws", "fresh rows"], []
    for name in ("same tokenizer", "two tokenizers"):
        head += [f"{name}: same again", "halves again"]
    for draws in (1, 2, 4):
        for fresh in (0.0, 0.5):
            row = [str(draws), f"{fresh:g}"]
            for setting in SETTINGS:
                for context in ("compdemo", "halves"):
                    row.append(reached(exact, Cell(setting, draws=draws, fresh=fresh, context=context)))
            rows.append(row)
    loop = [reached(exact, Cell(setting, context="compdemo")) for setting in SETTINGS]
    rows += [["in the loop", "", *[text for one in loop for text in (one, "")]]]
    return markdown(head, rows)


def in_short(exact: Exact) -> list[str]:
    """What the sandbox says, in sentences."""
    none, online, halves, again = (
        exact.kl(cell)
        for cell in (
            Cell("same", "none"),
            Cell("same", context="compdemo"),
            Cell("same", draws=2, fresh=0.5, context="halves"),
            Cell("same", draws=2, fresh=0.5, context="compdemo"),
        )
    )
    weights = (1.0, 5.0, 25.0)
    by_weight = {
        setting: {
            name: [exact.gain(Cell(setting, objective, weight=weight)) for weight in weights]
            for name, objective in (("CALM", "calm"), ("Reverse CALM", "reverse-calm"), ("event KL", "kl"))
        }
        for setting in ("same", "cross")
    }
    entropy = exact.gain(Cell("same", "bernoulli-reverse-kl"))
    gains = [gain for found in by_weight.values() for row in found.values() for gain in row]
    if not all((none, online, halves, again, entropy, *gains)):
        return []

    def listed(setting: str) -> str:
        return "; ".join(
            f"{name} {', '.join(spread(gain, signed=True) for gain in row)}" for name, row in by_weight[setting].items()
        )

    def paired(few: list[float]) -> str:
        return spread([a - b for a, b in zip(few, online, strict=True)], signed=True)

    return [
        f"**Sandbox, few draws**: event KL takes a student's error from {spread(none)} to {spread(online)} nats per token. Two draws "
        f"for 16 epochs, half of the rows fresh, differ from that by {paired(halves)} when a draw used again masks its halves, by "
        f"{paired(again)} when it masks the same.",
        f"**Sandbox, change of the error with weights 1, 5 and 25**, one tokenizer: {listed('same')}. Reverse CALM with the entropy "
        f"that makes it a reverse KL, weight 1: {spread(entropy, signed=True)}.",
        f"**Sandbox, two tokenizers** whose common chunks are three teacher tokens long, weights 1, 5 and 25: {listed('cross')}.",
    ]


def section(exact: Exact) -> list[str]:
    """Everything of the exact sandbox but for its plots, as Markdown parts."""
    run = exact.run
    parts = [
        "## An exactly known teacher\n",
        f"`python bench/exact.py --seeds {run.seeds}`: text from a random hidden-Markov source of {run.states} states, so that "
        "the teacher is the exact posterior and a student's error is KL(posterior ‖ student) on held-out text, nats per masked "
        f"token. {run.documents} documents, {run.epochs} epochs, {run.seeds} seeds, each with its own source, corpus, masks and "
        "weights. *Same tokenizer*: chunks of one token; *two tokenizers*: chunks of three teacher and two student tokens.\n",
        "What event KL reaches from few draws, KL to the posterior and the share of the gain over cross-entropy that the "
        "teacher in the loop brings (context compdemo): below 0 % a student is worse than cross-entropy with fresh masks, and "
        "where the gain is less than a tenth of cross-entropy's error no share is given.\n",
        kept(exact) + "\n",
        "In the tables, *reference* is cross-entropy with as many masks as epochs and learning rate 0.01. With two tokenizers "
        "cross-entropy itself gains more from learning rate 0.03 than any objective at 0.01: read that setting within its columns.\n",
    ]
    for question in questions():
        parts.append(f"### {question[0].upper()}{question[1:]}\n")
        if question in NOTES:
            parts.append(NOTES[question] + "\n")
        parts.append(table(exact, question) + "\n")
    return parts
