"""The packed form of a draw's topk lane: round trips, and bytes that are damaged or made to do harm."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.cache import packed_reader, packed_writer
from shared.cache.bits import VarintReader, varints
from shared.cache.grid import Levels, quantise
from shared.cache.packed_layout import Fillings
from shared.cache.packed_reader import Shape
from shared.errors import TidecacheError
from stage1_teacher.fillings import best_fillings
from tests.shared.cache.packed_by_the_page import read_packed


def fillings(seed: int, vocabulary: int, k: int, counts, hot=(2.0,), ids: str = "uniform", scale: float = 1.0):
    """Fillings with any ids, also the same one twice, and log-likelihoods of any steepness."""
    rng = np.random.default_rng(seed)
    count_M = np.array(counts, np.int64)
    size = k * int(count_M.sum())
    skewed = np.exp(rng.random(size) * np.log(vocabulary)).astype(np.int64) - 1
    ids_N = {"uniform": rng.integers(0, vocabulary, size), "skewed": skewed, "one": np.full(size, vocabulary - 1)}[ids]
    logp_MK = -np.cumsum(rng.exponential(scale, (len(counts), k)), axis=1).astype(np.float32)
    log_z_MH = rng.normal(size=(len(counts), len(hot))).astype(np.float32)
    return draw(count_M, ids_N, quantise(logp_MK, log_z_MH, hot))


def draw(count_M, ids_N, levels) -> Fillings:
    return Fillings(np.array([len(count_M)]), count_M, ids_N.astype(np.int32), levels)


def encode(f: Fillings, vocabulary: int) -> bytes:
    """One draw's bytes."""
    [data] = packed_writer.encode(f, vocabulary)
    return data


def again(f: Fillings, data: bytes, vocabulary: int) -> Fillings:
    shape = Shape(vocabulary, f.levels.level_MK.shape[1], f.levels.log_z_MH.shape[1], f.levels.step)
    return packed_reader.decode([data], shape, np.array([f.count_M.sum()]), f.chunks_R)


def decode(data: bytes, vocabulary: int, k: int, hot: int, tokens: int, chunks: int, step: int = 768) -> Fillings:
    return packed_reader.decode([data], Shape(vocabulary, k, hot, step), np.array([tokens]), np.array([chunks]))


def assert_same(a: Fillings, b: Fillings) -> None:
    np.testing.assert_array_equal(a.count_M, b.count_M)
    np.testing.assert_array_equal(a.ids, b.ids)
    assert b.ids.dtype == np.int32
    np.testing.assert_array_equal(a.levels.logp_MK, b.levels.logp_MK)
    np.testing.assert_array_equal(a.levels.log_z, b.levels.log_z)


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 2**32),
    st.one_of(st.integers(2, 2**20), st.sampled_from([2**n + d for n in range(2, 20) for d in (-1, 0, 1)])),
    st.integers(1, 64),
    st.lists(st.integers(1, 5), max_size=30),
    st.sampled_from([(), (2.0,), (0.5, 2.0, 4.0)]),
    st.sampled_from(["uniform", "skewed", "one"]),
    st.sampled_from([0.0, 1e-3, 0.1, 1.0, 30.0]),
)
def test_round_trips(seed, vocabulary, k, counts, hot, ids, scale):
    """By the decoder, and by one that follows the page a number at a time."""
    f = fillings(seed, vocabulary, k, counts, hot, ids, scale)
    data = encode(f, vocabulary)
    assert_same(f, again(f, data, vocabulary))
    if data:
        found_ids, logps, log_z = read_packed(data)
        assert found_ids == f.ids.tolist()
        assert logps == f.levels.logp_MK.reshape(-1).tolist()
        assert log_z == f.levels.log_z.reshape(-1).tolist()


@settings(deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 4), min_size=1, max_size=20), st.integers(1, 32))
def test_combinations_of_few_ids_take_few_bytes(seed, counts, k):
    """What a teacher gives: the best fillings of a longer chunk; each id is written once for each token."""
    rng = np.random.default_rng(seed)
    tokens, vocabulary = sum(counts), 100_000
    ids_NK = np.stack([rng.choice(vocabulary, k, replace=False) for _ in range(tokens)])
    logp_NK = -np.sort(rng.exponential(2.0, (tokens, k)), axis=1)
    flat, logp_MK = best_fillings(ids_NK, logp_NK, np.array(counts))
    f = draw(np.array(counts), flat, quantise(logp_MK, np.zeros((len(counts), 0)), ()))
    data = encode(f, vocabulary)
    assert_same(f, again(f, data, vocabulary))
    distinct = sum(len({ids[at] for ids in chunk}) for chunk in chunks_of(f, k) for at in range(len(chunk[0])))
    assert len(data) < distinct * 17.5 / 8 + k * len(counts) * 4 + k * tokens * 5 / 8 + 60


def chunks_of(f: Fillings, k: int):
    """For each chunk its fillings' ids."""
    ids = iter(f.ids.tolist())
    return [[[next(ids) for _ in range(n)] for _ in range(k)] for n in f.count_M.tolist()]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(1, 3), max_size=12), st.integers(0, 99)), min_size=1, max_size=8),
    st.integers(1, 20),
    st.integers(2, 5000),
)
def test_many_draws_at_a_time_have_the_bytes_of_each_alone(draws, k, vocabulary):
    """Draws of any sizes, some without a masked chunk, with a dictionary and without."""
    each = [fillings(seed, vocabulary, k, counts, ids=("uniform", "skewed", "one")[seed % 3]) for counts, seed in draws]
    step = each[0].levels.step
    together = Fillings(
        np.concatenate([f.chunks_R for f in each]),
        np.concatenate([f.count_M for f in each]),
        np.concatenate([f.ids for f in each]),
        Levels(
            step,
            *(
                np.concatenate([getattr(f.levels, name) for f in each])
                for name in ("scale_M", "first_M", "level_MK", "log_z_MH")
            ),
        ),
    )
    rows = packed_writer.encode(together, vocabulary)
    assert rows == [encode(f, vocabulary) for f in each]
    tokens_R = np.array([f.count_M.sum() for f in each])
    assert_same(together, packed_reader.decode(rows, Shape(vocabulary, k, 1, step), tokens_R, together.chunks_R))


def test_frequent_ids_take_few_bytes():
    """200 ids of 1,000,000, over and over: 8 bits each and a dictionary, not 20."""
    rng = np.random.default_rng(0)
    few = rng.integers(0, 1_000_000, 200)
    f = fillings(0, 1_000_000, 16, [1] * 300, scale=0.0)
    f = draw(f.count_M, rng.choice(few, 4800), f.levels)
    data = encode(f, 1_000_000)
    assert_same(f, again(f, data, 1_000_000))
    assert read_packed(data)[0] == f.ids.tolist()
    assert len(data) < 4800 * 8 / 8 + 4800 / 8 + 1500 + 500


def test_outliers_take_their_own_bytes_only():
    """One difference of 100 nats in a draw of small ones."""
    logp_MK = -np.tile(np.arange(16) * 0.05 + 2.0, (100, 1))
    levels = quantise(logp_MK, np.zeros((100, 0)), ())
    logp_MK[50, 8:] -= 100
    far = quantise(logp_MK, np.zeros((100, 0)), ())
    ids = np.arange(1600, dtype=np.int32)
    near_bytes, far_bytes = (encode(draw(np.ones(100, np.int64), ids, x), 2000) for x in (levels, far))
    assert len(far_bytes) < len(near_bytes) + 40
    assert read_packed(far_bytes)[1] == far.logp_MK.reshape(-1).tolist()


def test_ids_outside_of_the_vocabulary_are_refused():
    f = fillings(0, 100, 4, [1, 2])
    for bad in (-1, 100):
        ids = f.ids.copy()
        ids[3] = bad
        with pytest.raises(ValueError, match="ids"):
            encode(draw(f.count_M, ids, f.levels), 100)


def test_a_draw_of_more_ids_than_the_codec_takes_is_refused():
    levels = quantise(np.zeros((1, 64), np.float32), np.zeros((1, 0)), ())
    tokens = (1 << 18) + 1
    with pytest.raises(TidecacheError, match=f"a draw has {64 * tokens} candidate ids"):
        encode(draw(np.array([tokens]), np.zeros(64 * tokens), levels), 100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary": 501}, "vocabulary 500, expected 501"),
        ({"k": 5}, "k 8, expected 5"),
        ({"hot": 2}, "temperatures 1, expected 2"),
        ({"step": 384}, "step 768, expected 384"),
        ({"tokens": 6}, "tokens 7, expected 6"),
        ({"chunks": 3}, "chunks 4, expected 3"),
    ],
)
def test_bytes_of_another_draw_are_refused(changes, message):
    expected = {"vocabulary": 500, "k": 8, "hot": 1, "tokens": 7, "chunks": 4}
    data = encode(fillings(0, 500, 8, [1, 3, 1, 2]), 500)
    assert decode(data, **expected).count_M.tolist() == [1, 3, 1, 2]
    with pytest.raises(ValueError, match=message):
        decode(data, **{**expected, **changes})


def test_a_draw_without_chunks_has_no_bytes_and_no_other_has_none():
    f = fillings(0, 500, 8, [])
    assert encode(f, 500) == b""
    assert_same(f, again(f, b"", 500))
    for data, chunks in ((b"", 1), (b"\x00", 0)):
        with pytest.raises(ValueError, match="head"):
            decode(data, 500, 8, 1, chunks, chunks)


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 2**32), st.sampled_from(["uniform", "skewed", "one"]), st.data())
def test_damage_is_an_error_or_gives_values_in_their_bounds(seed, ids, data):
    """Any byte changed, or cut off, or added: never a crash, another error, or an id that there is not."""
    f = fillings(seed, 300, 4, [1, 3, 1, 1, 2], ids=ids)
    raw = bytearray(encode(f, 300))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw)))] + bytes(data.draw(st.integers(0, 2)))
    try:
        found = again(f, bytes(raw), 300)
    except ValueError:
        return
    assert len(found.ids) == len(f.ids)
    assert 0 <= found.ids.min() <= found.ids.max() < 300
    logp_MK = found.levels.logp_MK
    assert logp_MK.shape == (5, 4)
    assert (logp_MK <= 0).all()
    assert (np.diff(logp_MK, axis=1) <= 0).all()


def test_a_cut_anywhere_is_an_error():
    f = fillings(0, 300, 4, [1, 3, 1, 1, 2])
    raw = encode(f, 300)
    for stop in range(len(raw)):
        with pytest.raises(ValueError, match=r".+"):
            again(f, raw[:stop], 300)


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 40), st.integers(0, 2**35 - 1)), min_size=1, max_size=30), st.binary(max_size=64)
)
def test_a_head_that_claims_anything_takes_little_memory(numbers, rest):
    """The head says what the reader expects, then anything."""
    head = varints([1, 1000, 64, 1, 768, 300, 300, *numbers])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r".+"):
            decode(head + rest, 1000, 64, 1, 300, 300)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_more_ids_than_a_draw_may_have_are_refused():
    """One byte may stand for eight tokens, so what these may become is bounded before it is made."""
    data = varints([1, 10, 64, 0, 768, 1 << 19, 1]) + bytes(1 << 17)
    with pytest.raises(ValueError, match="sizes"):
        decode(data, 10, 64, 0, 1 << 19, 1)


def test_the_head_is_as_documented():
    head = VarintReader(encode(fillings(0, 157184, 16, [1, 2]), 157184))
    assert [head.next() for _ in range(7)] == [1, 157184, 16, 1, 768, 3, 2]
