"""`tidecache cache diff`: do two caches say the same, and if not, what differs by how much?

Equal specs and equal content digests are the same cache, and no row is read. Otherwise the draws that both have (by
document and number, wherever they lie) are compared value by value: timestep, masks, split, the gold log-likelihoods of
each context that both hold, and candidates where both have the topk lane of one teacher tokenizer. One shard of the
first cache and a few of the second are in memory, and about 30 bytes for each draw.

Shapes: B timestep bins, M masked chunks of a draw, K candidates, R draws of a cache.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from shared.cache import format
from shared.cache.copying import document_keys
from shared.cache.files import DamagedError
from shared.cache.manifest import HELD_OUT_FOLDER
from shared.cache.parquet import REMEDY, read_narrow
from shared.cache.reader import Cache
from shared.cache.records import ContextScores, Draw
from shared.cache.statistics import TIMESTEP_BINS, Array, timestep_bin
from shared.cache.tables import literal, number, plain_table
from shared.documents import IntArray
from shared.errors import printable
from shared.ragged import within
from shared.spec import differences

SHARDS_KEPT = 4  # of the second cache
EXAMPLES = 3  # names of documents that only one of the caches has
_ROW = np.dtype([("document", "V16"), ("draw", np.int32), ("shard", np.int32)])
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass
class Largest:
    """The largest difference found, in nats, and where."""

    value: float = 0.0
    document: str = ""
    draw: int = 0
    chunk: int = 0

    def take(self, difference_M: Array, draw: Draw) -> None:
        """Look at the differences of a draw's masked chunks."""
        if not len(difference_M):
            return
        at = int(np.argmax(difference_M))
        if difference_M[at] > self.value:
            self.value = float(difference_M[at])
            self.document, self.draw, self.chunk = draw.stored.name, draw.draw, int(draw.chunks[at])


def _zeros() -> Array:
    return np.zeros(TIMESTEP_BINS)


@dataclass
class ContextDifference:
    """Of one context, over the draws compared: sums by timestep bin. Log-likelihoods in nats."""

    chunks_B: Array = field(default_factory=_zeros)
    gold_B: Array = field(default_factory=_zeros)  # sum of |difference| of the chunks' gold log-likelihood
    largest_B: Array = field(default_factory=_zeros)
    largest: Largest = field(default_factory=Largest)
    lane: str = ""  # why candidates were not compared; empty: they were
    best: int = 0  # chunks with the same best candidate
    shared: int = 0  # candidates that both have, of `candidates`
    candidates: int = 0
    largest_candidate: Largest = field(default_factory=Largest)  # of those that both have
    largest_log_z: Largest = field(default_factory=Largest)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; differences of log-likelihoods in nats."""
        chunks = int(self.chunks_B.sum())
        topk = {
            "same_best": self.best / chunks if chunks else None,
            "shared_candidates": self.shared / self.candidates if self.candidates else None,
            "largest_difference": vars(self.largest_candidate),
            "largest_log_z_difference": vars(self.largest_log_z),
        }
        return {
            "chunks": chunks,
            "gold_mean_difference": float(self.gold_B.sum() / chunks) if chunks else None,
            "gold_largest_difference": vars(self.largest),
            "timesteps": [
                {
                    "from": b / TIMESTEP_BINS,
                    "to": (b + 1) / TIMESTEP_BINS,
                    "chunks": int(self.chunks_B[b]),
                    "gold_mean_difference": float(self.gold_B[b] / self.chunks_B[b]) if self.chunks_B[b] else None,
                    "gold_largest_difference": float(self.largest_B[b]),
                }
                for b in range(TIMESTEP_BINS)
            ],
            "topk": self.lane or topk,
        }


@dataclass
class Difference:
    """What differs between two caches; counts of documents and draws: in both, in the first alone, in the second alone."""

    paths: tuple[str, str]
    spec: list[tuple[str, Any, Any]]
    contents: tuple[str, str]
    documents: tuple[int, int, int]
    draws: tuple[int, int, int]
    alone: tuple[list[str], list[str]] = ([], [])  # names of a few documents that only the first, only the second has
    other_documents: int = 0  # in both, with other text, chunks or teacher tokens
    other_draws: int = 0  # in both, with another timestep, other masks or another split
    compared: int = 0
    contexts: dict[str, ContextDifference] = field(default_factory=dict)
    held_out: Difference | None = None
    held_out_alone: str = ""  # the one cache that has held-out documents

    @property
    def same(self) -> bool:
        """Whether both are the same cache, in content."""
        own = not self.spec and self.contents[0] == self.contents[1] and not self.held_out_alone
        return own and (self.held_out is None or self.held_out.same)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        names = ("both", "first", "second")
        return {
            "caches": self.paths,
            "same": self.same,
            "spec": [{"field": name, "first": ours, "second": theirs} for name, ours, theirs in self.spec],
            "content": self.contents,
            "documents": dict(zip(names, self.documents, strict=True)),
            "draws": dict(zip(names, self.draws, strict=True)),
            "documents_only_in_first": self.alone[0],
            "documents_only_in_second": self.alone[1],
            "documents_that_differ": self.other_documents,
            "draws_that_differ": self.other_draws,
            "draws_compared": self.compared,
            "contexts": {context: found.to_json() for context, found in self.contexts.items()},
            "held_out": self.held_out.to_json() if self.held_out else None,
            "held_out_only_in": self.held_out_alone or None,
        }


def diff_caches(a: str | Path, b: str | Path) -> Difference:
    """Compare two caches, held-out parts included.

    Raises:
        TidecacheError: no cache there, or damage.
    """
    ours, theirs = Cache.open(a), Cache.open(b)
    found = _diff(ours, theirs)
    inner = [ours.held_out(), theirs.held_out()]
    if inner[0] is not None and inner[1] is not None:
        found.held_out = _diff(inner[0], inner[1])
    elif inner[0] is not None or inner[1] is not None:
        found.held_out_alone = str((ours if inner[0] is not None else theirs).path)
    return found


def _diff(ours: Cache, theirs: Cache) -> Difference:
    totals = [cache.manifest.totals for cache in (ours, theirs)]
    found = Difference(
        paths=(str(ours.path), str(theirs.path)),
        spec=differences(ours.spec, theirs.spec),
        contents=(ours.manifest.content, theirs.manifest.content),
        documents=(totals[0].documents, 0, 0),
        draws=(totals[0].draws, 0, 0),
    )
    if not found.spec and found.contents[0] == found.contents[1]:
        return found
    rows = [_rows(cache) for cache in (ours, theirs)]
    first, second = (np.unique(r["document"]) for r in rows)
    both = len(np.intersect1d(first, second, assume_unique=True))
    found.documents = (both, len(first) - both, len(second) - both)
    found.alone = (
        _names(ours, rows[0], np.setdiff1d(first, second, assume_unique=True)),
        _names(theirs, rows[1], np.setdiff1d(second, first, assume_unique=True)),
    )
    shards = _common_draws(*rows)
    common = sum(len(numbers) for numbers in shards.values())
    found.draws = (common, len(rows[0]) - common, len(rows[1]) - common)
    found.contexts = {x: ContextDifference() for x in ours.spec.contexts if x in theirs.spec.contexts}
    _Comparison(ours, theirs, found).run(shards)
    return found


def _rows(cache: Cache) -> npt.NDArray[np.void]:
    """(document, draw, shard) of all draws, sorted."""
    parts = [np.zeros(0, _ROW)]
    for index, receipt in enumerate(cache.shards):
        record = receipt.likelihoods[0]
        table = read_narrow(cache.path, record, ["document", "draw"])
        rows = np.zeros(table.num_rows, _ROW)
        rows["document"] = document_keys(table["document"], cache.path / record.path)
        rows["draw"], rows["shard"] = table["draw"].to_numpy(), index
        parts.append(rows)
    return np.sort(np.concatenate(parts), order=("document", "draw"))


def _names(cache: Cache, rows: npt.NDArray[np.void], keys: npt.NDArray[np.void]) -> list[str]:
    """The names of the first few of these documents in the order of the cache."""
    chosen = rows[np.isin(rows["document"], keys)]
    found: dict[str, None] = {}
    for index in np.unique(chosen["shard"])[:EXAMPLES].tolist():
        wanted = {key.tobytes().hex() for key in np.unique(chosen["document"][chosen["shard"] == index])}
        found |= {d.name: None for d in cache.read_documents(index) if d.key in wanted}
        if len(found) >= EXAMPLES:
            break
    return list(found)[:EXAMPLES]


def _common_draws(
    ours: npt.NDArray[np.void], theirs: npt.NDArray[np.void]
) -> dict[tuple[int, int], set[tuple[bytes, int]]]:
    """(shard of ours, shard of theirs) → the (document, draw) that both have, in order of the shards."""
    key = ["document", "draw"]
    _, at, other = np.intersect1d(_joined(ours[key]), _joined(theirs[key]), assume_unique=True, return_indices=True)
    found: dict[tuple[int, int], set[tuple[bytes, int]]] = {}
    for i, j in zip(at.tolist(), other.tolist(), strict=True):
        pair = (int(ours["shard"][i]), int(theirs["shard"][j]))
        found.setdefault(pair, set()).add((ours["document"][i].tobytes(), int(ours["draw"][i])))
    return dict(sorted(found.items()))


def _joined(rows: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """Document and draw as one string of bytes each."""
    packed = np.zeros(len(rows), np.dtype([("document", "V16"), ("draw", ">i4")]))
    packed["document"], packed["draw"] = rows["document"], rows["draw"]
    return packed.view("V20")


class _Comparison:
    """Goes through the draws that two caches share."""

    def __init__(self, ours: Cache, theirs: Cache, found: Difference) -> None:
        self._ours = ours
        self._theirs = theirs
        self._found = found
        self._kept: OrderedDict[int, dict[tuple[bytes, int], Draw]] = OrderedDict()
        self._seen: set[str] = set()
        for context in found.contexts.values():
            context.lane = _why_not(ours, theirs)

    def run(self, shards: dict[tuple[int, int], set[tuple[bytes, int]]]) -> None:
        """Compare; shards of the first cache come in order, each read once."""
        current, draws = -1, {}
        for (first, second), keys in shards.items():
            if first != current:
                current, draws = first, _by_key(self._ours, first)
            others = self._shard(second)
            for key in sorted(keys):
                if key not in draws or key not in others:  # the whole file says otherwise than its narrow columns
                    cache, index = (self._ours, first) if key not in draws else (self._theirs, second)
                    where = cache.path / cache.shards[index].likelihoods[0].path
                    raise DamagedError(where, "its columns do not fit each other", REMEDY)
                self._compare(draws[key], others[key])

    def _shard(self, index: int) -> dict[tuple[bytes, int], Draw]:
        if index not in self._kept:
            self._kept[index] = _by_key(self._theirs, index)
        self._kept.move_to_end(index)
        while len(self._kept) > SHARDS_KEPT:
            self._kept.popitem(last=False)
        return self._kept[index]

    def _compare(self, ours: Draw, theirs: Draw) -> None:
        same_document = format.document_digest(ours.stored) == format.document_digest(theirs.stored)
        if not same_document and ours.document not in self._seen:
            self._seen.add(ours.document)
            self._found.other_documents += 1
        chunks = [(d.stored.chunks.message_C, d.stored.chunks.start_C, d.stored.chunks.stop_C) for d in (ours, theirs)]
        comparable = all(np.array_equal(x, y) for x, y in zip(*chunks, strict=True))
        comparable = comparable and np.array_equal(ours.chunks, theirs.chunks)
        if not comparable or ours.timestep != theirs.timestep or not np.array_equal(ours.split, theirs.split):
            self._found.other_draws += 1
        if not comparable:
            return
        self._found.compared += 1
        for context, found in self._found.contexts.items():
            _compare_context(found, ours, theirs, context)


def _why_not(ours: Cache, theirs: Cache) -> str:
    """Why candidates cannot be compared; empty if they can."""
    if not all("topk" in cache.spec.lanes for cache in (ours, theirs)):
        return "not compared: the topk lane is not in both"
    if ours.spec.teacher.tokenizer != theirs.spec.teacher.tokenizer:
        return "not compared: the teachers have different tokenizers"
    return ""


def _by_key(cache: Cache, index: int) -> dict[tuple[bytes, int], Draw]:
    return {(bytes.fromhex(d.document), d.draw): d for d in cache.read_shard(index).draws}


def _compare_context(found: ContextDifference, ours: Draw, theirs: Draw, context: str) -> None:
    a, b = (d.gold_logp_of(context).astype(np.float64) for d in (ours, theirs))
    gold_M = np.abs(a - b)
    bin_ = timestep_bin(ours.timestep)
    found.chunks_B[bin_] += len(gold_M)
    found.gold_B[bin_] += gold_M.sum()
    found.largest_B[bin_] = max(found.largest_B[bin_], gold_M.max(initial=0.0))
    found.largest.take(gold_M, ours)
    same_tokens = np.array_equal(ours.token_count_M, theirs.token_count_M)
    if found.lane or not len(gold_M) or not same_tokens:
        return
    fillings = [_fillings(d, d.scores[context]) for d in (ours, theirs)]
    k = min(f.shape[1] for f in fillings)
    equal_MKK = fillings[0][:, :k, None] == fillings[1][:, None, :k]
    found.best += int(equal_MKK[:, 0, 0].sum())
    found.candidates += equal_MKK.shape[0] * k
    found.shared += int(equal_MKK.any(2).sum())
    logp = [d.scores[context].topk_logp_MK for d in (ours, theirs)]
    assert logp[0] is not None
    assert logp[1] is not None
    apart_MKK = np.abs(logp[0][:, :k, None].astype(np.float64) - logp[1][:, None, :k])
    found.largest_candidate.take(np.where(equal_MKK, apart_MKK, 0.0).max((1, 2)), ours)
    heats = [d.scores[context].log_z_MT for d in (ours, theirs)]
    if heats[0] is not None and heats[1] is not None and heats[0].shape == heats[1].shape:
        found.largest_log_z.take(np.abs(heats[0].astype(np.float64) - heats[1]).max(1, initial=0.0), ours)


def _fillings(draw: Draw, scores: ContextScores) -> npt.NDArray[np.uint64]:
    """A number for each filling (M, K): equal for equal ids, and of one token always different for different ids."""
    assert scores.topk_ids is not None
    assert scores.topk_logp_MK is not None
    k = scores.topk_logp_MK.shape[1]
    count_F: IntArray = np.repeat(draw.token_count_M, k)
    with np.errstate(over="ignore"):
        power = np.cumprod(np.full(int(count_F.max(initial=1)), _MIX, np.uint64))
        mixed = (scores.topk_ids.astype(np.uint64) + np.uint64(1)) * power[within(count_F)]
        sums = np.add.reduceat(mixed, np.cumsum(count_F) - count_F)
    return np.asarray(sums.reshape(-1, k))


# --- for people --------------------------------------------------------------------------------------------------


def render(found: Difference, console: Console) -> None:
    """Print what differs; one line where nothing does."""
    names = [printable(path) for path in found.paths]
    if found.same:
        held = "" if found.held_out is None else f", and {found.held_out.documents[0]:,} held out"
        documents, draws = found.documents[0], found.draws[0]
        console.print(f"the same: {documents:,} documents, {draws:,} draws{held}; content {found.contents[0][:16]}…")
        return
    console.print(f"first:  {names[0]}\nsecond: {names[1]}", markup=False)
    _render_one(found, console)
    if found.held_out is not None:
        console.print(f"\nIn {HELD_OUT_FOLDER}:" + (" the same" if found.held_out.same else ""))
        if not found.held_out.same:
            _render_one(dataclasses.replace(found.held_out, spec=[]), console)  # a cache has one spec
    if found.held_out_alone:
        console.print(f"\nheld-out documents: only in {printable(found.held_out_alone)}", markup=False)


def _render_one(found: Difference, console: Console) -> None:
    if found.spec:
        table = plain_table("Spec", ["field", "first", "second"])
        for name, ours, theirs in found.spec:
            table.add_row(name, *(literal(v) for v in (ours, theirs)))
        console.print(table)
    table = plain_table("Extent", ["", "in both", "only first", "only second", "differ"])
    for name, counts, other in (
        ("documents", found.documents, found.other_documents),
        ("draws", found.draws, found.other_draws),
    ):
        table.add_row(name, *(f"{n:,}" for n in counts), f"{other:,}")
    console.print(table)
    for which, few, count in zip(("first", "second"), found.alone, found.documents[1:], strict=True):
        if few:
            listed = ", ".join(map(printable, few)) + (", …" if count > len(few) else "")
            console.print(f"only in the {which}: {listed}", markup=False, soft_wrap=True)
    console.print(f"content: {'the same' if found.contents[0] == found.contents[1] else 'different'}")
    _render_gold(found, console)
    for context, c in found.contexts.items():
        if c.chunks_B.any():
            console.print(f"{context}: {_sentence(c)}", markup=False, soft_wrap=True)


def _render_gold(found: Difference, console: Console) -> None:
    """By timestep, if there is any difference."""
    if not any(c.largest.value for c in found.contexts.values()):
        return
    headings = ["t", *(h for x in found.contexts for h in (f"{x} mean", "largest"))]
    table = plain_table("Gold log-likelihoods", headings)
    for b in range(TIMESTEP_BINS):
        if any(c.chunks_B[b] for c in found.contexts.values()):
            cells = [
                cell
                for c in found.contexts.values()
                for cell in (
                    number(c.gold_B[b] / c.chunks_B[b] if c.chunks_B[b] else None, ".6f"),
                    number(c.largest_B[b], ".6f"),
                )
            ]
            table.add_row(f"{b / TIMESTEP_BINS:.1f}–{(b + 1) / TIMESTEP_BINS:.1f}", *cells)
    console.print(table)
    console.print("nats: the mean and the largest difference of a chunk's gold log-likelihood.", style="dim")


def _sentence(found: ContextDifference) -> str:
    """The largest difference and where it is, and what became of the candidates."""
    chunks = int(found.chunks_B.sum())
    where = found.largest
    parts = ["gold equal to the bit"]
    if where.value:
        name = printable(where.document)
        parts = [f"gold differs most, by {where.value:.6f}, in {name}, draw {where.draw}, chunk {where.chunk}"]
    if found.lane:
        parts.append(f"candidates {found.lane}")
    elif found.candidates:
        shared, best = found.shared / found.candidates, found.best / chunks
        parts.append(f"candidates: {shared:.2%} are in both, the best one is the same in {best:.2%} of the chunks")
        apart = [
            f"{what} differ by up to {largest.value:.6f}"
            for what, largest in (("their log-likelihoods", found.largest_candidate), ("log Z", found.largest_log_z))
            if largest.value
        ]
        parts += apart or ["equal in value"]
    return "; ".join(parts)
