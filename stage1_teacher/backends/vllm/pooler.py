"""The head on scored rows, split over the vocabulary between the workers of a tensor-parallel group (DESIGN §5, §7).

A "pooler" is what vLLM runs on the hidden states of a batch in place of sampling. This one gathers the scored rows of all
requests of the batch, applies the head in tiles of bounded memory and returns, per row, one float32 vector: the gold
log-probability, log Z and entropy at each temperature, k ids and their log-probabilities. Each worker sees only its own
rows of the head; what they exchange is a handful of numbers per scored row, never logits.

With the largest logit m_w, s_w = Σ exp((x − m_w)/T) and u_w = Σ exp((x − m_w)/T)(x − m_w) over the ids of worker w and
M = max m_w: s = Σ_w exp((m_w − M)/T) s_w and u = Σ_w exp((m_w − M)/T)(u_w + (m_w − M) s_w). Then log Z_T =
log s_T − log s_1 / T, and the entropy is log s_T − u_T / (T s_T).

Shapes: N rows, D hidden size, V ids of this worker, W workers, K candidates, T temperatures (T = 1
before the teacher's own), X numbers per row.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.pooler import Pooler, PoolingParamsUpdate
from vllm.v1.pool.metadata import PoolingMetadata

from stage1_teacher.backends.vllm.traits import ScorerTraits
from stage1_teacher.head import TILE_BYTES, top_tokens

WARM_UP_K = 16
NOWHERE = -1e30  # the largest logit of a worker that holds no id of the vocabulary; finite, so that 0 · it is 0


class ScoringPooler(Pooler):
    """See the module. `extra_kwargs` of a request: `rows` and `gold`, int32 bytes, and `k`.

    `rows` are places in the prompt, not positions in the text. Returns float32 [N, 1 + T + 2 K] for each request: gold
    log-probability, log Z_T, ids (exact, being below 2**24), log-probabilities.
    """

    def __init__(self, lm_head: Any, traits: ScorerTraits) -> None:
        super().__init__()
        self.__dict__["lm_head"] = lm_head  # not as a submodule: its weights are loaded by the model
        self.temperatures = traits.temperatures
        shard = lm_head.shard_indices
        self.first = int(shard.org_vocab_start_index)
        self.count = max(0, min(int(shard.org_vocab_end_index), traits.vocabulary) - self.first)

    def get_supported_tasks(self) -> Set[Any]:
        """The one task under which vLLM returns something for every row."""
        return {"token_classify"}

    def get_pooling_updates(self, task: Any) -> PoolingParamsUpdate:
        """Nothing is needed besides the hidden states."""
        return PoolingParamsUpdate(requires_token_ids=False)

    @torch.inference_mode()
    def forward(self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata) -> list[torch.Tensor]:
        """Score the rows of a batch."""
        cursor = pooling_metadata.get_pooling_cursor()
        if not all(cursor.get_finished_mask()):
            raise RuntimeError("vLLM split a prompt over several steps: chunked prefill must be off")
        count_R = cursor.num_scheduled_tokens_cpu.numpy()
        cached_R = cursor.seq_lens_cpu.numpy() - count_R
        ahead_R = np.cumsum(count_R) - count_R
        rows, gold, k = [], [], 1
        for params, count, cached, ahead in zip(
            pooling_metadata.pooling_params, count_R, cached_R, ahead_R, strict=True
        ):
            if params.extra_kwargs is None:  # vLLM's warm-up: every row, the most that a batch can ask for
                row_N, gold_N, wanted = np.arange(count), np.zeros(count, dtype=np.int32), WARM_UP_K
            else:
                row_N = np.frombuffer(params.extra_kwargs["rows"], dtype=np.int32) - cached
                gold_N = np.frombuffer(params.extra_kwargs["gold"], dtype=np.int32)
                wanted = int(params.extra_kwargs["k"])
                if len(row_N) and row_N.min() < 0:
                    raise RuntimeError("a scored row lies in a reused page: only x_0's pages may be reused")
            rows.append(row_N + ahead)
            gold.append(gold_N)
            k = max(k, wanted)
        device = hidden_states.device
        all_row_N = torch.from_numpy(np.concatenate(rows).astype(np.int64)).to(device)
        all_gold_N = torch.from_numpy(np.concatenate(gold).astype(np.int64)).to(device)
        numbers_NX = self.score(hidden_states[all_row_N], all_gold_N, k).cpu()
        return list(numbers_NX.split([len(row_N) for row_N in rows]))

    def score(self, hidden_ND: torch.Tensor, gold_N: torch.Tensor, k: int) -> torch.Tensor:
        """The numbers of N rows, tile by tile."""
        tile = max(1, TILE_BYTES.get(hidden_ND.device.type, TILE_BYTES["cpu"]) // (4 * max(1, self.count)))
        parts = [
            self._merge(self._summary(hidden_ND[first : first + tile], gold_N[first : first + tile], k), k)
            for first in range(0, len(hidden_ND), tile)
        ]
        return torch.cat(parts) if parts else hidden_ND.new_zeros((0, self._width(k)), dtype=torch.float32)

    def _width(self, k: int) -> int:
        return 1 + len(self.temperatures) + 2 * k

    def _logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Float32 logits over this worker's ids; the products are summed in float32 whatever the weights' type."""
        weight_VD = self.lm_head.weight[: self.count]
        if weight_VD.dtype == torch.float32:
            return F.linear(hidden_ND.float(), weight_VD)
        if weight_VD.is_cuda:
            return torch.mm(hidden_ND.to(weight_VD.dtype), weight_VD.t(), out_dtype=torch.float32)
        return F.linear(hidden_ND.float(), weight_VD.float())

    def _summary(self, hidden_ND: torch.Tensor, gold_N: torch.Tensor, k: int) -> torch.Tensor:
        """What this worker knows of a tile: gold logit (0 if elsewhere), m, s_T, then k logits and their ids."""
        rows = len(hidden_ND)
        temperatures = (1.0, *self.temperatures)
        if not self.count:
            empty = hidden_ND.new_zeros((rows, 2 + len(temperatures) + 2 * k), dtype=torch.float32)
            empty[:, 1] = NOWHERE
            empty[:, 2 + len(temperatures) : 2 + len(temperatures) + k] = NOWHERE
            return empty
        logits_NV = self._logits(hidden_ND)
        local_N = gold_N - self.first
        mine_N = (local_N >= 0) & (local_N < self.count)
        gold_N1 = logits_NV.gather(1, local_N.clamp(0, self.count - 1)[:, None])
        found = min(k, self.count)
        value_NK, id_NK = top_tokens(logits_NV, found)
        peak_N1 = value_NK[:, :1]
        logits_NV.sub_(peak_N1)
        buffer_NV = torch.empty_like(logits_NV)
        sums = [torch.div(logits_NV, temperature, out=buffer_NV).exp_().sum(1) for temperature in temperatures]
        return torch.cat(
            [
                torch.where(mine_N[:, None], gold_N1, 0.0),
                peak_N1,
                torch.stack(sums, 1),
                F.pad(value_NK, (0, k - found), value=NOWHERE),
                F.pad((id_NK + self.first).float(), (0, k - found)),
            ],
            1,
        )

    def _merge(self, summary_NX: torch.Tensor, k: int) -> torch.Tensor:
        """All workers' summaries of a tile, put together; every worker computes the same."""
        workers = get_tensor_model_parallel_world_size()
        if workers > 1:
            gathered_NX = tensor_model_parallel_all_gather(summary_NX, dim=-1)
            summary_NWX = gathered_NX.unflatten(1, (workers, -1))
        else:
            summary_NWX = summary_NX[:, None]
        gold_NW1, peak_NW1, sum_NWT, value_NWK, id_NWK = summary_NWX.split(
            [1, 1, 1 + len(self.temperatures), k, k], dim=2
        )
        temperature_T = torch.tensor((1.0, *self.temperatures), device=summary_NX.device)
        peak_N1 = peak_NW1.amax(1)
        factor_NWT = ((peak_NW1 - peak_N1[:, None]) / temperature_T).exp()
        log_sum_NT = (factor_NWT * sum_NWT).sum(1).log()
        log_norm_N1 = log_sum_NT[:, :1]
        # Workers come in the order of their ids, and each one's candidates in the order of `top_tokens`: a stable sort
        # keeps the smaller id first among equal values.
        value_NK, order_NK = value_NWK.flatten(1).sort(dim=1, descending=True, stable=True)
        id_NK = id_NWK.flatten(1).gather(1, order_NK)[:, :k]
        return torch.cat(
            [
                gold_NW1.sum(1) - peak_N1 - log_norm_N1,
                (log_sum_NT - log_norm_N1 / temperature_T)[:, 1:],
                id_NK,
                value_NK[:, :k] - peak_N1 - log_norm_N1,
            ],
            1,
        )
