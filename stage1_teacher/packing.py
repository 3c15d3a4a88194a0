"""Multi-draw packing: every pass over a document shares one x_0 (DESIGN §7, §8 "Clean half").

In the layouts that read x_0, a draw's own tokens see x_0 and their own block, and x_0 sees only itself. So x_0 goes
through the decoder once per document and batch, its keys and values are kept, and all draws and passes of the document
attend to them: N passes cost about (N + 1)·L tokens instead of 2·N·L, and no mask is larger than one pass against x_0
and itself. Only tokens that a prediction depends on are run (`Layout.needed`): a long prompt costs its part of x_0,
once.

Batches: a pure function of the requests' lengths, of what they read, and of which share their x_0, so that a shard's
batches are the same on every machine (DESIGN §7, "Determinism").

Shapes: R rows (passes) of a batch, D documents of a batch, S padded tokens of a row, W padded tokens of x_0, N scored
positions, H key/value heads, C size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicCache

from stage1_teacher.layouts import BoolArray, IntArray, Layout, Places, token_ranks


@dataclass(frozen=True)
class Row:
    """One pass, reduced to what its predictions depend on."""

    token_S: IntArray
    position_S: IntArray
    rank_S: IntArray
    read_N: IntArray  # rows of the reduced sequence at which predictions are read, in the request's order
    clean_L: IntArray  # the document's whole x_0; empty where the layout reads none
    clean_width: int  # how many of its tokens this row depends on


def reduce_row(
    layout: Layout, block_size: int, mask_id: int | None, token_L: IntArray, clean_L: IntArray, read_N: IntArray
) -> Row:
    """Keep the tokens that decide what is read at the rows `read_N` of x_t."""
    needed_L, clean_width = layout.needed(len(token_L), block_size, read_N)
    position_S = np.flatnonzero(needed_L)
    masked_S: BoolArray = token_L[position_S] == (-1 if mask_id is None else mask_id)
    return Row(
        token_S=token_L[position_S],
        position_S=position_S,
        rank_S=token_ranks(position_S, masked_S, block_size),
        read_N=np.searchsorted(position_S, read_N),
        clean_L=clean_L if layout.reads_clean else clean_L[:0],
        clean_width=clean_width,
    )


def plan_batches(rows: Sequence[Row], batch_tokens: int) -> list[IntArray]:
    """Numbers of the rows of each batch: filled up to `batch_tokens` padded tokens, x_0 counted once per document.

    Rows that share x_0 stay together; groups and rows are in the order of their lengths, then of their numbers. A row
    that is larger than the budget is a batch of its own.
    """
    groups: dict[bytes | int, list[int]] = {}
    for number, row in enumerate(rows):
        # Rows without x_0 share nothing: each is a group.
        groups.setdefault(row.clean_L.tobytes() if len(row.clean_L) else number, []).append(number)

    def size(number: int) -> tuple[int, int]:
        return len(rows[number].token_S), number

    ordered = [sorted(members, key=size) for members in groups.values()]
    ordered.sort(key=lambda members: (len(rows[members[-1]].token_S), len(rows[members[0]].clean_L), members[0]))
    result: list[IntArray] = []
    batch: list[int] = []
    documents, noisy, clean = 0, 0, 0
    for members in ordered:
        joined = False
        for number in members:
            row = rows[number]
            # What the batch would be padded to with this row in it.
            wider, deeper = max(noisy, len(row.token_S)), max(clean, row.clean_width)
            if batch and (len(batch) + 1) * wider + (documents + (not joined)) * deeper > batch_tokens:
                result.append(np.array(batch))
                batch, documents, joined = [], 0, False
                wider, deeper = len(row.token_S), row.clean_width
            documents += not joined
            joined, noisy, clean = True, wider, deeper
            batch.append(number)
    if batch:
        result.append(np.array(batch))
    return result


class SharedPrefix(Cache):
    """The keys and values of x_0, given to every row of its document; nothing is added to them."""

    def __init__(self, prefix: DynamicCache, document_R: torch.Tensor) -> None:
        super().__init__(layers=list(prefix.layers))
        self._document_R = document_R

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys, values) [R, H, W + S, C]: x_0's, then the row's own."""
        layer: Any = self.layers[layer_idx]
        keys = torch.cat([layer.keys.index_select(0, self._document_R), key_states], dim=2)
        values = torch.cat([layer.values.index_select(0, self._document_R), value_states], dim=2)
        return keys, values


def run_rows(decoder: Any, layout: Layout, block_size: int, rows: Sequence[Row], device: torch.device) -> torch.Tensor:
    """hidden_ND after the decoder's last norm at all rows' `read_N`, in order."""
    number_D: dict[bytes, int] = {}
    document_R = [number_D.setdefault(row.clean_L.tobytes(), len(number_D)) for row in rows]
    width = max(row.clean_width for row in rows)
    prefix = None
    clean = None
    if width:
        first_D = [document_R.index(number) for number in range(len(number_D))]
        used_D = [
            max(row.clean_width for row, d in zip(rows, document_R, strict=True) if d == n)
            for n in range(len(number_D))
        ]
        clean_DL = [rows[first].clean_L[:used] for first, used in zip(first_D, used_D, strict=True)]
        position_DL = [np.arange(len(ids)) for ids in clean_DL]
        input_DW, position_DW, places = _padded(clean_DL, position_DL, position_DL, block_size, device)
        cache = DynamicCache()
        attend(decoder, input_DW, position_DW, layout.clean_mask(places), cache)
        index_R = torch.tensor(document_R, device=device)
        prefix = SharedPrefix(cache, index_R)
        clean = Places(
            *(tensor.index_select(0, index_R) for tensor in (places.block_BS, places.rank_BS, places.valid_BS))
        )
    input_RS, position_RS, places = _padded(
        [row.token_S for row in rows],
        [row.position_S for row in rows],
        [row.rank_S for row in rows],
        block_size,
        device,
    )
    hidden_RSD = attend(decoder, input_RS, position_RS, layout.noisy_mask(places, clean), prefix)
    flat_N = np.concatenate([number * input_RS.shape[1] + row.read_N for number, row in enumerate(rows)])
    return hidden_RSD.flatten(0, 1)[torch.from_numpy(flat_N).to(device)]


def _padded(
    ids: Sequence[IntArray],
    positions: Sequence[IntArray],
    ranks: Sequence[IntArray],
    block_size: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, Places]:
    """(input ids, positions, places) of sequences padded at their ends to the longest."""
    shape = (len(ids), max(len(row) for row in ids))
    id_BS, position_BS, rank_BS = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    valid_BS = np.zeros(shape, dtype=np.bool_)
    for b, (row_ids, row_positions, row_ranks) in enumerate(zip(ids, positions, ranks, strict=True)):
        kept = slice(0, len(row_ids))
        id_BS[b, kept], position_BS[b, kept], rank_BS[b, kept] = row_ids, row_positions, row_ranks
        valid_BS[b, kept] = True
    block_BS = position_BS // block_size
    tensors = [torch.from_numpy(array).to(device) for array in (id_BS, position_BS, block_BS, rank_BS, valid_BS)]
    return tensors[0], tensors[1], Places(*tensors[2:])


def attend(
    decoder: Any, input_BS: torch.Tensor, position_BS: torch.Tensor, mask_BSK: torch.Tensor, cache: Cache | None = None
) -> torch.Tensor:
    """hidden_BSD of one run of the decoder under an explicit mask; `cache` collects, or gives, keys and values."""
    # Additive, in the decoder's own type: every attention implementation takes it, and none has to convert it per
    # layer.
    bias_BSK = torch.zeros(mask_BSK.shape, dtype=decoder.dtype, device=input_BS.device).masked_fill_(
        ~mask_BSK, float("-inf")
    )
    output = decoder(
        input_ids=input_BS,
        attention_mask=bias_BSK[:, None],
        position_ids=position_BS,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    hidden_BSD: torch.Tensor = output.last_hidden_state
    return hidden_BSD


def prefix_agrees(decoder: Any, id_S: torch.Tensor) -> bool:
    """Whether a decoder gives the same for a sequence at once and in two steps, the second on kept keys and values.

    The second half is one block that sees the first: what `run_rows` rests on, measured on the architecture at hand.
    """
    half, length = len(id_S) // 2, len(id_S)
    position_1S = torch.arange(length, device=id_S.device)[None]
    late_S = position_1S[0] >= half
    sees_1SS = (late_S[:, None] >= late_S)[None]
    whole_1SD = attend(decoder, id_S[None], position_1S, sees_1SS)
    cache = DynamicCache()
    attend(decoder, id_S[None, :half], position_1S[:, :half], sees_1SS[:, :half, :half], cache)
    prefix = SharedPrefix(cache, torch.zeros(1, dtype=torch.int64, device=id_S.device))
    second_1SD = attend(decoder, id_S[None, half:], position_1S[:, half:], sees_1SS[:, half:], prefix)
    expected_1SD = whole_1SD[:, half:]
    tolerance = 1e-4 if decoder.dtype == torch.float32 else 5e-2
    return bool((second_1SD - expected_1SD).abs().max() <= tolerance * expected_1SD.abs().max().clamp(min=1e-6))
