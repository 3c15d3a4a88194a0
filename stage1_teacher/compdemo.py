"""From a draw to the teacher's passes and back: what each pass shows, hides and scores (DESIGN §4, "CompDemo"; §5).

A draw masks some chunks and puts each in A or B. In the context `plain` one pass masks and scores all of them. In
`compdemo` pass 1 shows A, masks and scores B, and pass 2 shows B, masks and scores A: the teacher predicts every masked
chunk with half of the others as demonstrations. A pass with nothing to score is not run. Whatever is in no masked chunk
the teacher sees clean.

Shapes: C chunks of a document, L teacher tokens of a document, M masked chunks of a draw, N scored tokens (of a draw, or
of all draws of a shard in order), K fillings, T temperatures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from shared import noise
from shared.cache.records import ContextScores, DrawRecord
from shared.documents import Chunks, Dropped, PreparedDocument
from shared.preparation import NOTHING_TRAINABLE
from shared.spec import CaptureSpec
from stage1_teacher.backends import ScoreRequest, Scores, ScoresWithTail
from stage1_teacher.fillings import best_fillings

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]


def without_unpredictable(document: PreparedDocument | Dropped, logit_shift: bool) -> PreparedDocument | Dropped:
    """Leave out the chunk that this teacher cannot predict.

    With a logit shift, position i is predicted by row i − 1, so position 0 by none (DESIGN §7). Where the first chunk starts
    there, it is no chunk of this cache: never masked, always shown.
    """
    if isinstance(document, Dropped) or not logit_shift:
        return document
    first_C, _ = document.teacher.token_ranges(document.chunks)
    keep_C = first_C > 0
    if not keep_C.any():
        detail = "its only chunk starts at position 0, which a teacher with a logit shift cannot predict"
        return Dropped(document.key, document.name, NOTHING_TRAINABLE, detail)
    c = document.chunks
    return dataclasses.replace(document, chunks=Chunks(c.message_C[keep_C], c.start_C[keep_C], c.stop_C[keep_C]))


@dataclass(frozen=True)
class Subject:
    """A document with what all of its draws share: where the teacher's tokens of its chunks stand."""

    position: int  # in the deduplicated corpus
    document: PreparedDocument

    @cached_property
    def _ranges(self) -> tuple[IntArray, IntArray]:
        return self.document.teacher.token_ranges(self.document.chunks)

    @cached_property
    def token_count_C(self) -> IntArray:
        """Teacher tokens of each chunk."""
        first_C, stop_C = self._ranges
        return stop_C - first_C

    @cached_property
    def chunk_N(self) -> IntArray:
        """The chunk of each token that is in one, in order."""
        return np.repeat(np.arange(len(self.token_count_C)), self.token_count_C)

    @cached_property
    def position_N(self) -> IntArray:
        """The position of each token that is in a chunk, in order."""
        within_N = np.arange(len(self.chunk_N)) - (np.cumsum(self.token_count_C) - self.token_count_C)[self.chunk_N]
        return np.asarray(self._ranges[0][self.chunk_N] + within_N)


@dataclass(frozen=True)
class Pass:
    """One sequence through the teacher: the chunks that it masks and scores."""

    context: str
    scored_C: BoolArray


@dataclass(frozen=True)
class PlannedDraw:
    """One draw before it is scored."""

    subject: Subject
    draw: int
    timestep: float
    masked_C: BoolArray
    split_C: BoolArray  # True = A; over all chunks

    def passes(self, contexts: Sequence[str]) -> list[Pass]:
        """The teacher's passes in these contexts, in order; one with nothing to score is left out."""
        a_C, b_C = self.masked_C & self.split_C, self.masked_C & ~self.split_C
        return [
            Pass(context, scored_C)
            for context in contexts
            for scored_C in ((b_C, a_C) if context == "compdemo" else (self.masked_C,))
            if scored_C.any()
        ]


def plan_draw(spec: CaptureSpec, subject: Subject, draw: int) -> PlannedDraw:
    """The draw of this number: a pure function of the spec's seed and the document's key."""
    document, chunks = subject.document, subject.document.chunks
    t = noise.timestep(spec.seed, document.key, draw, spec.epsilon)
    if spec.mask_law == "chunk":
        masked_C = noise.mask_chunks(spec.seed, document.key, draw, t, len(chunks))
    else:
        student = document.students[0]
        masked_L = noise.mask_tokens(spec.seed, document.key, draw, t, len(student.ids_L))
        masked_C = noise.chunks_with_masked_token(masked_L, *student.token_ranges(chunks))
    split_C = noise.split_chunks(spec.seed, document.key, draw, spec.demo_ratio, len(chunks))
    return PlannedDraw(subject, draw, t, masked_C, split_C)


def requests_of(spec: CaptureSpec, draws: Sequence[PlannedDraw]) -> list[ScoreRequest]:
    """The passes of all draws in the spec's contexts, in order, as the teacher is asked."""
    return [_request(spec, draw, scored) for draw in draws for scored in draw.passes(spec.contexts)]


def _request(spec: CaptureSpec, draw: PlannedDraw, scored: Pass) -> ScoreRequest:
    subject, scored_C = draw.subject, scored.scored_C
    clean_L = subject.document.teacher.ids_L
    position_N = subject.position_N[scored_C[subject.chunk_N]]
    noisy_L = clean_L.copy()
    noisy_L[position_N] = spec.teacher.mask_id
    chance_N = None
    if spec.tail_samples:
        key = noise.stream_key(spec.seed, subject.document.key, f"tail-{scored.context}", draw.draw)
        chance_N = noise.uniforms(key, len(subject.chunk_N))[scored_C[subject.chunk_N]]
    return ScoreRequest(noisy_L, position_N, clean_L[position_N], clean_L, chance_N, spec.tail_samples)


def records_of(spec: CaptureSpec, draws: Sequence[PlannedDraw], scores: Scores) -> list[DrawRecord]:
    """Put the passes' scores (those of `requests_of` with the same spec, in that order) back together by context."""
    contexts = {context: _context_scores(spec, context, draws, scores) for context in spec.contexts}
    return [
        DrawRecord(
            position=draw.subject.position,
            draw=draw.draw,
            timestep=draw.timestep,
            masked_C=draw.masked_C,
            split_M=draw.split_C[draw.masked_C],
            contexts={context: next(parts) for context, parts in contexts.items()},
        )
        for draw in draws
    ]


def _context_scores(
    spec: CaptureSpec, context: str, draws: Sequence[PlannedDraw], scores: Scores
) -> Iterator[ContextScores]:
    """Each draw's scores in one context; the work is done for all draws at once."""
    row_N = _rows(spec, context, draws)
    counts = [draw.subject.token_count_C[draw.masked_C] for draw in draws]
    chunks_D = np.array([len(count_M) for count_M in counts])
    count_M = np.concatenate(counts) if counts else np.zeros(0, dtype=np.int64)
    token_stop_D = np.cumsum([count.sum() for count in counts])
    gold_N = scores.gold_logp_N.numpy()[row_N]
    if "topk" not in spec.lanes:
        for draw, stop in enumerate(token_stop_D):
            yield ContextScores(gold_logp_N=gold_N[token_stop_D[draw - 1] if draw else 0 : stop])
        return
    flat, logp_MK = best_fillings(scores.topk_ids_NK.numpy()[row_N], scores.topk_logp_NK.numpy()[row_N], count_M)
    start_M = np.cumsum(count_M) - count_M
    log_z_NT = scores.log_z_NT.numpy()[row_N].astype(np.float64)
    log_z_MT = np.add.reduceat(log_z_NT, start_M, axis=0) if len(count_M) else log_z_NT
    chunk_stop_D = np.cumsum(chunks_D)
    single_M = count_M == 1
    tail_stop_D = np.concatenate([[0], np.cumsum(single_M)])[chunk_stop_D] if len(chunk_stop_D) else chunk_stop_D
    tail_ids_MS, tail_logp_MS = None, None
    if isinstance(scores, ScoresWithTail):
        tail_ids_MS = scores.tail_ids_NS.numpy()[row_N[start_M[single_M]]].astype(np.int32)
        tail_logp_MS = scores.tail_logp_NS.numpy()[row_N[start_M[single_M]]]
    for draw in range(len(draws)):
        tokens = slice(token_stop_D[draw - 1] if draw else 0, token_stop_D[draw])
        chunks = slice(chunk_stop_D[draw - 1] if draw else 0, chunk_stop_D[draw])
        single = slice(tail_stop_D[draw - 1] if draw else 0, tail_stop_D[draw])
        yield ContextScores(
            gold_logp_N=gold_N[tokens],
            log_z_MT=log_z_MT[chunks].astype(np.float32),
            topk_ids=flat[spec.k * tokens.start : spec.k * tokens.stop],
            topk_logp_MK=logp_MK[chunks].astype(np.float32),
            tail_ids=None if tail_ids_MS is None else tail_ids_MS[single].reshape(-1),
            tail_logp=None if tail_logp_MS is None else tail_logp_MS[single].reshape(-1),
        )


def _rows(spec: CaptureSpec, context: str, draws: Sequence[PlannedDraw]) -> IntArray:
    """For each scored token of the draws, in their order and that of the document: its row in the scores."""
    parts = []
    first = 0
    for draw in draws:
        chunk_N = draw.subject.chunk_N[draw.masked_C[draw.subject.chunk_N]]
        row_N = np.full(len(chunk_N), -1, dtype=np.int64)
        for scored in draw.passes(spec.contexts):
            asked_N = scored.scored_C[chunk_N]
            count = int(asked_N.sum())
            if scored.context == context:
                row_N[asked_N] = np.arange(first, first + count)
            first += count
        assert (row_N >= 0).all(), "every masked chunk is scored once in each context"
        parts.append(row_N)
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
