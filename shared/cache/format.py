"""Format v1, the tables: how documents and draws become Parquet columns and come back (docs/cache-format.md).

One documents row is one document, one likelihoods row is one (document, draw), both in document order. All columns but
the document's messages are plain numbers or lists of numbers, so that any Parquet reader can use them. Log-likelihoods
are float32 rounded to 11 significant bits, and zstd stores little more than those: half a unit in the last place is at
most 0.004 nats for values from −8 to −16, and never more than 2^-11 of the value. log Z keeps 16 bits, since the tail
mass is a small difference.

Shapes as in `shared.cache.records`. Columns of a context x: x_gold_logp, x_topk_ids, x_topk_logp, x_log_z, and with tail
samples x_tail_ids, x_tail_logp.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.cache.parquet import MAX_VALUES
from shared.cache.records import ContextScores, Draw, DrawRecord, StoredDocument
from shared.cache.vocabulary import TeacherVocabulary
from shared.documents import Chunks, Message, PreparedDocument
from shared.errors import TidecacheError
from shared.ragged import ranges
from shared.spec import CaptureSpec

LOGP_BITS = 11  # significant bits of stored log-likelihoods
LOG_Z_BITS = 16
DIGEST_BITS = 256

DOCUMENTS_SCHEMA = pa.schema(
    [
        ("document", pa.string()),
        ("position", pa.int64()),
        ("name", pa.string()),
        ("chat", pa.bool_()),
        ("cut", pa.bool_()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("trainable", pa.bool_())]))),
        ("chunk_message", pa.list_(pa.int32())),
        ("chunk_start", pa.list_(pa.int32())),
        ("chunk_stop", pa.list_(pa.int32())),
        ("token_count", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
    ]
)
DRAW_COLUMNS = ("document", "position", "draw", "timestep", "masked", "split")
VOCABULARY_SCHEMA = pa.schema([("id", pa.int32()), ("bytes", pa.binary()), ("special", pa.bool_())])


def context_columns(spec: CaptureSpec, context: str) -> dict[str, pa.DataType]:
    """The columns of one context's lanes, in order."""
    columns = {f"{context}_gold_logp": pa.list_(pa.float32())}
    if "topk" in spec.lanes:
        columns[f"{context}_topk_ids"] = pa.list_(pa.int32())
        columns[f"{context}_topk_logp"] = pa.list_(pa.float32())
        columns[f"{context}_log_z"] = pa.list_(pa.float32())
        if spec.tail_samples:
            columns[f"{context}_tail_ids"] = pa.list_(pa.int32())
            columns[f"{context}_tail_logp"] = pa.list_(pa.float32())
    return columns


def likelihoods_schema(spec: CaptureSpec) -> pa.Schema:
    """The columns of a likelihoods file under this spec."""
    fields: list[tuple[str, pa.DataType]] = [
        ("document", pa.string()),
        ("position", pa.int64()),
        ("draw", pa.int32()),
        ("timestep", pa.float32()),
        ("masked", pa.list_(pa.bool_())),
        ("split", pa.list_(pa.bool_())),
    ]
    return pa.schema([*fields, *(c for x in spec.contexts for c in context_columns(spec, x).items())])


def round_significant(values: npt.ArrayLike, bits: int) -> npt.NDArray[np.float32]:
    """Finite float32 values rounded to nearest, ties to even, with `bits` significant bits (24 change nothing)."""
    raw = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    drop = np.uint32(24 - bits)
    if drop == 0:
        return raw.view(np.float32)
    half = (np.uint32(1) << (drop - np.uint32(1))) - np.uint32(1)
    rounded = raw + half + ((raw >> drop) & np.uint32(1))
    return (rounded & ~((np.uint32(1) << drop) - np.uint32(1))).view(np.float32)


def stored_scores(spec: CaptureSpec, scores: ContextScores) -> ContextScores:
    """The scores as a file of a cache with this spec will hold them: what a reader gets back, to the bit."""
    if "topk" not in spec.lanes:
        return ContextScores(round_significant(scores.gold_logp_N, LOGP_BITS))
    if scores.topk_ids is None or scores.topk_logp_MK is None or scores.log_z_MT is None:
        raise ValueError("the spec has a topk lane and the scores none")
    return ContextScores(
        gold_logp_N=round_significant(scores.gold_logp_N, LOGP_BITS),
        log_z_MT=round_significant(scores.log_z_MT, LOG_Z_BITS),
        topk_ids=np.ascontiguousarray(scores.topk_ids, dtype=np.int32),
        topk_logp_MK=round_significant(scores.topk_logp_MK, LOGP_BITS),
        tail_ids=None if scores.tail_ids is None else np.ascontiguousarray(scores.tail_ids, dtype=np.int32),
        tail_logp=None if scores.tail_logp is None else round_significant(scores.tail_logp, LOGP_BITS),
    )


# --- to tables ---------------------------------------------------------------------------------------------------


def stored_document(position: int, document: PreparedDocument) -> StoredDocument:
    """What the cache keeps of a prepared document."""
    first_C, stop_C = document.teacher.token_ranges(document.chunks)
    count_C = (stop_C - first_C).astype(np.int64)
    index_N = ranges(first_C, count_C)
    return StoredDocument(
        key=document.key,
        name=document.name,
        position=position,
        messages=document.messages,
        chat=document.chat,
        cut=document.cut,
        chunks=document.chunks,
        token_ids_N=document.teacher.ids_L[index_N].astype(np.int32),
        token_count_C=count_C,
    )


def _lists(arrays: Sequence[npt.NDArray[Any]], kind: pa.DataType) -> pa.Array:
    """A list column with one row per array."""
    lengths = np.array([len(a) for a in arrays], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if offsets[-1] > MAX_VALUES:
        raise TidecacheError(
            f"a shard has {offsets[-1]} values in one column, at most {MAX_VALUES} fit: capture with a smaller "
            f"--documents-per-shard"
        )
    values = np.concatenate(arrays) if arrays else np.zeros(0)
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array(values.astype(kind.value_type.to_pandas_dtype()))
    )


def documents_table(documents: Sequence[StoredDocument]) -> pa.Table:
    """The documents file's table, in the order given."""
    messages = [
        [{"role": m.role, "content": m.content, "trainable": m.trainable} for m in d.messages] for d in documents
    ]
    columns: dict[str, Any] = {
        "document": [d.key for d in documents],
        "position": [d.position for d in documents],
        "name": [d.name for d in documents],
        "chat": [d.chat for d in documents],
        "cut": [d.cut for d in documents],
        "messages": messages,
        "chunk_message": _lists([d.chunks.message_C for d in documents], pa.list_(pa.int32())),
        "chunk_start": _lists([d.chunks.start_C for d in documents], pa.list_(pa.int32())),
        "chunk_stop": _lists([d.chunks.stop_C for d in documents], pa.list_(pa.int32())),
        "token_count": _lists([d.token_count_C for d in documents], pa.list_(pa.int32())),
        "token_ids": _lists([d.token_ids_N for d in documents], pa.list_(pa.int32())),
    }
    return pa.table(columns, schema=DOCUMENTS_SCHEMA)


def likelihoods_table(spec: CaptureSpec, draws: Sequence[tuple[StoredDocument, DrawRecord]]) -> pa.Table:
    """The likelihoods file's table; the records' scores must be `stored_scores` already."""
    schema = likelihoods_schema(spec)
    columns: dict[str, Any] = {
        "document": [d.key for d, _ in draws],
        "position": [d.position for d, _ in draws],
        "draw": [r.draw for _, r in draws],
        "timestep": np.array([r.timestep for _, r in draws], dtype=np.float32),
        "masked": _lists([r.masked_C for _, r in draws], pa.list_(pa.bool_())),
        "split": _lists([r.split_M for _, r in draws], pa.list_(pa.bool_())),
    }
    for context in spec.contexts:
        arrays = [_context_arrays(spec, r.contexts[context]) for _, r in draws]
        for name, kind in context_columns(spec, context).items():
            columns[name] = _lists([a[name.removeprefix(f"{context}_")] for a in arrays], kind)
    return pa.table(columns, schema=schema)


def _context_arrays(spec: CaptureSpec, scores: ContextScores) -> dict[str, npt.NDArray[Any]]:
    """Flat arrays by column, without the context's prefix. log Z leaves out T = 1, where it is 0."""
    arrays: dict[str, npt.NDArray[Any]] = {"gold_logp": scores.gold_logp_N}
    if scores.topk_ids is not None and scores.topk_logp_MK is not None and scores.log_z_MT is not None:
        arrays["topk_ids"] = scores.topk_ids
        arrays["topk_logp"] = scores.topk_logp_MK.reshape(-1)
        arrays["log_z"] = scores.log_z_MT[:, _hot(spec)].reshape(-1)
    if scores.tail_ids is not None and scores.tail_logp is not None:
        arrays["tail_ids"] = scores.tail_ids
        arrays["tail_logp"] = scores.tail_logp
    return arrays


def _hot(spec: CaptureSpec) -> list[int]:
    """The columns of log_z_MT that are stored: all temperatures but 1."""
    return [i for i, t in enumerate(spec.temperatures) if t != 1.0]


def vocabulary_table(vocabulary: TeacherVocabulary) -> pa.Table:
    """One row per id, in order."""
    ids = np.arange(len(vocabulary), dtype=np.int32)
    return pa.table(
        {"id": ids, "bytes": list(vocabulary.token_bytes), "special": vocabulary.special_V}, schema=VOCABULARY_SCHEMA
    )


# --- from tables -------------------------------------------------------------------------------------------------


def _flat(table: pa.Table, name: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """(values of all rows, row offsets) of a list column; no copy per row."""
    column = table[name].combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # pyarrow keeps the type for columns without chunks
        column = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    if column.null_count:
        raise ValueError(f"column {name}: expected a list in every row, found nulls")
    offsets = column.offsets.to_numpy().astype(np.int64)
    values = column.values.slice(offsets[0], offsets[-1] - offsets[0])
    if values.null_count:
        raise ValueError(f"column {name}: expected numbers, found nulls")
    return values.to_numpy(zero_copy_only=False), offsets - offsets[0]


def documents_of(table: pa.Table) -> list[StoredDocument]:
    """The stored documents, in the file's order."""
    flat = {n: _flat(table, n) for n in ("chunk_message", "chunk_start", "chunk_stop", "token_count", "token_ids")}

    def row(name: str, i: int, kind: Any) -> npt.NDArray[Any]:
        values, offsets = flat[name]
        return values[offsets[i] : offsets[i + 1]].astype(kind)

    plain = table.select(["document", "position", "name", "chat", "cut", "messages"]).to_pylist()
    return [
        StoredDocument(
            key=d["document"],
            name=d["name"],
            position=d["position"],
            messages=tuple(Message(m["role"], m["content"], m["trainable"]) for m in d["messages"]),
            chat=d["chat"],
            cut=d["cut"],
            chunks=Chunks(
                row("chunk_message", i, np.int64), row("chunk_start", i, np.int64), row("chunk_stop", i, np.int64)
            ),
            token_ids_N=row("token_ids", i, np.int32),
            token_count_C=row("token_count", i, np.int64),
        )
        for i, d in enumerate(plain)
    ]


def draws_of(
    table: pa.Table,
    spec: CaptureSpec,
    documents: Mapping[str, StoredDocument],
    context: str,
    vocabulary: TeacherVocabulary,
) -> list[Draw]:
    """The draws, in the file's order. A row's arrays are slices of the whole column's."""
    names = ["masked", "split", *(c for x in spec.contexts for c in context_columns(spec, x))]
    flat = {name: _flat(table, name) for name in names}
    draws = []
    plain = table.select(["document", "draw", "timestep"]).to_pylist()
    for i, head in enumerate(plain):
        row = {name: values[offsets[i] : offsets[i + 1]] for name, (values, offsets) in flat.items()}
        chunks = np.flatnonzero(row["masked"])
        draws.append(
            Draw(
                document=head["document"],
                stored=documents[head["document"]],
                draw=head["draw"],
                timestep=head["timestep"],
                chunks=chunks,
                split=row["split"],
                scores={x: _scores_of(spec, x, row, len(chunks)) for x in spec.contexts},
                context=context,
                vocabulary=vocabulary,
            )
        )
    return draws


def _scores_of(spec: CaptureSpec, context: str, row: Mapping[str, npt.NDArray[Any]], count: int) -> ContextScores:
    """One context's scores of a row with `count` masked chunks."""
    gold_logp_N = row[f"{context}_gold_logp"]
    if "topk" not in spec.lanes:
        return ContextScores(gold_logp_N)
    log_z_MT = np.zeros((count, len(spec.temperatures)), dtype=np.float32)
    log_z_MT[:, _hot(spec)] = row[f"{context}_log_z"].reshape(count, len(_hot(spec)))
    return ContextScores(
        gold_logp_N=gold_logp_N,
        log_z_MT=log_z_MT,
        topk_ids=row[f"{context}_topk_ids"],
        topk_logp_MK=row[f"{context}_topk_logp"].reshape(count, spec.k),
        tail_ids=row[f"{context}_tail_ids"] if spec.tail_samples else None,
        tail_logp=row[f"{context}_tail_logp"] if spec.tail_samples else None,
    )


# --- content digests ---------------------------------------------------------------------------------------------


class _Frames:
    """BLAKE2b over parts, each preceded by its length, so that no two sequences of parts run together."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=DIGEST_BITS // 8)

    def add(self, part: bytes) -> None:
        self._hash.update(len(part).to_bytes(8, "little"))
        self._hash.update(part)

    def digest(self) -> bytes:
        return self._hash.digest()


def document_digest(document: StoredDocument) -> bytes:
    """32 bytes for all that a documents row says but its name and position."""
    frames = _Frames()
    messages = [[m.role, m.content, m.trainable] for m in document.messages]
    head = [document.key, document.chat, document.cut, messages]
    frames.add(json.dumps(head, ensure_ascii=True, separators=(",", ":")).encode())
    chunks = document.chunks
    for array in (chunks.message_C, chunks.start_C, chunks.stop_C, document.token_count_C, document.token_ids_N):
        frames.add(array.astype("<i4").tobytes())
    return frames.digest()


def draw_digest(
    spec: CaptureSpec,
    document: bytes,
    draw: int,
    timestep: float,
    masked_C: npt.NDArray[np.bool_],
    split_M: npt.NDArray[np.bool_],
    contexts: Mapping[str, ContextScores],
) -> int:
    """A number below 2^256 for one likelihoods row, its document's digest included; `contexts` as stored."""
    frames = _Frames()
    frames.add(document)
    frames.add(np.array([draw], dtype="<i4").tobytes())
    frames.add(np.array([timestep], dtype="<f4").tobytes())
    frames.add(masked_C.astype("u1").tobytes())
    frames.add(split_M.astype("u1").tobytes())
    for context in sorted(contexts):
        for name, array in _context_arrays(spec, contexts[context]).items():
            frames.add(f"{context}_{name}".encode())
            frames.add(array.astype("<i4" if name.endswith("_ids") else "<f4").tobytes())
    return int.from_bytes(frames.digest(), "little")


def content_of(spec: CaptureSpec, rows: Sequence[tuple[StoredDocument, DrawRecord]]) -> str:
    """The content digest of some rows; the records' scores must be `stored_scores` already."""
    digests = {d.key: document_digest(d) for d in {d.key: d for d, _ in rows}.values()}
    return sum_digests(
        [draw_digest(spec, digests[d.key], r.draw, r.timestep, r.masked_C, r.split_M, r.contexts) for d, r in rows]
    )


def sum_digests(digests: Sequence[int]) -> str:
    """The content digest of a set of rows: their sum modulo 2^256 as 64 hexadecimal digits, whatever their order."""
    return f"{sum(digests) % (1 << DIGEST_BITS):064x}"
