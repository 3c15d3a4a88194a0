"""Teachers in vLLM for the tests of the vllm backend (`make test-vllm`); an engine takes seconds to start, so few are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from stage1_teacher.backends import ScoreRequest, Teacher, load
from tests.stage1_teacher.models import MASK_ID, save_model

Start = Callable[..., Teacher]


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen3"), num_attention_heads=4, num_key_value_heads=2, tied=False)


@pytest.fixture
def start() -> Iterator[Start]:
    running: list[Teacher] = []

    def load_vllm(path: Path, layout: str, block_size: int = 32, **options: object) -> Teacher:
        teacher = load(path, "vllm", layout, block_size, MASK_ID, **options)  # type: ignore[arg-type]
        running.append(teacher)
        return teacher

    yield load_vllm
    for teacher in running:
        teacher.close()  # type: ignore[attr-defined]


def noised(
    vocabulary: int, lengths: tuple[int, ...] = (2, 5, 33, 64, 150), draws: int = 2, seed: int = 0
) -> list[ScoreRequest]:
    """Draws of random texts; half of the positions after the first are masked."""
    rng = np.random.default_rng(seed)
    requests = []
    for length in lengths:
        clean_L = rng.integers(2, vocabulary, length)
        for _ in range(draws):
            masked_L = (rng.random(length) < 0.5) & (np.arange(length) > 0)
            masked_L[-1] = True
            (position_N,) = np.nonzero(masked_L)
            token_L = np.where(masked_L, MASK_ID, clean_L)
            requests.append(ScoreRequest(token_L, position_N, clean_L[position_N], clean_L))
    return requests
