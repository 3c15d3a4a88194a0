"""Forward KL with tail samples: against the dense loss, and from a cache whose teacher shares the student's tokenizer."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.cache.records import ContextScores, Draw
from shared.cache.vocabulary import TeacherVocabulary
from shared.preparation import Limits, Preparer
from shared.spelling import shared_ids
from shared.tokenization import TextTokenizer
from stage2_student import objectives
from stage2_student.batch import Collator
from stage2_student.config import load_recipe
from stage2_student.data import RowMaker
from stage2_student.head import Head
from stage2_student.losses import batch_losses
from tests.conftest import TINY_STUDENT
from tests.stage2_student import synthetic

V, K = 40, 6


def masses(logits_NV: Tensor, ids_NK: Tensor, temperature: float) -> Tensor:
    """Log masses of the ids and of the rest."""
    log_NV = torch.log_softmax(logits_NV / temperature, 1)
    top_NK = log_NV.gather(1, ids_NK)
    return torch.cat([top_NK, torch.log1p(-top_NK.exp().sum(1, keepdim=True))], 1)


def loss_of(
    student_NV: Tensor, teacher_NV: Tensor, tail_NW: Tensor, log_share_NW: Tensor, strength: float, temperature: float
) -> Tensor:
    top_NK = teacher_NV.topk(K, 1).indices
    return objectives.tail_kl_loss(
        masses(student_NV, top_NK, temperature),
        masses(teacher_NV, top_NK, temperature),
        torch.log_softmax(student_NV / temperature, 1).gather(1, tail_NW),
        torch.log_softmax(teacher_NV / temperature, 1).gather(1, tail_NW),
        log_share_NW,
        torch.full((len(student_NV),), strength, dtype=student_NV.dtype),
        temperature,
    )


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2.0 * torch.randn(5, V, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_whole_tail_as_samples_is_the_dense_loss(logits: tuple[Tensor, Tensor], temperature: float) -> None:
    student, teacher = logits
    tail = (-teacher).topk(V - K, 1).indices
    share = torch.log_softmax(torch.log_softmax(teacher / temperature, 1).gather(1, tail), 1)
    found = loss_of(student, teacher, tail, share, 1.0, temperature)
    expected = objectives.kl_loss(student, teacher, temperature)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), student)[0], torch.autograd.grad(expected.sum(), student)[0]
    )


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.9])
def test_the_head_of_an_interpolated_target_is_the_dense_one(logits: tuple[Tensor, Tensor], strength: float) -> None:
    """With the whole tail known, the target's mass on each of the k best is exact; within the tail it is a mixture."""
    student, teacher = logits
    tail = (-teacher).topk(V - K, 1).indices
    share = torch.log_softmax(torch.log_softmax(teacher / 2.0, 1).gather(1, tail), 1)
    found = torch.autograd.grad(loss_of(student, teacher, tail, share, strength, 2.0).sum(), student)[0]
    strength_N = torch.full((5,), strength, dtype=torch.float64)
    dense = objectives.tidal_kl_loss(student, teacher, strength_N, 2.0)
    expected = torch.autograd.grad(dense.sum(), student)[0]
    top = teacher.topk(K, 1).indices
    torch.testing.assert_close(found.gather(1, top), expected.gather(1, top))
    assert float((found - expected).norm() / expected.norm()) < 0.5
    events = torch.full_like(share, -torch.inf)
    without = torch.autograd.grad(loss_of(student, teacher, tail, events, strength, 2.0).sum(), student)[0]
    assert float((found - expected).norm()) < float((without - expected).norm())


def test_samples_are_unbiased_at_full_strength(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    top = teacher.topk(K, 1).indices
    tail_NV = torch.softmax(teacher / 2.0, 1).scatter(1, top, 0.0)
    sums = tail_NV.cumsum(1)
    mean, grid, samples = torch.zeros_like(student), 500, 3
    for chance in (np.arange(grid) + 0.5) / grid:
        at = (torch.arange(samples) + chance) / samples * sums[:, -1:]
        ids = torch.searchsorted(sums, at, right=True).clamp(max=V - 1)
        share = torch.full(ids.shape, -np.log(samples), dtype=torch.float64)  # drawn at the temperature of the loss
        mean += torch.autograd.grad(loss_of(student, teacher, ids, share, 1.0, 2.0).sum(), student)[0] / grid
    expected = torch.autograd.grad(objectives.kl_loss(student, teacher, 2.0).sum(), student)[0]
    torch.testing.assert_close(mean, expected, rtol=0, atol=4.0 / grid)


def test_chunks_without_samples_are_events(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    top = teacher.topk(K, 1).indices
    tail = torch.zeros(5, 3, dtype=torch.int64)
    none = torch.full((5, 3), -torch.inf, dtype=torch.float64)
    found = loss_of(student, teacher, tail, none, 0.5, 2.0)
    strength = torch.full((5,), 0.5, dtype=torch.float64)
    expected = objectives.tidal_event_kl_loss(masses(student, top, 2.0), masses(teacher, top, 2.0), strength, 2.0)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x.sum(), student)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


# From a cache


def shared_draw(tokenizer: TextTokenizer, k: int, samples: int) -> tuple[Draw, np.ndarray]:
    """A draw of a teacher with the student's tokenizer and made-up dense log-probabilities, and these [M, V]."""
    from shared import noise
    from shared.cache import format

    [raw] = synthetic.texts(1)
    prepared = Preparer(tokenizer, [tokenizer], Limits(512, (512,)), "none").prepare(raw)
    stored = format.stored_document(0, prepared)  # type: ignore[arg-type]
    t = noise.timestep(0, stored.key, 0, 1e-3)
    chunks = np.flatnonzero(noise.mask_chunks(0, stored.key, 0, t, len(stored.chunks)))
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(len(chunks), tokenizer.vocabulary)) * 2
    logp_MV = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
    gold_M = stored.token_ids_N[np.cumsum(stored.token_count_C)[chunks] - 1]
    top_MK = np.argsort(-logp_MV, axis=1, kind="stable")[:, :k]
    tail_MS = np.argsort(-logp_MV, axis=1, kind="stable")[:, k : k + samples]
    tail_MS[0, 0] = gold_M[0]  # a sample may be the gold
    scores = ContextScores(
        gold_logp_N=np.take_along_axis(logp_MV, gold_M[:, None].astype(np.int64), 1)[:, 0].astype(np.float32),
        log_z_MT=np.stack([np.zeros(len(chunks)), np.logaddexp.reduce(logp_MV / 2, axis=1)], 1).astype(np.float32),
        topk_ids=top_MK.reshape(-1).astype(np.int32),
        topk_logp_MK=np.take_along_axis(logp_MV, top_MK, 1).astype(np.float32),
        tail_ids=tail_MS.reshape(-1).astype(np.int32),
        tail_logp=np.take_along_axis(logp_MV, tail_MS, 1).reshape(-1).astype(np.float32),
    )
    vocabulary = TeacherVocabulary("same", tokenizer.digest, tokenizer.token_bytes, tokenizer.special)
    draw = Draw(
        stored.key, stored, 0, t, chunks, np.zeros(len(chunks), np.bool_), {"plain": scores}, "plain", vocabulary
    )
    return draw, logp_MV


@pytest.mark.parametrize("samples", [0, 5])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_row_of_a_shared_tokenizer_has_ids_as_events(samples: int, temperature: float) -> None:
    tokenizer = TextTokenizer.load(TINY_STUDENT)
    draw, logp_MV = shared_draw(tokenizer, 7, max(samples, 1))
    if not samples:
        scores = dataclasses.replace(draw.scores["plain"], tail_ids=None, tail_logp=None)
        draw = dataclasses.replace(draw, scores={"plain": scores})
    spec = synthetic.spec_of(tokenizer, tokenizer, contexts=("plain",), k=7, tail_samples=samples)
    row = RowMaker(tokenizer, spec, 32, "plain", temperature=temperature).cached_row(draw)
    events = row.events
    assert events is not None
    p_MV = np.exp(logp_MV / temperature - np.logaddexp.reduce(logp_MV / temperature, axis=1)[:, None])
    assert len(row.token_first_Q) == len(draw.chunks)
    for q in range(len(draw.chunks)):
        mine = np.flatnonzero(events.chunk_E == q)
        ids = events.ids_P[events.start_E[mine]]
        gold = row.ids_L[row.token_first_Q[q]]
        assert ids[0] == gold
        best = np.argsort(-logp_MV[q], kind="stable")[:7]
        assert set(ids[1:]) == set(best) - {gold}
        np.testing.assert_allclose(np.exp(events.log_mass_E[mine]), p_MV[q, ids], rtol=1e-4)
    if not samples:
        assert events.tail is None
        return
    tail = events.tail
    assert tail is not None
    gold_Q = row.ids_L[row.token_first_Q]
    assert not (tail.id_S == gold_Q[tail.chunk_S]).any()
    np.testing.assert_allclose(np.exp(tail.logp_S), p_MV[tail.chunk_S, tail.id_S], rtol=1e-4)
    total = np.bincount(tail.chunk_S, np.exp(tail.log_share_S), minlength=len(gold_Q))
    np.testing.assert_allclose(total, 1.0, rtol=1e-5)
    if temperature == 2.0:  # where they were drawn: equal shares
        assert np.ptp(tail.log_share_S[tail.chunk_S == 1]) < 1e-6


def test_a_batch_has_the_loss_of_its_dense_form() -> None:
    """The loss from hidden states, head and batch is `tail_kl_loss` on full logits."""
    tokenizer = TextTokenizer.load(TINY_STUDENT)
    draw, logp_MV = shared_draw(tokenizer, 7, 5)
    spec = synthetic.spec_of(tokenizer, tokenizer, contexts=("plain",), k=7, tail_samples=5)
    row = RowMaker(tokenizer, spec, 32, "plain", temperature=2.0).cached_row(draw)
    batch = Collator(1, 0)([row, dataclasses.replace(row, events=None, token_first_Q=row.token_first_Q[:0],
        token_stop_Q=row.token_stop_Q[:0], bytes_Q=row.bytes_Q[:0], teacher_logp_Q=row.teacher_logp_Q[:0]), row])  # fmt: skip
    torch.manual_seed(0)
    hidden = torch.randn(len(batch.target_N), 16, dtype=torch.float64, requires_grad=True)
    head = Head(torch.randn(len(tokenizer.token_bytes) + 3, 16, dtype=torch.float64) * 0.3)
    config = load_recipe("kl", {"fresh": 0.0})
    found = batch_losses(hidden, head, batch, config, 0.3).distill
    logits = hidden @ head.weight_VD.T
    teacher = torch.full((len(draw.chunks), logits.shape[1]), -60.0, dtype=torch.float64)
    teacher[:, : logp_MV.shape[1]] = torch.from_numpy(logp_MV)
    each = []
    for first in (0, 2 * int(row.masked_L.sum())):
        number = np.cumsum(row.masked_L) - 1
        for q, position in enumerate(row.token_first_Q):
            s, p = logits[first + number[position]][None], teacher[q][None]
            mine = row.events.chunk_E == q  # type: ignore[union-attr]
            ids = torch.from_numpy(row.events.ids_P[row.events.start_E[mine]])[None]  # type: ignore[union-attr]
            of_tail = row.events.tail.chunk_S == q  # type: ignore[union-attr]
            tail = torch.from_numpy(row.events.tail.id_S[of_tail])[None]  # type: ignore[union-attr]
            share = torch.full(tail.shape, -np.log(tail.shape[1]), dtype=torch.float64)
            each.append(objectives.tail_kl_loss(
                masses(s, ids, 2.0), masses(p, ids, 2.0), torch.log_softmax(s / 2, 1).gather(1, tail),
                torch.log_softmax(p / 2, 1).gather(1, tail), share, torch.ones(1, dtype=torch.float64), 2.0))  # fmt: skip
    expected = torch.cat(each)
    assert int(found.count) == len(expected)
    torch.testing.assert_close(found.total, expected.sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(found.total, hidden, retain_graph=True)[0],
        torch.autograd.grad(expected.sum(), hidden)[0],
        rtol=1e-4,
        atol=1e-5,
    )


def test_vocabularies_are_shared_but_for_a_few_added_tokens() -> None:
    tokenizer = TextTokenizer.load(TINY_STUDENT)
    spelled, special = list(tokenizer.token_bytes), tokenizer.special.copy()
    same = shared_ids(tokenizer, TeacherVocabulary("x", "0" * 32, tuple(spelled), special))
    assert same is not None
    assert same.all()
    spelled[-1] = b"something else"
    almost = shared_ids(tokenizer, TeacherVocabulary("x", "0" * 32, tuple(spelled), special))
    assert almost is not None
    assert not almost[-1]
    other = shared_ids(tokenizer, TeacherVocabulary("x", "0" * 32, tuple(reversed(spelled)), special))
    assert other is None
