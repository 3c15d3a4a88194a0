"""The rows of a training run in their order, each a pure function of cache, configuration and row number (DESIGN §8).

An epoch takes each document once, with the next of its draws in an order of its own, so that every stored draw is used
once before any is used twice. Shards are shuffled, a window of them is read, and its rows are shuffled together: memory
holds one window per stream, whatever the cache's size. A share `fresh` of the rows, spread evenly, is drawn here with
masks of its own, in a second stream over the same documents. Since row n needs nothing but n, a run resumes at the
exact row, any number of loader workers or ranks sees the same rows, and a longer run begins with the shorter one's.

Shape suffixes: R stored draws in the timestep range, D documents that have any, S shards.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import Dataset

from shared.cache.reader import Cache
from shared.cache.records import Draw, StoredDocument
from shared.documents import IntArray
from shared.errors import TidecacheError
from shared.noise import FloatArray, stream_key, uniforms
from stage2_student.data import Coverage, Row, RowMaker

WINDOW_DRAWS = 4096  # stored draws in a window: some tens of MB at a thousand tokens and 16 candidates


@dataclass(frozen=True)
class DrawIndex:
    """Where the draws are. `start_D` (D + 1 offsets) parts the R draws, sorted by document and draw number."""

    start_D: IntArray
    shard_R: IntArray
    draw_R: IntArray
    key_D: tuple[str, ...]
    size_S: IntArray  # stored draws per shard, for windows
    timestep_R: FloatArray

    @classmethod
    def of(cls, cache: Cache, min_timestep: float, max_timestep: float) -> DrawIndex:
        """Read document, draw and timestep of every row, three narrow columns; no lane is touched.

        Raises:
            TidecacheError: no draw lies in the range, or a file cannot be read.
        """
        tables = [_draw_columns(cache, number) for number in range(len(cache.shards))]
        size_S = np.array([len(table) for table in tables], np.int64)
        if not size_S.sum():
            raise TidecacheError(
                f"{cache.path}: the cache holds no draws yet: capture some with `tidecache teacher capture`"
            )
        joined = pa.concat_tables(tables)
        timestep = joined["timestep"].to_numpy().astype(np.float64)
        inside = np.flatnonzero((timestep >= min_timestep) & (timestep <= max_timestep))
        if not len(inside):
            raise TidecacheError(
                f"{cache.path}: none of its {len(timestep)} draws has a timestep from {min_timestep:g} to "
                f"{max_timestep:g}: widen --min-timestep and --max-timestep, or capture more with `tidecache teacher "
                "capture --draws`"
            )
        encoded = joined["document"].combine_chunks().dictionary_encode()
        names, code = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
        position = joined["position"].to_numpy()
        draw = joined["draw"].to_numpy().astype(np.int64)
        shard = np.repeat(np.arange(len(tables)), size_S)
        order = inside[np.lexsort((draw[inside], position[inside]))]
        first = np.flatnonzero(np.diff(code[order], prepend=-1))
        return cls(
            start_D=np.append(first, len(order)),
            shard_R=shard[order],
            draw_R=draw[order],
            key_D=tuple(names[c] for c in code[order][first]),
            size_S=size_S,
            timestep_R=timestep[order],
        )

    @property
    def documents(self) -> int:
        """D."""
        return len(self.key_D)

    @property
    def draws(self) -> int:
        """R."""
        return len(self.draw_R)


def _draw_columns(cache: Cache, number: int) -> pa.Table:
    path = cache.path / cache.shards[number].likelihoods[0].path
    try:
        return pq.read_table(path, columns=["document", "position", "draw", "timestep"])
    except (pa.ArrowException, OSError) as error:
        raise TidecacheError(
            f"{path}: cannot be read ({error}): `tidecache cache verify` lists all that is damaged and says how to "
            "mend it"
        ) from error


@dataclass(frozen=True)
class EpochOrder:
    """One epoch of one stream: the draw of each document, in the order of use. `window_D`: the window of each place."""

    row_D: IntArray
    window_D: IntArray


def epoch_order(index: DrawIndex, seed: int, stream: str, epoch: int) -> EpochOrder:
    """The order of `stream` (`cached` or `fresh`) in `epoch`.

    A document with K draws uses its draw number `epoch mod K` of an order that is drawn anew every K epochs.
    """
    count_D = np.diff(index.start_D)
    row_D = np.empty(index.documents, np.int64)
    for cycle in np.unique(epoch // count_D):
        now_D = np.flatnonzero(epoch // count_D == cycle)
        chance_R = uniforms(stream_key(seed, stream, "draw-order", int(cycle)), index.draws)
        document_R = np.repeat(np.arange(index.documents), count_D)
        shuffled_R = np.lexsort((chance_R, document_R))  # within each document
        row_D[now_D] = shuffled_R[index.start_D[now_D] + epoch % count_D[now_D]]
    shards = len(index.size_S)
    order_S = np.argsort(uniforms(stream_key(seed, stream, "shard-order", epoch), shards), kind="stable")
    # A window closes with the shard that fills it.
    before_S = np.cumsum(index.size_S[order_S]) - index.size_S[order_S]
    window_S = np.empty(shards, np.int64)
    window_S[order_S] = before_S // WINDOW_DRAWS
    window_D = window_S[index.shard_R[row_D]]
    chance_D = uniforms(stream_key(seed, stream, "row-order", epoch), index.documents)
    use_D = np.lexsort((chance_D, window_D))
    return EpochOrder(row_D[use_D], window_D[use_D])


class TrainingRows(Dataset[Row]):
    """Rows 0 … count − 1 of a run (see the module). Sequential access is fast; any access is right."""

    def __init__(self, cache: Cache, index: DrawIndex, maker: RowMaker, seed: int, fresh: float, count: int) -> None:
        self.cache = cache
        self.index = index
        self.maker = maker
        self.seed = seed
        self.fresh = fresh
        self.count = count
        self._orders: OrderedDict[tuple[str, int], EpochOrder] = OrderedDict()
        self._windows: dict[str, tuple[tuple[int, int], dict[tuple[str, int], Draw], dict[str, StoredDocument]]] = {}

    def __len__(self) -> int:
        return self.count

    def place(self, number: int) -> tuple[str, int, int]:
        """(stream, epoch, place within the epoch) of row `number`; fresh rows are spread evenly."""
        fresh_before = int(np.floor(number * self.fresh + 1e-9))
        is_fresh = int(np.floor((number + 1) * self.fresh + 1e-9)) > fresh_before
        within = fresh_before if is_fresh else number - fresh_before
        return ("fresh" if is_fresh else "cached", *divmod(within, self.index.documents))

    def __getitem__(self, number: int) -> Row:
        if not 0 <= number < self.count:
            raise IndexError(number)
        stream, epoch, place = self.place(number)
        order = self._order(stream, epoch)
        row = int(order.row_D[place])
        key = self._key(row)
        draws, documents = self._window(stream, epoch, int(order.window_D[place]))
        if stream == "fresh":
            return self.maker.fresh_row(documents[key], epoch)
        return self.maker.cached_row(draws[key, int(self.index.draw_R[row])])

    def coverage(self, draws: int) -> Coverage:
        """How much of the teacher's work the first `draws` cached rows of the run can use."""
        total = Coverage()
        number = 0
        while draws and number < self.count:
            if self.place(number)[0] == "cached":
                total += self[number].coverage
                draws -= 1
            number += 1
        return total

    def _order(self, stream: str, epoch: int) -> EpochOrder:
        key = (stream, epoch)
        if key not in self._orders:
            self._orders[key] = epoch_order(self.index, self.seed, stream, epoch)
            if len(self._orders) > 4:
                self._orders.popitem(last=False)
        return self._orders[key]

    def _window(
        self, stream: str, epoch: int, window: int
    ) -> tuple[dict[tuple[str, int], Draw], dict[str, StoredDocument]]:
        """The draws and documents of a window; each stream keeps its last one."""
        if stream not in self._windows or self._windows[stream][0] != (epoch, window):
            self._windows.pop(stream, None)  # before the next is read: memory holds one
            order = self._order(stream, epoch)
            rows = order.row_D[order.window_D == window]
            wanted = {(self._key(int(row)), int(self.index.draw_R[row])) for row in rows}
            draws: dict[tuple[str, int], Draw] = {}
            documents: dict[str, StoredDocument] = {}
            for shard in np.unique(self.index.shard_R[rows]).tolist():
                if stream == "fresh":
                    documents.update((d.key, d) for d in self.cache.read_documents(shard))
                    continue
                for draw in self.cache.read_shard(shard).draws:
                    if (draw.document, draw.draw) in wanted:
                        draws[draw.document, draw.draw] = draw
            self._windows[stream] = ((epoch, window), draws, documents)
        return self._windows[stream][1:]

    def _key(self, row: int) -> str:
        return self.index.key_D[int(np.searchsorted(self.index.start_D, row, side="right")) - 1]
