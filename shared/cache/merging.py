"""`tidecache cache merge`: caches of one spec, captured in parts, become one.

The parts must be of one corpus: `--part i/n` of a capture keeps the positions of the documents, so the result is the
cache that one capture would have written, to the content digest. Shards are copied byte for byte. What is there twice and
equal is there once; whatever disagrees (the spec, two values for one draw, two documents at one position, a document
at two positions or both held out and not) is refused before anything is written. Caches of different corpora stay
apart: training mixes them as they are.

If the output is a cache already, it counts as one of the caches, and grows; so a merge that was killed goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shared.cache.copying import copy_shard, document_keys, finishing, refuse_nested
from shared.cache.manifest import HELD_OUT_FOLDER, MANIFEST_FILE, Manifest, Receipt
from shared.cache.parquet import read_narrow
from shared.cache.reader import Cache
from shared.cache.records import ShardRange
from shared.cache.writer import CacheWriter
from shared.errors import TidecacheError
from shared.spec import differences


@dataclass(frozen=True)
class Merged:
    """What was written: manifests of the merged cache and its held-out part; shards that were there more than once."""

    manifest: Manifest
    held_out: Manifest | None
    repeated: int


def merge_caches(paths: Sequence[str | Path], out: Path) -> Merged:
    """Merge caches into the folder `out`; goes on where a killed run stopped.

    Raises:
        TidecacheError: the caches do not belong together, damage, or a full disk; nothing is written unless all fits.
    """
    caches = [Cache.open(path) for path in paths]
    for cache in caches:
        refuse_nested(cache.path, out)
    known = [*caches, *([Cache.open(out)] if (out / MANIFEST_FILE).exists() else [])]
    refuse_other_specs(known)
    inner = [held for cache in known if (held := cache.held_out()) is not None]
    refuse_other_specs([known[0], *inner])
    plan, held_plan = _Plan.of(known), _Plan.of(inner)
    _refuse_other_documents(known, inner)
    manifest = plan.write(out, caches[0])
    held_out = held_plan.write(out / HELD_OUT_FOLDER, caches[0]) if inner else None
    return Merged(manifest, held_out, plan.repeated + held_plan.repeated)


def refuse_other_specs(caches: Sequence[Cache]) -> None:
    """All caches must have one spec.

    Raises:
        TidecacheError: two differ; every field is named with both values.
    """
    for cache in caches[1:]:
        if changed := differences(caches[0].spec, cache.spec):
            fields = "; ".join(f"{name}: {ours!r} and {theirs!r}" for name, ours, theirs in changed)
            raise TidecacheError(
                f"{caches[0].path} and {cache.path} have different specs ({fields}): only caches of one spec can be merged; "
                f"train from both with --cache twice, or slice one of them to what they share"
            )


@dataclass(frozen=True)
class _Plan:
    """Which shard comes from where; `repeated`: those found again."""

    sources: dict[ShardRange, tuple[Cache, int]]
    repeated: int

    @classmethod
    def of(cls, caches: Sequence[Cache]) -> _Plan:
        """Each shard once, from the first cache that has it.

        Raises:
            TidecacheError: two caches say different things of a shard, or shards overlap without being equal.
        """
        sources: dict[ShardRange, tuple[Cache, int]] = {}
        repeated = 0
        for cache in caches:
            for index, receipt in enumerate(cache.shards):
                if receipt.range not in sources:
                    sources[receipt.range] = (cache, index)
                    continue
                first, at = sources[receipt.range]
                _refuse_other_content(first, first.shards[at], cache, receipt)
                repeated += 1
        _refuse_overlaps(sources)
        return cls(sources, repeated)

    def write(self, out: Path, first: Cache) -> Manifest:
        """Copy what `out` lacks."""
        writer = CacheWriter.open(out, first.spec, first.vocabulary())
        done = {r.range for r in writer.completed}
        with finishing(writer):
            for shard in sorted(self.sources):
                if shard not in done:
                    cache, index = self.sources[shard]
                    copy_shard(writer, cache, index)
        return writer.finish()


def _refuse_other_content(first: Cache, ours: Receipt, cache: Cache, theirs: Receipt) -> None:
    """Two shards of one range must be one."""
    where = f"{first.path / ours.path} and {cache.path / theirs.path}"
    if ours.corpus != theirs.corpus:
        raise TidecacheError(f"{where} were captured from different corpora{_APART}")
    if (ours.content, ours.counts) != (theirs.content, theirs.counts):
        raise TidecacheError(
            f"{where} hold different values for the same draws: one was captured by another version or machine, or is "
            f"damaged (`tidecache cache diff` and `verify` tell); leave one of the two caches out, or remove one of "
            f"these receipts and run its capture again"
        )


_APART = (
    ": their documents have the same positions, so the two cannot be one cache; train from both as they are, with --cache "
    "twice"
)


def _refuse_overlaps(sources: dict[ShardRange, tuple[Cache, int]]) -> None:
    """Shards in order reach only into a few of those after them."""
    active: list[ShardRange] = []
    for shard in sorted(sources):
        active = [a for a in active if a.document_stop > shard.first_document]
        for other in active:
            if other.overlaps(shard):
                a, b = (cache.path / cache.shards[i].path for cache, i in (sources[other], sources[shard]))
                raise TidecacheError(
                    f"{a} and {b} hold some of the same draws, but not all: the caches were captured with different "
                    f"--documents-per-shard or --draws; slice one of them so that they share whole shards or none"
                )
        active.append(shard)


def _refuse_other_documents(caches: Sequence[Cache], held_out: Sequence[Cache]) -> None:
    """One document at one position, and nowhere else: 24 bytes for each document are in memory.

    Raises:
        TidecacheError: something else; both caches are named.
    """
    train, held = _documents_by_position(caches), _documents_by_position(held_out)
    both = np.intersect1d(train["key"], held["key"])
    if len(both):
        raise TidecacheError(
            f"document {both[0].tobytes().hex()} is held out in one of the caches and not in another: they were captured "
            f"from different corpora, and what is learnt from one would be tested on the other"
        )


_ROW = np.dtype([("position", np.int64), ("key", "V16"), ("cache", np.int32)])


def _documents_by_position(caches: Sequence[Cache]) -> npt.NDArray[np.void]:
    """Each document once."""
    parts = [np.zeros(0, _ROW)]
    for number, cache in enumerate(caches):
        parts += list(_documents_of(cache, number))
    rows = np.concatenate(parts)
    rows = rows[np.argsort(rows["position"], kind="stable")]
    same = rows["position"][1:] == rows["position"][:-1]
    other = np.flatnonzero(same & (rows["key"][1:] != rows["key"][:-1]))
    if len(other):
        a, b = rows[other[0]], rows[other[0] + 1]
        raise TidecacheError(
            f"{caches[a['cache']].path} and {caches[b['cache']].path} hold different documents at position "
            f"{a['position']}: they were captured from different corpora{_APART}"
        )
    rows = np.delete(rows, np.flatnonzero(same) + 1)
    order = np.argsort(rows["key"], kind="stable")
    twice = np.flatnonzero(rows["key"][order][1:] == rows["key"][order][:-1])
    if len(twice):
        a, b = rows[order[twice[0]]], rows[order[twice[0] + 1]]
        raise TidecacheError(
            f"{caches[a['cache']].path} and {caches[b['cache']].path} hold one document at two positions ({a['position']} "
            f"and {b['position']}): they were captured from different corpora, or from another order of one; train from "
            f"both as they are, with --cache twice"
        )
    return rows


def _documents_of(cache: Cache, number: int) -> Iterator[npt.NDArray[np.void]]:
    """The documents of each documents file."""
    for record in {r.documents.path: r.documents for r in cache.shards}.values():
        table = read_narrow(cache.path, record, ["position", "document"])
        rows = np.zeros(table.num_rows, _ROW)
        rows["key"] = document_keys(table["document"], cache.path / record.path)
        rows["position"], rows["cache"] = table["position"].to_numpy(), number
        yield rows
