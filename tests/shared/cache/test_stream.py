"""Streams of draws: which items, from which cache, in what memory, and what damage does to them."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from shared.cache import open_cache, order
from shared.cache.reader import Cache
from shared.cache.records import ContextScores, DrawRecord, ShardRange
from shared.cache.selection import Selection
from shared.cache.stream import DocumentStream, DrawStream
from shared.cache.writer import CacheWriter
from shared.errors import TidecacheError
from tests.shared.cache import synthetic


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    """23 documents with 4 draws in 6 shards, two contexts."""
    path = tmp_path_factory.mktemp("cache")
    synthetic.build(path, documents=24, drop=(2,), contexts=("compdemo", "plain"))
    return open_cache(path)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Cache:
    """8 documents with 2 draws, without a topk lane."""
    path = tmp_path_factory.mktemp("other")
    synthetic.build(path, documents=8, draws=2, drop=(), lanes=("gold",), seed=9)
    return open_cache(path)


@pytest.fixture
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "WINDOW_DRAWS", 5)


def keys(stream: DrawStream, numbers) -> list[tuple[str, int]]:
    return [(d.document, d.draw) for d in (stream[n] for n in numbers)]


@pytest.mark.usefixtures("_small_windows")
@pytest.mark.parametrize("together", [1, 2, 3, 4])
def test_items_are_the_stored_draws_each_once_a_pass(cache: Cache, together: int) -> None:
    stream = DrawStream([cache], together=together, seed=1)
    stored = {(d.document, d.draw): d for d in cache.iter_draws()}
    for passed in range(2):
        seen = []
        for number in range(passed * 92, (passed + 1) * 92):
            draw = stream[number]
            expected = stored[draw.document, draw.draw]
            seen.append((draw.document, draw.draw))
            assert draw.stored.messages == expected.stored.messages
            np.testing.assert_array_equal(draw.chunks, expected.chunks)
            np.testing.assert_array_equal(draw.split, expected.split)
            np.testing.assert_array_equal(draw.gold_logp, expected.gold_logp)
            assert draw.candidates == expected.candidates
            place = stream.place(number)
            assert stream.indexes[0].draw_R[place.row] == draw.draw
        assert set(Counter(seen).values()) == {1}
        assert len(seen) == len(stored)


@pytest.mark.usefixtures("_small_windows")
def test_any_access_gives_the_same_items(cache: Cache, other: Cache) -> None:
    ordered = keys(DrawStream([cache, other], [3, 1], topk=False), range(150))
    scattered = DrawStream([cache, other], [3, 1], topk=False)
    for number in np.random.default_rng(0).permutation(150).tolist():
        assert keys(scattered, [number]) == [ordered[number]]
    resumed = DrawStream([cache, other], [3, 1], topk=False).iterate(77)
    assert [(d.document, d.draw) for d in itertools.islice(resumed, 40)] == ordered[77:117]


def test_caches_go_through_their_own_passes(cache: Cache, other: Cache) -> None:
    stream = DrawStream([cache, other], [3, 1], topk=False)
    sources = [stream.place(n).cache for n in range(128)]
    assert all(sources[n : n + 4].count(1) == 1 for n in range(0, 120, 4))
    found = keys(stream, range(len(sources)))
    alone = DrawStream([cache])
    own = [key for key, source in zip(found, sources, strict=True) if source == 0][:92]
    assert own == keys(alone, range(92))  # a mixture only interleaves
    second = [key for key, source in zip(found, sources, strict=True) if source == 1]
    assert set(Counter(second[:16]).values()) == {1}
    assert set(Counter(second[:32]).values()) == {2}


def test_groups_of_a_mixture_are_of_one_document(cache: Cache, other: Cache) -> None:
    stream = DrawStream([cache, other], [1, 2], together=2, topk=False)
    for start in range(0, 60, 2):
        first, second = stream[start], stream[start + 1]
        assert first.document == second.document
        assert first.draw != second.draw


def test_a_cache_that_is_given_twice_is_shuffled_differently(cache: Cache) -> None:
    stream = DrawStream([cache, cache])
    assert keys(stream, range(0, 46, 2)) != keys(stream, range(1, 46, 2))


def test_only_what_is_asked_for_is_read(cache: Cache) -> None:
    draw = DrawStream([cache], context="plain", topk=False)[0]
    stored = next(d for d in cache.iter_draws() if (d.document, d.draw) == (draw.document, draw.draw))
    assert set(draw.scores) == {"plain"}
    np.testing.assert_array_equal(draw.gold_logp, stored.gold_logp_of("plain"))
    with pytest.raises(TidecacheError, match="no topk lane"):
        _ = draw.candidates
    with pytest.raises(TidecacheError, match="holds the contexts compdemo, plain"):
        DrawStream([cache], context="demo")[0]


def test_selections(cache: Cache) -> None:
    stream = DrawStream([cache], selection=Selection(0.2, 0.8, names="document 1*"))
    assert stream.indexes[0].draws > 10
    for draw in itertools.islice(stream.iterate(), stream.indexes[0].draws):
        assert 0.2 <= draw.timestep <= 0.8
        assert draw.stored.name.startswith("document 1")


@pytest.mark.usefixtures("_small_windows")
def test_documents_in_an_order_of_their_own(cache: Cache, other: Cache) -> None:
    draws = DrawStream([cache, other], [1, 1], topk=False)
    visits = [DocumentStream(draws)[n] for n in range(64)]
    assert [v.cache for v in visits] == [0, 1] * 32
    second = [v for v in visits if v.cache == 1]
    assert [v.times for v in second] == [0] * 8 + [1] * 8 + [2] * 8 + [3] * 8
    for start in range(0, 32, 8):
        assert {v.stored.key for v in second[start : start + 8]} == {d.document for d in other.iter_draws()}
    first = [v.stored.key for v in visits if v.cache == 0]
    assert len(set(first[:23])) == 23
    assert first[:23] != [k for k, _ in keys(DrawStream([cache]), range(23))]


@pytest.mark.usefixtures("_small_windows")
def test_draws_of_one_document_in_several_shards(tmp_path: Path) -> None:
    """An extended cache, its later draws in shards of other sizes."""
    writer = CacheWriter.open(tmp_path, synthetic.spec(), synthetic.vocabulary())
    for shard in (ShardRange(0, 6, 2, 4), ShardRange(6, 12, 0, 4), ShardRange(0, 3, 0, 2), ShardRange(3, 6, 0, 2)):
        synthetic.write(writer, shard, drop=(2,))
    writer.finish()
    opened = open_cache(tmp_path)
    for together in (1, 4):
        stream = DrawStream([opened], together=together)
        found = keys(stream, range(44))
        assert sorted(found) == sorted((d.document, d.draw) for d in opened.iter_draws())
        assert all(len({k for k, _ in found[n : n + together]}) == 1 for n in range(0, 44, together))


# --- windows -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_small_windows")
def test_each_shard_is_read_once_a_round_and_read_ahead(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = Cache.read_rows

    def counted(self: Cache, index: int, *rest, **options):
        read.append(index)
        return original(self, index, *rest, **options)

    monkeypatch.setattr(Cache, "read_rows", counted)
    stream = DrawStream([cache], together=4)
    _ = [stream[n] for n in range(92)]
    stream._windows[0]._ahead[1].result()  # type: ignore[index]
    first = stream._windows[0].order.round(1)
    ahead = set(stream.indexes[0].shard_R[first.row_N[first.window_N == first.window_N[0]]].tolist())
    assert Counter(read) == Counter([*range(6), *ahead])


def _documents(stream: DrawStream, numbers: range, pipe) -> None:
    pipe.send(keys(stream, numbers))


@pytest.mark.usefixtures("_small_windows")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_that_begins_while_another_reads_ahead(cache: Cache, method: str) -> None:
    stream, expected = DrawStream([cache], together=4), keys(DrawStream([cache], together=4), range(92))
    context = multiprocessing.get_context(method)
    for number in range(40) if method == "fork" else (3,):
        _ = stream[number]  # some of these begin to read ahead
        if number % 4 == 3:
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(target=_documents, args=(stream, range(number, number + 12), theirs))
            child.start()
            assert ours.poll(60), "the child waits for ever"
            assert ours.recv() == expected[number : number + 12]
            child.join(60)
            assert child.exitcode == 0


@pytest.mark.slow
@pytest.mark.parametrize("together", [1, 4])
def test_memory_holds_a_few_shards_of_many(tmp_path: Path, together: int) -> None:
    """40 shards with some 10 MB each once decoded; the measured growth is about 50 MB, and that of a reader that keeps all
    (or, with one draw at a time, a quarter of each) 200 to 400 MB.
    """
    spec = synthetic.spec(k=64)
    writer = CacheWriter.open(tmp_path, spec, synthetic.vocabulary())
    for first in range(0, 160, 4):
        prepared = [(p, synthetic.document(p, chunks=1200)) for p in range(first, first + 4)]
        records = [flat(spec, p, d, k) for p, d in prepared for k in range(4)]
        writer.write_shard(ShardRange(first, first + 4, 0, 4), prepared, [], records, "0", 4096)
    writer.finish()
    command = [sys.executable, "-m", "tests.shared.cache.bounded", str(tmp_path), "16", str(together)]
    system = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}  # others keep what they freed, each as it likes
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3], env=system
    )
    grown, ids = map(int, done.stdout.split())
    assert ids > 150e6  # half of what is decoded
    assert grown < 110e6


def flat(spec, position: int, document, number: int) -> DrawRecord:
    """A draw whose scores are all alike, so that writing is quick and reading takes memory all the same."""
    record = synthetic.draw(replace(spec, lanes=("gold",)), position, document, number)
    gold_logp_N = record.contexts["compdemo"].gold_logp_N
    chunks = int(record.masked_C.sum())
    logp_K = np.log(np.full(spec.k, 0.9 / spec.k, np.float32))
    scores = ContextScores(
        gold_logp_N,
        np.zeros((chunks, len(spec.temperatures)), np.float32),
        np.zeros(spec.k * len(gold_logp_N), np.int32),
        np.tile(logp_K, (chunks, 1)),
    )
    return replace(record, contexts={"compdemo": scores})


# --- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_small_windows")
@pytest.mark.parametrize("kind", ["likelihoods", "documents"])
def test_a_damaged_shard_in_mid_stream_is_named_and_nothing_of_it_comes_out(tmp_path: Path, kind: str) -> None:
    synthetic.build(tmp_path, documents=16, drop=())
    opened = open_cache(tmp_path)
    stream = DrawStream([opened], together=4)
    order_ = [stream.place(n) for n in range(64)]
    victim = int(stream.indexes[0].shard_R[order_[40].row])
    record = opened.shards[victim].likelihoods[0] if kind == "likelihoods" else opened.shards[victim].documents
    path = tmp_path / record.path
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 16
    path.write_bytes(data)
    window = stream._windows[0].order.round(0).window_N
    first_bad = next(n for n in range(64) if window[n] == window[40])
    assert first_bad > 0
    for number in range(first_bad):
        assert stream[number].draw >= 0
    for _ in range(2):  # it does not become good by asking again
        with pytest.raises(TidecacheError, match=rf"{record.path}: expected the digest"):
            stream[first_bad]


def test_damage_in_the_narrow_columns_is_found_by_the_index(tmp_path: Path) -> None:
    """The index reads without digests; the pages' checksums tell."""
    synthetic.build(tmp_path, documents=4, drop=())
    path = tmp_path / open_cache(tmp_path).shards[0].likelihoods[0].path
    columns = [pq.read_metadata(path).row_group(0).column(i) for i in range(4)]
    column = next(c for c in columns if c.path_in_schema == "timestep")
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(TidecacheError, match=r"likelihoods\.parquet: cannot be decoded"):
        DrawStream([open_cache(tmp_path)])
