"""Numbers as bits: whole arrays against one number at a time, and streams that end too early."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.cache.bits import BitReader, BitWriter, VarintReader, unzigzag, varints, zigzag

WIDTHS = st.lists(st.integers(0, 32), max_size=60)


def reader(data: bytes) -> BitReader:
    return BitReader(np.frombuffer(data, np.uint8))


@given(st.data())
def test_a_stream_is_its_numbers_one_by_one(data):
    """Against Python's own integers: each number's bits, the lowest first, one after the other."""
    widths = data.draw(WIDTHS)
    values = [data.draw(st.integers(0, (1 << w) - 1)) for w in widths]
    width = data.draw(st.integers(0, 20))
    more = [data.draw(st.integers(0, (1 << width) - 1)) for _ in range(data.draw(st.integers(0, 20)))]
    counts = data.draw(st.lists(st.integers(0, 100), max_size=20))
    writer = BitWriter()
    writer.varying(np.array(values, np.int64), np.array(widths, np.int64))
    writer.fixed(np.array(more, np.int64), width)
    length = writer.unary(np.array(counts, np.int64))
    stream = position = 0
    for value, w in [
        *zip(values, widths, strict=True),
        *((v, width) for v in more),
        *((1 << n, n + 1) for n in counts),
    ]:
        stream |= value << position
        position += w
    expected = stream.to_bytes((position + 7) // 8, "little")
    found = writer.to_bytes()
    assert (found, length) == (expected, sum(counts) + len(counts))
    bits = reader(found)
    assert bits.varying(np.array(widths, np.int64)).tolist() == values
    assert bits.fixed(len(more), width).tolist() == more
    assert bits.unary(len(counts), length).tolist() == counts
    bits.finish()


def test_a_stream_that_ends_too_early_is_refused_before_memory_is_taken():
    bits = reader(b"\xff\x01")
    for read in (
        lambda: bits.fixed(1 << 50, 3),
        lambda: bits.varying(np.array([9, 8])),
        lambda: bits.unary(1, 17),
        lambda: bits.unary(1 << 40, 3),
        lambda: bits.take(-1),
    ):
        with pytest.raises(ValueError, match=r"expected"):
            read()
    assert bits.position in (0, 3)


def test_unary_ends_with_its_last_number():
    with pytest.raises(ValueError, match="2 numbers in unary"):
        reader(b"\x05").unary(2, 4)  # 1, 01, and a 0 that belongs to no number
    with pytest.raises(ValueError, match="0 numbers in unary"):
        reader(b"\x00").unary(0, 4)


@pytest.mark.parametrize("data", [b"\x01\x02", b"\x01\x00"])
def test_what_comes_after_the_end_is_refused(data):
    bits = reader(data)
    bits.fixed(1, 1)
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
