"""What the task files of this folder call: HellaSwag's texts, and running the code that answers HumanEval and MBPP.

The harness imports this file by path, so it imports the package by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from stage2_student.sandbox import run_program

CODE_BLOCK = re.compile(r"```(?:\w+)?\n?(.*?)\n?```", flags=re.DOTALL)


def hellaswag(dataset: Dataset) -> Dataset:
    """Activity, context and endings as one question, cleaned as the harness's `hellaswag` does."""

    def question(doc: Mapping[str, Any]) -> dict[str, Any]:
        context = f"{doc['ctx_a']} {doc['ctx_b'].capitalize()}" if doc.get("ctx_b") else doc["ctx"]
        return {
            "query": _clean(f"{doc['activity_label']}: {context}"),
            "choices": [_clean(ending) for ending in doc["endings"]],
            "gold": int(doc["label"]),
        }

    return dataset.map(question)


def _clean(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")  # traces of WikiHow
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def humaneval_program(doc: Mapping[str, Any], answer: str) -> str:
    """The problem's function as completed, and its tests."""
    body = answer.split("```")[0]
    return f"{doc['prompt']}{body}\n{doc['test']}\ncheck({doc['entry_point']})"


def humaneval_result(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """pass@1 of one answer."""
    return {"pass@1": float(run_program(humaneval_program(doc, results[0])).passed)}


def mbpp_program(doc: Mapping[str, Any], answer: str) -> str:
    """The answer's code up to the fence that closes the prompt's, or its own first block, and the task's tests.

    As in the harness, code that no fence closes does not count. (The harness also loses a first word right after the
    prompt's fence, `def` as a rule, to the block's language; that is not repeated here.)
    """
    own = answer.lstrip().startswith("```")
    found = CODE_BLOCK.findall(answer) if own else answer.split("```")[:-1]
    return "\n".join([found[0] if found else "raise SyntaxError('no code block')", *doc["test_list"][:3]])


def mbpp_result(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """pass@1 of one answer."""
    return {"pass@1": float(run_program(mbpp_program(doc, results[0])).passed)}
