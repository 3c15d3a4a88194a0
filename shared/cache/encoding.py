"""A shard as bytes: what a teacher said about a range of documents and draws, checked, counted and encoded.

Encoding needs the spec alone and no folder: so it may happen on another machine than the one that commits the shard
(`shared.cache.writer`), and nothing is lost with a machine but the shards that it had not yet handed over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shared.cache import format
from shared.cache.manifest import SHARDS_FOLDER, FileRecord, Receipt
from shared.cache.parquet import encode
from shared.cache.records import ContextScores, DrawRecord, ShardRange, StoredDocument
from shared.cache.statistics import ContextStatistics, count_shard, shard_statistics
from shared.documents import Dropped, PreparedDocument
from shared.errors import TidecacheError
from shared.spec import FORMAT_VERSION, CaptureSpec

MAX_SHARD_BYTES = 64_000_000  # a shard is read whole (DESIGN §2)


@dataclass(frozen=True)
class EncodedShard:
    """Files and receipt of a shard, as a cache that holds nothing of its range would get them."""

    receipt: Receipt
    files: tuple[tuple[FileRecord, bytes], ...]  # the documents' file, then the likelihoods'
    documents_content: str  # digest of the documents, whatever wrote their file


def encode_shard(
    spec: CaptureSpec,
    shard: ShardRange,
    documents: Sequence[tuple[int, PreparedDocument]],
    dropped: Sequence[tuple[int, Dropped]],
    draws: Sequence[DrawRecord],
    corpus_digest: str,
    batch_tokens: int,
) -> EncodedShard:
    """`documents` and `dropped` with their positions, every draw of the range for every document.

    The statistics of the footer are computed here.

    Raises:
        TidecacheError: NaN or positive log-likelihoods, or a shard above `MAX_SHARD_BYTES`.
        ValueError: records that do not fit their documents or the range (a defect of the caller).
    """
    stored = [format.stored_document(p, d) for p, d in sorted(documents, key=lambda item: item[0])]
    return encode_stored(spec, shard, stored, dropped, draws, corpus_digest, batch_tokens)


def encode_stored(
    spec: CaptureSpec,
    shard: ShardRange,
    stored: Sequence[StoredDocument],
    dropped: Sequence[tuple[int, Dropped]],
    draws: Sequence[DrawRecord],
    corpus_digest: str,
    batch_tokens: int,
    statistics: Mapping[str, ContextStatistics] | None = None,
) -> EncodedShard:
    """`encode_shard` for documents as a cache holds them, in order of position, as one cache is made of another.

    `statistics`: those of the footer, where the exact scores that they come from are not at hand.
    """
    rows = _rows(spec, shard, stored, draws)
    documents_file, documents_content = encode_documents(spec, shard, stored, sorted(dropped, key=lambda item: item[0]))
    likelihoods_file, content = _likelihoods_file(spec, shard, rows, batch_tokens, statistics)
    receipt = Receipt(
        range=shard,
        fingerprint=spec.fingerprint,
        corpus=corpus_digest,
        batch_tokens=batch_tokens,
        documents=documents_file[0],
        likelihoods=(likelihoods_file[0],),
        counts=count_shard(stored, dropped, [(d, r.timestep, r.masked_C) for d, r in rows]),
        content=content,
    )
    refuse_large(shard, len(stored), documents_file[0].size_bytes + likelihoods_file[0].size_bytes)
    return EncodedShard(receipt, (documents_file, likelihoods_file), documents_content)


def encode_documents(
    spec: CaptureSpec,
    shard: ShardRange,
    documents: Sequence[StoredDocument],
    dropped: Sequence[tuple[int, Dropped]],
) -> tuple[tuple[FileRecord, bytes], str]:
    """A shard's documents file, which needs no teacher: ((record, bytes), the sum of the documents' digests)."""
    path = f"{SHARDS_FOLDER}/{shard.documents_name}.documents.parquet"
    content = format.sum_digests([int.from_bytes(format.document_digest(d), "little") for d in documents])
    table = format.documents_table(documents)
    reasons = [[position, d.key, d.name, d.reason, d.detail] for position, d in dropped]
    data = encode(table, {**footer(spec, shard), "content": content, "dropped": reasons})
    return (FileRecord.of(path, data, len(documents), table.column_names), data), content


def _likelihoods_file(
    spec: CaptureSpec,
    shard: ShardRange,
    rows: Sequence[tuple[StoredDocument, DrawRecord]],
    batch_tokens: int,
    statistics: Mapping[str, ContextStatistics] | None,
) -> tuple[tuple[FileRecord, bytes], str]:
    """((record, bytes), the sum of the rows' digests)."""
    by_context = {x: format.all_stored_scores(spec, [r.contexts[x] for _, r in rows]) for x in spec.contexts}
    scores = [{x: by_context[x][i] for x in spec.contexts} for i in range(len(rows))]
    statistics = statistics or shard_statistics(spec, rows, scores)
    rounded = [
        (d, DrawRecord(r.position, r.draw, r.timestep, r.masked_C, r.split_M, s))
        for (d, r), s in zip(rows, scores, strict=True)
    ]
    table = format.likelihoods_table(spec, rounded)
    metadata = {
        **footer(spec, shard),
        "draws": [shard.first_draw, shard.draw_stop],
        "batch_tokens": batch_tokens,
        "statistics": {context: s.to_json() for context, s in statistics.items()},
    }
    data = encode(table, metadata)
    path = f"{SHARDS_FOLDER}/{shard.name}.likelihoods.parquet"
    return (FileRecord.of(path, data, len(rows), table.column_names), data), format.content_of(spec, rounded)


def footer(spec: CaptureSpec, shard: ShardRange) -> dict[str, object]:
    """What all data files of a shard say in their footers."""
    return {
        "format": FORMAT_VERSION,
        "spec": spec.to_json(),
        "fingerprint": spec.fingerprint,
        "documents": [shard.first_document, shard.document_stop],
    }


def _rows(
    spec: CaptureSpec, shard: ShardRange, documents: Sequence[StoredDocument], draws: Sequence[DrawRecord]
) -> list[tuple[StoredDocument, DrawRecord]]:
    """(document, draw) in document order, each exactly once, all shapes and values checked."""
    by_position = {d.position: d for d in documents}
    if len({d.key for d in documents}) != len(documents):
        raise ValueError("the same document twice in one shard: deduplicate the corpus first")
    if any(not shard.first_document <= p < shard.document_stop for p in by_position):
        raise ValueError(f"a document outside of {shard}")
    rows = sorted(draws, key=lambda r: (r.position, r.draw))
    expected = [(p, k) for p in sorted(by_position) for k in range(shard.first_draw, shard.draw_stop)]
    if [(r.position, r.draw) for r in rows] != expected:
        raise ValueError(f"expected every draw of {shard} for each document exactly once")
    for record in rows:
        check_draw(spec, by_position[record.position], record)
    return [(by_position[r.position], r) for r in rows]


def check_draw(spec: CaptureSpec, document: StoredDocument, record: DrawRecord) -> None:
    """Check that a record fits its document and the spec, and that its scores are likelihoods.

    Raises:
        TidecacheError: NaN or positive log-likelihoods.
        ValueError: other shapes, contexts or lanes than the spec's (a defect of the caller).
    """
    chunks = int(record.masked_C.sum())
    tokens = int(document.token_count_C[record.masked_C].sum()) if len(record.masked_C) == len(document.chunks) else -1
    if tokens < 0 or len(record.split_M) != chunks or set(record.contexts) != set(spec.contexts):
        raise ValueError(f"draw {record.draw} of {document.key}: masks, splits or contexts do not fit the document")
    for context, scores in record.contexts.items():
        _check_scores(
            spec,
            f"draw {record.draw} of document {document.name} ({document.key}), context {context}",
            scores,
            chunks,
            tokens,
            int((document.token_count_C[record.masked_C] == 1).sum()),
        )


def _check_scores(spec: CaptureSpec, where: str, scores: ContextScores, chunks: int, tokens: int, single: int) -> None:
    """`single`: masked chunks of one token."""
    shapes = [scores.gold_logp_N.shape == (tokens,)]
    logps = [scores.gold_logp_N]
    if "topk" in spec.lanes:
        if scores.topk_ids is None or scores.topk_logp_MK is None or scores.log_z_MT is None:
            raise ValueError(f"{where}: the spec has a topk lane and the record none")
        shapes += [
            scores.topk_ids.shape == (spec.k * tokens,),
            scores.topk_logp_MK.shape == (chunks, spec.k),
            scores.log_z_MT.shape == (chunks, len(spec.temperatures)),
        ]
        logps.append(scores.topk_logp_MK)
        if (scores.tail_ids is None) == bool(spec.tail_samples):
            raise ValueError(f"{where}: the spec says {spec.tail_samples} tail samples, the record otherwise")
        if scores.tail_ids is not None and scores.tail_logp is not None:
            shapes += [tail.shape == (spec.tail_samples * single,) for tail in (scores.tail_ids, scores.tail_logp)]
            logps.append(scores.tail_logp)
        if not np.isfinite(scores.log_z_MT).all():
            raise TidecacheError(
                f"{where}: the teacher {spec.teacher.name} gave log Z that is not finite: check its weights and dtype"
            )
    elif scores.topk_ids is not None:
        raise ValueError(f"{where}: the record has a topk lane and the spec none")
    if not all(shapes):
        raise ValueError(f"{where}: scores of the wrong shape")
    for logp in logps:
        if not np.isfinite(logp).all() or (logp > 1e-3).any():
            found = "NaN or infinite" if not np.isfinite(logp).all() else "positive"
            raise TidecacheError(
                f"{where}: the teacher {spec.teacher.name} gave {found} log-likelihoods: check its weights and dtype"
            )


def refuse_large(shard: ShardRange, documents: int, size_bytes: int) -> None:
    """Readers hold a few whole shards in memory, so no shard may be large; what is complete already stays.

    Raises:
        TidecacheError: it is.
    """
    if size_bytes > MAX_SHARD_BYTES:
        fewer = max(1, documents * MAX_SHARD_BYTES // (2 * size_bytes))
        raise TidecacheError(
            f"shard {shard.name} would have {size_bytes:,} bytes, more than {MAX_SHARD_BYTES:,}: run the capture again "
            f"with --documents-per-shard {fewer}; it goes on from what is complete"
        )
