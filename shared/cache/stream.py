"""Draws of one or several caches in the order of a training run, read shard by shard.

    stream = DrawStream([open_cache("a"), open_cache("b")], weights=[1, 2], seed=0)
    for draw in stream.iterate(start):  # endless; item n is stream[n], whatever was read before

Item n is a pure function of the caches' extents, the weights, the seed and n: any number of processes that share the
items see the same ones, a run resumes at the next item by its number alone, and a longer run begins with the shorter
one's items. Each cache goes through its own rounds (`shared.cache.order`) and gives items by weight
(`shared.cache.mixing`); with `together` > 1 items come in groups of that many, aligned at its multiples, and a group
takes consecutive rows of one cache's order, which are draws of one document.

Memory holds a window of each cache, and while its second half is in use the next one, which a thread reads ahead.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from shared.cache.files import DamagedError
from shared.cache.mixing import Mixture
from shared.cache.order import DrawIndex, DrawOrder, Round
from shared.cache.parquet import REMEDY
from shared.cache.reader import Cache
from shared.cache.records import Draw, IntArray, StoredDocument
from shared.cache.selection import Selection

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where an item comes from: the cache's number, the round of its order, and the row of its index."""

    cache: int
    round: int
    row: int


class _Windows(Generic[T]):
    """The items of one cache by their numbers. Sequential access is fast; any access is right. For one thread at a time."""

    def __init__(self, order: DrawOrder, load: Callable[[IntArray], list[T]]) -> None:
        self.order = order
        self._load = load
        self._current: tuple[tuple[int, int], int, list[T]] | None = None  # (round, window), its first place, its items
        self._ahead: tuple[tuple[int, int], Future[list[T]]] | None = None

    def row(self, number: int) -> tuple[int, int]:
        """(round, row of the index) of item `number`."""
        round_, place = self.order.place(number)
        return round_, int(self.order.round(round_).row_N[place])

    def item(self, number: int) -> T:
        """Item `number`; errors of reading surface here, also those of reading ahead."""
        round_, place = self.order.place(number)
        made = self.order.round(round_)
        key = (round_, int(made.window_N[place]))
        if self._current is None or self._current[0] != key:
            self._current = None  # before the next is read: memory holds one, and what was read ahead
            ahead, self._ahead = self._ahead, None
            first, stop = _bounds(made, key[1])
            rows = made.row_N[first:stop]
            items = ahead[1].result() if ahead is not None and ahead[0] == key else self._load(rows)
            self._current = (key, first, items)
        _, first, items = self._current
        if self._ahead is None and place - first >= len(items) // 2:
            self._read_ahead(round_, made, first + len(items))
        return items[place - first]

    def _read_ahead(self, round_: int, made: Round, place: int) -> None:
        """Begin to read the window that holds `place`, or the next round's first."""
        if place == len(made.row_N):
            round_, place, made = round_ + 1, 0, self.order.round(round_ + 1)
        key = (round_, int(made.window_N[place]))
        first, stop = _bounds(made, key[1])
        self._ahead = (key, _READERS.submit(lambda: self._load(made.row_N[first:stop])))

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: it reads for itself."""
        return {**self.__dict__, "_current": None, "_ahead": None}


def _bounds(made: Round, window: int) -> tuple[int, int]:
    """The places [first, stop) of a window in its round."""
    first, stop = np.searchsorted(made.window_N, [window, window + 1])
    return int(first), int(stop)


class _Readers:
    """One thread that reads ahead, in whatever process it is asked. A fork waits until it is idle: a process that is
    forked while a thread holds a library's lock would find the lock held for ever.
    """

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._running: set[Future[Any]] = set()
        self._lock = threading.Lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self._settle, after_in_child=self._reset)

    def submit(self, work: Callable[[], T]) -> Future[T]:
        with self._lock:
            self._threads = self._threads or ThreadPoolExecutor(1, "tidecache-read-ahead")
            future = self._threads.submit(work)
            self._running = {f for f in self._running if not f.done()} | {future}
            return future

    def _settle(self) -> None:
        wait(self._running)

    def _reset(self) -> None:
        self._threads, self._running, self._lock = None, set(), threading.Lock()


_READERS = _Readers()


class DrawStream:
    """Stored draws of some caches in the order of a training run (see the module); endless.

    `weights`: shares of the items, equal if not given. `together`: draws of one document that come one after the other.
    `context`, `topk`: whose scores the draws carry, and whether with candidates; what is not asked for is not read.

    Raises:
        TidecacheError: no cache, weights that are no shares, a cache that holds no draw of the selection, or another
            context; from items: a file is missing, damaged, or of another spec (the message names it).
    """

    def __init__(
        self,
        caches: Sequence[Cache],
        weights: Sequence[float] | None = None,
        *,
        seed: int = 0,
        together: int = 1,
        selection: Selection | None = None,
        context: str | None = None,
        topk: bool = True,
    ) -> None:
        self.caches = tuple(caches)
        self.mixture = Mixture(tuple(weights) if weights is not None else (1.0,) * len(self.caches))
        if len(self.mixture.weights) != len(self.caches):
            raise ValueError(f"{len(self.caches)} caches and {len(self.mixture.weights)} weights")
        self.seed = seed
        self.together = together
        self.indexes = tuple(DrawIndex.of(cache, selection or Selection()) for cache in self.caches)
        self._windows = [
            _Windows(DrawOrder(index, seed, _name("cached", n), together), _DrawLoader(cache, index, context, topk))
            for n, (cache, index) in enumerate(zip(self.caches, self.indexes, strict=True))
        ]

    def __getitem__(self, number: int) -> Draw:
        return self.located(number)[1]

    def located(self, number: int) -> tuple[int, Draw]:
        """Item `number` with the number of its cache."""
        cache, within = self._place(number)
        return cache, self._windows[cache].item(within)

    def iterate(self, start: int = 0) -> Iterator[Draw]:
        """Items start, start + 1, … without end."""
        while True:
            yield self[start]
            start += 1

    def place(self, number: int) -> Place:
        """Where item `number` comes from; nothing is read."""
        cache, within = self._place(number)
        return Place(cache, *self._windows[cache].row(within))

    def uses(self, number: int) -> int:
        """How often the stored draw of item `number` was used before: each is used once before any is used twice."""
        cache, within = self._place(number)
        return within // self.indexes[cache].draws

    def _place(self, number: int) -> tuple[int, int]:
        group, within = divmod(number, self.together)
        cache, turn = self.mixture.place(group)
        return cache, turn * self.together + within


@dataclass(frozen=True)
class Visit:
    """A document's turn: the cache's number, how often the document was there before, and the document."""

    cache: int
    times: int
    stored: StoredDocument


class DocumentStream:
    """The documents of a `DrawStream`'s selection without their draws, in an order of their own, mixed by the same
    weights; item n is a document's turn.
    """

    def __init__(self, draws: DrawStream) -> None:
        self.mixture = draws.mixture
        self._windows = []
        for n, (cache, index) in enumerate(zip(draws.caches, draws.indexes, strict=True)):
            each = index.one_each()
            order = DrawOrder(each, draws.seed, _name("fresh", n))
            self._windows.append(_Windows(order, _DocumentLoader(cache, each)))

    def __getitem__(self, number: int) -> Visit:
        cache, within = self.mixture.place(number)
        windows = self._windows[cache]
        return Visit(cache, windows.order.place(within)[0], windows.item(within))


def _name(stream: str, cache: int) -> str:
    """Two caches of the same documents are shuffled differently."""
    return f"{stream} {cache}" if cache else stream


@dataclass(frozen=True)
class _DrawLoader:
    """Reads the draws at some rows of an index, in that order; shards are read whole, what is not wanted is let go."""

    cache: Cache
    index: DrawIndex
    context: str | None
    topk: bool

    def __call__(self, rows: IntArray) -> list[Draw]:
        shard_N, row_N = self.index.shard_R[rows], self.index.row_R[rows]
        found: list[Draw | None] = [None] * len(rows)
        for shard in np.unique(shard_N).tolist():
            places = np.flatnonzero(shard_N == shard)
            wanted_R = np.zeros(int(self.index.rows_S[shard]), np.bool_)
            wanted_R[row_N[places]] = True
            draws = self.cache.read_rows(shard, wanted_R, self.context, self.topk)
            for place, draw in zip(places[np.argsort(row_N[places])].tolist(), draws, strict=True):
                self._refuse_other(shard, int(rows[place]), draw)
                found[place] = draw
        return [draw for draw in found if draw is not None]

    def _refuse_other(self, shard: int, row: int, draw: Draw) -> None:
        """The index was read without the file's digest: what it chose by must be what is there."""
        if self.index.draw_R[row] != draw.draw or self.index.timestep_R[row] != np.float32(draw.timestep):
            finding = "its narrow columns are not those that the index was made from: damaged or replaced meanwhile"
            raise DamagedError(self.cache.path / self.cache.shards[shard].likelihoods[0].path, finding, REMEDY)


@dataclass(frozen=True)
class _DocumentLoader:
    """Reads the documents at some rows of an index that has one row for each."""

    cache: Cache
    index: DrawIndex

    def __call__(self, rows: IntArray) -> list[StoredDocument]:
        by_position: dict[int, StoredDocument] = {}
        for shard in np.unique(self.index.shard_R[rows]).tolist():
            by_position |= {d.position: d for d in self.cache.read_documents(shard)}
        try:
            return [by_position[position] for position in self.index.position_D[rows].tolist()]
        except KeyError as error:
            finding = f"a shard has draws of position {error}, and its documents file has no document there"
            raise DamagedError(self.cache.path, finding, REMEDY) from error
