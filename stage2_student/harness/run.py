"""One evaluation: a checkpoint on some benchmarks, answers kept, scores with standard errors, and JSON for later.

Benchmarks run one after the other, since each has its own answer length. What is done is in the output folder: the
answers as they come, the scores at the end of each benchmark.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import TidecacheError
from stage2_student.harness.compare import Score
from stage2_student.harness.suite import PAPER, SHORT_NAMES, SUITES, Benchmark
from stage2_student.inference import Checkpoint
from stage2_student.sampler import SampleOptions, Usage

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

TASKS = Path(__file__).parent / "tasks"
FEWSHOT_SEED = 1234  # the harness's own default


def require_lm_eval() -> None:
    """Refuse to go on without lm-evaluation-harness.

    Raises:
        TidecacheError: it is not installed; says how.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise TidecacheError(
            "benchmarks need lm-evaluation-harness, which is not installed: pip install 'tidecache[eval]'"
        )


@functools.cache
def task_manager() -> TaskManager:
    """The harness's tasks and ours; reading them all takes seconds, so once per process.

    Raises:
        TidecacheError: the harness is not installed.
    """
    require_lm_eval()
    import datasets
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    return TaskManager(include_path=str(TASKS))


def benchmarks(names: Sequence[str], manager: TaskManager, max_new_tokens: int) -> list[Benchmark]:
    """The benchmarks meant by names: a suite (`paper`), short names, or tasks of the harness.

    Raises:
        TidecacheError: an unknown name; lists close ones.
    """
    found: dict[str, Benchmark] = {}
    for name in names:
        if name in SUITES:
            found.update((benchmark.task, benchmark) for benchmark in SUITES[name])
            continue
        task = SHORT_NAMES.get(name, name)
        known = [benchmark for benchmark in PAPER if task in (benchmark.task, benchmark.name)]
        if known:
            found[known[0].task] = known[0]
        elif task in manager.all_tasks:
            found[task] = Benchmark(task, task, "", "", max_new_tokens, shots=None)
        else:
            everything = sorted({*SUITES, *SHORT_NAMES, *manager.all_tasks})
            close = difflib.get_close_matches(name, everything, n=5, cutoff=0.5)
            hint = f"close names: {', '.join(close)}" if close else f"the suite is {', '.join(SUITES)}"
            raise TidecacheError(f"unknown task {name!r}; {hint}")
    return list(found.values())


def refuse_code(wanted: Sequence[Benchmark], allowed: bool) -> None:
    """Refuse benchmarks that run generated code unless that is allowed.

    Raises:
        TidecacheError: names them, and the option.
    """
    running = [benchmark.name for benchmark in wanted if benchmark.runs_code]
    if running and not allowed:
        raise TidecacheError(
            f"{', '.join(running)}: these run code that the model writes (in a sandbox): pass --run-code to allow it, or "
            "name other tasks"
        )


@dataclass(frozen=True)
class Result:
    """One benchmark of one checkpoint. `usage` counts what was sampled now, not what the answer file had."""

    benchmark: str
    score: Score
    usage: Usage
    truncated: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "benchmark": self.benchmark,
            "percent": self.score.percent,
            "error": self.score.error,
            "questions": dict(self.score.questions),
            "truncated_prompts": self.truncated,
            "usage": {**asdict(self.usage), "tokens_per_forward": self.usage.tokens_per_forward},
        }


def evaluate(
    checkpoint: Checkpoint,
    wanted: Sequence[Benchmark],
    manager: TaskManager,
    out: Path,
    options: SampleOptions,
    batch: int = 8,
    limit: int | None = None,
    questions: Mapping[str, str] | None = None,
    truncate: bool = False,
) -> list[Result]:
    """Run benchmarks, resuming from the answers in `out`.

    Args:
        checkpoint: what answers.
        wanted: see `benchmarks`; `refuse_code` has been asked.
        manager: see `task_manager`.
        out: folder of this checkpoint's answers (`answers.jsonl`) and scores (`results.json`).
        options: sampling; each benchmark sets its own answer length, with as many steps unless `steps` is given as a
            share: `options.steps` of `options.max_new_tokens` is scaled.
        batch: prompts at once.
        limit: only the first questions of each task.
        questions: task or benchmark name → local file.
        truncate: cut the beginning of prompts that are too long, instead of refusing.

    Raises:
        TidecacheError: questions that cannot be loaded, prompts that are too long, a disk that refuses.
    """
    from stage2_student.harness.answers import AnswerFile
    from stage2_student.harness.model import StudentLM

    answers = AnswerFile(out / "answers.jsonl", checkpoint.digest)
    model = StudentLM(checkpoint, options, answers, batch, truncate)
    files = {SHORT_NAMES.get(name, name): path for name, path in (questions or {}).items()}
    unknown = sorted(set(files) - {benchmark.task for benchmark in wanted})
    if unknown:
        raise TidecacheError(f"--questions: {', '.join(unknown)} is not among the tasks of this run")
    results = []
    for benchmark in wanted:
        model.options = scaled(options, benchmark.max_new_tokens)
        model.sampler = checkpoint.sampler()
        model.truncated = 0
        score = _score(model, benchmark, manager, limit, files.get(benchmark.task))
        results.append(Result(benchmark.name, score, model.sampler.usage, model.truncated))
        _save(out / "results.json", checkpoint, model.options, limit, results)
    return results


def scaled(options: SampleOptions, tokens: int) -> SampleOptions:
    """The same sampling for answers of another length: the steps keep their ratio to the tokens."""
    steps = -(-options.steps * tokens // options.max_new_tokens) if options.steps else 0
    return dataclasses.replace(options, max_new_tokens=tokens, steps=steps)


def _score(model: Any, benchmark: Benchmark, manager: TaskManager, limit: int | None, file: str | None) -> Score:
    """Run one benchmark and take its questions' scores from the harness's samples."""
    from lm_eval.evaluator import evaluate as evaluate_tasks

    try:
        spec: Any = benchmark.task
        if file is not None:
            from stage2_student.harness import local

            spec = {"group": "local", "task": [{"task": spec, **local.overrides(spec, file)}]}
        loaded = manager.load([spec])
        for task in loaded["tasks"].values():
            shots = task.get_config("num_fewshot") or 0
            task.set_config(key="num_fewshot", value=shots if benchmark.shots is None else benchmark.shots)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        found = evaluate_tasks(
            lm=model,
            task_dict=loaded,
            limit=limit,
            apply_chat_template=bool(model.checkpoint.student.tokenizer.chat_template),
            fewshot_as_multiturn=False,
            log_samples=True,
            bootstrap_iters=0,
            confirm_run_unsafe_code=benchmark.runs_code,
        )
    except (OSError, ModuleNotFoundError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TidecacheError(
            f"{benchmark.name}: the task {benchmark.task} could not be run ({reason}); without a network, give its "
            f"questions as a file: --questions {benchmark.task}=FILE"
        ) from error
    assert found is not None
    scores: dict[str, float] = {}
    for name, samples in found["samples"].items():
        for sample in samples:
            wanted = benchmark.filter or samples[0]["filter"]
            if sample["filter"] == wanted:
                metric = benchmark.metric or sample["metrics"][0]
                scores[f"{name}/{sample['doc_id']}"] = float(sample[metric])
    if not scores:
        raise TidecacheError(
            f"{benchmark.name}: the task {benchmark.task} gave no scores of the filter {benchmark.filter!r}"
        )
    return Score(scores)


def _save(path: Path, checkpoint: Checkpoint, options: SampleOptions, limit: int | None, results: list[Result]) -> None:
    described = {
        "model": checkpoint.path,
        "digest": checkpoint.digest,
        "block_size": checkpoint.block_size,
        "sampling": asdict(options),
        "limit": limit,
        "results": [result.to_json() for result in results],
    }
    try:
        path.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise TidecacheError(f"{path}: cannot be written ({error.strerror}): choose another --out") from error
