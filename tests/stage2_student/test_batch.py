"""Collation and the losses of a batch, against the plain way: full logits, one chunk at a time, loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.cache.reader import Cache
from shared.tokenization import TextTokenizer
from stage2_student.attention import block_diffusion_mask
from stage2_student.batch import Batch, Collator
from stage2_student.config import TrainConfig, load_recipe, resolve
from stage2_student.data import Row, RowMaker
from stage2_student.losses import Counts, batch_losses, total
from stage2_student.model import Student, TrainableStudent, load_student, masked_hidden
from stage2_student.objectives import CLAMP, OTHER_FLOOR

BLOCK = 32


@pytest.fixture(scope="module")
def student(student_folder: Path) -> Student:
    """Loaded, in float32."""
    return load_student(student_folder)


def rows_of(
    cache: Cache, tokenizer: TextTokenizer, temperature: float | None = None, fresh: int = 0, count: int = 3
) -> list[Row]:
    """Rows of the shortest documents, so that the plain way takes no minutes."""
    maker = RowMaker(tokenizer, cache.spec, BLOCK, "compdemo", temperature=temperature)
    draws = sorted(cache.iter_draws(), key=lambda d: (len(d.stored.chunks), d.draw))
    cached = [maker.cached_row(draws[4 * n + 1]) for n in range(count)]
    return cached + [maker.fresh_row(draws[0].stored, n) for n in range(fresh)]


def collate(student: Student, rows: Sequence[Row]) -> Batch:
    return Collator(student.mask_id, student.pad_id)(rows)


def test_a_batch_holds_its_rows(cache: Cache, tokenizer: TextTokenizer, student: Student) -> None:
    rows = rows_of(cache, tokenizer, fresh=1)
    batch = collate(student, rows)
    assert len(batch) == 4
    assert batch.length_B.tolist() == [len(r.ids_L) for r in rows]
    assert batch.fresh == 1
    for b, row in enumerate(rows):
        length = len(row.ids_L)
        assert batch.clean_BL[b, :length].tolist() == row.ids_L.tolist()
        assert batch.noisy_BL[b, :length].tolist() == np.where(row.masked_L, student.mask_id, row.ids_L).tolist()
        assert (batch.sample_N == b).sum() == row.masked_L.sum()
        assert (batch.sample_C == b).sum() == len(row.token_first_Q)
    # Each chunk's tokens, found through the flat indices, are the row's.
    chunk = 0
    for b, row in enumerate(rows):
        for first, stop in zip(row.token_first_Q, row.token_stop_Q, strict=True):
            position = batch.position_M[batch.chunk_M == chunk]
            assert batch.sample_N[position].unique().tolist() == [b]
            assert batch.column_N[position].tolist() == list(range(first, stop))
            assert batch.target_N[position].tolist() == row.ids_L[first:stop].tolist()
            chunk += 1
    assert chunk == len(batch.sample_C)


def test_the_models_input_shows_nothing_that_is_masked(
    cache: Cache, tokenizer: TextTokenizer, student: Student
) -> None:
    """Another filling of the masked tokens of the last block changes nothing that the model says about that block."""
    row = next(r for r in rows_of(cache, tokenizer) if r.masked_L[-BLOCK:].any())
    batch = collate(student, [row])
    other = batch.clean_BL.clone()
    hidden_at = torch.from_numpy(np.flatnonzero(row.masked_L))
    hidden_at = hidden_at[hidden_at >= len(row.ids_L) - BLOCK]
    other[0, hidden_at] = 17
    with torch.no_grad():
        a, b = (masked_hidden(student.model, x, BLOCK) for x in (batch, replace(batch, clean_BL=other)))
    torch.testing.assert_close(a, b)


def test_padding_changes_nothing(cache: Cache, tokenizer: TextTokenizer, student: Student) -> None:
    rows = sorted(rows_of(cache, tokenizer), key=lambda r: len(r.ids_L))
    assert len(rows[0].ids_L) < len(rows[-1].ids_L)
    config = load_recipe("reverse-calm-tidal")
    model = TrainableStudent(student.model, config)
    with torch.no_grad():
        together, alone = model(collate(student, rows), 0.5), [model(collate(student, [r]), 0.5) for r in rows]
    torch.testing.assert_close(together.ce.total, sum(x.ce.total for x in alone))
    torch.testing.assert_close(together.distill.total, sum(x.distill.total for x in alone))
    torch.testing.assert_close(together.student_logp_C, torch.cat([x.student_logp_C for x in alone]))


def test_empty_rows_are_left_out_and_a_batch_of_them_has_no_loss(
    cache: Cache, tokenizer: TextTokenizer, student: Student
) -> None:
    row = rows_of(cache, tokenizer)[0]
    none = np.zeros(0, np.int64)
    empty = replace(
        row, ids_L=none, masked_L=none.astype(bool), trainable=0, token_first_Q=none, token_stop_Q=none, bytes_Q=none,
        teacher_logp_Q=np.zeros(0, np.float32),
    )  # fmt: skip
    assert len(collate(student, [row, empty])) == 1
    config = load_recipe("reverse-calm-tidal")
    losses = TrainableStudent(student.model, config)(collate(student, [empty]), 0.0)
    loss = total(losses, Counts.of([collate(student, [empty])], config), config)
    assert loss.item() == 0.0
    loss.backward()


CONFIGS = [
    load_recipe("reverse-calm-tidal"),
    load_recipe("tide-cross", {"context": "compdemo"}),
    load_recipe("calm", {"context": "compdemo", "ce_normalisation": "sequence"}),
    load_recipe("tide-shared-x", {"timestep_weight": "midrange"}),
    load_recipe("events"),
    load_recipe("events", {"tidal": "interpolate", "temperature": 2.0}),
    load_recipe("reverse-kl", {"context": "compdemo"}),
    load_recipe("reverse-kl", {"context": "compdemo", "gold_share": 0.3}),
    load_recipe("kl", {"context": "compdemo", "gold_share": 0.5, "temperature": 2.0}),
    load_recipe("events", {"tidal": "interpolate", "gold_share": 0.9}),
    load_recipe("cross-entropy", {"ce_normalisation": "batch"}),
]


def event_logps(row: Row, hot_LV: torch.Tensor) -> list[torch.Tensor]:
    """The student's log-likelihood of each event: its tokens at the chunk's positions."""
    assert row.events is not None
    count_E = (row.token_stop_Q - row.token_first_Q)[row.events.chunk_E]
    at = [first + i for first, n in zip(row.token_first_Q[row.events.chunk_E], count_E, strict=True) for i in range(n)]
    logp_P = hot_LV[torch.tensor(at), torch.from_numpy(row.events.ids_P)]
    return [part.sum() for part in logp_P.split(count_E.tolist())]


def plain_loss(student: Student, rows: Sequence[Row], config: TrainConfig, progress: float) -> torch.Tensor:
    """DESIGN §6 written out in float64, from full logits."""
    model, cross, distilled, chunks = (
        student.model,
        torch.zeros((), dtype=torch.float64),
        torch.zeros((), dtype=torch.float64),
        0,
    )
    tokens = sum(r.trainable for r in rows)
    g = 0.5 * (1 - np.cos(np.pi * progress))
    lam = config.lambda_init + (config.lambda_max - config.lambda_init) * g
    lam = config.lambda_max if config.tidal_axis == "timestep" else lam
    for row in rows:
        length, t = len(row.ids_L), row.timestep
        noisy = torch.from_numpy(np.where(row.masked_L, student.mask_id, row.ids_L))
        mask = block_diffusion_mask(length, BLOCK)
        bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]
        position = torch.arange(length).repeat(2)[None]
        ids = torch.cat([noisy, torch.from_numpy(row.ids_L)])[None]
        logits = model(input_ids=ids, attention_mask=bias, position_ids=position).logits[0, :length].double()
        gold_L = torch.log_softmax(logits, -1)[torch.arange(length), torch.from_numpy(row.ids_L)]
        nll = -gold_L[torch.from_numpy(row.masked_L)].sum() / (float(np.float32(t)) + 1e-6)
        cross = (
            cross
            + nll
            / {"token": tokens, "sequence": row.trainable * len(rows), "batch": len(rows)}[config.ce_normalisation]
        )
        bell = np.exp(-((t - 0.5) ** 2) / (2 * 0.15**2)) if config.timestep_weight == "midrange" else 1.0
        weight = {"none": 1.0, "interpolate": bell, "weight": lam * (1 - t) / 0.5}[config.tidal]
        strength = lam * (1 - t) if config.tidal == "interpolate" else 1.0
        heat = config.temperature
        event_logp = event_logps(row, torch.log_softmax(logits / heat, -1)) if row.events is not None else []
        for q, (first, stop) in enumerate(zip(row.token_first_Q.tolist(), row.token_stop_Q.tolist(), strict=True)):
            chunks += 1
            if config.objective in ("calm", "reverse-calm"):
                s = (gold_L[first:stop].sum() / heat).exp().clamp(CLAMP, 1 - CLAMP)
                p = torch.tensor(float(row.teacher_logp_Q[q]) / heat, dtype=torch.float64).exp().clamp(CLAMP, 1 - CLAMP)
                p = ((1 - strength) * s + strength * p).clamp(CLAMP, 1 - CLAMP).detach()
                a, b = (s, p) if config.objective == "reverse-calm" else (p, s)
                distilled = distilled + weight * -(a * b.log() + (1 - a) * (1 - b).log())
            elif config.objective != "none":
                assert row.events is not None
                of = np.flatnonzero(row.events.chunk_E == q)
                s_events = torch.stack([event_logp[e] for e in of])
                p_events = torch.from_numpy(row.events.log_mass_E[of]).double()
                s_all, p_all = (
                    torch.cat([x, (1 - x.exp().sum()).clamp(min=OTHER_FLOOR).log()[None]]) for x in (s_events, p_events)
                )
                gold = torch.zeros_like(p_all)
                gold[0] = 1.0
                p_all = ((1 - config.gold_share) * p_all.exp() + config.gold_share * gold).log()
                if config.tidal == "interpolate":
                    p_all = torch.log_softmax((1 - strength) * s_all + strength * p_all, 0).detach()
                a, b = (s_all, p_all) if config.objective == "reverse-kl" else (p_all, s_all)
                distilled = distilled + weight * heat**2 * (a.exp() * (a - b)).sum()
    return cross + config.distill_weight * distilled / max(chunks, 1)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.objective}-{c.tidal}-{c.temperature:g}-{c.gold_share:g}")
def test_losses_and_gradients_are_those_of_the_plain_way(
    config: TrainConfig, cache: Cache, tokenizer: TextTokenizer, student_folder: Path
) -> None:
    student = load_student(student_folder)
    rows = rows_of(cache, tokenizer, config.temperature if config.uses_events else None, fresh=1, count=2)
    batch = collate(student, rows)
    gradients = []
    losses = TrainableStudent(student.model, config)(batch, 0.3)
    for loss in (total(losses, Counts.of([batch], config), config), plain_loss(student, rows, config, 0.3)):
        gradients.append((loss.detach().double(), torch.autograd.grad(loss, list(student.model.parameters()))))
    (ours, ours_g), (plain, plain_g) = gradients
    torch.testing.assert_close(ours, plain, rtol=2e-5, atol=1e-6)
    for a, b in zip(ours_g, plain_g, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-5 * float(b.abs().max()) + 1e-8)


def test_the_teachers_likelihoods_can_be_replaced(cache: Cache, tokenizer: TextTokenizer, student: Student) -> None:
    """With the student's own likelihoods as the teacher's, forward CALM has no gradient left."""
    config = resolve({"objective": "calm", "tidal": "none"}, "test")
    batch, model = collate(student, rows_of(cache, tokenizer)), TrainableStudent(student.model, config)
    hidden_ND = masked_hidden(student.model, batch, BLOCK).detach().requires_grad_()
    before = batch_losses(hidden_ND, model._head(), batch, config, 0.0)
    same = replace(batch, teacher_logp_C=before.student_logp_C)
    (gradient,) = torch.autograd.grad(
        batch_losses(hidden_ND, model._head(), same, config, 0.0).distill.total, hidden_ND
    )
    (other,) = torch.autograd.grad(before.distill.total, hidden_ND)
    assert gradient.abs().max() < 1e-4 * other.abs().max()


def test_counts_run_over_all_batches_of_a_step(cache: Cache, tokenizer: TextTokenizer, student: Student) -> None:
    rows = rows_of(cache, tokenizer)
    parts, whole = [collate(student, [r]) for r in rows], collate(student, rows)
    for normalisation in ("token", "sequence", "batch"):
        config = resolve({"ce_normalisation": normalisation}, "test")
        assert Counts.of(parts, config) == Counts.of([whole], config)
