"""The writer: creates a cache or goes on with one, and commits shards so that each is complete or absent.

A shard's data files are written first, then its receipt; the manifest follows from all receipts. So a kill at any
instant loses at most the shard in work, and the same capture goes on from there. Several processes may work in one
folder on different shards, or by mistake on the same ones: names depend on the range alone and bytes on the content
alone, so the later of two equal shards changes nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shared.cache import files, format
from shared.cache.manifest import (
    HELD_OUT_FOLDER,
    MANIFEST_FILE,
    SHARDS_FOLDER,
    FileRecord,
    Manifest,
    Receipt,
    derive,
    read_manifest,
    read_receipt,
    seal,
    write_receipt,
)
from shared.cache.parquet import encode, footer_of, open_parquet
from shared.cache.records import ContextScores, DrawRecord, ShardRange, StoredDocument
from shared.cache.statistics import count_shard, shard_statistics
from shared.cache.vocabulary import VOCABULARY_FILE, TeacherVocabulary
from shared.documents import Dropped, PreparedDocument
from shared.errors import TidecacheError
from shared.spec import FORMAT_VERSION, CaptureSpec, differences

MANIFEST_SHARE = 0.05  # at most this share of the time goes into writing the manifest again after each shard
COMMIT_ATTEMPTS = 5
MAX_SHARD_BYTES = 64_000_000  # a shard is read whole (DESIGN §2)


class CacheWriter:
    """Writes shards into one folder. Use `open`; one writer per thread."""

    def __init__(self, folder: Path, spec: CaptureSpec, vocabulary: FileRecord, widened_from: tuple[str, ...]) -> None:
        self.folder = folder
        self.spec = spec
        self._vocabulary = vocabulary
        self._widened_from = widened_from
        self._receipts: dict[str, tuple[tuple[int, int], Receipt]] = {}  # by name, with the file's time and inode
        self._manifest_seconds = 0.0
        self._manifest_written = float("-inf")

    @classmethod
    def open(cls, folder: str | Path, spec: CaptureSpec, vocabulary: TeacherVocabulary) -> CacheWriter:
        """Create the cache, or go on with the one that is there; leftovers of dead processes are removed.

        Raises:
            TidecacheError: the folder holds another spec (every differing field is named), a newer format, or something
                that is no cache; the vocabulary is not the spec's.
        """
        root = Path(folder)
        if vocabulary.digest != spec.teacher.tokenizer or len(vocabulary) < spec.teacher.vocabulary:
            raise ValueError("the vocabulary is not the spec's")
        table = format.vocabulary_table(vocabulary)
        data = encode(table, {"format": FORMAT_VERSION, "name": vocabulary.name, "tokenizer": vocabulary.digest})
        record = FileRecord.of(VOCABULARY_FILE, data, len(vocabulary), table.column_names)
        if not (root / MANIFEST_FILE).exists():
            _refuse_foreign_folder(root)
            files.write(root, VOCABULARY_FILE, data)
            first = derive(spec, record, ())
            files.write(root, MANIFEST_FILE, seal(first.to_json()), exclusive=True)
        existing = read_manifest(root)
        if changed := differences(spec, existing.spec):
            fields = "; ".join(
                f"{name}: the cache has {theirs!r}, this capture {ours!r}" for name, ours, theirs in changed
            )
            raise TidecacheError(
                f"{root} holds a cache with another spec ({fields}): give another --out, or the same settings"
            )
        for name in ("", SHARDS_FOLDER):
            files.remove_leftovers(root / name)
        writer = cls(root, spec, existing.vocabulary, existing.widened_from)
        writer.finish()
        return writer

    @property
    def completed(self) -> tuple[Receipt, ...]:
        """The receipts of all complete shards now in the folder, other processes' too, in order."""
        folder = self.folder / SHARDS_FOLDER
        found = {}
        if folder.is_dir():
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.endswith(".json") and not entry.name.startswith("."):
                        stat = entry.stat()
                        found[f"{SHARDS_FOLDER}/{entry.name}"] = (stat.st_mtime_ns, stat.st_ino)
        for name, state in found.items():
            if name not in self._receipts or self._receipts[name][0] != state:
                self._receipts[name] = (state, read_receipt(self.folder, name))
        self._receipts = {name: self._receipts[name] for name in found}
        return tuple(sorted((r for _, r in self._receipts.values()), key=lambda r: r.range))

    def write_shard(
        self,
        shard: ShardRange,
        documents: Sequence[tuple[int, PreparedDocument]],
        dropped: Sequence[tuple[int, Dropped]],
        draws: Sequence[DrawRecord],
        corpus_digest: str,
        batch_tokens: int,
    ) -> Receipt:
        """Commit one shard: `documents` and `dropped` with their positions, every draw of the range for every document.

        A shard that is there already stays as it is. The statistics of the footer are computed here.

        Raises:
            TidecacheError: NaN or positive log-likelihoods, a full disk, a shard above `MAX_SHARD_BYTES` or overlapping
                another, or documents that differ from those stored at these positions.
            ValueError: records that do not fit their documents or the range (a defect of the caller).
        """
        completed = self.completed
        for receipt in completed:
            if receipt.range == shard:
                return receipt
            if receipt.range.overlaps(shard):
                raise TidecacheError(
                    f"{self.folder / receipt.path} holds some of the draws of {shard.name} already: another "
                    f"process works here with another --documents-per-shard; stop one of the two and run the capture "
                    f"again"
                )
        stored = [format.stored_document(p, d) for p, d in sorted(documents, key=lambda item: item[0])]
        rows = _rows(self.spec, shard, stored, draws)
        documents_file = self._documents_file(shard, stored, sorted(dropped, key=lambda item: item[0]), completed)
        likelihoods_file, content = self._likelihoods_file(shard, rows, batch_tokens)
        receipt = Receipt(
            range=shard,
            fingerprint=self.spec.fingerprint,
            corpus=corpus_digest,
            batch_tokens=batch_tokens,
            documents=documents_file[0],
            likelihoods=(likelihoods_file[0],),
            counts=count_shard(stored, dropped, [(d, r.timestep, r.masked_C) for d, r in rows]),
            content=content,
        )
        _refuse_large(shard, len(stored), documents_file[0].size_bytes + likelihoods_file[0].size_bytes)
        self._commit(receipt, [documents_file, likelihoods_file])
        if time.monotonic() - self._manifest_written > self._manifest_seconds / MANIFEST_SHARE:
            self.finish()
        return receipt

    def finish(self) -> Manifest:
        """Derive the manifest from all receipts and write it; until no process adds one while it is written."""
        begin = time.monotonic()
        while True:
            receipts = self.completed
            manifest = derive(self.spec, self._vocabulary, receipts, self._widened_from)
            data = seal(manifest.to_json())
            path = self.folder / MANIFEST_FILE
            if not path.exists() or path.read_bytes() != data:
                files.write(self.folder, MANIFEST_FILE, data)
            if self.completed == receipts:
                break
        self._manifest_written = time.monotonic()
        self._manifest_seconds = self._manifest_written - begin
        return manifest

    def _documents_file(
        self,
        shard: ShardRange,
        documents: Sequence[StoredDocument],
        dropped: Sequence[tuple[int, Dropped]],
        completed: Sequence[Receipt],
    ) -> tuple[FileRecord, bytes]:
        """The documents file of the range; bytes are empty where another draw range has written it already."""
        path = f"{SHARDS_FOLDER}/{shard.documents_name}.documents.parquet"
        content = format.sum_digests([int.from_bytes(format.document_digest(d), "little") for d in documents])
        table = format.documents_table(documents)
        reasons = [[position, d.key, d.name, d.reason, d.detail] for position, d in dropped]
        data = encode(table, {**self._footer(shard), "content": content, "dropped": reasons})
        record = FileRecord.of(path, data, len(documents), table.column_names)
        for receipt in completed:
            if receipt.documents.path != path:
                continue
            if receipt.documents.digest != record.digest:  # other bytes: another pyarrow, or other documents?
                theirs = footer_of(open_parquet(self.folder, receipt.documents).metadata.metadata)
                if theirs.get("content") != content:
                    raise TidecacheError(
                        f"{self.folder / path}: the documents stored at positions {shard.documents_name} differ from "
                        f"those of this corpus: give the corpus that the cache was captured from, or another --out"
                    )
            return receipt.documents, b""
        return record, data

    def _likelihoods_file(
        self, shard: ShardRange, rows: Sequence[tuple[StoredDocument, DrawRecord]], batch_tokens: int
    ) -> tuple[tuple[FileRecord, bytes], str]:
        """((record, bytes), the sum of the rows' digests)."""
        scores = [{x: format.stored_scores(self.spec, r.contexts[x]) for x in self.spec.contexts} for _, r in rows]
        statistics = shard_statistics(self.spec, rows, scores)
        rounded = [
            (d, DrawRecord(r.position, r.draw, r.timestep, r.masked_C, r.split_M, s))
            for (d, r), s in zip(rows, scores, strict=True)
        ]
        table = format.likelihoods_table(self.spec, rounded)
        digests = {d.key: format.document_digest(d) for d, _ in rows}
        content = format.sum_digests(
            [
                format.draw_digest(self.spec, digests[d.key], r.draw, r.timestep, r.masked_C, r.split_M, r.contexts)
                for d, r in rounded
            ]
        )
        metadata = {
            **self._footer(shard),
            "draws": [shard.first_draw, shard.draw_stop],
            "batch_tokens": batch_tokens,
            "statistics": {context: s.to_json() for context, s in statistics.items()},
        }
        data = encode(table, metadata)
        path = f"{SHARDS_FOLDER}/{shard.name}.likelihoods.parquet"
        return (FileRecord.of(path, data, len(rows), table.column_names), data), content

    def _footer(self, shard: ShardRange) -> dict[str, object]:
        """What both data files say in their footers."""
        return {
            "format": FORMAT_VERSION,
            "spec": self.spec.to_json(),
            "fingerprint": self.spec.fingerprint,
            "documents": [shard.first_document, shard.document_stop],
        }

    def _commit(self, receipt: Receipt, data: Sequence[tuple[FileRecord, bytes]]) -> None:
        """Data files, then the receipt; then look whether another process has put its own files there meanwhile."""
        for _ in range(COMMIT_ATTEMPTS):
            for record, content in data:
                if content:
                    files.write(self.folder, record.path, content)
            write_receipt(self.folder, receipt)
            if all(_is_intact(self.folder, record) for record, content in data if content):
                return
        raise TidecacheError(
            f"{self.folder / receipt.path}: another process writes other values for the same shard at the same time: "
            f"stop one of the two and run the capture again"
        )


def _is_intact(root: Path, record: FileRecord) -> bool:
    path = root / record.path
    return path.stat().st_size == record.size_bytes and files.digest(path.read_bytes()) == record.digest


def _refuse_foreign_folder(root: Path) -> None:
    """A folder without a manifest is taken only if it holds nothing that is not a cache's."""
    if root.exists() and not root.is_dir():
        raise TidecacheError(f"{root}: expected a folder for the cache, found a file: give another --out")
    known = {VOCABULARY_FILE, SHARDS_FOLDER, HELD_OUT_FOLDER}
    others = (
        sorted(p.name for p in root.iterdir() if p.name not in known and not p.name.endswith(".tmp"))
        if root.exists()
        else []
    )
    if others:
        raise TidecacheError(
            f"{root}: expected a cache or an empty folder, found {others[0]!r} and no {MANIFEST_FILE}: "
            f"give another --out"
        )


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
        _check_draw(spec, by_position[record.position], record)
    return [(by_position[r.position], r) for r in rows]


def _check_draw(spec: CaptureSpec, document: StoredDocument, record: DrawRecord) -> None:
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


def _refuse_large(shard: ShardRange, documents: int, size_bytes: int) -> None:
    """Readers hold a few whole shards in memory, so no shard may be large; what is complete already stays."""
    if size_bytes > MAX_SHARD_BYTES:
        fewer = max(1, documents * MAX_SHARD_BYTES // (2 * size_bytes))
        raise TidecacheError(
            f"shard {shard.name} would have {size_bytes:,} bytes, more than {MAX_SHARD_BYTES:,}: run the capture again "
            f"with --documents-per-shard {fewer}; it goes on from what is complete"
        )
