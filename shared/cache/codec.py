"""The one place that knows a topk lane's codecs: which columns it has, what they do to values, and how these come back.

`raw`: lists of numbers that any Parquet reader can use; log-likelihoods are float32 rounded to 11 significant bits, and
zstd stores little more than those: half a unit in the last place is at most 0.004 nats for values from −8 to −16, and
never more than 2^-11 of the value. log Z keeps 16 bits, since the tail mass is a small difference.
`packed`: one column of bytes, a third as large (`shared.cache.packed_layout`). Each row says all that is needed to decode it; ids
are exact, log-likelihoods lie on the grid of `shared.cache.grid`.

Tail samples stand beside either as raw columns. Shapes as in `shared.cache.records`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.cache import columns, grid, packed_reader, packed_writer
from shared.cache.packed_layout import Fillings
from shared.cache.packed_reader import Shape
from shared.cache.records import ContextScores, FloatArray, IdArray, IntArray
from shared.cache.unpacking import MAX_VALUES
from shared.spec import CaptureSpec

LOGP_BITS = 11  # significant bits of stored log-likelihoods
LOG_Z_BITS = 16
BLOCK_IDS = 1 << 16


@dataclass(frozen=True)
class TopK:
    """The topk lane of one draw in one context, without tail samples. `count_M`: teacher tokens of each masked chunk,
    None where the columns do not say.
    """

    ids: IdArray
    logp_MK: FloatArray
    log_z_MT: FloatArray
    count_M: IntArray | None = None

    @classmethod
    def of(cls, scores: ContextScores) -> TopK:
        """Those of a record.

        Raises:
            ValueError: there are none.
        """
        if scores.topk_ids is None or scores.topk_logp_MK is None or scores.log_z_MT is None:
            raise ValueError("the spec has a topk lane and the scores none")
        return cls(scores.topk_ids, scores.topk_logp_MK, scores.log_z_MT)


def round_significant(values: npt.ArrayLike, bits: int) -> npt.NDArray[np.float32]:
    """Finite float32 values rounded to nearest, ties to even, with `bits` significant bits (24 change nothing)."""
    raw = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    drop = np.uint32(24 - bits)
    if drop == 0:
        return raw.view(np.float32)
    half = (np.uint32(1) << (drop - np.uint32(1))) - np.uint32(1)
    rounded = raw + half + ((raw >> drop) & np.uint32(1))
    return (rounded & ~((np.uint32(1) << drop) - np.uint32(1))).view(np.float32)


def hot(spec: CaptureSpec) -> list[int]:
    """The columns of log_z_MT that are stored: all temperatures but 1, where log Z is 0."""
    return [i for i, t in enumerate(spec.temperatures) if t != 1.0]


def columns_of(spec: CaptureSpec, context: str) -> dict[str, pa.DataType]:
    """The columns of one context's topk lane, in order, without those of tail samples."""
    if spec.codec == "packed":
        return {f"{context}_topk_packed": pa.binary()}
    return {
        f"{context}_topk_ids": pa.list_(pa.int32()),
        f"{context}_topk_logp": pa.list_(pa.float32()),
        f"{context}_log_z": pa.list_(pa.float32()),
    }


def stored(spec: CaptureSpec, rows: Sequence[TopK]) -> list[TopK]:
    """What a reader gets back, to the bit; what is stored already stays what it is, also its first fillings alone.

    Raises:
        TidecacheError: a log Z beyond what the codec holds.
    """
    if spec.codec == "packed":
        return [row for block in _blocks([len(r.ids) for r in rows]) for row in _on_grid(spec, rows[block])]
    return [
        TopK(_ids(r), round_significant(r.logp_MK, LOGP_BITS), round_significant(r.log_z_MT, LOG_Z_BITS)) for r in rows
    ]


def to_columns(
    spec: CaptureSpec, context: str, rows: Sequence[TopK], counts: Sequence[IntArray]
) -> dict[str, pa.Array]:
    """The columns of all draws in one context; `rows` must be `stored` already, `counts` are the chunks' teacher tokens.

    Raises:
        TidecacheError: more values than a row or a file may have.
    """
    if spec.codec == "packed":
        data = [
            row for block in _blocks([len(r.ids) for r in rows]) for row in _packed(spec, rows[block], counts[block])
        ]
        return {f"{context}_topk_packed": pa.array(data, pa.binary())}
    arrays: dict[str, list[npt.NDArray[Any]]] = {
        "topk_ids": [r.ids for r in rows],
        "topk_logp": [r.logp_MK.reshape(-1) for r in rows],
        "log_z": [r.log_z_MT[:, hot(spec)].reshape(-1) for r in rows],
    }
    kinds = columns_of(spec, context)
    return {f"{context}_{name}": columns.lists(a, kinds[f"{context}_{name}"]) for name, a in arrays.items()}


def of_columns(
    spec: CaptureSpec, context: str, table: pa.Table, chunks: Sequence[int], tokens: Sequence[int]
) -> list[TopK]:
    """The inverse of `to_columns` for rows of which each has so many masked chunks and teacher tokens in them.

    Raises:
        ValueError: the columns are not what a writer writes.
    """
    if spec.codec == "packed":
        return _unpacked(spec, f"{context}_topk_packed", table, chunks, tokens)
    ids, id_stops = columns.flat(table, f"{context}_topk_ids")
    logp, logp_stops = columns.flat(table, f"{context}_topk_logp")
    log_z, log_z_stops = columns.flat(table, f"{context}_log_z")
    return [
        TopK(
            ids[id_stops[i] : id_stops[i + 1]],
            logp[logp_stops[i] : logp_stops[i + 1]].reshape(count, spec.k),
            _with_one(spec, log_z[log_z_stops[i] : log_z_stops[i + 1]].reshape(count, len(hot(spec)))),
        )
        for i, count in enumerate(chunks)
    ]


def _ids(topk: TopK) -> IdArray:
    return np.ascontiguousarray(topk.ids, dtype=np.int32)


def _levels(spec: CaptureSpec, rows: Sequence[TopK]) -> grid.Levels:
    log_z_MH = np.concatenate([r.log_z_MT[:, hot(spec)] for r in rows])
    return grid.quantise(np.concatenate([r.logp_MK for r in rows]), log_z_MH, [spec.temperatures[i] for i in hot(spec)])


def _blocks(ids: Sequence[int]) -> Iterator[slice]:
    """Rows to be coded together, by their numbers of ids: arrays that stay in a processor's cache, and none of the size
    of a file.
    """
    first = total = 0
    for row, size in enumerate(ids):
        if total and total + size > BLOCK_IDS:
            yield slice(first, row)
            first, total = row, 0
        total += size
    if first < len(ids):
        yield slice(first, len(ids))


def _on_grid(spec: CaptureSpec, rows: Sequence[TopK]) -> list[TopK]:
    levels = _levels(spec, rows)
    logp_MK, log_z_MT = levels.logp_MK, _with_one(spec, levels.log_z)
    stops = np.cumsum([len(r.logp_MK) for r in rows]).tolist()
    return [TopK(_ids(r), logp_MK[a:b], log_z_MT[a:b]) for r, a, b in zip(rows, [0, *stops[:-1]], stops, strict=True)]


def _packed(spec: CaptureSpec, rows: Sequence[TopK], counts: Sequence[IntArray]) -> list[bytes]:
    chunks_R = np.array([len(count_M) for count_M in counts], dtype=np.int64)
    ids = np.concatenate([r.ids for r in rows])
    fillings = Fillings(chunks_R, np.concatenate(counts), ids, _levels(spec, rows))
    return packed_writer.encode(fillings, spec.teacher.vocabulary)


def _unpacked(
    spec: CaptureSpec, name: str, table: pa.Table, chunks: Sequence[int], tokens: Sequence[int]
) -> list[TopK]:
    if spec.k * sum(tokens) > MAX_VALUES:
        raise ValueError(f"column {name}: {spec.k * sum(tokens)} ids, more than a file can have")
    data = columns.binaries(table, name)
    tokens_R, chunks_R = np.array(tokens, dtype=np.int64), np.array(chunks, dtype=np.int64)
    shape = Shape(spec.teacher.vocabulary, spec.k, len(hot(spec)), grid.step_of(spec.temperatures))
    rows: list[TopK] = []
    for block in _blocks((spec.k * tokens_R).tolist()):
        try:
            found = packed_reader.decode(data[block], shape, tokens_R[block], chunks_R[block])
        except ValueError:  # which row is it?
            for row in range(block.start, block.stop):
                try:
                    packed_reader.decode(data[row : row + 1], shape, tokens_R[row : row + 1], chunks_R[row : row + 1])
                except ValueError as error:
                    raise ValueError(f"column {name}, row {row}: {error}") from error
            raise
        logp_MK, log_z_MT = found.levels.logp_MK, _with_one(spec, found.levels.log_z)
        chunk_stops = np.cumsum(chunks_R[block]).tolist()
        id_stops = (spec.k * np.cumsum(tokens_R[block])).tolist()
        for a, b, c, d in zip([0, *chunk_stops], chunk_stops, [0, *id_stops], id_stops, strict=False):
            rows.append(TopK(found.ids[c:d], logp_MK[a:b], log_z_MT[a:b], found.count_M[a:b]))
    return rows


def _with_one(spec: CaptureSpec, log_z_MH: FloatArray) -> FloatArray:
    """log Z at all temperatures of the spec."""
    log_z_MT = np.zeros((len(log_z_MH), len(spec.temperatures)), dtype=np.float32)
    log_z_MT[:, hot(spec)] = log_z_MH
    return log_z_MT
