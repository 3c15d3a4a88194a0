"""A stored draw used again: the halves of its chunks, each with the scores that the teacher gave with the other shown."""

from __future__ import annotations

import numpy as np
import pytest

from shared.cache.reader import Cache
from shared.cache.stream import DrawStream
from shared.errors import TidecacheError
from shared.tokenization import TextTokenizer
from stage2_student.config import load_recipe
from stage2_student.data import Row, RowMaker
from stage2_student.dataset import TrainingRows


@pytest.mark.parametrize("ratio", [0.5, 0.3])
def test_the_halves_of_a_draw_are_all_of_it(cache: Cache, ratio: float) -> None:
    for draw in cache.iter_draws(context="compdemo"):
        halves = [draw.half(side, ratio) for side in (True, False)]
        assert sorted(np.concatenate([half.chunks for half in halves]).tolist()) == draw.chunks.tolist()
        gold = dict(zip(draw.chunks.tolist(), draw.gold_logp_of("compdemo").tolist(), strict=True))
        candidates = dict(zip(draw.chunks.tolist(), draw.candidates, strict=True))
        log_z = draw.scores["compdemo"].log_z_MT
        assert log_z is not None
        for side, half in zip((True, False), halves, strict=True):
            assert half.split.tolist() == [side] * len(half.chunks)
            assert not half.masked_C[draw.chunks[draw.split != side]].any()
            assert half.timestep == pytest.approx(draw.timestep * (ratio if side else 1 - ratio))
            assert half.gold_logp.tolist() == [gold[chunk] for chunk in half.chunks.tolist()]
            assert half.candidates == [candidates[chunk] for chunk in half.chunks.tolist()]
            np.testing.assert_array_equal(half.scores["compdemo"].log_z_MT, log_z[draw.split == side])
            assert list(half.scores) == ["compdemo"]


def test_tail_samples_go_with_their_chunks() -> None:
    """Chunks 0, 2 and 3 have one token, and two samples each."""
    from shared.cache.records import ContextScores

    scores = ContextScores(
        gold_logp_N=np.arange(5, dtype=np.float32),
        tail_ids=np.array([10, 11, 20, 21, 30, 31], np.int32),
        tail_logp=-np.array([10, 11, 20, 21, 30, 31], np.float32),
    )
    kept = scores.of_chunks(np.array([True, True, False, True]), np.array([1, 2, 1, 1]))
    assert kept.gold_logp_N.tolist() == [0, 1, 2, 4]
    assert kept.topk_ids is None
    assert kept.tail_ids is not None
    assert kept.tail_logp is not None
    assert kept.tail_ids.tolist() == [10, 11, 30, 31] == (-kept.tail_logp).tolist()
    none = scores.of_chunks(np.zeros(4, np.bool_), np.array([1, 2, 1, 1]))
    assert none.tail_ids is not None
    assert len(none.gold_logp_N) == len(none.tail_ids) == 0


def rows_of(cache: Cache, tokenizer: TextTokenizer, halves: bool, fresh: float = 0.0) -> TrainingRows:
    """Four uses of each draw, with events."""
    draws = DrawStream([cache], seed=1, context="compdemo")
    maker = RowMaker(tokenizer, cache.spec, 32, "compdemo", temperature=1.0)
    count = round(4 * draws.indexes[0].draws / (1 - fresh))
    return TrainingRows(draws, [maker], fresh, count, halves)


def scores_of(row: Row) -> dict[int, float]:
    """The teacher's score of each scored chunk, by its first token."""
    return dict(zip(row.token_first_Q.tolist(), row.teacher_logp_Q.tolist(), strict=True))


def test_uses_go_through_both_halves(cache: Cache, tokenizer: TextTokenizer) -> None:
    """All, A, B, all: masks are parts of the stored ones, and every score is that of the stored draw."""
    rows = rows_of(cache, tokenizer, halves=True)
    same = rows_of(cache, tokenizer, halves=False)
    by_draw: dict[tuple[str, int], list[Row]] = {}
    for number in range(len(rows)):
        row, whole = rows[number], same[number]
        by_draw.setdefault((row.document, row.draw), []).append(row)
        assert (row.document, row.draw) == (whole.document, whole.draw)
        assert not (row.masked_L & ~whole.masked_L).any()
        assert scores_of(row).items() <= scores_of(whole).items()
    for first, a, b, again in by_draw.values():
        assert scores_of(first) == scores_of(again) == scores_of(a) | scores_of(b)
        assert not scores_of(a).keys() & scores_of(b).keys()
        np.testing.assert_array_equal(first.masked_L, again.masked_L)
        assert (a.timestep, b.timestep) == pytest.approx((first.timestep / 2, first.timestep / 2))
        assert first.events is not None
        assert a.events is not None
        assert b.events is not None
        assert len(first.events.chunk_E) == len(a.events.chunk_E) + len(b.events.chunk_E)
        np.testing.assert_array_equal((a.masked_L | b.masked_L)[whole_chunks(first)], True)


def whole_chunks(row: Row) -> np.ndarray:
    """The tokens of scored chunks."""
    spans = zip(row.token_first_Q.tolist(), row.token_stop_Q.tolist(), strict=True)
    return np.array([token for first, stop in spans for token in range(first, stop)], np.int64)


def test_fresh_rows_and_first_uses_stay_as_they_are(cache: Cache, tokenizer: TextTokenizer) -> None:
    rows = rows_of(cache, tokenizer, halves=True, fresh=0.5)
    same = rows_of(cache, tokenizer, halves=False, fresh=0.5)
    draws = rows.draws.indexes[0].draws
    for number in range(2 * draws):  # each draw once
        np.testing.assert_array_equal(rows[number].masked_L, same[number].masked_L)
    assert all(rows[n].timestep == same[n].timestep for n in range(len(rows)) if rows[n].fresh)


def test_halves_need_compdemo() -> None:
    assert load_recipe("events", {"reuse": "halves"}).reuse == "halves"
    for overrides in ({"context": "plain"}, {"objective": "none"}):
        with pytest.raises(TidecacheError, match=r"reuse: halves are what compdemo's teacher scored.*--reuse same"):
            load_recipe("events", {"reuse": "halves", **overrides})
