"""A run that is killed anywhere and resumed is the run that was not: losses and weights bit by bit."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from shared.cache.reader import Cache
from shared.errors import TidecacheError
from stage2_student import checkpoints, run, trainer
from stage2_student.config import TrainConfig, load_recipe
from stage2_student.losses import total
from tests.stage2_student import synthetic

TIMED = ("tokens_per_second", "seconds_per_step", "mfu", "peak_memory_gib")
ROOT = Path(__file__).resolve().parents[2]


def log_of(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines if "ce" in line]


def same_weights(a: Path, b: Path) -> bool:
    one, other = (load_file(out / "model.safetensors") for out in (a, b))
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def short(**values: Any) -> TrainConfig:
    return load_recipe("tide-cross", {"batch": 2, "steps": 2, "save_steps": 1, "learning_rate": 1e-3, **values})


def train(config: TrainConfig, cache: Cache, base: Path, out: Path, resume: bool = False) -> None:
    run.train(config, cache.path, base, out, resume=resume, console=Console(file=io.StringIO(), width=120))


@pytest.mark.slow
def test_a_run_killed_anywhere_is_resumed_bit_by_bit(cache: Cache, tmp_path: Path) -> None:
    """With dropout, fresh rows, events, unequal micro-batches and draws used twice; also killed within a checkpoint."""
    job = {
        "recipe": "events",
        "overrides": {
            "batch": 4, "accumulation": 2, "draws_together": 2, "steps": 5, "save_steps": 2, "fresh": 0.25,
            "learning_rate": 1e-3, "workers": 0, "scheduler": "cosine", "tidal": "weight",
        },
        "cache": str(cache.path),
        "base": str(synthetic.save_student(tmp_path / "base", attention_dropout=0.1)),
        "folder": str(tmp_path),
        "losses": [6, 9],  # of 10 micro-batches
        "opens": [3, 12, 14],
    }  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "tests.stage2_student.killed_training", str(tmp_path / "job.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(runs) == len(job["losses"]) + len(job["opens"])  # type: ignore[arg-type]
    assert len({found["after"] for found in runs}) >= 3, "kills before, between and after checkpoints"
    whole = tmp_path / "whole"
    expected = log_of(whole)
    assert len(expected) == 5
    for found in runs:
        out = tmp_path / found["run"]
        assert log_of(out) == expected, found
        assert same_weights(out, whole), found
        assert not (out / checkpoints.UNFINISHED).exists()
        assert [path.name for path in checkpoints.complete(out)] == ["checkpoint-4", "checkpoint-5"]
        saved = (out / "checkpoint-5" / "optimizer.pt").read_bytes()
        assert saved == (whole / "checkpoint-5" / "optimizer.pt").read_bytes()


def test_dropout_is_really_on(cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    """Else the test above would say nothing of random states."""
    base = synthetic.save_student(tmp_path / "base", attention_dropout=0.1)
    config = short(steps=1, save_steps=0)
    train(config, cache, base, tmp_path / "with")
    train(config, cache, student_folder, tmp_path / "without")
    assert log_of(tmp_path / "with")[0]["loss"] != log_of(tmp_path / "without")[0]["loss"]


def test_what_is_unfinished_is_no_checkpoint(cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(short(), cache, student_folder, out)
    shutil.copytree(out / "checkpoint-2", out / checkpoints.UNFINISHED / "checkpoint-3")
    (out / "checkpoint-12.copy").mkdir()
    assert checkpoints.last(out) == out / "checkpoint-2"
    (out / "model.safetensors").unlink()  # as if it was killed while it wrote its result
    train(short(), cache, student_folder, out, resume=True)
    assert same_weights(out, out / "checkpoint-2")
    assert not (out / checkpoints.UNFINISHED).exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"batch": 1, "accumulation": 2}, "batch: 2 there, 1 now; accumulation: 1 there, 2 now"),
        ({"learning_rate": 0.01}, "learning_rate: 0.001 there, 0.01 now"),
        ({"objective": "calm"}, "objective: 'reverse-calm' there, 'calm' now"),
        ({"fresh": 0.5}, "fresh: 0.0 there, 0.5 now"),
    ],
)
def test_another_configuration_is_refused_with_the_field_and_both_values(
    changed: dict[str, Any], said: str, cache: Cache, student_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "checkpoint-1").mkdir()
    identity = checkpoints.Identity(run.prepare(short(), cache.path, student_folder).config, (), "", 1)
    saved = {**identity.to_json(), "caches": []}
    (out / "checkpoint-1" / "tidecache.json").write_text(json.dumps(saved))
    with pytest.raises(TidecacheError) as caught:
        train(short(**changed), cache, student_folder, out, resume=True)
    assert said in str(caught.value)
    assert "resume with the same options, or choose another --out" in str(caught.value)


def test_another_number_of_processes_cache_or_tokenizer_is_refused(tmp_path: Path) -> None:
    config = load_recipe("calm")
    saved = checkpoints.Identity(config, (), "abc", 2)
    (tmp_path / "tidecache.json").write_text(json.dumps(saved.to_json()))
    saved.check(tmp_path)
    for other, said in (
        (checkpoints.Identity(config, (), "abc", 1), "processes: 2 there, 1 now"),
        (checkpoints.Identity(config, (), "abd", 2), "tokenizer: 'abc' there, 'abd' now"),
    ):
        with pytest.raises(TidecacheError, match=said):
            other.check(tmp_path)


def test_a_checkpoint_from_before_a_field_did_what_the_field_now_says(tmp_path: Path) -> None:
    config = load_recipe("kl", {"reuse": "same"})
    saved = checkpoints.Identity(config, (), "abc", 1).to_json()
    del saved["config"]["reuse"], saved["config"]["gold_share"]
    (tmp_path / "tidecache.json").write_text(json.dumps(saved))
    checkpoints.Identity(config, (), "abc", 1).check(tmp_path)
    for changed, said in (
        ({"reuse": "halves", "context": "compdemo"}, "reuse: 'same' there, 'halves' now"),
        ({"gold_share": 0.5}, "gold_share: 0.0 there, 0.5 now"),
    ):
        with pytest.raises(TidecacheError, match=said):
            checkpoints.Identity(dataclasses.replace(config, **changed), (), "abc", 1).check(tmp_path)


def test_another_architecture_is_refused(cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(short(), cache, student_folder, out)
    wider = synthetic.save_student(tmp_path / "wider", hidden=96)
    with pytest.raises(TidecacheError, match=r"checkpoint-2: its weights are not those of a student like this base"):
        train(short(), cache, wider, out, resume=True)


def test_how_a_run_reports_and_saves_may_change(cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(short(steps=3), cache, student_folder, out)
    shutil.rmtree(out / "checkpoint-3")
    changes = {"logging_steps": 2, "save_steps": 5, "peak_tflops": 1.0, "activation_checkpointing": True, "workers": 1}
    train(short(steps=3, **changes), cache, student_folder, out, resume=True)
    assert checkpoints.last(out) == out / "checkpoint-3"


@pytest.mark.slow
def test_a_full_disk_loses_nothing(cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    """A limit on the size of files, in a real process: the weights fit, the optimiser's state does not."""
    size = (student_folder / "model.safetensors").stat().st_size
    out = tmp_path / "out"
    options = ["--batch", "2", "--steps", "3", "--learning-rate", "1e-3", "--recipe", "tide-cross"]
    arguments = ["--cache", str(cache.path), "--base", str(student_folder), "--out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def command(*more: str, limit: int | None = None) -> subprocess.CompletedProcess[str]:
        limited = f"ulimit -f {limit}; " if limit else ""
        line = f'{limited}exec "$0" -m shared.cli student train "$@"'
        return subprocess.run(
            ["bash", "-c", line, sys.executable, *arguments, *more],
            env=environment, capture_output=True, text=True, timeout=200,
        )  # fmt: skip

    train(short(steps=3, save_steps=2), cache, student_folder, tmp_path / "whole")
    train(short(steps=3, save_steps=2), cache, student_folder, out)
    for name in ("checkpoint-3", "tidecache.json", "model.safetensors"):  # back to where step 2 was saved
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    failed = command("--save-steps", "1", "--resume", limit=(size * 3 // 2) // 1024)
    assert failed.returncode == 1, failed.stderr
    assert "Traceback" not in failed.stderr
    message = failed.stderr.strip().splitlines()[-1]
    assert message.startswith(f"error: {out}: a checkpoint cannot be written (")
    assert "--resume" in message
    assert [path.name for path in checkpoints.complete(out)] == ["checkpoint-2"]
    assert not (out / checkpoints.UNFINISHED).exists()
    train(short(steps=3, save_steps=2), cache, student_folder, out, resume=True)
    assert same_weights(out, tmp_path / "whole")


def test_a_disk_that_is_too_small_is_said_before_the_first_step(
    cache: Cache, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=3_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(TidecacheError, match=r"checkpoints need about 13\.\d MB, its disk has 3\.0 MB free"):
        train(short(steps=3), cache, student_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    train(short(save_steps=0), cache, student_folder, tmp_path / "out")


def test_a_step_that_is_not_finite_is_saved_and_taken_again(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state before the step is a checkpoint, random states included: the step can be taken again as if nothing was."""
    base = synthetic.save_student(tmp_path / "base", attention_dropout=0.1)
    config = short(accumulation=2, steps=4, save_steps=3)
    train(config, cache, base, tmp_path / "whole")
    rows = run.prepare(config, cache.path, base).rows
    out = tmp_path / "out"
    calls = 0

    def sometimes(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return total(*arguments) * (float("nan") if calls == 6 else 1.0)  # the second micro-batch of the third step

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "total", sometimes)
        with pytest.raises(TidecacheError, match=r"the loss of step 3 is nan: training stops before it") as caught:
            train(config, cache, base, out)
    bad, good = ([rows[number].name for number in numbers] for numbers in ((10, 11), (8, 9)))
    said = str(caught.value)
    assert f"its documents are {', '.join(bad)}; " in said
    assert f"the state after step 2 was saved in {out / 'checkpoint-2'}" in said
    described = json.loads((out / "not_finite.json").read_text())
    assert described["step"] == 3
    assert [part["documents"] for part in described["micro_batches"]] == [good, bad]
    assert [path.name for path in checkpoints.complete(out)] == ["checkpoint-2"]
    train(config, cache, base, out, resume=True)
    assert same_weights(out, tmp_path / "whole")
    assert log_of(out) == log_of(tmp_path / "whole")
