"""Multi-draw packing: the same likelihoods as each pass alone, fewer tokens, and batches that depend on requests alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import TidecacheError
from stage1_teacher import packing
from stage1_teacher.backends import ScoreRequest, load
from stage1_teacher.layouts import LAYOUTS
from stage1_teacher.packing import Row, plan_batches, reduce_row
from tests.stage1_teacher.models import MASK_ID, VOCABULARY, reference_logp, save_model

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "qwen3")


def several_draws(
    rng: np.random.Generator, lengths: tuple[int, ...], draws: int, prompt: int = 0
) -> list[ScoreRequest]:
    """`draws` passes over each of some documents; nothing of the first `prompt` tokens is masked."""
    requests = []
    for length in lengths:
        clean = rng.integers(2, VOCABULARY, length)
        for _ in range(draws):
            masked = np.flatnonzero(rng.random(length) < rng.random())
            masked = masked[masked >= prompt]
            noisy = clean.copy()
            noisy[masked] = MASK_ID
            requests.append(ScoreRequest(noisy, masked, clean[masked], clean))
    return requests


def assert_reference(teacher: Any, folder: Path, requests: list[ScoreRequest], shift: bool = False) -> None:
    scores = teacher.score(requests, 4)
    expected_NV = torch.cat(
        [reference_logp(folder, r, teacher.layout, teacher.block_size, shift, teacher.vocabulary) for r in requests]
    )
    gold_N = torch.from_numpy(np.concatenate([r.gold_ids for r in requests]))
    torch.testing.assert_close(
        scores.gold_logp_N.double(), expected_NV.gather(1, gold_N[:, None])[:, 0], rtol=0, atol=TOLERANCE
    )
    torch.testing.assert_close(scores.topk_logp_NK.double(), expected_NV.topk(4).values, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("budget", [1, 90, 4096])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("layout", ["block-causal", "bd3lm", "reordered"])
def test_shared_x0_is_exact(folder: Path, layout: str, shift: bool, budget: int) -> None:
    teacher = load(folder, layout=layout, block_size=8, mask_id=MASK_ID, logit_shift=shift, batch_tokens=budget)
    requests = several_draws(np.random.default_rng(1), (37, 8, 16, 5), draws=3, prompt=int(shift))
    assert_reference(teacher, folder, requests, shift)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "llada2"])
@pytest.mark.parametrize("layout", ["bd3lm", "reordered"])
def test_other_architectures(tmp_path: Path, kind: str, layout: str) -> None:
    if kind == "llada2":
        from stage1_teacher.architectures.families import register

        register()
        small = {"num_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        path = save_model(tmp_path / kind, "llada2_moe", tied=False, pad_token_id=None, **small)
    else:
        path = save_model(tmp_path / kind, kind)
    teacher = load(path, layout=layout, block_size=4, mask_id=MASK_ID)
    assert_reference(teacher, path, several_draws(np.random.default_rng(2), (21, 14), draws=2))


def test_reordered_masked_tokens_see_the_observed_ones_behind_them(folder: Path) -> None:
    """What sets the layout apart: a mask sees later observed tokens of its block, and no earlier or later block's x_t."""
    teacher = load(folder, layout="reordered", block_size=4, mask_id=MASK_ID)
    clean = np.arange(10, 18)
    noisy = clean.copy()
    noisy[[4, 6]] = MASK_ID

    def logp(token_ids: Any, clean_ids: Any) -> np.ndarray:
        return teacher.score([ScoreRequest(token_ids, [4, 6], clean[[4, 6]], clean_ids)], 1).gold_logp_N.numpy()

    base = logp(noisy, clean)
    for position, in_clean, moved in (
        (7, False, True),
        (5, False, True),
        (2, True, True),
        (2, False, False),
        (7, True, False),
    ):
        changed_noisy, changed_clean = noisy.copy(), clean.copy()
        (changed_clean if in_clean else changed_noisy)[position] = 99
        difference = np.abs(logp(changed_noisy, changed_clean) - base)
        assert (difference > 1e-3).all() if moved else (difference < 1e-6).all(), (position, in_clean)


def test_reordered_needs_a_mask_token(folder: Path) -> None:
    with pytest.raises(TidecacheError, match=r"reordered .*no mask token is known.*--mask-id"):
        load(folder, layout="reordered")


def test_prefixes_that_do_not_work_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that drops what it is given would predict without a past: measured at loading."""

    def own_keys_only(self: Any, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> Any:
        return torch.cat([0 * keys, keys], 2), torch.cat([0 * values, values], 2)

    monkeypatch.setattr(packing.SharedPrefix, "update", own_keys_only)
    with pytest.raises(TidecacheError, match="the layout bd3lm needs; only full and block-causal"):
        load(folder, layout="bd3lm")
    load(folder, layout="block-causal")


def row_of(layout: str, length: int, read: list[int], document: int = 0, block: int = 8) -> Row:
    clean = np.full(length, document)
    return reduce_row(LAYOUTS[layout], block, MASK_ID, np.full(length, 5), clean, np.array(read))


def test_only_what_predictions_depend_on_is_run() -> None:
    """A long prompt is read once, as x_0; x_t is cut to the blocks in which something is predicted."""
    assert len(row_of("full", 40, [20]).token_S) == 40
    assert row_of("block-causal", 40, [9, 20]).position_S.tolist() == list(range(24))
    row = row_of("bd3lm", 43, [17, 41])
    assert row.position_S.tolist() == [*range(16, 24), 40, 41, 42]
    assert row.read_N.tolist() == [1, 9]
    assert row.clean_width == 40
    assert row_of("bd3lm", 40, [3]).clean_width == 0


def test_tokens_run_by_the_decoder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load(folder, layout="bd3lm", block_size=8)
    run: list[tuple[int, ...]] = []
    attend = packing.attend

    def counted(decoder: Any, input_BS: torch.Tensor, *rest: Any) -> torch.Tensor:
        run.append(tuple(input_BS.shape))
        return attend(decoder, input_BS, *rest)

    monkeypatch.setattr(packing, "attend", counted)
    clean = np.arange(2, 66)
    noisy = clean.copy()
    noisy[48:] = MASK_ID
    teacher.score([ScoreRequest(noisy, np.arange(48, 64), clean[48:], clean)] * 8, 1)
    assert run == [(1, 56), (8, 16)]


sequences = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 4)), max_size=20)


@settings(max_examples=200, deadline=None)
@given(sequences, st.integers(1, 300), st.sampled_from(sorted(LAYOUTS)), st.randoms(use_true_random=False))
def test_batches(shapes: list[tuple[int, int]], budget: int, layout: str, random: Any) -> None:
    length_of = {}
    rows = []
    for length, document in shapes:
        length = length_of.setdefault(document, length)
        rows.append(row_of(layout, length, [random.randrange(length)], document))
    batches = plan_batches(rows, budget)
    assert sorted(np.concatenate(batches).tolist() if batches else []) == list(range(len(rows)))
    for batch in batches:
        chosen = [rows[i] for i in batch]
        documents = {row.clean_L.tobytes() for row in chosen if row.clean_width}
        padded = len(chosen) * max(len(row.token_S) for row in chosen)
        padded += len(documents) * max(row.clean_width for row in chosen)
        assert padded <= budget or len(chosen) == 1
    again = plan_batches([dataclasses.replace(row) for row in rows], budget)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_draws_of_a_document_stay_together() -> None:
    rows = [row_of("bd3lm", 32, [31], document) for document in (0, 1, 0, 1, 0, 1)]
    assert [batch.tolist() for batch in plan_batches(rows, 24 + 3 * 8)] == [[0, 2, 4], [1, 3, 5]]
    assert [batch.tolist() for batch in plan_batches(rows, 2 * 24 + 6 * 8)] == [[0, 2, 4, 1, 3, 5]]
