"""What making a cache out of others needs: what a shard was made from, and shards copied byte for byte.

Names in manifests are not trusted: a file is copied only if it is called what the writer would call it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.cache import files
from shared.cache.encoding import EncodedShard, encode_stored
from shared.cache.manifest import SHARDS_FOLDER, FileRecord, Receipt
from shared.cache.parquet import REMEDY, footer_of, open_parquet, parse_parquet, read_data, read_metadata
from shared.cache.reader import Cache
from shared.cache.records import Draw, DrawRecord, ShardRange, StoredDocument
from shared.cache.remote import Folder
from shared.cache.statistics import ContextStatistics
from shared.cache.writer import CacheWriter
from shared.documents import Dropped
from shared.errors import TidecacheError


def refuse_nested(source: Folder, out: Path) -> None:
    """A cache never goes into its own source or around it.

    Raises:
        TidecacheError: it would.
    """
    if isinstance(source, Path):
        a, b = source.resolve(), out.resolve()
        if a == b or a in b.parents or b in a.parents:
            raise TidecacheError(f"--out {out}: lies in {source}, or the other way round: give a folder of its own")


def document_keys(column: pa.ChunkedArray, path: Folder) -> npt.NDArray[np.void]:
    """A column of document keys, 16 bytes each; `path` is for messages.

    Raises:
        DamagedError: something is no key.
    """
    try:
        keys = [bytes.fromhex(key) for key in column.to_pylist()]
        if any(len(key) != 16 for key in keys):
            raise ValueError("keys have 32 digits")
        return np.frombuffer(b"".join(keys), "V16")
    except (ValueError, TypeError) as error:
        raise files.DamagedError(path, f"its documents have no keys ({error})", REMEDY) from error


@dataclass(frozen=True)
class Source:
    """One shard of a cache as it went into the writer, scores as stored; `statistics` as its footers have them."""

    documents: list[StoredDocument]
    dropped: list[tuple[int, Dropped]]
    draws: list[Draw]
    statistics: Mapping[str, ContextStatistics]


def read_source(cache: Cache, index: int) -> Source:
    """Read a shard whole.

    Raises:
        TidecacheError: a file is missing or damaged.
    """
    receipt = cache.shards[index]
    shard = cache.read_shard(index)
    return Source(shard.documents, dropped_of(cache, receipt), shard.draws, statistics_of(cache, receipt))


def dropped_of(cache: Cache, receipt: Receipt) -> list[tuple[int, Dropped]]:
    """The documents of the shard's range that were not captured, with their positions."""
    with _fitting(cache, receipt.documents):
        footer = footer_of(open_parquet(cache.path, receipt.documents).metadata.metadata)
        return [(int(entry[0]), Dropped(*map(str, entry[1:]))) for entry in footer["dropped"]]


def statistics_of(cache: Cache, receipt: Receipt) -> dict[str, ContextStatistics]:
    """By context what the footers say; of two files that say it, the later one, which was written with more lanes."""
    found = {}
    expected = ContextStatistics.zero(len(cache.spec.temperatures))
    for record in receipt.likelihoods:
        with _fitting(cache, record):
            footer = footer_of(read_metadata(cache.path, record).metadata)
            for context, sums in footer.get("statistics", {}).items():
                statistics = ContextStatistics.from_json(sums)
                if all(getattr(statistics, f.name).shape == getattr(expected, f.name).shape for f in fields(expected)):
                    found[context] = statistics
    return found


@contextlib.contextmanager
def _fitting(cache: Cache, record: FileRecord) -> Iterator[None]:
    """What strangers wrote into a file is damage of it if it is not what is expected there."""
    try:
        yield
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, OverflowError) as error:
        finding = f"its footer or rows are not a shard's ({type(error).__name__}: {error})"
        raise files.DamagedError(cache.path / record.path, finding, REMEDY) from error


def record_of(draw: Draw) -> DrawRecord:
    """A stored draw as the writer takes it."""
    return DrawRecord(draw.stored.position, draw.draw, draw.timestep, draw.masked_C, draw.split, draw.scores)


@contextlib.contextmanager
def finishing(writer: CacheWriter) -> Iterator[None]:
    """Whatever ends the block early, an error or a person: what is complete is entered in the manifest all the same."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(TidecacheError):
            writer.finish()
        raise


def copy_shard(writer: CacheWriter, cache: Cache, index: int) -> Receipt:
    """Commit shard `index` of a cache with the writer's spec; byte for byte, unless it was widened since it was written.

    Raises:
        TidecacheError: a file is missing or damaged, the disk is full, or the shard does not fit the writer's others.
    """
    receipt = cache.shards[index]
    if not _as_written(receipt):
        return write_again(writer, cache, index)
    footers, data = [], []
    for record in (receipt.documents, *receipt.likelihoods):
        content = read_data(cache.path, record)
        with _fitting(cache, record):
            footers.append(footer_of(parse_parquet(content, cache.path / record.path).metadata.metadata))
        data.append((record, content))
    if any(footer.get("fingerprint") != writer.spec.fingerprint for footer in footers):
        return write_again(writer, cache, index)
    return writer.commit(EncodedShard(receipt, tuple(data), str(footers[0].get("content"))))


def write_again(writer: CacheWriter, cache: Cache, index: int) -> Receipt:
    """Commit shard `index` of a cache with the writer's spec in new files with the same rows."""
    receipt, source = cache.shards[index], read_source(cache, index)
    complete = set(source.statistics) >= set(writer.spec.contexts)
    statistics = {x: source.statistics[x] for x in writer.spec.contexts} if complete else None
    cut = replace(source, statistics=statistics or {})
    return write_cut(writer, cache, receipt, receipt.range, cut, [record_of(d) for d in source.draws], receipt.corpus)


def write_cut(
    writer: CacheWriter,
    cache: Cache,
    receipt: Receipt,
    shard: ShardRange,
    source: Source,
    records: Sequence[DrawRecord],
    corpus: str,
) -> Receipt:
    """Commit what is left of a shard: `records` of the documents in `source`, whose statistics are used if there are any.

    Raises:
        TidecacheError: the rows do not fit each other, the disk is full, or the shard does not fit the writer's others.
    """
    with _fitting(cache, receipt.likelihoods[0]):
        encoded = encode_stored(
            writer.spec, shard, source.documents, source.dropped, records, corpus, receipt.batch_tokens,
            source.statistics or None,
        )  # fmt: skip
    return writer.commit(encoded)


def _as_written(receipt: Receipt) -> bool:
    """Whether the shard has the files that a capture writes, under their names."""
    names = [f"{SHARDS_FOLDER}/{receipt.range.name}.likelihoods.parquet"]
    documents = f"{SHARDS_FOLDER}/{receipt.range.documents_name}.documents.parquet"
    return [r.path for r in receipt.likelihoods] == names and receipt.documents.path == documents
