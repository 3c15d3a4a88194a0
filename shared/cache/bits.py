"""Numbers as bits and back, whole arrays at a time: what the packed codec (docs/cache-format.md) is built from.

A stream is a sequence of bits, the lowest bit of its first byte first; a number of w bits stands there with its lowest
bit first. Numbers follow each other without gaps, so where one starts follows from the widths before it, and an array
of them is read by arithmetic on positions instead of a loop. In unary a number n is n zeros and a one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
MAX_WIDTH = 32
MAX_NARROW = 3  # numbers of so few bits are taken together before they are placed
MAX_VARINT = 35  # bits


class BitWriter:
    """Collects numbers; `to_bytes` gives the stream, filled up with zeros to a whole byte."""

    def __init__(self) -> None:
        self._values: list[IntArray] = []
        self._widths: list[IntArray] = []

    def varying(self, values_N: IntArray, width_N: IntArray) -> None:
        """Each value in a width of its own, at most `MAX_WIDTH`, which must be enough for it."""
        self._values.append(values_N)
        self._widths.append(width_N)

    def fixed(self, values_N: IntArray, width: int) -> None:
        """Each value in `width` bits."""
        if width > MAX_NARROW:
            self.varying(values_N, np.full(len(values_N), width))
        else:
            self._bits(((values_N[:, None] >> np.arange(width)) & 1).astype(np.uint8).reshape(-1))

    def unary(self, values_N: IntArray) -> int:
        """Each value in unary; the number of bits that all take."""
        stop_N = np.cumsum(values_N + 1)
        length = int(stop_N[-1]) if len(stop_N) else 0
        bits = np.zeros(length, dtype=np.uint8)
        bits[stop_N - 1] = 1
        self._bits(bits)
        return length

    def _bits(self, bits_N: npt.NDArray[np.uint8]) -> None:
        """Single bits, one per byte, taken together to words."""
        packed = np.packbits(bits_N, bitorder="little")
        word_W = np.concatenate([packed, np.zeros(-len(packed) % 4, np.uint8)]).view("<u4").astype(np.int64)
        width_W = np.full(len(word_W), MAX_WIDTH)
        if len(word_W):
            width_W[-1] -= -len(bits_N) % MAX_WIDTH
        self.varying(word_W, width_W)

    def to_bytes(self) -> bytes:
        """The whole stream."""
        value_N = np.concatenate([np.zeros(0, np.int64), *self._values]).astype(np.uint64)
        width_N = np.concatenate([np.zeros(0, np.int64), *self._widths])
        stop_N = np.cumsum(width_N)
        length = int(stop_N[-1]) if len(stop_N) else 0
        start_N = stop_N - width_N
        word_W = np.zeros(length // 32 + 2, dtype=np.uint64)
        window_N = value_N << (start_N & 31).astype(np.uint64)  # of the word that it starts in and the next
        first_N = start_N >> 5
        runs = np.flatnonzero(np.diff(first_N, prepend=-1))  # values of each word that some start in
        if len(runs):
            both_R = np.bitwise_or.reduceat(window_N, runs)
            word_W[first_N[runs]] |= both_R & np.uint64(0xFFFFFFFF)
            word_W[first_N[runs] + 1] |= both_R >> np.uint64(32)
        return word_W.astype("<u4").tobytes()[: (length + 7) // 8]


class BitReader:
    """Reads a stream from its start on. Every method raises ValueError where the stream ends too early, before it
    takes memory for what it was asked for.
    """

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self.length = 8 * len(data)
        self.position = 0
        self._data = data
        word_W = np.concatenate([data, np.zeros(8 + -len(data) % 4, np.uint8)]).view("<u4").astype(np.uint64)
        self._window_W = word_W[:-1] | (word_W[1:] << np.uint64(32))  # 64 bits from each multiple of 32

    def take(self, count: int) -> int:
        """Step over so many bits; where they start."""
        start = self.position
        if count < 0 or count > self.length - start:
            raise ValueError(f"{count} bits expected from bit {start} of {self.length}")
        self.position += count
        return start

    def at(self, start_N: IntArray, width: int | IntArray) -> IntArray:
        """The values of `width` bits that start at these bits, which must lie in what was stepped over."""
        window_N = self._window_W[start_N >> 5] >> (start_N & 31).astype(np.uint64)
        mask = (np.int64(1) << np.asarray(width, dtype=np.int64)) - 1
        return np.asarray(window_N.view(np.int64) & mask)

    def fixed(self, count: int, width: int) -> IntArray:
        """The next `count` values of `width` bits."""
        start = self.take(count * width)
        if width == 0:
            return np.zeros(count, np.int64)
        return self.at(np.arange(start, start + count * width, width), width)

    def varying(self, width_N: IntArray) -> IntArray:
        """The next values, each of its own width."""
        stop_N = np.cumsum(width_N)
        start = self.take(int(stop_N[-1]) if len(stop_N) else 0)
        return self.at(start + stop_N - width_N, width_N)

    def unary(self, count: int, length: int) -> IntArray:
        """The next `count` values in unary, which must take `length` bits."""
        start = self.take(length)
        first = start >> 3
        bits = np.unpackbits(self._data[first : (start + length + 7) >> 3], bitorder="little")
        ones = np.flatnonzero(bits[start - 8 * first : start - 8 * first + length].view(np.bool_))
        if len(ones) != count or (count and ones[-1] != length - 1) or (not count and length):
            raise ValueError(f"{count} numbers in unary expected in {length} bits, found {len(ones)}")
        return np.asarray(np.diff(ones, prepend=-1) - 1)

    def finish(self) -> None:
        """Raise ValueError unless all that is left is less than a byte of zeros."""
        left = self.length - self.position
        if left >= 8 or (left and self.fixed(left, 1).any()):
            raise ValueError(f"{left} bits after the end")


def varints(values: Sequence[int]) -> bytes:
    """Numbers from 0 on in 7 bits per byte, the lowest first; the highest bit of a byte says that more follow."""
    out = bytearray()
    for value in values:
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        out.append(value)
    return bytes(out)


class VarintReader:
    """Reads `varints` from the start of some bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def next(self) -> int:
        """The next number, below 2^35. Raises ValueError where there is none."""
        value = shift = 0
        while True:
            if self.position >= len(self._data) or shift >= MAX_VARINT:
                raise ValueError("its head is cut off or no head")
            byte = self._data[self.position]
            self.position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value


def zigzag(value: int) -> int:
    """Whole numbers as numbers from 0 on: 0, −1, 1, −2, … become 0, 1, 2, 3, …"""
    return 2 * value if value >= 0 else -2 * value - 1


def unzigzag(value: int) -> int:
    """The inverse of `zigzag`."""
    return value >> 1 if value % 2 == 0 else -(value >> 1) - 1
