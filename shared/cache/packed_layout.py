"""The packed form of one draw's topk lane, what its writer and its reader share (docs/cache-format.md, *The packed column*).

A draw's bytes say all that is needed to read them back: a head of variable-length numbers, then one stream of bits. Three
kinds of numbers take the space, and each is coded for what it looks like:

- Ids. A token of a chunk of one token has K ids; a token of a longer chunk few distinct ones, since fillings are
  combinations, so these are written once and each filling says which. An id is a *symbol*: its place among the draw's
  most frequent ids, or, beyond these, the id itself. Symbols are coded by class: the writer cuts their range at up to 7
  powers of two; a symbol is its class and its place there.
- Levels of log-likelihoods (`shared.cache.grid`): differences from filling to filling, in Rice codes whose parameter falls
  with the rank, as such differences do.
- The best filling's log-likelihood and log Z: rounded to one of 4 powers of two, and so many bits as the draw needs.

Both sides work on many draws at a time, arrays of one following those of another.

Shapes, here and on both sides: R draws, M chunks, N teacher tokens in them, K fillings, H temperatures other than 1, P
tokens in chunks of several, S symbols, D ids in the draws' dictionaries, C classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.cache.grid import Levels
from shared.ragged import within

VERSION = 1
MAX_ROW_VALUES = 1 << 24  # ids of one draw
MAX_DICTIONARY = 1 << 16
MAX_CLASS_BITS = 3
ESCAPE = 24  # a Rice quotient of 24 says that the whole number follows elsewhere, in `ESCAPE_BITS` bits
ESCAPE_BITS = 24
MAX_RICE = 24

IdArray = npt.NDArray[np.int32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Fillings:
    """What some draws say, one after the other. `chunks_R`: masked chunks of each draw; `count_M`: teacher tokens of each
    chunk; `ids`: flat, K·N, as in `ContextScores`.
    """

    chunks_R: IntArray
    count_M: IntArray
    ids: IdArray
    levels: Levels


def bit_length(values_N: IntArray) -> IntArray:
    """Bits that each number from 0 to 2^53 needs; 0 needs none."""
    return np.asarray(np.frexp(values_N.astype(np.float64))[1], dtype=np.int64)


def class_widths(size_C: IntArray) -> tuple[IntArray, IntArray]:
    """(width_C, short_C): a place in class c takes width_C[c] bits if it is below short_C[c], one more otherwise."""
    width_C = np.maximum(bit_length(size_C) - 1, 0)
    return width_C, (2 << width_C) - size_C


def dictionary_groups(bounds: Sequence[int], size: int, vocabulary: int) -> list[tuple[int, int, int]]:
    """(first, stop, Rice parameter) of the parts into which the classes' bounds cut a dictionary, each ascending."""
    stops = [min(bound, size) for bound in bounds]
    parts = [(a, b) for a, b in itertools.pairwise(stops) if a < b]
    return [(a, b, (vocabulary // (b - a)).bit_length() - 1) for a, b in parts]


def rice_parameters(first_R: IntArray, second_R: IntArray, differences: int) -> IntArray:
    """(R, differences): by rank; gaps between neighbours fall about as one over the rank."""
    halvings_J = bit_length(np.arange(1, differences + 1)) - 2
    rice_RJ = np.maximum(second_R[:, None] - halvings_J, 0)
    rice_RJ[:, :1] = first_R[:, None]
    return np.asarray(rice_RJ)


def places(count_M: IntArray, k: int) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Where ids stand: (single, place_single, token_P, place_PK): the chunks of one token, and where the ids of their K
    fillings stand among all ids; the tokens of longer chunks, and where each filling's id for each of these stands.
    """
    start_M = np.cumsum(count_M) - count_M
    single = np.flatnonzero(count_M == 1)
    several = np.flatnonzero(count_M > 1)
    place_single = (k * start_M[single])[:, None] + np.arange(k)
    count_S = count_M[several]
    within_P = within(count_S)
    count_P = np.repeat(count_S, count_S)
    start_P = np.repeat(start_M[several], count_S)
    place_PK = (k * start_P + within_P)[:, None] + count_P[:, None] * np.arange(k)
    return single, place_single, start_P + within_P, np.asarray(place_PK)
