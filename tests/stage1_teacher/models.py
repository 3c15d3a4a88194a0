"""Random tiny teachers for the tests of stage 1, and the plain dense computation that they are compared with."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stage1_teacher.backends import ScoreRequest
from tests.conftest import TINY_TEACHER

VOCABULARY = 300
MASK_ID = 1


def save_model(
    folder: Path,
    kind: str = "qwen3",
    vocabulary: int = VOCABULARY,
    tied: bool = True,
    seed: int = 0,
    tokenizer: bool = False,
    **config: Any,
) -> Path:
    """A random model of hidden size 64 in `folder`; weights are large enough for attention and logits to matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    shape = {
        "vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 512, "initializer_range": 0.15,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **(shape | {"tie_word_embeddings": tied} | config)), attn_implementation="eager"
    )
    model.save_pretrained(folder)
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(TINY_TEACHER / name, folder / name)
    return folder


def reference_logp(
    folder: Path,
    request: ScoreRequest,
    layout: str,
    block: int,
    shift: bool,
    vocabulary: int | None = None,
    mask_id: int = MASK_ID,
) -> torch.Tensor:
    """log-probabilities [positions, V] the slow way: one sequence, eager attention, a mask written out by loops, full logits."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    noisy = list(map(int, request.token_ids))
    length = len(noisy)
    tokens = [(i, False, t) for i, t in enumerate(noisy)]  # (position, clean, id)
    if layout in ("bd3lm", "reordered"):
        tokens += [(i, True, int(t)) for i, t in enumerate(request.clean_ids)]
    bias = torch.full((1, 1, len(tokens), len(tokens)), torch.finfo(torch.float32).min)
    for q, (qi, q_clean, _) in enumerate(tokens):
        for k, (ki, k_clean, _) in enumerate(tokens):
            if layout == "full":
                seen = True
            elif layout == "reordered" and q_clean and k_clean:
                seen = ki <= qi
            elif layout == "block-causal" or (q_clean and k_clean):
                seen = ki // block <= qi // block
            elif k_clean:
                seen = ki // block < qi // block
            elif layout == "reordered":  # observed tokens of a block first, then masked ones, each in their order
                order = [(noisy[i] == mask_id, i) for i in (ki, qi)]
                seen = not q_clean and ki // block == qi // block and order[0] <= order[1]
            else:
                seen = not q_clean and ki // block == qi // block
            if seen:
                bias[0, 0, q, k] = 0.0
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([[t for _, _, t in tokens]]),
            attention_mask=bias,
            position_ids=torch.tensor([[p for p, _, _ in tokens]]),
            use_cache=False,
        ).logits[0, :length, :vocabulary]
    rows = [int(p) - shift for p in request.positions]
    return torch.log_softmax(logits[rows].double(), -1)


def random_requests(
    rng: np.random.Generator,
    lengths: Sequence[int],
    vocabulary: int = VOCABULARY,
    mask_id: int = MASK_ID,
    first: int = 0,
) -> list[ScoreRequest]:
    """Sequences of these lengths with some positions masked and scored (never those before `first`)."""
    requests = []
    for length in lengths:
        clean = rng.integers(2, vocabulary, length)
        masked = np.flatnonzero(rng.random(length) < 0.5)
        masked = masked[masked >= first]
        noisy = clean.copy()
        noisy[masked] = mask_id
        requests.append(ScoreRequest(noisy.tolist(), masked.tolist(), clean[masked].tolist(), clean.tolist()))
    return requests
