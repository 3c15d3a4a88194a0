"""What goes into a cache and comes out of it: shard ranges, draws with the teacher's scores, and stored documents.

The capture hands `DrawRecord`s to the writer; the reader yields `Draw`s, which also know their document and the
teacher's vocabulary. Both carry the scores of each context as `ContextScores`, so nothing is renamed on the way
through the file.

Shapes: C chunks of a document, M masked chunks of a draw, N teacher tokens (of all chunks in a document, of the masked
chunks in a draw), K fillings per chunk, T temperatures of the spec. Log-likelihoods are in nats at temperature 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.cache.vocabulary import TeacherVocabulary
from shared.documents import Chunks, Message
from shared.errors import TidecacheError
from shared.ragged import ranges

FloatArray = npt.NDArray[np.float32]
IdArray = npt.NDArray[np.int32]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, order=True)
class ShardRange:
    """One shard's extent: positions [first_document, document_stop) of the deduplicated corpus (dropped documents
    included) and draws [first_draw, draw_stop) of each.
    """

    first_document: int
    document_stop: int
    first_draw: int
    draw_stop: int

    def __post_init__(self) -> None:
        """Refuse what is no range."""
        if not (0 <= self.first_document < self.document_stop and 0 <= self.first_draw < self.draw_stop):
            raise ValueError(f"not a shard range: {self}")

    @property
    def documents_name(self) -> str:
        """The stem of the documents file, shared by all draw ranges over the same documents."""
        return f"{self.first_document:08d}-{self.document_stop:08d}"

    @property
    def name(self) -> str:
        """The stem of the likelihoods file and of the receipt; fixed by the range alone."""
        return f"{self.documents_name}.draws-{self.first_draw:04d}-{self.draw_stop:04d}"

    def overlaps(self, other: ShardRange) -> bool:
        """Whether some (position, draw) lies in both."""
        return (
            self.first_document < other.document_stop
            and other.first_document < self.document_stop
            and self.first_draw < other.draw_stop
            and other.first_draw < self.draw_stop
        )


@dataclass(frozen=True)
class ContextScores:
    """The teacher's scores of one draw in one context. The last three are None where the cache has no topk lane.

    `topk_ids` is flat: for masked chunk m, K fillings of n_m ids each, filling after filling, best first; so it holds
    K·N ids. `log_z_MT` has one column per temperature of the spec, in its order, 0 where T = 1.

    `tail_ids` and `tail_logp` are flat too, and there only if the spec has tail samples: for each masked chunk of one
    token, in order, that many tokens from beyond its K best, drawn (with replacement) in proportion to p_T at
    `shared.spec.TAIL_TEMPERATURE`.
    """

    gold_logp_N: FloatArray
    log_z_MT: FloatArray | None = None
    topk_ids: IdArray | None = None
    topk_logp_MK: FloatArray | None = None
    tail_ids: IdArray | None = None
    tail_logp: FloatArray | None = None

    def of_chunks(self, kept_M: BoolArray, token_count_M: IntArray) -> ContextScores:
        """The scores of some masked chunks; `token_count_M`: teacher tokens of each of all."""
        count = token_count_M[kept_M]
        start = (np.cumsum(token_count_M) - token_count_M)[kept_M]
        kept = ContextScores(self.gold_logp_N[ranges(start, count)])
        if self.topk_ids is not None and self.topk_logp_MK is not None and self.log_z_MT is not None:
            k = self.topk_logp_MK.shape[1]
            kept = replace(
                kept,
                log_z_MT=self.log_z_MT[kept_M],
                topk_ids=self.topk_ids[ranges(k * start, k * count)],
                topk_logp_MK=self.topk_logp_MK[kept_M],
            )
        if self.tail_ids is not None and self.tail_logp is not None:
            kept_S = kept_M[token_count_M == 1]  # of the chunks that have tail samples
            kept = replace(kept, tail_ids=_of_rows(self.tail_ids, kept_S), tail_logp=_of_rows(self.tail_logp, kept_S))
        return kept


def _of_rows(flat: npt.NDArray[Any], kept_S: BoolArray) -> npt.NDArray[Any]:
    """Some rows of equal length, that stand one after the other in a flat array, flat again."""
    return np.asarray(flat.reshape(len(kept_S), -1)[kept_S].ravel()) if len(kept_S) else flat


@dataclass(frozen=True)
class DrawRecord:
    """One draw as the capture hands it to the writer. `split_M`: True = A, one per masked chunk in order."""

    position: int  # of the document in the deduplicated corpus
    draw: int
    timestep: float
    masked_C: BoolArray
    split_M: BoolArray
    contexts: Mapping[str, ContextScores]


@dataclass(frozen=True)
class StoredDocument:
    """A document as the cache holds it. `token_ids_N`: the teacher's tokens of all chunks, in order;
    `token_count_C`: how many of them each chunk has.
    """

    key: str
    name: str
    position: int
    messages: tuple[Message, ...]
    chat: bool
    cut: bool
    chunks: Chunks
    token_ids_N: IdArray
    token_count_C: IntArray

    def chunk_bytes(self, chunk: int) -> bytes:
        """The UTF-8 bytes of one chunk (its gold filling); they may end inside a character."""
        content = self.contents[int(self.chunks.message_C[chunk])]
        return content[int(self.chunks.start_C[chunk]) : int(self.chunks.stop_C[chunk])]

    @cached_property
    def contents(self) -> tuple[bytes, ...]:
        """Each message's content in UTF-8."""
        return tuple(m.content.encode() for m in self.messages)


@dataclass(frozen=True)
class Draw:
    """One stored draw. `chunks`: the M masked chunks' numbers; `split`: True = A (shown in pass 1, scored in pass 2).

    `gold_logp` and `candidates` are those of `context`, the one that the reader was asked for.
    """

    document: str
    stored: StoredDocument
    draw: int
    timestep: float
    chunks: IntArray
    split: BoolArray
    scores: Mapping[str, ContextScores]
    context: str
    vocabulary: TeacherVocabulary

    @cached_property
    def masked_C(self) -> BoolArray:
        """Which of the document's chunks are masked."""
        masked_C = np.zeros(len(self.stored.chunks), np.bool_)
        masked_C[self.chunks] = True
        return masked_C

    @cached_property
    def token_count_M(self) -> IntArray:
        """Teacher tokens of each masked chunk."""
        return self.stored.token_count_C[self.chunks]

    @property
    def gold_logp(self) -> FloatArray:
        """Log-likelihood of each masked chunk's gold filling (M), nats, in the draw's context."""
        return self.gold_logp_of(self.context)

    def gold_logp_of(self, context: str) -> FloatArray:
        """Log-likelihood of each masked chunk's gold filling (M), nats: the sum over its teacher tokens.

        Raises:
            TidecacheError: the cache does not hold this context.
        """
        if context not in self.scores:
            raise TidecacheError(
                f"the cache holds the contexts {', '.join(self.scores)}, not {context!r}: take one of these"
            )
        if not len(self.chunks):
            return np.zeros(0, dtype=np.float32)
        start_M = np.cumsum(self.token_count_M) - self.token_count_M
        gold_logp_N = self.scores[context].gold_logp_N.astype(np.float64)
        return np.add.reduceat(gold_logp_N, start_M).astype(np.float32)

    def half(self, side: bool, demo_ratio: float) -> Draw:
        """The draw as compdemo's teacher saw it when it scored one half: the other half is shown, and no longer masked.

        `side`: True keeps A masked. Its timestep is t times the half's share of the masked chunks, `demo_ratio` for A: under
        the mask law `chunk` the probability that a chunk is masked in it. It has the scores of compdemo alone: those of other
        contexts were given with more masked.

        Raises:
            KeyError: it was read without them.
        """
        kept_M = self.split == side
        share = demo_ratio if side else 1.0 - demo_ratio
        return replace(
            self,
            timestep=float(np.float32(self.timestep * share)),
            chunks=self.chunks[kept_M],
            split=self.split[kept_M],
            scores={"compdemo": self.scores["compdemo"].of_chunks(kept_M, self.token_count_M)},
        )

    @property
    def candidates(self) -> list[list[tuple[bytes, float]]]:
        """For each masked chunk its K most likely fillings as (bytes, log-likelihood in nats), best first.

        Raises:
            TidecacheError: the cache has no topk lane.
        """
        scores = self.scores[self.context]
        if scores.topk_ids is None or scores.topk_logp_MK is None:
            raise TidecacheError(
                "the cache has no topk lane, so its draws have no candidates: capture with --lanes gold,topk"
            )
        token_bytes = self.vocabulary.token_bytes
        words = [token_bytes[i] for i in scores.topk_ids.tolist()]
        fillings, start = [], 0
        for count, logp_K in zip(self.token_count_M.tolist(), scores.topk_logp_MK.tolist(), strict=True):
            stop = start + count * len(logp_K)
            spelled = [b"".join(words[i : i + count]) for i in range(start, stop, count)]
            fillings.append(list(zip(spelled, logp_K, strict=True)))
            start = stop
        return fillings
