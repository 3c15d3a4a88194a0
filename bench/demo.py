"""`make demo`: the whole pipeline on real text with the embedded pair, and what distillation gained.

Stage 1 captures several draws per document of the running Python's standard library, in both contexts; stage 2 trains
the student four times from the same base, with the same seeds, steps and masks: cross-entropy only, Reverse CALM as in
the paper's TIDE-Cross, Reverse CALM with TIDAL weighting (the default of `make train`), and the event KL of the topk
lane. All are measured on modules that neither model has ever seen. Every stage is the command that users type, in a
process of its own; a stage whose result is there already is not done again (`--fresh` starts over).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from report import page
from rich.console import Console
from rich.table import Table as RichTable

from shared.cache.plots import Curve, Plot, Table

console = Console()
STUDENTS = {  # recipe -> how the table names it
    "cross-entropy": "cross-entropy",
    "tide-cross": "Reverse CALM",
    "reverse-calm-tidal": "Rev. CALM + TIDAL",
    "events": "event KL",
}


@dataclass(frozen=True)
class Stage:
    """One command of the pipeline, with what it took."""

    name: str
    seconds: float
    bytes: int


def folder_bytes(folder: Path) -> int:
    """All files below a folder, in bytes."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


class Pipeline:
    """Runs stages one after the other and remembers their times in `stages.json`, so that a rerun can tell them."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.record = out / "stages.json"
        self.seconds: dict[str, float] = json.loads(self.record.read_text()) if self.record.exists() else {}

    def run(self, name: str, result: Path, arguments: list[str]) -> Stage:
        """Run `tidecache …` unless `name` has been done before; its result's size goes into the table."""
        if name not in self.seconds:
            console.rule(f"[bold]{name}")
            console.print("[dim]tidecache " + " ".join(arguments))
            begun = time.monotonic()
            command = [str(Path(sys.executable).parent / "tidecache"), *arguments]
            finished = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"})
            if finished.returncode:
                console.print(f"[red]{name} failed; what is done is kept: run the demo again to go on.")
                raise SystemExit(finished.returncode)
            self.seconds[name] = time.monotonic() - begun
            self.record.write_text(json.dumps(self.seconds, indent=1))
        return Stage(name, self.seconds[name], folder_bytes(result) if result.is_dir() else result.stat().st_size)


def main() -> None:
    parser = argparse.ArgumentParser(description="The whole pipeline on real text with the embedded pair.")
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--documents", type=int, default=400, help="documents to capture, held-out ones among them")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--held-out-documents", type=int, default=60)
    parser.add_argument("--fresh", action="store_true", help="forget an earlier run's results and start over")
    options = parser.parse_args()
    out: Path = options.out
    if options.fresh and out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    pipeline = Pipeline(out)

    cache = out / "cache"
    stages = [
        pipeline.run("stage 1: capture", cache, [
            "teacher", "capture", "--teacher", "tiny", "--corpus", "stdlib", "--context", "both",
            "--draws", str(options.draws), "--limit", str(options.documents), "--out", str(cache),
        ])
    ]  # fmt: skip
    for recipe, title in STUDENTS.items():
        student = out / recipe
        stages.append(pipeline.run(f"stage 2: {title}", student, [
            "student", "train", "--cache", str(cache), "--recipe", recipe, "--out", str(student),
            "--steps", str(options.steps), "--batch", str(options.batch), "--seed", "0",
        ]))  # fmt: skip
    measured = out / "evaluation.json"
    models = [argument for recipe in STUDENTS for argument in ("--model", str(out / recipe))]
    stages.append(pipeline.run("evaluation", measured, [
        "student", "score", "--cache", str(cache / "held-out"), "--model", "tiny", *models,
        "--limit", str(options.held_out_documents), "--json", str(measured),
    ]))  # fmt: skip
    report(out, options, stages, json.loads(measured.read_text()))


def report(out: Path, options: argparse.Namespace, stages: list[Stage], measured: dict) -> None:
    """Print the tables and write `report.html`. `measured` is what `student score --json` wrote."""
    names = {"tiny": "student base", **{str(out / recipe): title for recipe, title in STUDENTS.items()}}
    rows = [(names.get(r["name"], r["name"]), r) for r in measured["rows"]]
    bins = [f"{cell['low']:.1f}–{cell['high']:.1f}" for cell in measured["rows"][0]["bins"]]
    tables = [
        Table(
            title,
            ["timestep", *bins, "all"],
            [
                [name, *[pattern.format(cell[key]) for cell in row["bins"]], pattern.format(row["all"][key])]
                for name, row in rows
            ],
            note,
        )
        for title, key, pattern, note in (
            ("Bits per byte of masked chunks", "bits_per_byte", "{:.3f}", "Lower is better."),
            (
                "Masked chunks guessed right",
                "accuracy",
                "{:.1%}",
                "The most likely token at every position of the chunk.",
            ),
            (
                "Calibration error",
                "calibration_error",
                "{:.3f}",
                "Expected difference of confidence and accuracy, ten bins.",
            ),
        )
    ]
    costs = Table(
        "What it took",
        ["stage", "seconds", "bytes"],
        [[s.name, f"{s.seconds:.0f}", f"{s.bytes:,}"] for s in stages]
        + [["all", f"{sum(s.seconds for s in stages):.0f}", ""]],
    )
    for table in (*tables, costs):
        shown = RichTable(title=table.title, title_justify="left", caption=table.note, caption_justify="left")
        for number, column in enumerate(table.columns):
            shown.add_column(column, justify="right" if number else "left", no_wrap=True)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    middle = [(float(b.split("–")[0]) + float(b.split("–")[1])) / 2 for b in bins]
    plots = [
        Plot(
            title, "timestep t (share of chunks masked)", unit,
            [Curve(name, middle, [cell[key] for cell in row["bins"]], name.startswith("teacher"), colour)
                for colour, (name, row) in enumerate(rows)
            ],
        )
        for title, key, unit in (
            ("Bits per byte of masked chunks", "bits_per_byte", "bits per byte"),
            ("Masked chunks guessed right", "accuracy", "share"),
        )
    ]  # fmt: skip
    for title, key in (("Cross-entropy while training", "ce"), ("Distillation loss while training", "distill")):
        curves = [
            Curve(name, *curve, colour=1 + number)
            for number, (name, curve) in enumerate(training_curves(out, key))
            if any(curve[1])
        ]
        plots.append(Plot(title, "optimiser step", "mean of the last 20 steps", curves))
    text = page(
        "tidecache: one teacher run, four students",
        f"{options.documents} documents of this Python's standard library, {options.draws} draws each, {options.steps} steps of "
        f"{options.batch} rows per student; all from the same base with the same seeds and masks, measured on modules that "
        "neither the teacher nor the student has ever seen. The teacher sees another context than the students do, so its "
        "rows are a reference and no bound.",
        [tables[0], tables[1], *plots, tables[2], costs],
    )
    (out / "report.html").write_text(text, encoding="utf-8")
    console.print(f"\nThe curves are in [bold]{out / 'report.html'}[/bold].")


def training_curves(out: Path, key: str) -> list[tuple[str, tuple[list[float], list[float]]]]:
    """(student, (steps, running mean of a logged value)) from each student's `train_log.jsonl`."""
    curves = []
    for recipe, title in STUDENTS.items():
        lines = [json.loads(line) for line in (out / recipe / "train_log.jsonl").read_text().splitlines()]
        lines = [line for line in lines if key in line]
        values = [line[key] for line in lines]
        smooth = [sum(values[max(0, i - 19) : i + 1]) / len(values[max(0, i - 19) : i + 1]) for i in range(len(values))]
        curves.append((title, ([line["step"] for line in lines], smooth)))
    return curves


if __name__ == "__main__":
    main()
