"""Block diffusion written out: the mask from its definition, entry by entry, and a dense pass over [x_t …, x_0].

Independent of the project's packing and kernels, and slow: for small sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def sees(query: int, key: int, length: int, block_size: int, draws: int, offset: int = 0) -> bool:
    """DESIGN §8, word for word: same block and same half; x_t → x_0 of earlier blocks; x_0 → x_0 block-causal."""
    query_half, key_half = query // length, key // length
    query_block, key_block = (query % length + offset) // block_size, (key % length + offset) // block_size
    if query_half < draws:
        if key_half == query_half:
            return key_block == query_block
        return key_half == draws and key_block < query_block
    return key_half == draws and key_block <= query_block


def mask_of(length: int, block_size: int, draws: int, offset: int = 0) -> Tensor:
    size = (draws + 1) * length
    return torch.tensor([[sees(q, k, length, block_size, draws, offset) for k in range(size)] for q in range(size)])


def noisy_outputs(
    model: PreTrainedModel,
    noisy: Sequence[Tensor],
    clean_L: Tensor,
    block_size: int,
    offset: int = 0,
    head: bool = False,
) -> Tensor:
    """Hidden states, or with `head` logits, [draws, L, …] of the draws of one document, without padding."""
    length, draws = len(clean_L), len(noisy)
    seen = mask_of(length, block_size, draws, offset)
    dtype = next(model.parameters()).dtype
    arguments: dict[str, Any] = {
        "input_ids": torch.cat([*noisy, clean_L])[None],
        "position_ids": torch.arange(length).repeat(draws + 1)[None],
        "attention_mask": torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None],
        "use_cache": False,
    }
    found = model(**arguments).logits if head else model.base_model(**arguments).last_hidden_state
    return found[0, : draws * length].unflatten(0, (draws, length))  # type: ignore[no-any-return]
