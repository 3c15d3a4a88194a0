"""Numbers as bits: whole arrays against one number at a time, and streams that end too early."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.cache.bits import BitReader, BitWriter, VarintReader, unzigzag, varints, zigzag

WIDTHS = st.lists(st.integers(0, 32), max_size=60)


def one(count: int) -> np.ndarray:
    """Of one stream."""
    return np.array([count])


def reader(data: bytes) -> BitReader:
    return BitReader([data])


def numbers(draw, widths) -> list[int]:
    return [draw(st.integers(0, (1 << w) - 1)) for w in widths]


@given(st.data(), st.integers(1, 5))
def test_streams_are_their_numbers_one_by_one(data, streams):
    """Against Python's own integers: each number's bits, the lowest first, one after the other."""
    widths = [data.draw(WIDTHS) for _ in range(streams)]
    values = [numbers(data.draw, w) for w in widths]
    width_R = np.array([data.draw(st.integers(0, 20)) for _ in range(streams)])
    more = [numbers(data.draw, [w] * data.draw(st.integers(0, 9))) for w in width_R.tolist()]
    counts = [data.draw(st.lists(st.integers(0, 100), max_size=20)) for _ in range(streams)]

    def lengths(lists) -> np.ndarray:
        return np.array([len(x) for x in lists])

    def flat(lists) -> np.ndarray:
        return np.array([x for part in lists for x in part], dtype=np.int64)

    writer = BitWriter()
    writer.varying(lengths(values), flat(values), flat(widths))
    writer.fixed(lengths(more), flat(more), width_R)
    unary_R = writer.unary(lengths(counts), flat(counts))
    found = writer.to_streams()
    for r in range(streams):
        stream = position = 0
        parts = [*zip(values[r], widths[r], strict=True), *((v, int(width_R[r])) for v in more[r])]
        for value, w in [*parts, *((1 << n, n + 1) for n in counts[r])]:
            stream |= value << position
            position += w
        assert found[r] == stream.to_bytes((position + 7) // 8, "little")
        assert unary_R[r] == sum(counts[r]) + len(counts[r])
    bits = BitReader(found)
    np.testing.assert_array_equal(bits.varying(lengths(values), flat(widths)), flat(values))
    np.testing.assert_array_equal(bits.fixed(lengths(more), width_R), flat(more))
    np.testing.assert_array_equal(bits.unary(lengths(counts), unary_R), flat(counts))
    bits.finish()


def test_a_stream_that_ends_too_early_is_refused_before_memory_is_taken():
    bits = reader(b"\xff\x01")
    for read in (
        lambda: bits.fixed(one(1 << 50), 3),
        lambda: bits.varying(one(2), np.array([9, 8])),
        lambda: bits.unary(one(1), one(17)),
        lambda: bits.fixed(one(-1), 1),
    ):
        with pytest.raises(ValueError, match="more bits are expected"):
            read()
    with pytest.raises(ValueError, match="in unary"):
        bits.unary(one(1 << 40), one(3))


def test_a_stream_does_not_run_on_into_the_next():
    bits = BitReader([b"\x00", b"\xff"])
    with pytest.raises(ValueError, match="more bits are expected"):
        bits.fixed(np.array([9, 0]), 1)
    with pytest.raises(ValueError, match="in unary"):
        BitReader([b"\x00", b"\xff"]).unary(np.array([1, 1]), np.array([8, 1]))


def test_unary_ends_with_its_last_number():
    with pytest.raises(ValueError, match="in unary"):
        reader(b"\x05").unary(one(2), one(4))  # 1, 01, and a 0 that belongs to no number
    with pytest.raises(ValueError, match="in unary"):
        reader(b"\x00").unary(one(0), one(4))


@pytest.mark.parametrize("data", [b"\x01\x02", b"\x01\x00", b"\x03"])
def test_what_comes_after_the_end_is_refused(data):
    bits = BitReader([b"\x01", data])
    bits.fixed(np.array([1, 1]), 1)
    with pytest.raises(ValueError, match="after the end"):
        bits.finish()


@given(st.lists(st.integers(0, (1 << 35) - 1), max_size=10))
def test_varints(values):
    data = varints(values)
    found = VarintReader(data)
    assert [found.next() for _ in values] == values
    assert found.position == len(data)
    with pytest.raises(ValueError, match="cut off"):
        found.next()


def test_an_endless_varint_is_refused():
    with pytest.raises(ValueError, match="no head"):
        VarintReader(b"\xff" * 100).next()


@given(st.integers(-(1 << 40), 1 << 40))
def test_zigzag(value):
    assert zigzag(value) >= 0
    assert unzigzag(zigzag(value)) == value
