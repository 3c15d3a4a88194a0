"""The teacher's vocabulary as the cache stores it: the bytes of every id, so that stage 2 needs no teacher tokenizer.

One Parquet file, `teacher_vocab.parquet`, with a row per id: `id`, `bytes`, `special`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

VOCABULARY_FILE = "teacher_vocab.parquet"


@dataclass(frozen=True)
class TeacherVocabulary:
    """`token_bytes[i]`: the bytes of id i (special tokens: their content in UTF-8); `special_V`: which ids are special.

    `digest` is the tokenizer's, the same as `spec.teacher.tokenizer`.
    """

    name: str
    digest: str
    token_bytes: Sequence[bytes]
    special_V: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.token_bytes)

    def spell(self, ids: Iterable[int]) -> bytes:
        """The bytes of a filling."""
        return b"".join([self.token_bytes[i] for i in ids])
