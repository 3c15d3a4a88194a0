"""Block-diffusion attention for any Hugging Face causal LM (DESIGN §8).

A student is trained on [x_t, x_0]: the noisy sequence, then the clean one, both with positions 0 … L − 1. Within one
block the noisy tokens see each other; a noisy block also sees the clean blocks before it; clean tokens see clean tokens
of their own and earlier blocks. The whole of it is an attention mask that plain `transformers` models take as it is,
so that checkpoints stay plain and no modelling code is forked. Several draws of one document may share one clean half
(*packed draws*): [x_t of draw 1, …, x_t of draw K, x_0].

Padding never reaches attention: no query sees a key at or beyond its row's length. Queries there see only themselves,
so that no softmax runs over nothing; what they give is never used.

Shape suffixes: B rows, K packed draws, L positions, S = (K + 1)·L sequence, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shared.errors import TidecacheError
from stage2_student import families


def block_diffusion_mask(length: int, block_size: int, draws: int = 1) -> Tensor:
    """Return which keys (columns) a query (row) may see (DESIGN §8, §11).

    Args:
        length: L, tokens of one half.
        block_size: tokens per block; the last block may be shorter.
        draws: K noisy draws over one clean half.

    Returns:
        bool [(K + 1)·L, (K + 1)·L], True where seen; the noisy draws first, x_0 last.
    """
    return _mask_for(torch.arange(length) // block_size, draws)


def _mask_for(block_L: Tensor, draws: int) -> Tensor:
    """The mask of tokens with these blocks; several rows ([B, L]) give several masks."""
    part_S = torch.arange(draws + 1, device=block_L.device).repeat_interleave(block_L.shape[-1])
    block_S = block_L.repeat(*[1] * (block_L.ndim - 1), draws + 1)
    query_part, key_part = part_S[:, None], part_S[None, :]
    query_block, key_block = block_S[..., :, None], block_S[..., None, :]
    same_part = query_part == key_part
    query_clean, key_clean = query_part == draws, key_part == draws
    noisy_to_itself = same_part & ~query_clean & (query_block == key_block)
    noisy_to_clean = ~query_clean & key_clean & (key_block < query_block)
    clean_to_clean = same_part & query_clean & (key_block <= query_block)
    return noisy_to_itself | noisy_to_clean | clean_to_clean


def attention_mask(
    length_B: Tensor,
    length: int,
    block_size: int,
    draws: int = 1,
    dtype: torch.dtype = torch.float32,
    offset_B: Tensor | None = None,
) -> Tensor:
    """Return the additive mask of a padded batch for `sdpa` and `eager` attention.

    Args:
        length_B: tokens of each row (of one half), at most `length`; on the device where the mask is wanted.
        length: L, to which the rows are padded.
        block_size: tokens per block.
        draws: K packed draws; all of a row have its length.
        dtype: the model's.
        offset_B: places of each row's first block that lie before the row: token i is in block (i + offset) //
            block_size. None: all 0, blocks count from the sequence's start.

    Returns:
        [B, 1, S, S], or [1, 1, S, S] when no row is padded or offset: 0 where seen, the dtype's least number where not.
    """
    device = length_B.device
    place_BL = torch.arange(length, device=device)[None]
    if offset_B is not None and bool((offset_B > 0).any()):
        place_BL = place_BL + offset_B[:, None]
    seen_BSS = _mask_for(place_BL // block_size, draws)
    if bool((length_B < length).any()):
        real_BS = (torch.arange(length, device=device)[None, :] < length_B[:, None]).repeat(1, draws + 1)
        itself_SS = torch.eye(seen_BSS.shape[1], dtype=torch.bool, device=device)
        seen_BSS = torch.where(real_BS[:, :, None], seen_BSS & real_BS[:, None, :], itself_SS)
    additive_BSS = torch.zeros(seen_BSS.shape, dtype=dtype, device=device)
    return additive_BSS.masked_fill_(~seen_BSS, torch.finfo(dtype).min)[:, None]


def noisy_hidden(
    model: PreTrainedModel,
    noisy_BKL: Tensor,
    clean_BL: Tensor,
    length_B: Tensor,
    block_size: int,
    offset_B: Tensor | None = None,
) -> Tensor:
    """Run a causal LM, without its head, on [x_t …, x_0] and return the hidden states of the noisy draws.

    Args:
        model: a Hugging Face causal LM (its base model is run) with `sdpa` or `eager` attention.
        noisy_BKL: x_t of K draws of each row's document, padded with any valid id.
        clean_BL: x_0, padded alike.
        length_B: tokens of each row.
        block_size: tokens per block.
        offset_B: see `attention_mask`.

    Returns:
        hidden_BKLD, normalised and ready for the head; undefined (but finite) at padding.

    Raises:
        TidecacheError: the rows are longer than a sliding window of the model's.
    """
    rows, draws, length = noisy_BKL.shape
    families.check_length(model.config, length)
    input_BS = torch.cat([noisy_BKL.reshape(rows, draws * length), clean_BL], dim=1)
    position_BS = torch.arange(length, device=clean_BL.device).repeat(draws + 1)[None].expand(rows, -1)
    base = model.base_model
    mask = attention_mask(length_B, length, block_size, draws, dtype=next(base.parameters()).dtype, offset_B=offset_B)
    output = base(input_ids=input_BS, position_ids=position_BS, attention_mask=mask, use_cache=False)
    hidden_BSD: Tensor = output.last_hidden_state
    return hidden_BSD[:, : draws * length].reshape(rows, draws, length, -1)


def check_attention(model: PreTrainedModel) -> None:
    """Refuse a model whose attention would not be what the mask says.

    Raises:
        TidecacheError: an attention implementation that takes no dense mask or would leave out a soft-cap, or layers
            with chunks or no softmax at all.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise TidecacheError(
            f"block-diffusion attention needs attn_implementation sdpa or eager, found {implementation!r}: "
            "load the student with one of these"
        )
    if implementation == "sdpa" and getattr(config, "attn_logit_softcapping", None) is not None:
        raise TidecacheError(f"{name} caps its attention logits, which sdpa leaves out: load it with eager attention")
    families.check_layers(model.config, name)
