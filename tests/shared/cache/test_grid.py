"""The grid of the packed codec: error bounds, KL, order, mass, and that what is stored stays what it is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.cache.grid import MAX_FIRST, STEP, UNIT, Levels, quantise, step_of
from shared.errors import TidecacheError

KL_BOUND = 1e-4  # nats, docs/cache-format.md
ERROR_BOUND = 0.1  # nats, likewise


def distribution(rng: np.random.Generator, k: int, vocabulary: int, sharpness: float, chunks: int, hot):
    """Exact (logp_MK, log_z_MH) of softmaxes over a whole vocabulary."""
    logits_MV = rng.gumbel(size=(chunks, vocabulary)) * sharpness
    logp_MV = -np.sort(-(logits_MV - np.logaddexp.reduce(logits_MV, axis=1, keepdims=True)), axis=1)
    log_z = [np.logaddexp.reduce(logp_MV / t, axis=1) for t in hot]
    log_z_MH = np.stack(log_z, axis=1) if hot else np.zeros((chunks, 0))
    return logp_MV[:, :k].astype(np.float32), log_z_MH.astype(np.float32)


@st.composite
def distributions(draw):
    vocabulary = draw(st.integers(2, 400))
    k = draw(st.integers(1, min(64, vocabulary)))
    hot = tuple(draw(st.lists(st.sampled_from([0.25, 0.5, 0.9, 1.5, 2.0, 4.0]), max_size=2, unique=True)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    sharpness = draw(st.sampled_from([0.02, 0.3, 1.0, 2.0, 4.0, 10.0]))
    return (*distribution(rng, k, vocabulary, sharpness, draw(st.integers(1, 8)), hot), hot)


def probabilities(logp_MK, log_z_MH, hot):
    """By temperature, 1 first: p of the fillings and *other*, floored like everywhere."""
    found = []
    for t, log_z_M in zip((1.0, *hot), [np.zeros(len(logp_MK)), *log_z_MH.T], strict=True):
        p_MK = np.exp(logp_MK.astype(np.float64) / t - log_z_M.astype(np.float64)[:, None])
        found.append(np.concatenate([p_MK, np.maximum(1 - p_MK.sum(1, keepdims=True), 1e-6)], axis=1))
    return found


@settings(deadline=None)
@given(distributions())
def test_the_stated_bounds_hold(case):
    logp_MK, log_z_MH, hot = case
    levels = quantise(logp_MK, log_z_MH, hot)
    stored_MK, stored_MH = levels.logp_MK, levels.log_z
    assert np.abs(stored_MK - logp_MK).max() <= ERROR_BOUND
    assert (np.diff(stored_MK, axis=1) <= 0).all()
    assert (stored_MK <= 0).all()
    for exact_ME, found_ME in zip(
        probabilities(logp_MK, log_z_MH, hot), probabilities(stored_MK, stored_MH, hot), strict=True
    ):
        exact_ME, found_ME = (p / p.sum(1, keepdims=True) for p in (exact_ME, found_ME))
        with np.errstate(divide="ignore", invalid="ignore"):
            terms_ME = np.where(exact_ME > 0, exact_ME * np.log(exact_ME / found_ME), 0.0)
        assert terms_ME.sum(1).max() <= KL_BOUND + 5e-6  # float32 and the floor of *other*
        assert found_ME[:, :-1].sum(1).max() <= 1.0 + 1e-9


@settings(deadline=None)
@given(distributions(), st.integers(1, 64))
def test_what_is_stored_stays_what_it_is(case, fewer):
    """Also when only the first fillings are kept: a slice of a cache is exact."""
    logp_MK, log_z_MH, hot = case
    stored = quantise(logp_MK, log_z_MH, hot)
    again = quantise(stored.logp_MK[:, :fewer], stored.log_z, hot)
    np.testing.assert_array_equal(again.logp_MK, stored.logp_MK[:, :fewer])
    np.testing.assert_array_equal(again.log_z, stored.log_z)


@settings(deadline=None)
@given(st.lists(st.floats(-(2.0**120), 2.0**-10, width=32), min_size=1, max_size=64), st.floats(-200, 200, width=32))
def test_any_finite_values(values, log_z):
    """No distribution at all: order, sign and bound hold down to 256 nats below the best, which is at least −256."""
    logp_MK = -np.sort(-np.array([values], np.float32), axis=1)
    levels = quantise(logp_MK, np.array([[log_z]], np.float32), (2.0,))
    stored_MK = levels.logp_MK
    assert (np.diff(stored_MK) <= 0).all()
    assert stored_MK.min() >= -512
    assert stored_MK.max() <= 0
    lowest = MAX_FIRST * UNIT
    if logp_MK[0, 0] >= -lowest + 1:
        near_MK = logp_MK >= logp_MK[0, 0] - lowest + 1
        assert np.abs(stored_MK - logp_MK)[near_MK].max() <= ERROR_BOUND + (logp_MK[0, 0] > 0) * 1e-3
    again = quantise(stored_MK, levels.log_z, (2.0,))
    np.testing.assert_array_equal(again.logp_MK, stored_MK)
    np.testing.assert_array_equal(again.log_z, levels.log_z)


def test_ties_stay_ties():
    logp_MK = np.log(np.full((1, 8), 0.1, np.float32))
    stored_MK = quantise(logp_MK, np.zeros((1, 0), np.float32), ()).logp_MK
    assert len(np.unique(stored_MK)) == 1
    assert abs(float(np.exp(stored_MK.astype(np.float64)).sum()) - 0.8) < 0.8 * 2.0**-8


def test_a_certain_filling_is_kept_exactly():
    stored = quantise(np.array([[0.0, -100.0]], np.float32), np.array([[0.0]], np.float32), (2.0,))
    assert stored.logp_MK[0, 0] == 0.0
    assert abs(stored.logp_MK[0, 1] + 100.0) < ERROR_BOUND
    assert not np.signbit(stored.logp_MK[0, 0])


def test_a_small_tail_is_not_swallowed():
    """p = 0.999, 0.0009 and 0.0001 elsewhere: a wide step alone would lose or double the tail."""
    logp_MK = np.log(np.array([[0.999, 0.0009]])).astype(np.float32)
    stored_MK = quantise(logp_MK, np.zeros((1, 0), np.float32), ()).logp_MK
    tail = 1 - np.exp(stored_MK.astype(np.float64)).sum()
    assert abs(tail - 0.0001) <= UNIT


def test_low_temperatures_take_finer_levels():
    assert step_of((1.0, 2.0)) == STEP
    assert step_of((1.0, 0.5)) == STEP // 2
    assert step_of((1.0, 1e-9)) == 1


def test_values_are_exact_in_float32():
    levels = Levels(1, np.ones(1, np.int64), np.array([MAX_FIRST - 1]), np.array([[0, MAX_FIRST]]), np.zeros((1, 0)))
    assert (levels.logp_MK.astype(np.float64) / -UNIT).tolist() == [[MAX_FIRST - 1, 2 * MAX_FIRST - 1]]


def test_what_cannot_be_stored_is_refused():
    logp_MK = np.array([[-1.0, -2.0]], np.float32)
    with pytest.raises(TidecacheError, match="log Z of 600 nats"):
        quantise(logp_MK, np.array([[-600.0]], np.float32), (0.5,))
    with pytest.raises(ValueError, match="best first"):
        quantise(logp_MK[:, ::-1], np.zeros((1, 0), np.float32), ())
