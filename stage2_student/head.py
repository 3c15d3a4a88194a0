"""The student's head on masked positions only: the logits and normalisers the losses need, never N × V (DESIGN §8).

A large vocabulary makes the head the dearest part of a small student: logits at all 2·L positions, their log-softmax
and its gradient fill memory that grows with the batch. The losses need little of it: at each masked position the
logsumexp at one or two temperatures, and the logits of a few ids (the gold's, the candidates'). `gather_logits`
computes just that, tile by tile, and computes each tile again in backward instead of keeping it.

Tiles run over the vocabulary first and over rows second. So the gradient of a slice of the weight is complete after one
pass, written once, while the gradient of the hidden states, which is small, is the one that is added up. A tile has a
fixed size in bytes, made to stay in a CPU's cache; memory does not depend on the number of masked positions.

What a model does to its logits after the matrix product (soft-cap, scale) is part of the head: `Head.of` applies what
it knows and proves it against the model's own logits, so nothing is ignored silently.

Shape suffixes: N scored positions (rows), D hidden size, V vocabulary, M (row, id) pairs, T temperatures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from shared.errors import TidecacheError
from shared.logits import logit_transform

TILE_BYTES_CPU = 8 << 20
TILE_BYTES_GPU = 256 << 20
LEAST_COLUMNS = 512  # narrower slices of the weight make slow matrix products


@dataclass(frozen=True)
class Head:
    """A linear head and what follows it: logits = cap · tanh(scale · (hidden · weightᵀ + bias) / cap)."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    soft_cap: float | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, model: PreTrainedModel) -> Head:
        """Take a causal LM's head, tied or not. Call it before the model is wrapped; it shares the parameters.

        Raises:
            TidecacheError: the model has no linear head, or does something to its logits that this head does not.
        """
        linear = cast(Any, model).get_output_embeddings()
        if getattr(linear, "weight", None) is None:
            raise TidecacheError(
                f"{type(model).__name__} has no linear head: take a causal LM, such as Qwen3ForCausalLM"
            )
        transform = logit_transform(model.config)
        head = cls(linear.weight, getattr(linear, "bias", None), transform.soft_cap, transform.scale)
        head._check(model)
        return head

    @torch.no_grad()
    def _check(self, model: PreTrainedModel) -> None:
        """Compare with the model's own logits on two tokens: configurations have too many names to trust a list."""
        training = model.training
        model.train(False)
        try:
            ids_BL = torch.tensor([[0, 1]], device=self.weight_VD.device)
            expected_NV = model(input_ids=ids_BL, use_cache=False).logits[0].float()
            hidden_ND = model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state[0]
        finally:
            model.train(training)
        found_NV = self.logits(hidden_ND).float()
        rough = self.weight_VD.dtype in (torch.bfloat16, torch.float16)
        tolerance = (3e-2 if rough else 1e-4) * max(1.0, float(expected_NV.abs().max()))
        if found_NV.shape != expected_NV.shape or float((found_NV - expected_NV).abs().max()) > tolerance:
            raise TidecacheError(
                f"{type(model).__name__} changes its logits after the head in a way that is not handled "
                f"(known: final_logit_softcapping, logits_scaling, logit_scale): take a student of another family"
            )

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """All logits of a few rows [N, V]; N × V memory, no gradient. For checks and for one position at a time."""
        with torch.no_grad():
            return self._tile(self._scaled(hidden_ND), slice(0, len(self.weight_VD)))

    def _scaled(self, hidden_ND: Tensor) -> Tensor:
        """Scale the small factor of the product; the bias is scaled in `_tile`."""
        return hidden_ND if self.scale == 1.0 else hidden_ND * self.scale

    def _tile(self, scaled_ND: Tensor, columns: slice) -> Tensor:
        """Logits of these rows for a slice of the vocabulary, in float32 (float64 for float64)."""
        tile_NV = _product(scaled_ND, self.weight_VD[columns].to(scaled_ND.dtype).t())
        if self.bias_V is not None:
            tile_NV += self.bias_V[columns].to(tile_NV.dtype) * self.scale
        if self.soft_cap is not None:
            tile_NV.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return tile_NV


def gather_logits(
    hidden_ND: Tensor, head: Head, row_M: Tensor, id_M: Tensor, temperatures: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return the logits of (row, id) pairs and the normaliser of every row at each temperature (DESIGN §8).

    log p_T(id | row) = logit / T − log_z. Exact; gradients flow to hidden, weight and bias. Memory beyond inputs,
    outputs and gradients: one tile.

    Args:
        hidden_ND: hidden states of the scored positions. bfloat16 is multiplied in bfloat16 with float32 results, and
            so is float32 under bfloat16 autocast.
        head: the student's head.
        row_M: row of each pair, 0 … N − 1, any order, repeats allowed.
        id_M: token id of each pair, 0 … V − 1.
        temperatures: T of each column of log_z, all > 0.

    Returns:
        logit_M and log_z_NT = logsumexp(logits / T), float32 (float64 for float64 inputs), nats.
    """
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device):
        hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        function: Any = _GatherLogits
        logit_M, log_z_NT = function.apply(
            hidden_ND, head.weight_VD, head.bias_V, row_M, id_M, head, tuple(float(t) for t in temperatures)
        )
    return logit_M, log_z_NT


@torch.no_grad()
def argmax_and_logp(hidden_ND: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Return each row's most likely id and its log-likelihood at temperature 1, nats; tiled, no gradient."""
    scaled_ND = head._scaled(hidden_ND)
    rows = len(scaled_ND)
    id_N = torch.zeros(rows, dtype=torch.long, device=scaled_ND.device)
    best_N = torch.full((rows,), -torch.inf, dtype=_wide(scaled_ND.dtype), device=scaled_ND.device)
    sums = _RunningSums(rows, (1.0,), scaled_ND)
    tiling = _Tiling.of(scaled_ND, head)
    for columns in tiling.columns():
        for block in tiling.blocks():
            tile_NV = head._tile(scaled_ND[block], columns)
            top_N, top_id_N = tile_NV.max(dim=1)
            better_N = top_N > best_N[block]  # strictly: of equal logits the first id wins, as in argmax
            id_N[block] = torch.where(better_N, top_id_N + columns.start, id_N[block])
            best_N[block] = torch.where(better_N, top_N, best_N[block])
            sums.add(tile_NV, block)
    return id_N, best_N - sums.log_z()[:, 0]


class _GatherLogits(torch.autograd.Function):
    """See `gather_logits`. The head comes as its tensors, for autograd, and as itself, for what follows the product."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        row_M: Tensor,
        id_M: Tensor,
        head: Head,
        temperatures: tuple[float, ...],
    ) -> tuple[Tensor, Tensor]:
        scaled_ND = head._scaled(hidden_ND)
        sums = _RunningSums(len(scaled_ND), temperatures, scaled_ND)
        logit_M = torch.zeros(len(row_M), dtype=_wide(scaled_ND.dtype), device=scaled_ND.device)
        tiling = _Tiling.of(scaled_ND, head)
        pairs = _Pairs(row_M, id_M, tiling)
        for columns in tiling.columns():
            for block in tiling.blocks():
                tile_NV = head._tile(scaled_ND[block], columns)
                order, row, column = pairs.within(columns, block)
                logit_M[order] = tile_NV[row, column]
                sums.add(tile_NV, block)
        log_z_NT = sums.log_z()
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, log_z_NT)
        ctx.head, ctx.temperatures, ctx.pairs = head, temperatures, pairs
        return logit_M, log_z_NT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logit_M: Tensor, grad_log_z_NT: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, log_z_NT = ctx.saved_tensors
        head, temperatures, pairs = ctx.head, ctx.temperatures, ctx.pairs
        scaled_ND = head._scaled(hidden_ND)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden_ND = torch.zeros(scaled_ND.shape, dtype=log_z_NT.dtype, device=scaled_ND.device)
        grad_weight_VD = torch.zeros_like(weight_VD) if needs_weight else None
        grad_bias_V = torch.zeros_like(bias_V) if needs_bias else None
        for columns in pairs.tiling.columns():
            part_VD = weight_VD[columns].to(scaled_ND.dtype)
            for block in pairs.tiling.blocks():
                tile_NV = head._tile(scaled_ND[block], columns)
                grad_NV = _softmax_gradient(tile_NV, log_z_NT[block], grad_log_z_NT[block], temperatures)
                order, row, column = pairs.within(columns, block)
                grad_NV.view(-1).index_add_(0, row * grad_NV.shape[1] + column, grad_logit_M[order])
                if head.soft_cap is not None:
                    grad_NV.mul_(1.0 - (tile_NV / head.soft_cap).square_())
                if grad_bias_V is not None:
                    grad_bias_V[columns] += grad_NV.sum(dim=0) * head.scale
                narrow_NV = grad_NV.to(scaled_ND.dtype)
                if needs_hidden:
                    grad_hidden_ND[block] += _product(narrow_NV, part_VD)
                if grad_weight_VD is not None:
                    grad_weight_VD[columns] += _product(narrow_NV.t(), scaled_ND[block])
        grad_hidden = (grad_hidden_ND * head.scale).to(hidden_ND.dtype) if needs_hidden else None
        return grad_hidden, grad_weight_VD, grad_bias_V, None, None, None, None


def _softmax_gradient(
    tile_NV: Tensor, log_z_NT: Tensor, grad_log_z_NT: Tensor, temperatures: tuple[float, ...]
) -> Tensor:
    """Σ_T grad_T · softmax(logits / T) / T on one tile: the gradient that arrives through the normalisers."""
    grad_NV = torch.zeros_like(tile_NV)
    for i, temperature in enumerate(temperatures):
        share_NV = (tile_NV / temperature).sub_(log_z_NT[:, i : i + 1]).exp_()
        grad_NV.addcmul_(share_NV, grad_log_z_NT[:, i : i + 1], value=1.0 / temperature)
    return grad_NV


class _RunningSums:
    """logsumexp over a vocabulary that comes in slices: the running maximum, and sums relative to it."""

    def __init__(self, rows: int, temperatures: tuple[float, ...], like: Tensor) -> None:
        wide = _wide(like.dtype)
        self.temperatures = temperatures
        self.largest_N = torch.full((rows,), -torch.inf, dtype=wide, device=like.device)
        self.sum_NT = torch.zeros((rows, len(temperatures)), dtype=wide, device=like.device)

    def add(self, tile_NV: Tensor, block: slice) -> None:
        """Take in a slice of the vocabulary for these rows; destroys the tile."""
        before_N = self.largest_N[block]
        after_N = torch.maximum(before_N, tile_NV.amax(dim=1))
        tile_NV.sub_(after_N[:, None])
        for i, temperature in enumerate(self.temperatures):
            fade_N = torch.exp((before_N - after_N) / temperature)
            added_N = torch.exp(tile_NV if temperature == 1.0 else tile_NV / temperature).sum(dim=1)
            self.sum_NT[block, i] = self.sum_NT[block, i] * fade_N + added_N
        self.largest_N[block] = after_N

    def log_z(self) -> Tensor:
        """logsumexp(logits / T) per row and temperature."""
        divisor_T = torch.tensor(self.temperatures, dtype=self.sum_NT.dtype, device=self.sum_NT.device)
        return torch.log(self.sum_NT) + self.largest_N[:, None] / divisor_T


@dataclass(frozen=True)
class _Tiling:
    """How N × V is cut: slices of the vocabulary outside, blocks of rows inside, each tile within the budget."""

    rows: int
    vocabulary: int
    width: int  # columns of a full tile
    height: int  # rows of a full tile

    @classmethod
    def of(cls, scaled_ND: Tensor, head: Head) -> _Tiling:
        """As many rows as leave enough columns."""
        rows, vocabulary = len(scaled_ND), len(head.weight_VD)
        budget = TILE_BYTES_CPU if scaled_ND.device.type == "cpu" else TILE_BYTES_GPU
        numbers = budget // _wide(scaled_ND.dtype).itemsize
        height = max(1, min(rows, numbers // LEAST_COLUMNS))
        return cls(rows, vocabulary, min(vocabulary, max(LEAST_COLUMNS, numbers // height)), height)

    def columns(self) -> Iterator[slice]:
        """Slices of the vocabulary."""
        return (slice(i, min(i + self.width, self.vocabulary)) for i in range(0, self.vocabulary, self.width))

    def blocks(self) -> Iterator[slice]:
        """Blocks of rows."""
        return (slice(i, min(i + self.height, self.rows)) for i in range(0, self.rows, self.height))

    def number(self, column: Any, row: Any) -> Any:
        """Number of the tile that holds this entry; integers or tensors of them."""
        return (column // self.width) * -(-self.rows // self.height) + row // self.height


class _Pairs:
    """(row, id) pairs sorted by tile, so that each tile finds its own without a search."""

    def __init__(self, row_M: Tensor, id_M: Tensor, tiling: _Tiling) -> None:
        self.tiling = tiling
        tile_M = tiling.number(id_M, row_M)
        self.order_M = torch.argsort(tile_M, stable=True)
        self.row_M, self.column_M = (row_M % tiling.height)[self.order_M], (id_M % tiling.width)[self.order_M]
        tiles = tiling.number(tiling.vocabulary - 1, max(tiling.rows - 1, 0)) + 1
        self.ends = torch.bincount(tile_M, minlength=tiles).cumsum(0).tolist()

    def within(self, columns: slice, block: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs of one tile: their places among all pairs, and row and column inside the tile."""
        tile = self.tiling.number(columns.start, block.start)
        part = slice(self.ends[tile - 1] if tile else 0, self.ends[tile])
        return self.order_M[part], self.row_M[part], self.column_M[part]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product with float32 results (float64 for float64)."""
    if a.dtype == _wide(a.dtype):
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
