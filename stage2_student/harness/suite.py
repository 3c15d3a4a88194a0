"""The paper's eight benchmarks with its protocol, and the numbers it published (arXiv 2604.26951, table 1).

Protocol: chat template, empty think block, block 32, temperature 0, no guidance, low-confidence remasking; 3 tokens in 3
steps where the answer is a letter, 256 in 256 elsewhere; few-shot examples in one user turn. Prompts are those of
lm-evaluation-harness except for MMLU and HellaSwag, whose task files are ours, and HumanEval and MBPP, whose prompts are
the harness's and whose code runs in our sandbox.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from stage2_student.harness.compare import Comparison, Score


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: the harness's task, what counts, how long answers are, and the published scores in percent."""

    name: str
    task: str
    metric: str
    filter: str
    max_new_tokens: int
    shots: int | None = 0  # None: as the task file says
    runs_code: bool = False
    published: tuple[float, ...] = ()


COLUMNS = (
    ("paper:", "AR"),
    ("paper:", "BD3LM"),
    ("shared:", "KL"),
    ("shared:", "TIDE-Cross"),
    ("shared:", "TIDE-Shared"),
    ("cross:", "CALM"),
    ("cross:", "TIDE-Shared"),
    ("cross:", "TIDE-Cross"),
)  # the paper's columns: Qwen3-0.6B undistilled, then distilled with the teacher's tokenizer shared or not
PUBLISHED_AVERAGES = (40.91, 32.67, 30.55, 30.79, 33.55, 32.25, 33.83, 34.20)  # of unrounded scores
HEADINGS = {"MMLU-Pro": "MMLU-\nPro", "HellaSwag": "Hella-\nSwag", "HumanEval": "Human-\nEval"}
PAPER = (
    Benchmark("GSM8K", "gsm8k_cot", "exact_match", "flexible-extract", 256,
              published=(59.60, 45.56, 43.97, 45.03, 48.98, 48.60, 49.89, 52.24)),
    Benchmark("MATH", "minerva_math", "exact_match", "none", 256,
              published=(32.40, 13.08, 9.40, 9.76, 11.16, 13.14, 12.98, 13.20)),
    Benchmark("BBH", "bbh", "exact_match", "get-answer", 256, shots=3,
              published=(41.50, 26.32, 25.79, 26.00, 26.79, 24.21, 26.85, 27.37)),
    Benchmark("MMLU-Pro", "mmlu_pro", "exact_match", "custom-extract", 256,
              published=(24.70, 13.80, 13.19, 12.88, 14.48, 13.47, 14.02, 14.52)),
    Benchmark("HellaSwag", "tidecache_hellaswag", "exact_match", "letter", 3,
              published=(47.40, 39.28, 39.78, 39.50, 40.50, 40.42, 39.57, 39.88)),
    Benchmark("MMLU", "tidecache_mmlu", "exact_match", "letter", 3,
              published=(52.80, 39.15, 39.57, 39.09, 39.92, 39.42, 39.54, 39.59)),
    Benchmark("HumanEval", "tidecache_humaneval", "pass@1", "none", 256, runs_code=True,
              published=(32.30, 46.34, 41.46, 42.68, 48.78, 43.90, 49.39, 48.17)),
    Benchmark("MBPP", "tidecache_mbpp", "pass@1", "none", 256, runs_code=True,
              published=(36.60, 37.80, 31.20, 31.40, 37.80, 34.80, 38.40, 38.60)),
)  # fmt: skip
SUITES: Mapping[str, tuple[Benchmark, ...]] = {"paper": PAPER}
SHORT_NAMES: Mapping[str, str] = {  # for our task files, beside the harness's own names
    "hellaswag-gen": "tidecache_hellaswag",
    "mmlu-gen": "tidecache_mmlu",
    "humaneval": "tidecache_humaneval",
    "mbpp": "tidecache_mbpp",
}


def average(scores: Sequence[Score]) -> tuple[float, float]:
    """(mean, standard error) over benchmarks, in percent."""
    values, errors = [s.percent for s in scores], [s.error for s in scores]
    return sum(values) / len(values), math.sqrt(sum(error * error for error in errors)) / len(errors)


def table(results: Mapping[str, Mapping[str, Score]], benchmarks: Sequence[Benchmark]) -> Table:
    """Scores in percent: a row per checkpoint of ours, with standard errors, then the rows that the paper published.

    `results`: model → benchmark's name → score. The average stands where all benchmarks of the table have a score.
    """
    found = Table(title="Accuracy in percent, ± one standard error", title_justify="left", box=SIMPLE_HEAD)
    found.padding = (0, 1, 0, 0)
    found.add_column("", overflow="fold")
    for benchmark in benchmarks:
        found.add_column(HEADINGS.get(benchmark.name, benchmark.name), justify="right", no_wrap=True)
    averaged = len(benchmarks) > 1
    if averaged:
        found.add_column("avg", justify="right", no_wrap=True)
    for model, scores in results.items():
        cells = [
            f"{scores[b.name].percent:.2f}\n±{scores[b.name].error:.2f}" if b.name in scores else "–"
            for b in benchmarks
        ]
        if averaged and len(scores) == len(benchmarks):
            cells.append("{:.2f}\n±{:.2f}".format(*average(list(scores.values()))))
        found.add_row(model, *cells)
    benchmarks = tuple(benchmarks)
    if any(benchmark.published for benchmark in benchmarks):
        found.add_section()
        for number, (group, name) in enumerate(COLUMNS):
            values = [b.published[number] for b in benchmarks if b.published]
            cells = [f"{b.published[number]:.2f}" if b.published else "–" for b in benchmarks]
            if benchmarks == PAPER:
                cells.append(f"{PUBLISHED_AVERAGES[number]:.2f}")
            elif averaged and len(values) == len(benchmarks):
                cells.append(f"{sum(values) / len(values):.2f}")
            found.add_row(f"{group} {name}", *cells)
    return found


def comparison_table(comparisons: Mapping[str, Comparison], ours: str, theirs: str) -> Table:
    """Paired differences, in points."""
    found = Table(title=f"{ours} against {theirs}: paired bootstrap over questions", title_justify="left")
    for name in ("benchmark", "questions", "difference", "95% interval", "p"):
        found.add_column(name, justify="left" if name == "benchmark" else "right", no_wrap=True)
    for name, c in comparisons.items():
        found.add_row(
            name, str(c.questions), f"{c.difference:+.2f}", f"{c.low:+.2f} … {c.high:+.2f}", f"{c.p:.3f}"
        )  # fmt: skip
    return found
