"""Steps of a student, ours and the plain online way, on the same rows: what `bench/student.py` times.

The plain step is written as the released code does it: [x_t, x_0] under a dense mask, logits at all 2·L positions,
cross-entropy and full log-softmax on the noisy half, and a teacher in the loop that computes logits at all of its
positions, too: for Reverse CALM one pass over x_t (`full`, as for LLaDA2), for TIDAL + CompDemo KL two passes over
[x_t, x_0] (`bd3lm`, as for WeDLM) and KL over the whole vocabulary. Ours is what the trainer runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from stage2_student import objectives, tidal
from stage2_student.attention import block_diffusion_mask
from stage2_student.batch import Batch, Collator
from stage2_student.config import TrainConfig, load_recipe
from stage2_student.data import Coverage, Row
from stage2_student.events import Events, TailSamples
from stage2_student.losses import Counts, total
from stage2_student.model import TrainableStudent

PROGRESS = 0.5
KL_CANDIDATES, KL_SAMPLES = 32, 32  # what docs/recipes.md advises for tide-shared


@dataclass(frozen=True)
class Shape:
    """A Qwen3 model with random weights; no step's cost depends on them."""

    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_size: int
    inner: int
    vocabulary: int = 49152
    tied: bool = True

    def model(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            head_dim=self.head_size,
            intermediate_size=self.inner,
            tie_word_embeddings=self.tied,
        )
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # so that a large teacher is never there in float32
        try:
            with torch.device(device):
                return Qwen3ForCausalLM(config)
        finally:
            torch.set_default_dtype(before)


@dataclass(frozen=True)
class Sizes:
    """Rows of one step: `draws` of each of `documents`, the first `prompt` of `length` tokens given."""

    documents: int
    draws: int
    length: int
    prompt: int
    block: int = 32
    chunk: int = 2


def recipe(objective: str) -> TrainConfig:
    """`calm`: Reverse CALM, plain; `kl`: TIDAL + CompDemo KL."""
    name, values = {"calm": ("tide-cross", {"temperature": 2.0}), "kl": ("tide-shared", {})}[objective]
    return load_recipe(name, values)


def batch_of(sizes: Sizes, vocabulary: int, step: int, objective: str) -> Batch:
    """Random tokens, masks and scores, as a cache gives them; timesteps cover (0, 1) evenly, whatever their offset."""
    rng = np.random.default_rng(step)
    count = sizes.documents * sizes.draws
    timesteps = (np.arange(count) / count + rng.random()) % 1.0 * 0.999 + 1e-3
    chunk = 1 if objective == "kl" else sizes.chunk
    rows = []
    for document in range(sizes.documents):
        ids_L = rng.integers(0, vocabulary - 1, sizes.length)
        for draw in range(sizes.draws):
            timestep = float(timesteps[draw * sizes.documents + document])
            chosen_C = rng.random((sizes.length - sizes.prompt) // chunk) < timestep
            masked_L = np.zeros(sizes.length, np.bool_)
            masked_L[sizes.prompt :] = chosen_C.repeat(chunk)
            first_Q = sizes.prompt + chunk * np.flatnonzero(chosen_C)
            rows.append(
                Row(
                    document=str(document), name=str(document), draw=draw, fresh=False, timestep=timestep, ids_L=ids_L,
                    masked_L=masked_L, trainable=sizes.length - sizes.prompt, token_first_Q=first_Q,
                    token_stop_Q=first_Q + chunk, bytes_Q=np.full(len(first_Q), 4 * chunk),
                    teacher_logp_Q=(-8.0 * rng.random(len(first_Q))).astype(np.float32),
                    events=_events(rng, ids_L[first_Q], vocabulary) if objective == "kl" else None,
                    coverage=Coverage(len(first_Q), len(first_Q)),
                )
            )  # fmt: skip
    return Collator(mask_id=vocabulary - 1, pad_id=0)(rows)


def _events(rng: np.random.Generator, gold_Q: Any, vocabulary: int) -> Events:
    """Gold and candidates, one token each, with masses that leave some for the tail, and samples of the tail."""
    chunks, events, samples = len(gold_Q), KL_CANDIDATES + 1, KL_SAMPLES
    ids_QE = rng.integers(0, vocabulary, (chunks, events))
    ids_QE[:, 0] = gold_Q
    mass_QE = rng.dirichlet(np.full(events + 1, 0.3), chunks)[:, :events] + 1e-9
    tail = TailSamples(
        chunk_S=np.repeat(np.arange(chunks), samples),
        id_S=rng.integers(0, vocabulary, chunks * samples),
        logp_S=rng.uniform(-12, -8, chunks * samples).astype(np.float32),
        log_share_S=np.full(chunks * samples, -np.log(samples), np.float32),
    )
    return Events(
        chunk_E=np.repeat(np.arange(chunks), events),
        start_E=np.arange(chunks * events),
        ids_P=ids_QE.ravel(),
        log_mass_E=np.log(mass_QE).ravel().astype(np.float32),
        tail=tail,
    )


def our_step(model: PreTrainedModel, objective: str, block: int, bf16: bool = False) -> Callable[[Batch], Tensor]:
    """Forward and backward of the trainer's step, with `bf16` under autocast; returns the loss."""
    config = recipe(objective)
    assert config.block_size == block
    trainable = TrainableStudent(model, config)

    def step(batch: Batch) -> Tensor:
        with torch.autocast(batch.noisy_BL.device.type, torch.bfloat16, enabled=bf16):
            loss = total(trainable(batch, PROGRESS), Counts.of([batch], config), config)
        loss.backward()
        return loss.detach()

    return step


def logits_of(model: PreTrainedModel, noisy_BL: Tensor, clean_BL: Tensor | None, block: int) -> Tensor:
    """Logits of x_t as the released code gets them: at all positions, of [x_t, x_0], or of x_t alone."""
    length = noisy_BL.shape[1]
    if clean_BL is None:
        mask = noisy_BL.new_zeros(1, 1, length, length, dtype=torch.float32)
        return model(input_ids=noisy_BL, attention_mask=mask.to(model.dtype), use_cache=False).logits  # type: ignore[no-any-return]
    seen_SS = block_diffusion_mask(length, block).to(noisy_BL.device)
    mask = torch.zeros(seen_SS.shape, dtype=model.dtype, device=noisy_BL.device)
    mask = mask.masked_fill(~seen_SS, torch.finfo(model.dtype).min)[None, None]
    position_BS = torch.arange(length, device=noisy_BL.device).repeat(2)[None].expand(len(noisy_BL), -1)
    ids_BS = torch.cat([noisy_BL, clean_BL], dim=1)
    logits = model(input_ids=ids_BS, position_ids=position_BS, attention_mask=mask, use_cache=False).logits
    return logits[:, :length]  # type: ignore[no-any-return]


@torch.no_grad()
def plain_teacher(teacher: PreTrainedModel, batch: Batch, objective: str, block: int) -> Tensor:
    """What the teacher in the loop adds to a step: chunk log-likelihoods [C], or logits at the masked tokens [N, V]."""
    at = batch.sample_N, batch.column_N
    if objective == "calm":
        logp_BLV = F.log_softmax(logits_of(teacher, batch.noisy_BL, None, block).float(), dim=-1)
        gold_N = logp_BLV[(*at, batch.target_N)]
        return objectives.sum_over(gold_N[batch.position_M], batch.chunk_M, len(batch.sample_C))
    in_first_N = torch.rand(len(at[0]), generator=torch.Generator().manual_seed(0)).to(at[0].device) < 0.5
    found = None
    for scored_N in (in_first_N, ~in_first_N):
        shown_BL = batch.noisy_BL.clone()
        shown_BL[at[0][~scored_N], at[1][~scored_N]] = batch.target_N[~scored_N]
        logits_NV = logits_of(teacher, shown_BL, batch.clean_BL, block)[at]
        found = logits_NV if found is None else torch.where(scored_N[:, None], found, logits_NV)
    assert found is not None
    return found


def plain_student(model: PreTrainedModel, batch: Batch, objective: str, block: int, teacher: Tensor) -> Tensor:
    """Forward and backward from logits at all positions; for `calm` with the batch's scores, as ours has them."""
    config = recipe(objective)
    logits_BLV = logits_of(model, batch.noisy_BL, batch.clean_BL, block)
    at = batch.sample_N, batch.column_N
    nll_BL = F.cross_entropy(logits_BLV.transpose(1, 2), batch.clean_BL, reduction="none")
    loss = (nll_BL[at] / (batch.timestep_B + 1e-6)[batch.sample_N]).sum() / batch.trainable_B.sum()
    if objective == "calm":
        logp_BL = F.log_softmax(logits_BLV, dim=-1).gather(2, batch.clean_BL[:, :, None])[:, :, 0]
        student_logp_C = objectives.sum_over(logp_BL[at][batch.position_M], batch.chunk_M, len(batch.sample_C))
        loss = loss + objectives.reverse_calm_loss(student_logp_C, batch.teacher_logp_C, config.temperature).mean()
    else:
        schedule = (config.lambda_init, config.lambda_max, config.tidal_decay)
        strength_B = tidal.strength(PROGRESS, batch.timestep_B, config.tidal_axis, *schedule)
        weight_B = tidal.timestep_weight(batch.timestep_B, config.timestep_weight)
        sample_N = batch.sample_N
        loss_N = objectives.tidal_kl_loss(logits_BLV[at], teacher, strength_B[sample_N], config.temperature)
        loss = loss + (loss_N * weight_B[sample_N]).mean()
    loss.backward()
    return loss.detach()
