"""The student's view of stored documents and draws, and the order of rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import noise
from shared.cache.reader import Cache
from shared.cache.selection import Selection
from shared.cache.stream import DrawStream
from shared.tokenization import TextTokenizer
from stage2_student.data import FRESH_DRAWS_FROM, Coverage, RowMaker, view_document
from stage2_student.dataset import TrainingRows
from tests.stage2_student import synthetic

BLOCK = 32


def rows_of(
    cache: Cache,
    tokenizer: TextTokenizer,
    context: str | None = "compdemo",
    count: int = 200,
    fresh: float = 0.0,
    seed: int = 0,
    together: int = 1,
) -> TrainingRows:
    maker = RowMaker(tokenizer, cache.spec, BLOCK, context, seed=seed)
    return TrainingRows(DrawStream([cache], seed=seed, together=together), [maker], fresh, count)


# Views


def test_a_declared_students_own_chunks_are_the_caches(cache: Cache, tokenizer: TextTokenizer) -> None:
    for stored in cache.read_documents(0):
        view = view_document(tokenizer, stored, BLOCK)
        count = len(stored.chunks)
        assert view.own_first_O.tolist() == list(range(count))
        assert view.own_stop_O.tolist() == list(range(1, count + 1))
        for o in range(count):
            ids = view.ids_L[view.own_token_first_O[o] : view.own_token_stop_O[o]]
            assert b"".join(tokenizer.token_bytes[i] for i in ids) == stored.chunk_bytes(o)


def test_documents_are_filled_with_end_tokens_unless_cut(cache: Cache, tokenizer: TextTokenizer) -> None:
    from dataclasses import replace

    stored = cache.read_documents(0)[0]
    whole = view_document(tokenizer, stored, BLOCK)
    filling = len(whole.ids_L) - len(whole.encoded.ids_L)
    assert len(whole.ids_L) % BLOCK == 0
    assert 0 < filling < BLOCK
    assert (whole.ids_L[-filling:] == tokenizer.end_id).all()
    assert whole.trainable_L[-filling:].all()
    assert whole.rest_L[-filling:].all()
    cut = view_document(tokenizer, replace(stored, cut=True), BLOCK)
    assert len(cut.ids_L) == len(cut.encoded.ids_L)


# Cached rows


def test_masked_tokens_are_those_of_masked_chunks_and_of_the_rest(cache: Cache, tokenizer: TextTokenizer) -> None:
    maker = RowMaker(tokenizer, cache.spec, BLOCK, "compdemo")
    for draw in cache.iter_draws():
        row, view = maker.cached_row(draw), view_document(tokenizer, draw.stored, BLOCK)
        expected = np.zeros(len(view.ids_L), bool)
        for chunk in draw.chunks:
            expected[view.token_first_C[chunk] : view.token_stop_C[chunk]] = True
        chance = noise.mask_rest(cache.spec.seed, draw.document, draw.draw, draw.timestep, len(view.ids_L))
        for token in np.flatnonzero(view.rest_L):
            expected[token] = chance[token]
        assert (row.masked_L == expected).all()
        assert row.coverage == Coverage(len(draw.chunks), len(draw.chunks))
        np.testing.assert_allclose(row.teacher_logp_Q, draw.gold_logp, rtol=1e-6)
        assert [draw.stored.chunk_bytes(c) for c in draw.chunks] == [
            b"".join(tokenizer.token_bytes[i] for i in row.ids_L[a:b])
            for a, b in zip(row.token_first_Q, row.token_stop_Q, strict=True)
        ]


def test_the_context_asked_for_is_the_one_used(cache: Cache, tokenizer: TextTokenizer) -> None:
    draw = next(cache.iter_draws())
    compdemo, plain = (
        RowMaker(tokenizer, cache.spec, BLOCK, c).cached_row(draw).teacher_logp_Q for c in ("compdemo", "plain")
    )
    np.testing.assert_allclose(plain, draw.gold_logp_of("plain"), rtol=1e-6)
    assert not np.allclose(compdemo, plain)


def test_chat_prompts_and_templates_are_never_masked(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    chat = synthetic.make_cache(tmp_path / "chat", synthetic.chats(4), draws=4)
    maker = RowMaker(tokenizer, chat.spec, BLOCK, "compdemo")
    masked_ends = 0
    for draw in chat.iter_draws():
        row, view = maker.cached_row(draw), view_document(tokenizer, draw.stored, BLOCK)
        prompt_stop = view.encoded.spans[0][1]
        assert not row.masked_L[: int(np.searchsorted(view.encoded.edges[:-1], prompt_stop))].any()
        assert not (row.masked_L & ~view.trainable_L).any()
        assert row.trainable == view.trainable_L.sum()
        masked_ends += int((row.masked_L & view.rest_L).sum())
    assert masked_ends > 0  # the end of the turn and the filling are asked for too


# Undeclared tokenizers


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """A tokenizer that the cache does not declare."""
    return TextTokenizer.load(synthetic.undeclared_tokenizer(tmp_path_factory.mktemp("other")))


def own_chunks_by_hand(tokenizer: TextTokenizer, draw, context: str):  # type: ignore[no-untyped-def]
    """(first, stop) of usable unions of cache chunks, straight from the definition (one text message)."""
    stored = draw.stored
    ends = {0}
    for token in tokenizer.encode(stored.messages, stored.chat, stored.cut).ids_L:
        ends.add(max(ends) + len(tokenizer.token_bytes[token]))
    starts, stops = stored.chunks.start_C.tolist(), stored.chunks.stop_C.tolist()
    split = dict(zip(draw.chunks.tolist(), draw.split.tolist(), strict=True))
    found, first = [], None
    for c, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        first = c if start in ends else first
        if first is not None and stop in ends:
            parts = range(first, c + 1)
            one_pass = len({split[p] for p in parts if p in split}) == 1 or context == "plain"
            if all(p in split for p in parts) and one_pass:
                found.append((first, c + 1))
            first = None
    return found


@pytest.mark.parametrize("context", ["compdemo", "plain"])
def test_an_undeclared_student_uses_unions_scored_in_one_pass(cache: Cache, other: TextTokenizer, context: str) -> None:
    maker = RowMaker(other, cache.spec, BLOCK, context)
    total, unions = Coverage(), 0
    for draw in cache.iter_draws():
        row, gold = maker.cached_row(draw), draw.gold_logp_of(context)
        number = {c: m for m, c in enumerate(draw.chunks.tolist())}
        expected = own_chunks_by_hand(other, draw, context)
        assert len(row.teacher_logp_Q) == len(expected)
        sums = [sum(gold[number[c]] for c in range(a, b)) for a, b in expected]
        np.testing.assert_allclose(row.teacher_logp_Q, np.array(sums, np.float32).reshape(-1), rtol=1e-5)
        assert row.coverage.usable == sum(b - a for a, b in expected)
        unions += sum(b - a > 1 for a, b in expected)
        total += row.coverage
        # Whatever overlaps masked bytes is masked, whether it carries a score or not.
        view = maker.view(draw.stored)
        assert view is not None
        for c in draw.chunks:
            start, stop = draw.stored.chunks.start_C[c], draw.stored.chunks.stop_C[c]
            overlapping = (view.encoded.edges[:-1] < stop) & (view.encoded.edges[1:] > start)
            assert row.masked_L[: len(overlapping)][overlapping].all()
    assert unions > 0
    assert 0.3 < total.share < 1.0


def test_a_union_over_both_passes_would_leak_and_is_lost(cache: Cache, other: TextTokenizer) -> None:
    compdemo, plain = (
        sum((RowMaker(other, cache.spec, BLOCK, c).cached_row(d).coverage for d in cache.iter_draws()), Coverage())
        for c in ("compdemo", "plain")
    )
    assert compdemo.masked == plain.masked
    assert compdemo.usable < plain.usable


# Fresh rows


def test_fresh_rows_are_drawn_under_the_training_seed(cache: Cache, tokenizer: TextTokenizer) -> None:
    stored = cache.read_documents(0)[0]
    row = RowMaker(tokenizer, cache.spec, BLOCK, "compdemo", seed=7).fresh_row(stored, 3)
    draw = FRESH_DRAWS_FROM + 3
    assert row.fresh
    assert row.draw == draw
    assert not len(row.teacher_logp_Q)
    assert row.timestep == noise.timestep(7, stored.key, draw, cache.spec.epsilon)
    masked_C = noise.mask_chunks(7, stored.key, draw, row.timestep, len(stored.chunks))
    view = view_document(tokenizer, stored, BLOCK)
    for c in range(len(stored.chunks)):
        assert row.masked_L[view.token_first_C[c] : view.token_stop_C[c]].all() == masked_C[c]
    other = RowMaker(tokenizer, cache.spec, BLOCK, "compdemo", seed=8).fresh_row(stored, 3)
    assert other.timestep != row.timestep


def test_fresh_timesteps_keep_to_the_range(cache: Cache, tokenizer: TextTokenizer) -> None:
    maker = RowMaker(tokenizer, cache.spec, BLOCK, "compdemo", timesteps=(0.3, 0.6))
    found = [maker.fresh_row(d, k).timestep for d in cache.read_documents(0) for k in range(20)]
    assert 0.3 <= min(found) < 0.33
    assert 0.57 < max(found) <= 0.6


def test_fresh_rows_under_the_token_law_mask_whole_chunks(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    token = synthetic.make_cache(tmp_path / "token", synthetic.texts(2), draws=1, mask_law="token")
    stored = token.read_documents(0)[0]
    row = RowMaker(tokenizer, token.spec, BLOCK, "compdemo", seed=1).fresh_row(stored, 0)
    view = view_document(tokenizer, stored, BLOCK)
    chance = noise.mask_tokens(1, stored.key, FRESH_DRAWS_FROM, row.timestep, len(view.ids_L))
    for a, b in zip(view.token_first_C, view.token_stop_C, strict=True):
        assert row.masked_L[a:b].all() == row.masked_L[a:b].any() == chance[a:b].any()


# Order


def test_each_draw_is_used_once_before_any_is_used_twice(cache: Cache, tokenizer: TextTokenizer) -> None:
    rows = rows_of(cache, tokenizer, count=12 * 3 * 2)
    pairs = [(row.document, row.draw) for row in (rows[n] for n in range(len(rows)))]
    for epoch in range(6):
        assert len({key for key, _ in pairs[12 * epoch : 12 * (epoch + 1)]}) == 12
    assert set(Counter(pairs[: 12 * 3]).values()) == {1}
    assert set(Counter(pairs).values()) == {2}
    assert pairs[:12] != pairs[12:24]
    assert [k for k, _ in pairs[:12]] != [k for k, _ in pairs[36:48]]


def test_any_access_gives_the_same_rows(cache: Cache, tokenizer: TextTokenizer) -> None:
    ordered = rows_of(cache, tokenizer, count=60, fresh=0.25)
    scattered = rows_of(cache, tokenizer, count=60, fresh=0.25)
    expected = [(r.document, r.draw, r.masked_L.tobytes()) for r in (ordered[n] for n in range(60))]
    for n in np.random.default_rng(0).permutation(60):
        row = scattered[int(n)]
        assert (row.document, row.draw, row.masked_L.tobytes()) == expected[n]
    with pytest.raises(IndexError):
        ordered[60]


@settings(max_examples=60, deadline=None)
@given(fresh=st.sampled_from([0.0, 0.25, 0.5, 1 / 3, 1.0]), start=st.integers(0, 500))
def test_fresh_rows_are_spread_evenly(cache: Cache, tokenizer: TextTokenizer, fresh: float, start: int) -> None:
    rows = rows_of(cache, tokenizer, count=1000, fresh=fresh)
    places = [rows.place(n) for n in range(start, start + 12)]
    assert sum(stream == "fresh" for stream, _ in places) == round(12 * fresh)


def test_streams_are_consecutive_in_themselves(cache: Cache, tokenizer: TextTokenizer) -> None:
    rows = rows_of(cache, tokenizer, count=1000, fresh=0.3)
    for stream in ("cached", "fresh"):
        found = [within for s, within in (rows.place(n) for n in range(400)) if s == stream]
        assert found == list(range(len(found)))


def test_the_order_depends_on_the_seed(cache: Cache, tokenizer: TextTokenizer) -> None:
    a, b = (rows_of(cache, tokenizer, count=12, seed=seed) for seed in (0, 1))
    assert [a[n].document for n in range(12)] != [b[n].document for n in range(12)]


def test_groups_are_draws_of_one_document_fresh_or_cached(cache: Cache, tokenizer: TextTokenizer) -> None:
    rows = rows_of(cache, tokenizer, count=12 * 3 * 2, fresh=0.5, together=3)
    made = [rows[n] for n in range(len(rows))]
    groups = [made[n : n + 3] for n in range(0, len(made), 3)]
    for group in groups:
        assert len({(row.document, row.fresh) for row in group}) == 1
        assert len({row.draw for row in group}) == 3
    assert [group[0].fresh for group in groups] == [False, True] * 12
    fresh = [row.draw for group in groups if group[0].fresh for row in group]
    assert fresh == [FRESH_DRAWS_FROM + i for i in range(3)] * 12
    assert set(Counter((r.document, r.draw) for r in made if not r.fresh).values()) == {1}


def test_each_caches_rows_are_made_under_its_own_spec(cache: Cache, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    other = synthetic.make_cache(tmp_path / "other", synthetic.texts(4, skip=40), draws=2, mask_law="token", seed=5)
    makers = [RowMaker(tokenizer, c.spec, BLOCK, "compdemo") for c in (cache, other)]
    rows = TrainingRows(DrawStream([cache, other], [3, 1]), makers, 0.5, 96)
    held = [{d.key for i in range(len(c.shards)) for d in c.read_documents(i)} for c in (cache, other)]
    for stream in (True, False):
        sources = [int(row.document in held[1]) for row in (rows[n] for n in range(96)) if row.fresh == stream]
        assert sources.count(1) == 12
        assert all(sum(sources[n : n + 4]) == 1 for n in range(0, 48, 4))
    cached = [row for row in (rows[n] for n in range(96)) if row.document in held[1] and not row.fresh]
    by_key = {(d.document, d.draw): d for d in other.iter_draws()}
    for row in cached:
        expected = makers[1].cached_row(by_key[row.document, row.draw])
        assert (row.masked_L == expected.masked_L).all()
        np.testing.assert_array_equal(row.teacher_logp_Q, expected.teacher_logp_Q)


def test_draws_in_several_shards_of_the_same_documents_are_all_used(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    parted = synthetic.make_cache(tmp_path / "parted", synthetic.texts(4), draws=4, per_shard=2, draw_ranges=2)
    assert len(parted.shards) == 4
    rows = rows_of(parted, tokenizer, count=16)
    assert {(r.document, r.draw) for r in (rows[n] for n in range(16))} == {
        (d.document, d.draw) for d in parted.iter_draws()
    }


def test_the_timestep_range_is_kept(cache: Cache, tokenizer: TextTokenizer) -> None:
    draws = DrawStream([cache], selection=Selection(0.2, 0.5))
    rows = TrainingRows(draws, [RowMaker(tokenizer, cache.spec, BLOCK, "compdemo")], 0.0, 30)
    assert all(0.2 <= rows[n].timestep <= 0.5 for n in range(30))


def test_an_irreproducible_document_keeps_its_place(
    cache: Cache, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shared.tokenization import IrreproducibleText

    draw = next(cache.iter_draws())
    maker = RowMaker(tokenizer, cache.spec, BLOCK, "compdemo")

    def refuse(*_: object) -> None:
        raise IrreproducibleText("no")

    monkeypatch.setattr(maker.tokenizer, "encode", refuse)
    row = maker.cached_row(draw)
    assert len(row.ids_L) == 0
    assert row.coverage == Coverage(len(draw.chunks), 0)
