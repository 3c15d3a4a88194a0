"""Numbers as bits and back, whole arrays at a time: what the packed codec (docs/cache-format.md) is built from.

A stream is a sequence of bits, the lowest bit of its first byte first; a number of w bits stands there with its lowest
bit first. Numbers follow each other without gaps, so where one starts follows from the widths before it, and an array
of them is read by arithmetic on positions instead of a loop. In unary a number n is n zeros and a one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shared.ragged import ranges, within

IntArray = npt.NDArray[np.int64]
MAX_WIDTH = 32
MAX_VARINT = 35  # bits


class BitWriter:
    """Collects numbers for R streams side by side: the first stream's, then those of the second, and so on; `count_R`
    says how many for each.
    """

    def __init__(self) -> None:
        self._parts: list[
            tuple[IntArray, IntArray, IntArray, IntArray]
        ] = []  # counts, values, their places in the part, lengths

    def varying(self, count_R: IntArray, values_N: IntArray, width_N: IntArray) -> None:
        """Each value in a width of its own, at most `MAX_WIDTH`, which must be enough for it."""
        stop_N = np.cumsum(width_N)
        self._add(count_R, values_N, stop_N - width_N, stop_N)

    def fixed(self, count_R: IntArray, values_N: IntArray, width_R: int | IntArray) -> None:
        """Each value in the width of its stream."""
        self.varying(count_R, values_N, np.repeat(np.broadcast_to(np.asarray(width_R), count_R.shape), count_R))

    def unary(self, count_R: IntArray, values_N: IntArray) -> IntArray:
        """Each value in unary; the number of bits that all take, by stream."""
        stop_N = np.cumsum(values_N + 1)
        return self._add(count_R, np.ones_like(values_N), stop_N - 1, stop_N)

    def _add(self, count_R: IntArray, value_N: IntArray, start_N: IntArray, stop_N: IntArray) -> IntArray:
        """Values that start at these bits of all streams' parts together, each value's part ending before `stop_N`; the
        number of bits by stream.
        """
        edge_R = np.concatenate([[0], stop_N])[np.concatenate([[0], np.cumsum(count_R)])]
        start_N = start_N - np.repeat(edge_R[:-1], count_R)
        length_R = np.diff(edge_R)
        self._parts.append((count_R, value_N, start_N, length_R))
        return np.asarray(length_R)

    def to_streams(self) -> list[bytes]:
        """The whole streams, each filled up with zeros to a whole byte."""
        length_RS = np.stack([length_R for *_, length_R in self._parts], axis=1)
        bytes_R = (length_RS.sum(1) + 7) // 8
        stop_R = np.cumsum(bytes_R)
        start_RS = 8 * (stop_R - bytes_R)[:, None] + np.cumsum(length_RS, axis=1) - length_RS
        word_W = np.zeros(int(stop_R[-1]) // 4 + 2, dtype=np.uint64)
        for part, (count_R, value_N, within_N, _) in enumerate(self._parts):
            if not len(value_N):
                continue
            start_N = within_N + np.repeat(start_RS[:, part], count_R)
            window_N = value_N << (start_N & 31)  # of the word that it starts in and the next
            first_N = start_N >> 5
            runs = np.flatnonzero(np.diff(first_N, prepend=-1))  # the values that start in one word
            both_R = np.bitwise_or.reduceat(window_N, runs).astype(np.uint64)
            word_W[first_N[runs]] |= both_R & np.uint64(0xFFFFFFFF)
            word_W[first_N[runs] + 1] |= both_R >> np.uint64(32)
        data = word_W.astype("<u4").tobytes()
        return [data[stop - count : stop] for stop, count in zip(stop_R.tolist(), bytes_R.tolist(), strict=True)]


class BitReader:
    """Reads R streams side by side, each from its start on: what comes out are the values of the first, then those of the
    second, and so on. `count_R` says how many of each stream. Every method raises ValueError where a stream ends too
    early, before it takes memory for what it was asked for.
    """

    def __init__(self, streams: Sequence[bytes | memoryview]) -> None:
        self._data = np.frombuffer(b"".join(streams), np.uint8)
        self._stop_R = np.cumsum([8 * len(stream) for stream in streams], dtype=np.int64)
        self._position_R = np.concatenate([[0], self._stop_R[:-1]])
        padded = np.concatenate([self._data, np.zeros(8 + -len(self._data) % 4, np.uint8)])
        word_W = padded.view("<u4").astype(np.uint64)
        self._window_W = (word_W[:-1] | (word_W[1:] << np.uint64(32))).view(
            np.int64
        )  # 64 bits from each multiple of 32

    def _take(self, bits_R: IntArray) -> IntArray:
        """Step over so many bits of each stream; where they start."""
        if (bits_R < 0).any() or (bits_R > self._stop_R - self._position_R).any():
            raise ValueError("more bits are expected than there are")
        start_R = self._position_R
        self._position_R = start_R + bits_R
        return start_R

    def _at(self, start_N: IntArray, width_N: int | IntArray) -> IntArray:
        """The values of so many bits, at most `MAX_WIDTH`, that start at these bits."""
        window_N = self._window_W[start_N >> 5] >> (start_N & 31)  # the sign is shifted in beyond the 33rd bit
        return np.asarray(window_N & ((np.int64(1) << np.asarray(width_N, dtype=np.int64)) - 1))

    def fixed(self, count_R: IntArray, width_R: int | IntArray) -> IntArray:
        """Values of a width that each stream has for all of them."""
        width_R = np.broadcast_to(np.asarray(width_R, dtype=np.int64), count_R.shape)
        start_R = self._take(count_R * width_R)
        width_N = np.repeat(width_R, count_R)
        return self._at(np.repeat(start_R, count_R) + within(count_R) * width_N, width_N)

    def varying(self, count_R: IntArray, width_N: IntArray) -> IntArray:
        """Values each of its own width."""
        stop_N = np.concatenate([[0], np.cumsum(width_N)])
        before_R = stop_N[np.cumsum(count_R) - count_R]
        start_R = self._take(stop_N[np.cumsum(count_R)] - before_R)
        return self._at(stop_N[:-1] + np.repeat(start_R - before_R, count_R), width_N)

    def unary(self, count_R: IntArray, length_R: IntArray) -> IntArray:
        """Values in unary, which must take so many bits of each stream."""
        start_R = self._take(length_R)
        first_R = start_R >> 3
        bytes_R = ((start_R + length_R + 7) >> 3) - first_R
        ones = np.flatnonzero(np.unpackbits(self._data[ranges(first_R, bytes_R)], bitorder="little").view(np.bool_))
        low_R = 8 * (np.cumsum(bytes_R) - bytes_R) + (start_R & 7)
        first_one_R = np.searchsorted(ones, low_R)
        found_R = np.searchsorted(ones, low_R + length_R) - first_one_R
        some = np.flatnonzero(count_R)
        if (
            (found_R != count_R).any()
            or (length_R[count_R == 0] != 0).any()
            or (ones[(first_one_R + count_R)[some] - 1] != (low_R + length_R)[some] - 1).any()
        ):
            raise ValueError("other numbers in unary are expected than there are")
        at_N = ones[ranges(first_one_R, count_R)]
        before_N = np.concatenate([[0], at_N[:-1]])[: len(at_N)]
        before_N[(np.cumsum(count_R) - count_R)[some]] = low_R[some] - 1
        return np.asarray(at_N - before_N - 1)

    def finish(self) -> None:
        """Raise ValueError unless all that is left of each stream is less than a byte of zeros."""
        left_R = self._stop_R - self._position_R
        if (left_R >= 8).any() or self.fixed(left_R, 1).any():
            raise ValueError("there are bits after the end")


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
