"""Noise is counter-based: a pure function of its counters, uniform, and the same for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import noise

KEYS = st.integers(0, 2**64 - 1)
SEEDS = st.integers(0, 2**31)
DOCUMENTS = st.text("0123456789abcdef", min_size=1, max_size=32)
EPSILON = 1e-3

GOLDEN_UNIFORMS = [0.8833108082136426, 0.43152799704850997, 0.026433771592597743]
GOLDEN_KEY = 4132186205878519410
GOLDEN_TIMESTEPS = [0.31689757108688354, 0.8163975477218628, 0.5666475892066956, 0.06714756786823273]
GOLDEN_MASK = [0, 0, 1, 0, 0, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 1]
GOLDEN_SPLIT = [1, 1, 0, 1, 1, 1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 0]


@given(KEYS, st.integers(0, 300), st.integers(0, 300))
def test_longer_sequences_extend_shorter_ones(key, a, b):
    short, long = sorted((a, b))
    np.testing.assert_array_equal(noise.uniforms(key, long)[:short], noise.uniforms(key, short))


@given(KEYS)
def test_uniforms_lie_in_the_half_open_interval(key):
    values = noise.uniforms(key, 100)
    assert values.min() >= 0.0
    assert values.max() < 1.0


def test_uniforms_are_uniform_and_uncorrelated():
    values = np.stack([noise.uniforms(noise.stream_key(s, "document", "mask"), 256) for s in range(400)])
    counts = np.bincount((values.ravel() * 20).astype(int), minlength=20)
    expected = values.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 50  # χ², 19 degrees of freedom: 43.8 at 0.001
    for a, b in ((values[:, :-1], values[:, 1:]), (values[:-1], values[1:])):  # along a sequence, and across seeds
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.015


def test_every_counter_matters():
    base = noise.stream_key(0, "a", "mask", 0)
    others = [(1, "a", "mask", 0), (0, "b", "mask", 0), (0, "a", "split", 0), (0, "a", "mask", 1)]
    keys = [base, *(noise.stream_key(*o) for o in others)]
    assert len(set(keys)) == len(keys)


def test_golden_values():
    """Pinned: another value makes every existing cache a cache of other draws."""
    np.testing.assert_array_equal(noise.uniforms(0, 3), GOLDEN_UNIFORMS)
    assert noise.stream_key(7, "0123", "mask", 2) == GOLDEN_KEY
    assert [noise.timestep(0, "0123", k, EPSILON) for k in range(4)] == GOLDEN_TIMESTEPS
    assert noise.mask_chunks(0, "0123", 1, 0.5, 16).astype(int).tolist() == GOLDEN_MASK
    assert noise.split_chunks(0, "0123", 1, 0.5, 16).astype(int).tolist() == GOLDEN_SPLIT


def test_splitmix64_reference():
    """The published SplitMix64 sequence from 0 (its first three outputs)."""
    reference = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    np.testing.assert_array_equal(noise.uniforms(0, 3), [(x >> 11) * 2.0**-53 for x in reference])


def test_van_der_corput():
    assert [noise.van_der_corput(i) for i in range(8)] == [0, 0.5, 0.25, 0.75, 0.125, 0.625, 0.375, 0.875]


@given(SEEDS, DOCUMENTS, st.integers(0, 4))
def test_draws_cover_the_range(seed, document, power):
    """Of the first 2^p draws, each 2^p-th part of the range gets one, whatever the document's offset."""
    count = 2**power
    t = np.sort([noise.timestep(seed, document, k, EPSILON) for k in range(count)])
    gaps = np.diff(np.concatenate([t, [t[0] + 1.0 - EPSILON]]))
    np.testing.assert_allclose(gaps, (1.0 - EPSILON) / count, atol=1e-6)
    assert t[0] >= np.float32(EPSILON)
    assert t[-1] <= 1.0


@pytest.mark.parametrize("draw", [0, 1, 5])
def test_each_timestep_is_uniform_over_documents(draw):
    t = np.array([noise.timestep(0, f"{i:032x}", draw, EPSILON) for i in range(4000)])
    counts = np.bincount((t * 10).astype(int).clip(0, 9), minlength=10)
    assert ((counts - 400) ** 2 / 400).sum() < 28  # χ², 9 degrees of freedom: 27.9 at 0.001


@given(SEEDS, DOCUMENTS, st.integers(0, 50))
def test_timesteps_are_float32(seed, document, draw):
    t = noise.timestep(seed, document, draw, EPSILON)
    assert t == float(np.float32(t))


@given(DOCUMENTS, st.integers(0, 9), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_masks_grow_with_the_timestep(document, draw, a, b):
    low, high = sorted((a, b))
    assert not (noise.mask_chunks(0, document, draw, low, 64) & ~noise.mask_chunks(0, document, draw, high, 64)).any()


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_masks_have_the_share_t(t):
    share = np.mean([noise.mask_chunks(0, f"{i}", 0, t, 100) for i in range(400)])
    assert abs(share - t) < 4 * np.sqrt(t * (1 - t) / 40000)


def test_masks_splits_and_rest_are_independent():
    masked, split, rest = (
        np.concatenate([f(0, f"{i}", 0, 0.5, 200) for i in range(200)])
        for f in (noise.mask_chunks, noise.split_chunks, noise.mask_rest)
    )
    for a, b in ((masked, split), (masked, rest), (split, rest)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.02


@given(st.lists(st.integers(1, 4), min_size=1, max_size=20), st.data())
def test_a_chunk_is_masked_where_a_token_is(lengths, data):
    stop = np.cumsum(lengths)
    first = stop - lengths
    masked = np.array(data.draw(st.lists(st.booleans(), min_size=int(stop[-1]), max_size=int(stop[-1]))))
    expected = [bool(masked[a:b].any()) for a, b in zip(first, stop, strict=True)]
    assert noise.chunks_with_masked_token(masked, first, stop).tolist() == expected


def test_token_law_masks_long_chunks_more_often():
    """An n-token chunk is masked with probability 1 − (1 − t)^n."""
    n, t, count = 3, 0.3, 100
    first = np.arange(0, n * count, n)
    share = np.mean(
        [
            noise.chunks_with_masked_token(noise.mask_tokens(0, f"{i}", 0, t, n * count), first, first + n)
            for i in range(300)
        ]
    )
    assert abs(share - (1 - (1 - t) ** n)) < 0.012
