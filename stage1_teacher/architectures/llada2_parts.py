"""Parts of LLaDA2-MoE that leave no choice of implementation: rotation, gated feed-forward, router (`llada2`).

The router: sigmoid scores in float32; a learned bias per expert takes part in the choice and not in the weight; the
experts lie in `n_group` groups, and only those of the `topk_group` groups with the highest sums of their two best
scores can be chosen.

Shapes: B sequences, L tokens each, D hidden, H heads, K size of a head, R its rotated part, E experts, A experts
chosen per token, N = B·L tokens.
"""

# mypy: disable-error-code="no-untyped-call"
# The library that this builds on is not annotated.

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.models.llama.modeling_llama import rotate_half

from stage1_teacher.architectures.llada2_config import LLaDA2MoeConfig


class LLaDA2MoeRotaryEmbedding(nn.Module):
    """Cosines and sines [B, L, rotary] of the first `partial_rotary_factor` of each head's dimensions, in float32."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        parameters = config.rope_parameters or {}
        self.rope_type = parameters.get("rope_type", "default")
        compute = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = compute(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)
        self.inv_freq: torch.Tensor

    @staticmethod
    def compute_default_rope_parameters(config: LLaDA2MoeConfig, **_: Any) -> tuple[torch.Tensor, float]:
        """Inverse frequencies over the rotated part of a head, and the scale 1."""
        parameters = config.rope_parameters or {}
        size = int((config.head_dim or 0) * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x_BLD: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the class."""
        angles = position_ids[..., None].float() * self.inv_freq.float().to(x_BLD.device)
        both = torch.cat((angles, angles), dim=-1)
        scale = self.attention_scaling
        return (both.cos() * scale).to(x_BLD.dtype), (both.sin() * scale).to(x_BLD.dtype)


def rotate(x_BHLK: torch.Tensor, cos_BLR: torch.Tensor, sin_BLR: torch.Tensor) -> torch.Tensor:
    """Turn the first R dimensions of each head by their positions and pass the rest."""
    size = cos_BLR.shape[-1]
    turned, passed = x_BHLK[..., :size], x_BHLK[..., size:]
    turned = turned * cos_BLR[:, None] + rotate_half(turned) * sin_BLR[:, None]
    return torch.cat((turned, passed), dim=-1)


class LLaDA2MoeMLP(nn.Module):
    """The gated feed-forward of dense layers and of the shared experts."""

    def __init__(self, config: LLaDA2MoeConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden → hidden, same shape."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


class LLaDA2MoeRouter(nn.Module):
    """Chooses A experts per token; see the module for the rule."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(config.num_experts))
        self.expert_bias: torch.Tensor

    def forward(self, hidden_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(experts_NA, weights_NA), weights float32."""
        config = self.config
        score_NE = nn.functional.linear(hidden_ND.float(), self.weight.float()).sigmoid()
        choice_NE = score_NE + self.expert_bias.float()
        choice = choice_NE.view(len(choice_NE), config.n_group, -1)
        # As many of a group's best as there are: two, or one where a group is a single expert.
        group_score = choice.topk(min(2, choice.shape[-1]), dim=-1).values.sum(-1)
        kept = torch.zeros_like(group_score, dtype=torch.bool)
        kept.scatter_(1, group_score.topk(config.topk_group, dim=-1, sorted=False).indices, True)
        choice = choice.masked_fill(~kept[..., None], float("-inf"))
        expert_NA = choice.flatten(1).topk(config.num_experts_per_tok, dim=-1, sorted=False).indices
        weight_NA = score_NE.gather(1, expert_NA)
        if config.norm_topk_prob and config.num_experts_per_tok > 1:
            weight_NA = weight_NA / (weight_NA.sum(-1, keepdim=True) + 1e-20)
        return expert_NA, weight_NA * config.routed_scaling_factor
