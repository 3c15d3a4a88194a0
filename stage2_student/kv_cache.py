"""Keys and values of finished blocks, allocated once, and the attention that reads them where they lie (DESIGN §8).

While a block is denoised, each forward pass computes only that block's tokens and attends to everything before it. The
buffers hold one slot per column of the batch; a pass writes its keys and values into its own columns and attends to a
view of all columns up to there, so nothing is ever copied or grown. Grouped-query models share one key head among
several query heads; `grouped_attention` folds these heads into the query's length, since repeating the keys instead, as
`transformers` does under a mask, would copy the whole cache in every layer of every pass.

Shape suffixes: B rows, H query heads, G key heads, S tokens of this pass, T columns so far, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as dropped_out
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache

from shared.errors import TidecacheError

ATTENTION = "tidecache_grouped"


class BlockCache(Cache):
    """See the module. Set `start`, the first column of a pass, before it; later columns are not looked at."""

    def __init__(self, columns: int) -> None:
        super().__init__(layers=[])
        self.columns = columns
        self.start = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [B, G, S, D] of one layer and return views of all its columns up to there, [B, G, T, D]."""
        if layer_idx == len(self._keys):  # the first pass meets the layers in order
            for buffers, states in ((self._keys, key_states), (self._values, value_states)):
                buffers.append(states.new_zeros((*states.shape[:2], self.columns, states.shape[3])))
        rows, stop = key_states.shape[0], self.start + key_states.shape[2]
        found = []
        for buffer, states in ((self._keys[layer_idx], key_states), (self._values[layer_idx], value_states)):
            buffer[:rows, :, self.start : stop] = states
            found.append(buffer[:rows, :, :stop])
        return found[0], found[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before this pass."""
        return self.start

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows (ascending) only, moved to the front of the same buffers."""
        for buffer in (*self._keys, *self._values):
            for place, row in enumerate(rows):
                if place != row:
                    buffer[place, :, : self.start] = buffer[row, :, : self.start]


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of [B, H, S, D] to [B, G, T, D] under an additive [B, 1, S, T] mask, without repeating keys.

    `softcap`: scores become cap · tanh(score / cap) before the mask (Gemma 2).

    Returns [B, S, H, D], as `transformers` wants it.

    Raises:
        TidecacheError: the model asks for something besides plain attention.
    """
    extra = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if extra:
        raise TidecacheError(
            f"{type(module).__name__} wants {', '.join(extra)}, which block-diffusion attention does not do: "
            "take a student of another family"
        )
    rows, heads, length, size = query.shape
    groups = heads // key.shape[1]
    folded = query.reshape(rows, key.shape[1], groups * length, size)
    mask = attention_mask.repeat(1, 1, groups, 1) if groups > 1 else attention_mask
    if softcap is None:
        output = scaled_dot_product_attention(folded, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    else:
        score = folded @ key.transpose(2, 3) * (size**-0.5 if scaling is None else scaling)
        score = torch.tanh(score / softcap) * softcap + mask
        output = dropped_out(score.softmax(dim=-1, dtype=torch.float32).to(value.dtype), dropout) @ value
    return output.reshape(rows, heads, length, size).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, grouped_attention)


@contextmanager
def reading_in_place(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model's layers use `grouped_attention`; afterwards what they used before. No gradients."""
    before = model.config._attn_implementation
    model.config._attn_implementation = ATTENTION
    try:
        with torch.inference_mode():
            yield
    finally:
        model.config._attn_implementation = before
