"""`tidecache cache verify`: check all that a cache claims, from the bytes of its files up to the content digest.

Everything that can be derived is derived again and compared: the manifest from the receipts, the receipts from the
files, timesteps, masks and splits from the seed, the content digest from the rows. That rows fit each other and the spec is checked
whenever they are read (`shared.cache.consistency`). Each problem is one line that says what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shared import noise
from shared.cache import files, format
from shared.cache.manifest import (
    MANIFEST_FILE,
    SHARDS_FOLDER,
    FileRecord,
    Receipt,
    read_receipt,
)
from shared.cache.parquet import footer_of, open_parquet
from shared.cache.reader import Cache
from shared.cache.records import Draw, StoredDocument
from shared.cache.remote import Folder
from shared.cache.statistics import count_shard
from shared.documents import Dropped
from shared.errors import TidecacheError
from shared.spec import differences


@dataclass(frozen=True)
class Report:
    """What was checked, and the problems found; `paths` of the caches: the one asked for and its held-out part."""

    paths: tuple[Folder, ...]
    files: int
    size_bytes: int
    draws: int
    problems: tuple[str, ...]


def verify(path: str | Path) -> Report:
    """Check a cache and the held-out cache in it.

    Raises:
        TidecacheError: there is no manifest that can be read, so nothing can be checked.
    """
    cache = Cache.open(Path(path))
    held_out = cache.held_out()
    caches = [cache] if held_out is None else [cache, held_out]
    problems = [problem for cache in caches for problem in _problems(cache)]
    if caches[0].spec != caches[-1].spec:
        fields = ", ".join(name for name, _, _ in differences(caches[0].spec, caches[-1].spec))
        problems.append(
            f"{caches[-1].path}: its spec differs from the cache's ({fields}): an extension was killed between the two: "
            f"run it again"
        )
    return Report(
        paths=tuple(c.path for c in caches),
        files=sum(len(_names(c)) for c in caches),
        size_bytes=sum(c.manifest.totals.size_bytes for c in caches),
        draws=sum(c.manifest.totals.draws for c in caches),
        problems=tuple(problems),
    )


def _names(cache: Cache) -> set[str]:
    """Every file that the cache consists of."""
    names = {MANIFEST_FILE, cache.manifest.vocabulary.path}
    for receipt in cache.shards:
        names |= {receipt.path, receipt.documents.path, *(f.path for f in receipt.likelihoods)}
    return names


def _problems(cache: Cache) -> Iterator[str]:
    """One line for each problem. A shard with a problem is not looked into further."""
    try:
        cache.vocabulary()
    except TidecacheError as error:
        yield f"{_finding(error)}; remove it and {MANIFEST_FILE} and run the capture again: it writes both anew"
        return
    for index, receipt in enumerate(cache.shards):
        mend = f"remove {cache.path / receipt.path} and run the capture again: only this shard is done anew"
        try:
            found = read_receipt(cache.path, receipt.path)
            if found.fingerprint in cache.manifest.widened_from:
                yield (
                    f"{cache.path / receipt.path}: from before the cache was extended, which was killed at its end: run "
                    f"the extension again, or a capture with the present settings; until then the manifest is right"
                )
            elif found != receipt:
                raise TidecacheError(f"{cache.path / receipt.path}: the manifest says otherwise")
            _check_shard(cache, index)
        except TidecacheError as error:
            yield f"{_finding(error)}; {mend}"
    yield from _strangers(cache)


def _finding(error: TidecacheError) -> str:
    """What was found, without the advice to run `verify`."""
    return error.finding if isinstance(error, files.DamagedError) else str(error)


def _strangers(cache: Cache) -> Iterator[str]:
    """Complete shards that the manifest does not know. Other files without a receipt are leftovers of a kill."""
    known, folder = _names(cache), cache.path / SHARDS_FOLDER
    for path in sorted(folder.glob("*.json")) if isinstance(folder, Path) else ():
        name = f"{SHARDS_FOLDER}/{path.name}"
        if name not in known and not path.name.startswith("."):
            yield (
                f"{path}: a complete shard that the manifest lacks, since a capture was killed or is at work now; run "
                f"the capture again"
            )


def _check_shard(cache: Cache, index: int) -> None:
    """Digests, schemas, counts, invariants of every row, and the content digest of one shard.

    Raises:
        TidecacheError: the first thing that is wrong.
    """
    receipt = cache.shards[index]
    where = cache.path / receipt.likelihoods[0].path
    shard = cache.read_shard(index)
    footer = _check_footers(cache, receipt)
    digests = {d.key: format.document_digest(d) for d in shard.documents}
    try:
        for document in shard.documents:
            _check_document(cache, receipt, document)
        for draw in shard.draws:
            _check_draw(cache, receipt, draw)
        dropped = [(entry[0], Dropped(*entry[1:])) for entry in footer["dropped"]]
        rows = [(d.stored, d.timestep, d.masked_C) for d in shard.draws]
        counts = count_shard(shard.documents, dropped, rows)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise TidecacheError(f"{where}: its rows do not fit each other ({error})") from error
    expected = [(d.key, k) for d in shard.documents for k in range(receipt.range.first_draw, receipt.range.draw_stop)]
    if [(d.document, d.draw) for d in shard.draws] != expected:
        raise TidecacheError(f"{where}: expected each draw of its range for each document once, in document order")
    if counts != receipt.counts:
        raise TidecacheError(f"{where}: the counts of the receipt are not those of its rows")
    if footer.get("content") != format.sum_digests([int.from_bytes(d, "little") for d in digests.values()]):
        raise TidecacheError(f"{cache.path / receipt.documents.path}: its content digest is not that of its rows")
    content = format.sum_digests(
        [
            format.draw_digest(cache.spec, digests[d.document], d.draw, d.timestep, d.masked_C, d.split, d.scores)
            for d in shard.draws
        ]
    )
    if content != receipt.content:
        raise TidecacheError(f"{where}: the content digest of the receipt is not that of its rows")


def _check_footers(cache: Cache, receipt: Receipt) -> dict[str, Any]:
    """Spec and range in each file's footer; returns the documents file's footer."""
    first: dict[str, Any] = {}
    for record in (receipt.documents, *receipt.likelihoods):
        footer = _footer(cache.path, record)
        covered = [receipt.range.first_document, receipt.range.document_stop]
        widened = footer.get("fingerprint") in cache.manifest.widened_from
        if footer.get("documents") != covered or not (widened or footer.get("spec") == cache.spec.to_json()):
            raise TidecacheError(f"{cache.path / record.path}: its footer names another spec or range than its receipt")
        first = first or footer
    return first


def _footer(root: Folder, record: FileRecord) -> dict[str, Any]:
    try:
        return footer_of(open_parquet(root, record).metadata.metadata)
    except (ValueError, pa.ArrowException) as error:
        raise TidecacheError(f"{root / record.path}: its footer cannot be read ({error})") from error


def _check_document(cache: Cache, receipt: Receipt, document: StoredDocument) -> None:
    """The teacher's tokens must spell the chunks they overlap."""
    where = f"{cache.path / receipt.documents.path}: document {document.key}"
    count_C = document.token_count_C
    first_N = np.cumsum(count_C) - count_C
    for chunk, (start, count) in enumerate(zip(first_N.tolist(), count_C.tolist(), strict=True)):
        spelled = cache.vocabulary().spell(document.token_ids_N[start : start + count].tolist())
        gold = document.chunk_bytes(chunk)
        if spelled not in (gold, b" " + gold):  # some tokenizers put a space before a text's first word
            raise TidecacheError(f"{where}: the teacher's tokens of chunk {chunk} do not spell its bytes")


def _check_draw(cache: Cache, receipt: Receipt, draw: Draw) -> None:
    """A draw's timestep, mask and split follow from the spec."""
    spec = cache.spec
    where = f"{cache.path / receipt.likelihoods[0].path}: draw {draw.draw} of document {draw.document}"
    t = noise.timestep(spec.seed, draw.document, draw.draw, spec.epsilon)
    split_C = noise.split_chunks(spec.seed, draw.document, draw.draw, spec.demo_ratio, len(draw.stored.chunks))
    if draw.timestep != t or not np.array_equal(draw.split, split_C[draw.chunks]):
        raise TidecacheError(f"{where}: timestep or split are not those of the spec's seed")
    if spec.mask_law == "chunk":
        masked_C = noise.mask_chunks(spec.seed, draw.document, draw.draw, t, len(draw.stored.chunks))
        if not np.array_equal(draw.chunks, np.flatnonzero(masked_C)):
            raise TidecacheError(f"{where}: the masked chunks are not those of the spec's seed")
