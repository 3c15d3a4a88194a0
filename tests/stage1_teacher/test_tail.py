"""Tail samples: drawn in proportion to the teacher's tail, stored, read and verified, and refused where there are none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.cache import open_cache
from shared.cache.verify import verify
from shared.errors import TidecacheError
from stage1_teacher.backends import ScoreRequest, ScoresWithTail, load
from stage1_teacher.commands import app
from stage1_teacher.draft import Draft
from stage1_teacher.options import CaptureOptions
from tests.stage1_teacher import captures
from tests.stage1_teacher.models import random_requests, reference_logp, save_model

K, SAMPLES, GRID = 8, 5, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "qwen3")


def test_samples_have_the_law_of_the_tail(folder: Path) -> None:
    """Over a grid of chances every token is drawn as often as its share of the tail at T = 2 says."""
    teacher = load(folder, temperatures=(1.0, 3.0), batch_tokens=64)
    [request] = random_requests(np.random.default_rng(0), (12,))
    count = len(request.positions)
    logp_NV = reference_logp(folder, request, "full", 32, False, teacher.vocabulary)
    top_NK = logp_NV.topk(K, dim=1).indices
    tail_NV = torch.softmax(logp_NV / 2.0, 1).scatter(1, top_NK, 0.0)
    expected_NV = tail_NV / tail_NV.sum(1, keepdim=True) * SAMPLES
    drawn_NV = torch.zeros(expected_NV.shape, dtype=torch.float64)
    chances = (np.arange(GRID) + 0.5) / GRID
    requests = [
        dataclasses.replace(request, tail_chances=np.full(count, chance), tail_samples=SAMPLES) for chance in chances
    ]
    scores = teacher.score(requests, K)
    assert isinstance(scores, ScoresWithTail)
    for ids_NS, logp_NS in zip(scores.tail_ids_NS.split(count), scores.tail_logp_NS.split(count), strict=True):
        one_NV = torch.zeros_like(drawn_NV).scatter_add(1, ids_NS, torch.ones(ids_NS.shape, dtype=torch.float64))
        assert float((one_NV - expected_NV).abs().max()) < 1.0 + 1e-6  # systematic: never more than one off
        assert not bool((one_NV.gather(1, top_NK) > 0).any())
        torch.testing.assert_close(logp_NS.double(), logp_NV.gather(1, ids_NS), rtol=0, atol=2e-5)
        drawn_NV += one_NV / GRID
    torch.testing.assert_close(drawn_NV, expected_NV, rtol=0, atol=2.0 / GRID)


def test_without_samples_nothing_changes(folder: Path) -> None:
    teacher = load(folder)
    requests = random_requests(np.random.default_rng(1), (9, 20))
    plain = teacher.score(requests, K)
    assert not isinstance(plain, ScoresWithTail)
    sampled = teacher.score(
        [dataclasses.replace(r, tail_chances=np.zeros(len(r.positions)), tail_samples=2) for r in requests], K
    )
    for name, value in vars(plain).items():
        assert torch.equal(value, getattr(sampled, name)), name


def test_no_tail_beyond_all_tokens(folder: Path) -> None:
    teacher = load(folder)
    request = ScoreRequest([2, 3], [0], [2], None, np.zeros(1), 2)
    with pytest.raises(TidecacheError, match=r"tail_samples: with k = 300, all the teacher's tokens"):
        teacher.score([request], 300)


def test_requests_that_disagree_about_samples_are_refused(folder: Path) -> None:
    """One call, one number: else rows without samples would come back with memory's leftovers."""
    teacher = load(folder)
    first, second = random_requests(np.random.default_rng(2), (6, 7))
    wants = dataclasses.replace(first, tail_chances=np.zeros(len(first.positions)), tail_samples=2)
    with pytest.raises(TidecacheError, match=r"request 1 .*expected 2 tail samples .*found 0 and 0"):
        teacher.score([wants, second], K)
    with pytest.raises(TidecacheError, match=r"request 1 .*expected 0 tail samples .*found 2"):
        teacher.score([second, wants], K)
    with pytest.raises(TidecacheError, match=r"request 0 .*chances for them; found 2 and 0"):
        teacher.score([dataclasses.replace(wants, tail_chances=None)], K)


def test_vllm_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(TidecacheError, match=r"only the backend transformers samples the tail, found --backend vllm"):
        Draft.of(CaptureOptions(tail_samples=4, backend="vllm"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captured by the command; teacher and declared student have one tokenizer."""
    from typer.testing import CliRunner

    scratch = tmp_path_factory.mktemp("tail")
    teacher = save_model(scratch / "teacher", vocabulary=captures.TEACHER_VOCABULARY, tokenizer=True)
    corpus = captures.write_corpus(scratch / "corpus.jsonl", 4)
    arguments = [
        "capture", "--teacher", str(teacher), "--students", str(teacher), "--corpus", str(corpus), "--held-out", "none",
        "--draws", "2", "--k", str(K), "--tail-samples", str(SAMPLES), "--out", str(scratch / "cache"), "--length", "128",
        "--context", "both", "--mask-id", "1",
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return scratch / "cache"


def test_a_cache_with_samples_is_read_and_verified(cache: Path) -> None:
    assert not verify(cache).problems
    opened = open_cache(cache)
    assert opened.spec.tail_samples == SAMPLES
    seen = []
    for draw in opened.iter_draws():
        single = int((draw.token_count_M == 1).sum())
        assert single == len(draw.chunks)  # one tokenizer: every chunk is one token
        best = {c: {b for b, _ in fillings} for c, fillings in enumerate(draw.candidates)}
        for scores in draw.scores.values():
            assert scores.tail_ids is not None
            assert scores.tail_logp is not None
            assert scores.tail_ids.shape == scores.tail_logp.shape == (single * SAMPLES,)
            assert scores.topk_logp_MK is not None
            lowest_M = scores.topk_logp_MK[:, -1]
            assert (scores.tail_logp.reshape(single, SAMPLES) <= lowest_M[:, None] + 1e-2).all()
            seen.append(scores.tail_ids)
        ids = draw.scores[draw.context].tail_ids
        assert ids is not None
        for chunk, row in enumerate(ids.reshape(single, SAMPLES).tolist()):
            assert all(draw.vocabulary.token_bytes[i] not in best[chunk] for i in row)
    # Chances differ between draws, contexts and positions: the samples are not everywhere the same ones.
    assert len({tuple(ids.tolist()) for ids in seen}) == len(seen)


def test_the_fingerprint_says_that_there_are_samples(cache: Path) -> None:
    spec = open_cache(cache).spec
    without = dataclasses.replace(spec, tail_samples=0)
    assert without.fingerprint != spec.fingerprint
    assert "tail_samples" not in without.to_json()
    assert spec.to_json()["tail_samples"] == SAMPLES
