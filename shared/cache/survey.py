"""What only the rows of a cache say: chunk lengths, coverage, entropy, recall of the k fillings, compdemo against plain.

The footers hold sums of the teacher's likelihoods, tail mass and calibration for every shard; the rest takes a look at
the rows. Of a large cache a sample is read: document ranges evenly spaced over it, each with all its draws, so that
every timestep is there. One shard is in memory at a time.

**Entropy** of a chunk's distribution over all fillings isn't stored, but it lies in a narrow range. The k fillings give
their own part exactly. A filling of the tail has at most the k-th probability, which bounds the rest from below; from
above it is bounded by the tail's Rényi entropy of order 1/T < 1 (never below Shannon's), which follows from log Z_T.

Shapes: C chunks of all documents of a shard, M masked chunks of all its draws, N their teacher tokens, K fillings,
T temperatures, B timestep bins, D documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from shared.cache.reader import Cache
from shared.cache.records import Draw, StoredDocument
from shared.cache.statistics import TIMESTEP_BINS, timestep_bin
from shared.ragged import ranges
from shared.spec import CaptureSpec

LONGEST_BYTES = 32  # chunk lengths are counted up to here, longer ones together
LONGEST_TOKENS = 8
DRAWS_AT_ONCE = 256  # what is derived from so many stays far smaller than a shard

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Sums = TypeVar("Sums", bound="ContextSurvey | PairSurvey")


def _zeros() -> Array:
    return np.zeros(TIMESTEP_BINS)


@dataclass(frozen=True)
class ContextSurvey:
    """Sums over masked chunks of one context, by timestep; nats. The two ends of the entropy's range, and how many
    chunks have their gold among the k fillings. Zero where there is no topk lane.
    """

    chunks_B: Array = field(default_factory=_zeros)
    entropy_low_B: Array = field(default_factory=_zeros)
    entropy_high_B: Array = field(default_factory=_zeros)
    gold_among_k_B: Array = field(default_factory=_zeros)


@dataclass(frozen=True)
class PairSurvey:
    """compdemo minus plain on the same masked chunks, by timestep: gold log-likelihood in nats.

    The sums of squares are over documents (each with all its chunks of a bin), for the chunks of one document are no
    independent observations: `gain_gain_B` = Σ_D gain², `gain_chunks_B` = Σ_D gain · chunks, `chunks_chunks_B` = Σ_D chunks².
    """

    chunks_B: Array = field(default_factory=_zeros)
    tokens_B: Array = field(default_factory=_zeros)
    gain_B: Array = field(default_factory=_zeros)
    better_B: Array = field(default_factory=_zeros)
    gain_gain_B: Array = field(default_factory=_zeros)
    gain_chunks_B: Array = field(default_factory=_zeros)
    chunks_chunks_B: Array = field(default_factory=_zeros)

    @property
    def mean_B(self) -> Array:
        """Mean gain per chunk; NaN where there is none."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(self.gain_B / self.chunks_B)

    @property
    def error_B(self) -> Array:
        """Standard error of `mean_B`: that of a ratio of sums over independent documents."""
        with np.errstate(invalid="ignore", divide="ignore"):
            mean_B = self.mean_B
            square_B = self.gain_gain_B - 2 * mean_B * self.gain_chunks_B + mean_B**2 * self.chunks_chunks_B
            return np.asarray(np.sqrt(np.maximum(square_B, 0.0)) / self.chunks_B)

    @property
    def over_all(self) -> PairSurvey:
        """All timesteps in the first bin: for one figure over them. Its error takes a document's bins as independent."""
        return PairSurvey(
            **{f.name: np.r_[getattr(self, f.name).sum(), np.zeros(TIMESTEP_BINS - 1)] for f in fields(self)}
        )


@dataclass(frozen=True)
class Survey:
    """What a sample of a cache's document ranges holds.

    `byte_lengths`, `token_lengths`: number of chunks by their length in bytes and in teacher tokens; index 0 is length
    1, the last index that length and more. `trainable_bytes`: of all trainable contents, `chunk_bytes` of them in chunks.
    """

    ranges_read: int
    ranges_total: int
    documents: int
    draws: int
    trainable_bytes: int
    chunk_bytes: int
    byte_lengths: IntArray
    token_lengths: IntArray
    contexts: Mapping[str, ContextSurvey]
    pair: PairSurvey | None


def document_ranges(cache: Cache) -> list[list[int]]:
    """Shard indices by documents file: all draw ranges of the same documents together, in order."""
    groups: dict[str, list[int]] = {}
    for index, receipt in enumerate(cache.shards):
        groups.setdefault(receipt.documents.path, []).append(index)
    return list(groups.values())


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the numbers below `count`, evenly spaced over all of them."""
    return sorted({int((i + 0.5) * count / wanted) for i in range(wanted)}) if wanted < count else list(range(count))


def survey_cache(cache: Cache, sample: int) -> Survey | None:
    """Read at most `sample` document ranges, evenly spaced; None where there is nothing to read.

    Raises:
        TidecacheError: a file is missing or damaged.
    """
    groups = document_ranges(cache)
    if not groups or sample < 1:
        return None
    chosen = [groups[i] for i in spread(len(groups), sample)]
    spec = cache.spec
    lengths = (np.zeros(LONGEST_BYTES, dtype=np.int64), np.zeros(LONGEST_TOKENS, dtype=np.int64))
    contexts = {context: ContextSurvey() for context in spec.contexts}
    pair = PairSurvey() if len(spec.contexts) == 2 else None
    documents = draws = trainable = covered = 0
    for group in chosen:
        stored = cache.read_documents(group[0])
        documents += len(stored)
        trainable += sum(
            len(content) for d in stored for content, m in zip(d.contents, d.messages, strict=True) if m.trainable
        )
        covered += _count_lengths(stored, *lengths)
        gains = _Gains.of(len(stored)) if pair is not None else None
        place = {d.key: i for i, d in enumerate(stored)}
        for index in group:
            rows = cache.read_shard(index).draws
            draws += len(rows)
            for first in range(0, len(rows), DRAWS_AT_ONCE):
                columns = _Columns.of(rows[first : first + DRAWS_AT_ONCE], place)
                if not len(columns.count_M):
                    continue
                for context in spec.contexts:
                    contexts[context] = _add(contexts[context], survey_context(spec, columns, context))
                if gains is not None:
                    gains.add(columns)
        if pair is not None and gains is not None:
            pair = _add(pair, gains.sums)
    return Survey(len(chosen), len(groups), documents, draws, trainable, covered, *lengths, contexts, pair)


def _add(a: Sums, b: Sums) -> Sums:
    return type(a)(**{f.name: getattr(a, f.name) + getattr(b, f.name) for f in fields(a)})


def _count_lengths(documents: Sequence[StoredDocument], byte_lengths: IntArray, token_lengths: IntArray) -> int:
    """Count the chunks of documents by length, in place; returns their bytes."""
    total = 0
    for document in documents:
        bytes_C = document.chunks.stop_C - document.chunks.start_C
        total += int(bytes_C.sum())
        for counts, length_C in ((byte_lengths, bytes_C), (token_lengths, document.token_count_C)):
            counts += np.bincount(np.clip(length_C, 1, len(counts)) - 1, minlength=len(counts))
    return total


@dataclass(frozen=True)
class _Columns:
    """All masked chunks of a shard's draws, one after the other. `document_M` numbers the documents."""

    draws: Sequence[Draw]
    count_M: IntArray
    bin_M: IntArray
    document_M: IntArray

    @classmethod
    def of(cls, draws: Sequence[Draw], place: Mapping[str, int]) -> _Columns:
        chunks = [len(d.chunks) for d in draws]
        return cls(
            draws,
            np.concatenate([np.zeros(0, dtype=np.int64), *(d.token_count_M for d in draws)]),
            np.repeat(np.array([timestep_bin(d.timestep) for d in draws], dtype=np.int64), chunks),
            np.repeat(np.array([place[d.document] for d in draws], dtype=np.int64), chunks),
        )

    @property
    def start_M(self) -> IntArray:
        return np.asarray(np.cumsum(self.count_M) - self.count_M)

    def by_bin(self, values_M: npt.ArrayLike | None = None) -> Array:
        weights = None if values_M is None else np.asarray(values_M, dtype=np.float64)
        return np.bincount(self.bin_M, weights=weights, minlength=TIMESTEP_BINS).astype(np.float64)

    def scores(self, context: str, name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(d.scores[context], name) for d in self.draws])

    def gold_ids_N(self) -> npt.NDArray[np.int32]:
        parts = []
        for d in self.draws:
            count_C = d.stored.token_count_C
            parts.append(d.stored.token_ids_N[ranges((np.cumsum(count_C) - count_C)[d.chunks], count_C[d.chunks])])
        return np.concatenate(parts)


def survey_context(spec: CaptureSpec, columns: _Columns, context: str) -> ContextSurvey:
    """The sums of one shard with at least one masked chunk."""
    if "topk" not in spec.lanes:
        return ContextSurvey(chunks_B=columns.by_bin())
    logp_MK = columns.scores(context, "topk_logp_MK").astype(np.float64)
    log_z_MT = columns.scores(context, "log_z_MT").astype(np.float64)
    low_M, high_M = entropy_range(spec, columns.count_M, logp_MK, log_z_MT)
    found_M = gold_rank(columns.gold_ids_N(), columns.scores(context, "topk_ids"), columns.count_M, spec.k) < spec.k
    return ContextSurvey(columns.by_bin(), columns.by_bin(low_M), columns.by_bin(high_M), columns.by_bin(found_M))


def entropy_range(spec: CaptureSpec, count_M: IntArray, logp_MK: Array, log_z_MT: Array) -> tuple[Array, Array]:
    """(low_M, high_M): between these lies the entropy, in nats, of each chunk's distribution over all its fillings."""
    p_MK = np.exp(logp_MK)
    known_M = -(p_MK * logp_MK).sum(1)
    tail_M = np.maximum(1.0 - p_MK.sum(1), 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        own_M = -np.log(tail_M)
        low_M = tail_M * np.maximum(-logp_MK[:, -1], own_M)
        spread_M = count_M * np.log(spec.teacher.vocabulary)  # of the tail by itself: at most uniform over everything
        for column, temperature in enumerate(spec.temperatures):
            if temperature > 1.0:
                order = 1.0 / temperature
                rest_M = np.exp(log_z_MT[:, column]) - np.exp(order * logp_MK).sum(1)
                renyi_M = (np.log(np.maximum(rest_M, 0.0)) - order * np.log(tail_M)) / (1.0 - order)
                spread_M = np.fmin(spread_M, renyi_M)
        high_M = tail_M * (own_M + spread_M)
    low_M, high_M = np.nan_to_num(low_M, posinf=0.0), np.nan_to_num(high_M, posinf=0.0, neginf=0.0)
    return known_M + low_M, known_M + np.maximum(low_M, high_M)  # rounding can turn them round


def gold_rank(gold_N: npt.NDArray[np.int32], topk_ids: npt.NDArray[np.int32], count_M: IntArray, k: int) -> IntArray:
    """rank_M: the place (from 0) of the gold among the k fillings of M ≥ 1 chunks; k where it is none of them."""
    start_M = np.cumsum(count_M) - count_M
    filling_tokens = np.repeat(count_M, k)
    gold_of_each = ranges(np.repeat(start_M, k), filling_tokens)
    equal = topk_ids == gold_N[gold_of_each]
    hit_MK = np.logical_and.reduceat(equal, np.cumsum(filling_tokens) - filling_tokens).reshape(-1, k)
    return np.asarray(np.where(hit_MK.any(1), hit_MK.argmax(1), k))


@dataclass(frozen=True)
class _Gains:
    """compdemo minus plain, summed by timestep and document of one document range, over all of its shards."""

    chunks_BD: Array
    tokens_BD: Array
    gain_BD: Array
    better_BD: Array

    @classmethod
    def of(cls, documents: int) -> _Gains:
        return cls(*(np.zeros((TIMESTEP_BINS, documents)) for _ in fields(cls)))

    def add(self, columns: _Columns) -> None:
        """Add draws with at least one masked chunk, in place."""
        gain_N = columns.scores("compdemo", "gold_logp_N").astype(np.float64) - columns.scores("plain", "gold_logp_N")
        gain_M = np.add.reduceat(gain_N, columns.start_M)
        place_M = (columns.bin_M, columns.document_M)
        np.add.at(self.chunks_BD, place_M, 1.0)
        np.add.at(self.tokens_BD, place_M, columns.count_M)
        np.add.at(self.gain_BD, place_M, gain_M)
        np.add.at(self.better_BD, place_M, (gain_M > 0) + 0.5 * (gain_M == 0))

    @property
    def sums(self) -> PairSurvey:
        return PairSurvey(
            chunks_B=self.chunks_BD.sum(1),
            tokens_B=self.tokens_BD.sum(1),
            gain_B=self.gain_BD.sum(1),
            better_B=self.better_BD.sum(1),
            gain_gain_B=(self.gain_BD**2).sum(1),
            gain_chunks_B=(self.gain_BD * self.chunks_BD).sum(1),
            chunks_chunks_B=(self.chunks_BD**2).sum(1),
        )


def length_at(counts: IntArray, share: float) -> int:
    """The length that `share` of the chunks don't exceed, from counts by length as in `Survey`."""
    return int(np.searchsorted(np.cumsum(counts), share * counts.sum()) + 1)


def per_chunk(sums: ContextSurvey) -> Iterator[tuple[float, float, float] | None]:
    """By timestep: the entropy's two ends, and the share of chunks with the gold among the k; None without chunks."""
    for chunks, low, high, found in zip(
        sums.chunks_B, sums.entropy_low_B, sums.entropy_high_B, sums.gold_among_k_B, strict=True
    ):
        yield (float(low / chunks), float(high / chunks), float(found / chunks)) if chunks else None
