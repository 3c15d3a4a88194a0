"""The teacher's language-model head on scored rows only: log-probabilities, top-k and log Z (DESIGN §5, §7).

With vocabularies of 8k to 157k tokens the head costs as much as many layers, and its logits dwarf everything else in
memory. So it runs on the scored positions alone, in tiles of rows whose logits fit a cache, always in
float32 (logits in bfloat16 are wrong by tenths of a nat), over the rows that the tokenizer knows.

Shapes: N scored positions, D hidden size, V vocabulary, K candidates, T temperatures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from shared.errors import TidecacheError
from shared.logits import logit_transform
from shared.spec import TAIL_TEMPERATURE
from stage1_teacher.backends import Scores, ScoresWithTail

TILE_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}  # float32 logits of one tile
TILE_ROWS = 96  # but at least so many rows, since each tile reads the whole weight
GROUP = 64  # columns that the top-k search looks at together


@dataclass(frozen=True)
class Head:
    """Hidden states to logits: soft cap(scale · (weight · hidden + bias))."""

    weight_VD: torch.Tensor  # float32
    bias_V: torch.Tensor | None
    scale: float
    soft_cap: float | None

    @property
    def vocabulary(self) -> int:
        """Rows of the head over which the log-softmax runs."""
        return self.weight_VD.shape[0]

    @classmethod
    def of(cls, model: Any, vocabulary: int | None, where: str) -> Head:
        """The head of a causal language model (tied or not), its first `vocabulary` rows (None: all).

        Raises:
            TidecacheError: the model has no linear head, or fewer rows than the tokenizer has tokens.
        """
        linear = model.get_output_embeddings()
        if not isinstance(linear, torch.nn.Linear):
            raise TidecacheError(f"teacher {where}: its head is a {type(linear).__name__}; expected a linear layer")
        rows = linear.weight.shape[0]
        if vocabulary is not None and vocabulary > rows:
            raise TidecacheError(
                f"teacher {where}: the tokenizer knows {vocabulary} tokens, and the head has {rows} rows: they do not belong together"
            )
        transform = logit_transform(model.config)
        return cls(
            weight_VD=linear.weight.detach()[:vocabulary].float(),
            bias_V=None if linear.bias is None else linear.bias.detach()[:vocabulary].float(),
            scale=transform.scale,
            soft_cap=transform.soft_cap,
        )

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Float32 logits_NV."""
        logits_NV = F.linear(hidden_ND.float(), self.weight_VD, self.bias_V)
        if self.scale != 1.0:
            logits_NV.mul_(self.scale)
        if self.soft_cap is not None:
            logits_NV.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return logits_NV

    def score(
        self,
        hidden_ND: torch.Tensor,
        gold_N: torch.Tensor,
        k: int,
        temperatures: tuple[float, ...],
        tail: tuple[int, torch.Tensor] | None = None,
    ) -> Scores:
        """Scores (on the CPU) of N rows, tile by tile; memory is that of one tile, never N x V.

        `tail`: how many tail samples, and each row's chance (float64, in [0, 1)).
        """
        rows = max(TILE_ROWS, TILE_BYTES[hidden_ND.device.type] // (4 * self.vocabulary))
        parts = []
        for first in range(0, len(hidden_ND), rows):
            part = slice(first, first + rows)
            chances = None if tail is None else (tail[0], tail[1][part])
            parts.append(_score_tile(self.logits(hidden_ND[part]), gold_N[part], k, temperatures, chances))
        kind = Scores if tail is None else ScoresWithTail
        return kind(*(torch.cat([getattr(part, name) for part in parts]).cpu() for name in kind.__dataclass_fields__))


def _score_tile(
    logits_NV: torch.Tensor,
    gold_N: torch.Tensor,
    k: int,
    temperatures: tuple[float, ...],
    tail: tuple[int, torch.Tensor] | None,
) -> Scores:
    """All that is kept of a tile's distributions; `logits_NV` is used up."""
    gold_N1 = logits_NV.gather(1, gold_N[:, None])
    topk_NK, ids_NK = top_tokens(logits_NV, k)
    peak_N1 = topk_NK[:, :1]
    logits_NV.sub_(peak_N1)
    gold_N1, topk_NK = gold_N1 - peak_N1, topk_NK - peak_N1
    buffer_NV = torch.empty_like(logits_NV)
    log_norm_N = torch.exp(logits_NV, out=buffer_NV).sum(1).log()
    log_sum = {1.0: log_norm_N}
    if 2.0 in temperatures:  # a square root costs a fraction of an exponential
        log_sum[2.0] = buffer_NV.sqrt_().sum(1).log()
    for temperature in set(temperatures) - {1.0, 2.0}:
        log_sum[temperature] = torch.div(logits_NV, temperature, out=buffer_NV).exp_().sum(1).log()
    scores = Scores(
        gold_logp_N=gold_N1[:, 0] - log_norm_N,
        topk_ids_NK=ids_NK,
        topk_logp_NK=topk_NK - log_norm_N[:, None],
        log_z_NT=torch.stack([log_sum[t] - log_norm_N / t for t in temperatures], 1),
    )
    if tail is None:
        return scores
    torch.div(logits_NV, TAIL_TEMPERATURE, out=buffer_NV).exp_().scatter_(1, ids_NK, 0.0)
    tail_ids_NS = systematic_samples(buffer_NV, *tail)
    return ScoresWithTail(
        **vars(scores),
        tail_ids_NS=tail_ids_NS,
        tail_logp_NS=logits_NV.gather(1, tail_ids_NS) - log_norm_N[:, None],
    )


def systematic_samples(weight_NV: torch.Tensor, count: int, chance_N: torch.Tensor) -> torch.Tensor:
    """ids_NS: entry v is drawn count · weight_v / Σ weight times on average, and never more than one off that."""
    sums_NV = weight_NV.double().cumsum(1)
    total_N1 = sums_NV[:, -1:].contiguous()
    at_NS = (torch.arange(count, device=sums_NV.device) + chance_N.to(sums_NV)[:, None]) / count * total_N1
    # The first entry whose cumulative weight is above the point; one without weight is never the first.
    ids_NS = torch.searchsorted(sums_NV, at_NS, right=True)
    last_N1 = torch.searchsorted(sums_NV, total_N1)  # the last entry with weight, against rounding
    return torch.minimum(ids_NS, last_N1)


def top_tokens(logits_NV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(values_NK, ids_NK) of the k largest of each row, descending; of equal ones the smaller id comes first.

    On a CPU a full search costs more than the head's own reading of the logits. The k largest lie in the k groups of
    columns with the largest maxima, and finding these is one fast pass.
    """
    count, width = logits_NV.shape
    groups = width // GROUP
    if logits_NV.device.type == "cpu" and groups > 2 * k:
        grouped_NGC = logits_NV[:, : groups * GROUP].unflatten(1, (groups, GROUP))
        chosen_NK = grouped_NGC.amax(2).topk(k, dim=1).indices
        column_NC = (chosen_NK[:, :, None] * GROUP + torch.arange(GROUP)).flatten(1)
        rest = torch.arange(groups * GROUP, width).expand(count, -1)
        column_NC = torch.cat([column_NC, rest], 1)
        values_NK, index_NK = logits_NV.gather(1, column_NC).topk(k, dim=1)
        ids_NK = column_NC.gather(1, index_NK)
    else:
        values_NK, ids_NK = logits_NV.topk(k, dim=1)
    ids_NK, order_NK = ids_NK.sort(dim=1)
    values_NK, order_NK = values_NK.gather(1, order_NK).sort(dim=1, descending=True, stable=True)
    return values_NK, ids_NK.gather(1, order_NK)
