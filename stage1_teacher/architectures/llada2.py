"""LLaDA2-MoE (inclusionAI/LLaDA2.0-mini and its kin) as a plain transformers model, without remote code.

The checkpoint's own modelling file was written for transformers 4 and runs its experts in a Python loop. Here is the
same network in the library's current style: attention through its attention interface (so a ready 4D mask passes
through unchanged, which all layouts of DESIGN §7 need), experts stacked into two tensors when the official names are
read and unstacked when they are written, computed with grouped matrix products.

Configuration: `llada2_config`; rotation, feed-forward and router: `llada2_parts`. Attention and experts are here, since
the library looks for them in the source of the model's own module before it lets their implementation be chosen.

Shapes: B sequences, L tokens each, D hidden, H query heads, G key/value heads, K size of a head, A experts chosen per
token, N = B·L tokens.
"""

# mypy: disable-error-code="no-untyped-call"
# The library that this builds on is not annotated.

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming
from transformers.integrations.moe import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward

from stage1_teacher.architectures.llada2_config import MODEL_TYPE, LLaDA2MoeConfig, check_config
from stage1_teacher.architectures.llada2_parts import LLaDA2MoeMLP, LLaDA2MoeRotaryEmbedding, LLaDA2MoeRouter, rotate


class LLaDA2MoeAttention(nn.Module):
    """Grouped-query attention with one fused projection and norms on queries and keys."""

    def __init__(self, config: LLaDA2MoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim or config.hidden_size // self.heads
        self.num_key_value_groups = self.heads // self.kv_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, width, bias=config.use_qkv_bias)
        self.dense = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=config.use_bias)
        norm = LlamaRMSNorm if config.use_qk_norm else lambda *_, **__: nn.Identity()
        self.query_layernorm = norm(self.head_dim, eps=config.rms_norm_eps)
        self.key_layernorm = norm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_BLD → hidden_BLD, through whichever attention function the configuration names."""
        shape = hidden_states.shape[:-1]
        fused = self.query_key_value(hidden_states).view(*shape, self.heads + 2 * self.kv_heads, self.head_dim)
        query, key, value = fused.split([self.heads, self.kv_heads, self.kv_heads], dim=-2)
        query_BHLK = rotate(self.query_layernorm(query).transpose(1, 2), *position_embeddings)
        key_BGLK = rotate(self.key_layernorm(key).transpose(1, 2), *position_embeddings)
        value_BGLK = value.transpose(1, 2)
        if past_key_values is not None:
            key_BGLK, value_BGLK = past_key_values.update(key_BGLK, value_BGLK, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        out, weights = attend(
            self, query_BHLK, key_BGLK, value_BGLK, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.dense(out.reshape(*shape, -1).contiguous()), weights


@use_experts_implementation
class LLaDA2MoeExperts(nn.Module):
    """The experts' weights, stacked. The library's decorator computes them with grouped products where it can."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        self.config, self.num_experts = config, config.num_experts
        size, hidden = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * size, hidden))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, hidden, size))
        self.act_fn = ACT2FN[config.hidden_act]

    def _gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, hidden_ND: torch.Tensor, expert_NA: torch.Tensor, weight_NA: torch.Tensor) -> torch.Tensor:
        """hidden_ND → hidden_ND without grouped products: tokens sorted by expert, one product for each expert used."""
        order = expert_NA.flatten().argsort(stable=True)
        counts = torch.bincount(expert_NA.flatten(), minlength=self.num_experts).tolist()
        rows = hidden_ND[order // expert_NA.shape[1]]
        out = torch.cat(
            [
                nn.functional.linear(self._gated(nn.functional.linear(part, self.gate_up_proj[e])), self.down_proj[e])
                for e, part in enumerate(rows.split(counts))
                if len(part)
            ]
        )
        back = torch.empty_like(out)
        back[order] = out
        weighted = back.view(*expert_NA.shape, -1) * weight_NA[..., None]
        return weighted.sum(1).to(hidden_ND.dtype)


class LLaDA2MoeSparse(nn.Module):
    """Routed experts plus the shared ones, which see every token."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        self.gate = LLaDA2MoeRouter(config)
        self.experts = LLaDA2MoeExperts(config)
        shared = config.moe_intermediate_size * config.num_shared_experts
        self.shared_experts = LLaDA2MoeMLP(config, shared) if shared else None

    def forward(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        """Hidden → hidden, same shape."""
        hidden_ND = hidden_BLD.reshape(-1, hidden_BLD.shape[-1])
        out: torch.Tensor = self.experts(hidden_ND, *self.gate(hidden_ND)).view_as(hidden_BLD)
        return out if self.shared_experts is None else out + self.shared_experts(hidden_BLD)


class LLaDA2MoeLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, config: LLaDA2MoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = LLaDA2MoeAttention(config, layer_idx)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        dense = layer_idx < config.first_k_dense_replace
        self.mlp = LLaDA2MoeMLP(config, config.intermediate_size) if dense else LLaDA2MoeSparse(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """hidden_BLD → hidden_BLD."""
        hidden_states = hidden_states + self.attention(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LLaDA2MoePreTrainedModel(PreTrainedModel):
    """What the library needs to know of the family."""

    config: LLaDA2MoeConfig
    config_class = LLaDA2MoeConfig
    base_model_prefix = "model"
    _no_split_modules = ["LLaDA2MoeLayer"]  # noqa: RUF012
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    # The bias decides between near-equal scores: rounding it to bf16 would send tokens to other experts.
    _keep_in_fp32_modules_strict = ["expert_bias"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, LLaDA2MoeRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.expert_bias)
        elif isinstance(module, LLaDA2MoeExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)


class LLaDA2MoeModel(LLaDA2MoePreTrainedModel):
    """The network without its head."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config)
        check_config(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([LLaDA2MoeLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LLaDA2MoeRotaryEmbedding(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.word_embeddings = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """ids_BL → hidden_BLD. A 4D `attention_mask` is used as it is; a 2D one is padding under causal attention."""
        hidden_BLD = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden_BLD.shape[1], device=hidden_BLD.device) + seen)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_BLD,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotation = self.rotary_emb(hidden_BLD, position_ids)
        for layer in self.layers:
            hidden_BLD = layer(
                hidden_BLD,
                position_embeddings=rotation,
                attention_mask=mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_BLD), past_key_values=past_key_values)


class LLaDA2MoeModelLM(LLaDA2MoePreTrainedModel):
    """The network with its head; the class that official configurations name."""

    _tied_weights_keys = {"lm_head.weight": "model.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config)
        self.model = LLaDA2MoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor | None = None, **kwargs: Any) -> MoeCausalLMOutputWithPast:
        """ids_BL → logits_BLV; keyword arguments as `LLaDA2MoeModel.forward`."""
        outputs = self.model(input_ids, **kwargs)
        logits_BLV = self.lm_head(outputs.last_hidden_state)
        return MoeCausalLMOutputWithPast(logits=logits_BLV, past_key_values=outputs.past_key_values)


def conversions() -> list[WeightConverter | WeightRenaming]:
    """Official tensor names ↔ stacked experts; the library applies it forwards on loading, backwards on saving."""
    expert = "mlp.experts.*"
    return [
        WeightConverter(
            source_patterns=[f"{expert}.gate_proj.weight", f"{expert}.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns=f"{expert}.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]


register_checkpoint_conversion_mapping(MODEL_TYPE, conversions(), overwrite=True)
