"""`docs/evidence.md` and its plots from the result lines of `bench/evidence.py` and `bench/exact.py`, and nothing else.

Each figure is a mean over seeds ± half of its 95 % interval; differences are paired by seed. What the page says in words
about equivalence and gains is decided by rules that are stated on it (`evidence_claims`), not by hand.
"""

from __future__ import annotations

from pathlib import Path

from evidence_cells import BEST, CROSS_ENTROPY, FULL, VALIDATED_CROSS_ENTROPY, WIDE_CROSS_ENTROPY, grid
from evidence_claims import REFERENCE_NAMES, costs, equivalence, front_table, gains, in_short, verdicts
from evidence_found import Found, Metric, accuracy, bits, bits_in, calibration, completed, infilled, markdown
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
    *((f"valid functions % at {rate}", completed(place, "valid"), 1) for place, rate in ((1, 1), (0, 4))),
    *(
        (f"{name} % at 1", completed(1, key), 1)
        for name, key in (("next line", "next_line"), ("functions exact", "exact"))
    ),
)
REFERENCES = {"settings": VALIDATED_CROSS_ENTROPY, "generation": WIDE_CROSS_ENTROPY}
LIKELIHOOD_ALONE: tuple[tuple[str, Metric, int], ...] = (("top-1 %", accuracy, 2),)
BY_TIMESTEP: tuple[tuple[str, Metric, int], ...] = tuple(
    (f"t {low:g}–{low + 0.2:g}", bits_in(place), 3) for place, low in enumerate((0.0, 0.2, 0.4, 0.6, 0.8))
)

INTRODUCTION = """# Evidence

What offline distillation costs and what it gains: in a sandbox whose teacher is exactly known, and with the embedded pair on
Python's standard library. Written by `{command}` from `{results}` and `exact.jsonl` beside it; no figure or verdict on
this page is typed by hand. Figures are means over seeds ± half of their 95 % interval (Student's t), differences are paired by
seed, and *tuned* means {tuned},
as chosen on documents of their own (*Settings*, at the end). A pair of 1.7M parameters and 0.1 MB of text is a small world: read the
directions, not the sizes.

## In short
"""
PAIR = """## The embedded pair

Students are trained on {documents} documents for {epochs} epochs ({steps} steps of {batch} rows, learning rate {rate:g} unless a row
names another) from one base, and measured on {test} documents of modules that neither model has seen and that `make demo` does not
show. *Spans*: four masked tokens in each block, filled exactly; *valid code*: the document still parses with a filled span. The base
itself: {base_bits:.4f} bits per byte, {base_accuracy:.2f} %; the teacher on the same masks, {teacher}.
"""
SECTIONS = (
    ("offline and online", "Offline against online", "As many stored draws as epochs, each used once, have the law of a teacher "
        "in the loop (`tests/e2e/test_replay.py`: the same losses and gradients), so four draws stand for it, and more would "
        "not be used. `reuse=halves`: a draw used again masks one half of its chunks, then the other, with the rest shown."),
    ("controls", "Gains over controls", "In place of the teacher: token frequencies, a bidirectional n-gram model of the same "
        "text, label smoothing, and the teacher's own answers about other places (`bench/evidence_teachers.py`). *Completed "
        "text*: cross-entropy on the training text with masked chunks sampled from the teacher."),
    ("generation", "Generation, and more documents", "The spread above is over seeds, on the same documents; others differ by more. "
        "Students on {wide} further documents, which have enough functions to complete as well; *at 1*, *2*, *4*: tokens per "
        "forward. *Valid functions*: those whose last statement the student wrote, and that parse; *next line*: its first "
        "line is the document's; *exact*: all of it is, where it ends included. The base itself: {wide_base}."),
    ("objectives", "Objectives", "The first row that distils is the default recipe, `reverse-calm-tidal`."),
    ("TIDAL", "TIDAL", "At matched mean weight over timesteps. Heavy noise has more chunks, so per chunk an axis that favours light noise "
        "weighs less: 20 on the timestep's axis is 12 per chunk, 18 without an axis is 18."),
    ("contexts", "Contexts and directions", "By timestep. Reverse CALM with weight 1, the others tuned, KL with measured weights."),
    ("candidates", "Candidates per chunk", "`k` fillings of each chunk are stored."),
    ("mask laws", "Mask laws", "Whole chunks are masked with probability t, or those with a masked token."),
    ("tokenizers", "Declared student tokenizers", "More declared tokenizers make longer chunks. `declared=False`: the cache "
        "declares another tokenizer than the student's."),
    ("settings", "Settings", "On validation documents, one seed: what the settings were chosen by."),
)  # fmt: skip


def question_table(found: Found, question: str) -> str:
    """One row per cell, with the paired difference to cross-entropy in bits per byte."""
    columns = {"settings": LIKELIHOOD_ALONE, "generation": GENERATION, "contexts": BY_TIMESTEP}.get(question, COLUMNS)
    head = ["student", "seeds", "bits per byte", "− cross-entropy's", *[name for name, _, _ in columns]]
    if question in REFERENCE_NAMES:
        head += [f"bits, against {REFERENCE_NAMES[question]}", "top-1, against it"]
    rows = []
    for first in dict.fromkeys(c for q, c in grid(found.scale) if q == question):
        records = found.records(first, question)
        if not records:
            continue
        reference = REFERENCES.get(question, CROSS_ENTROPY)
        difference = found.paired(first, reference, bits, question) if first != reference else []
        row = [first.label, str(len(records)), spread([bits(r) for r in records]), spread(difference, signed=True)]
        row += [spread([metric(r) for r in records], digits) for _, metric, digits in columns]
        rows.append(row + (verdicts(found, question, first) if question in REFERENCE_NAMES else []))
    return markdown(head, rows) if rows else "Not measured yet."


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
        test=scale.test_documents, base_bits=bits(base), base_accuracy=accuracy(base), teacher=teacher,
    )  # fmt: skip


def wide_base(found: Found) -> str:
    """The base on the documents of the generation, as the columns of its table."""
    base = found.results.cells["base"].get("wide")
    if base is None:
        return "not measured yet"
    columns = (("bits per byte", bits, 4), *GENERATION)
    return ", ".join(f"{name} {metric(base):.{digits}f}" for name, metric, digits in columns)


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
        note = note.format(wide=found.scale.wide_documents, wide_base=wide_base(found))
        parts.append(f"### {title}\n\n{note}\n")
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
