"""How good a student is on stored draws it has not trained on, by timestep (the held-out cache, usually).

The draws of a cache are a fixed set of masks, so every student and the base see the same question. Measured on masked
chunks: bits per byte of the gold filling, share of chunks whose most likely filling is the gold (top-1: every token's
argmax is right), and the expected calibration error of that filling's probability. The teacher's row comes from its
stored likelihoods, one per context; it stands apart, since the teacher saw another context and another attention than
the student.

Shape suffixes: Q masked chunks of all rows so far, N masked tokens, C chunks of a batch, M masked chunks of a draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.table import Table

from shared.cache.reader import Cache
from shared.cache.records import Draw
from shared.cache.statistics import best_is_gold
from shared.errors import TidecacheError
from stage2_student.batch import Batch, Collator
from stage2_student.data import RowMaker
from stage2_student.head import Head
from stage2_student.losses import ChunkAnswers, chunk_answers
from stage2_student.model import Student, masked_hidden

Column = npt.NDArray[np.float64]
EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
MEASURES = ("bits_per_byte", "accuracy", "calibration_error")
CONFIDENCE_BINS = 10
SORTED_TOGETHER = 128  # rows whose lengths are sorted before they are batched, against padding


@dataclass(frozen=True)
class Quality:
    """Of the chunks in one range of timesteps; the three measures are None where there are none."""

    low: float
    high: float
    chunks: int
    bytes: int
    bits_per_byte: float | None
    accuracy: float | None
    calibration_error: float | None


@dataclass(frozen=True)
class Evaluation:
    """One model's quality by timestep (`bins`) and over all. `unusable`: documents that it cannot spell."""

    bins: tuple[Quality, ...]
    overall: Quality
    documents: int
    draws: int
    unusable: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "bins": [asdict(quality) for quality in self.bins],
            "all": asdict(self.overall),
            "documents": self.documents,
            "draws": self.draws,
            "unusable": self.unusable,
        }

    def metrics(self) -> dict[str, float]:
        """What a log line says: `eval_bits_per_byte`, …, over all and by timestep (`eval_bits_per_byte/0–0.2`)."""
        found: dict[str, float] = {"eval_documents": self.documents, "eval_draws": self.draws}
        for label, quality in [
            ("", self.overall),
            *((f"/{n}", q) for n, q in zip(bin_names(), self.bins, strict=True)),
        ]:
            for name in MEASURES:
                value = getattr(quality, name)
                if value is not None:
                    found[f"eval_{name}{label}"] = value
        return found


class _Chunks:
    """Collects, per masked chunk: timestep, bytes, log-likelihood of the gold, confidence, whether top-1 is right."""

    def __init__(self) -> None:
        self._parts: list[tuple[Column, ...]] = []

    def add(
        self,
        timestep: npt.ArrayLike,
        size: npt.ArrayLike,
        logp: npt.ArrayLike,
        confidence: npt.ArrayLike,
        right: npt.ArrayLike,
    ) -> None:
        parts = (timestep, size, logp, confidence, right)
        self._parts.append(tuple(np.asarray(part, dtype=np.float64) for part in parts))

    def gathered(self, gather: Callable[[list[Any]], list[Any]]) -> _Chunks:
        """With the chunks of all processes, in an order that does not matter to any measure but in rounding."""
        every = _Chunks()
        every._parts = gather(self._parts)
        return every

    def evaluation(self, documents: int, draws: int, unusable: int = 0) -> Evaluation:
        columns = [np.concatenate(part) for part in zip(*self._parts, strict=True)] or [np.zeros(0)] * 5
        timestep_Q = columns[0]
        bins = []
        for low, high in pairwise(EDGES):
            inside_Q = (timestep_Q >= low) & ((timestep_Q < high) | (high == EDGES[-1]))
            bins.append(_quality(low, high, *(column[inside_Q] for column in columns[1:])))
        return Evaluation(tuple(bins), _quality(EDGES[0], EDGES[-1], *columns[1:]), documents, draws, unusable)


def _quality(
    low: float, high: float, bytes_Q: Column, logp_Q: Column, confidence_Q: Column, right_Q: Column
) -> Quality:
    count = len(bytes_Q)
    if not count:
        return Quality(low, high, 0, 0, None, None, None)
    return Quality(
        low=low,
        high=high,
        chunks=count,
        bytes=int(bytes_Q.sum()),
        bits_per_byte=float(-logp_Q.sum() / np.log(2.0) / bytes_Q.sum()),
        accuracy=float(right_Q.mean()),
        calibration_error=calibration_error(confidence_Q, right_Q),
    )


def calibration_error(confidence_Q: Column, right_Q: Column) -> float:
    """Expected calibration error: over chunks, the mean of |mean confidence − accuracy| of their bin; 10 equal bins."""
    bin_Q = np.minimum((confidence_Q * CONFIDENCE_BINS).astype(np.int64), CONFIDENCE_BINS - 1)
    gap = np.bincount(bin_Q, weights=confidence_Q, minlength=CONFIDENCE_BINS)
    gap -= np.bincount(bin_Q, weights=right_Q, minlength=CONFIDENCE_BINS)
    return float(np.abs(gap).sum() / len(confidence_Q))


@dataclass(frozen=True)
class Share:
    """Which part of the work this process does, of several that hold one model, and how their columns come together."""

    rank: int = 0
    ranks: int = 1
    gather: Callable[[list[Any]], list[Any]] = list  # the items of all processes in all


def evaluate(
    student: Student,
    cache: Cache,
    block_size: int,
    limit: int | None = None,
    batch_rows: int = 16,
    device: str = "cpu",
    block_start: str | None = None,
    answer: Callable[[Batch], ChunkAnswers] | None = None,
    share: Share | None = None,
) -> Evaluation:
    """Evaluate a student on a cache's stored draws.

    Args:
        student: as loaded by `load_student`.
        cache: the draws; usually the held-out cache beside a training cache.
        block_size: tokens per block of the student's attention.
        limit: only the first `limit` documents of the cache, with all their draws.
        batch_rows: rows in a batch; the result does not depend on it but for rounding.
        device: where to run.
        block_start: as the configuration has it; None: the student's own.
        answer: the student's answers to a batch, where it is wrapped (a run's); None: the student itself is moved to
            the device and run.
        share: of several processes; each gets all results, and runs as many batches as any other.

    Raises:
        TidecacheError: the cache holds no draws.
    """
    maker = RowMaker(student.text, cache.spec, block_size, context=None, block_start=block_start or student.block_start)
    share = share or Share()
    place = torch.device(device)
    answer = answer or _plain_answer(student, block_size, place)
    found, seen = _Chunks(), _Seen(cache)
    batches = _batches(cache, limit, maker, Collator(student.mask_id, student.pad_id), batch_rows, seen)
    while together := list(islice(batches, share.ranks)):
        batch = together[min(share.rank, len(together) - 1)].to(place)
        answers = answer(batch)
        if share.rank < len(together) and len(batch.sample_C):
            found.add(
                batch.timestep_B[batch.sample_C].cpu().numpy(),
                batch.bytes_C.cpu().numpy(),
                answers.logp_C.cpu().numpy(),
                np.exp(answers.best_logp_C.cpu().numpy()),
                answers.right_C.cpu().numpy(),
            )
    return found.gathered(share.gather).evaluation(*seen.counts())


def _batches(
    cache: Cache, limit: int | None, maker: RowMaker, collator: Collator, batch_rows: int, seen: _Seen
) -> Iterator[Batch]:
    """All draws, those of similar length together."""
    for group in _groups(_limited(cache, limit)):
        rows = []
        for draw in group:
            row = maker.cached_row(draw)
            seen.add(draw, usable=len(row.ids_L) > 0)
            rows.append(row)
        ordered = sorted(rows, key=lambda row: len(row.ids_L))
        for start in range(0, len(ordered), batch_rows):
            yield collator(ordered[start : start + batch_rows])


def _plain_answer(student: Student, block_size: int, device: torch.device) -> Callable[[Batch], ChunkAnswers]:
    model = student.model
    model.to(device)  # type: ignore[arg-type]
    model.train(False)
    head = Head.of(model)

    @torch.no_grad()
    def answer(batch: Batch) -> ChunkAnswers:
        return chunk_answers(masked_hidden(model, batch, block_size), head, batch)

    return answer


def evaluate_teacher(cache: Cache, limit: int | None = None) -> dict[str, Evaluation]:
    """The teacher's own answers to the same draws, by context, from the topk lane; empty where there is none.

    Raises:
        TidecacheError: the cache holds no draws.
    """
    if "topk" not in cache.spec.lanes:
        return {}
    found, seen = {context: _Chunks() for context in cache.spec.contexts}, _Seen(cache)
    for draw in _limited(cache, limit):
        seen.add(draw, usable=True)
        for context, chunks in found.items():
            _add_teacher(chunks, draw, context)
    return {context: chunks.evaluation(*seen.counts()) for context, chunks in found.items()}


class _Seen:
    """Counts what went into an evaluation."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._documents: set[str] = set()
        self._unusable: set[str] = set()
        self._draws = 0

    def add(self, draw: Draw, usable: bool) -> None:
        self._draws += 1
        self._documents.add(draw.document)
        if not usable:
            self._unusable.add(draw.document)

    def counts(self) -> tuple[int, int, int]:
        if not self._draws:
            raise TidecacheError(f"{self._cache.path}: the cache holds no draws to evaluate on: capture some first")
        return len(self._documents), self._draws, len(self._unusable)


def _limited(cache: Cache, limit: int | None) -> Iterator[Draw]:
    """The draws of the first `limit` documents."""
    seen: set[str] = set()
    for draw in cache.iter_draws():
        seen.add(draw.document)
        if limit is not None and len(seen) > limit:
            return
        yield draw


def _groups(draws: Iterator[Draw]) -> Iterator[list[Draw]]:
    while group := list(islice(draws, SORTED_TOGETHER)):
        yield group


def _add_teacher(chunks: _Chunks, draw: Draw, context: str) -> None:
    """The teacher's own answer to the same masks: its best filling is right if it has the gold's tokens."""
    scores, stored = draw.scores[context], draw.stored
    if not len(draw.chunks) or scores.topk_ids is None or scores.topk_logp_MK is None:
        return
    right_M = best_is_gold(stored, draw.chunks, scores.topk_ids, scores.topk_logp_MK.shape[1])
    size_M = (stored.chunks.stop_C - stored.chunks.start_C)[draw.chunks]
    chunks.add(
        np.full(len(draw.chunks), draw.timestep),
        size_M,
        draw.gold_logp_of(context),
        np.exp(np.minimum(scores.topk_logp_MK[:, 0], 0.0)),
        right_M,
    )


def bin_names() -> list[str]:
    """`0–0.2`, `0.2–0.4`, …"""
    return [f"{low:g}–{high:g}" for low, high in pairwise(EDGES)]


def table(evaluations: Mapping[str, Evaluation]) -> Table:
    """For people: one block of rows per measure, a row per model, timesteps across."""
    first = next(iter(evaluations.values()))
    result = Table(title=f"{first.documents} documents, {first.draws} draws, by timestep", title_justify="left")
    result.add_column("measure", no_wrap=True)
    result.add_column("model")
    for name in [*bin_names(), "all"]:
        result.add_column(name, justify="right", no_wrap=True)
    for title, field, form in (
        ("bits per byte", "bits_per_byte", "{:.3f}"),
        ("top-1", "accuracy", "{:.1%}"),
        ("calibration", "calibration_error", "{:.3f}"),
    ):
        for number, (model, evaluation) in enumerate(evaluations.items()):
            values = [getattr(quality, field) for quality in (*evaluation.bins, evaluation.overall)]
            cells = ["–" if value is None else form.format(value) for value in values]
            result.add_row(title if not number else "", model, *cells, end_section=number == len(evaluations) - 1)
    return result
