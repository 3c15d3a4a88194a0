"""`tidecache cache merge`: parts become the cache that one capture would have written; nothing else is let together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.cache.copying import copy_shard
from shared.cache.manifest import FileRecord, derive, read_manifest, seal
from shared.cache.merging import merge_caches
from shared.cache.parquet import encode, footer_of
from shared.cache.reader import Cache
from shared.cache.records import ShardRange
from shared.cache.slicing import Cut, slice_cache
from shared.cache.verify import verify
from shared.cache.writer import CacheWriter
from shared.documents import Dropped
from shared.errors import TidecacheError
from tests.shared import test_spec
from tests.shared.cache import synthetic
from tests.shared.cache.test_slicing import HELD, assert_goes_on, capture
from tests.shared.cache.test_writer import snapshot
from tests.shared.test_cli import tidecache


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("once") / "cache"
    capture(folder, 12, 4, draw_ranges=2)
    capture(folder / "held-out", 8, 4, offset=HELD)
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """As two jobs with --part 1/2 and 2/2 write them on machines of their own."""
    folders = [tmp_path_factory.mktemp("parts") / str(i) for i in range(2)]
    for i, folder in enumerate(folders):
        capture(folder, 12, 4, draw_ranges=2, parts=(i,))
        capture(folder / "held-out", 8, 4, offset=HELD, parts=(i,))
    return folders


def test_parts_become_the_whole_to_the_byte(once: Path, parts: list[Path], tmp_path: Path) -> None:
    merged = merge_caches(parts, tmp_path / "out")
    assert merged.manifest.content == read_manifest(once).content
    assert merged.held_out.content == read_manifest(once / "held-out").content
    assert merged.repeated == 0
    assert snapshot(tmp_path / "out") == snapshot(once)
    assert verify(tmp_path / "out").problems == ()


def test_draws_and_documents_in_any_order(once: Path, tmp_path: Path) -> None:
    """Caches of some draws each, one of which has all documents; what is there twice is there once."""
    capture(tmp_path / "a", 12, 2)
    capture(tmp_path / "b", 8, 4, draw_ranges=2)
    capture(tmp_path / "c", 12, 4, draw_ranges=2, parts=(0,))
    merged = merge_caches([tmp_path / "c", tmp_path / "b", tmp_path / "a"], tmp_path / "out")
    assert merged.repeated == 2 + 3
    assert merged.manifest.content == read_manifest(once).content
    assert merged.manifest.totals == read_manifest(once).totals
    assert merged.held_out is None


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sets(st.integers(0, 2), min_size=1), min_size=6, max_size=6))
def test_any_partition_of_the_shards(once: Path, tmp_path_factory: pytest.TempPathFactory, holders: list[set]) -> None:
    """Each shard in one cache or several: the whole comes out, and each is there once."""
    folder = tmp_path_factory.mktemp("partition")
    whole = Cache.open(once)
    assert len(whole.shards) == len(holders)
    for part in range(3):
        writer = CacheWriter.open(folder / str(part), whole.spec, whole.vocabulary())
        for index, held_by in enumerate(holders):
            if part in held_by:
                copy_shard(writer, whole, index)
        writer.finish()
    merged = merge_caches([folder / str(part) for part in range(3)], folder / "out")
    assert merged.manifest == whole.manifest
    assert merged.repeated == sum(len(held_by) - 1 for held_by in holders)


def test_the_output_may_be_there_already(once: Path, parts: list[Path], tmp_path: Path) -> None:
    merge_caches(parts[:1], tmp_path / "out")
    partial = read_manifest(tmp_path / "out")
    assert partial.content == read_manifest(parts[0]).content
    merge_caches(parts[1:], tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(once)


def test_another_pyarrow_may_have_written_the_same_documents(once: Path, tmp_path: Path) -> None:
    """Then the bytes of the documents files differ, and one of them is as good as the other."""
    capture(tmp_path / "a", 12, 2)
    capture(tmp_path / "b", 12, 4, draw_ranges=2)
    cache = Cache.open(tmp_path / "b")
    receipts = []
    for receipt in cache.shards[1::2]:  # draws 2 and 3
        path = tmp_path / "b" / receipt.documents.path
        data = _written_otherwise(path)
        path.write_bytes(data)
        record = FileRecord.of(receipt.documents.path, data, receipt.documents.rows, receipt.documents.columns)
        receipts.append(dataclasses.replace(receipt, documents=record))
    manifest = derive(cache.spec, cache.manifest.vocabulary, receipts)
    (tmp_path / "b" / "manifest.json").write_bytes(seal(manifest.to_json()))
    merged = merge_caches([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert merged.manifest.content == read_manifest(once).content
    assert verify(tmp_path / "out").problems == ()


def _written_otherwise(path: Path) -> bytes:
    """The same rows and footer, other bytes."""
    table = pq.read_table(path)
    return encode(table, {**footer_of(pq.read_metadata(path).metadata), "zzz": "another writer"})


def test_a_widened_shard_is_written_anew(once: Path, tmp_path: Path) -> None:
    """Its files are of an earlier spec, which the new cache never had."""
    capture(tmp_path / "a", 12, 4, draw_ranges=2)
    cache = Cache.open(tmp_path / "a")
    receipt, *others = cache.shards
    path = tmp_path / "a" / receipt.likelihoods[0].path
    data = encode(pq.read_table(path), {**footer_of(pq.read_metadata(path).metadata), "fingerprint": "0" * 32})
    path.write_bytes(data)
    old = receipt.likelihoods[0]
    widened = dataclasses.replace(receipt, likelihoods=(FileRecord.of(old.path, data, old.rows, old.columns),))
    manifest = derive(cache.spec, cache.manifest.vocabulary, [widened, *others], widened_from=("0" * 32,))
    (tmp_path / "a" / "manifest.json").write_bytes(seal(manifest.to_json()))
    merged = merge_caches([tmp_path / "a"], tmp_path / "out")
    assert merged.manifest.widened_from == ()
    assert merged.manifest.content == read_manifest(once).content
    assert verify(tmp_path / "out").problems == ()
    name = receipt.likelihoods[0].path
    assert (tmp_path / "out" / name).read_bytes() == (once / name).read_bytes()  # its statistics too


@pytest.mark.parametrize(("field", "other"), test_spec.mutations(), ids=lambda v: v if isinstance(v, str) else "")
def test_another_spec_is_refused_with_the_field_and_both_values(field: str, other, tmp_path: Path) -> None:
    empty_cache(tmp_path / "a", test_spec.SPEC)
    empty_cache(tmp_path / "b", other)
    with pytest.raises(TidecacheError, match="different specs") as caught:
        merge_caches([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    from shared.spec import differences

    ((_, ours, theirs),) = [d for d in differences(test_spec.SPEC, other) if d[0] == field]
    assert f"{field}: {ours!r} and {theirs!r}" in str(caught.value)
    assert not (tmp_path / "out").exists()


def empty_cache(folder: Path, spec) -> None:
    folder.mkdir()
    record = FileRecord("teacher_vocab.parquet", 0, "0" * 32, 0, ())
    (folder / "manifest.json").write_bytes(seal(derive(spec, record, ()).to_json()))


def shard(folder: Path, shard_range: ShardRange, positions: dict[int, int], corpus: str = "corpus") -> Path:
    """A cache of one shard; `positions`: which synthetic document lies where."""
    spec = synthetic.spec()
    writer = CacheWriter.open(folder, spec, synthetic.vocabulary())
    prepared = [(p, synthetic.document(d)) for p, d in positions.items()]
    dropped = [
        (p, Dropped("0" * 32, "nothing", "empty", ""))
        for p in range(shard_range.first_document, shard_range.document_stop)
        if p not in positions
    ]
    draws = range(shard_range.first_draw, shard_range.draw_stop)
    records = [synthetic.draw(spec, p, d, k) for p, d in prepared for k in draws]
    writer.write_shard(shard_range, prepared, dropped, records, corpus, 4096)
    writer.finish()
    return folder


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    a = shard(tmp_path / "a", ShardRange(0, 2, 0, 2), {0: 0, 1: 1})
    cases = {
        "different corpora: their documents have the same positions": (ShardRange(0, 2, 0, 2), {0: 5, 1: 6}, "other"),
        "different values for the same draws": (ShardRange(0, 2, 0, 2), {0: 0}, "corpus"),
        "hold different documents at position 1": (ShardRange(0, 2, 2, 4), {0: 0, 1: 7}, "corpus"),
        "hold one document at two positions": (ShardRange(2, 4, 0, 2), {2: 8, 3: 1}, "corpus"),
        "some of the same draws, but not all": (ShardRange(0, 3, 0, 2), {0: 0, 1: 1, 2: 2}, "corpus"),
    }
    for number, (message, (shard_range, positions, corpus)) in enumerate(cases.items()):
        b = shard(tmp_path / f"b{number}", shard_range, positions, corpus)
        for order in ([a, b], [b, a]):
            with pytest.raises(TidecacheError, match=message) as caught:
                merge_caches(order, tmp_path / "out")
            assert str(a) in str(caught.value)
            assert str(b) in str(caught.value)
    held = shard(tmp_path / "held" / "held-out", ShardRange(0, 1, 0, 2), {0: 1})
    shard(held.parent, ShardRange(4, 5, 0, 2), {4: 9})
    with pytest.raises(TidecacheError, match="held out in one of the caches and not in another"):
        merge_caches([a, held.parent], tmp_path / "out")
    with pytest.raises(TidecacheError, match="a folder of its own"):
        merge_caches([a], a / "inside")
    assert not (tmp_path / "out").exists()


def test_names_in_a_manifest_do_not_decide_what_is_written(once: Path, tmp_path: Path) -> None:
    """A documents file that calls itself the manifest is written under the name that its range gives it."""
    capture(tmp_path / "a", 4, 4)
    cache = Cache.open(tmp_path / "a")
    receipt = cache.shards[0]
    evil = dataclasses.replace(receipt, documents=dataclasses.replace(receipt.documents, path="x/manifest.json"))
    (tmp_path / "a" / "x").mkdir()
    (tmp_path / "a" / receipt.documents.path).rename(tmp_path / "a" / "x" / "manifest.json")
    (tmp_path / "a" / "manifest.json").write_bytes(
        seal(derive(cache.spec, cache.manifest.vocabulary, [evil]).to_json())
    )
    merged = merge_caches([tmp_path / "a"], tmp_path / "out")
    assert merged.manifest.shards[0].documents.path == receipt.documents.path
    assert not (tmp_path / "out" / "x").exists()
    assert verify(tmp_path / "out").problems == ()


@pytest.mark.slow
def test_killed_at_every_step_it_goes_on(tmp_path: Path) -> None:
    assert_goes_on("merge", tmp_path, 1)


def test_killed_at_some_steps_it_goes_on(tmp_path: Path) -> None:
    assert_goes_on("merge", tmp_path, 11)


def test_the_command(once: Path, parts: list[Path], tmp_path: Path) -> None:
    done = tidecache("cache", "merge", *map(str, parts), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "10 documents, 40 draws, 6 documents held out" in done.stdout
    assert read_manifest(tmp_path / "out").content == read_manifest(once).content


@pytest.mark.parametrize(
    "footer", [{"statistics": [1]}, {"statistics": {"plain": {"kl_BT": "x"}}}, {"dropped": [1]}, {"dropped": None}]
)
def test_footers_that_are_none_end_in_one_line(footer: dict, tmp_path: Path) -> None:
    """A hostile cache, digests and all in order, whose shard must be written anew."""
    capture(tmp_path / "a", 4, 2)
    cache = Cache.open(tmp_path / "a")
    receipt = cache.shards[0]
    name = "documents" if "dropped" in footer else "likelihoods"
    record = receipt.documents if name == "documents" else receipt.likelihoods[0]
    path = tmp_path / "a" / record.path
    data = encode(pq.read_table(path), {**footer_of(pq.read_metadata(path).metadata), **footer})
    path.write_bytes(data)
    changed = FileRecord.of(record.path, data, record.rows, record.columns)
    evil = dataclasses.replace(receipt, **{name: changed if name == "documents" else (changed,)})
    manifest = derive(cache.spec, cache.manifest.vocabulary, [evil])
    (tmp_path / "a" / "manifest.json").write_bytes(seal(manifest.to_json()))
    with pytest.raises(TidecacheError, match="not a shard's"):
        slice_cache(tmp_path / "a", tmp_path / "out", Cut(k=1))
