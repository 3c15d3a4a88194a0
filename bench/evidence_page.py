"""`docs/evidence.md` and its plots from the result lines of `bench/evidence.py` and `bench/exact.py`, and nothing else.

Each figure is a mean over seeds ± half of its 95 % interval; differences are paired by seed. What the page says in words
about equivalence and gains is decided by rules that are stated on it (`evidence_claims`), not by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evidence_cells import BEST, CROSS_ENTROPY, FULL, VALIDATED_CROSS_ENTROPY, WIDE_CROSS_ENTROPY, grid
from evidence_claims import REFERENCE_NAMES, costs, equivalence, front_table, gains, in_short, verdicts
from evidence_found import (
    Found,
    Metric,
    accuracy,
    bits,
    bits_in,
    calibration,
    chunk_length,
    completed,
    cut,
    infilled,
    markdown,
)
from evidence_plots import plots_of, standalone
from evidence_results import Results, spread
from exact_corpus import Run
from exact_page import Exact, section
from exact_page import in_short as exact_in_short

ROOT = Path(__file__).resolve().parents[1]
FULL_RESULTS = ROOT / "bench" / "results" / "evidence-full.jsonl"
EXACT_RESULTS = ROOT / "bench" / "results" / "exact.jsonl"

MARKS = ("<!-- evidence: written by bench/evidence_page.py -->", "<!-- end of evidence -->")

COLUMNS: tuple[tuple[str, Metric, int], ...] = (
    ("top-1 %", accuracy, 2),
    ("calibration error", calibration, 3),
    ("spans % at 1 token per forward", infilled(2), 1),
    ("spans % at 4", infilled(0), 1),
    ("valid code % at 1", infilled(2, "valid"), 1),
)
GENERATION: tuple[tuple[str, Metric, int], ...] = (
    ("top-1 %", accuracy, 2),
    *((f"spans % at {4 >> place}", infilled(place), 1) for place in (2, 1, 0)),
    *((f"valid code % at {4 >> place}", infilled(place, "valid"), 1) for place in (2, 0)),
    *((f"valid functions % in {steps} steps", completed(place, "valid"), 1) for place, steps in ((1, 48), (0, 12))),
    *((f"{name} % in 48", completed(1, key), 1) for name, key in (("next line", "next_line"), ("exact", "exact"))),
)
CHUNKS: tuple[tuple[str, Metric, int], ...] = (
    ("teacher tokens per chunk", chunk_length, 2),
    ("documents cut", cut, 0),
    *COLUMNS,
)
REFERENCES = {"settings": VALIDATED_CROSS_ENTROPY, "generation": WIDE_CROSS_ENTROPY}
LIKELIHOOD_ALONE: tuple[tuple[str, Metric, int], ...] = (("top-1 %", accuracy, 2),)
BY_TIMESTEP: tuple[tuple[str, Metric, int], ...] = tuple(
    (f"t {low:g}–{low + 0.2:g}", bits_in(place), 3) for place, low in enumerate((0.0, 0.2, 0.4, 0.6, 0.8))
)

INTRODUCTION = """# Evidence

What offline distillation costs and what it gains: in a sandbox whose teacher is exactly known, and with the embedded pair on
Python's standard library. Written by `{command}` from `{results}` and `exact.jsonl` beside it; no figure or verdict on
this page is typed by hand. A pair of 1.7M parameters and 0.1 MB of text is a small world: read the directions, not the sizes.

**How to read it.** Figures are means over seeds ± half of their 95 % interval (Student's t); differences are paired by seed. *Better*
and *worse*: that interval excludes 0; else *within the spread*. Seeds vary the order of rows and the fresh masks: one base, one
capture, one set of documents and few seeds stand behind each verdict, and with about a hundred of them some are chance.

**Words.** A *chunk* is the shortest piece of text that teacher and student both tokenize by itself; a *draw* is one stored
masking of a document, with the teacher's likelihoods of its masked chunks. *Fresh* rows are masked anew in training, and bear
cross-entropy alone. *Halves*: a draw used again masks one half of its chunks, then the other, with the rest shown. *Event KL* compares
teacher and student on each chunk's gold, its `k` best fillings and all else together; *CALM* on the gold alone, *Reverse CALM* the
other way round ([recipes](recipes.md)). *CompDemo* shows the teacher half of the masked chunks while it scores the other half;
*plain* shows none. *TIDAL* weighs or mixes the teacher by training progress, timestep or both. *Tuned* means {tuned}, the
recipe `events`: weight, gold share and timestep weights were chosen on documents of their own (*Settings*, at the end), with one
seed; TIDAL's mode and axis were not.

## In short
"""
PAIR = """## The embedded pair

Students are trained on {documents} documents for {epochs} epochs ({steps} steps of {batch} rows, learning rate {rate:g} unless a row
names another) from one base, and measured on {test} documents of modules that neither model has seen and that `make demo` does not
show. *Bits per byte* of masked text, each fifth of the timesteps with the same weight; *top-1*: the share of masked chunks whose best
filling is the document's, heavy noise having more of them; *calibration error*: the expected one, lower is better. *Spans*: four
masked tokens in each block, {spans} in all, filled exactly; *valid code*: the document still parses with a
filled span. The teacher has on the same masks, in bits per byte, {teacher}; in compdemo it sees half of them.
"""
SECTIONS = (
    ("offline and online", "Offline against online", "As many stored draws as epochs, each used once, have the law of a teacher "
        "in the loop (`tests/e2e/test_replay.py`: the same losses and gradients), so the student of four draws *is* the one with "
        "the teacher in the loop; none was trained beside it, and more draws would not be used."),
    ("controls", "Gains over controls", "In place of the teacher: token frequencies, a bidirectional n-gram model of the same "
        "text, label smoothing, and the teacher's own answers about other places (`bench/evidence_teachers.py`), with the "
        "settings tuned for the teacher, and n-grams with weight 1 besides. *Completed text*: cross-entropy on the training text "
        "with masked chunks sampled from the teacher. *Equal training seconds*: as many more steps; *with the capture*: as if this "
        "one student "
        "paid for the whole cache."),
    ("generation", "Generation, and more documents", "The spread above is over seeds, on the same documents; others differ by more. "
        "Students on {wide} further documents, which have enough functions to complete as well. Spans *at 1*, *2*, *4* tokens per "
        "forward; 48 tokens of a function in 48 or 12 steps, its last statement left out. *Valid functions* parse with another "
        "statement, *next line*: its first line is the document's; *exact*: all of it is, and the function ends there."),
    ("objectives", "Objectives", "The first row that distils is the default recipe, `reverse-calm-tidal`."),
    ("TIDAL", "TIDAL", "The mean weight over training and timesteps is the same in all rows. Heavy noise has more chunks, so "
        "where light noise weighs more the mean over chunks is less: 12 on the timestep's axis with weight 20, 18 without an axis."),
    ("contexts", "Contexts and directions", "By timestep. Reverse CALM with weight 1, the others tuned, KL with measured weights."),
    ("candidates", "Candidates per chunk", "`k` fillings of each chunk are stored; 16 where nothing is said."),
    ("mask laws", "Mask laws", "Each chunk is masked with probability t, or (`token`) each token is, and with it its chunk. Both are "
        "measured on whole-chunk masks."),
    ("tokenizers", "Declared student tokenizers", "More declared tokenizers make longer chunks, and cut documents earlier. "
        "`declared=False`: the cache declares another tokenizer than the student's, which masks what chunks it can. All are "
        "measured on the chunks of the student's tokenizer alone."),
    ("settings", "Settings", "On validation documents, one seed: what the settings were chosen by."),
)  # fmt: skip


def question_table(found: Found, question: str) -> str:
    """One row per cell, with the paired difference to cross-entropy in bits per byte, and its verdicts where it has a reference."""
    columns = {
        "settings": LIKELIHOOD_ALONE,
        "generation": GENERATION,
        "contexts": BY_TIMESTEP,
        "tokenizers": CHUNKS,
    }.get(question, COLUMNS)
    head = ["student", "seeds", "bits per byte", "− cross-entropy's", *[name for name, _, _ in columns]]
    if question in REFERENCE_NAMES:
        head += [f"bits, against {REFERENCE_NAMES[question]}", "top-1, against it"]
    rows = []
    if base := base_of(found, question):
        rows.append(
            ["base", "", f"{bits(base):.4f}", "", *[f"{metric(base):.{digits}f}" for _, metric, digits in columns]]
        )
        rows[0] += ["", ""] if question in REFERENCE_NAMES else []
    for first in dict.fromkeys(c for q, c in grid(found.scale) if q == question):
        records = found.records(first)
        if not records:
            continue
        reference = REFERENCES.get(question, CROSS_ENTROPY)
        difference = found.paired(first, reference, bits) if first != reference else []
        row = [first.label, str(len(records)), spread([bits(r) for r in records]), spread(difference, signed=True)]
        row += [spread([metric(r) for r in records], digits) for _, metric, digits in columns]
        rows.append(row + (verdicts(found, question, first) if question in REFERENCE_NAMES else []))
    return markdown(head, rows) if len(rows) > bool(base) else "Not measured yet."


def base_of(found: Found, question: str) -> dict[str, Any] | None:
    """The base's result on what a question's students are measured on, if it is there."""
    base = found.results.cells["base"]
    return {"settings": None, "tokenizers": None, "generation": base.get("wide")}.get(question, base)


def introduction(found: Found, exact: Exact) -> str:
    """Title, how to read the page, and the claims in short."""
    tuned = ", ".join(f"{key.replace('_', ' ')} {value:g}" if isinstance(value, float) else f"{key.replace('_', ' ')} {value}"
                      for key, value in BEST.items())  # fmt: skip
    command = "make evidence" if found.scale.name == "full" else f"make evidence-{found.scale.name}"
    text = INTRODUCTION.format(command=command, results=f"bench/results/{found.results.path.name}", tuned=tuned)
    return text + "\n".join(f"- {line}" for line in [*in_short(found), *exact_in_short(exact)]) + "\n"


def pair_introduction(found: Found) -> str:
    """What the students, texts and measures are."""
    scale, base = found.scale, found.results.cells["base"]
    teacher = ", ".join(
        f"{name} {sum(b['bits_per_byte'] for b in quality['bins']) / len(quality['bins']):.3f}"
        for name, quality in base["teacher"].items()
    )
    return PAIR.format(
        documents=scale.documents, epochs=scale.epochs, steps=scale.steps, batch=scale.batch, rate=scale.learning_rate,
        test=scale.test_documents, teacher=teacher, spans=base["infilling"][0]["spans"],
    )  # fmt: skip


def write_kept(page: Path = ROOT / "docs" / "evidence.md", readme: Path = ROOT / "README.md") -> None:
    """Write the page of the results that are kept in the repository, and README's table."""
    found = Found(FULL, Results(FULL_RESULTS))
    write_page(page, found, Exact(Results(EXACT_RESULTS), Run()))
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), front_table(found)), encoding="utf-8")


def with_table(readme: str, table: str) -> str:
    """README with this table between its two marks."""
    before, rest = readme.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}"


def write_page(path: Path, found: Found, exact: Exact) -> None:
    """Write the page and, in a folder beside it, its plots."""
    folder = path.parent / path.stem
    plots = plots_of(found, exact)
    folder.mkdir(parents=True, exist_ok=True)
    for name, plot in plots.items():
        (folder / f"{name}.svg").write_text(standalone(plot), encoding="utf-8")

    def image(name: str) -> list[str]:
        return [f"![{plots[name].title}]({folder.name}/{name}.svg)\n"] if name in plots else []

    parts = [introduction(found, exact), *image("draws")]
    sandbox = section(exact)
    parts += [*sandbox[:4], *image("exact-draws"), *sandbox[4:], pair_introduction(found)]
    for question, title, note in SECTIONS:
        if question == "generation" and not found.scale.wide_documents:
            continue
        parts.append(f"### {title}\n\n{note.format(wide=found.scale.wide_documents)}\n")
        if question == "offline and online":
            parts += [equivalence(found) + "\n", *image("draws-accuracy")]
        if question == "controls":
            parts.append(gains(found) + "\n")
        if question == "generation":
            parts += [*image("generation"), *image("functions")]
        if question == "contexts":
            parts += image("timesteps")
        parts.append(question_table(found, question) + "\n")
    parts += ["### What it costs\n", costs(found.results.cells.get("costs")) + "\n"]
    path.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    write_kept()
