"""From hidden states to the losses of one batch: the student's likelihoods, the objective, TIDAL (DESIGN §6).

A pure function of hidden states, head, batch, configuration and progress, apart from the trainer, so that the teacher's
likelihoods in a batch can be replaced (by those of a teacher in the loop, say) and everything else stays. It returns
sums with their counts; only `total` divides, by the counts of the whole optimiser step.

Shape suffixes as in `batch`; D hidden size, T temperatures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stage2_student import objectives, tidal
from stage2_student.batch import Batch, EventTensors
from stage2_student.config import TrainConfig
from stage2_student.head import Head, argmax_and_logp, gather_logits
from stage2_student.objectives import Mean


@dataclass(frozen=True)
class BatchLosses:
    """Parts of the two means, and, without gradient, what is logged about them. Log-likelihoods in nats at temperature 1."""

    ce: Mean
    distill: Mean
    nll_N: Tensor  # −log p of masked tokens, unweighted
    student_logp_C: Tensor
    distill_C: Tensor  # before any weight
    weight_C: Tensor  # the effective TIDAL weight: the target's λ in `interpolate`, else the factor of the loss


# Wrappers such as FSDP hook the tensors of what a forward pass returns: they must find them.
for _part in (Mean, BatchLosses):
    torch.export.register_dataclass(_part)


@dataclass(frozen=True)
class Counts:
    """What the means of an optimiser step divide by; known from its batches alone, before any forward pass."""

    ce: Tensor
    distill: Tensor

    @classmethod
    def of(cls, batches: list[Batch], config: TrainConfig) -> Counts:
        """Add up over micro-batches of one rank; float64 scalars on the CPU."""
        ce = [objectives.cross_entropy_count(batch.trainable_B, config.ce_normalisation) for batch in batches]
        return cls(
            torch.tensor(float(sum(int(count) for count in ce)), dtype=torch.float64),
            torch.tensor(float(sum(len(batch.sample_C) for batch in batches)), dtype=torch.float64),
        )


def batch_losses(hidden_ND: Tensor, head: Head, batch: Batch, config: TrainConfig, progress: float) -> BatchLosses:
    """The losses of one batch, as sums and counts.

    Args:
        hidden_ND: hidden states at the batch's N masked tokens, in order.
        head: the student's head.
        batch: rows with the teacher's likelihoods.
        config: objective, temperature, TIDAL, normalisation.
        progress: optimiser steps done over all steps, 0 … 1.
    """
    position_N = torch.arange(len(batch.target_N), device=hidden_ND.device)
    events = batch.events if config.uses_events else None
    rows, ids, temperatures = position_N, batch.target_N, [1.0]
    if events is not None:
        rows, ids = torch.cat([rows, events.position_P]), torch.cat([ids, events.id_P])
        temperatures.append(config.temperature)
        if events.tail is not None:
            rows, ids = torch.cat([rows, events.tail.position_S]), torch.cat([ids, events.tail.id_S])
    logit, log_z_NT = gather_logits(hidden_ND, head, rows, ids, temperatures)
    gold_N, log_z_N = logit[: len(position_N)], log_z_NT[:, 0]
    nll_N = log_z_N - gold_N
    ce = objectives.cross_entropy(nll_N, batch.sample_N, batch.timestep_B, batch.trainable_B, config.ce_normalisation)
    chunks = len(batch.sample_C)
    student_logp_C = objectives.chunk_logp(gold_N[batch.position_M], log_z_N, batch.position_M, batch.chunk_M, chunks)

    strength_C, weight_C = _tidal(batch, config, progress)
    if config.objective == "none":
        loss_C = torch.zeros_like(student_logp_C)
    elif events is not None:
        log_z_C = objectives.sum_over(log_z_NT[batch.position_M, 1], batch.chunk_M, chunks)
        of_events, of_tail = len(position_N), len(position_N) + len(events.id_P)
        logit_CE = objectives.sum_over(logit[of_events:of_tail], events.event_P, events.valid_CE.numel())
        logit_CE = logit_CE.view(events.valid_CE.shape)
        if events.tail is not None and config.objective == "kl":
            log_z_S = log_z_NT[events.tail.position_S, 1]
            tail_S = logit[of_tail:] / config.temperature - log_z_S
            loss_C = _tail_loss(logit_CE, log_z_C, tail_S, batch, strength_C, config)
        else:
            loss_C = _event_loss(logit_CE, log_z_C, batch, strength_C, config)
    elif config.uses_events:  # only fresh rows in this batch: nothing is scored
        loss_C = torch.zeros_like(student_logp_C)
    else:
        loss_C = _calm_loss(student_logp_C, batch.teacher_logp_C, strength_C, config)
    return BatchLosses(
        ce=ce,
        distill=objectives.weighted(loss_C, weight_C),
        nll_N=nll_N.detach(),
        student_logp_C=student_logp_C.detach(),
        distill_C=loss_C.detach(),
        weight_C=strength_C if config.tidal == "interpolate" else weight_C,
    )


def _tidal(batch: Batch, config: TrainConfig, progress: float) -> tuple[Tensor, Tensor]:
    """(strength_C for the target, weight_C for the loss); ones where the mode has no use for them.

    By the row's timestep: what the student sees, and for a half of a draw what the teacher saw too.
    """
    ones_C = torch.ones_like(batch.teacher_logp_C)
    if config.tidal == "none":
        return ones_C, ones_C
    schedule = (config.lambda_init, config.lambda_max, config.tidal_decay)
    if config.tidal == "interpolate":
        strength_B = tidal.strength(progress, batch.timestep_B, config.tidal_axis, *schedule)
        weight_B = tidal.timestep_weight(batch.timestep_B, config.timestep_weight)
        return strength_B[batch.sample_C], weight_B[batch.sample_C]
    weight_B = tidal.sample_weight(progress, batch.timestep_B, config.tidal_axis, config.timestep_weight, *schedule)
    return ones_C, weight_B[batch.sample_C]


def _calm_loss(student_logp_C: Tensor, teacher_logp_C: Tensor, strength_C: Tensor, config: TrainConfig) -> Tensor:
    reverse = config.objective == "reverse-calm"
    if config.tidal == "interpolate":
        return objectives.tidal_calm_loss(student_logp_C, teacher_logp_C, strength_C, config.temperature, reverse)
    loss = objectives.reverse_calm_loss if reverse else objectives.calm_loss
    return loss(student_logp_C, teacher_logp_C, config.temperature)


def _event_masses(
    logit_CE: Tensor, log_z_C: Tensor, events: EventTensors, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """Log masses of the student's events and of the target's, *other* last; `gold_share` of the target is the gold."""
    student_CE = objectives.event_log_mass(logit_CE, log_z_C, events.valid_CE, config.temperature)
    # The teacher's masses are normalised already: as log-likelihoods at temperature 1 with a normaliser of 0.
    teacher_CE = objectives.event_log_mass(events.teacher_CE, torch.zeros_like(log_z_C), events.valid_CE, 1.0)
    if config.gold_share:
        teacher_CE = teacher_CE + math.log1p(-config.gold_share)
        gold_C = torch.logaddexp(teacher_CE[:, 0], teacher_CE.new_tensor(math.log(config.gold_share)))
        teacher_CE = torch.cat([gold_C[:, None], teacher_CE[:, 1:]], dim=1)
    return student_CE, teacher_CE


def _tail_loss(
    logit_CE: Tensor, log_z_C: Tensor, tail_S: Tensor, batch: Batch, strength_C: Tensor, config: TrainConfig
) -> Tensor:
    """Forward KL with tail samples; `tail_S`: the student's log-likelihood of each at the recipe's temperature."""
    assert batch.events is not None
    assert batch.events.tail is not None
    tail = batch.events.tail
    student_CE, teacher_CE = _event_masses(logit_CE, log_z_C, batch.events, config)
    flat = torch.zeros(tail.teacher_CW.numel(), dtype=tail_S.dtype, device=tail_S.device)
    student_CW = flat.index_add(0, tail.slot_S, tail_S).view(tail.teacher_CW.shape)
    teacher_CW = tail.teacher_CW + math.log1p(-config.gold_share)
    return objectives.tail_kl_loss(
        student_CE, teacher_CE, student_CW, teacher_CW, tail.log_share_CW, strength_C, config.temperature
    )


def _event_loss(logit_CE: Tensor, log_z_C: Tensor, batch: Batch, strength_C: Tensor, config: TrainConfig) -> Tensor:
    assert batch.events is not None
    temperature = config.temperature
    student_CE, teacher_CE = _event_masses(logit_CE, log_z_C, batch.events, config)
    if config.tidal == "interpolate":
        return objectives.tidal_event_kl_loss(student_CE, teacher_CE, strength_C, temperature)
    loss = objectives.reverse_event_kl_loss if config.objective == "reverse-kl" else objectives.event_kl_loss
    return loss(student_CE, teacher_CE, temperature)


@dataclass(frozen=True)
class ChunkAnswers:
    """What a student says of each chunk of a batch: log-likelihood of the gold and of its own best filling (nats), and
    whether that is the gold: whether every token's most likely id is.
    """

    logp_C: Tensor
    best_logp_C: Tensor
    right_C: Tensor


def chunk_answers(hidden_ND: Tensor, head: Head, batch: Batch) -> ChunkAnswers:
    """A student's answers from the hidden states at a batch's masked tokens; float64, without gradient."""
    every_N = torch.arange(len(batch.target_N), device=hidden_ND.device)
    logit_N, log_z_NT = gather_logits(hidden_ND, head, every_N, batch.target_N, [1.0])
    best_N, best_logp_N = argmax_and_logp(hidden_ND, head)

    def per_chunk(value_N: Tensor) -> Tensor:
        return objectives.sum_over(value_N[batch.position_M].double(), batch.chunk_M, len(batch.sample_C))

    wrong_C = per_chunk(best_N != batch.target_N)
    return ChunkAnswers(per_chunk(logit_N - log_z_NT[:, 0]), per_chunk(best_logp_N), wrong_C == 0)


def total(losses: BatchLosses, counts: Counts, config: TrainConfig) -> Tensor:
    """Cross-entropy + distill_weight × distillation, each over the count of the whole step (DESIGN §6)."""
    loss = losses.ce.over(counts.ce)
    if config.objective != "none":
        loss = loss + config.distill_weight * losses.distill.over(counts.distill)
    return loss
