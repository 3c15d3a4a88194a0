"""Index arithmetic for lists of unequal length that stand one after the other in a flat array, as tokens of chunks do."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def ranges(first_S: npt.NDArray[np.integer[Any]], count_S: npt.NDArray[np.integer[Any]]) -> IntArray:
    """The integers first_S[0], …, first_S[0] + count_S[0] − 1, first_S[1], … one range after the other."""
    ahead_S = np.cumsum(count_S) - count_S
    return np.asarray(np.repeat(first_S - ahead_S, count_S) + np.arange(count_S.sum()))


def within(count_S: npt.NDArray[np.integer[Any]]) -> IntArray:
    """The integers 0, …, count_S[0] − 1, 0, …, count_S[1] − 1, …: the place of each value in its own list."""
    return ranges(np.zeros_like(count_S), count_S)


def sums(value_N: npt.NDArray[Any], count_S: npt.NDArray[np.integer[Any]]) -> IntArray:
    """The sum of each list's whole numbers; a list may be empty."""
    full = np.flatnonzero(count_S)
    sum_S = np.zeros(len(count_S), dtype=np.int64)
    if len(full):
        sum_S[full] = np.add.reduceat(value_N, (np.cumsum(count_S) - count_S)[full], dtype=np.int64)
    return sum_S
