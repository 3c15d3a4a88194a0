"""The writer: creates a cache or goes on with one, and commits shards so that each is complete or absent.

A shard's data files are written first, then its receipt; the manifest follows from all receipts. So a kill at any
instant loses at most the shard in work, and the same capture goes on from there. Several processes may work in one
folder on different shards, or by mistake on the same ones: names depend on the range alone and bytes on the content
alone, so the later of two equal shards changes nothing.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

from shared.cache import files, format
from shared.cache.encoding import EncodedShard, encode_shard
from shared.cache.manifest import (
    HELD_OUT_FOLDER,
    MANIFEST_FILE,
    SHARDS_FOLDER,
    WIDENING_FOLDER,
    FileRecord,
    Manifest,
    Receipt,
    derive,
    fingerprint_of,
    read_manifest,
    read_receipt,
    seal,
    write_receipt,
)
from shared.cache.parquet import encode, footer_of, open_parquet, read_metadata
from shared.cache.records import DrawRecord, ShardRange
from shared.cache.vocabulary import VOCABULARY_FILE, TeacherVocabulary
from shared.documents import Dropped, PreparedDocument
from shared.errors import TidecacheError
from shared.spec import FORMAT_VERSION, CaptureSpec, differences, unwidenable

MANIFEST_SHARE = 0.05  # at most this share of the time goes into writing the manifest again after each shard
COMMIT_ATTEMPTS = 5


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
            refuse_foreign_folder(root)
            files.write(root, VOCABULARY_FILE, data)
            first = derive(spec, record, (), _earlier_fingerprints(root, spec))
            files.write(root, MANIFEST_FILE, seal(first.to_json()), exclusive=True)
        existing = read_manifest(root)
        if changed := differences(spec, existing.spec):
            raise TidecacheError(_another_spec(root, existing, spec, changed))
        settle(root, existing)
        for name in ("", SHARDS_FOLDER):
            files.remove_leftovers(root / name)
        writer = cls(root, spec, existing.vocabulary, existing.widened_from)
        writer.finish()
        return writer

    @property
    def completed(self) -> tuple[Receipt, ...]:
        """The receipts of all complete shards now in the folder, other processes' too, in order.

        One from before the cache was widened counts as absent: a capture under the narrower spec was still at work.
        """
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
        known = (r for _, r in self._receipts.values() if r.fingerprint not in self._widened_from)
        return tuple(sorted(known, key=lambda r: r.range))

    def write_shard(
        self,
        shard: ShardRange,
        documents: Sequence[tuple[int, PreparedDocument]],
        dropped: Sequence[tuple[int, Dropped]],
        draws: Sequence[DrawRecord],
        corpus_digest: str,
        batch_tokens: int,
    ) -> Receipt:
        """`encode_shard` and `commit` in one.

        Raises:
            TidecacheError: what either raises.
            ValueError: records that do not fit their documents or the range (a defect of the caller).
        """
        return self.commit(encode_shard(self.spec, shard, documents, dropped, draws, corpus_digest, batch_tokens))

    def commit(self, encoded: EncodedShard) -> Receipt:
        """Write an encoded shard. One that is there already stays as it is.

        Raises:
            TidecacheError: a full disk, a shard overlapping another, or documents that differ from those stored at these
                positions.
        """
        shard, completed = encoded.receipt.range, self.completed
        for receipt in completed:
            if receipt.range == shard:
                return receipt
            if receipt.range.overlaps(shard):
                raise TidecacheError(
                    f"{self.folder / receipt.path} holds some of the draws of {shard.name} already: another "
                    f"process works here with another --documents-per-shard; stop one of the two and run the capture "
                    f"again"
                )
        receipt, data = encoded.receipt, list(encoded.files)
        stored = self._stored_documents(encoded, completed)
        if stored is not None:
            receipt = dataclasses.replace(receipt, documents=stored)
            data = [(record, content) for record, content in data if record.path != stored.path]
        self._commit(receipt, data)
        if time.monotonic() - self._manifest_written > self._manifest_seconds / MANIFEST_SHARE:
            self.finish()
        return receipt

    def finish(self) -> Manifest:
        """Derive the manifest from all receipts and write it; until no process adds one while it is written.

        Raises:
            TidecacheError: another process has widened the cache meanwhile, or two wrote overlapping shards.
        """
        begin = time.monotonic()
        while True:
            self._refuse_widened()
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

    def _refuse_widened(self) -> None:
        """Never put back the manifest of a narrower spec."""
        found = fingerprint_of(self.folder / MANIFEST_FILE)
        if found not in (None, self.spec.fingerprint):
            raise TidecacheError(
                f"{self.folder}: `tidecache teacher extend` has extended this cache while this capture was at work "
                f"(expected the spec {self.spec.fingerprint}, found {found}): run the capture again with the wider settings"
            )

    def _stored_documents(self, encoded: EncodedShard, completed: Sequence[Receipt]) -> FileRecord | None:
        """The documents file of the range where another draw range has written it already."""
        ours = encoded.receipt.documents
        for receipt in completed:
            if receipt.documents.path != ours.path:
                continue
            if receipt.documents.digest != ours.digest:  # other bytes: another pyarrow, or other documents?
                theirs = footer_of(open_parquet(self.folder, receipt.documents).metadata.metadata)
                if theirs.get("content") != encoded.documents_content:
                    raise TidecacheError(
                        f"{self.folder / ours.path}: the documents stored at positions {receipt.range.documents_name} differ "
                        f"from those of this corpus: give the corpus that the cache was captured from, or another --out"
                    )
            return receipt.documents
        return None

    def _commit(self, receipt: Receipt, data: Sequence[tuple[FileRecord, bytes]]) -> None:
        """Data files, then the receipt; then look whether another process has put its own files there meanwhile."""
        for _ in range(COMMIT_ATTEMPTS):
            for record, content in data:
                files.write(self.folder, record.path, content)
            write_receipt(self.folder, receipt)
            if all(_is_intact(self.folder, record) for record, _ in data):
                return
        raise TidecacheError(
            f"{self.folder / receipt.path}: another process writes other values for the same shard at the same time: "
            f"stop one of the two and run the capture again"
        )


def settle(root: Path, manifest: Manifest) -> None:
    """Finish what a widening (`shared.cache.widening`) was killed at: where a receipt is still the narrower one, put the
    one there that the manifest has. A receipt that somebody removed stays removed.
    """
    if not manifest.widened_from:
        return
    for receipt in manifest.shards:
        there = (root / receipt.path).exists()
        if there and read_receipt(root, receipt.path).fingerprint in manifest.widened_from:
            write_receipt(root, receipt)


def _earlier_fingerprints(root: Path, spec: CaptureSpec) -> tuple[str, ...]:
    """What `widened_from` must hold where the manifest is lost: the other fingerprints of files that receipts list."""
    found = set()
    for path in sorted((root / SHARDS_FOLDER).glob("[!.]*.json")):
        receipt = read_receipt(root, f"{SHARDS_FOLDER}/{path.name}")
        if receipt.fingerprint == spec.fingerprint:
            found |= {
                footer_of(read_metadata(root, r).metadata)["fingerprint"]
                for r in (receipt.documents, *receipt.likelihoods)
            }
    return tuple(sorted(found - {spec.fingerprint}))


def _is_intact(root: Path, record: FileRecord) -> bool:
    path = root / record.path
    return path.stat().st_size == record.size_bytes and files.digest(path.read_bytes()) == record.digest


def _another_spec(root: Path, existing: Manifest, spec: CaptureSpec, changed: list[tuple[str, object, object]]) -> str:
    """The refusal, field by field, and what to do about it."""
    fields = "; ".join(f"{name}: the cache has {theirs!r}, this capture {ours!r}" for name, ours, theirs in changed)
    advice = "give another --out, or the same settings"
    if spec.fingerprint in existing.widened_from:
        advice = f"`tidecache teacher extend` has widened it since: {advice} as it has now"
    elif not unwidenable(existing.spec, spec):
        cache = root.parent if root.name == HELD_OUT_FOLDER else root
        advice = f"`tidecache teacher extend {cache}` adds what it lacks; else {advice}"
    return f"{root} holds a cache with another spec ({fields}): {advice}"


def refuse_foreign_folder(root: Path) -> None:
    """A folder without a manifest is taken only if it holds nothing that is not a cache's.

    A manifest found now is another process's, written since the caller looked; whoever goes on reads it.
    """
    if root.exists() and not root.is_dir():
        raise TidecacheError(f"{root}: expected a folder for the cache, found a file: give another --out")
    known = {MANIFEST_FILE, VOCABULARY_FILE, SHARDS_FOLDER, HELD_OUT_FOLDER, WIDENING_FOLDER}
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
