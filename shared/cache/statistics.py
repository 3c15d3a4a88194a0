"""What a shard says about its teacher by timestep: likelihood of the gold, tail mass, calibration, cost of rounding.

Sums, not means, so that shards add up; they are computed at capture from the exact scores and stand in the footer of
the likelihoods file, one entry per context (DESIGN §5).

Shapes: B timestep bins of equal width, T temperatures, E confidence bins of equal width, M masked chunks, K fillings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.cache.manifest import TIMESTEP_BINS as TIMESTEP_BINS
from shared.cache.manifest import Counts
from shared.cache.records import ContextScores, DrawRecord, StoredDocument
from shared.documents import Dropped
from shared.ragged import ranges
from shared.spec import CaptureSpec

CONFIDENCE_BINS = 10
OTHER_FLOOR = 1e-6  # of the mass outside the top k, as everywhere (DESIGN §5)

Array = npt.NDArray[np.float64]


def timestep_bin(timestep: float) -> int:
    """The bin of [0, 1] that a timestep falls in; 1 belongs to the last."""
    return min(int(timestep * TIMESTEP_BINS), TIMESTEP_BINS - 1)


@dataclass(frozen=True)
class ContextStatistics:
    """Sums over the masked chunks of one context. The arrays of the topk lane are zero where there is none.

    `kl_BT`: KL from the exact to the stored distribution over the k fillings and *other*, nats. `confidence_BE`: sum of
    the best filling's probability, at temperature 1, over the `confident_BE` chunks in that confidence bin, of which
    `hits_BE` have the gold as best filling.
    """

    chunks_B: Array
    tokens_B: Array
    gold_logp_B: Array
    tail_mass_BT: Array
    kl_BT: Array
    confident_BE: Array
    confidence_BE: Array
    hits_BE: Array

    @classmethod
    def zero(cls, temperatures: int) -> ContextStatistics:
        """Nothing counted yet."""
        width = {"B": (), "BT": (temperatures,), "BE": (CONFIDENCE_BINS,)}
        return cls(**{f.name: np.zeros((TIMESTEP_BINS, *width[f.name.rsplit("_", 1)[1]])) for f in fields(cls)})

    def __add__(self, other: ContextStatistics) -> ContextStatistics:
        """The sums over both.

        Raises:
            ValueError: of other bins or temperatures.
        """
        names = [f.name for f in fields(self)]
        if any(getattr(self, n).shape != getattr(other, n).shape for n in names):
            raise ValueError("statistics of other bins or temperatures")
        return ContextStatistics(**{n: getattr(self, n) + getattr(other, n) for n in names})

    def to_json(self) -> dict[str, Any]:
        """Nested lists by field."""
        return {f.name: getattr(self, f.name).tolist() for f in fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ContextStatistics:
        """Read `to_json`'s form."""
        return cls(**{f.name: np.array(data[f.name], dtype=np.float64) for f in fields(cls)})

    @property
    def calibration_error_B(self) -> Array:
        """Expected calibration error of the best filling by timestep bin; NaN where nothing was counted."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.abs(self.confidence_BE - self.hits_BE).sum(1) / self.confident_BE.sum(1))


def count_shard(
    documents: Sequence[StoredDocument],
    dropped: Sequence[tuple[int, Dropped]],
    rows: Sequence[tuple[StoredDocument, float, npt.NDArray[np.bool_]]],
) -> Counts:
    """The counts of a shard whose draws are `rows`: (document, timestep, masked_C)."""
    reasons = [d.reason for _, d in dropped]
    bins = np.bincount(np.array([timestep_bin(t) for _, t, _ in rows], dtype=np.int64), minlength=TIMESTEP_BINS)
    return Counts(
        documents=len(documents),
        dropped={reason: reasons.count(reason) for reason in sorted(set(reasons))},
        cut=sum(d.cut for d in documents),
        chunks=sum(len(d.chunks) for d in documents),
        draws=len(rows),
        masked_chunks=sum(int(masked_C.sum()) for _, _, masked_C in rows),
        scored_tokens=sum(int(d.token_count_C[masked_C].sum()) for d, _, masked_C in rows),
        timesteps=tuple(bins.tolist()),
    )


def shard_statistics(
    spec: CaptureSpec,
    draws: Sequence[tuple[StoredDocument, DrawRecord]],
    stored: Sequence[Mapping[str, ContextScores]],
) -> dict[str, ContextStatistics]:
    """The statistics of each context over all draws; `draws` carry the exact scores, `stored` the rounded ones."""
    total = {context: ContextStatistics.zero(len(spec.temperatures)) for context in spec.contexts}
    for (document, record), rounded in zip(draws, stored, strict=True):
        for context in spec.contexts:
            add_draw(total[context], spec, document, record, record.contexts[context], rounded[context])
    return total


def add_draw(
    total: ContextStatistics,
    spec: CaptureSpec,
    document: StoredDocument,
    record: DrawRecord,
    exact: ContextScores,
    rounded: ContextScores,
) -> None:
    """Add one draw of one context to the sums, in place."""
    count_M = document.token_count_C[record.masked_C]
    if not len(count_M):
        return
    b = timestep_bin(record.timestep)
    total.chunks_B[b] += len(count_M)
    total.tokens_B[b] += count_M.sum()
    total.gold_logp_B[b] += exact.gold_logp_N.sum(dtype=np.float64)
    if exact.topk_ids is None or exact.topk_logp_MK is None:
        return
    p_MTK, q_MTK = _probabilities(spec, exact), _probabilities(spec, rounded)
    total.tail_mass_BT[b] += np.maximum(1.0 - p_MTK.sum(2), 0.0).sum(0)
    total.kl_BT[b] += _kl(p_MTK, q_MTK).sum(0)
    confidence_M = np.minimum(p_MTK[:, spec.temperatures.index(1.0), 0], 1.0)
    bin_M = np.minimum((confidence_M * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
    total.confident_BE[b] += np.bincount(bin_M, minlength=CONFIDENCE_BINS)
    total.confidence_BE[b] += np.bincount(bin_M, weights=confidence_M, minlength=CONFIDENCE_BINS)
    hits_M = best_is_gold(document, np.flatnonzero(record.masked_C), exact.topk_ids, exact.topk_logp_MK.shape[1])
    total.hits_BE[b] += np.bincount(bin_M, weights=hits_M, minlength=CONFIDENCE_BINS)


def _probabilities(spec: CaptureSpec, scores: ContextScores) -> Array:
    """p_MTK of the k fillings at each temperature."""
    assert scores.topk_logp_MK is not None
    assert scores.log_z_MT is not None
    logp_M1K = scores.topk_logp_MK.astype(np.float64)[:, None, :]
    temperature_T1 = np.array(spec.temperatures)[:, None]
    return np.asarray(np.exp(logp_M1K / temperature_T1 - scores.log_z_MT.astype(np.float64)[:, :, None]))


def _kl(p_MTK: Array, q_MTK: Array) -> Array:
    """KL(p ‖ q) in nats over K fillings and *other*; kl_MT."""
    p_MTE, q_MTE = _with_other(p_MTK), _with_other(q_MTK)
    return np.asarray((p_MTE * (np.log(p_MTE) - np.log(q_MTE))).sum(2))


def _with_other(p_MTK: Array) -> Array:
    other_MT1 = np.maximum(1.0 - p_MTK.sum(2, keepdims=True), OTHER_FLOOR)
    events_MTE = np.concatenate([np.maximum(p_MTK, 1e-300), other_MT1], axis=2)
    return np.asarray(events_MTE / events_MTE.sum(2, keepdims=True))


def best_is_gold(
    document: StoredDocument, chunk_M: npt.NDArray[np.int64], topk_ids: npt.NDArray[np.int32], k: int
) -> npt.NDArray[np.bool_]:
    """hits_M: whether the best filling's ids are the gold's, for M ≥ 1 masked chunks with k fillings each."""
    count_C = document.token_count_C
    count_M = count_C[chunk_M]
    start_M = np.cumsum(count_M) - count_M
    best_N = topk_ids[ranges(k * start_M, count_M)]
    gold_N = document.token_ids_N[ranges((np.cumsum(count_C) - count_C)[chunk_M], count_M)]
    return np.logical_and.reduceat(best_N == gold_N, start_M)
