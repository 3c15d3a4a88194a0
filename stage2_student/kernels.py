"""Attention of packed draws, three ways that compute the same: split (CPU), FlexAttention (GPU), dense (the rest).

`split` computes exactly the scores that block diffusion has, on a CPU, where FlexAttention has no backward: a noisy
block sees itself and x_0's blocks before it, two attentions without any mask, whose results are joined by their
log-normalisers. x_0's keys are read where they lie, by all draws; no mask, no copy of keys and no square of scores
exists. The backward pass of either part with the joint result and normaliser is that part's share of the gradient, as
in ring attention. Query heads that share a key head are folded into the query's length.

`flex` gives FlexAttention the layout's rule as a block mask, which is made once per layout. `dense` takes document by
document under a mask: for soft-caps on a CPU, attention dropout, and devices that have neither.

Shape suffixes: Q queries (all tokens of the pack, or the noisy ones), T tokens of the pack, H query heads, G key heads,
R = Q · H / G folded queries, D head size. A leading 1 is the batch of one pack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask

from stage2_student.kv_cache import grouped_attention
from stage2_student.packing import Layout, Run, sees

TILE = 128  # FlexAttention's
TILES_AT_ONCE = 8
# Private names of torch's CPU kernel: they alone give the normaliser, which joining needs.
_forward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(
    module: nn.Module,
    query_1HQD: Tensor,
    key_1GTD: Tensor,
    value_1GTD: Tensor,
    layout: Layout,
    scaling: float,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of a pack, or of its noisy tokens alone, by the kernel for the device; returns [1, Q, H, D].

    This is the one place that chooses.
    """
    device = query_1HQD.device.type
    if torch.is_autocast_enabled(device):  # as torch's own attention does
        dtype = torch.get_autocast_dtype(device)
        query_1HQD, key_1GTD, value_1GTD = query_1HQD.to(dtype), key_1GTD.to(dtype), value_1GTD.to(dtype)
    if device == "cuda" and not dropout:
        return flex(query_1HQD, key_1GTD, value_1GTD, layout, scaling, softcap)
    if device == "cpu" and softcap is None and not dropout:
        return split(query_1HQD, key_1GTD, value_1GTD, layout, scaling)
    return dense(module, query_1HQD, key_1GTD, value_1GTD, layout, scaling, softcap, dropout)


def split(query_1HQD: Tensor, key_1GTD: Tensor, value_1GTD: Tensor, layout: Layout, scaling: float) -> Tensor:
    """See the module."""
    function: Any = _Split
    output_QHD: Tensor = function.apply(query_1HQD[0], key_1GTD[0], value_1GTD[0], layout, scaling)
    return output_QHD[None]


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_HQD: Tensor, key_GTD: Tensor, value_GTD: Tensor, layout: Layout, scaling: float
    ) -> Tensor:
        shared = len(query_HQD) // len(key_GTD)
        query_GRD = _fold(query_HQD, len(key_GTD))
        output_QHD = query_HQD.new_empty(query_HQD.shape[1], *query_HQD.shape[::2])
        output_GRD = _fold(output_QHD.transpose(0, 1), len(key_GTD), copy=False)
        wide = torch.float32 if query_HQD.dtype in (torch.bfloat16, torch.float16) else query_HQD.dtype
        log_z_GR = query_HQD.new_empty(query_GRD.shape[:2], dtype=wide)
        for run in layout.runs:
            rows = slice(run.start * shared, (run.start + run.count * run.size) * shared)
            out, log_z = _forward(
                _blocks(query_GRD[:, rows], run), *_own(key_GTD, value_GTD, run), 0.0, False, scale=scaling
            )
            output_GRD[:, rows] = _joined_blocks(out)
            log_z_GR[:, rows] = _joined_blocks(log_z)
        for span in layout.to_clean:
            rows, keys = slice(span.start * shared, span.stop * shared), slice(span.first, span.last)
            out, log_z = _forward(
                query_GRD[None, :, rows], key_GTD[None, :, keys], value_GTD[None, :, keys], 0.0, False, scale=scaling
            )
            both = torch.logaddexp(log_z_GR[:, rows], log_z[0])
            kept = torch.exp(log_z_GR[:, rows] - both)[..., None]
            output_GRD[:, rows] = output_GRD[:, rows] * kept + out[0] * torch.exp(log_z[0] - both)[..., None]
            log_z_GR[:, rows] = both
        if query_HQD.shape[1] > layout.noisy:
            for span in layout.within_clean:
                rows, keys = slice(span.start * shared, span.stop * shared), slice(span.first, span.last)
                out, log_z = _forward(
                    query_GRD[None, :, rows],
                    key_GTD[None, :, keys],
                    value_GTD[None, :, keys],
                    0.0,
                    False,
                    scale=scaling,
                )
                output_GRD[:, rows] = out[0]
                log_z_GR[:, rows] = log_z[0]
        if output_GRD.data_ptr() != output_QHD.data_ptr():
            output_QHD.copy_(_unfold(output_GRD, len(query_HQD)).transpose(0, 1))
        ctx.save_for_backward(query_HQD, key_GTD, value_GTD, output_QHD, log_z_GR)
        ctx.layout, ctx.scaling = layout, scaling
        return output_QHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_QHD: Tensor) -> tuple[Tensor | None, ...]:
        query_HQD, key_GTD, value_GTD, output_QHD, log_z_GR = ctx.saved_tensors
        layout, heads = ctx.layout, len(key_GTD)
        shared = len(query_HQD) // heads
        query_GRD = _fold(query_HQD, heads)
        output_GRD, grad_GRD = (_fold(x_QHD.transpose(0, 1), heads) for x_QHD in (output_QHD, grad_QHD))
        grad_query_GRD = torch.zeros(query_GRD.shape, dtype=query_GRD.dtype)
        grad_key_GTD, grad_value_GTD = (torch.zeros(key_GTD.shape, dtype=key_GTD.dtype) for _ in range(2))
        for run in layout.runs:
            rows = slice(run.start * shared, (run.start + run.count * run.size) * shared)
            keys = slice(run.start, run.start + run.count * run.size)
            query, key, value = _backward(
                _blocks(grad_GRD[:, rows], run), _blocks(query_GRD[:, rows], run), *_own(key_GTD, value_GTD, run),
                _blocks(output_GRD[:, rows], run), _blocks(log_z_GR[:, rows], run), 0.0, False, scale=ctx.scaling,
            )  # fmt: skip
            grad_query_GRD[:, rows] = _joined_blocks(query)
            grad_key_GTD[:, keys] = _joined_blocks(key)
            grad_value_GTD[:, keys] = _joined_blocks(value)
        clean = layout.within_clean if query_HQD.shape[1] > layout.noisy else ()
        for span in (*layout.to_clean, *clean):
            rows, keys = slice(span.start * shared, span.stop * shared), slice(span.first, span.last)
            query, key, value = _backward(
                grad_GRD[None, :, rows], query_GRD[None, :, rows], key_GTD[None, :, keys], value_GTD[None, :, keys],
                output_GRD[None, :, rows], log_z_GR[None, :, rows], 0.0, False, scale=ctx.scaling,
            )  # fmt: skip
            grad_query_GRD[:, rows] += query[0]
            grad_key_GTD[:, keys] += key[0]
            grad_value_GTD[:, keys] += value[0]
        return _unfold(grad_query_GRD, len(query_HQD)), grad_key_GTD, grad_value_GTD, None, None


def _fold(x_HQD: Tensor, groups: int, copy: bool = True) -> Tensor:
    """[G, R, D]: a token's query heads of one key head side by side. Without `copy` new memory may come uninitialised."""
    heads, length, size = x_HQD.shape
    if heads == groups:
        return x_HQD
    if not copy:
        return x_HQD.new_empty(groups, length * heads // groups, size)
    return x_HQD.unflatten(0, (groups, heads // groups)).transpose(1, 2).reshape(groups, -1, size)


def _unfold(x_GRD: Tensor, heads: int) -> Tensor:
    """[H, Q, D] again."""
    return x_GRD.unflatten(1, (-1, heads // len(x_GRD))).transpose(1, 2).flatten(0, 1)


def _blocks(x_GR: Tensor, run: Run) -> Tensor:
    """[count, G, queries of a block, …]: the blocks of a run as a batch."""
    return x_GR.unflatten(1, (run.count, -1)).transpose(0, 1)


def _joined_blocks(x: Tensor) -> Tensor:
    """The blocks of a run one after the other again."""
    return x.transpose(0, 1).flatten(1, 2)


def _own(key_GTD: Tensor, value_GTD: Tensor, run: Run) -> tuple[Tensor, Tensor]:
    """Keys and values of the blocks of a run."""
    tokens = slice(run.start, run.start + run.count * run.size)
    return _blocks(key_GTD[:, tokens], run), _blocks(value_GTD[:, tokens], run)


def flex(
    query_1HQD: Tensor,
    key_1GTD: Tensor,
    value_1GTD: Tensor,
    layout: Layout,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """FlexAttention, compiled by `transformers`' own wrapper; the block mask is made once per layout and query count."""
    from transformers.integrations.flex_attention import compile_friendly_flex_attention

    queries = query_1HQD.shape[2]
    if queries not in layout.memory:
        layout.memory[queries] = block_mask(layout, queries)
    output_1HQD = compile_friendly_flex_attention(
        query_1HQD,
        key_1GTD,
        value_1GTD,
        training=torch.is_grad_enabled(),
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=layout.memory[queries],
        scale=scaling,
        enable_gqa=query_1HQD.shape[1] != key_1GTD.shape[1],
    )
    assert isinstance(output_1HQD, Tensor)
    return output_1HQD.transpose(1, 2)


def block_mask(layout: Layout, queries: int) -> BlockMask:
    """FlexAttention's block mask of the first `queries` tokens, a few rows of tiles at a time: no square of tokens."""
    device, tokens = layout.row_T.device, layout.tokens
    every_T = torch.arange(tokens, device=device)
    counts = []
    for rows in every_T[:queries].split(TILE * TILES_AT_ONCE):
        seen_QT = layout.sees(rows[:, None], every_T[None, :])
        seen_QT = nn.functional.pad(seen_QT, (0, -tokens % TILE, 0, -len(rows) % TILE))
        counts.append(seen_QT.view(-1, TILE, seen_QT.shape[1] // TILE, TILE).sum(dim=(1, 3)))
    count = torch.cat(counts)
    full = count == TILE * TILE
    return BlockMask.from_kv_blocks(
        *_ordered((count > 0) & ~full),
        *_ordered(full),
        BLOCK_SIZE=TILE,
        mask_mod=_rule(layout.document_T, layout.draw_T, layout.block_T),
        seq_lengths=(queries, tokens),
    )


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles each row of tiles has, and their numbers, those that it has first; [1, 1, …] int32."""
    numbers = torch.argsort(tiles.int(), dim=1, descending=True, stable=True)
    return tiles.sum(dim=1, dtype=torch.int32)[None, None], numbers.to(torch.int32)[None, None]


def _rule(document_T: Tensor, draw_T: Tensor, block_T: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The layout's rule for FlexAttention. Its closure holds tensors alone: a compiled kernel serves other layouts, too."""

    def seen(_row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(document_T, draw_T, block_T, query, key)

    return seen


def _capped(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def dense(
    module: nn.Module,
    query_1HQD: Tensor,
    key_1GTD: Tensor,
    value_1GTD: Tensor,
    layout: Layout,
    scaling: float,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Document by document under its mask; no score between documents is ever computed."""
    device = query_1HQD.device
    output_1QHD = query_1HQD.new_zeros(query_1HQD.transpose(1, 2).shape)
    for span in layout.documents:
        noisy, clean = (
            torch.arange(*ends, device=device) for ends in ((span.start, span.stop), (span.first, span.last))
        )
        key_S = torch.cat([noisy, clean])
        query_S = key_S if query_1HQD.shape[2] > layout.noisy else noisy
        seen_SS = layout.sees(query_S[:, None], key_S[None, :])
        mask = torch.zeros(seen_SS.shape, dtype=query_1HQD.dtype, device=device)
        mask.masked_fill_(~seen_SS, torch.finfo(mask.dtype).min)
        output, _ = grouped_attention(
            module, query_1HQD[:, :, query_S], key_1GTD[:, :, key_S], value_1GTD[:, :, key_S], mask[None, None],
            scaling=scaling, dropout=dropout, softcap=softcap,
        )  # fmt: skip
        output_1QHD = output_1QHD.index_copy(1, query_S, output)
    return output_1QHD
