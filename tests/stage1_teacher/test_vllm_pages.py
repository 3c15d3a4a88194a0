"""Where a text lies in vLLM's pages: what each token sees there is what the layout says. Needs no vLLM."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import TidecacheError
from stage1_teacher.backends import load
from stage1_teacher.backends.vllm.pages import CLEAN, NOISY, Placement, place, prompt_sizes, spans_of_batch

pages = st.sampled_from([4, 16, 32])
blocks = st.integers(1, 40)
lengths = st.integers(1, 120)


def seen_by(placement: Placement, page: int) -> np.ndarray:
    """Bool [P, P] over the prompt, from what the kernel is told: page columns and numbers of keys."""
    batch = spans_of_batch([placement], np.zeros(1, dtype=np.int64), page)
    seen_PP = np.zeros((placement.size, placement.size), dtype=bool)
    first = 0
    for columns_W, count, keys in zip(batch.columns_SW, batch.count_S, batch.keys_S, strict=True):
        slots = (columns_W[:, None] * page + np.arange(page)).ravel()[:keys]
        seen_PP[first : first + count, slots] = True
        first += count
    assert first == placement.size
    return seen_PP


@settings(max_examples=150, deadline=None)
@given(page=pages, block=blocks, length=lengths)
def test_bd3lm_sees_what_the_layout_says(page: int, block: int, length: int) -> None:
    placement = place("bd3lm", length, block, page)
    kind_P = np.repeat(placement.spans.kind_S, placement.spans.count_S)
    position_P = placement.spans.positions_P
    seen_PP = seen_by(placement, page)
    assert np.array_equal(position_P[placement.noisy_L], np.arange(length))
    assert (kind_P[placement.noisy_L] == NOISY).all()
    for token in np.flatnonzero(kind_P != 2):
        first = position_P[token] // block * block
        own = [(kind_P[token], i) for i in range(first, min(first + block, length))]
        expected = sorted([(CLEAN, i) for i in range(first)] + own)
        assert sorted(zip(kind_P[seen_PP[token]], position_P[seen_PP[token]], strict=True)) == expected


@settings(max_examples=50, deadline=None)
@given(page=pages, block=blocks)
def test_the_size_of_a_prompt_tells_the_length(page: int, block: int) -> None:
    sizes_L = prompt_sizes("bd3lm", 120, block, page)
    assert (np.diff(sizes_L) > 0).all()
    assert [place("bd3lm", length, block, page).size for length in range(1, 121)] == sizes_L.tolist()


@settings(max_examples=50, deadline=None)
@given(page=pages, block=blocks, length=lengths)
def test_prompts_hold_the_text(page: int, block: int, length: int) -> None:
    token_L, clean_L = np.arange(length) + 1000, np.arange(length) + 5000
    placement = place("bd3lm", length, block, page)
    prompt_P = placement.prompt(token_L, clean_L)
    assert np.array_equal(prompt_P[:length], clean_L)
    assert np.array_equal(prompt_P[placement.noisy_L], token_L)
    assert np.array_equal(place("full", length, block, page).prompt(token_L, clean_L[:0]), token_L)


def test_a_cached_start_is_left_out_and_the_rest_stays() -> None:
    placement = place("bd3lm", 70, 32, 16)
    whole = spans_of_batch([placement, placement], np.array([0, 0]), 16)
    part = spans_of_batch([placement, placement], np.array([0, 80]), 16)
    assert whole.count_S.sum() - part.count_S.sum() == 80
    kept = np.concatenate([np.arange(placement.size), np.arange(80, placement.size) + placement.size])
    assert np.array_equal(part.positions_P, whole.positions_P[kept])


@pytest.mark.parametrize(("page", "block", "length"), [(16, 32, 256), (32, 32, 256), (16, 64, 256)])
def test_blocks_of_whole_pages_cost_no_more_than_two_texts(page: int, block: int, length: int) -> None:
    assert place("bd3lm", length, block, page).size == 2 * length


def test_block_causal_sees_its_own_and_earlier_blocks() -> None:
    block_L = np.arange(21) // 6
    assert np.array_equal(seen_by(place("block-causal", 21, 6, 32), 32), block_L[:, None] >= block_L[None])


def test_without_vllm_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(TidecacheError, match=r"vllm.*not installed.*tidecache\[vllm\].*make vllm-env"):
        load("tiny", "vllm")


def test_only_vllm_splits_a_teacher_over_devices() -> None:
    with pytest.raises(TidecacheError, match="need the backend vllm"):
        load("tiny", "transformers", tensor_parallel=2)
