"""Measure the embedded pair on the held-out modules and print the table of their model cards.

    python bench/tiny_card.py TEACHER STUDENT      # folders with the two final models

Bits per byte of masked tokens by timestep, for the teacher (bidirectional) and the student base (block diffusion),
each in its own tokens, beside the unigram and the bidirectional n-gram model over the same tokens and masks.
Tokens are masked independently with probability t; a model's bits are divided by the bytes of the masked tokens.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import torch
from ngram import BidirectionalNgram
from tiny import RECIPES, block_diffusion_bias, token_streams
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.noise import stream_key, uniforms
from shared.stdlib_corpus import documents

TIMESTEPS = (0.1, 0.3, 0.5, 0.7, 0.9)
DOCUMENTS = 300


def masked_documents(tokenizer, limit: int, first: int, timestep: float):
    """(ids, masked) of every third-or-so held-out document, from `first` on; fit and score use disjoint ones."""
    for number, (name, text) in enumerate(documents(held_out=True)):
        if number % 3 != first or number // 3 >= DOCUMENTS:
            continue
        ids = np.array(tokenizer(text).input_ids[:limit], np.int64)
        masked = uniforms(stream_key(0, name, "card", int(timestep * 10)), len(ids)) < timestep
        if masked.any():
            yield ids, masked


@torch.no_grad()
def model_logp(model, ids, masked, mask_id: int, block_size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(gold log p, whether the gold is the most likely token) at the masked positions."""
    ids_1L = torch.from_numpy(ids)[None]
    masked_1L = torch.from_numpy(masked)[None]
    noisy_1L = ids_1L.masked_fill(masked_1L, mask_id)
    length = ids_1L.shape[1]
    if block_size is None:
        hidden = model.model(noisy_1L, attention_mask=torch.zeros(1, 1, length, length)).last_hidden_state
    else:
        hidden = model.model(
            torch.cat([noisy_1L, ids_1L], 1),
            attention_mask=block_diffusion_bias(length, block_size),
            position_ids=torch.arange(length).repeat(2)[None],
        ).last_hidden_state[:, :length]
    logits_NV = model.lm_head(hidden[masked_1L])
    gold_N = ids_1L[masked_1L]
    logp_N = logits_NV.log_softmax(-1).gather(1, gold_N[:, None])[:, 0]
    return logp_N.numpy(), (logits_NV.argmax(-1) == gold_N).numpy()


def main(teacher: Path, student: Path) -> None:
    for name, folder in (("teacher", teacher), ("student", student)):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
        recipe = RECIPES[name]
        lengths = np.array([len(tokenizer.convert_ids_to_tokens(i)) for i in range(len(tokenizer))])
        ngram = BidirectionalNgram([s.astype(np.int64) for s in token_streams(tokenizer).values()], len(tokenizer))
        ngram.fit([x for t in (0.1, 0.5, 0.9) for x in list(masked_documents(tokenizer, recipe.length, 1, t))[:60]])
        print(f"\n{name}: κ {ngram.strengths}\n\n| t | unigram | n-gram | {name} | top-1 |\n|---|---|---|---|---|")
        for timestep in TIMESTEPS:
            nats = {"unigram": 0.0, "ngram": 0.0, "model": 0.0}
            total_bytes, right, count = 0, 0, 0
            for ids, masked in masked_documents(tokenizer, recipe.length, 0, timestep):
                logp, top1 = model_logp(model, ids, masked, tokenizer.mask_token_id, recipe.block_size)
                nats["model"] -= float(logp.sum())
                nats["unigram"] -= float(ngram.gold_logp(ids, masked, 1).sum())
                nats["ngram"] -= float(ngram.gold_logp(ids, masked).sum())
                total_bytes += int(lengths[ids[masked]].sum())
                right += int(top1.sum())
                count += len(top1)
            bits = {k: v / math.log(2) / total_bytes for k, v in nats.items()}
            print(
                f"| {timestep} | {bits['unigram']:.3f} | {bits['ngram']:.3f} | {bits['model']:.3f} | {right / count:.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
