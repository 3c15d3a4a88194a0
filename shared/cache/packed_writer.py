"""Writes draws in their packed form (`shared.cache.packed_layout`), many at a time, and chooses what a draw's head says.

Dictionary, classes and Rice parameters are those with which a draw's own numbers take few bits: classes by dynamic
programming over counts of symbols by their number of bits, a dictionary of the ids that come `FREQUENT` times or more
where it pays, Rice parameters near the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.cache.bits import BitWriter, varints, zigzag
from shared.cache.grid import SHIFTS
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
from shared.errors import TidecacheError
from shared.ragged import sums, within

FREQUENT = 3  # times that an id occurs in a draw to have a place in its dictionary
SERIES_ALIGNMENT = 1 << SHIFTS[-1]
DICTIONARY_BITS = 2.0  # of an entry beyond log2 of the mean distance

Array = npt.NDArray[np.float64]


def encode(fillings: Fillings, vocabulary: int) -> list[bytes]:
    """The bytes of each draw; none for a draw without a masked chunk.

    Raises:
        ValueError: an id outside of the vocabulary.
        TidecacheError: more than `MAX_ROW_VALUES` ids in a draw.
    """
    levels, count_M, ids = fillings.levels, fillings.count_M.astype(np.int64), fillings.ids
    full = np.flatnonzero(fillings.chunks_R)
    rows = [b""] * len(fillings.chunks_R)
    if not len(full):
        return rows
    chunks_R = fillings.chunks_R[full]
    tokens_R = sums(count_M, chunks_R)
    k, hot = levels.level_MK.shape[1], levels.log_z_MH.shape[1]
    if k * tokens_R.max() > MAX_ROW_VALUES:
        raise TidecacheError(
            f"a draw has {k * tokens_R.max()} candidate ids, at most {MAX_ROW_VALUES} fit the codec `packed`: capture with "
            f"--codec raw, a smaller --k or a smaller --length"
        )
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(f"expected ids below {vocabulary}")
    heads = [
        [VERSION, vocabulary, k, hot, levels.step, tokens, chunks]
        for tokens, chunks in zip(tokens_R.tolist(), chunks_R.tolist(), strict=True)
    ]
    bits = BitWriter()
    ends_N = np.zeros(len(ids) // k, dtype=np.int64)
    ends_N[np.cumsum(count_M) - 1] = 1
    bits.fixed(tokens_R, ends_N, 1)
    bits.fixed(chunks_R, levels.scale_M - 1, 2)
    for series_M in (levels.first_M, *levels.log_z_MH.T):
        _write_series(bits, heads, series_M, chunks_R)
    literals_S, written_N, distinct_P, choice_PK = _literals(count_M, ids, k)
    tokens_P_R = sums(np.where(count_M > 1, count_M, 0), chunks_R)
    symbols = _Symbols.of(literals_S, sums(written_N, tokens_R), vocabulary)
    symbols.write_dictionaries(bits, heads)
    bits.fixed(tokens_P_R, distinct_P - 1, (k - 1).bit_length())
    symbols.write(bits)
    bits.varying(k * tokens_P_R, choice_PK.reshape(-1), np.repeat(bit_length(distinct_P - 1), k))
    if k > 1:
        _write_differences(bits, heads, np.diff(levels.level_MK, axis=1), chunks_R)
    for row, head, stream in zip(full.tolist(), heads, bits.to_streams(), strict=True):
        rows[row] = varints(head) + stream
    return rows


def _write_series(bits: BitWriter, heads: list[list[int]], value_M: IntArray, chunks_R: IntArray) -> None:
    """A number of units for each chunk: a base, and a multiple of one of 4 powers of two."""
    start_R = np.cumsum(chunks_R) - chunks_R
    base_R = np.minimum.reduceat(value_M, start_R) // SERIES_ALIGNMENT * SERIES_ALIGNMENT
    above_M = value_M - np.repeat(base_R, chunks_R)
    class_M = np.zeros(len(value_M), dtype=np.int64)
    for shift in SHIFTS[1:]:
        class_M += above_M % (1 << shift) == 0
    short_M = above_M >> np.array(SHIFTS)[class_M]
    row_class_M = np.repeat(len(SHIFTS) * np.arange(len(chunks_R)), chunks_R) + class_M
    width_RC = np.zeros(len(chunks_R) * len(SHIFTS), dtype=np.int64)
    np.maximum.at(width_RC, row_class_M, bit_length(short_M))
    bits.fixed(chunks_R, class_M, 2)
    bits.varying(chunks_R, short_M, width_RC[row_class_M])
    for head, base, widths in zip(heads, base_R.tolist(), width_RC.reshape(-1, len(SHIFTS)).tolist(), strict=True):
        head += [zigzag(base), *widths]


# --- ids ---------------------------------------------------------------------------------------------------------


def _literals(count_M: IntArray, ids: IdArray, k: int) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """(literals_S, written_N, distinct_P, choice_PK): the ids to be written, token by token: K for the token of a chunk of
    one, for one of a longer chunk the distinct ones by first appearance; how many these are; which each filling has.
    """
    single, place_single, token_P, place_PK = places(count_M, k)
    written_N = np.full(len(single) + len(token_P), k, dtype=np.int64)
    if not len(token_P):
        return ids.astype(np.int64), written_N, np.zeros(0, np.int64), np.zeros((0, k), np.int64)
    ids_PK = ids[place_PK]
    order_PK = np.argsort(ids_PK, axis=1, kind="stable")
    sorted_PK = np.take_along_axis(ids_PK, order_PK, 1)
    begins_PK = np.diff(sorted_PK, axis=1, prepend=-1) != 0
    run_PK = np.maximum.accumulate(np.where(begins_PK, np.arange(k), 0), axis=1)
    earliest_PK = np.empty_like(order_PK)
    np.put_along_axis(earliest_PK, order_PK, np.take_along_axis(order_PK, run_PK, 1), 1)
    new_PK = earliest_PK == np.arange(k)
    choice_PK = np.take_along_axis(np.cumsum(new_PK, axis=1) - 1, earliest_PK, 1)
    written_N[token_P] = new_PK.sum(1)
    token_NK = np.empty((len(written_N), k), dtype=np.int64)
    used_NK = np.ones(token_NK.shape, dtype=np.bool_)
    token_NK[(np.cumsum(count_M) - count_M)[single]] = ids[place_single]
    token_NK[token_P], used_NK[token_P] = ids_PK, new_PK
    return token_NK[used_NK], written_N, written_N[token_P], choice_PK


@dataclass(frozen=True)
class _Symbols:
    """The ids of some draws by class. `symbol_U`, `class_U`: of each distinct (draw, id); `which_S`: which of these an id
    is; `cuts`: each draw's exponents; `entry_U`: those in a dictionary, in its order.
    """

    vocabulary: int
    count_R: IntArray
    size_R: IntArray
    cuts: list[list[int]]
    id_U: IntArray
    symbol_U: IntArray
    class_U: IntArray
    row_U: IntArray
    which_S: IntArray
    entry_U: IntArray

    @classmethod
    def of(cls, literals_S: IntArray, count_R: IntArray, vocabulary: int) -> _Symbols:
        """Choose dictionaries and classes."""
        rows = len(count_R)
        keys_S = np.repeat(vocabulary * np.arange(rows), count_R) + literals_S
        key_U, which_S, times_U = np.unique(keys_S, return_inverse=True, return_counts=True)
        row_U, id_U = np.divmod(key_U, vocabulary)
        rank_U, size_R = _ranks(row_U, times_U, rows)
        plain_R, plain_cuts = _classes(row_U, id_U, times_U, np.full(rows, vocabulary))
        ranked_U = np.where(rank_U >= 0, rank_U, size_R[row_U] + id_U)
        ranked_R, ranked_cuts = _classes(row_U, ranked_U, times_U, vocabulary + size_R)
        entry_bits_R = np.log2(vocabulary / np.maximum(size_R, 1)) + DICTIONARY_BITS
        pays_R = (size_R > 0) & (ranked_R + size_R * entry_bits_R < plain_R)
        cuts = [b if pays else a for a, b, pays in zip(plain_cuts, ranked_cuts, pays_R.tolist(), strict=True)]
        size_R = np.where(pays_R, size_R, 0)
        symbol_U = np.where(pays_R[row_U], ranked_U, id_U)
        class_U = _class_by_bits(cuts)[row_U, bit_length(symbol_U)]
        entry_U = np.flatnonzero(pays_R[row_U] & (rank_U >= 0))
        entry_U = entry_U[np.lexsort((id_U[entry_U], class_U[entry_U], row_U[entry_U]))]
        symbol_U[entry_U] = within(size_R)
        return cls(vocabulary, count_R, size_R, cuts, id_U, symbol_U, class_U, row_U, which_S, entry_U)

    def write_dictionaries(self, bits: BitWriter, heads: list[list[int]]) -> None:
        """Each group ascending, by differences."""
        groups = [
            group
            for cuts, size in zip(self.cuts, self.size_R.tolist(), strict=True)
            for group in dictionary_groups(self._bounds(cuts, size), size, self.vocabulary)
        ]
        length_G = np.array([stop - first for first, stop, _ in groups], dtype=np.int64)
        rice_D = np.repeat(np.array([rice for *_, rice in groups], dtype=np.int64), length_G)
        dictionary_D = self.id_U[self.entry_U]
        before_D = np.concatenate([[-1], dictionary_D])[:-1]
        before_D[np.cumsum(length_G) - length_G] = -1
        difference_D = dictionary_D - before_D - 1
        unary_R = bits.unary(self.size_R, difference_D >> rice_D)
        bits.varying(self.size_R, difference_D & ((1 << rice_D) - 1), rice_D)
        for head, size, unary, cuts in zip(heads, self.size_R.tolist(), unary_R.tolist(), self.cuts, strict=True):
            head += [size, unary] if size else [0]
            head += [len(cuts).bit_length(), *cuts]

    def write(self, bits: BitWriter) -> None:
        """Classes, places, and the places' further bits."""
        bounds = [self._bounds(c, size) for c, size in zip(self.cuts, self.size_R.tolist(), strict=True)]
        padded = [b + [b[-1]] * ((1 << MAX_CLASS_BITS) + 1 - len(b)) for b in bounds]
        bound_RC = np.array(padded, dtype=np.int64)
        width_RC, short_RC = class_widths(np.diff(bound_RC, axis=1))
        width_U, short_U = width_RC[self.row_U, self.class_U], short_RC[self.row_U, self.class_U]
        place_U = self.symbol_U - bound_RC[self.row_U, self.class_U]
        long_U = place_U >= short_U
        place_U = np.where(long_U, place_U + short_U, place_U)
        long_S = long_U[self.which_S]
        bits.fixed(self.count_R, self.class_U[self.which_S], np.array([len(c).bit_length() for c in self.cuts]))
        bits.varying(self.count_R, (place_U >> long_U)[self.which_S], width_U[self.which_S])
        bits.fixed(sums(long_S, self.count_R), (place_U & 1)[self.which_S[long_S]], 1)

    def _bounds(self, cuts: list[int], size: int) -> list[int]:
        return [0, *(1 << cut for cut in cuts), self.vocabulary + size]


def _ranks(row_U: IntArray, times_U: IntArray, rows: int) -> tuple[IntArray, IntArray]:
    """(rank_U, size_R): each frequent id's place among those of its draw, the most frequent first, −1 for others."""
    frequent = np.flatnonzero(times_U >= FREQUENT)
    frequent = frequent[np.lexsort((-times_U[frequent], row_U[frequent]))]
    size_R = np.bincount(row_U[frequent], minlength=rows)
    rank = within(size_R)
    rank_U = np.full(len(row_U), -1, dtype=np.int64)
    rank_U[frequent] = np.where(rank < MAX_DICTIONARY, rank, -1)
    return rank_U, np.minimum(size_R, MAX_DICTIONARY)


def _class_by_bits(cuts: list[list[int]]) -> IntArray:
    """(R, 64): the class of a symbol by its number of bits."""
    padded_RC = np.array([c + [64] * ((1 << MAX_CLASS_BITS) - 1 - len(c)) for c in cuts], dtype=np.int64)
    return np.asarray((padded_RC[:, None, :] < np.arange(64)[None, :, None]).sum(2))


def _classes(row_U: IntArray, symbol_U: IntArray, times_U: IntArray, size_R: IntArray) -> tuple[Array, list[list[int]]]:
    """(bits_R, cuts): the cheapest cut of each draw's symbols, all below size_R, at powers of two into 1, 2, 4 or 8
    classes, by dynamic programming. Bin b ≥ 1 holds [2^(b−1), 2^b), bin 0 holds 0; edge e lies before bin e.
    """
    rows, bins = len(size_R), int(size_R.max() - 1).bit_length() + 1
    count_RB = np.bincount(row_U * bins + bit_length(symbol_U), times_U, rows * bins).reshape(rows, bins)
    below_RE = np.concatenate([np.zeros((rows, 1)), np.cumsum(count_RB, axis=1)], axis=1)
    edge_RE = np.minimum(np.concatenate([[0], 1 << np.arange(bins)]), size_R[:, None])
    span_REE = edge_RE[:, None, :] - edge_RE[:, :, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        cost_REE = (below_RE[:, None, :] - below_RE[:, :, None]) * np.log2(span_REE)
    cost_REE[span_REE <= 0] = np.inf
    best_RE, found_R = cost_REE[:, 0], cost_REE[:, 0, -1]
    chosen_R, chains = np.ones(rows, dtype=np.int64), []
    for classes in range(2, (1 << MAX_CLASS_BITS) + 1):
        total_REE = best_RE[:, :, None] + cost_REE
        chains.append(total_REE.argmin(1))
        best_RE = total_REE.min(1)
        if classes & (classes - 1) == 0:
            bits_R = best_RE[:, -1] + below_RE[:, -1] * (classes - 1).bit_length()
            chosen_R = np.where(bits_R < found_R, classes, chosen_R)
            found_R = np.minimum(bits_R, found_R)
    cuts = []
    for row, classes in enumerate(chosen_R.tolist()):
        edge, mine = bins, []
        for chain in reversed(chains[: classes - 1]):
            edge = int(chain[row, edge])
            mine.append(edge - 1)
        cuts.append(mine[::-1])
    return found_R, cuts


# --- levels ------------------------------------------------------------------------------------------------------


def _write_differences(bits: BitWriter, heads: list[list[int]], difference_MJ: IntArray, chunks_R: IntArray) -> None:
    """Rice codes of the differences of levels from filling to filling."""
    ranks = difference_MJ.shape[1]
    none_R = np.zeros(len(chunks_R), dtype=np.int64)
    first_R = _cheapest(difference_MJ[:, :1], np.zeros(1, np.int64), chunks_R)
    second_R = none_R
    if ranks > 1:
        second_R = _cheapest(difference_MJ[:, 1:], bit_length(np.arange(2, ranks + 1)) - 2, chunks_R)
    width_N = np.repeat(rice_parameters(first_R, second_R, ranks), chunks_R, axis=0).reshape(-1)
    value_N, count_R = difference_MJ.reshape(-1), chunks_R * ranks
    quotient_N = np.minimum(value_N >> width_N, ESCAPE)
    escaped_N = quotient_N == ESCAPE
    length_R = bits.unary(count_R, quotient_N)
    bits.varying(count_R, np.where(escaped_N, 0, value_N & ((1 << width_N) - 1)), width_N)
    bits.fixed(sums(escaped_N, count_R), value_N[escaped_N], ESCAPE_BITS)
    for head, *own in zip(heads, first_R.tolist(), second_R.tolist(), length_R.tolist(), strict=True):
        head += own


def _cheapest(difference_MJ: IntArray, halvings_J: IntArray, chunks_R: IntArray) -> IntArray:
    """For each draw the best of three Rice parameters near the one that its mean asks for."""
    total_R = sums((difference_MJ << halvings_J).sum(1), chunks_R)
    mean_R = total_R / (chunks_R * difference_MJ.shape[1])
    middle_R = bit_length((0.7 * mean_R).astype(np.int64))
    tried_R = [np.clip(middle_R + d, 0, MAX_RICE) for d in (-1, 0, 1)]
    costs = []
    for rice_R in tried_R:
        width_MJ = np.repeat(np.maximum(rice_R[:, None] - halvings_J, 0), chunks_R, axis=0)
        quotient_MJ = difference_MJ >> width_MJ
        bits_MJ = np.minimum(quotient_MJ, ESCAPE) + width_MJ + ESCAPE_BITS * (quotient_MJ >= ESCAPE)
        costs.append(sums(bits_MJ.sum(1), chunks_R))
    return np.asarray(np.choose(np.argmin(costs, axis=0), tried_R))
