"""Teachers that know less, for `bench/evidence.py`: what a student gains from them is no merit of the method.

    unigram     the frequency of each token in the training text
    ngram       the bidirectional n-gram model of `bench/ngram.py`
    smoothing   the gold with 0.9, all other tokens alike: label smoothing
    shuffled    the embedded teacher's answers, each about another masked token of the same shard

Each answers as the embedded teacher does (`stage1_teacher.backends.Teacher`), with its tokenizer, so all else of the
pipeline stays what it is.

Shape suffixes: N scored positions, V vocabulary, K candidates, T temperatures, L tokens of a sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ngram import BidirectionalNgram
from tiny import token_streams
from tiny_card import masked_documents
from torch import Tensor
from transformers import AutoTokenizer

from shared.noise import stream_key
from stage1_teacher.backends import ScoreRequest, Scores, Teacher
from stage1_teacher.backends.requests import as_ids
from stage1_teacher.head import top_tokens

SMOOTHED = 0.9  # the gold's share under label smoothing
ROWS = 512  # positions whose distributions are held at once


@lru_cache(maxsize=1)
def _ngram(tokenizer_folder: Path, vocabulary: int) -> BidirectionalNgram:
    """Counts of the text that the embedded teacher was trained on; strengths fitted on held-out documents."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    streams = [stream.astype(np.int64) for stream in token_streams(tokenizer).values()]
    model = BidirectionalNgram(streams, vocabulary)
    model.fit([x for t in (0.1, 0.5, 0.9) for x in list(masked_documents(tokenizer, 256, 1, t))[:40]])
    return model


class Control:
    """Wraps the embedded teacher and answers in its place."""

    def __init__(self, teacher: Teacher, kind: str) -> None:
        self._teacher = teacher
        self.kind = kind
        self.name = f"control-{kind}"
        self.weights = f"{kind}:{teacher.weights}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)

    def score(self, requests: Sequence[ScoreRequest], k: int, on_batch: Callable[[int], None] | None = None) -> Scores:
        """See `Teacher.score`."""
        if self.kind == "shuffled":
            return self._shuffled(requests, k)
        parts = []
        for request in requests:
            gold_N = torch.from_numpy(as_ids(request.gold_ids))
            for first in range(0, len(gold_N), ROWS):
                rows = slice(first, first + ROWS)
                parts.append(_scores(self._logp(request, rows), gold_N[rows], k, self._teacher.temperatures))
        return Scores(*(torch.cat([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(Scores)))

    def _logp(self, request: ScoreRequest, rows: slice) -> Tensor:
        """logp_NV of these scored positions."""
        gold_N = torch.from_numpy(as_ids(request.gold_ids)[rows])
        vocabulary = self._teacher.vocabulary
        if self.kind == "smoothing":
            p_NV = torch.full((len(gold_N), vocabulary), (1 - SMOOTHED) / (vocabulary - 1))
            return p_NV.scatter_(1, gold_N[:, None], SMOOTHED).log()
        token_L = as_ids(request.token_ids)
        position_N = as_ids(request.positions)[rows]
        levels = 1 if self.kind == "unigram" else None
        p_NV = _ngram(self._teacher.folder, vocabulary).distribution(
            token_L, token_L == self._teacher.mask_id, position_N, levels
        )
        return torch.from_numpy(np.log(p_NV)).float()

    def _shuffled(self, requests: Sequence[ScoreRequest], k: int) -> Scores:
        """Row n holds what the teacher says at the place of row π(n), about the gold of row n."""
        gold = [as_ids(request.gold_ids) for request in requests]
        gold_N = np.concatenate(gold)
        order_N = np.random.default_rng(stream_key(0, "evidence", "shuffled")).permutation(len(gold_N))
        asked_N = np.empty_like(gold_N)
        asked_N[order_N] = gold_N  # the row π(n) is asked about the gold of row n
        starts = np.cumsum([len(g) for g in gold])[:-1]
        moved = [dataclasses.replace(r, gold_ids=g) for r, g in zip(requests, np.split(asked_N, starts), strict=True)]
        scores = self._teacher.score(moved, k)
        row_N = torch.from_numpy(order_N)
        return Scores(*(getattr(scores, f.name)[row_N] for f in dataclasses.fields(Scores)))


def _scores(logp_NV: Tensor, gold_N: Tensor, k: int, temperatures: Sequence[float]) -> Scores:
    """What the pipeline keeps of these distributions."""
    topk_logp_NK, topk_ids_NK = top_tokens(logp_NV, k)
    return Scores(
        gold_logp_N=logp_NV.gather(1, gold_N[:, None])[:, 0],
        topk_ids_NK=topk_ids_NK,
        topk_logp_NK=topk_logp_NK,
        log_z_NT=torch.stack(
            [
                torch.zeros(len(logp_NV)) if t == 1.0 else torch.logsumexp(logp_NV.double() / t, 1).float()
                for t in temperatures
            ],
            dim=1,
        ),
    )
