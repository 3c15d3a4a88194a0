"""Draws become passes that show, hide and score the right chunks, and the scores find their way back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import noise
from shared.documents import Dropped, PreparedDocument
from stage1_teacher.compdemo import PlannedDraw, Subject, plan_draw, records_of, requests_of, without_unpredictable
from tests.stage1_teacher.captures import HashTeacher, make_spec, prepared, texts

SPEC = make_spec(contexts=("compdemo", "plain"))
SUBJECTS = [Subject(7 + i, prepared(text)) for i, text in enumerate(texts(4, seed=3))]
MASK = SPEC.teacher.mask_id


def chunk_tokens(document: PreparedDocument) -> list[range]:
    first_C, stop_C = document.teacher.token_ranges(document.chunks)
    return [range(a, b) for a, b in zip(first_C, stop_C, strict=True)]


def masked_tokens(draw: PlannedDraw, chunks: np.ndarray) -> list[int]:
    return [i for c, r in enumerate(chunk_tokens(draw.subject.document)) if chunks[c] for i in r]


@settings(max_examples=40, deadline=None)
@given(draw=st.integers(0, 300), which=st.integers(0, len(SUBJECTS) - 1))
def test_passes_show_one_half_and_score_the_other(draw: int, which: int) -> None:
    subject = SUBJECTS[which]
    planned = plan_draw(SPEC, subject, draw)
    clean = subject.document.teacher.ids_L
    a, b = planned.masked_C & planned.split_C, planned.masked_C & ~planned.split_C
    expected = [(x, s) for x, s in (("compdemo", b), ("compdemo", a), ("plain", planned.masked_C)) if s.any()]
    assert [(p.context, p.scored_C.tolist()) for p in planned.passes(SPEC.contexts)] == [
        (x, s.tolist()) for x, s in expected
    ]
    for request, (_, scored) in zip(requests_of(SPEC, [planned]), expected, strict=True):
        hidden = masked_tokens(planned, scored)
        assert list(request.positions) == hidden
        assert np.flatnonzero(np.asarray(request.token_ids) == MASK).tolist() == hidden
        shown = np.setdiff1d(np.arange(len(clean)), hidden)
        assert np.array_equal(np.asarray(request.token_ids)[shown], clean[shown])
        assert np.array_equal(request.gold_ids, clean[hidden])
        assert np.array_equal(request.clean_ids, clean)


def test_timesteps_masks_and_splits_are_those_of_noise() -> None:
    subject, count = SUBJECTS[0], len(SUBJECTS[0].document.chunks)
    key = subject.document.key
    for draw in range(6):
        planned = plan_draw(SPEC, subject, draw)
        assert planned.timestep == noise.timestep(SPEC.seed, key, draw, SPEC.epsilon)
        assert np.array_equal(planned.masked_C, noise.mask_chunks(SPEC.seed, key, draw, planned.timestep, count))
        assert np.array_equal(planned.split_C, noise.split_chunks(SPEC.seed, key, draw, SPEC.demo_ratio, count))


def test_the_token_law_masks_whole_chunks_around_student_tokens() -> None:
    spec = make_spec(mask_law="token")
    masked, expected_by_chunk_law = 0, 0.0
    for subject in SUBJECTS:
        document = subject.document
        first_C, stop_C = document.students[0].token_ranges(document.chunks)
        for draw in range(8):
            planned = plan_draw(spec, subject, draw)
            masked_L = noise.mask_tokens(
                spec.seed, document.key, draw, planned.timestep, len(document.students[0].ids_L)
            )
            expected = [bool(masked_L[a:b].any()) for a, b in zip(first_C, stop_C, strict=True)]
            assert planned.masked_C.tolist() == expected
            several_C = stop_C - first_C > 1
            masked += int(planned.masked_C[several_C].sum())
            expected_by_chunk_law += planned.timestep * int(several_C.sum())
    assert expected_by_chunk_law > 20
    assert masked > expected_by_chunk_law  # n tokens: 1 − (1 − t)^n instead of t


def test_scores_come_back_to_their_chunks() -> None:
    """Against a search by hand: each masked chunk's tokens as its own pass saw them, in both contexts."""
    teacher = HashTeacher(SPEC.teacher.vocabulary)
    draws = [plan_draw(SPEC, subject, draw) for subject in SUBJECTS[:3] for draw in (5, 0, 3)]
    records = records_of(SPEC, draws, teacher.score(requests_of(SPEC, draws), SPEC.k))
    assert [(r.position, r.draw) for r in records] == [(7 + i, d) for i in range(3) for d in (5, 0, 3)]
    lengths = {len(r) for d in draws for r in chunk_tokens(d.subject.document)}
    assert min(lengths) == 1
    assert max(lengths) > 1
    for planned, record in zip(draws, records, strict=True):
        assert np.array_equal(record.masked_C, planned.masked_C)
        assert np.array_equal(record.split_M, planned.split_C[planned.masked_C])
        requests = requests_of(SPEC, [planned])
        for context in SPEC.contexts:
            passes = [
                (r, p.scored_C)
                for r, p in zip(requests, planned.passes(SPEC.contexts), strict=True)
                if p.context == context
            ]
            scores = record.contexts[context]
            token = 0
            for m, c in enumerate(np.flatnonzero(planned.masked_C)):
                (request,) = [r for r, scored in passes if scored[c]]
                positions = list(chunk_tokens(planned.subject.document)[c])
                logp_nV = np.array([teacher.logp(request, p) for p in positions])
                gold = planned.subject.document.teacher.ids_L[positions]
                n = len(positions)
                np.testing.assert_allclose(
                    scores.gold_logp_N[token : token + n], logp_nV[np.arange(n), gold], rtol=0, atol=1e-5
                )
                log_z = [np.log(np.exp(logp_nV / t).sum(1)).sum() for t in (1.0, 2.0)]
                np.testing.assert_allclose(scores.log_z_MT[m], log_z, rtol=0, atol=1e-4)
                best = scores.topk_ids[SPEC.k * token : SPEC.k * (token + n)].reshape(SPEC.k, n)
                np.testing.assert_allclose(
                    scores.topk_logp_MK[m], [logp_nV[np.arange(n), ids].sum() for ids in best], rtol=0, atol=1e-4
                )
                np.testing.assert_array_equal(best[0], logp_nV.argmax(1))
                assert len({tuple(ids) for ids in best.tolist()}) == SPEC.k
                token += n
            assert token == len(scores.gold_logp_N)


def test_a_cache_of_gold_alone() -> None:
    spec = make_spec(lanes=("gold",))
    draws = [plan_draw(spec, subject, draw) for subject in SUBJECTS for draw in range(2)]
    records = records_of(spec, draws, HashTeacher(spec.teacher.vocabulary).score(requests_of(spec, draws), 1))
    for planned, record in zip(draws, records, strict=True):
        scores = record.contexts["compdemo"]
        assert scores.topk_ids is scores.topk_logp_MK is scores.log_z_MT is None
        assert len(scores.gold_logp_N) == len(masked_tokens(planned, planned.masked_C))


def test_draws_with_nothing_masked() -> None:
    """At small t no chunk may be masked, or only those of one half: no pass is run for nothing."""
    subject = SUBJECTS[1]
    draws = [plan_draw(SPEC, subject, d) for d in range(3000)]
    empty = [d for d in draws if not d.masked_C.any()]
    single = [d for d in draws if d.masked_C.sum() == 1]
    assert empty
    assert single
    assert all(d.passes(SPEC.contexts) == [] for d in empty)
    assert all(len(d.passes(SPEC.contexts)) == 2 for d in single)  # one of compdemo, one plain
    records = records_of(
        SPEC, [empty[0], single[0]], HashTeacher(8192).score(requests_of(SPEC, [empty[0], single[0]]), 4)
    )
    assert records[0].contexts["plain"].gold_logp_N.shape == (0,)
    assert records[0].contexts["compdemo"].topk_logp_MK.shape == (0, 4)
    assert records[1].contexts["plain"].topk_logp_MK.shape == (1, 4)


def test_position_0_is_no_chunk_under_a_logit_shift() -> None:
    document = SUBJECTS[0].document
    assert chunk_tokens(document)[0].start == 0
    assert without_unpredictable(document, logit_shift=False) is document
    shorter = without_unpredictable(document, logit_shift=True)
    assert isinstance(shorter, PreparedDocument)
    assert chunk_tokens(shorter) == chunk_tokens(document)[1:]
    spec = make_spec(logit_shift=True)
    for draw in range(20):
        for request in requests_of(spec, [plan_draw(spec, Subject(0, shorter), draw)]):
            assert min(request.positions) > 0
            assert request.token_ids[0] == document.teacher.ids_L[0]


def test_a_document_of_one_chunk_under_a_logit_shift_is_dropped() -> None:
    dropped = without_unpredictable(prepared("x"), logit_shift=True)
    assert isinstance(dropped, Dropped)
    assert "position 0" in dropped.detail


@pytest.mark.parametrize("seed", [0, 1])
def test_draws_depend_on_the_seed_alone(seed: int) -> None:
    """Not on the order or the number of draws, nor on other documents."""
    spec = make_spec(seed=seed)
    alone = plan_draw(spec, SUBJECTS[2], 11)
    [plan_draw(spec, s, d) for s in SUBJECTS for d in range(3)]
    again = plan_draw(spec, Subject(99, SUBJECTS[2].document), 11)
    assert np.array_equal(alone.masked_C, again.masked_C)
    other = plan_draw(make_spec(seed=seed + 1), SUBJECTS[2], 11)
    assert alone.timestep == again.timestep != other.timestep
