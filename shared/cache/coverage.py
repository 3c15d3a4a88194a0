"""`tidecache cache coverage`: how much of a cache students with given tokenizers can use, and why the rest is lost.

Read with `shared.own_chunks` and `shared.spelling`, as training reads it, so the counts are those that training then
has. A masked cache chunk is usable if it lies in an own chunk of the student that carries a score. It is lost if its
document cannot be reproduced by the tokenizer, if it lies in no own chunk (a token reaches over the end of a content),
if its own chunk has a part that is not masked, or, in context compdemo, if the parts are scored in different passes.

A sample of documents, spread evenly over the cache, is read; all counts are exact for it.

Shapes: B timestep bins, R fates of a chunk, M masked chunks of a draw, O own chunks of a document.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from shared.cache.files import DamagedError
from shared.cache.parquet import REMEDY
from shared.cache.reader import Cache
from shared.cache.records import Draw, StoredDocument
from shared.cache.statistics import TIMESTEP_BINS, Array, timestep_bin
from shared.cache.survey import document_ranges, spread
from shared.cache.tables import literal, number, plain_table
from shared.errors import printable
from shared.own_chunks import OwnChunks, own_chunks, scored_own_chunks
from shared.spelling import Speller, candidates_of
from shared.tokenization import IrreproducibleText, TextTokenizer

FATES = ("usable", "unmasked", "split", "outside", "irreproducible")
SPREAD = 16  # a sample comes from at least so many documents files, where there are as many


@dataclass
class Candidates:
    """Candidates of the usable own chunks, other than the gold, each spelling once. Masses are sums of probabilities at
    temperature 1. `without`: usable own chunks that have none, being unions of several cache chunks.
    """

    spelled: int = 0
    lost: int = 0
    spelled_mass: float = 0.0
    lost_mass: float = 0.0
    chunks: int = 0
    without: int = 0


@dataclass
class StudentCoverage:
    """What one student can use of the sample. Counters: how many own chunks have so many bytes or tokens."""

    name: str
    tokenizer: str  # its digest
    declared: bool
    documents: int = 0
    irreproducible: int = 0
    reasons: list[str] = field(default_factory=list)  # a few of why a document is not reproducible
    chunks_BR: Array = field(default_factory=lambda: np.zeros((TIMESTEP_BINS, len(FATES))))  # masked ones, by fate
    bytes_O: Counter[int] = field(default_factory=Counter)
    tokens_O: Counter[int] = field(default_factory=Counter)
    teacher_tokens_O: Counter[int] = field(default_factory=Counter)
    candidates: Candidates | None = None

    @property
    def masked(self) -> int:
        """Masked cache chunks of the sample."""
        return int(self.chunks_BR.sum())

    @property
    def by_fate(self) -> dict[str, int]:
        """Masked cache chunks: usable, or lost and why."""
        return {fate: int(n) for fate, n in zip(FATES, self.chunks_BR.sum(0), strict=True)}

    @property
    def share(self) -> float:
        """Usable over masked; 1 where nothing is masked."""
        return self.by_fate["usable"] / self.masked if self.masked else 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        masked_B = self.chunks_BR.sum(1)
        return {
            "student": self.name,
            "tokenizer": self.tokenizer,
            "declared": self.declared,
            "documents": self.documents,
            "irreproducible_documents": self.irreproducible,
            "reasons": self.reasons,
            "masked_chunks": self.masked,
            **{f"{fate}_chunks": n for fate, n in self.by_fate.items()},
            "usable_share": self.share,
            "timesteps": [
                {
                    "from": b / TIMESTEP_BINS,
                    "to": (b + 1) / TIMESTEP_BINS,
                    "masked_chunks": int(masked_B[b]),
                    **{f"{fate}_chunks": int(n) for fate, n in zip(FATES, self.chunks_BR[b], strict=True)},
                }
                for b in range(TIMESTEP_BINS)
            ],
            "own_chunks": {
                "count": self.bytes_O.total(),
                "bytes": lengths(self.bytes_O),
                "tokens": lengths(self.tokens_O),
                "teacher_tokens": lengths(self.teacher_tokens_O),
            },
            "candidates": None if self.candidates is None else vars(self.candidates),
        }


@dataclass(frozen=True)
class CoverageReport:
    """The sample and what each student can use of it."""

    cache: str
    context: str
    documents: int
    all_documents: int
    draws: int
    students: tuple[StudentCoverage, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "cache": self.cache,
            "context": self.context,
            "documents": self.documents,
            "all_documents": self.all_documents,
            "draws": self.draws,
            "students": [s.to_json() for s in self.students],
        }


def lengths(counts: Counter[int]) -> dict[str, float] | None:
    """Mean, median, 95th percentile and maximum; None where nothing was counted."""
    if not counts:
        return None
    values = np.array(sorted(counts))
    ahead = np.cumsum([counts[v] for v in values.tolist()])
    total = ahead[-1]
    median, high = (float(values[np.searchsorted(ahead, share * total)]) for share in (0.5, 0.95))
    mean = sum(v * n for v, n in counts.items()) / float(total)
    return {"mean": mean, "median": median, "p95": high, "max": float(values[-1])}


def measure(
    path: str | Path, students: Sequence[TextTokenizer], documents: int, context: str | None = None, topk: bool = True
) -> CoverageReport:
    """Measure what each student can use of a sample of at most `documents` documents.

    `context`: whose scores would be used; None: `compdemo` where it is held. Without `topk`, or without that lane,
    candidates are not looked at, which is much faster.

    Raises:
        TidecacheError: no cache there, damage, an unknown context, or chats and a student without a chat template.
    """
    cache = Cache.open(path)
    context = cache.known_context(context)
    topk = topk and "topk" in cache.spec.lanes
    declared = {s.tokenizer for s in cache.spec.students}
    found = tuple(
        StudentCoverage(s.name, s.digest, s.digest in declared, candidates=Candidates() if topk else None)
        for s in students
    )
    spellers = [Speller(s) for s in students]
    sampled = draws = 0
    for stored, of_document in sample(cache, documents, context, topk):
        sampled += 1
        draws += len(of_document)
        for coverage, speller in zip(found, spellers, strict=True):
            _add_document(coverage, speller, cache, stored, of_document, context)
    return CoverageReport(str(cache.path), context, sampled, cache.manifest.totals.documents, draws, found)


def sample(cache: Cache, documents: int, context: str, topk: bool) -> Iterator[tuple[StoredDocument, list[Draw]]]:
    """At most `documents` documents, spread evenly over the cache, each with all of its draws."""
    files = [indices for indices in document_ranges(cache) if cache.shards[indices[0]].counts.documents]
    if not files:
        return
    total = sum(cache.shards[indices[0]].counts.documents for indices in files)
    wanted = min(documents, total)
    count = min(len(files), max(SPREAD, -(-wanted * len(files) // total)))
    while sum(cache.shards[files[i][0]].counts.documents for i in spread(len(files), count)) < wanted:
        count += 1
    chosen = [files[i] for i in spread(len(files), count)]
    left = wanted
    for place, indices in enumerate(chosen):
        held = cache.shards[indices[0]].counts.documents
        later = sum(cache.shards[i[0]].counts.documents for i in chosen[place + 1 :])
        take = min(held, max(-(-left // (len(chosen) - place)), left - later))
        left -= take
        yield from _documents_of(cache, indices, set(spread(held, take)), context, topk)


def _documents_of(
    cache: Cache, indices: Sequence[int], places: set[int], context: str, topk: bool
) -> Iterator[tuple[StoredDocument, list[Draw]]]:
    """Documents of the shards `indices`, which have one documents file, by their places in it."""
    draws: dict[str, list[Draw]] = {}
    stored: dict[str, StoredDocument] = {}
    for index in indices:
        receipt = cache.shards[index]
        each = receipt.range.draw_stop - receipt.range.first_draw
        wanted = np.repeat([i in places for i in range(receipt.counts.documents)], each)
        if len(wanted) != receipt.likelihoods[0].rows:
            finding = f"expected {len(wanted)} rows, found {receipt.likelihoods[0].rows}"
            raise DamagedError(cache.path / receipt.likelihoods[0].path, finding, REMEDY)
        for draw in cache.read_rows(index, wanted, context, topk):
            stored.setdefault(draw.document, draw.stored)
            draws.setdefault(draw.document, []).append(draw)
    for key, of_document in draws.items():
        yield stored[key], of_document


def _add_document(
    coverage: StudentCoverage,
    speller: Speller,
    cache: Cache,
    stored: StoredDocument,
    draws: Iterable[Draw],
    context: str,
) -> None:
    """Count a document and its draws."""
    coverage.documents += 1
    try:
        own = own_chunks(speller.tokenizer, stored)
    except IrreproducibleText as error:
        coverage.irreproducible += 1
        if len(coverage.reasons) < 3:
            coverage.reasons.append(str(error))
        for draw in draws:
            coverage.chunks_BR[timestep_bin(draw.timestep), FATES.index("irreproducible")] += len(draw.chunks)
        return
    coverage.bytes_O.update(own.own_bytes_O.tolist())
    coverage.tokens_O.update((own.own_token_stop_O - own.own_token_first_O).tolist())
    ahead = np.concatenate([[0], np.cumsum(stored.token_count_C)])
    coverage.teacher_tokens_O.update((ahead[own.own_stop_O] - ahead[own.own_first_O]).tolist())
    for draw in draws:
        _add_draw(coverage, speller, cache, own, draw, context)


def _add_draw(
    coverage: StudentCoverage, speller: Speller, cache: Cache, own: OwnChunks, draw: Draw, context: str
) -> None:
    scored = scored_own_chunks(own, draw, context)
    masked_O = scored.masked_before[own.own_stop_O] - scored.masked_before[own.own_first_O]
    unmasked, split, usable = (
        int(masked_O[chosen_O].sum())
        for chosen_O in (~scored.whole_O, scored.whole_O & ~scored.one_pass_O, scored.whole_O & scored.one_pass_O)
    )
    outside = len(draw.chunks) - unmasked - split - usable
    coverage.chunks_BR[timestep_bin(draw.timestep)] += (usable, unmasked, split, outside, 0)
    if coverage.candidates is None:
        return
    found = candidates_of(own, draw, context, scored, 1.0, cache.spec.temperatures.index(1.0), speller)
    total = coverage.candidates
    total.chunks += len(found.union_Q)
    total.without += int(found.union_Q.sum())
    for spelled, lost in zip(found.spelled_Q, found.lost_Q, strict=True):
        total.spelled += len(spelled)
        total.lost += len(lost)
        total.spelled_mass += float(np.exp([mass for _, mass in spelled]).sum())
        total.lost_mass += float(np.exp(lost).sum())


# --- for people --------------------------------------------------------------------------------------------------

_LABELS = {
    "unmasked": "lost: merged, a part not masked",
    "split": "lost: merged, scored in two passes",
    "outside": "lost: not between its tokens",
    "irreproducible": "lost: document not reproducible",
}


def render(report: CoverageReport, console: Console) -> None:
    """Print the report as tables: one column per student."""
    console.print(
        f"{printable(report.cache)}: {report.documents:,} of {report.all_documents:,} documents, {report.draws:,} draws, context "
        f"{report.context}",
        markup=False,
    )
    console.print()
    students, names = report.students, [literal(s.name) for s in report.students]
    table = plain_table("Masked chunks of the cache", ["", *names])
    table.add_row("declared", *("yes" if s.declared else "no" for s in students))
    table.add_row("usable", *(_share(s.by_fate["usable"], s.masked) for s in students))
    for fate, label in _LABELS.items():
        table.add_row(label, *(_share(s.by_fate[fate], s.masked) for s in students))
    table.add_section()
    for label, attribute in (("bytes", "bytes_O"), ("its tokens", "tokens_O"), ("teacher tokens", "teacher_tokens_O")):
        table.add_row(f"own chunk: {label}, mean (95 %)", *(_length(getattr(s, attribute)) for s in students))
    held = [s.candidates for s in students if s.candidates is not None]
    if held:
        table.add_section()
        table.add_row("candidates it can spell", *(_share(c.spelled, c.spelled + c.lost) for c in held))
        table.add_row("… by probability", *(_share(c.spelled_mass, c.spelled_mass + c.lost_mass) for c in held))
        table.add_row("usable own chunks without any", *(_share(c.without, c.chunks) for c in held))
    console.print(table)
    console.print()
    table = plain_table("Usable share by timestep", ["t", *names])
    for b in range(TIMESTEP_BINS):
        if any(s.chunks_BR[b].any() for s in students):
            shares = [_share(s.chunks_BR[b, 0], s.chunks_BR[b].sum()) for s in students]
            table.add_row(f"{b / TIMESTEP_BINS:.1f}–{(b + 1) / TIMESTEP_BINS:.1f}", *shares)
    console.print(table)
    for student in students:
        if student.reasons:
            reason = printable(student.reasons[0])
            console.print(f"not reproducible for {printable(student.name)}, for example: {reason}", markup=False)


def _share(part: float, whole: float) -> str:
    return number(part / whole if whole else None, ".1%")


def _length(counts: Counter[int]) -> str:
    found = lengths(counts)
    return "–" if found is None else f"{found['mean']:.2f} ({found['p95']:.0f})"
