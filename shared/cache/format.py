"""Format v1, the tables: how documents and draws become Parquet columns and come back (docs/cache-format.md).

One documents row is one document, one likelihoods row is one (document, draw), both in document order. All columns but
the document's messages are plain numbers or lists of numbers, so that any Parquet reader can use them; so is the topk
lane, unless it is packed (`shared.cache.codec`).

Shapes as in `shared.cache.records`. Columns of a context x: x_gold_logp, those of the topk lane's codec, and with tail
samples x_tail_ids, x_tail_logp.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.cache import codec
from shared.cache.codec import LOGP_BITS, TopK, round_significant
from shared.cache.columns import flat, lists
from shared.cache.consistency import check_draws
from shared.cache.records import ContextScores, Draw, DrawRecord, FloatArray, IdArray, IntArray, StoredDocument
from shared.cache.vocabulary import TeacherVocabulary
from shared.documents import Chunks, Message, PreparedDocument
from shared.ragged import ranges
from shared.spec import CaptureSpec

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
        columns |= codec.columns_of(spec, context)
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


def stored_scores(spec: CaptureSpec, scores: ContextScores) -> ContextScores:
    """The scores as a file of a cache with this spec will hold them: what a reader gets back, to the bit. What is stored
    already stays what it is.

    Raises:
        TidecacheError: values that the spec's codec cannot hold.
    """
    return all_stored_scores(spec, [scores])[0]


def all_stored_scores(spec: CaptureSpec, scores: Sequence[ContextScores]) -> list[ContextScores]:
    """`stored_scores` of many draws, which is faster together."""
    gold = [round_significant(s.gold_logp_N, LOGP_BITS) for s in scores]
    if "topk" not in spec.lanes:
        return [ContextScores(gold_logp_N) for gold_logp_N in gold]
    return [
        ContextScores(
            gold_logp_N=gold_logp_N,
            log_z_MT=topk.log_z_MT,
            topk_ids=topk.ids,
            topk_logp_MK=topk.logp_MK,
            tail_ids=None if s.tail_ids is None else np.ascontiguousarray(s.tail_ids, dtype=np.int32),
            tail_logp=None if s.tail_logp is None else round_significant(s.tail_logp, LOGP_BITS),
        )
        for s, gold_logp_N, topk in zip(scores, gold, codec.stored(spec, [TopK.of(s) for s in scores]), strict=True)
    ]


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
        "chunk_message": lists([d.chunks.message_C for d in documents], pa.list_(pa.int32())),
        "chunk_start": lists([d.chunks.start_C for d in documents], pa.list_(pa.int32())),
        "chunk_stop": lists([d.chunks.stop_C for d in documents], pa.list_(pa.int32())),
        "token_count": lists([d.token_count_C for d in documents], pa.list_(pa.int32())),
        "token_ids": lists([d.token_ids_N for d in documents], pa.list_(pa.int32())),
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
        "masked": lists([r.masked_C for _, r in draws], pa.list_(pa.bool_())),
        "split": lists([r.split_M for _, r in draws], pa.list_(pa.bool_())),
    }
    counts = [d.token_count_C[r.masked_C] for d, r in draws]
    for context in spec.contexts:
        scores = [r.contexts[context] for _, r in draws]
        if "topk" in spec.lanes:
            columns |= codec.to_columns(spec, context, [TopK.of(s) for s in scores], counts)
        arrays = [_context_arrays(spec, s) for s in scores]
        for name, kind in context_columns(spec, context).items():
            if name not in columns:
                columns[name] = lists([a[name.removeprefix(f"{context}_")] for a in arrays], kind)
    return pa.table(columns, schema=schema)


def _context_arrays(spec: CaptureSpec, scores: ContextScores) -> dict[str, npt.NDArray[Any]]:
    """Flat arrays by column, without the context's prefix. log Z leaves out T = 1, where it is 0."""
    arrays: dict[str, npt.NDArray[Any]] = {"gold_logp": scores.gold_logp_N}
    if scores.topk_ids is not None and scores.topk_logp_MK is not None and scores.log_z_MT is not None:
        arrays["topk_ids"] = scores.topk_ids
        arrays["topk_logp"] = scores.topk_logp_MK.reshape(-1)
        arrays["log_z"] = scores.log_z_MT[:, codec.hot(spec)].reshape(-1)
    if scores.tail_ids is not None and scores.tail_logp is not None:
        arrays["tail_ids"] = scores.tail_ids
        arrays["tail_logp"] = scores.tail_logp
    return arrays


def vocabulary_table(vocabulary: TeacherVocabulary) -> pa.Table:
    """One row per id, in order."""
    ids = np.arange(len(vocabulary), dtype=np.int32)
    return pa.table(
        {"id": ids, "bytes": list(vocabulary.token_bytes), "special": vocabulary.special_V}, schema=VOCABULARY_SCHEMA
    )


# --- from tables -------------------------------------------------------------------------------------------------


def documents_of(table: pa.Table) -> list[StoredDocument]:
    """The stored documents, in the file's order."""
    names = ("chunk_message", "chunk_start", "chunk_stop", "token_count", "token_ids")
    found = {name: flat(table, name) for name in names}

    def row(name: str, i: int, kind: Any) -> npt.NDArray[Any]:
        values, offsets = found[name]
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
    """The draws, in the file's order, checked. A row's arrays are slices of the whole column's, where columns are plain.

    Raises:
        ValueError: the columns do not fit each other, or the documents.
    """
    table = table.combine_chunks()  # once for all that follows
    heads = table.select(["document", "draw", "timestep"]).to_pylist()
    check_draws(spec, documents, table, [head["document"] for head in heads])
    masked, masked_stops = flat(table, "masked")
    split, split_stops = flat(table, "split")
    chunk_numbers = [np.flatnonzero(masked[a:b]) for a, b in itertools.pairwise(masked_stops)]
    counts = [len(chunks) for chunks in chunk_numbers]
    scores = {x: _scores_of(spec, x, table, counts) for x in spec.contexts}
    draws = []
    for i, head in enumerate(heads):
        stored = documents[head["document"]]
        for x in spec.contexts:
            count_M = scores[x][i][1]
            if count_M is not None and not np.array_equal(count_M, stored.token_count_C[chunk_numbers[i]]):
                raise ValueError(f"row {i}: other tokens per chunk in {x} than its document has")
        draws.append(
            Draw(
                document=head["document"],
                stored=stored,
                draw=head["draw"],
                timestep=head["timestep"],
                chunks=chunk_numbers[i],
                split=split[split_stops[i] : split_stops[i + 1]],
                scores={x: scores[x][i][0] for x in spec.contexts},
                context=context,
                vocabulary=vocabulary,
            )
        )
    return draws


def _scores_of(
    spec: CaptureSpec, context: str, table: pa.Table, counts: Sequence[int]
) -> list[tuple[ContextScores, IntArray | None]]:
    """One context's scores of each row, which has so many masked chunks; and their teacher tokens if its columns say."""
    gold, stops = flat(table, f"{context}_gold_logp")
    gold_N = [gold[a:b] for a, b in itertools.pairwise(stops)]
    if "topk" not in spec.lanes:
        return [(ContextScores(gold_logp_N), None) for gold_logp_N in gold_N]
    topk = codec.of_columns(spec, context, table, counts, np.diff(stops).tolist())
    tails: list[tuple[IdArray | None, FloatArray | None]] = [(None, None)] * len(topk)
    if spec.tail_samples:
        ids, id_stops = flat(table, f"{context}_tail_ids")
        logp, logp_stops = flat(table, f"{context}_tail_logp")
        bounds = zip(itertools.pairwise(id_stops), itertools.pairwise(logp_stops), strict=True)
        tails = [(ids[a:b], logp[c:d]) for (a, b), (c, d) in bounds]
    return [
        (ContextScores(gold_logp_N, t.log_z_MT, t.ids, t.logp_MK, tail_ids, tail_logp), t.count_M)
        for gold_logp_N, t, (tail_ids, tail_logp) in zip(gold_N, topk, tails, strict=True)
    ]


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
