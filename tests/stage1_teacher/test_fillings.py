"""The k best fillings are those that a search over all of them finds, ties and all."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stage1_teacher.fillings import best_fillings


def tables(rng: np.random.Generator, tokens: int, vocabulary: int, k: int, levels: int):
    """Dense log-probabilities in steps of 1/8 (so that sums are exact and ties frequent), and their top-k tables."""
    logp_NV = -rng.integers(0, levels, (tokens, vocabulary)) / 8.0
    ids_NK = np.stack([np.lexsort((np.arange(vocabulary), -row))[:k] for row in logp_NV])
    return logp_NV, ids_NK, np.take_along_axis(logp_NV, ids_NK, 1)


def every_filling(logp_nV: np.ndarray, k: int):
    """The k best of all V^n fillings, by (−log-likelihood, ids)."""
    vocabulary = range(logp_nV.shape[1])
    scored = [
        (-sum(logp_nV[j, i] for j, i in enumerate(ids)), ids)
        for ids in itertools.product(vocabulary, repeat=len(logp_nV))
    ]
    return sorted(scored)[:k]


@settings(max_examples=150, deadline=None)
@given(
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    k=st.integers(1, 6),
    levels=st.sampled_from([2, 5, 400]),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_brute_force(counts: list[int], k: int, levels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logp_NV, ids_NK, topk_NK = tables(rng, sum(counts), 6, k, levels)
    flat, logp_MK = best_fillings(ids_NK, topk_NK.astype(np.float32), np.array(counts))
    assert flat.dtype == np.int32
    assert len(flat) == k * sum(counts)
    first = 0
    for chunk, n in enumerate(counts):
        expected = every_filling(logp_NV[first : first + n], k)
        found = flat[first * k : (first + n) * k].reshape(k, n)
        assert [tuple(row) for row in found.tolist()] == [ids for _, ids in expected]
        np.testing.assert_allclose(logp_MK[chunk], [-negative for negative, _ in expected], rtol=0, atol=1e-12)
        first += n


def test_no_chunks() -> None:
    flat, logp_MK = best_fillings(np.zeros((0, 4), np.int64), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    assert flat.shape == (0,)
    assert logp_MK.shape == (0, 4)


@pytest.mark.parametrize("n", [1, 7])
def test_ids_of_large_vocabularies(n: int) -> None:
    """LLaDA2's ids need 18 bits; none is folded onto another when ties are broken."""
    ids_NK = np.tile(np.array([[157_000, 157_183]]), (n, 1))
    flat, logp_MK = best_fillings(ids_NK, np.log(np.full((n, 2), 0.5)), np.array([n]))
    assert flat[:n].tolist() == [157_000] * n
    assert flat[n:].tolist() == ([157_183] if n == 1 else [157_000] * (n - 1) + [157_183])
    assert np.all(np.diff(logp_MK) <= 0)
