"""`make evidence`: what offline distillation costs and gains, measured with the embedded pair; hours on 2 cores.

    python bench/evidence.py --scale full      # or quick: at most 15 minutes

Every cell of `evidence_cells` is one student, trained from a cache by the project's own code and measured on modules
that nobody has seen (`evidence_work`). A cell's result is one JSON line, kept under its configuration's digest, so a
stopped run goes on, several runs (each with an `--out` of its own) share the work, and `docs/evidence.md` is written from
these lines alone (`evidence_page`).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from evidence_cells import SCALES, cells
from evidence_costs import TRAINED, costs_of
from evidence_found import Found
from evidence_page import EXACT_RESULTS, FULL_RESULTS, write_kept, write_page
from evidence_results import Results
from evidence_work import Workshop, remember_views
from exact_corpus import Run
from exact_page import Exact
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Train the cells that have no result yet, then write the page."""
    parser = argparse.ArgumentParser(description="What offline distillation costs and gains, with the embedded pair.")
    parser.add_argument("--scale", choices=list(SCALES), default="full")
    parser.add_argument(
        "--out", type=Path, help="corpora, caches and the student in work; default: runs/evidence-SCALE"
    )
    parser.add_argument("--results", type=Path, help="JSON lines; default: bench/results/evidence-SCALE.jsonl")
    parser.add_argument("--question", action="append", help="only the students of these questions; costs is one")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so many")
    parser.add_argument(
        "--page", type=Path, help="default: docs/evidence.md for the kept results, else beside the results"
    )
    options = parser.parse_args()
    scale, console = SCALES[options.scale], Console()
    results = Results(options.results or ROOT / "bench" / "results" / f"evidence-{scale.name}.jsonl")
    work = Workshop(options.out or Path("runs") / f"evidence-{scale.name}", scale, console)
    todo = [c for c in cells(scale, options.question or ()) if c.digest(scale) not in results.cells]
    remember_views()
    begin = time.monotonic()
    base = results.cells.get("base", {})
    if not base or (scale.wide_documents and "wide" not in base):
        found = {"scale": scale.name, **work.measure(work.pair.base), "teacher": work.teacher_quality()}
        if scale.wide_documents:
            found["wide"] = work.measure(work.pair.base, "wide")
        results.add("base", found)
    for number, cell in enumerate(todo, 1):
        if time.monotonic() - begin > 60 * options.minutes:
            console.print(f"{len(todo) - number + 1} students are left: the same command goes on")
            break
        if cell.digest(scale) in Results(results.path).cells:
            continue  # by another process that shares the file
        started = time.monotonic()
        found = work.result(cell)
        results.add(cell.digest(scale), {"scale": scale.name, "cell": cell.to_json(), **found})
        console.print(
            f"{number}/{len(todo)} {cell.label}, seed {cell.seed}: {found['bits_per_byte']:.4f} bits per byte, "
            f"{found['quality']['all']['accuracy']:.1%}, {time.monotonic() - started:.0f} s",
            highlight=False,
        )
    else:
        known = Results(results.path).cells.get("costs", {"trains": {}})
        if not TRAINED.keys() <= known["trains"].keys() and (not options.question or "costs" in options.question):
            results.add("costs", {"scale": scale.name, **costs_of(work.folder, scale.name)})
    if results.path == FULL_RESULTS and options.page is None:
        write_kept()
        console.print("docs/evidence.md, its plots and README's table are written")
        return
    page = options.page or results.path.with_suffix(".md")
    write_page(page, Found(scale, Results(results.path)), Exact(Results(EXACT_RESULTS), Run()))
    console.print(f"{page} and its plots are written")


if __name__ == "__main__":
    main()
