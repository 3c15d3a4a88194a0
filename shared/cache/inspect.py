"""`tidecache cache inspect`: what a cache holds, gathered; `shared.cache.inspect_text` and `shared.cache.page` show it.

From the manifest and the footers of all files: bytes by lane and per scored teacher token, and by timestep the teacher's
likelihood of the gold, tail mass, calibration, and what rounding cost. From the rows of a sample (`shared.cache.survey`):
chunk lengths, coverage, entropy, how often the gold is among the k, and compdemo against plain on the same chunks.

Shapes: B timestep bins, E confidence bins, T temperatures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.cache.files import DamagedError
from shared.cache.manifest import FileRecord, Manifest
from shared.cache.parquet import REMEDY, column_bytes, footer_of, read_metadata
from shared.cache.reader import Cache
from shared.cache.remote import Folder
from shared.cache.statistics import CONFIDENCE_BINS, TIMESTEP_BINS, ContextStatistics
from shared.cache.survey import Survey, length_at, per_chunk, survey_cache
from shared.errors import shown

SAMPLE = 16  # document ranges whose rows are read

ALL_TIMESTEPS = slice(None)
SUPERSEDED = "superseded"  # columns that a later file replaces; nobody reads them

LANE_OF_COLUMN = {
    "gold_logp": "gold",
    "topk_packed": "topk",
    "topk_ids": "topk",
    "topk_logp": "topk",
    "log_z": "topk",
    "tail_ids": "topk",
    "tail_logp": "topk",
}


@dataclass(frozen=True)
class Inspection:
    """The figures of one cache. `lane_bytes`: compressed bytes by lane, in the order of the table; their sum is that of
    all data files. `survey` is None where no row was to be read.
    """

    path: Folder
    manifest: Manifest
    lane_bytes: Mapping[str, int]
    statistics: Mapping[str, ContextStatistics]
    survey: Survey | None
    held_out: Manifest | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; log-likelihoods in nats, bytes as stored, lengths in bytes and teacher tokens."""
        return {
            "path": str(self.path),
            **{k: v for k, v in self.manifest.to_json().items() if k != "shards"},
            "shards": len(self.manifest.shards),
            "lane_bytes": dict(self.lane_bytes),
            "timesteps": {context: self.timesteps(context) for context in self.statistics},
            "calibration": {context: calibration(s) for context, s in self.statistics.items()},
            "sums": {context: s.to_json() for context, s in self.statistics.items()},
            "sample": None if self.survey is None else _sample(self.survey),
            "compdemo_against_plain": pairs(self.survey),
            "held_out": None if self.held_out is None else self.held_out.to_json()["totals"],
        }

    def timesteps(self, context: str) -> list[dict[str, Any]]:
        """One entry per timestep bin with draws; means per chunk or token, None where the lane is missing."""
        entries = list(_bins(self.statistics[context], self.manifest))
        topk = "topk" in self.manifest.spec.lanes and self.survey is not None
        found = list(per_chunk(self.survey.contexts[context])) if self.survey and topk else [None] * TIMESTEP_BINS
        for entry in entries:
            sampled = found[round(entry["from"] * TIMESTEP_BINS)]
            entry["entropy_per_chunk"] = None if sampled is None else list(sampled[:2])
            entry["gold_among_k"] = None if sampled is None else sampled[2]
        return entries


def inspect_cache(path: str | Path, sample: int = SAMPLE) -> Inspection:
    """Gather the figures of a cache: all footers, and the rows of at most `sample` document ranges (0: no row).

    Raises:
        TidecacheError: no cache there, or a file is missing or damaged.
    """
    cache = Cache.open(path)
    sizes = _Sizes()
    statistics = {x: ContextStatistics.zero(len(cache.spec.temperatures)) for x in cache.spec.contexts}
    sizes.add_file("vocabulary", cache.manifest.vocabulary)
    for record in {r.documents.path: r.documents for r in cache.shards}.values():
        sizes.add_file("documents", record)
    for receipt in cache.shards:
        try:
            own: dict[str, Any] = {}  # a further file has a context's figures with what it adds to them
            for record in receipt.likelihoods:
                metadata = read_metadata(cache.path, record)
                sizes.add_columns(record, metadata)
                own |= footer_of(metadata.metadata).get("statistics", {})
            for context in statistics:
                statistics[context] = statistics[context] + ContextStatistics.from_json(own[context])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            where = cache.path / receipt.likelihoods[-1].path
            raise DamagedError(
                where, f"its footer has no statistics that fit the spec ({shown(str(error))})", REMEDY
            ) from error
    inner = cache.held_out()
    held_out = None if inner is None else inner.manifest
    return Inspection(cache.path, cache.manifest, sizes.by_lane, statistics, survey_cache(cache, sample), held_out)


class _Sizes:
    """Compressed bytes by lane; what is in no lane comes last."""

    def __init__(self) -> None:
        self._lanes: dict[str, int] = {}
        self._footers = 0

    @property
    def by_lane(self) -> dict[str, int]:
        return {**self._lanes, "footers": self._footers} if self._footers else self._lanes

    def add_file(self, lane: str, record: FileRecord) -> None:
        self._lanes[lane] = self._lanes.get(lane, 0) + record.size_bytes

    def add_columns(self, record: FileRecord, metadata: Any) -> None:
        """A likelihoods file by column; what is no column (footer, page index) comes under its own name."""
        sizes = column_bytes(metadata)
        for name, size in sizes.items():
            lane = lane_of(name) if name in record.columns else SUPERSEDED
            self._lanes[lane] = self._lanes.get(lane, 0) + size
        self._footers += record.size_bytes - sum(sizes.values())


def lane_of(column: str) -> str:
    """The lane that a column of the likelihoods files is counted in."""
    context, _, name = column.partition("_")
    if name not in LANE_OF_COLUMN:
        return "timestep, masked, split"
    return f"{context} {LANE_OF_COLUMN[name]}"


def _bins(statistics: ContextStatistics, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """What the footers say, one entry per timestep bin with draws."""
    topk = "topk" in manifest.spec.lanes
    calibration_error_B = statistics.calibration_error_B
    for b in range(TIMESTEP_BINS):
        chunks, tokens = statistics.chunks_B[b], statistics.tokens_B[b]
        draws = manifest.totals.timesteps[b] if manifest.totals.timesteps else 0
        if not draws:
            continue
        best = bool(topk and chunks)
        yield {
            "from": b / TIMESTEP_BINS,
            "to": (b + 1) / TIMESTEP_BINS,
            "draws": draws,
            "chunks": int(chunks),
            "gold_logp_per_token": float(statistics.gold_logp_B[b] / tokens) if tokens else None,
            "gold_logp_per_chunk": float(statistics.gold_logp_B[b] / chunks) if chunks else None,
            "tail_mass": _mean(statistics.tail_mass_BT[b], chunks) if best else None,
            "stored_kl": _mean(statistics.kl_BT[b], chunks) if best else None,
            "best_is_gold": float(statistics.hits_BE[b].sum() / chunks) if best else None,
            "calibration_error": float(calibration_error_B[b]) if best else None,
        }


def _mean(sum_T: npt.NDArray[np.float64], chunks: float) -> list[float]:
    return [float(x / chunks) for x in sum_T]


def calibration(statistics: ContextStatistics, timesteps: slice = ALL_TIMESTEPS) -> list[dict[str, Any]]:
    """The reliability curve over some timestep bins: one entry per bin of the best filling's probability with chunks."""
    entries = []
    for e in range(CONFIDENCE_BINS):
        chunks, confidence, hits = (
            float(a[timesteps].sum(0)[e])
            for a in (statistics.confident_BE, statistics.confidence_BE, statistics.hits_BE)
        )
        if chunks:
            entries.append(
                {
                    "from": e / CONFIDENCE_BINS,
                    "to": (e + 1) / CONFIDENCE_BINS,
                    "chunks": int(chunks),
                    "confidence": confidence / chunks,
                    "best_is_gold": hits / chunks,
                }
            )
    return entries


def pairs(survey: Survey | None) -> list[dict[str, Any]] | None:
    """compdemo minus plain on the same chunks, an entry per timestep bin with chunks and one for all of them (from 0
    to 1, last); None where the cache holds one context. The error is a standard error of the mean per chunk.
    """
    if survey is None or survey.pair is None:
        return None
    width = 1 / TIMESTEP_BINS
    rows = [(survey.pair, b, b * width, (b + 1) * width) for b in range(TIMESTEP_BINS)]
    return [
        {
            "from": round(low, 6),
            "to": round(high, 6),
            "chunks": int(pair.chunks_B[b]),
            "gain_per_chunk": float(pair.mean_B[b]),
            "gain_per_token": float(pair.gain_B[b] / pair.tokens_B[b]),
            "error_per_chunk": float(pair.error_B[b]),
            "better": float(pair.better_B[b] / pair.chunks_B[b]),
        }
        for pair, b, low, high in [*rows, (survey.pair.over_all, 0, 0.0, 1.0)]
        if pair.chunks_B[b]
    ]


def _sample(survey: Survey) -> dict[str, Any]:
    """The survey's figures that have no timestep. A length's last entry stands for all longer ones too."""
    chunks = int(survey.byte_lengths.sum())
    return {
        "document_ranges": survey.ranges_read,
        "of_document_ranges": survey.ranges_total,
        "documents": survey.documents,
        "draws": survey.draws,
        "chunks": chunks,
        "coverage": survey.chunk_bytes / survey.trainable_bytes if survey.trainable_bytes else None,
        "bytes_per_chunk": survey.chunk_bytes / chunks if chunks else None,
        "median_bytes": length_at(survey.byte_lengths, 0.5) if chunks else None,
        "chunks_by_bytes": survey.byte_lengths.tolist(),
        "chunks_by_teacher_tokens": survey.token_lengths.tolist(),
    }
