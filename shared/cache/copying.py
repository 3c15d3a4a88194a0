"""What making a cache out of others needs: what a shard was made from, and shards copied byte for byte.

Names in manifests are not trusted: a file is copied only if it is called what the writer would call it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.cache import files
from shared.cache.encoding import EncodedShard, encode_stored
from shared.cache.manifest import SHARDS_FOLDER, Receipt
from shared.cache.parquet import REMEDY, footer_of, open_parquet, parse_parquet, read_data, read_metadata
from shared.cache.reader import Cache
from shared.cache.records import Draw, DrawRecord, StoredDocument
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
        return np.frombuffer(b"".join(map(bytes.fromhex, column.to_pylist())), "V16")
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
    path = cache.path / receipt.documents.path
    try:
        footer = footer_of(open_parquet(cache.path, receipt.documents).metadata.metadata)
        return [(int(entry[0]), Dropped(*map(str, entry[1:]))) for entry in footer["dropped"]]
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise files.DamagedError(path, f"its footer does not say what was dropped ({error!r})", REMEDY) from error


def statistics_of(cache: Cache, receipt: Receipt) -> dict[str, ContextStatistics]:
    """By context what the footers say; of two files that say it, the later one, which was written with more lanes."""
    found = {}
    for record in receipt.likelihoods:
        footer = footer_of(read_metadata(cache.path, record).metadata)
        for context, sums in footer.get("statistics", {}).items():
            try:
                statistics = ContextStatistics.from_json(sums)
            except (KeyError, ValueError, TypeError) as error:
                path = cache.path / record.path
                raise files.DamagedError(path, f"statistics that are none ({error!r})", REMEDY) from error
            if statistics.tail_mass_BT.shape[-1] == len(cache.spec.temperatures):
                found[context] = statistics
    return found


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
        footers.append(footer_of(parse_parquet(content, cache.path / record.path).metadata.metadata))
        data.append((record, content))
    if any(footer.get("fingerprint") != writer.spec.fingerprint for footer in footers):
        return write_again(writer, cache, index)
    return writer.commit(EncodedShard(receipt, tuple(data), str(footers[0].get("content"))))


def write_again(writer: CacheWriter, cache: Cache, index: int) -> Receipt:
    """Commit shard `index` of a cache with the writer's spec in new files with the same rows."""
    receipt, source = cache.shards[index], read_source(cache, index)
    complete = set(source.statistics) >= set(writer.spec.contexts)
    return writer.commit(
        encode_stored(
            writer.spec,
            receipt.range,
            source.documents,
            source.dropped,
            [record_of(d) for d in source.draws],
            receipt.corpus,
            receipt.batch_tokens,
            {x: source.statistics[x] for x in writer.spec.contexts} if complete else None,
        )
    )


def _as_written(receipt: Receipt) -> bool:
    """Whether the shard has the files that a capture writes, under their names."""
    names = [f"{SHARDS_FOLDER}/{receipt.range.name}.likelihoods.parquet"]
    documents = f"{SHARDS_FOLDER}/{receipt.range.documents_name}.documents.parquet"
    return [r.path for r in receipt.likelihoods] == names and receipt.documents.path == documents
