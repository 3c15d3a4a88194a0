"""Captures in tests: a random tiny teacher, small corpora, and a backend that answers without a network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from shared.documents import Message, PreparedDocument, RawDocument
from shared.preparation import Limits, Preparer
from shared.spec import CaptureSpec, StudentTokenizerSpec, TeacherSpec
from shared.tokenization import TextTokenizer
from stage1_teacher.backends import ScoreRequest, Scores
from tests.conftest import TINY_STUDENT, TINY_TEACHER

TEACHER_VOCABULARY = 8192

WORDS = [
    "def",
    "return",
    "self",
    "value",
    "if",
    "not",
    "in",
    "for",
    "None",
    "class",
    "import",
    "range",
    "yield",
    "naïve",
    "日本語",
    "xylophones",
    "12345",
    "quetzal",
    "__repr__",
]


def texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Distinct small texts."""
    rng = np.random.default_rng(seed)
    return [f"{i} " + " ".join(rng.choice(WORDS, rng.integers(5, longest))) + "\n" for i in range(count)]


def write_corpus(path: Path, count: int, seed: int = 0, longest: int = 60) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts(count, seed, longest)))
    return path


def raw(text: str, name: str = "a") -> RawDocument:
    return RawDocument(name, (Message("text", text, True),), chat=False)


def tokenizers() -> tuple[TextTokenizer, TextTokenizer]:
    return TextTokenizer.load(TINY_TEACHER, "teacher"), TextTokenizer.load(TINY_STUDENT, "student")


def prepared(text: str, name: str = "a", length: int = 256) -> PreparedDocument:
    teacher, student = tokenizers()
    document = Preparer(teacher, [student], Limits(length, (length,)), "none").prepare(raw(text, name))
    assert isinstance(document, PreparedDocument)
    return document


def make_spec(**changes: object) -> CaptureSpec:
    teacher, student = tokenizers()
    fields: dict[str, object] = {"logit_shift": False} | {k: changes.pop(k) for k in ("logit_shift",) if k in changes}
    return CaptureSpec(
        teacher=TeacherSpec(
            "fake", "Fake", "0" * 32, teacher.digest, teacher.vocabulary, "full", 32, teacher.mask_id, **fields
        ),
        students=(StudentTokenizerSpec("student", student.digest, 256),),
        length_limit=256,
        **({"k": 4} | changes),
    )


@dataclass
class HashTeacher:
    """Scores that are a fixed function of (what is visible, position), so that a test can tell any mix-up.

    `seen` keeps all requests.
    """

    vocabulary: int
    temperatures: tuple[float, ...] = (1.0, 2.0)
    batch_tokens: int = 4096
    seen: list[ScoreRequest] = field(default_factory=list)

    def logp(self, request: ScoreRequest, position: int) -> np.ndarray:
        visible = np.asarray(request.token_ids)
        seed = int((visible * np.arange(1, len(visible) + 1)).sum()) * 1009 + int(position)
        logits = np.random.default_rng(seed).normal(size=self.vocabulary) * 3
        return logits - np.log(np.exp(logits).sum())

    def score(self, requests: Sequence[ScoreRequest], k: int, on_batch: object = None) -> Scores:
        self.seen.extend(requests)
        rows = [(self.logp(r, p), g) for r in requests for p, g in zip(r.positions, r.gold_ids, strict=True)]
        logp_NV = torch.tensor(np.array([row for row, _ in rows]).reshape(len(rows), self.vocabulary))
        gold_N = torch.tensor([int(g) for _, g in rows], dtype=torch.int64)
        values, ids = logp_NV.topk(k)
        return Scores(
            gold_logp_N=logp_NV.gather(1, gold_N[:, None])[:, 0].float(),
            topk_ids_NK=ids,
            topk_logp_NK=values.float(),
            log_z_NT=torch.stack([torch.logsumexp(logp_NV / t, 1) for t in self.temperatures], 1).float(),
        )
