"""A device that runs out of memory in the middle: a smaller engine does the shard again, and the next one is as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shared.cache import open_cache
from shared.errors import TidecacheError
from stage1_teacher.backends import OutOfDeviceMemoryError
from tests.stage1_teacher.captures import TEACHER_VOCABULARY, make_spec, write_corpus
from tests.stage1_teacher.models import VOCABULARY, save_model
from tests.stage1_teacher.test_capture import assert_same_draws, rows
from tests.stage1_teacher.test_capture import run as capture
from tests.stage1_teacher.test_presets_and_specs import Narrowing
from tests.vllm.conftest import Start, noised

SPEC = make_spec(contexts=("plain",), held_out="none", k=3, batch_tokens=512)


class SmallDevice:
    """vLLM's engine on a device that is full once; it fails in the way that is given."""

    def __init__(self, engine: Any, errors: list[Exception]) -> None:
        self._engine, self._errors = engine, errors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self) -> Any:
        done = self._engine.step()
        if self._errors:
            raise self._errors.pop()
        return done


def test_the_shard_again_with_half_the_budget(tmp_path: Path, start: Start) -> None:
    folder = save_model(tmp_path / "model", vocabulary=TEACHER_VOCABULARY, tokenizer=True)
    corpus = str(write_corpus(tmp_path / "c.jsonl", 12))
    teacher: Any = start(folder, "full", batch_tokens=SPEC.batch_tokens)

    def run(out: str, watcher: Narrowing) -> None:
        capture(teacher, tmp_path / out, corpus, SPEC, size=4, watcher=watcher)

    run("whole", Narrowing())
    # The exception of this process, then what a worker's death is reported as.
    errors: list[Exception] = [
        RuntimeError("Worker failed with error 'CUDA out of memory. Tried to allocate 2.00 GiB', please check …"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ]
    start_engine, started = teacher._start, []

    def restart(batch_tokens: int) -> Any:
        started.append(batch_tokens)
        return SmallDevice(start_engine(batch_tokens), errors)

    teacher._start, teacher._engine = restart, SmallDevice(teacher._engine, errors)
    watcher = Narrowing()
    run("cache", watcher)
    assert watcher.budgets == [256, 128]
    assert started == [256, 128, 512]
    assert [receipt.batch_tokens for receipt in open_cache(tmp_path / "cache").shards] == [128, 512, 512]
    assert_same_draws(rows(tmp_path / "cache"), rows(tmp_path / "whole"), 2e-5)
    assert watcher.positions == sum(d.stored.token_count_C[d.chunks].sum() for d in rows(tmp_path / "whole").values())


def test_half_a_budget_that_holds_no_prompt_is_no_help(qwen3: Path, start: Start) -> None:
    teacher: Any = start(qwen3, "bd3lm", 32, batch_tokens=512)
    long, short = noised(VOCABULARY, (200,), draws=1), noised(VOCABULARY, (20,), draws=1)
    for requests, kind in ((long, TidecacheError), (short, OutOfDeviceMemoryError)):
        teacher._have_engine()
        teacher._engine = SmallDevice(teacher._engine, [torch.OutOfMemoryError("CUDA out of memory")])
        with pytest.raises(
            TidecacheError, match=r"ran out of device memory .*--batch-tokens.*--tensor-parallel"
        ) as caught:
            teacher.score(requests, 2)
        assert type(caught.value) is kind
    assert len(teacher.score(short, 2).gold_logp_N) == len(short[0].positions)  # goes on with a new engine


def test_other_failures_are_not_taken_for_it(qwen3: Path, start: Start) -> None:
    teacher: Any = start(qwen3, "full")
    teacher._engine = SmallDevice(teacher._engine, [ValueError("a defect")])
    with pytest.raises(ValueError, match="a defect"):
        teacher.score(noised(VOCABULARY, (20,), draws=1), 2)
