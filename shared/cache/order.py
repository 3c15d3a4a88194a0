"""The order in which a training run uses the draws of one cache: a pure function of the cache's extent, seed and number.

A *pass* takes each stored draw once, so every draw is used once before any is used twice. It is made of *rounds*, and
a round takes each document once, with its next draws in an order that is drawn anew for every pass: one draw, or
`together` of them, one after the other. Where a document's K draws are not a multiple of `together`, its last group of
the pass is shorter, K mod `together`; a document with fewer draws than others rests in the last rounds.

Within a round shards are shuffled, windows of some shards are formed, and the documents of a window are shuffled
together, so that a reader holds a window in memory, whatever the cache's size. A document's draws may lie in several
shards (a cache that was extended); it belongs to the window of the first.

Shape suffixes: R selected draws, D documents that have any, S shards, N rows of a round.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared.cache.reader import Cache
from shared.cache.records import BoolArray, IntArray
from shared.cache.selection import Selection
from shared.errors import TidecacheError
from shared.noise import stream_key, uniforms
from shared.ragged import ranges, within

WINDOW_DRAWS = 2048  # rows of a window: about 100 MB at 500 masked tokens and 16 candidates
INDEX_THREADS = 8  # files whose narrow columns are read at once: an address answers slowly
KEPT = 3  # rounds, and passes: that in use, the next, and that of a reader a little behind

SmallIntArray = npt.NDArray[np.int32]
T = TypeVar("T")


@dataclass(frozen=True)
class DrawIndex:
    """Where the selected draws are, some 30 bytes each. `start_D` (D + 1 offsets) parts the R draws, which are sorted by
    document position, then draw number.
    """

    start_D: IntArray
    position_D: IntArray
    shard_D: SmallIntArray  # the first shard that holds draws of the document, selected or not
    shard_R: SmallIntArray
    row_R: SmallIntArray  # within the shard
    draw_R: SmallIntArray
    timestep_R: npt.NDArray[np.float32]
    rows_S: IntArray  # stored draws of each shard, selected or not

    @classmethod
    def of(cls, cache: Cache, selection: Selection) -> DrawIndex:
        """Read position, draw and timestep of every row, three narrow columns; no lane is touched.

        Raises:
            TidecacheError: no draw is selected, or a file cannot be read.
        """
        parts = list(_read_parts(cache, selection))
        rows_S = np.array([len(part.position_R) for part in parts], np.int64)
        if not rows_S.sum():
            raise TidecacheError(
                f"{cache.path}: the cache holds no draws yet: capture some with `tidecache teacher capture`"
            )
        selected = np.flatnonzero(np.concatenate([part.selected_R for part in parts]))
        if not len(selected):
            raise TidecacheError(
                f"{cache.path}: none of its {rows_S.sum()} draws has {selection}: widen the selection "
                "(--min-timestep, --max-timestep), or capture more with `tidecache teacher capture --draws`"
            )
        position = np.concatenate([part.position_R for part in parts])
        draw = np.concatenate([part.draw_R for part in parts])
        shard = np.repeat(np.arange(len(parts), dtype=np.int32), rows_S)
        held, first = np.unique(position, return_index=True)  # the first row is in the first shard
        order = selected[np.lexsort((draw[selected], position[selected]))]
        start = np.flatnonzero(np.diff(position[order], prepend=-1))
        position_D = position[order][start]
        return cls(
            start_D=np.append(start, len(order)),
            position_D=position_D,
            shard_D=shard[first[np.searchsorted(held, position_D)]],
            shard_R=shard[order],
            row_R=within(rows_S)[order].astype(np.int32),
            draw_R=draw[order],
            timestep_R=np.concatenate([part.timestep_R for part in parts])[order],
            rows_S=rows_S,
        )

    def one_each(self) -> DrawIndex:
        """The same documents, each with its first draw alone: for rows that need the document and no stored draw."""
        first_D = self.start_D[:-1]
        return DrawIndex(
            np.arange(self.documents + 1), self.position_D, self.shard_D, self.shard_R[first_D], self.row_R[first_D],
            self.draw_R[first_D], self.timestep_R[first_D], self.rows_S,
        )  # fmt: skip

    @property
    def documents(self) -> int:
        """D."""
        return len(self.position_D)

    @property
    def draws(self) -> int:
        """R."""
        return len(self.draw_R)


@dataclass(frozen=True)
class _Part:
    """The narrow columns of one shard."""

    position_R: IntArray
    draw_R: SmallIntArray
    timestep_R: npt.NDArray[np.float32]
    selected_R: BoolArray


def _read_parts(cache: Cache, selection: Selection) -> Iterator[_Part]:
    with ThreadPoolExecutor(INDEX_THREADS) as threads:
        yield from threads.map(lambda number: _read_part(cache, number, selection), range(len(cache.shards)))


def _read_part(cache: Cache, number: int, selection: Selection) -> _Part:
    names = ["position", "draw", "timestep", *([] if selection.all_documents else ["document"])]
    table = cache.read_narrow_rows(number, names)
    timestep_R = table["timestep"].to_numpy()
    low, high = selection.timesteps
    selected_R = (timestep_R.astype(np.float64) >= low) & (timestep_R.astype(np.float64) <= high)
    if selection.names is not None:
        keys = [key for key, name in cache.read_document_names(number) if selection.takes(key, name)]
        selected_R &= _is_among(table["document"], keys)
    elif selection.documents is not None:
        selected_R &= _is_among(table["document"], list(selection.documents))
    return _Part(table["position"].to_numpy(), table["draw"].to_numpy(), timestep_R, selected_R)


def _is_among(document_R: pa.ChunkedArray, keys: list[str]) -> BoolArray:
    found: BoolArray = pc.is_in(document_R, value_set=pa.array(keys, pa.string())).to_numpy()
    return found


@dataclass(frozen=True)
class Round:
    """The rows of the index in their order of use, and for each the number of its window, ascending."""

    row_N: IntArray
    window_N: SmallIntArray


class DrawOrder:
    """Row numbers 0, 1, 2, … without end to rows of the index (see the module).

    `stream` names the order: streams of different names over one cache are shuffled differently.
    """

    def __init__(self, index: DrawIndex, seed: int, stream: str, together: int = 1) -> None:
        self.index = index
        self.seed = seed
        self.stream = stream
        self.together = together
        count_D = np.diff(index.start_D)
        self._count_D = count_D
        self._rounds = -(-int(count_D.max()) // together)  # of a pass
        rows = [int(np.clip(count_D - j * together, 0, together).sum()) for j in range(self._rounds)]
        self._stop = np.cumsum(rows)  # rows of a pass up to the end of each of its rounds
        self._round_cache: OrderedDict[int, Round] = OrderedDict()
        self._pass_cache: OrderedDict[int, IntArray] = OrderedDict()

    def place(self, number: int) -> tuple[int, int]:
        """(round, place within the round) of row `number`; rounds are counted through all passes."""
        passed, within = divmod(number, self.index.draws)
        round_ = int(np.searchsorted(self._stop, within, side="right"))
        before = int(self._stop[round_ - 1]) if round_ else 0
        return passed * self._rounds + round_, within - before

    def round(self, number: int) -> Round:
        """The rows of round `number`."""
        return _remembered(self._round_cache, number, self._make_round)

    def _make_round(self, number: int) -> Round:
        index = self.index
        passed, j = divmod(number, self._rounds)
        taken_D = np.clip(self._count_D - j * self.together, 0, self.together)
        shards = len(index.rows_S)
        order_S = np.argsort(uniforms(stream_key(self.seed, self.stream, "shard-order", number), shards), kind="stable")
        rows_S = np.bincount(index.shard_D, weights=taken_D, minlength=shards).astype(np.int64)[order_S]
        window_S = np.empty(shards, np.int32)
        window_S[order_S] = (np.cumsum(rows_S) - rows_S) // WINDOW_DRAWS  # a window closes with the shard that fills it
        window_D = window_S[index.shard_D]
        chance_D = uniforms(stream_key(self.seed, self.stream, "row-order", number), index.documents)
        use_D = np.lexsort((chance_D, window_D))
        use_D = use_D[taken_D[use_D] > 0]
        place_N = ranges(index.start_D[use_D] + j * self.together, taken_D[use_D])
        shuffled_R = _remembered(self._pass_cache, passed, self._shuffle)
        return Round(shuffled_R[place_N], np.repeat(window_D[use_D], taken_D[use_D]))

    def _shuffle(self, passed: int) -> IntArray:
        """The rows of the index in the order in which each document uses its draws in a pass: one shard's after another's,
        so that a round over an extended cache reads as few files as it can.
        """
        index = self.index
        chance_R = uniforms(stream_key(self.seed, self.stream, "draw-order", passed), index.draws)
        chance_S = uniforms(stream_key(self.seed, self.stream, "range-order", passed), len(index.rows_S))
        document_R = np.repeat(np.arange(index.documents), self._count_D)
        return np.lexsort((chance_R, chance_S[index.shard_R], document_R))


def _remembered(kept: OrderedDict[int, T], number: int, make: Callable[[int], T]) -> T:
    """A value that was made lately, or a new one; the oldest is forgotten."""
    if number not in kept:
        kept[number] = make(number)
        if len(kept) > KEPT:
            kept.popitem(last=False)
    return kept[number]
