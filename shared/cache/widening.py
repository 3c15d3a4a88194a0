"""Widening: a cache gets another context, the topk lane, a larger k, a temperature or tail samples (docs/cache-format.md).

Nothing that is there is written again. Each shard gets one further likelihoods file with the columns that are new or
that the wider spec replaces, and a receipt that lists both files; gold columns stay as they are, to the bit. These
receipts wait in `widening/FINGERPRINT/`, unknown to readers. Once every shard has one, the manifest of the wider spec
takes the place of the narrower one in a single rename, which is the instant at which readers see the wider cache; then
the waiting receipts take their places. So a kill leaves the narrower cache or the wider one, and the same command goes
on; a run that reads meanwhile goes on with the files of its manifest, since no file is ever taken away from under it.

Another process may capture under the narrower spec meanwhile: its shards are widened too, and after the switch it is
refused (`CacheWriter.finish`).

Shapes as in `shared.cache.records`.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shared.cache import files, format
from shared.cache.encoding import check_draw, footer, refuse_large
from shared.cache.manifest import (
    MANIFEST_FILE,
    MAX_RECEIPT_BYTES,
    SHARDS_FOLDER,
    WIDENING_FOLDER,
    FileRecord,
    Manifest,
    Receipt,
    derive,
    read_manifest,
    seal,
    unseal,
)
from shared.cache.parquet import encode
from shared.cache.reader import Cache, Shard
from shared.cache.records import ContextScores, DrawRecord, StoredDocument
from shared.cache.statistics import shard_statistics
from shared.cache.writer import CacheWriter, settle
from shared.errors import TidecacheError
from shared.spec import FORMAT_VERSION, CaptureSpec, unwidenable

ABANDONED_SECONDS = 86400.0  # after which a file that no receipt lists is surely not about to get one
COMMIT_ATTEMPTS = 5
KEY_COLUMNS = ("document", "draw", "timestep")  # of a further file: for the comparison with the first, and the filter

# The scores of the topk lane, and the fields of the spec that decide them (besides the lane itself and its codec).
DEPENDS = {
    "topk_ids": ("k",),
    "topk_logp_MK": ("k",),
    "log_z_MT": ("temperatures",),
    "tail_ids": ("k", "tail_samples"),
    "tail_logp": ("k", "tail_samples"),
}
PACKED = {"topk_ids", "topk_logp_MK", "log_z_MT"}  # what any codec but `raw` has in one column of its own
SCORES_OF_COLUMN = {
    "gold_logp": "gold_logp_N",
    "topk_ids": "topk_ids",
    "topk_logp": "topk_logp_MK",
    "log_z": "log_z_MT",
    "tail_ids": "tail_ids",
    "tail_logp": "tail_logp",
}


def refuse_other_changes(base: CaptureSpec, wider: CaptureSpec, where: str) -> None:
    """Check that `wider` only adds to `base`.

    Raises:
        TidecacheError: anything else differs, or something would be taken away; names every such field and both values.
    """
    if refused := unwidenable(base, wider):
        fields = "; ".join(f"{name}: the cache has {old!r}, asked for {new!r}" for name, old, new in refused)
        raise TidecacheError(
            f"{where} cannot be extended to another spec than its own ({fields}): contexts, the topk lane, a larger k, "
            f"temperatures and more tail samples can be added to a cache, and nothing else can change: capture into another "
            f"folder instead"
        )


@dataclass(frozen=True)
class Step:
    """What two specs have and lack of each other: which contexts the teacher is asked for, and what of it is stored."""

    base: CaptureSpec
    wider: CaptureSpec

    @property
    def asked(self) -> CaptureSpec:
        """The wider spec with only the contexts that must be scored: new ones, and all if the topk lane changes."""
        if self._fresh_fields(self.base.contexts[0]):
            return self.wider
        return replace(self.wider, contexts=tuple(x for x in self.wider.contexts if x not in self.base.contexts))

    def _fresh_fields(self, context: str) -> set[str]:
        """The scores of one context that are new or replaced."""
        if context not in self.base.contexts:
            return {"gold_logp_N", *DEPENDS}
        if "topk" not in self.wider.lanes:
            return set()
        if "topk" not in self.base.lanes:
            return {*DEPENDS}
        changed = {f for f in ("k", "temperatures", "tail_samples") if getattr(self.base, f) != getattr(self.wider, f)}
        fresh = {name for name, fields in DEPENDS.items() if changed & {*fields}}
        return fresh | PACKED if fresh & PACKED and self.wider.codec != "raw" else fresh

    @property
    def columns(self) -> list[str]:
        """The columns of the further file, keys apart."""
        return [
            column
            for context in self.wider.contexts
            for column in format.context_columns(self.wider, context)
            if {SCORES_OF_COLUMN.get(column.removeprefix(f"{context}_"), "topk_ids")} & self._fresh_fields(context)
        ]

    def merged(
        self, stored: Mapping[str, ContextScores], fresh: Mapping[str, ContextScores]
    ) -> dict[str, ContextScores]:
        """The scores of a draw under the wider spec, as its two files hold them."""
        scores = {}
        for context in self.wider.contexts:
            names = self._fresh_fields(context)
            if context not in self.base.contexts:
                scores[context] = fresh[context]
            elif not names:
                scores[context] = stored[context]
            else:
                scores[context] = replace(stored[context], **{n: getattr(fresh[context], n) for n in names})
        return scores


class Widening:
    """A cache on its way to a wider spec. Use `begin`; any number of processes may work on different shards of one.

    `cache()` and `todo(cache)` say which shards wait, `write_shard` makes one ready, `commit` switches when all are.
    """

    def __init__(self, folder: Path, base: Manifest, wider: CaptureSpec) -> None:
        self.folder = folder
        self.step = Step(base.spec, wider)
        self._base = base
        self._writer = CacheWriter(folder, base.spec, base.vocabulary, base.widened_from)
        self._waiting = _waiting_folder(wider)
        self._ready: dict[str, tuple[Receipt, Receipt]] = {}  # by the range: the narrower receipt, the wider one

    @classmethod
    def begin(cls, folder: Path, wider: CaptureSpec) -> Widening | None:
        """Begin or go on; None where the cache has this spec already. What a kill left behind is put right.

        Raises:
            TidecacheError: no cache there, or `wider` changes more than `refuse_other_changes` allows.
        """
        base = read_manifest(folder)
        refuse_other_changes(base.spec, wider, str(folder))
        for name in ("", SHARDS_FOLDER, _waiting_folder(wider)):
            files.remove_leftovers(folder / name)
        settle(folder, base)
        _remove_waiting(folder, base.spec)  # their places are settled
        if base.spec == wider:
            return None
        widening = cls(folder, base, wider)
        widening._remove_abandoned()
        return widening

    def cache(self) -> Cache | None:
        """The narrower cache with all shards that are complete now, other processes' too; None once it is wider."""
        try:
            shards = self._writer.completed
            return Cache(self.folder, derive(self._base.spec, self._base.vocabulary, shards, self._base.widened_from))
        except TidecacheError:
            if read_manifest(self.folder).spec == self.step.wider:  # another process has just switched
                return None
            raise

    def todo(self, cache: Cache) -> list[int]:
        """The indices of the cache's shards that are not ready yet."""
        return [index for index, receipt in enumerate(cache.shards) if self._ready_receipt(receipt) is None]

    def write_shard(
        self, receipt: Receipt, shard: Shard, scores: Sequence[Mapping[str, ContextScores]], batch_tokens: int
    ) -> Receipt:
        """Make one shard ready: `shard` is all of it as it is, `scores` what the teacher says of each of its draws in the
        contexts of `step.asked`, and `batch_tokens` the budget with which it was scored.

        Raises:
            TidecacheError: NaN or positive log-likelihoods, a full disk, or a shard that would become too large.
            ValueError: scores that do not fit the draws (a defect of the caller).
        """
        rows = [
            (d.stored, DrawRecord(d.stored.position, d.draw, d.timestep, d.masked_C, d.split, s))
            for d, s in zip(shard.draws, scores, strict=True)
        ]
        for document, record in rows:
            check_draw(self.step.asked, document, record)
        (file, data), content = self._further_file(receipt, shard, rows, batch_tokens)
        replaced = {*self.step.columns}
        held = [replace(r, columns=tuple(c for c in r.columns if c not in replaced)) for r in receipt.likelihoods]
        used = tuple(r for r in held if set(r.columns) - set(KEY_COLUMNS))
        wider = replace(receipt, fingerprint=self.step.wider.fingerprint, likelihoods=(*used, file), content=content)
        size = sum(r.size_bytes for r in (wider.documents, *wider.likelihoods))
        refuse_large(receipt.range, len(shard.documents), size)
        for _ in range(COMMIT_ATTEMPTS):
            files.write(self.folder, file.path, data)
            files.write(self.folder, self._name(receipt), seal({"format": FORMAT_VERSION, **wider.to_json()}))
            if self._is_there(file):
                break
        return wider

    def _further_file(
        self, receipt: Receipt, shard: Shard, rows: Sequence[tuple[StoredDocument, DrawRecord]], batch_tokens: int
    ) -> tuple[tuple[FileRecord, bytes], str]:
        """((record, bytes), the sum of the wider rows' digests); `rows` carry the exact scores."""
        step, asked = self.step, self.step.asked
        fresh = [{x: format.stored_scores(asked, r.contexts[x]) for x in asked.contexts} for _, r in rows]
        merged = [
            (document, replace(record, contexts=step.merged(draw.scores, new)))
            for (document, record), draw, new in zip(rows, shard.draws, fresh, strict=True)
        ]
        table = format.likelihoods_table(step.wider, merged).select([*KEY_COLUMNS, *step.columns])
        metadata = {
            **footer(step.wider, receipt.range),
            "draws": [receipt.range.first_draw, receipt.range.draw_stop],
            "batch_tokens": batch_tokens,
            "statistics": {x: s.to_json() for x, s in shard_statistics(asked, rows, fresh).items()},
        }
        data = encode(table, metadata)
        path = f"{SHARDS_FOLDER}/{receipt.range.name}.widened-{step.wider.fingerprint[:16]}.parquet"
        record = FileRecord.of(path, data, len(rows), table.column_names)
        return (record, data), format.content_of(step.wider, merged)

    def _name(self, receipt: Receipt) -> str:
        return f"{self._waiting}/{receipt.range.name}.json"

    def _ready_receipt(self, receipt: Receipt) -> Receipt | None:
        """The waiting receipt that widens this one, its new file there; None if there is none, or a damaged one."""
        name = self._name(receipt)
        known = self._ready.get(name)
        if known is None or known[0] != receipt:
            try:
                found = Receipt.from_json(unseal(files.read(self.folder, name, MAX_RECEIPT_BYTES, ""), name, ""), name)
            except TidecacheError:
                return None
            known = self._ready[name] = (receipt, found)
        wider = known[1]
        same = (wider.range, wider.documents, wider.counts) == (receipt.range, receipt.documents, receipt.counts)
        held = {r.digest for r in receipt.likelihoods} >= {r.digest for r in wider.likelihoods[:-1]}
        ours = wider.fingerprint == self.step.wider.fingerprint
        return wider if same and held and ours and self._is_there(wider.likelihoods[-1]) else None

    def _is_there(self, record: FileRecord) -> bool:
        path = self.folder / record.path
        return path.exists() and path.stat().st_size == record.size_bytes

    def commit(self) -> Manifest | None:
        """Switch to the wider spec if every shard is ready; None if one is not.

        Raises:
            TidecacheError: the cache has become another meanwhile, or the disk is full.
        """
        narrower = self.cache()
        if narrower is None:
            _remove_waiting(self.folder, self.step.wider)  # what this process made ready after the switch
            return read_manifest(self.folder)
        ready = [found for r in narrower.shards if (found := self._ready_receipt(r)) is not None]
        if len(ready) < len(narrower.shards):
            return None
        earlier = (*self._base.widened_from, self._base.spec.fingerprint)
        wider = derive(self.step.wider, self._base.vocabulary, ready, earlier)
        data = seal(wider.to_json())
        for _ in range(COMMIT_ATTEMPTS):
            if read_manifest(self.folder).spec not in (self._base.spec, self.step.wider):
                raise TidecacheError(
                    f"{self.folder}: another process has extended this cache meanwhile: run this again"
                )
            files.write(self.folder, MANIFEST_FILE, data)
            settle(self.folder, wider)
            if (self.folder / MANIFEST_FILE).read_bytes() == data:  # a capture may have put back the narrower one
                break
        _remove_waiting(self.folder, self.step.wider)
        return wider

    def _remove_abandoned(self) -> None:
        """Remove what widenings that were given up, or that later ones replaced, left behind long ago."""
        limit = time.time() - ABANDONED_SECONDS
        for folder in (self.folder / WIDENING_FOLDER).glob("*"):
            if folder != self.folder / self._waiting and folder.stat().st_mtime < limit:
                shutil.rmtree(folder, ignore_errors=True)
        waiting = {p.stem for p in (self.folder / WIDENING_FOLDER).glob("*/*.json")}
        listed = {r.path for receipt in self._writer.completed for r in receipt.likelihoods}
        for path in (self.folder / SHARDS_FOLDER).glob("*.widened-*.parquet"):
            unused = f"{SHARDS_FOLDER}/{path.name}" not in listed and path.name.split(".widened-")[0] not in waiting
            if unused and path.stat().st_mtime < limit:
                path.unlink(missing_ok=True)


def _waiting_folder(wider: CaptureSpec) -> str:
    return f"{WIDENING_FOLDER}/{wider.fingerprint[:16]}"


def _remove_waiting(folder: Path, wider: CaptureSpec) -> None:
    """Remove the waiting receipts of a widening that is done; those of another one stay."""
    shutil.rmtree(folder / _waiting_folder(wider), ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / WIDENING_FOLDER).rmdir()
