"""Lists one after the other in flat arrays, against the slow way."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from shared.ragged import ranges, sums, within


@given(st.lists(st.tuples(st.integers(-50, 1000), st.integers(0, 9)), max_size=20))
def test_ranges_are_those_of_python(spans: list[tuple[int, int]]) -> None:
    first_S, count_S = (np.array([span[i] for span in spans], np.int64) for i in (0, 1))
    assert ranges(first_S, count_S).tolist() == [n for first, count in spans for n in range(first, first + count)]


@given(st.lists(st.integers(0, 9), max_size=20))
def test_places_start_anew_in_each_list(counts: list[int]) -> None:
    assert within(np.array(counts, np.int64)).tolist() == [place for count in counts for place in range(count)]


@given(st.lists(st.lists(st.integers(-9, 9), max_size=9), max_size=20))
def test_sums_are_those_of_each_list(lists: list[list[int]]) -> None:
    flat_N = np.array([x for part in lists for x in part], np.int64)
    count_S = np.array([len(part) for part in lists], np.int64)
    assert sums(flat_N, count_S).tolist() == [sum(part) for part in lists]
