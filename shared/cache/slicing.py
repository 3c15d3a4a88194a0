"""`tidecache cache slice`: a smaller cache out of another one: fewer draws, documents, contexts, candidates or lanes.

What comes out is the cache that a capture with the smaller spec and extent would have written, as far as stored values
can tell: the rows, and so the content digest, are the same (DESIGN §5: the k best fillings of a chunk begin with its k′ < k
best; draws, contexts and documents do not depend on each other), up to likelihoods that another composition of teacher
batches changes in their last bits, and ties among candidates.

Not the same are the statistics in the footers of shards that are cut: they are computed from stored values, not from
exact ones, and the cost of rounding (`kl_BT`) is the source shard's mean, an upper bound for a smaller k in codec raw.
Shards that stay whole keep theirs. The grid of codec packed depends on k: a smaller k keeps stored likelihoods as they
are, to the bit, and those of a capture with that k lie elsewhere on their grid. Tail samples lie beyond the k best, so with a
smaller k they are no longer samples of the tail, and go.

A slice can be extended like any cache, by a capture with its spec or `tidecache teacher extend`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shared.cache import format
from shared.cache.copying import Source, copy_shard, finishing, read_source, record_of, refuse_nested, write_cut
from shared.cache.manifest import HELD_OUT_FOLDER, Manifest, Receipt
from shared.cache.parquet import read_narrow
from shared.cache.reader import Cache
from shared.cache.records import ContextScores, Draw, DrawRecord, ShardRange, StoredDocument
from shared.cache.statistics import ContextStatistics, shard_statistics
from shared.cache.writer import CacheWriter
from shared.documents import corpus_digest
from shared.errors import TidecacheError
from shared.ragged import ranges
from shared.spec import CaptureSpec


@dataclass(frozen=True)
class Cut:
    """What to keep; None: all. `documents`: the first ones of the corpus (held-out documents all stay); `draws`: the
    first ones of each document; `drop_topk`: without the topk lane.
    """

    documents: int | None = None
    draws: int | None = None
    contexts: tuple[str, ...] | None = None
    k: int | None = None
    drop_topk: bool = False

    def spec(self, spec: CaptureSpec) -> CaptureSpec:
        """The spec of what is left.

        Raises:
            TidecacheError: more is asked for than there is.
        """
        contexts = spec.contexts if self.contexts is None else self.contexts
        if unknown := [x for x in contexts if x not in spec.contexts]:
            raise TidecacheError(
                f"--context {unknown[0]}: the cache holds the contexts {', '.join(spec.contexts)}: take some of these"
            )
        changed = dataclasses.replace(spec, contexts=tuple(x for x in spec.contexts if x in contexts))
        topk = "topk" in spec.lanes
        if (self.k is not None or self.drop_topk) and not topk:
            raise TidecacheError("the cache has no topk lane: leave --k and --drop-lane out")
        if self.drop_topk:
            return dataclasses.replace(changed, lanes=("gold",), tail_samples=0)
        if self.k is not None and self.k > spec.k:
            raise TidecacheError(
                f"--k {self.k}: the cache holds {spec.k} candidates; give fewer, or extend it with `tidecache teacher extend`"
            )
        if self.k is not None and self.k < spec.k:
            return dataclasses.replace(changed, k=self.k, tail_samples=0)
        return changed


@dataclass(frozen=True)
class Sliced:
    """What was written: manifests of the slice and its held-out part; the source's size in bytes."""

    manifest: Manifest
    held_out: Manifest | None
    source_bytes: int
    lost_tail_samples: bool


def slice_cache(path: str | Path, out: Path, cut: Cut) -> Sliced:
    """Write what `cut` keeps of a cache into the folder `out`; goes on where a killed run stopped.

    Raises:
        TidecacheError: more is asked for than there is, `out` holds something else or is part of the source, damage, or a
            full disk.
    """
    cache = Cache.open(path)
    refuse_nested(cache.path, out)
    held_out = cache.held_out()
    _refuse_too_much(cache, cut)
    spec = cut.spec(cache.spec)
    manifest = _slice_one(cache, out, spec, cut)
    inner = None
    if held_out is not None:
        inner = _slice_one(held_out, out / HELD_OUT_FOLDER, spec, dataclasses.replace(cut, documents=None))
    size = sum(c.manifest.totals.size_bytes for c in (cache, held_out) if c is not None)
    return Sliced(manifest, inner, size, bool(cache.spec.tail_samples) and not spec.tail_samples)


def _refuse_too_much(cache: Cache, cut: Cut) -> None:
    draws = max((r.range.draw_stop for r in cache.shards), default=0)
    held = {"draws": (cut.draws, draws), "documents": (cut.documents, cache.manifest.totals.documents)}
    for name, (wanted, there) in held.items():
        if wanted is not None and wanted > there:
            raise TidecacheError(f"--{name} {wanted}: the cache holds {there}: give at most that")


def _slice_one(cache: Cache, out: Path, spec: CaptureSpec, cut: Cut) -> Manifest:
    """One cache without its held-out part."""
    stop = _position_stop(cache, cut.documents)
    planned = {}
    for index, receipt in enumerate(cache.shards):
        shard = _cut_range(receipt.range, stop, cut.draws)
        if shard is not None:
            planned[shard] = index
    writer = CacheWriter.open(out, spec, cache.vocabulary())
    for receipt in writer.completed:
        if receipt.range not in planned:
            raise TidecacheError(
                f"{out / receipt.path}: a shard that is not part of this slice: give an empty --out, or the one that this "
                f"same slice was written to"
            )
    done = {r.range for r in writer.completed}
    with finishing(writer):
        for shard, index in planned.items():
            if shard in done:
                continue
            if spec == cache.spec and shard == cache.shards[index].range:
                copy_shard(writer, cache, index)
            else:
                _write_cut(writer, cache, index, shard)
    return writer.finish()


def _cut_range(shard: ShardRange, position_stop: int | None, draws: int | None) -> ShardRange | None:
    """What is left of a shard's range; None if nothing is."""
    document_stop = shard.document_stop if position_stop is None else min(shard.document_stop, position_stop)
    draw_stop = shard.draw_stop if draws is None else min(shard.draw_stop, draws)
    if document_stop <= shard.first_document or draw_stop <= shard.first_draw:
        return None
    return ShardRange(shard.first_document, document_stop, shard.first_draw, draw_stop)


def _position_stop(cache: Cache, documents: int | None) -> int | None:
    """The position after the one of the last document that stays; None: all stay."""
    if documents is None or documents == cache.manifest.totals.documents:
        return None
    positions = np.zeros(0, np.int64)
    seen = set()
    for receipt in cache.shards:
        if len(positions) >= documents and receipt.range.first_document > positions[documents - 1]:
            break
        if receipt.documents.path not in seen:
            seen.add(receipt.documents.path)
            found = read_narrow(cache.path, receipt.documents, ["position"])["position"].to_numpy()
            positions = np.union1d(positions, found)
    return int(positions[documents - 1]) + 1


def _write_cut(writer: CacheWriter, cache: Cache, index: int, shard: ShardRange) -> None:
    """What `shard` and the writer's spec keep of one shard."""
    receipt, source = cache.shards[index], read_source(cache, index)
    documents = [d for d in source.documents if d.position < shard.document_stop]
    dropped = [(p, d) for p, d in source.dropped if p < shard.document_stop]
    draws = [d for d in source.draws if d.stored.position < shard.document_stop and d.draw < shard.draw_stop]
    records = [_cut_record(writer.spec, d) for d in draws]
    corpus = receipt.corpus
    if shard.document_stop != receipt.range.document_stop:
        keys = {d.position: d.key for d in documents} | {p: d.key for p, d in dropped}
        corpus = corpus_digest(keys[p] for p in sorted(keys))
    rows = [(d.stored, r) for d, r in zip(draws, records, strict=True)]
    statistics = _statistics(cache, receipt, source, writer.spec, rows, whole=shard == receipt.range)
    write_cut(writer, cache, receipt, shard, Source(documents, dropped, draws, statistics), records, corpus)


def _cut_record(spec: CaptureSpec, draw: Draw) -> DrawRecord:
    """The draw with the contexts, lanes and candidates of `spec`."""
    scores = {x: _cut_scores(spec, draw, draw.scores[x]) for x in spec.contexts}
    return dataclasses.replace(record_of(draw), contexts=scores)


def _cut_scores(spec: CaptureSpec, draw: Draw, scores: ContextScores) -> ContextScores:
    if "topk" not in spec.lanes or scores.topk_ids is None or scores.topk_logp_MK is None:
        return ContextScores(scores.gold_logp_N)
    k = scores.topk_logp_MK.shape[1]
    if spec.k == k:
        return scores
    count_M = draw.token_count_M
    start_M = np.cumsum(count_M) - count_M
    kept: npt.NDArray[np.int64] = ranges(k * start_M, spec.k * count_M)
    return ContextScores(
        gold_logp_N=scores.gold_logp_N,
        log_z_MT=scores.log_z_MT,
        topk_ids=scores.topk_ids[kept],
        topk_logp_MK=scores.topk_logp_MK[:, : spec.k],
    )


def _statistics(
    cache: Cache,
    receipt: Receipt,
    source: Source,
    spec: CaptureSpec,
    rows: Sequence[tuple[StoredDocument, DrawRecord]],
    whole: bool,
) -> dict[str, ContextStatistics]:
    """Of the cut shard: what the footers say of all its rows where it still holds, the rest from stored values."""
    stored = [{x: format.stored_scores(spec, r.contexts[x]) for x in spec.contexts} for _, r in rows]
    found = shard_statistics(spec, rows, stored)
    for context, before in source.statistics.items():
        if context not in found:
            continue
        after = found[context]
        if whole and "topk" in spec.lanes and spec.k == cache.spec.k:
            found[context] = before
            continue
        if whole:
            names = ("chunks_B", "tokens_B", "gold_logp_B")
            after = dataclasses.replace(after, **{name: getattr(before, name) for name in names})
        if "topk" in spec.lanes:
            share_B = after.chunks_B / np.maximum(before.chunks_B, 1)
            after = dataclasses.replace(after, kl_BT=before.kl_BT * share_B[:, None])
        found[context] = after
    return found
