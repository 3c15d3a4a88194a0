"""A stored draw used again: the halves of its chunks, each with the scores that the teacher gave with the other shown."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.cache.reader import Cache
from shared.cache.records import ContextScores
from shared.cache.stream import DrawStream
from shared.errors import TidecacheError
from shared.tokenization import TextTokenizer
from stage2_student import losses
from stage2_student.batch import Collator
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


def test_uses_go_through_all_and_both_halves(cache: Cache, tokenizer: TextTokenizer) -> None:
    """All, one half, the other, all again; masks are parts of the stored ones, and every score is that of the stored draw."""
    rows = rows_of(cache, tokenizer, halves=True)
    same = rows_of(cache, tokenizer, halves=False)
    by_draw: dict[tuple[str, int], list[Row]] = {}
    for number in range(len(rows)):
        row, whole = rows[number], same[number]
        by_draw.setdefault((row.document, row.draw), []).append(row)
        assert (row.document, row.draw) == (whole.document, whole.draw)
        assert not (row.masked_L & ~whole.masked_L).any()
        assert scores_of(row).items() <= scores_of(whole).items()
    sides = set()
    for whole, a, b, again in by_draw.values():
        np.testing.assert_array_equal(whole.masked_L, again.masked_L)
        assert [row.timestep / whole.timestep for row in (whole, a, b, again)] == pytest.approx([1.0, 0.5, 0.5, 1.0])
        sides.add(tuple(scores_of(a)) < tuple(scores_of(b)))
        assert scores_of(whole) == scores_of(a) | scores_of(b)
        assert not scores_of(a).keys() & scores_of(b).keys()
        assert (a.timestep, b.timestep) == pytest.approx((whole.timestep / 2, whole.timestep / 2))
        assert whole.events is not None
        assert a.events is not None
        assert b.events is not None
        assert len(whole.events.chunk_E) == len(a.events.chunk_E) + len(b.events.chunk_E)
        np.testing.assert_array_equal((a.masked_L | b.masked_L)[whole_chunks(whole)], True)
    assert sides == {False, True}


def test_a_half_is_a_row_of_its_own_timestep(cache: Cache, tokenizer: TextTokenizer) -> None:
    """For cross-entropy and for TIDAL: what the student sees, and what the teacher saw when it scored the half."""
    maker = RowMaker(tokenizer, cache.spec, 32, "compdemo")
    draw = max(cache.iter_draws(context="compdemo"), key=lambda draw: len(draw.chunks))
    batch = Collator(1, 0)([maker.cached_row(part) for part in (draw, draw.half(True, 0.5), draw.half(False, 0.5))])
    t = draw.timestep * torch.tensor([1.0, 0.5, 0.5])
    torch.testing.assert_close(batch.timestep_B, t)
    _, weight_C = losses._tidal(batch, load_recipe("reverse-calm-tidal"), 0.5)
    assert set(batch.sample_C.tolist()) == {0, 1, 2}
    torch.testing.assert_close(weight_C, (0.5 * (1 - t) / 0.5)[batch.sample_C])


@pytest.mark.parametrize("together", [2, 3])
def test_groups_and_mixtures_go_through_their_views(cache: Cache, tokenizer: TextTokenizer, together: int) -> None:
    """Whatever the order, n uses of a draw are n views of the cycle, and a row is a function of its number alone."""
    draws = DrawStream([cache, cache], [2, 1], seed=1, together=together, context="compdemo")
    maker = RowMaker(tokenizer, cache.spec, 32, "compdemo")
    count = 12 * draws.indexes[0].draws
    rows = TrainingRows(draws, [maker, maker], 0.0, count, halves=True)
    views: dict[tuple[int, str, int], list[tuple[float, int]]] = {}
    made = [rows[number] for number in range(count)]
    for number, row in enumerate(made):
        at = draws.located(number)[0], row.document, row.draw
        views.setdefault(at, []).append((row.timestep, int(row.masked_L.sum())))
    for found in views.values():
        assert all(a == b for a, b in zip(found, found[3:], strict=False))
        assert len(found) >= 3
        assert [t / found[0][0] for t, _ in found[:3]] == pytest.approx([1.0, 0.5, 0.5])
    for number in (count - 1, count // 2, 0):  # whatever was made before
        np.testing.assert_array_equal(rows[number].masked_L, made[number].masked_L)


def whole_chunks(row: Row) -> np.ndarray:
    """The tokens of scored chunks."""
    spans = zip(row.token_first_Q.tolist(), row.token_stop_Q.tolist(), strict=True)
    return np.array([token for first, stop in spans for token in range(first, stop)], np.int64)


def test_fresh_rows_stay_as_they_are(cache: Cache, tokenizer: TextTokenizer) -> None:
    rows = rows_of(cache, tokenizer, halves=True, fresh=0.5)
    same = rows_of(cache, tokenizer, halves=False, fresh=0.5)
    fresh = [n for n in range(len(rows)) if same[n].fresh]
    assert len(fresh) == len(rows) // 2
    for number in fresh:
        np.testing.assert_array_equal(rows[number].masked_L, same[number].masked_L)
        assert rows[number].timestep == same[number].timestep


def test_halves_need_compdemo() -> None:
    assert load_recipe("reverse-calm-tidal", {"reuse": "halves"}).reuse == "halves"
    for overrides in ({"context": "plain"}, {"objective": "none"}):
        with pytest.raises(TidecacheError, match=r"reuse: halves are what compdemo's teacher scored.*--reuse same"):
            load_recipe("reverse-calm-tidal", {"reuse": "halves", **overrides})
    with pytest.raises(TidecacheError, match=r"halves do not keep to min_timestep 0\.5"):
        load_recipe("reverse-calm-tidal", {"reuse": "halves", "min_timestep": 0.5})
