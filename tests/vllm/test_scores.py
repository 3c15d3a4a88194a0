"""The vllm backend against plain float32 computations: every layout within 2e-5 nats, and what reuse of pages may not change."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import TidecacheError
from stage1_teacher.backends import ScoreRequest, Scores, Teacher, load
from tests.conftest import ORACLES
from tests.stage1_teacher.models import MASK_ID, VOCABULARY, reference_logp, save_model
from tests.vllm.conftest import Start, noised

LLADA2 = ORACLES / "llada2_tiny"
TEMPERATURES = (1.0, 2.0, 0.5)
TOLERANCE = 2e-5


def assert_agree(ours: Scores, teacher: Teacher, requests: list[ScoreRequest]) -> None:
    """All numbers as the other backend's; the ids wherever no neighbour in rank, the first beyond k included, is near."""
    k = ours.topk_ids_NK.shape[1]
    theirs = teacher.score(requests, k + 1)
    for name, expected in (
        ("gold_logp_N", theirs.gold_logp_N),
        ("topk_logp_NK", theirs.topk_logp_NK[:, :k]),
        ("log_z_NT", theirs.log_z_NT),
    ):
        torch.testing.assert_close(getattr(ours, name), expected, rtol=0, atol=TOLERANCE)
    gap_NK = theirs.topk_logp_NK[:, :-1] - theirs.topk_logp_NK[:, 1:]  # to the next in rank
    clear_NK = gap_NK > 2 * TOLERANCE
    clear_NK[:, 1:] &= gap_NK[:, :-1] > 2 * TOLERANCE
    assert min(clear_NK.float().mean(), clear_NK[:, -1].float().mean()) > 0.7  # the last is judged, too
    assert torch.equal(ours.topk_ids_NK[clear_NK], theirs.topk_ids_NK[:, :k][clear_NK])


@pytest.mark.parametrize(("layout", "block"), [("full", 32), ("block-causal", 12), ("bd3lm", 32), ("bd3lm", 12)])
def test_agrees_with_the_transformers_backend(qwen3: Path, start: Start, layout: str, block: int) -> None:
    requests = noised(VOCABULARY)
    ours = start(qwen3, layout, block, temperatures=TEMPERATURES).score(requests, 8)
    assert len(ours.gold_logp_N) == sum(len(r.positions) for r in requests)
    theirs = load(qwen3, "transformers", layout, block, MASK_ID, temperatures=TEMPERATURES)
    assert_agree(ours, theirs, requests)


@pytest.mark.parametrize("layout", ["full", "block-causal", "bd3lm"])
def test_agrees_with_a_plain_dense_forward(qwen3: Path, start: Start, layout: str) -> None:
    (request,) = noised(VOCABULARY, (45,), draws=1)
    scores = start(qwen3, layout, 8, temperatures=TEMPERATURES).score([request], 5)
    logp_NV = reference_logp(qwen3, request, layout, 8, False).float()
    gold_N = torch.as_tensor(np.asarray(request.gold_ids))
    torch.testing.assert_close(scores.gold_logp_N, logp_NV.gather(1, gold_N[:, None])[:, 0], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(scores.topk_logp_NK, logp_NV.topk(5).values, rtol=0, atol=TOLERANCE)
    for t, temperature in enumerate(TEMPERATURES):
        expected_N = (logp_NV / temperature).logsumexp(1)
        torch.testing.assert_close(scores.log_z_NT[:, t], expected_N, rtol=0, atol=TOLERANCE)
    assert torch.equal(scores.log_z_NT[:, 0], torch.zeros(len(gold_N)))


@pytest.mark.parametrize(("layout", "expected"), [("full", "full_attention"), ("block-causal", "block_causal_row0")])
def test_llada2_gives_the_official_log_probabilities(start: Start, layout: str, expected: str) -> None:
    oracle = json.loads((LLADA2 / "expected.json").read_text())
    rows = oracle[f"logprobs_{expected}"]
    rows = [rows] if layout == "block-causal" else rows
    teacher = start(LLADA2, layout, oracle["block_size"])
    for ids, valid, logp in zip(oracle["input_ids"], oracle["valid"], rows, strict=False):
        length = sum(valid)
        gold_N = (np.array(ids[:length]) + 5) % teacher.vocabulary
        scores = teacher.score([ScoreRequest(ids[:length], np.arange(length), gold_N)], 3)
        expected_NV = torch.tensor(logp)[:length]
        gold_expected_N = expected_NV.gather(1, torch.as_tensor(gold_N)[:, None])[:, 0]
        torch.testing.assert_close(scores.gold_logp_N, gold_expected_N, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(scores.topk_logp_NK, expected_NV.topk(3).values, rtol=0, atol=TOLERANCE)


def test_llada2_in_bd3lm_agrees_with_the_transformers_backend(start: Start) -> None:
    requests = noised(128, (5, 33, 70))
    ours = start(LLADA2, "bd3lm", 8).score(requests, 6)
    assert_agree(ours, load(LLADA2, "transformers", "bd3lm", 8, MASK_ID), requests)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_other_networks_and_the_logit_shift(tmp_path: Path, start: Start, kind: str) -> None:
    save_model(tmp_path, kind)
    requests = noised(VOCABULARY, (5, 40))
    ours = start(tmp_path, "bd3lm", 16, logit_shift=True).score(requests, 6)
    assert_agree(ours, load(tmp_path, "transformers", "bd3lm", 16, MASK_ID, True), requests)


def test_the_vocabulary_is_the_tokenizers(tmp_path: Path, start: Start) -> None:
    save_model(tmp_path, vocabulary=8300, tokenizer=True)  # more rows than the tokenizer has tokens
    teacher = start(tmp_path, "full")
    assert teacher.vocabulary == 8192
    requests = noised(8192, (30,))
    assert_agree(teacher.score(requests, 6), load(tmp_path, "transformers", "full", mask_id=MASK_ID), requests)


def test_draws_of_a_document_reuse_its_pages_and_change_no_bit(qwen3: Path, start: Start) -> None:
    teacher = start(qwen3, "bd3lm", 32)
    same = noised(VOCABULARY, (128,), draws=1)[0]
    requests = [same, *noised(VOCABULARY, (128,), draws=8, seed=1), same]
    before = _hits(teacher)
    scores = teacher.score(requests, 4)
    # Two documents of 4 pages: computed once each, found again by 7 draws and by the repeated request.
    assert (teacher.reused_tokens, teacher.prompt_tokens) == (8 * 128, 10 * 256)
    assert _hits(teacher) - before == 8 * 128
    n = len(same.positions)
    torch.testing.assert_close(scores.gold_logp_N[:n], scores.gold_logp_N[-n:], rtol=0, atol=TOLERANCE)
    again = teacher.score(requests, 4)  # nothing is left of the call before
    assert teacher.reused_tokens == 2 * 8 * 128
    assert all(torch.equal(getattr(scores, name), getattr(again, name)) for name in vars(scores))


def _hits(teacher: object) -> int:
    """vLLM's own count of tokens found in the prefix cache."""
    metrics = teacher._engine.get_metrics()  # type: ignore[attr-defined]
    return int(sum(metric.value for metric in metrics if metric.name == "vllm:prefix_cache_hits"))


def test_texts_that_share_only_their_start_share_no_page(qwen3: Path, start: Start) -> None:
    """In a block of 64 the keys of its first page depend on its second one."""
    first = noised(VOCABULARY, (64,), draws=1)[0]
    clean_L = np.array(first.clean_ids)
    clean_L[40:] = (clean_L[40:] + 7) % VOCABULARY
    other = ScoreRequest(first.token_ids, first.positions, first.gold_ids, clean_L)
    teacher = start(qwen3, "bd3lm", 64)
    together = teacher.score([first, other], 4)
    assert teacher.reused_tokens == 0
    assert_agree(together, load(qwen3, "transformers", "bd3lm", 64, MASK_ID), [first, other])


def test_many_small_batches_give_the_same(qwen3: Path, start: Start) -> None:
    requests = noised(VOCABULARY, (5, 33, 60), draws=4)
    heard: list[int] = []
    small = start(qwen3, "bd3lm", 32, batch_tokens=256).score(requests, 4, heard.append)
    assert len(heard) >= 3
    assert sum(heard) == len(small.gold_logp_N)
    assert_agree(small, load(qwen3, "transformers", "bd3lm", 32, MASK_ID), requests)


def test_two_workers_share_a_teacher(start: Start) -> None:
    requests = noised(128, (5, 70))
    ours = start(LLADA2, "bd3lm", 32, tensor_parallel=2).score(requests, 6)
    assert_agree(ours, load(LLADA2, "transformers", "bd3lm", 32, MASK_ID), requests)


def test_a_request_that_cannot_be_scored_is_refused(qwen3: Path, start: Start) -> None:
    teacher = start(qwen3, "bd3lm", 32, batch_tokens=256)
    good = noised(VOCABULARY, (5,), draws=1)[0]
    with pytest.raises(TidecacheError, match=r"request 1 .* needs clean_ids"):
        teacher.score([good, ScoreRequest([2, 3], [1], [4])], 2)
    assert teacher.length_limit == 128
    with pytest.raises(TidecacheError, match="129 tokens"):
        teacher.score([ScoreRequest([2] * 129, [1], [4], [2] * 129)], 2)
    assert len(teacher.score([good], 2).gold_logp_N) == len(good.positions)


def test_what_the_backend_does_not_have_is_refused(qwen3: Path, tmp_path: Path) -> None:
    with pytest.raises(TidecacheError, match=r"layout: the backend vllm has .*--backend transformers"):
        load(qwen3, "vllm", "reordered")
    save_model(tmp_path / "gemma", "gemma")
    with pytest.raises(TidecacheError, match="'gemma'"):
        load(tmp_path / "gemma", "vllm")
    save_model(tmp_path / "narrow", head_dim=24)
    with pytest.raises(TidecacheError, match="24 dimensions"):
        load(tmp_path / "narrow", "vllm")
    with pytest.raises(TidecacheError, match="3 workers"):
        load(qwen3, "vllm", tensor_parallel=3)


def test_a_disagreement_between_the_backends_stops_the_start(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from stage1_teacher.backends.vllm import crosscheck

    save_model(tmp_path / "other", num_attention_heads=4, num_key_value_heads=2, tied=False)
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += 1e-2
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    honest = crosscheck.reference

    def of_another(preset: object, *rest: object) -> Scores:
        from stage1_teacher.presets import find_preset

        return honest(find_preset(tmp_path / "other"), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(crosscheck, "reference", of_another)
    with pytest.raises(TidecacheError, match="does not agree with the backend transformers"):
        load(qwen3, "vllm")


def test_a_teacher_too_large_to_compare_says_so(
    qwen3: Path, start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from stage1_teacher.backends.vllm import crosscheck

    monkeypatch.setattr(crosscheck, "available_bytes", lambda device: 1000)
    with caplog.at_level(logging.WARNING):
        start(qwen3, "full")
    assert "not cross-checked" in caplog.text
