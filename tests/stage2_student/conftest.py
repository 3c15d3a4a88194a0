"""One small cache and one random student for all tests of stage 2 that only read them."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.cache.reader import Cache
from shared.tokenization import TextTokenizer
from tests.conftest import TINY_STUDENT
from tests.stage2_student import synthetic


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The models are so small that a second thread only waits, and waits dearly beside other processes."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """12 texts, 3 draws each, in shards of 5 documents; both contexts, 4 candidates."""
    return synthetic.make_cache(tmp_path_factory.mktemp("cache") / "texts", synthetic.texts(12), draws=3, per_shard=5)


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Qwen3 with the embedded student's tokenizer."""
    return synthetic.save_student(tmp_path_factory.mktemp("student") / "base")


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    """The embedded student's tokenizer."""
    return TextTokenizer.load(TINY_STUDENT)
