"""`docs/evidence.md` and its plots from the result lines of `bench/evidence.py` and `bench/exact.py`, and nothing else.

Each figure is a mean over seeds ± twice its standard error; differences are paired by seed. What the page says in words
about equivalence and gains is decided by rules that are stated on it, not by hand.

Lower is better for bits per byte and calibration error.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evidence_cells import CONTROLS, CROSS_ENTROPY, CacheChoice, Cell, Scale, cell, grid, seeds_of
from evidence_results import Results, spread, twice_error

from shared.cache.plots import Curve, Plot, svg

MARGIN = 0.1  # of the distillation gain: the equivalence margin, fixed beforehand
Metric = Callable[[dict[str, Any]], float]


def bits(record: dict[str, Any]) -> float:
    """Bits per byte, averaged over timesteps."""
    return float(record["bits_per_byte"])


def accuracy(record: dict[str, Any]) -> float:
    """Share of masked chunks whose best filling is the gold, in percent."""
    return 100 * float(record["quality"]["all"]["accuracy"])


def calibration(record: dict[str, Any]) -> float:
    """Expected calibration error."""
    return float(record["quality"]["all"]["calibration_error"])


def infilled(step: int) -> Metric:
    """Share of spans that are right, in percent, at the given number of steps' place."""
    return lambda record: 100 * float(record["infilling"][step]["exact"])


def completed(step: int, name: str) -> Metric:
    """Share of functions, in percent."""
    return lambda record: 100 * float(record["completion"][step][name])


@dataclass(frozen=True)
class Found:
    """The results of one scale, by cell."""

    scale: Scale
    results: Results

    def records(self, first: Cell, question: str) -> list[dict[str, Any]]:
        """One record per seed that is there."""
        found = [
            self.results.cells.get(dataclasses.replace(first, seed=seed).digest(self.scale))
            for seed in seeds_of(question, self.scale)
        ]
        return [record for record in found if record is not None]

    def paired(self, a: Cell, b: Cell, metric: Metric, question: str) -> list[float]:
        """metric(a) − metric(b) by seed."""
        pairs = [
            tuple(self.results.cells.get(dataclasses.replace(one, seed=seed).digest(self.scale)) for one in (a, b))
            for seed in seeds_of(question, self.scale)
        ]
        return [metric(x) - metric(y) for x, y in pairs if x is not None and y is not None]


COLUMNS: tuple[tuple[str, Metric, int], ...] = (
    ("bits per byte", bits, 4),
    ("top-1 %", accuracy, 2),
    ("calibration error", calibration, 3),
    ("spans % at 1 token per forward", infilled(2), 1),
    ("spans % at 4", infilled(0), 1),
    ("valid functions % at 1", completed(2, "valid"), 1),
    ("valid at 6", completed(0, "valid"), 1),
)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text."""
    line = "|" + "|".join([" --- ", *[" ---: " for _ in head[1:]]]) + "|"
    return "\n".join(["| " + " | ".join(head) + " |", line, *["| " + " | ".join(row) + " |" for row in rows]])


def question_table(found: Found, question: str) -> str:
    """One row per cell, with the paired difference to cross-entropy in bits per byte."""
    head = ["student", "seeds", "bits per byte", "− cross-entropy's", *[name for name, _, _ in COLUMNS[1:]]]
    if question == "learning rate":
        head = ["student", "seeds", "bits per byte on the validation documents", "top-1 %"]
    rows = []
    for first in dict.fromkeys(c for q, c in grid() if q == question):
        records = found.records(first, question)
        if not records:
            continue
        row = [first.label, str(len(records)), spread([bits(r) for r in records])]
        if question == "learning rate":
            row.append(spread([accuracy(r) for r in records], 2))
        else:
            difference = found.paired(first, CROSS_ENTROPY, bits, question)
            row.append(spread(difference, signed=True) if difference and first != CROSS_ENTROPY else "")
            row += [spread([metric(r) for r in records], digits) for _, metric, digits in COLUMNS[1:]]
        rows.append(row)
    return markdown(head, rows) if rows else "not measured yet"


def events(draws: int, fresh: float = 0.0) -> Cell:
    """Event KL from so many stored draws; 0: all, which is the teacher in the loop."""
    return cell("kl", CacheChoice(draws=draws), distill_weight=5.0, fresh=fresh)


def equivalence(found: Found) -> str:
    """Whether K ≤ 2 draws with fresh rows equal the teacher in the loop, by the rule."""
    question = "offline and online"
    gain = [-d for d in found.paired(events(0), CROSS_ENTROPY, bits, question)]
    if not gain:
        return "Not measured yet."
    margin = MARGIN * statistics.mean(gain)
    gained = statistics.mean(gain) > twice_error(gain)
    if not gained:
        return (
            f"With the teacher in the loop event KL gains {spread(gain)} bits per byte over cross-entropy with as many masks: "
            "no more than the spread, so there is no gain that few draws could be held against."
        )
    lines = [
        f"With the teacher in the loop event KL gains {spread(gain)} bits per byte over cross-entropy with as many masks. "
        f"The margin, {MARGIN:.0%} of that gain, is {margin:.4f}; *equivalent* means that the interval of the paired "
        "difference lies within it, *worse* that it lies beyond it, *undecided* all else.",
        "",
    ]
    rows = []
    for draws, fresh in ((1, 0.0), (1, 0.5), (2, 0.0), (2, 0.5), (4, 0.0), (4, 0.5)):
        difference = found.paired(events(draws, fresh), events(0), bits, question)
        if not difference:
            continue
        low = statistics.mean(difference) - twice_error(difference)
        high = statistics.mean(difference) + twice_error(difference)
        verdict = "equivalent" if -margin < low and high < margin else "undecided"
        verdict = "worse" if low > margin else "better" if high < -margin else verdict
        rows.append([str(draws), f"{fresh:g}", spread(difference, signed=True), verdict])
    return "\n".join([*lines, markdown(["draws", "fresh rows", "bits per byte − online's", "verdict"], rows)])


def gains(found: Found) -> str:
    """Whether the best cross-tokenizer recipe beats cross-entropy and the n-gram control, by the rule."""
    question, best = "controls", events(0)
    rows = []
    for name, other in (
        ("cross-entropy", CROSS_ENTROPY),
        *((f"event KL, {t} teacher", cell("kl", CacheChoice(teacher=t), distill_weight=5.0)) for t in CONTROLS),
        ("cross-entropy on completed text", dataclasses.replace(CROSS_ENTROPY, cache=CacheChoice(teacher="completed"))),
    ):  # fmt: skip
        row = [name]
        for metric, better in ((bits, -1), (accuracy, 1)):
            difference = found.paired(best, other, metric, question)
            if not difference:
                row += ["", ""]
                continue
            wins = better * statistics.mean(difference) > twice_error(difference)
            loses = -better * statistics.mean(difference) > twice_error(difference)
            row += [spread(difference, signed=True), "better" if wins else "worse" if loses else "no difference"]
        rows.append(row)
    return markdown(["event KL minus …", "bits per byte", "", "top-1, points", ""], rows)


def costs(found: Found) -> str:
    """Seconds and bytes of the cache against the teacher in the loop, and from how many students on it pays."""
    took = {k.removeprefix("cache:"): v for k, v in found.results.cells.items() if k.startswith("cache:")}
    whole = took.get("tiny-chunk-1")
    records = found.records(events(0), "offline and online")
    if whole is None or not records:
        return "Not measured yet."
    per_draw = whole["seconds"] / found.scale.draws
    online = whole["teacher_seconds"]
    student = statistics.mean([r["train_seconds"] for r in records])
    rows = []
    for draws in (1, 2, 4, found.scale.draws):
        cache = took.get(f"tiny-chunk-1-draws{draws}-k16", {})
        capture = per_draw * draws
        runs = capture / online
        rows.append(
            [
                str(draws),
                f"{cache.get('bytes', 0):,}",
                f"{capture:.0f}",
                f"{student:.0f}",
                f"{student + online:.0f}",
                f"{max(runs, 0):.2f}",
            ]
        )
    head = [
        "draws",
        "bytes (k = 16)",
        "capture, s",
        "student from cache, s",
        "student online, s",
        "pays from … runs on",
    ]
    return markdown(head, rows)


def draws_plot(found: Found) -> Plot | None:
    """Bits per byte against stored draws."""
    curves = []
    for colour, (name, make) in enumerate(
        (
            ("event KL", lambda k, f: cell("kl", CacheChoice(draws=k), distill_weight=5.0, fresh=f)),
            ("cross-entropy", lambda k, f: cell("none", CacheChoice(draws=k), fresh=f)),
        )
    ):
        for fresh in (0.0, 0.5):
            x, y = [], []
            for draws in (1, 2, 4, 0):
                records = found.records(make(draws, fresh if draws else 0.0), "offline and online")
                if records:
                    x.append(float(draws or found.scale.draws))
                    y.append(statistics.mean([bits(r) for r in records]))
            if x:
                title = f"{name}, half fresh rows" if fresh else name
                curves.append(Curve(title, x, y, dashed=fresh > 0, colour=colour + 1))
    if not curves:
        return None
    return Plot("Bits per byte against stored draws per document", "draws", "bits per byte", curves)


def generation_plot(found: Found) -> Plot | None:
    """Infilled spans against tokens per forward."""
    curves = []
    for colour, (name, first) in enumerate(
        (
            ("cross-entropy", CROSS_ENTROPY),
            ("event KL", events(0)),
            ("reverse event KL", cell("reverse-kl", distill_weight=5.0)),
            ("Reverse CALM", cell("reverse-calm")),
        )
    ):
        records = found.records(first, "offline and online") or found.records(first, "objectives")
        if not records:
            continue
        steps = range(len(records[0]["infilling"]))
        x = [records[0]["infilling"][s]["tokens_per_forward"] for s in steps]
        y = [statistics.mean([infilled(s)(r) for r in records]) for s in steps]
        curves.append(Curve(name, x, y, colour=colour + 1))
    return (
        Plot("Spans filled exactly against tokens per forward", "tokens per forward", "%", curves) if curves else None
    )


INTRODUCTION = """# Evidence

What offline distillation costs and what it gains, measured with the embedded pair on this Python's standard library.
Written by `{command}` from `{results}`; nothing on this page is typed by hand. Text, caches and measurements are described in
`bench/evidence_work.py`: students are trained on {documents} documents for {epochs} epochs ({steps} steps of {batch},
learning rate {rate:g} unless a row names another), from one base, and measured on {test} documents of modules that neither
model has seen and that `make demo` does not show. Figures are means over seeds ± twice the standard error; differences
are paired by seed. An embedded model of 1.7M parameters on 0.1 MB of text is a small world: read the directions, not
the sizes.
"""
SECTIONS = (
    ("offline and online", "Offline against online", "As many stored draws as epochs, each used once, have the law of a teacher "
        "in the loop (`tests/e2e/test_replay.py`: the same losses and gradients), so the last rows stand for it."),
    ("objectives", "Objectives", ""),
    ("candidates", "Candidates per chunk", ""),
    ("contexts", "Contexts and directions", ""),
    ("TIDAL", "TIDAL", ""),
    ("controls", "Controls", "Teachers that know less, in place of the embedded one (`bench/evidence_teachers.py`)."),
    ("mask laws", "Mask laws", ""),
    ("tokenizers", "Declared student tokenizers", "More declared tokenizers make longer chunks."),
    ("learning rate", "Learning rates", "Chosen on documents of their own."),
)  # fmt: skip


def standalone(plot: Plot) -> str:
    """The plot as a file of its own, on white."""
    return svg(plot).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" style="background:#fff" ', 1) + "\n"


def write_page(path: Path, scale: Scale, results: Results) -> None:
    """Write the page and, in a folder beside it, its plots."""
    found = Found(scale, results)
    folder = path.parent / path.stem
    parts = [
        INTRODUCTION.format(
            command="make evidence" if scale.name == "full" else f"make evidence-{scale.name}",
            results=f"bench/results/{results.path.name}", documents=scale.documents, epochs=scale.epochs,
            steps=scale.steps, batch=scale.batch, rate=scale.learning_rate, test=scale.test_documents,
        )
    ]  # fmt: skip
    for name, plot in (("draws", draws_plot(found)), ("generation", generation_plot(found))):
        if plot is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.svg").write_text(standalone(plot), encoding="utf-8")
            parts.append(f"![{plot.title}]({folder.name}/{name}.svg)\n")
    for question, title, note in SECTIONS:
        parts.append(f"## {title}\n" + (f"\n{note}\n" if note else ""))
        if question == "offline and online":
            parts += [equivalence(found) + "\n", costs(found) + "\n"]
        if question == "controls":
            parts.append(gains(found) + "\n")
        parts.append(question_table(found, question) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")
