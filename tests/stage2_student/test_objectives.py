"""The objectives against their definitions: probabilities of whole fillings, gradients, floors, and exact means.

The released code's own numbers are in test_oracles. Here: what it has no numbers for (events, weights, global means),
checked by brute force over all fillings of small vocabularies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.errors import TidecacheError
from stage2_student import objectives
from stage2_student.objectives import Mean

SEEDS = st.integers(0, 2**31)
TEMPERATURES = st.sampled_from([1.0, 2.0, 5.0])


def random_logits(seed: int, *shape: int) -> Tensor:
    return 3.0 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# CALM


def test_calm_by_hand() -> None:
    student_C, teacher_C = torch.tensor([math.log(0.25)]).double(), torch.tensor([math.log(0.64)]).double()
    s, p = 0.5, 0.8  # at T = 2
    assert float(objectives.calm_loss(student_C, teacher_C, 2.0)) == pytest.approx(
        -(p * math.log(s) + (1 - p) * math.log(1 - s))
    )
    assert float(objectives.reverse_calm_loss(student_C, teacher_C, 2.0)) == pytest.approx(
        -(s * math.log(p) + (1 - s) * math.log(1 - p))
    )


@given(st.floats(-30, 0), st.floats(-30, 0), TEMPERATURES)
def test_reverse_calm_gradient_is_minus_the_teachers_logit(student: float, teacher: float, temperature: float) -> None:
    student_C = torch.tensor([student], dtype=torch.float64, requires_grad=True)
    objectives.reverse_calm_loss(student_C, torch.tensor([teacher], dtype=torch.float64), temperature).sum().backward()
    s = math.exp(student / temperature)
    p = min(max(math.exp(teacher / temperature), 1e-7), 1 - 1e-7)
    expected = -math.log(p / (1 - p)) * s / temperature if 1e-7 < s < 1 - 1e-7 else 0.0
    assert float(student_C.grad) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_tidal_calm_between_student_and_teacher(reverse: bool) -> None:
    student_C = -4.0 * torch.rand(20, dtype=torch.float64)
    teacher_C = -4.0 * torch.rand(20, dtype=torch.float64)
    plain = objectives.reverse_calm_loss if reverse else objectives.calm_loss
    one_C, zero_C = torch.ones(20), torch.zeros(20)
    full = objectives.tidal_calm_loss(student_C, teacher_C, one_C, 2.0, reverse)
    torch.testing.assert_close(full, plain(student_C, teacher_C, 2.0))
    none = objectives.tidal_calm_loss(student_C, teacher_C, zero_C, 2.0, reverse)
    torch.testing.assert_close(none, plain(student_C, student_C, 2.0))


def test_forward_target_of_the_student_itself_pulls_nowhere() -> None:
    student_C = torch.tensor([-0.3, -1.0, -5.0], dtype=torch.float64, requires_grad=True)
    objectives.tidal_calm_loss(student_C, torch.full((3,), -2.0), torch.zeros(3), 2.0).sum().backward()
    torch.testing.assert_close(student_C.grad, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("loss", [objectives.calm_loss, objectives.reverse_calm_loss])
def test_no_gradient_reaches_the_teacher(loss: Callable[..., Tensor]) -> None:
    student_C, teacher_C = (torch.tensor([-1.0], requires_grad=True) for _ in range(2))
    loss(student_C, teacher_C, 2.0).sum().backward()
    assert student_C.grad is not None
    assert teacher_C.grad is None


def test_half_precision_is_raised_and_others_kept() -> None:
    student_C, teacher_C = -torch.rand(5), -torch.rand(5)
    for kind in (torch.bfloat16, torch.float16):
        found = objectives.calm_loss(student_C.to(kind), teacher_C.to(kind), 2.0)
        assert found.dtype == torch.float32
        torch.testing.assert_close(
            found, objectives.calm_loss(student_C.to(kind).float(), teacher_C.to(kind).float(), 2.0)
        )
        logits_NV = torch.randn(3, 7).to(kind)
        assert objectives.kl_loss(logits_NV, logits_NV, 2.0).dtype == torch.float32
    assert objectives.calm_loss(student_C.double(), teacher_C.double(), 2.0).dtype == torch.float64


# Dense KL


@given(SEEDS, TEMPERATURES)
def test_dense_kl_against_torch(seed: int, temperature: float) -> None:
    student_NV, teacher_NV = random_logits(seed, 4, 9), random_logits(seed + 1, 4, 9)
    s, p = (torch.log_softmax(logits / temperature, dim=1) for logits in (student_NV, teacher_NV))
    forward = torch.nn.functional.kl_div(s, p, log_target=True, reduction="none").sum(1) * temperature**2
    backward = torch.nn.functional.kl_div(p, s, log_target=True, reduction="none").sum(1) * temperature**2
    torch.testing.assert_close(objectives.kl_loss(student_NV, teacher_NV, temperature), forward)
    torch.testing.assert_close(objectives.reverse_kl_loss(student_NV, teacher_NV, temperature), backward)
    strength_N = torch.ones(4)
    torch.testing.assert_close(objectives.tidal_kl_loss(student_NV, teacher_NV, strength_N, temperature), forward)


# Events


class SmallChunks:
    """Chunks of n tokens over V ids with all V^n fillings at hand; the first `events` of an order are the events."""

    def __init__(self, seed: int, chunks: int = 3, tokens: int = 2, vocabulary: int = 4, events: int = 5) -> None:
        self.student, self.teacher = (random_logits(seed + i, chunks, tokens, vocabulary) for i in range(2))
        fillings = list(itertools.product(range(vocabulary), repeat=tokens))
        order = torch.randperm(len(fillings), generator=torch.Generator().manual_seed(seed))
        self.fillings = torch.tensor(fillings)[order]  # X, n
        self.events = events

    def filling_logits(self, logits_CnV: Tensor) -> Tensor:
        return sum(logits_CnV[:, i, self.fillings[:, i]] for i in range(logits_CnV.shape[1]))

    def dense(self, logits_CnV: Tensor, temperature: float) -> Tensor:
        """log p of every filling: tokens are independent given the context, so logits of fillings add up."""
        return torch.log_softmax(self.filling_logits(logits_CnV) / temperature, dim=1)

    def masses(self, logits_CnV: Tensor, temperature: float) -> Tensor:
        log_z_C = torch.logsumexp(logits_CnV / temperature, dim=2).sum(dim=1)
        logit_CE = self.filling_logits(logits_CnV)[:, : self.events]
        return objectives.event_log_mass(logit_CE, log_z_C, torch.ones_like(logit_CE, dtype=torch.bool), temperature)


@given(SEEDS, TEMPERATURES, st.integers(1, 2))
def test_event_masses_are_those_of_all_fillings(seed: int, temperature: float, tokens: int) -> None:
    chunks = SmallChunks(seed, tokens=tokens, vocabulary=5 if tokens == 2 else 9)
    dense_CX = chunks.dense(chunks.student, temperature).exp()
    other_C = dense_CX[:, chunks.events :].sum(dim=1).clamp(min=1e-6)
    expected = torch.cat([dense_CX[:, : chunks.events], other_C[:, None]], dim=1)
    torch.testing.assert_close(chunks.masses(chunks.student, temperature).exp(), expected, atol=1e-12, rtol=1e-9)


@given(SEEDS, TEMPERATURES, st.integers(1, 2))
def test_what_events_lose_is_the_tails_divergence(seed: int, temperature: float, tokens: int) -> None:
    """0 ≤ KL − KL_events = P_tail·KL(p_tail‖s_tail) within one tokenizer (DESIGN §5)."""
    chunks = SmallChunks(seed, tokens=tokens, vocabulary=5 if tokens == 2 else 9)
    p, s = chunks.dense(chunks.teacher, temperature), chunks.dense(chunks.student, temperature)
    p_tail, s_tail = p[:, chunks.events :], s[:, chunks.events :]
    if min(p_tail.logsumexp(1).min(), s_tail.logsumexp(1).min()) < math.log(1e-6):
        return  # the floor changes the events there
    kl = (p.exp() * (p - s)).sum(dim=1)
    events = objectives.event_kl_loss(
        chunks.masses(chunks.student, temperature), chunks.masses(chunks.teacher, temperature), temperature
    )
    mass_C = p_tail.exp().sum(dim=1)
    p_tail, s_tail = p_tail - p_tail.logsumexp(1, keepdim=True), s_tail - s_tail.logsumexp(1, keepdim=True)
    tail = mass_C * (p_tail.exp() * (p_tail - s_tail)).sum(dim=1)
    torch.testing.assert_close(kl - events / temperature**2, tail, atol=1e-9, rtol=1e-6)
    assert bool((tail > -1e-12).all())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_events_that_are_all_fillings_give_the_dense_loss_and_gradient(temperature: float) -> None:
    student_NV, teacher_NV = random_logits(1, 3, 6).requires_grad_(), random_logits(2, 3, 6)
    valid_CE = torch.ones(3, 6, dtype=torch.bool)
    masses = [
        objectives.event_log_mass(z, torch.logsumexp(z / temperature, dim=1), valid_CE, temperature)
        for z in (student_NV, teacher_NV)
    ]
    for events, dense in (
        (objectives.event_kl_loss, objectives.kl_loss),
        (objectives.reverse_event_kl_loss, objectives.reverse_kl_loss),
    ):
        loss, expected = events(*masses, temperature), dense(student_NV, teacher_NV, temperature)
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)  # *other* is at its floor on both sides
        found, wanted = (torch.autograd.grad(x.sum(), student_NV, retain_graph=True)[0] for x in (loss, expected))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_invalid_events_count_for_nothing() -> None:
    chunks = SmallChunks(5)
    logit_CE = chunks.filling_logits(chunks.student)[:, :5].clone()
    log_z_C = torch.logsumexp(chunks.student, dim=2).sum(dim=1)
    valid_CE = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4])
    teacher_logit_CE = chunks.filling_logits(chunks.teacher)[:, :5]
    teacher_log_z_C = torch.logsumexp(chunks.teacher, dim=2).sum(dim=1)

    def losses(padding: float) -> tuple[Tensor, Tensor]:
        student = torch.where(valid_CE, logit_CE, padding).requires_grad_()
        student_CE = objectives.event_log_mass(student, log_z_C, valid_CE, 2.0)
        teacher_CE = objectives.event_log_mass(
            torch.where(valid_CE, teacher_logit_CE, padding), teacher_log_z_C, valid_CE, 2.0
        )
        strength_C = torch.tensor([0.2, 0.5, 0.9])
        loss_C = torch.stack(
            [
                objectives.event_kl_loss(student_CE, teacher_CE, 2.0),
                objectives.reverse_event_kl_loss(student_CE, teacher_CE, 2.0),
                objectives.tidal_event_kl_loss(student_CE, teacher_CE, strength_C, 2.0),
            ]
        )
        loss_C.sum().backward()
        assert student.grad is not None
        return loss_C.detach(), student.grad

    # Values of padding, even absurd ones, reach neither the loss nor the gradient.
    for absurd in (0.0, -1e30, 1e30):
        loss, grad = losses(absurd)
        assert bool(loss.isfinite().all())
        torch.testing.assert_close(loss, losses(1.0)[0])
        torch.testing.assert_close(grad, losses(1.0)[1])
        assert bool((grad[~valid_CE] == 0).all())
    # A chunk's loss is what it would be alone, without padding.
    narrow = [
        objectives.event_log_mass(x[1:2, :3], z[1:2], valid_CE[1:2, :3], 2.0)
        for x, z in ((logit_CE, log_z_C), (teacher_logit_CE, teacher_log_z_C))
    ]
    alone = [
        objectives.event_kl_loss(*narrow, 2.0),
        objectives.reverse_event_kl_loss(*narrow, 2.0),
        objectives.tidal_event_kl_loss(*narrow, torch.tensor([0.5]), 2.0),
    ]
    torch.testing.assert_close(losses(0.0)[0][:, 1], torch.cat(alone))


def test_other_has_a_floor_on_either_side() -> None:
    sure = torch.tensor([[0.0]], dtype=torch.float64, requires_grad=True)  # the gold has all the mass
    zero_C, valid = torch.zeros(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    student_CE = objectives.event_log_mass(sure, zero_C, valid, 1.0)
    teacher_CE = objectives.event_log_mass(torch.tensor([[math.log(0.5)]]).double(), zero_C, valid, 1.0)
    assert float(student_CE[0, 1].detach()) == pytest.approx(math.log(1e-6))
    loss = objectives.event_kl_loss(student_CE, teacher_CE, 1.0)
    assert float(loss.detach()) == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-6))
    loss.sum().backward()
    assert math.isfinite(float(sure.grad))


def test_tidal_events_between_student_and_teacher() -> None:
    chunks = SmallChunks(7)
    student_CE, teacher_CE = chunks.masses(chunks.student, 2.0).requires_grad_(), chunks.masses(chunks.teacher, 2.0)
    full = objectives.tidal_event_kl_loss(student_CE, teacher_CE, torch.ones(3), 2.0)
    torch.testing.assert_close(full, objectives.event_kl_loss(student_CE, teacher_CE, 2.0))
    none = objectives.tidal_event_kl_loss(student_CE, teacher_CE, torch.zeros(3), 2.0)
    torch.testing.assert_close(none, torch.zeros_like(none), atol=1e-12, rtol=0)
    # In between: the normalised geometric mean, with the student's part detached.
    mixed = torch.softmax(0.3 * student_CE.detach() + 0.7 * teacher_CE, dim=1)
    some = objectives.tidal_event_kl_loss(student_CE, teacher_CE, torch.full((3,), 0.7), 2.0)
    torch.testing.assert_close(some, 4.0 * (mixed * (mixed.log() - student_CE)).sum(dim=1), atol=1e-6, rtol=1e-6)
    some.sum().backward()
    torch.testing.assert_close(student_CE.grad, -4.0 * mixed, atol=1e-6, rtol=1e-6)


def test_same_tokens_in_two_orders_make_the_same_chunk() -> None:
    logit_M, log_z_N = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    found = objectives.chunk_logp(logit_M, log_z_N, torch.tensor([2, 0, 1]), torch.tensor([1, 1, 0]), 3)
    torch.testing.assert_close(found, torch.tensor([3.0 - 5.0, 1.0 - 6.0 + 2.0 - 4.0, 0.0]))


# Cross-entropy and means


def test_cross_entropy_normalisations() -> None:
    nll_N, sample_N = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 1])
    timestep_B, trainable_B = torch.tensor([0.5, 0.25]), torch.tensor([4, 10])
    first, second = 3.0 / 0.5, 4.0 / 0.25
    for normalisation, expected in (
        ("token", (first + second) / 14),
        ("sequence", (first / 4 + second / 10) / 2),
        ("batch", (first + second) / 2),
    ):
        found = objectives.cross_entropy(nll_N, sample_N, timestep_B, trainable_B, normalisation)
        assert float(found.over()) == pytest.approx(expected, rel=1e-5)
        assert float(found.count) == float(objectives.cross_entropy_count(trainable_B, normalisation))
    with pytest.raises(TidecacheError, match="token, sequence, batch, found 'word'"):
        objectives.cross_entropy(nll_N, sample_N, timestep_B, trainable_B, "word")


def test_cross_entropy_weight_is_float32() -> None:
    weight_B = objectives.cross_entropy_weight(torch.tensor([1e-3, 0.3], dtype=torch.float64))
    assert weight_B.dtype == torch.float32
    torch.testing.assert_close(weight_B, 1.0 / (torch.tensor([1e-3, 0.3], dtype=torch.float32) + 1e-6), rtol=0, atol=0)


def test_empty_batches_give_zero_with_a_gradient_of_zero() -> None:
    hidden = torch.ones(0, 3, requires_grad=True)
    none_N = hidden.sum(dim=1)
    trainable_B = torch.zeros(2, dtype=torch.long)
    sample_N = torch.zeros(0, dtype=torch.long)
    ce = objectives.cross_entropy(none_N, sample_N, torch.tensor([0.5, 0.5]), trainable_B).over()
    distillation = objectives.weighted(objectives.reverse_calm_loss(none_N, none_N.detach(), 2.0)).over()
    total = ce + distillation
    total.backward()
    assert float(total.detach()) == 0.0
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 3)


def test_weights_do_not_change_the_divisor() -> None:
    found = objectives.weighted(torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.0])).over()
    assert float(found) == 0.25


@settings(deadline=None)
@given(SEEDS, st.sampled_from(objectives.NORMALISATIONS), st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_parts_over_the_steps_count_add_up_to_the_large_batch(seed: int, normalisation: str, sizes: list[int]) -> None:
    """Any split into micro-batches (ranks, accumulation) gives the loss and gradient of the whole batch."""
    generator = torch.Generator().manual_seed(seed)
    samples = len(sizes)
    sample_N = torch.repeat_interleave(torch.arange(samples), torch.tensor(sizes))
    nll_N = torch.rand(len(sample_N), generator=generator, dtype=torch.float64)
    timestep_B = torch.rand(samples, generator=generator)
    trainable_B = torch.tensor(sizes) + torch.randint(0, 3, (samples,), generator=generator)
    whole_N = nll_N.clone().requires_grad_()
    whole = objectives.cross_entropy(whole_N, sample_N, timestep_B, trainable_B, normalisation).over()
    whole.backward()

    parts_N = nll_N.clone().requires_grad_()
    count = sum(objectives.cross_entropy_count(trainable_B[b : b + 1], normalisation) for b in range(samples))
    losses = []
    for b in range(samples):
        part_N = parts_N[sample_N == b]
        sample = torch.zeros(len(part_N), dtype=torch.long)
        part = objectives.cross_entropy(part_N, sample, timestep_B[b : b + 1], trainable_B[b : b + 1], normalisation)
        losses.append(part.over(count))
        losses[-1].backward()
    torch.testing.assert_close(torch.stack(losses).sum(), whole)
    torch.testing.assert_close(parts_N.grad, whole_N.grad)


def test_means_add_up() -> None:
    both = Mean(torch.tensor(3.0), torch.tensor(2)) + Mean(torch.tensor(5.0), torch.tensor(6))
    assert float(both.over()) == 1.0
    assert float(both.over(16)) == 0.5
