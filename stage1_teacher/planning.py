"""Which shards are still to be done: a corpus' stream against what the cache holds already (DESIGN §2, "extent"; §7).

A capture asks for the first D draws of every document of a corpus. Some shards may be there: from a run that was
interrupted, from a smaller corpus, from fewer draws, from another number of documents per shard. What is missing is found
while the corpus streams by, never by holding it: the positions are cut at every edge of a complete shard, so that within a
segment all documents have the same draws, and a segment's missing draws are one shard (or more, if there are gaps).
New shards are also cut at the multiples of the documents per shard, whatever is there: so a shard's number follows from
its first document alone, and jobs that know nothing of each other agree on whose it is (`ShardPart`).

The keys of the documents that stream by are compared with the digest that each complete shard keeps of its own: another
corpus at the same positions is refused, for its documents would get draws of two corpora.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.cache.manifest import Receipt
from shared.cache.records import ShardRange, StoredDocument
from shared.documents import Dropped, RawDocument, corpus_digest
from shared.errors import TidecacheError


@dataclass(frozen=True)
class ShardPart:
    """Every n-th shard, for one of `count` jobs that share a capture: those with shard number ≡ `number` − 1."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> ShardPart:
        """Read `i/n`, 1 ≤ i ≤ n, as --part gives it.

        Raises:
            TidecacheError: it is no such thing.
        """
        match = re.fullmatch(r"([0-9]+)/([0-9]+)", text.strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise TidecacheError(
                f"--part: expected i/n with i from 1 to n, such as 2/8, found {text!r}; in a SLURM array that starts at 0: "
                f"--part $((SLURM_ARRAY_TASK_ID+1))/$SLURM_ARRAY_TASK_COUNT"
            )
        return cls(int(match[1]), int(match[2]))

    def holds(self, first_document: int, documents_per_shard: int) -> bool:
        """Whether the shard that begins with this document is one of the part's."""
        return first_document // documents_per_shard % self.count == self.number - 1


WHOLE = ShardPart()

Listed = RawDocument | StoredDocument | Dropped  # a corpus' documents, or what a cache holds of one


@dataclass(frozen=True)
class Segment:
    """A run of documents, `first` being the position of the first, and the draws of them that are missing."""

    first: int
    documents: tuple[Listed, ...]
    missing: tuple[tuple[int, int], ...]  # ranges [first draw, draw stop)
    corpus_digest: str

    @property
    def shards(self) -> list[ShardRange]:
        """One range per gap in the draws."""
        return [ShardRange(self.first, self.first + len(self.documents), a, b) for a, b in self.missing]


def segments(
    corpus: Iterable[Listed],
    completed: Sequence[Receipt],
    draws: int,
    documents_per_shard: int,
    folder: Path,
    part: ShardPart = WHOLE,
) -> Iterator[Segment]:
    """Cut the stream into segments and give the part's, complete ones (nothing missing) included; one is in memory.

    Raises:
        TidecacheError: the corpus differs from the one that a complete shard was captured from.
    """
    stream = iter(corpus)
    edges = sorted({edge for r in completed for edge in (r.range.first_document, r.range.document_stop)})
    digests = RangeDigests(completed, folder)
    first = 0
    while True:
        covering = [r.range for r in completed if r.range.first_document <= first < r.range.document_stop]
        next_edge = bisect.bisect_right(edges, first)
        next_multiple = (first // documents_per_shard + 1) * documents_per_shard
        stop = edges[next_edge] if next_edge < len(edges) else next_multiple
        if not covering:
            stop = min(stop, next_multiple)
        documents = tuple(itertools.islice(stream, stop - first))
        if not documents:
            return
        digests.add(first, documents)
        if part.holds(first, documents_per_shard):
            missing = tuple(_gaps([(r.first_draw, r.draw_stop) for r in covering], draws))
            yield Segment(first, documents, missing, corpus_digest(d.key for d in documents))
        first += len(documents)


def lacks_draws(completed: Sequence[Receipt], draws: int) -> bool:
    """Whether some documents of these shards have not all of their first `draws` draws."""
    waiting = sorted((r.range for r in completed), key=lambda r: r.first_document, reverse=True)
    active: list[ShardRange] = []
    for edge in sorted({edge for r in waiting for edge in (r.first_document, r.document_stop)}):
        active = [r for r in active if r.document_stop > edge]
        while waiting and waiting[-1].first_document <= edge:
            active.append(waiting.pop())
        if active and any(_gaps([(r.first_draw, r.draw_stop) for r in active], draws)):
            return True
    return False


def _gaps(ranges: Sequence[tuple[int, int]], stop: int) -> Iterator[tuple[int, int]]:
    """The parts of [0, stop) that no range covers."""
    first = 0
    for a, b in sorted(ranges):
        if first < min(a, stop):
            yield first, min(a, stop)
        first = max(first, b)
    if first < stop:
        yield first, stop


class RangeDigests:
    """Digests of the corpus over the document ranges of complete shards, built up while the documents stream by."""

    def __init__(self, completed: Sequence[Receipt], folder: Path) -> None:
        self._folder = folder
        self._waiting = sorted(completed, key=lambda r: r.range.first_document, reverse=True)
        self._open: list[tuple[Receipt, hashlib.blake2b]] = []

    def add(self, first: int, documents: Sequence[Listed]) -> None:
        """Take the documents from position `first` on; they lie within every range that they touch.

        Raises:
            TidecacheError: a range is complete and its digest is another.
        """
        stop = first + len(documents)
        while self._waiting and self._waiting[-1].range.first_document <= first:
            self._open.append((self._waiting.pop(), hashlib.blake2b(digest_size=16)))
        keys = "".join(d.key for d in documents).encode()
        for receipt, digest in self._open:
            digest.update(keys)
            if receipt.range.document_stop == stop and digest.hexdigest() != receipt.corpus:
                raise TidecacheError(
                    f"{self._folder}: the documents {receipt.range.first_document} to {stop - 1} of this corpus are not those that "
                    f"the cache holds there: give the corpus that it was captured from (more documents may follow), or another --out"
                )
        self._open = [item for item in self._open if item[0].range.document_stop > stop]
