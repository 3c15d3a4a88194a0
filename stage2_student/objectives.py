"""The objectives of stage 2: CALM, Reverse CALM, KL on logits and on events, and cross-entropy (DESIGN §5, §6).

p is the teacher, s the student, T the temperature. Everything here is arithmetic on tensors that are small already
(chunks, events, masked positions); `head` made the log-likelihoods. Each function returns losses per item, unreduced.

**Means.** A mean of DESIGN §6 runs over all items of one optimiser step: all ranks, all accumulation steps, all packed
draws. So no function here divides by a number of items. Losses, their weights and the count become a `Mean` (sum and
count) through `weighted` and `cross_entropy`, and `Mean.over` is the one place that divides: by the local count for
one batch, or by the count of the whole step, which depends on the batches alone and so is known before any forward
pass. An empty mean is 0 with gradient 0.

Shape suffixes: C chunks, N positions, V vocabulary, E events of a chunk (the last is *other*), W tail samples of a chunk,
B samples, M pairs.
Log-likelihoods are in nats. bfloat16 and float16 are raised to float32; other dtypes are kept: float64 stays float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import TidecacheError

CLAMP = 1e-7  # chunk probabilities stay this far from 0 and 1
OTHER_FLOOR = 1e-6  # least mass of the event *other*
NORMALISATIONS = ("token", "sequence", "batch")
TIMESTEP_OFFSET = 1e-6  # cross-entropy weighs 1 / (t + this), as the released code does


# Chunk log-likelihoods


def calm_loss(student_logp_C: Tensor, teacher_logp_C: Tensor, temperature: float) -> Tensor:
    """CALM per chunk: −[p log s + (1 − p) log(1 − s)], p = clamp(exp(L / T)), s alike (DESIGN §6).

    Args:
        student_logp_C: the student's log-likelihood of each chunk's gold at temperature 1.
        teacher_logp_C: the teacher's; no gradient flows into it.
        temperature: T > 0.

    Returns:
        Loss per chunk, nats. Beyond the clamps the gradient is 0.
    """
    s_C, p_C = _chunk_probability(student_logp_C, temperature), _chunk_probability(teacher_logp_C, temperature)
    return _binary_cross_entropy(p_C.detach(), s_C)


def reverse_calm_loss(student_logp_C: Tensor, teacher_logp_C: Tensor, temperature: float) -> Tensor:
    """Reverse CALM per chunk: −[s log p + (1 − s) log(1 − p)]; ∂/∂s = −logit(p) (DESIGN §6).

    Arguments and clamps as in `calm_loss`.
    """
    s_C, p_C = _chunk_probability(student_logp_C, temperature), _chunk_probability(teacher_logp_C, temperature)
    return _binary_cross_entropy(s_C, p_C.detach())


def tidal_calm_loss(
    student_logp_C: Tensor, teacher_logp_C: Tensor, strength_C: Tensor, temperature: float, reverse: bool = False
) -> Tensor:
    """CALM or Reverse CALM against the target (1 − λ)·s + λ·p, detached and clamped again (DESIGN §6, `interpolate`).

    Args:
        student_logp_C: as in `calm_loss`.
        teacher_logp_C: as in `calm_loss`.
        strength_C: λ of each chunk's sample, `tidal.strength`.
        temperature: T > 0.
        reverse: Reverse CALM against the same target.
    """
    s_C, p_C = _chunk_probability(student_logp_C, temperature), _chunk_probability(teacher_logp_C, temperature)
    strength_C = strength_C.to(s_C.dtype)
    target_C = torch.clamp((1.0 - strength_C) * s_C + strength_C * p_C, CLAMP, 1.0 - CLAMP).detach()
    return _binary_cross_entropy(s_C, target_C) if reverse else _binary_cross_entropy(target_C, s_C)


def _chunk_probability(logp_C: Tensor, temperature: float) -> Tensor:
    return torch.clamp(torch.exp(_raised(logp_C) / temperature), CLAMP, 1.0 - CLAMP)


def _binary_cross_entropy(p_C: Tensor, q_C: Tensor) -> Tensor:
    return -(p_C * torch.log(q_C) + (1.0 - p_C) * torch.log1p(-q_C))


# Dense logits over a shared vocabulary


def kl_loss(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float) -> Tensor:
    """T²·KL(p‖s) per position; both over the same V ids, renormalised over these (DESIGN §6).

    Args:
        student_logits_NV: logits, already cut to the shared ids.
        teacher_logits_NV: the same ids; no gradient flows into it.
        temperature: T > 0.
    """
    log_s_NV, log_p_NV = (
        _log_probability(student_logits_NV, temperature),
        _log_probability(teacher_logits_NV, temperature),
    )
    return temperature**2 * _divergence(log_p_NV.detach(), log_s_NV)


def reverse_kl_loss(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float) -> Tensor:
    """T²·KL(s‖p) per position (DESIGN §6). Arguments as `kl_loss`."""
    log_s_NV, log_p_NV = (
        _log_probability(student_logits_NV, temperature),
        _log_probability(teacher_logits_NV, temperature),
    )
    return temperature**2 * _divergence(log_s_NV, log_p_NV.detach())


def tidal_kl_loss(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, strength_N: Tensor, temperature: float
) -> Tensor:
    """T²·KL(target‖s), the target's T-scaled logits (1 − λ)·student + λ·teacher, detached (DESIGN §6, `interpolate`).

    Args:
        student_logits_NV: as in `kl_loss`.
        teacher_logits_NV: as in `kl_loss`.
        strength_N: λ of each position's sample.
        temperature: T > 0.
    """
    student_NV, teacher_NV = _raised(student_logits_NV) / temperature, _raised(teacher_logits_NV) / temperature
    strength_N1 = strength_N.to(student_NV.dtype)[:, None]
    target_NV = (1.0 - strength_N1) * student_NV + strength_N1 * teacher_NV
    log_target_NV = F.log_softmax(target_NV, dim=-1).detach()
    return temperature**2 * _divergence(log_target_NV, F.log_softmax(student_NV, dim=-1))


def _log_probability(logits_NV: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(_raised(logits_NV) / temperature, dim=-1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.sum(torch.exp(log_p) * (log_p - log_q), dim=-1)


# Events of a chunk


def event_log_mass(logit_CE: Tensor, log_z_C: Tensor, valid_CE: Tensor, temperature: float) -> Tensor:
    """Log masses of a chunk's events at temperature T, *other* appended (DESIGN §5).

    The mass of a filling is exp(L/T − log Z_T); *other* is what the fillings leave, at least 1e-6.

    Args:
        logit_CE: per filling L, the sum over its tokens of logits (or of log-likelihoods with theirs).
        log_z_C: log Z_T: the sum over the chunk's own tokens, n_S of them for the student, of logsumexp(logits / T).
        valid_CE: bool; entries that are no event (padding, a candidate that does not count) are False and may hold
            anything finite. The gold, first, is always valid.
        temperature: T > 0.

    Returns:
        [C, E + 1]; −inf where not valid.
    """
    logit_CE, log_z_C = _raised(logit_CE), _raised(log_z_C)
    # Filling with a finite value first keeps NaN out of the gradient of what is masked away.
    filled_CE = torch.where(valid_CE, logit_CE / temperature - log_z_C[:, None], -torch.ones_like(logit_CE))
    mass_C = torch.where(valid_CE, torch.exp(filled_CE), torch.zeros_like(filled_CE)).sum(dim=1)
    other_C = torch.log(torch.clamp(1.0 - mass_C, min=OTHER_FLOOR))
    log_mass_CE = torch.where(valid_CE, filled_CE, torch.full_like(filled_CE, -torch.inf))
    return torch.cat([log_mass_CE, other_C[:, None]], dim=1)


def event_kl_loss(student_CE: Tensor, teacher_CE: Tensor, temperature: float) -> Tensor:
    """T²·KL(p‖s) per chunk over its events (DESIGN §5, §6).

    Args:
        student_CE: log masses by `event_log_mass`, *other* last.
        teacher_CE: the teacher's, on the same events; no gradient flows into it.
        temperature: the T both were made at.

    Within one tokenizer, for single-token chunks, 0 ≤ KL − KL_events = P_tail·KL(p_tail‖s_tail), up to the floor.
    """
    return temperature**2 * _event_divergence(_raised(teacher_CE).detach(), _raised(student_CE))


def reverse_event_kl_loss(student_CE: Tensor, teacher_CE: Tensor, temperature: float) -> Tensor:
    """T²·KL(s‖p) per chunk over its events. Arguments as `event_kl_loss`."""
    return temperature**2 * _event_divergence(_raised(student_CE), _raised(teacher_CE).detach())


def tidal_event_kl_loss(student_CE: Tensor, teacher_CE: Tensor, strength_C: Tensor, temperature: float) -> Tensor:
    """T²·KL(target‖s), the target's log masses (1 − λ)·student + λ·teacher, renormalised and detached (DESIGN §6).

    Args:
        student_CE: as in `event_kl_loss`.
        teacher_CE: as in `event_kl_loss`.
        strength_C: λ of each chunk's sample.
        temperature: the T both were made at.
    """
    student_CE, teacher_CE = _raised(student_CE), _raised(teacher_CE)
    strength_C1 = strength_C.to(student_CE.dtype)[:, None]
    valid_CE = torch.isfinite(teacher_CE)
    mixed_CE = (1.0 - strength_C1) * student_CE + strength_C1 * teacher_CE
    target_CE = F.log_softmax(torch.where(valid_CE, mixed_CE, torch.full_like(mixed_CE, -torch.inf)), dim=1)
    return temperature**2 * _event_divergence(target_CE.detach(), student_CE)


def tail_kl_loss(
    student_CE: Tensor,
    teacher_CE: Tensor,
    student_tail_CW: Tensor,
    teacher_tail_CW: Tensor,
    log_share_CW: Tensor,
    strength_C: Tensor,
    temperature: float,
) -> Tensor:
    """T²·KL(target‖s) with *other* told apart by samples of the teacher's tail.

    The events' loss takes the teacher's tail to have the student's shape, which at T = 2, where the tail holds most of
    the mass, can turn the gradient round (bench/kl_tail.py). M samples say what shape it has. The target of a chunk:

    - fillings that are events: s^(1 − λ)·p^λ, as in `tidal_event_kl_loss`;
    - the tail: p_other·Σ_i share_i·(s_i/p_i)^(1 − λ), the samples' estimate of Σ_tail s^(1 − λ)·p^λ, but at most
      s_other^(1 − λ)·p_other^λ, which that sum cannot exceed (Hölder);
    - of which a share λ lies on the samples, in proportion to share_i, and 1 − λ on the tail in the student's shape,
      which stands for the geometric mixture within the tail: a linear one, whose noise vanishes with λ.

    Then renormalised and detached. At λ = 1 it is unbiased for the dense forward KL within one tokenizer.

    Args:
        student_CE: log masses by `event_log_mass`, *other* last.
        teacher_CE: the teacher's, on the same events.
        student_tail_CW: log s_T of the samples; −inf where a chunk has fewer.
        teacher_tail_CW: log p_T of the samples.
        log_share_CW: log of each sample's share of the teacher's tail at T, summing to 1 over a chunk's samples.
        strength_C: λ of each chunk's sample; 1 for the plain forward KL.
        temperature: the T all were made at.

    Returns:
        Loss per chunk; at λ = 1 an unbiased estimate of the dense one. Chunks without samples keep their whole *other*.
    """
    student_CE, teacher_CE = _raised(student_CE), _raised(teacher_CE)
    student_tail_CW, teacher_tail_CW = _raised(student_tail_CW), _raised(teacher_tail_CW)
    strength_C1 = strength_C.to(student_CE.dtype)[:, None]
    sampled_CW = torch.isfinite(log_share_CW)
    zero_CW, none_CW = torch.zeros_like(student_tail_CW), torch.full_like(student_tail_CW, -torch.inf)
    student_tail_CW = torch.where(sampled_CW, student_tail_CW, zero_CW)
    with torch.no_grad():
        valid_CE = torch.isfinite(teacher_CE)
        mixed_CE = torch.where(valid_CE, (1.0 - strength_C1) * student_CE + strength_C1 * teacher_CE, -torch.inf)
        ratio_CW = (1.0 - strength_C1) * (student_tail_CW - torch.where(sampled_CW, teacher_tail_CW, zero_CW))
        estimate_C = teacher_CE[:, -1] + torch.logsumexp(torch.where(sampled_CW, log_share_CW + ratio_CW, none_CW), 1)
        has_samples_C = sampled_CW.any(dim=1)
        other_C = torch.where(has_samples_C, torch.minimum(estimate_C, mixed_CE[:, -1]), mixed_CE[:, -1])
        target_CE = torch.softmax(torch.cat([mixed_CE[:, :-1], other_C[:, None]], dim=1), dim=1)
        on_samples_C = torch.where(has_samples_C, strength_C.to(student_CE.dtype), 0.0)
        share_CW = torch.where(sampled_CW, log_share_CW.to(student_CE.dtype).exp(), zero_CW)
    spread_C = (1.0 - on_samples_C) * student_CE[:, -1] + on_samples_C * (share_CW * student_tail_CW).sum(dim=1)
    known_CE = torch.where(valid_CE[:, :-1], student_CE[:, :-1], torch.zeros_like(student_CE[:, :-1]))
    cross_C = (target_CE[:, :-1] * known_CE).sum(dim=1) + target_CE[:, -1] * spread_C
    with torch.no_grad():  # the target's own entropy, which has no gradient, makes a divergence of it
        within_C = (share_CW * torch.where(sampled_CW, teacher_tail_CW, zero_CW)).sum(dim=1) - teacher_CE[:, -1]
        own_C = torch.special.xlogy(target_CE, target_CE).sum(dim=1) + target_CE[:, -1] * on_samples_C * within_C
    return temperature**2 * (own_C - cross_C)


def _event_divergence(log_p_CE: Tensor, log_q_CE: Tensor) -> Tensor:
    """KL over the events that exist on both sides; −inf marks the others, whose gradient must stay 0, not NaN."""
    valid_CE = torch.isfinite(log_p_CE) & torch.isfinite(log_q_CE)
    zero_CE = torch.zeros_like(log_p_CE)
    log_p_CE, log_q_CE = torch.where(valid_CE, log_p_CE, zero_CE), torch.where(valid_CE, log_q_CE, zero_CE)
    return torch.where(valid_CE, torch.exp(log_p_CE) * (log_p_CE - log_q_CE), zero_CE).sum(dim=1)


# From tokens to chunks


def sum_over(value_M: Tensor, index_M: Tensor, size: int) -> Tensor:
    """Sum values that share an index: tokens of a chunk, or of a filling. Indices without a value get 0."""
    value_M = _raised(value_M)
    return torch.zeros(size, dtype=value_M.dtype, device=value_M.device).index_add(0, index_M, value_M)


def chunk_logp(logit_M: Tensor, log_z_N: Tensor, row_M: Tensor, chunk_M: Tensor, chunks: int) -> Tensor:
    """Log-likelihood of each chunk's gold at temperature 1: Σ over its tokens of logit − logsumexp.

    Args:
        logit_M: the gold token's logit, one per token of a chunk.
        log_z_N: logsumexp at temperature 1 per scored position.
        row_M: which scored position each token is.
        chunk_M: which chunk each token belongs to.
        chunks: number of chunks C.
    """
    return sum_over(_raised(logit_M) - _raised(log_z_N)[row_M], chunk_M, chunks)


# Means


@dataclass(frozen=True)
class Mean:
    """Part of a mean: the weighted sum over these items, and how many they count as. Sums and counts simply add up."""

    total: Tensor
    count: Tensor

    def over(self, count: Tensor | float | None = None) -> Tensor:
        """Divide by `count` (None: this part's own); a count of 0 gives 0. The one place where a mean is made."""
        count = self.count if count is None else count
        return self.total / torch.clamp(torch.as_tensor(count, device=self.total.device), min=1).to(self.total.dtype)

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)


def weighted(loss_C: Tensor, weight_C: Tensor | None = None) -> Mean:
    """Mean of distillation losses: Σ weight·loss over the number of items (not over the sum of weights; DESIGN §6).

    Args:
        loss_C: loss of each active item: a masked chunk with a teacher's score, or a masked position.
        weight_C: its sample's timestep weight (`interpolate`) or sample weight (`weight`); None: 1.
    """
    loss_C = loss_C if weight_C is None else loss_C * weight_C.to(loss_C.dtype)
    return Mean(loss_C.sum(), torch.tensor(loss_C.numel(), device=loss_C.device))


def cross_entropy(
    nll_N: Tensor, sample_N: Tensor, timestep_B: Tensor, trainable_B: Tensor, normalisation: str = "token"
) -> Mean:
    """Cross-entropy of masked student tokens, each weighed 1 / (t + 1e-6), t in float32 (DESIGN §6).

    Args:
        nll_N: −log p of each masked token, nats.
        sample_N: its sample.
        timestep_B: timestep of each sample.
        trainable_B: number of trainable tokens of each sample, masked or not.
        normalisation: `token`: over all trainable tokens; `sequence`: the mean of each sample over its trainable
            tokens, then over samples; `batch`: the sum of each sample, then over samples.

    Raises:
        TidecacheError: an unknown normalisation.
    """
    nll_N = _raised(nll_N)
    weight_B = cross_entropy_weight(timestep_B).to(nll_N.dtype)
    if normalisation == "sequence":
        weight_B = weight_B / trainable_B.to(nll_N.dtype)  # a sample without any has no masked token either
    return Mean((nll_N * weight_B[sample_N]).sum(), cross_entropy_count(trainable_B, normalisation))


def cross_entropy_weight(timestep_B: Tensor) -> Tensor:
    """1 / (t + 1e-6) in float32, whatever the losses' dtype: t is stored and drawn in float32."""
    return 1.0 / (timestep_B.to(torch.float32) + TIMESTEP_OFFSET)


def cross_entropy_count(trainable_B: Tensor, normalisation: str) -> Tensor:
    """What a batch adds to the count of its cross-entropy mean; needs no forward pass.

    Raises:
        TidecacheError: an unknown normalisation.
    """
    if normalisation == "token":
        return trainable_B.sum()
    if normalisation in NORMALISATIONS:
        return torch.tensor(trainable_B.numel(), device=trainable_B.device)
    raise TidecacheError(
        f"cross-entropy normalisation: expected one of {', '.join(NORMALISATIONS)}, found {normalisation!r}"
    )


def _raised(value: Tensor) -> Tensor:
    """bfloat16 and float16 hold too few digits for differences of log-likelihoods."""
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
