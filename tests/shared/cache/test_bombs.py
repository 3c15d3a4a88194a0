"""Files that would fill the memory: refused by every way to read a cache, within bounded memory, before they are unpacked."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.cache import parquet
from tests.conftest import ROOT
from tests.shared.cache import bombs, resealed, synthetic
from tests.shared.cache.bombs import BINARY, I32, LIST, STRUCT
from tests.shared.cache.servers import serve

MEGABYTES = (
    700  # of address space above that of the process; each of these files would take more, or nothing can stop it
)
IDS, LOGP = b"compdemo_topk_ids", b"compdemo_topk_logp"
HUGE = (1 << 31) - 1


def rewritten(**options):
    """The same rows, written by pyarrow in another manner."""

    def change(data: bytes) -> bytes:
        table = pq.read_table(pa.BufferReader(data))
        given = {"compression": "zstd", "write_page_checksum": True, "store_schema": False, **options}
        sink = io.BytesIO()
        with pq.ParquetWriter(sink, table.schema.remove_metadata(), **given) as writer:
            writer.write_table(table.replace_schema_metadata(None))
            footer = parquet.footer_of(table.schema.metadata)
            writer.add_key_value_metadata({f"tidecache.{k}": json.dumps(v) for k, v in footer.items()})
        return sink.getvalue()

    return change


def many_equal_messages(data: bytes) -> bytes:
    """Three thousand references to one megabyte of text."""
    table = pq.read_table(pa.BufferReader(data))
    field = table.schema.field("messages")
    message = {"role": "x", "content": "a" * (1 << 20), "trainable": False}
    given = [[*row, *([message] * 1500)] for row in table["messages"].to_pylist()]
    table = table.set_column(table.schema.get_field_index("messages"), field, pa.array(given, field.type))
    sink = io.BytesIO()
    dictionary = {"use_dictionary": ["messages.list.element.content"], "dictionary_pagesize_limit": 1 << 30}
    with pq.ParquetWriter(
        sink, table.schema, compression="zstd", write_page_checksum=True, store_schema=False, **dictionary
    ) as writer:
        writer.write_table(table)
    return sink.getvalue()


def equal(count: int, claimed: int | None, name: bytes = IDS):
    return lambda data: bombs.with_pages(data, name, bombs.page(count, *bombs.equal_values(count)), claimed)


def zstd_bomb(pages: int, unpacked: int):
    """Pages of zeros, a few kilobytes each."""

    def change(data: bytes) -> bytes:
        body = pa.compress(bytes(unpacked), codec="zstd", asbytes=True)
        return bombs.with_pages(data, LOGP, bombs.page(1, unpacked, body, 0) * pages, pages)

    return change


def untrue_length(data: bytes) -> bytes:
    body = pa.compress(bytes(1 << 10), codec="zstd", asbytes=True)
    return bombs.with_pages(data, LOGP, bombs.page(1, HUGE, body, 0))


def many_row_groups(data: bytes) -> bytes:
    empty = [[1, LIST, (STRUCT, [])], [2, 6, 0], [3, 6, 0]]
    return bombs.refooted(data, lambda footer: bombs.put(footer, 4, (STRUCT, [empty] * 100_000)))


def deep_schema(data: bytes) -> bytes:
    element = [[4, BINARY, b"a"], [5, I32, 1]]
    return bombs.refooted(data, lambda footer: bombs.put(footer, 2, (STRUCT, [element] * 200_000)))


def deep_footer(data: bytes) -> bytes:
    length = int.from_bytes(data[-8:-4], "little")
    return bombs.with_footer(data[: -8 - length], b"\x1c" * 1_000_000)


def footer_of(head: bytes):
    """A footer that begins so, and then ends."""

    def change(data: bytes) -> bytes:
        length = int.from_bytes(data[-8:-4], "little")
        return bombs.with_footer(data[: -8 - length], head)

    return change


def outside(data: bytes) -> bytes:
    return bombs.refooted(data, lambda footer: bombs.put(bombs.column(footer, IDS), 9, 1 << 40))


def untrue_histogram(data: bytes) -> bytes:
    """Not much memory, but Arrow's own check of it ends the process."""

    def change(footer) -> None:
        sizes = bombs.get(bombs.column(footer, IDS), 16)
        kind, levels = bombs.get(sizes, 3)
        bombs.put(sizes, 3, (kind, [*levels, 0]))

    return bombs.refooted(data, change)


BOMBS = {
    "a histogram": ("likelihoods", untrue_histogram, "a histogram of levels"),
    "values that the footer does not count": ("likelihoods", equal(HUGE, None), "its footer says"),
    "values that the footer counts": ("likelihoods", equal(HUGE, HUGE), "more than a shard can have"),
    "half as many": ("likelihoods", equal(HUGE // 4, HUGE // 4), "more than a shard can have"),
    "a page of zeros": ("likelihoods", zstd_bomb(1, (1 << 30) + 1), "bytes unpacked: refused"),
    "pages of zeros": ("likelihoods", zstd_bomb(9, 1 << 28), "more than a shard can have"),
    "an untrue length": ("likelihoods", untrue_length, "bytes unpacked: refused"),
    "one long text": ("documents", many_equal_messages, "more than a shard can have"),
    "prefixes": ("vocabulary", rewritten(use_dictionary=False, column_encoding={"bytes": "DELTA_BYTE_ARRAY"}), "encoding 7"),
    "no checksums": ("likelihoods", rewritten(write_page_checksum=False), "without a checksum"),
    "another codec": ("likelihoods", rewritten(compression="gzip"), "another codec"),
    "row groups": ("likelihoods", many_row_groups, "row groups"),
    "a deep schema": ("likelihoods", deep_schema, "schema of"),
    "a deep footer": ("likelihoods", deep_footer, "too deep"),
    "a list without an end": ("likelihoods", footer_of(b"\x19\xfc\xff\xff\xff\xff\x07"), "more elements"),
    "a text without an end": ("likelihoods", footer_of(b"\x18\xff\xff\xff\xff\x07"), "cut off"),
    "a number without an end": ("likelihoods", footer_of(b"\x15" + b"\xff" * 100), "without an end"),
    "an empty footer": ("likelihoods", footer_of(b""), "cut off"),
    "no columns": ("likelihoods", footer_of(b"\x00"), "schema of 0"),
    "a column outside": ("likelihoods", outside, "not within the file"),
    "no Parquet": ("likelihoods", lambda data: b"x" * len(data), "does not end as one"),
    "nothing": ("documents", lambda data: b"", "does not end as one"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("caches") / "sound"
    synthetic.build(path, documents=4, per_shard=2, draws=2, drop=())
    return path


def limited(*folders: Path) -> list[dict[str, str | None]]:
    """What all ways to read say in a process with little memory."""
    command = [sys.executable, "-m", "tests.shared.cache.bombs", str(MEGABYTES), *map(str, folders)]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_bombs(folder, tmp_path) -> None:
    roots = [
        resealed.data_file(
            folder,
            tmp_path / name,
            which,
            change,
            rows=500 if which == "vocabulary" else 4 // (1 + (which == "documents")),
        )
        for name, (which, change, _) in BOMBS.items()
    ]
    for (name, (_, _, word)), said in zip(BOMBS.items(), limited(*roots), strict=True):
        for way, message in said.items():
            assert message is not None or way in ("inspect", "documents"), (name, way)
            assert message is None or word in message or way == "inspect", (name, way, message)
            assert message is None or message.isprintable(), (name, way, message)


def test_the_same_memory_is_enough_for_a_sound_cache(folder, tmp_path) -> None:
    assert set(limited(folder)[0].values()) == {None}
    modern = resealed.data_file(
        folder, tmp_path / "v2", "likelihoods", rewritten(data_page_version="2.0", use_dictionary=True)
    )
    assert set(limited(modern)[0].values()) == {None}  # another writer's pages


def test_huge_manifests(folder, tmp_path) -> None:
    """1 GB of nothing, and 200 MB that would be 10 GB once parsed."""
    sparse, lists, numbers = (tmp_path / name for name in ("sparse", "lists", "numbers"))
    for root in (sparse, lists, numbers):
        root.mkdir()
    with open(sparse / "manifest.json", "wb") as file:
        file.truncate(1 << 30)
    (lists / "manifest.json").write_bytes(b"[" + b"[]," * (40 << 20) + b"[]]")
    (numbers / "manifest.json").write_bytes(b'{"format": ' + b"9" * (64 << 20) + b"}")
    for said, word in zip(
        limited(sparse, lists, numbers), ("at most", "lists and objects", "expected JSON"), strict=True
    ):
        for message in said.values():
            assert message is not None
            assert word in message


def test_a_huge_manifest_over_http(tmp_path) -> None:
    (tmp_path / "one").mkdir()
    with open(tmp_path / "one" / "manifest.json", "wb") as file:
        file.truncate(1 << 30)
    from shared.cache import open_cache
    from shared.errors import TidecacheError

    with serve(tmp_path) as (address, _), pytest.raises(TidecacheError, match="expected at most"):
        open_cache(f"{address}/one")
