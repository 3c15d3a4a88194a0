"""Block-diffusion attention for any Hugging Face causal LM (DESIGN §8).

A student is trained on [x_t, x_0]: the noisy sequence, then the clean one, both with positions 0 … L − 1. Within one
block the noisy tokens see each other; a noisy block also sees the clean blocks before it; clean tokens see clean tokens
of their own and earlier blocks. Several draws of one document share one clean half. Plain `transformers` models compute
it on a pack (`packing`): `adopt` gives their layers an attention function that reads the pack's layout (`kernels`), so
that no modelling code is forked and checkpoints stay plain. Given no layout, it is the model's usual attention.

The head asks for masked tokens alone, so the last layer gives no others: of the rest it needs keys and values. In the
families whose layers are known to have that form, `_LastLayer` cuts its residual stream down to the masked tokens.

Shape suffixes: S = (draws + 1) · L, T tokens of the pack, N masked tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from shared.errors import TidecacheError
from stage2_student import families, kernels
from stage2_student.kv_cache import grouped_attention
from stage2_student.packing import CLEAN, Group, Layout, sees

ATTENTION = "tidecache_blocks"


def block_diffusion_mask(length: int, block_size: int, draws: int = 1) -> Tensor:
    """Return which keys (columns) a query (row) may see (DESIGN §8, §11): the dense reference of all kernels.

    Args:
        length: L, tokens of one half.
        block_size: tokens per block; the last block may be shorter.
        draws: noisy draws over one clean half.

    Returns:
        bool [(draws + 1)·L, (draws + 1)·L], True where seen; the noisy draws first, x_0 last.
    """
    draw_S = torch.tensor([*range(draws), CLEAN]).repeat_interleave(length)
    block_S = (torch.arange(length) // block_size).repeat(draws + 1)
    every_S = torch.arange(len(draw_S))
    return sees(torch.zeros_like(draw_S), draw_S, block_S, every_S[:, None], every_S[None, :])


@dataclass(frozen=True)
class _Pass:
    """What the layers of one forward pass are told."""

    layout: Layout
    place_N: Tensor
    last: int | None  # the layer that gives masked tokens alone


def masked_hidden(
    model: PreTrainedModel, noisy_BL: Tensor, clean_BL: Tensor, groups: Sequence[Group], block_size: int
) -> Tensor:
    """Run a causal LM, without its head, on a batch and return the hidden states of its masked tokens.

    Args:
        model: a Hugging Face causal LM (its base model is run).
        noisy_BL: x_t of each row; padding is not looked at.
        clean_BL: x_0; of a group only the first row's is looked at.
        groups: the rows, in order.
        block_size: tokens per block.

    Returns:
        hidden_ND at the masked tokens, row by row, normalised and ready for the head.

    Raises:
        TidecacheError: a row is longer than a sliding window of the model's.
    """
    families.check_length(model.config, max(group.masked_ML.shape[1] for group in groups))
    last = adopt(model)
    layout = Layout.of(groups, block_size, clean_BL.device)
    place_N = layout.places(groups, block_size)
    row_T, column_T, noisy = layout.row_T, layout.column_T, layout.noisy
    input_T = torch.cat([noisy_BL[row_T[:noisy], column_T[:noisy]], clean_BL[row_T[noisy:], column_T[noisy:]]])
    output = model.base_model(
        input_ids=input_T[None],
        position_ids=column_T[None],
        attention_mask=torch.zeros(1, 1, 1, 1, device=input_T.device),  # four dimensions: transformers makes no mask
        use_cache=False,
        blocks=_Pass(layout, place_N, last),
    )
    hidden_1TD: Tensor = output.last_hidden_state
    return hidden_1TD[0] if last is not None else hidden_1TD[0].index_select(0, place_N)


def block_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    blocks: _Pass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of an adopted model: of a pack [1, H, T, D], or without `blocks` under the mask.

    Raises:
        TidecacheError: the model asks for something besides plain attention.
    """
    if blocks is None:
        return grouped_attention(module, query, key, value, attention_mask, scaling, dropout, softcap, **kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layout = blocks.layout
    if blocks.last is None or getattr(module, "layer_idx", None) != blocks.last:
        return kernels.attend(module, query, key, value, layout, scaling, softcap, dropout), None
    noisy = query[:, :, : layout.noisy]
    output = kernels.attend(module, noisy, key, value, layout, scaling, softcap, dropout)
    # The layer's own reshape wants a row per token; those of clean tokens are not looked at again.
    return nn.functional.pad(output, (0, 0, 0, 0, 0, layout.tokens - layout.noisy)), None


AttentionInterface.register(ATTENTION, block_attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)  # for passes without a pack


def adopt(model: PreTrainedModel) -> int | None:
    """Give a model's layers `block_attention`, once; return the number of the layer that can be cut, if it can.

    Raises:
        TidecacheError: as `check_attention`.
    """
    if model.config._attn_implementation != ATTENTION:
        check_attention(model)
        model.config._attn_implementation = ATTENTION
    layers = getattr(model.base_model, "layers", None)
    if layers is None or model.config.model_type not in families.CUTTABLE:
        return None
    last = layers[-1]
    if not hasattr(last, "tidecache_cut"):
        last.tidecache_cut = _LastLayer(last)
    return len(layers) - 1


class _LastLayer:
    """Cuts a decoder layer's residual stream down to the masked tokens, by hooks; they do nothing without a pack.

    The layer is entered with the masked tokens; its first norm, and so queries, keys and values, gets all tokens; what
    attention gives is cut before the output projection. All of it happens within the layer's own call, so checkpointing
    may repeat it and wrappers may gather its parameters.
    """

    def __init__(self, layer: Any) -> None:
        self.blocks: _Pass | None = None
        self.whole_1TD: Tensor | None = None
        layer.register_forward_pre_hook(self.enter, with_kwargs=True)
        layer.input_layernorm.register_forward_pre_hook(self.widen)
        layer.self_attn.o_proj.register_forward_pre_hook(self.narrow)

    def enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.blocks = kwargs.get("blocks")
        if self.blocks is None:
            return None
        self.whole_1TD = args[0]
        return (self._masked(args[0]), *args[1:]), kwargs

    def widen(self, _: nn.Module, args: tuple[Tensor]) -> Any:
        whole, self.whole_1TD = self.whole_1TD, None
        return None if whole is None else (whole,)

    def narrow(self, _: nn.Module, args: tuple[Tensor]) -> Any:
        found = None if self.blocks is None else (self._masked(args[0]),)
        self.blocks = None
        return found

    def _masked(self, x_1TD: Tensor) -> Tensor:
        assert self.blocks is not None
        return x_1TD[0].index_select(0, self.blocks.place_N)[None]


def check_attention(model: PreTrainedModel) -> None:
    """Refuse a model whose attention would not be what block diffusion says.

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
