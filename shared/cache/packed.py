"""The packed form of one draw's topk lane: fillings, their log-likelihoods and log Z in few bytes (docs/cache-format.md).

A draw's bytes say all that is needed to read them back: a head of variable-length numbers, then one stream of bits. Three
kinds of numbers take the space, and each is coded for what it looks like:

- Ids. A token of a chunk of one token has K ids; a token of a longer chunk few distinct ones, since fillings are
  combinations, so these are written once and each filling says which. An id is a *symbol*: its place among the draw's
  most frequent ids, or, beyond these, the id itself. Symbols are coded by class: the encoder cuts their range at up to 7
  powers of two; a symbol is its class and its place there.
- Levels of log-likelihoods (`shared.cache.grid`): differences from filling to filling, in Rice codes whose parameter falls
  with the rank, as such differences do.
- The best filling's log-likelihood and log Z: rounded to one of 4 powers of two, and so many bits as the draw needs.

Shapes: M chunks, N teacher tokens in them, K fillings, H temperatures other than 1, P tokens in chunks of several, S
symbols, D ids in the draw's dictionary, C classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.cache.bits import MAX_WIDTH, BitReader, BitWriter, VarintReader, unzigzag, varints, zigzag
from shared.cache.grid import MAX_FIRST, MAX_VALUE, SHIFTS, STEP, Levels
from shared.errors import TidecacheError
from shared.ragged import ranges

VERSION = 1
MAX_ROW_VALUES = 1 << 24  # ids of one draw
MAX_DICTIONARY = 1 << 16
FREQUENT = 3  # times that an id occurs in a draw to have a place in its dictionary
ESCAPE = 24  # a Rice quotient of 24 says that the whole number follows elsewhere, in `ESCAPE_BITS` bits
ESCAPE_BITS = 24
MAX_RICE = 24
SERIES_ALIGNMENT = 1 << SHIFTS[-1]

IdArray = npt.NDArray[np.int32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Fillings:
    """What a packed draw says. `ids`: flat, K·N, as in `ContextScores`; `count_M`: tokens of each chunk."""

    vocabulary: int
    count_M: IntArray
    ids: IdArray
    levels: Levels


def encode(fillings: Fillings) -> bytes:
    """The bytes of a draw; none for a draw without a masked chunk.

    Raises:
        ValueError: an id outside of the vocabulary.
        TidecacheError: more than `MAX_ROW_VALUES` ids.
    """
    levels, count_M, ids = fillings.levels, fillings.count_M.astype(np.int64), fillings.ids
    chunks, k = levels.level_MK.shape
    if not chunks:
        return b""
    if len(ids) > MAX_ROW_VALUES:
        raise TidecacheError(
            f"a draw has {len(ids)} candidate ids, at most {MAX_ROW_VALUES} fit the codec `packed`: capture with "
            f"--codec raw, a smaller --k or a smaller --length"
        )
    if not 0 <= int(ids.min()) <= int(ids.max()) < fillings.vocabulary:
        raise ValueError(f"expected ids below {fillings.vocabulary}")
    head = [VERSION, fillings.vocabulary, k, levels.log_z_MH.shape[1], levels.step, int(count_M.sum()), chunks]
    bits = BitWriter()
    ends_N = np.zeros(int(count_M.sum()), dtype=np.int64)
    ends_N[np.cumsum(count_M) - 1] = 1
    bits.fixed(ends_N, 1)
    bits.fixed(levels.scale_M - 1, 2)
    for series_M in (levels.first_M, *levels.log_z_MH.T):
        head += _write_series(bits, series_M)
    literals_S, distinct_P, index_PK = _literals(count_M, ids, k)
    head += _write_symbols(bits, literals_S, fillings.vocabulary, distinct_P - 1, k)
    bits.varying(index_PK.reshape(-1), np.repeat(_bit_length(distinct_P - 1), k))
    if k > 1:
        head += _write_differences(bits, np.diff(levels.level_MK, axis=1))
    return varints(head) + bits.to_bytes()


def decode(data: bytes, vocabulary: int, k: int, hot: int, tokens: int, chunks: int) -> Fillings:
    """The inverse of `encode`. The other arguments are what the head must say, and bound the memory that is taken: ids
    below `vocabulary`, `k` fillings, `hot` temperatures other than 1, `tokens` teacher tokens in `chunks` chunks.

    Raises:
        ValueError: the bytes are not what `encode` writes, or say something else.
    """
    if not chunks and not data:
        none_MK = np.zeros((0, k), np.int64)
        levels = Levels(STEP, none_MK[:, 0], none_MK[:, 0], none_MK, np.zeros((0, hot), np.int64))
        return Fillings(vocabulary, none_MK[:, 0], np.zeros(0, np.int32), levels)
    head = VarintReader(data)
    expected = {"version": VERSION, "vocabulary": vocabulary, "k": k, "temperatures": hot}
    found = {name: head.next() for name in expected}
    step = head.next()
    expected |= {"tokens": tokens, "chunks": chunks}
    found |= {"tokens": head.next(), "chunks": head.next()}
    for name, value in expected.items():
        if found[name] != value:
            raise ValueError(f"its head says {name} {found[name]}, expected {value}")
    if not 1 <= step <= STEP or not chunks <= tokens <= 8 * len(data) or k * tokens > MAX_ROW_VALUES:
        raise ValueError("its head says sizes that it cannot have")
    series = [_SeriesHead.read(head) for _ in range(1 + hot)]
    symbols = _SymbolsHead.read(head, vocabulary)
    rice = _RiceHead.read(head) if k > 1 else None
    bits = BitReader(np.frombuffer(data, np.uint8, offset=head.position))
    count_M = _read_counts(bits, tokens, chunks)
    scale_M = bits.fixed(chunks, 2) + 1
    first_M, *log_z = [s.read_values(bits, chunks) for s in series]
    ids = _read_ids(bits, symbols, count_M, k)
    level_MK = np.zeros((chunks, k), dtype=np.int64)
    if rice is not None:
        np.cumsum(rice.read_values(bits, chunks, k), axis=1, out=level_MK[:, 1:])
    bits.finish()
    last_M = first_M + level_MK[:, -1] * step * scale_M
    log_z_MH = np.stack(log_z, axis=1) if log_z else np.zeros((chunks, 0), np.int64)
    if first_M.min() < 0 or first_M.max() >= MAX_FIRST or last_M.max() >= MAX_VALUE:
        raise ValueError("log-likelihoods outside of the grid")
    if log_z and np.abs(log_z_MH).max() >= MAX_VALUE:
        raise ValueError("log Z outside of the grid")
    return Fillings(vocabulary, count_M, ids, Levels(step, scale_M, first_M, level_MK, log_z_MH))


def _read_counts(bits: BitReader, tokens: int, chunks: int) -> IntArray:
    """Tokens of each chunk, from a bit per token that says whether it is its chunk's last."""
    last_M = np.flatnonzero(bits.fixed(tokens, 1))
    if len(last_M) != chunks or last_M[-1] != tokens - 1:
        raise ValueError(f"expected the ends of {chunks} chunks in {tokens} tokens")
    return np.asarray(np.diff(last_M, prepend=-1))


def _bit_length(values_N: IntArray) -> IntArray:
    """Bits that each number from 0 to 2^53 needs; 0 needs none."""
    return np.asarray(np.frexp(values_N.astype(np.float64))[1], dtype=np.int64)


# --- the best filling's log-likelihood, and log Z ----------------------------------------------------------------


@dataclass(frozen=True)
class _SeriesHead:
    """Numbers of units from `base` on, each a multiple of one of 4 powers of two, in a width for each of these."""

    base: int
    width_C: IntArray

    @classmethod
    def read(cls, head: VarintReader) -> _SeriesHead:
        base = unzigzag(head.next())
        width_C = np.array([head.next() for _ in SHIFTS], dtype=np.int64)
        if abs(base) > MAX_VALUE or width_C.max() > MAX_WIDTH:
            raise ValueError("log-likelihoods wider than they can be")
        return cls(base, width_C)

    def read_values(self, bits: BitReader, count: int) -> IntArray:
        class_N = bits.fixed(count, 2)
        return np.asarray(self.base + (bits.varying(self.width_C[class_N]) << np.array(SHIFTS)[class_N]))


def _write_series(bits: BitWriter, value_M: IntArray) -> list[int]:
    """Returns the head's part."""
    base = int(value_M.min()) // SERIES_ALIGNMENT * SERIES_ALIGNMENT
    above_M = value_M - base
    class_M = sum((above_M % (1 << s) == 0).astype(np.int64) for s in SHIFTS[1:])
    short_M = above_M >> np.array(SHIFTS)[class_M]
    width_C = [int(short_M[class_M == c].max(initial=0)).bit_length() for c in range(len(SHIFTS))]
    bits.fixed(class_M, 2)
    bits.varying(short_M, np.array(width_C)[class_M])
    return [zigzag(base), *width_C]


# --- ids ---------------------------------------------------------------------------------------------------------


def _literals(count_M: IntArray, ids: IdArray, k: int) -> tuple[IntArray, IntArray, IntArray]:
    """(literals_S, distinct_P, index_PK): the ids to be written, token by token: K for the token of a chunk of one, for
    one of a longer chunk the distinct ones by first appearance; and which of these each filling has.
    """
    start_M = np.cumsum(count_M) - count_M
    several = np.flatnonzero(count_M > 1)
    if not len(several):
        return ids.astype(np.int64), np.zeros(0, np.int64), np.zeros((0, k), np.int64)
    token_NK = np.empty((int(count_M.sum()), k), dtype=np.int64)
    single = np.flatnonzero(count_M == 1)
    token_NK[start_M[single]] = ids[ranges(k * start_M[single], np.full(len(single), k))].reshape(-1, k)
    token_P = ranges(start_M[several], count_M[several])
    token_NK[token_P] = ids[_places(count_M, start_M, several, k)]
    used_NK = np.ones(token_NK.shape, dtype=np.bool_)
    ids_PK = token_NK[token_P]
    order_PK = np.argsort(ids_PK, axis=1, kind="stable")
    sorted_PK = np.take_along_axis(ids_PK, order_PK, 1)
    run_PK = np.cumsum(np.diff(sorted_PK, axis=1, prepend=sorted_PK[:, :1]) != 0, axis=1)
    starts_PK = np.diff(run_PK, axis=1, prepend=-1) != 0
    first_PK = np.maximum.accumulate(np.where(starts_PK, np.arange(k), 0), axis=1)
    earliest_PK = np.empty_like(order_PK)
    np.put_along_axis(earliest_PK, order_PK, np.take_along_axis(order_PK, first_PK, 1), 1)
    new_PK = earliest_PK == np.arange(k)
    used_NK[token_P] = new_PK
    index_PK = np.take_along_axis(np.cumsum(new_PK, axis=1) - 1, earliest_PK, 1)
    return token_NK[used_NK], new_PK.sum(1), index_PK


def _places(count_M: IntArray, start_M: IntArray, several: IntArray, k: int) -> IntArray:
    """place_PK: where each filling's id for each token of these chunks stands among all ids."""
    count_P = np.repeat(count_M[several], count_M[several])
    within_P = ranges(np.zeros(len(several), np.int64), count_M[several])
    first_P = np.repeat(k * start_M[several], count_M[several]) + within_P
    return np.asarray(first_P[:, None] + count_P[:, None] * np.arange(k))


def _read_ids(bits: BitReader, symbols: _SymbolsHead, count_M: IntArray, k: int) -> IdArray:
    """The flat ids of all fillings."""
    dictionary_D = symbols.read_dictionary(bits)
    several = np.flatnonzero(count_M > 1)
    distinct_P = bits.fixed(int(count_M[several].sum()), (k - 1).bit_length()) + 1
    if len(several) and distinct_P.max() > k:
        raise ValueError("more distinct ids than fillings")
    start_M = np.cumsum(count_M) - count_M
    written_N = np.full(int(count_M.sum()), k, dtype=np.int64)
    token_P = ranges(start_M[several], count_M[several])
    written_N[token_P] = distinct_P
    literals_S = symbols.read_literals(bits, dictionary_D, int(written_N.sum()))
    if not len(several):
        return literals_S
    index_PK = bits.varying(np.repeat(_bit_length(distinct_P - 1), k)).reshape(-1, k)
    if (index_PK >= distinct_P[:, None]).any():
        raise ValueError("a filling of an id that is not there")
    first_N = np.cumsum(written_N) - written_N
    ids = np.empty(k * int(count_M.sum()), dtype=np.int32)
    single = np.flatnonzero(count_M == 1)
    each_k = np.full(len(single), k)
    ids[ranges(k * start_M[single], each_k)] = literals_S[ranges(first_N[start_M[single]], each_k)]
    ids[_places(count_M, start_M, several, k)] = literals_S[first_N[token_P][:, None] + index_PK]
    return ids


@dataclass(frozen=True)
class _SymbolsHead:
    """`size` of the dictionary, bits of its differences in unary, and the classes' bounds: symbols of class c lie in
    [bound_C[c], bound_C[c + 1]).
    """

    vocabulary: int
    size: int
    unary_bits: int
    bound_C: IntArray  # one more than classes

    @classmethod
    def read(cls, head: VarintReader, vocabulary: int) -> _SymbolsHead:
        size = head.next()
        unary_bits = head.next() if size else 0
        class_bits = head.next()
        if size > min(MAX_DICTIONARY, vocabulary) or class_bits > 3:
            raise ValueError("a dictionary or classes of sizes that they cannot have")
        cuts = [head.next() for _ in range((1 << class_bits) - 1)]
        bounds = [0, *(1 << min(cut, 40) for cut in cuts), vocabulary + size]
        if any(a >= b for a, b in itertools.pairwise(bounds)):
            raise ValueError("classes that are not in ascending order")
        return cls(vocabulary, size, unary_bits, np.array(bounds, dtype=np.int64))

    def _groups(self) -> list[tuple[int, int, int]]:
        """(first, stop, Rice parameter) of the parts into which the classes cut the dictionary, each ascending."""
        stops = np.minimum(self.bound_C, self.size).tolist()
        parts = [(a, b) for a, b in itertools.pairwise(stops) if a < b]
        return [(a, b, (self.vocabulary // (b - a)).bit_length() - 1) for a, b in parts]

    def write_dictionary(self, bits: BitWriter, dictionary_D: IntArray) -> int:
        """Returns the number of bits in unary."""
        groups = self._groups()
        difference_D = np.concatenate([np.diff(dictionary_D[a:b], prepend=-1) - 1 for a, b, _ in groups])
        rice_D = np.concatenate([np.full(b - a, r) for a, b, r in groups])
        length = bits.unary(difference_D >> rice_D)
        bits.varying(difference_D & ((1 << rice_D) - 1), rice_D)
        return length

    def read_dictionary(self, bits: BitReader) -> IntArray:
        if not self.size:
            return np.zeros(0, np.int64)
        groups = self._groups()
        rice_D = np.repeat([r for *_, r in groups], [b - a for a, b, _ in groups])
        difference_D = (bits.unary(self.size, self.unary_bits) << rice_D) + bits.varying(rice_D)
        dictionary_D = np.concatenate([np.cumsum(difference_D[a:b] + 1) - 1 for a, b, _ in groups])
        if dictionary_D.max() >= self.vocabulary:
            raise ValueError("a dictionary with an id outside of the vocabulary")
        return dictionary_D

    def _widths(self) -> tuple[IntArray, IntArray]:
        """(width_C, short_C): a place in class c takes width_C[c] bits if it is below short_C[c], one more otherwise."""
        size_C = np.diff(self.bound_C)
        width_C = _bit_length(size_C) - 1
        return width_C, (2 << width_C) - size_C

    def write_symbols(self, bits: BitWriter, symbol_S: IntArray) -> None:
        """Classes, places, and the places' further bits."""
        width_C, short_C = self._widths()
        class_S = np.searchsorted(self.bound_C[1:], symbol_S, side="right")
        place_S = symbol_S - self.bound_C[class_S]
        long_S = place_S >= short_C[class_S]
        place_S = np.where(long_S, place_S + short_C[class_S], place_S)
        bits.fixed(class_S, (len(width_C) - 1).bit_length())
        bits.varying(place_S >> long_S, width_C[class_S])
        bits.fixed(place_S[long_S] & 1, 1)

    def read_literals(self, bits: BitReader, dictionary_D: IntArray, count: int) -> IdArray:
        width_C, short_C = self._widths()
        class_S = bits.fixed(count, (len(width_C) - 1).bit_length())
        place_S = bits.varying(width_C[class_S])
        long = np.flatnonzero(place_S >= short_C[class_S])
        place_S[long] += place_S[long] + bits.fixed(len(long), 1) - short_C[class_S[long]]
        place_S += self.bound_C[class_S]
        if not self.size:
            return place_S.astype(np.int32)
        place_S -= self.size
        frequent = np.flatnonzero(place_S < 0)
        place_S[frequent] = dictionary_D[place_S[frequent]]  # from the dictionary's end, as the places count
        return place_S.astype(np.int32)


def _write_symbols(bits: BitWriter, literals_S: IntArray, vocabulary: int, more_P: IntArray, k: int) -> list[int]:
    """Dictionary, numbers of distinct ids, symbols; returns the head's part."""
    frequent_D = _frequent(literals_S, vocabulary)
    plain_bits, plain_bounds = _classes(literals_S, vocabulary)
    head, symbol_S, symbols = [0], literals_S, _SymbolsHead(vocabulary, 0, 0, plain_bounds)
    if len(frequent_D):
        ranked_S = _symbols(literals_S, frequent_D, vocabulary)
        cost, bounds = _classes(ranked_S, vocabulary + len(frequent_D))
        own = len(frequent_D) * (np.log2(vocabulary / len(frequent_D)) + 2)
        if cost + own < plain_bits:
            symbols = _SymbolsHead(vocabulary, len(frequent_D), 0, bounds)
            dictionary_D = np.concatenate([np.sort(frequent_D[a:b]) for a, b, _ in symbols._groups()])
            symbol_S = _symbols(literals_S, dictionary_D, vocabulary)
            head = [len(frequent_D), symbols.write_dictionary(bits, dictionary_D)]
    bits.fixed(more_P, (k - 1).bit_length())
    symbols.write_symbols(bits, symbol_S)
    cuts = [int(b).bit_length() - 1 for b in symbols.bound_C[1:-1]]
    return [*head, len(cuts).bit_length(), *cuts]


def _frequent(literals_S: IntArray, vocabulary: int) -> IntArray:
    """The ids that occur `FREQUENT` times or more, the most frequent first."""
    ids, times = np.unique(literals_S, return_counts=True)
    chosen = np.flatnonzero(times >= FREQUENT)
    return ids[chosen[np.argsort(-times[chosen], kind="stable")]][:MAX_DICTIONARY]


def _symbols(literals_S: IntArray, dictionary_D: IntArray, vocabulary: int) -> IntArray:
    """The literals as places in the dictionary, or its size plus the id."""
    order_D = np.argsort(dictionary_D)
    sorted_D = dictionary_D[order_D]
    at_S = np.minimum(np.searchsorted(sorted_D, literals_S), len(sorted_D) - 1)
    return np.where(sorted_D[at_S] == literals_S, order_D[at_S], literals_S + len(dictionary_D))


def _classes(symbol_S: IntArray, size: int) -> tuple[float, IntArray]:
    """(bits, bounds): the cheapest cut of [0, size) at powers of two into 1, 2, 4 or 8 classes, by dynamic programming."""
    top = (size - 1).bit_length()  # bin b ≥ 1 holds [2^(b−1), 2^b), bin 0 holds 0
    edges = np.minimum(1 << np.arange(top + 1), size)  # bins 0 … b end before edges[b]
    below_B = np.searchsorted(np.sort(symbol_S), np.concatenate([[0], edges]))
    edge_B = np.concatenate([[0], edges])
    count_BB = below_B[None, :] - below_B[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        cost_BB = np.where(
            edge_B[None, :] > edge_B[:, None], count_BB * np.log2(edge_B[None, :] - edge_B[:, None]), np.inf
        )
    best_B, chains = cost_BB[0], [np.zeros(top + 2, dtype=np.int64)]
    found = (float(best_B[-1]), 1)
    for classes in range(2, 9):
        total_BB = best_B[:, None] + cost_BB
        chains.append(total_BB.argmin(0))
        best_B = total_BB.min(0)
        bits = float(best_B[-1]) + len(symbol_S) * (classes - 1).bit_length()
        if classes in (2, 4, 8) and bits < found[0]:
            found = (bits, classes)
    place, bounds = top + 1, [size]
    for chain in reversed(chains[1 : found[1]]):
        place = int(chain[place])
        bounds.append(int(edge_B[place]))
    return found[0], np.array([0, *reversed(bounds)], dtype=np.int64)


# --- levels ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _RiceHead:
    """Parameters of the first difference and of the second, from which those of later ones follow; bits in unary."""

    first: int
    second: int
    unary_bits: int

    @classmethod
    def read(cls, head: VarintReader) -> _RiceHead:
        found = cls(head.next(), head.next(), head.next())
        if max(found.first, found.second) > MAX_RICE:
            raise ValueError("differences wider than they can be")
        return found

    def read_values(self, bits: BitReader, chunks: int, k: int) -> IntArray:
        quotient_N = bits.unary(chunks * (k - 1), self.unary_bits)
        if len(quotient_N) and quotient_N.max() > ESCAPE:
            raise ValueError("a difference too long")
        width_N = np.tile(_rice(self.first, self.second, k - 1), chunks)
        value_N = (quotient_N << width_N) + bits.varying(width_N)
        escaped = np.flatnonzero(quotient_N == ESCAPE)
        value_N[escaped] = bits.fixed(len(escaped), ESCAPE_BITS)
        return value_N.reshape(chunks, k - 1)


def _rice(first: int, second: int, differences: int) -> IntArray:
    """The Rice parameters by rank: gaps between neighbours fall about as one over the rank."""
    halvings = _bit_length(np.arange(1, differences + 1)) - 2
    rice = np.maximum(second - halvings, 0)
    rice[:1] = first
    return np.asarray(rice)


def _write_differences(bits: BitWriter, difference_MJ: IntArray) -> list[int]:
    """Returns the head's part."""
    first = _cheapest(difference_MJ[:, :1], lambda b: np.array([b]))
    second = _cheapest(difference_MJ[:, 1:], lambda b: _rice(0, b, difference_MJ.shape[1])[1:])
    width_MJ = np.broadcast_to(_rice(first, second, difference_MJ.shape[1]), difference_MJ.shape).reshape(-1)
    value_N = difference_MJ.reshape(-1)
    quotient_N = np.minimum(value_N >> width_MJ, ESCAPE)
    length = bits.unary(quotient_N)
    bits.varying(np.where(quotient_N == ESCAPE, 0, value_N & ((1 << width_MJ) - 1)), width_MJ)
    bits.fixed(value_N[quotient_N == ESCAPE], ESCAPE_BITS)
    return [first, second, length]


def _cheapest(difference_MJ: IntArray, rice_of: Callable[[int], IntArray]) -> int:
    """The parameter from which the Rice codes of these differences are shortest: the first minimum, as costs have one."""
    best = 0
    if not difference_MJ.size:
        return best
    cost = _rice_bits(difference_MJ, rice_of(best))
    while best < MAX_RICE and (next_ := _rice_bits(difference_MJ, rice_of(best + 1))) <= cost:
        best, cost = best + 1, next_
    return best


def _rice_bits(difference_MJ: IntArray, width_J: IntArray) -> int:
    quotient_MJ = difference_MJ >> width_J
    escaped = quotient_MJ >= ESCAPE
    return int(np.minimum(quotient_MJ, ESCAPE).sum() + ESCAPE_BITS * escaped.sum() + len(difference_MJ) * width_J.sum())
