"""Held-out bits per byte of whole answers: a bound for a block-diffusion student, the exact value for an autoregressive one.

`evaluation` measures a student on masked chunks by timestep. Averaged over timesteps, bits per masked byte is the
negative evidence bound of the masked diffusion process: an upper bound of the bits per byte that the student needs for
the text. An autoregressive model gives its own value by the chain rule, on the same documents with its own tokenizer, so
the two can stand side by side; bytes are counted, not tokens.

Shape suffixes: B rows, L tokens, N scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table

from shared.cache.reader import Cache
from shared.cache.records import StoredDocument
from shared.documents import Encoded, IntArray
from shared.tokenization import IrreproducibleText
from stage2_student.evaluation import Evaluation
from stage2_student.head import Head, gather_logits
from stage2_student.model import Student


def bound(evaluation: Evaluation) -> float | None:
    """Bits per byte over all timesteps, each range weighing its width; None if a range has no chunks.

    Of each range the ratio of sums is taken, since weighing single chunks by 1/t would let a few at small t decide.
    """
    total = 0.0
    for quality in evaluation.bins:
        if quality.bits_per_byte is None:
            return None
        total += quality.bits_per_byte * (quality.high - quality.low)
    return total


@dataclass(frozen=True)
class Autoregressive:
    """An autoregressive model's bits per byte of the trainable contents. `cut`: documents longer than its context."""

    bits_per_byte: float
    bytes: int
    tokens: int
    documents: int
    cut: int
    unusable: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@torch.no_grad()
def autoregressive(student: Student, cache: Cache, limit: int | None = None, device: str = "cpu") -> Autoregressive:
    """Measure a causal LM, as it was before any mask token, on a cache's documents.

    Args:
        student: as loaded by `load_student`.
        cache: whose documents are read; their draws play no part.
        limit: only the first `limit` documents.
        device: where to run.
    """
    model = student.model
    model.to(torch.device(device))  # type: ignore[arg-type]
    model.train(False)
    rows = student.text.vocabulary
    whole = Head.of(model)
    head = dataclasses.replace(
        whole, weight_VD=whole.weight_VD[:rows], bias_V=None if whole.bias_V is None else whole.bias_V[:rows]
    )
    context = getattr(model.config, "max_position_embeddings", None) or 2**31
    start = student.tokenizer.bos_token_id if student.tokenizer.bos_token_id is not None else student.text.end_id
    nats, size, tokens, documents, cut, unusable = 0.0, 0, 0, 0, 0, 0
    for stored in _documents(cache, limit):
        documents += 1
        try:
            encoded = student.text.encode(stored.messages, stored.chat, stored.cut)
        except IrreproducibleText:
            unusable += 1
            continue
        content_L = content_bytes(stored, encoded)
        ids = ([] if start is None else [int(start)]) + encoded.ids_L.tolist()
        before = len(ids) - len(encoded.ids_L)
        cut += len(ids) > context
        ids = ids[:context]
        content_L = content_L[: len(ids) - before]
        place_N = np.flatnonzero(content_L)
        place_N = place_N[place_N + before >= 1]  # nothing predicts the very first token
        if not len(place_N):
            continue
        ids_BL = torch.tensor([ids], device=device)
        hidden_LD = model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state[0]
        position_N = torch.from_numpy(place_N + before).to(device)
        logit_N, log_z_NT = gather_logits(
            hidden_LD[position_N - 1], head, torch.arange(len(place_N), device=device), ids_BL[0, position_N], [1.0]
        )
        nats -= float((logit_N - log_z_NT[:, 0]).double().sum())
        size += int(content_L[place_N].sum())
        tokens += len(place_N)
    return Autoregressive(nats / math.log(2.0) / max(size, 1), size, tokens, documents, cut, unusable)


def content_bytes(stored: StoredDocument, encoded: Encoded) -> IntArray:
    """content_L: how many bytes of trainable contents each token covers."""
    start_L, stop_L = encoded.edges[:-1], encoded.edges[1:]
    content_L = np.zeros(len(encoded.ids_L), np.int64)
    for message, (start, stop) in zip(stored.messages, encoded.spans, strict=True):
        if message.trainable:
            content_L += np.clip(np.minimum(stop_L, stop) - np.maximum(start_L, start), 0, None)
    return content_L


def _documents(cache: Cache, limit: int | None) -> list[StoredDocument]:
    found: dict[str, StoredDocument] = {}
    for draw in cache.iter_draws():
        if draw.document not in found:
            if limit is not None and len(found) == limit:
                break
            found[draw.document] = draw.stored
    return list(found.values())


def table(students: dict[str, Evaluation], others: dict[str, Autoregressive]) -> Table:
    """For people: bits per byte of whole answers."""
    found = Table(title="bits per byte of the answers", title_justify="left")
    found.add_column("model")
    found.add_column("kind", no_wrap=True)
    found.add_column("bits per byte", justify="right", no_wrap=True)
    for name, evaluation in students.items():
        value = bound(evaluation)
        found.add_row(name, "block diffusion", "–" if value is None else f"≤ {value:.3f}")
    for name, measured in others.items():
        found.add_row(name, "autoregressive", f"{measured.bits_per_byte:.3f}")
    return found
