"""Reads packed draws (`shared.cache.packed_layout`), many at a time; trusts nothing that they say.

What the reader knows from elsewhere (vocabulary, k, temperatures, tokens and chunks of each draw) the heads must say as
well, and before arrays are made for numbers that a head announces, there must be bits for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shared.cache.bits import MAX_WIDTH, BitReader, VarintReader, unzigzag
from shared.cache.grid import MAX_FIRST, MAX_VALUE, SHIFTS, Levels
from shared.cache.packed_layout import (
    ESCAPE,
    ESCAPE_BITS,
    MAX_CLASS_BITS,
    MAX_DICTIONARY,
    MAX_RICE,
    MAX_ROW_VALUES,
    VERSION,
    Fillings,
    IdArray,
    IntArray,
    bit_length,
    class_widths,
    dictionary_groups,
    places,
    rice_parameters,
)
from shared.ragged import sums

MAX_CLASSES = 1 << MAX_CLASS_BITS


@dataclass(frozen=True)
class Shape:
    """What a spec says of its draws. `step`: units of a level (`shared.cache.grid.step_of`)."""

    vocabulary: int
    k: int
    hot: int  # temperatures other than 1
    step: int


@dataclass(frozen=True)
class _Head:
    """One draw's. `bounds`: symbols of class c lie in [bounds[c], bounds[c + 1])."""

    series: list[tuple[int, list[int]]]  # base, widths
    dictionary: int
    dictionary_bits: int  # in unary
    class_bits: int
    bounds: list[int]
    first: int
    second: int
    level_bits: int  # in unary


def decode(rows: Sequence[bytes], shape: Shape, tokens_R: IntArray, chunks_R: IntArray) -> Fillings:
    """The draws that these bytes stand for; a draw without a masked chunk has none. `tokens_R`, `chunks_R`: masked
    chunks of each draw, and teacher tokens in them.

    Raises:
        ValueError: the bytes are not what `packed_writer.encode` writes, or say something else than the other arguments.
    """
    full = [r for r, data in enumerate(rows) if data or tokens_R[r] or chunks_R[r]]
    heads, streams = [], []
    for r in full:
        head, at = _read_head(rows[r], shape, int(tokens_R[r]), int(chunks_R[r]))
        heads.append(head)
        streams.append(memoryview(rows[r])[at:])
    if not full:
        none_MK = np.zeros((0, shape.k), np.int64)
        none = Levels(shape.step, none_MK[:, 0], none_MK[:, 0], none_MK, np.zeros((0, shape.hot), np.int64))
        return Fillings(chunks_R, none_MK[:, 0], np.zeros(0, np.int32), none)
    bits = BitReader(streams)
    full_tokens_R, full_chunks_R = tokens_R[full], chunks_R[full]
    count_M = _read_counts(bits, full_tokens_R, full_chunks_R)
    scale_M = bits.fixed(full_chunks_R, 2) + 1
    first_M, *log_z = [_read_series(bits, [h.series[i] for h in heads], full_chunks_R) for i in range(1 + shape.hot)]
    ids = _read_ids(bits, heads, shape, count_M, full_tokens_R, full_chunks_R)
    level_MK = _read_levels(bits, heads, shape.k, full_chunks_R)
    bits.finish()
    last_M = first_M + level_MK[:, -1] * shape.step * scale_M
    log_z_MH = np.stack(log_z, axis=1) if log_z else np.zeros((len(count_M), 0), np.int64)
    if first_M.min() < 0 or first_M.max() >= MAX_FIRST or last_M.max() >= MAX_VALUE:
        raise ValueError("log-likelihoods outside of the grid")
    if log_z and np.abs(log_z_MH).max() >= MAX_VALUE:
        raise ValueError("log Z outside of the grid")
    return Fillings(chunks_R, count_M, ids, Levels(shape.step, scale_M, first_M, level_MK, log_z_MH))


def _read_head(data: bytes, shape: Shape, tokens: int, chunks: int) -> tuple[_Head, int]:
    """(head, where the stream starts)."""
    numbers = VarintReader(data)
    expected = {"version": VERSION, "vocabulary": shape.vocabulary, "k": shape.k, "temperatures": shape.hot}
    expected |= {"step": shape.step, "tokens": tokens, "chunks": chunks}
    for name, value in expected.items():
        if (found := numbers.next()) != value:
            raise ValueError(f"its head says {name} {found}, expected {value}")
    if not 1 <= chunks <= tokens <= 8 * len(data) or shape.k * tokens > MAX_ROW_VALUES:
        raise ValueError("its head says sizes that it cannot have")
    series = [(unzigzag(numbers.next()), [numbers.next() for _ in SHIFTS]) for _ in range(1 + shape.hot)]
    if any(abs(base) > MAX_VALUE or max(widths) > MAX_WIDTH for base, widths in series):
        raise ValueError("log-likelihoods wider than they can be")
    size = numbers.next()
    unary_bits = numbers.next() if size else 0
    class_bits = numbers.next()
    if size > min(MAX_DICTIONARY, shape.vocabulary) or class_bits > MAX_CLASS_BITS:
        raise ValueError("a dictionary or classes of sizes that they cannot have")
    cuts = [numbers.next() for _ in range((1 << class_bits) - 1)]
    bounds = [0, *(1 << min(cut, 40) for cut in cuts), shape.vocabulary + size]
    if any(a >= b for a, b in itertools.pairwise(bounds)):
        raise ValueError("classes that are not in ascending order")
    first, second, level_bits = (numbers.next(), numbers.next(), numbers.next()) if shape.k > 1 else (0, 0, 0)
    if max(first, second) > MAX_RICE:
        raise ValueError("differences wider than they can be")
    return _Head(series, size, unary_bits, class_bits, bounds, first, second, level_bits), numbers.position


def _read_counts(bits: BitReader, tokens_R: IntArray, chunks_R: IntArray) -> IntArray:
    """Tokens of each chunk, from a bit per token that says whether it is its chunk's last."""
    ends_N = bits.fixed(tokens_R, 1)
    if (sums(ends_N, tokens_R) != chunks_R).any() or not ends_N[np.cumsum(tokens_R) - 1].all():
        raise ValueError("other numbers of chunks and tokens than expected")
    return np.asarray(np.diff(np.flatnonzero(ends_N), prepend=-1))


def _read_series(bits: BitReader, heads: list[tuple[int, list[int]]], chunks_R: IntArray) -> IntArray:
    """A number of units for each chunk: a base, and a multiple of one of 4 powers of two."""
    base_R = np.array([base for base, _ in heads], dtype=np.int64)
    width_RC = np.array([widths for _, widths in heads], dtype=np.int64)
    class_M = bits.fixed(chunks_R, 2)
    row_M = np.repeat(np.arange(len(heads)), chunks_R)
    value_M = bits.varying(chunks_R, width_RC[row_M, class_M])
    return np.asarray(base_R[row_M] + (value_M << np.array(SHIFTS)[class_M]))


def _read_ids(
    bits: BitReader, heads: list[_Head], shape: Shape, count_M: IntArray, tokens_R: IntArray, chunks_R: IntArray
) -> IdArray:
    """The flat ids of all fillings."""
    k = shape.k
    dictionary_D = _read_dictionaries(bits, heads, shape.vocabulary)
    single, place_single, token_P, place_PK = places(count_M, k)
    tokens_P_R = sums(np.where(count_M > 1, count_M, 0), chunks_R)
    distinct_P = bits.fixed(tokens_P_R, (k - 1).bit_length()) + 1
    if len(distinct_P) and distinct_P.max() > k:
        raise ValueError("more distinct ids than fillings")
    written_N = np.full(len(token_P) + len(single), k, dtype=np.int64)
    written_N[token_P] = distinct_P
    literals_S = _read_literals(bits, heads, shape.vocabulary, dictionary_D, sums(written_N, tokens_R))
    choice_PK = bits.varying(k * tokens_P_R, np.repeat(bit_length(distinct_P - 1), k)).reshape(-1, k)
    if not len(token_P):
        return literals_S
    if (choice_PK >= distinct_P[:, None]).any():
        raise ValueError("a filling of an id that is not there")
    first_N = np.cumsum(written_N) - written_N
    start_M = np.cumsum(count_M) - count_M
    ids = np.empty(k * len(written_N), dtype=np.int32)
    ids[place_single] = literals_S[first_N[start_M[single]][:, None] + np.arange(k)]
    ids[place_PK] = literals_S[first_N[token_P][:, None] + choice_PK]
    return ids


def _read_dictionaries(bits: BitReader, heads: list[_Head], vocabulary: int) -> IntArray:
    """All draws' dictionaries, one after the other."""
    size_R = np.array([head.dictionary for head in heads], dtype=np.int64)
    groups = [g for head in heads for g in dictionary_groups(head.bounds, head.dictionary, vocabulary)]
    length_G = np.array([stop - first for first, stop, _ in groups], dtype=np.int64)
    rice_D = np.repeat(np.array([rice for *_, rice in groups], dtype=np.int64), length_G)
    quotient_D = bits.unary(size_R, np.array([head.dictionary_bits for head in heads], dtype=np.int64))
    total_D = np.cumsum((quotient_D << rice_D) + bits.varying(size_R, rice_D) + 1)
    before_G = np.concatenate([[0], total_D])[np.cumsum(length_G) - length_G]
    dictionary_D = total_D - np.repeat(before_G, length_G) - 1
    if len(dictionary_D) and dictionary_D.max() >= vocabulary:
        raise ValueError("a dictionary with an id outside of the vocabulary")
    return np.asarray(dictionary_D)


def _read_literals(
    bits: BitReader, heads: list[_Head], vocabulary: int, dictionary_D: IntArray, count_R: IntArray
) -> IdArray:
    """The ids that are written, `count_R` of each draw."""
    bound_RC = np.array([h.bounds + [h.bounds[-1]] * (MAX_CLASSES + 1 - len(h.bounds)) for h in heads], dtype=np.int64)
    width_RC, short_RC = class_widths(np.diff(bound_RC, axis=1))
    size_R = np.array([head.dictionary for head in heads], dtype=np.int64)
    low_RC = bound_RC[:, :-1] - size_R[:, None]  # so that an id is its own number, and a place in a dictionary below 0
    class_bits_R = np.array([head.class_bits for head in heads], dtype=np.int64)
    class_S = bits.fixed(count_R, class_bits_R) + np.repeat(MAX_CLASSES * np.arange(len(heads)), count_R)
    short_S = short_RC.reshape(-1)[class_S]
    place_S = bits.varying(count_R, width_RC.reshape(-1)[class_S])
    long_S = place_S >= short_S
    long = np.flatnonzero(long_S)
    place_S[long] += place_S[long] + bits.fixed(sums(long_S, count_R), 1) - short_S[long]
    place_S += low_RC.reshape(-1)[class_S]
    frequent = np.flatnonzero(place_S < 0)
    if len(frequent):
        end_R = np.cumsum(size_R)
        row_S = np.searchsorted(np.cumsum(count_R), frequent, side="right")
        place_S[frequent] = dictionary_D[end_R[row_S] + place_S[frequent]]
    return place_S.astype(np.int32)


def _read_levels(bits: BitReader, heads: list[_Head], k: int, chunks_R: IntArray) -> IntArray:
    """level_MK, ascending from 0."""
    level_MK = np.zeros((int(chunks_R.sum()), k), dtype=np.int64)
    if k == 1:
        return level_MK
    count_R = chunks_R * (k - 1)
    quotient_N = bits.unary(count_R, np.array([head.level_bits for head in heads], dtype=np.int64))
    if quotient_N.max() > ESCAPE:
        raise ValueError("a difference too long")
    first_R, second_R = (np.array(x, dtype=np.int64) for x in ([h.first for h in heads], [h.second for h in heads]))
    width_N = np.repeat(rice_parameters(first_R, second_R, k - 1), chunks_R, axis=0).reshape(-1)
    value_N = (quotient_N << width_N) + bits.varying(count_R, width_N)
    escaped_N = quotient_N == ESCAPE
    value_N[escaped_N] = bits.fixed(sums(escaped_N, count_R), ESCAPE_BITS)
    np.cumsum(value_N.reshape(-1, k - 1), axis=1, out=level_MK[:, 1:])
    return level_MK
