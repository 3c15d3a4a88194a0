"""LLaDA2-MoE (inclusionAI/LLaDA2.0-mini and its kin) as a plain transformers model, without remote code.

The checkpoint's own modelling file was written for transformers 4 and runs its experts in a Python loop. Here is the
same network in the library's current style: attention through its attention interface (so a ready 4D mask passes
through unchanged, which all layouts of DESIGN §7 need), experts stacked into two tensors when the official names are
read and unstacked when they are written, computed with grouped matrix products.

The router: sigmoid scores in float32; a learned bias per expert takes part in the choice and not in the weight; the
experts lie in `n_group` groups, and only those of the `topk_group` groups with the highest sums of their two best
scores can be chosen.

Shapes: B sequences, L tokens each, D hidden, H query heads, G key/value heads, K size of a head, E experts,
A experts chosen per token, N = B·L tokens.
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
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming
from transformers.integrations.moe import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward, rotate_half

from shared.errors import TidecacheError

MODEL_TYPE = "llada2_moe"


class LLaDA2MoeConfig(PreTrainedConfig):
    """The fields of the official config.json; `rope_theta` and `partial_rotary_factor` move into `rope_parameters`."""

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  # as the library declares it
    attribute_map = {"num_local_experts": "num_experts"}  # noqa: RUF012  # as the library declares it

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    num_hidden_layers: int = 20
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int | None = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = False
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_dropout: float = 0.0
    use_bias: bool = False
    use_qkv_bias: bool = False
    use_qk_norm: bool = True
    use_rmsnorm: bool = True
    norm_head: bool = False
    num_experts: int = 256
    num_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    moe_intermediate_size: int = 512
    first_k_dense_replace: int = 1
    moe_router_enable_expert_bias: bool = True
    score_function: str = "sigmoid"
    router_dtype: str = "fp32"
    pad_token_id: int | None = 156892

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill what official files leave out."""
        kwargs.setdefault("partial_rotary_factor", 0.5)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)


def check_config(config: PreTrainedConfig) -> None:
    """Refuse the variants of the family that this file does not compute.

    Raises:
        TidecacheError: naming the field, what it holds, and what is computed.
    """
    where = config.name_or_path or "the checkpoint"
    for field, computed in (
        ("score_function", "sigmoid"),
        ("use_rmsnorm", True),
        ("norm_head", False),
        ("use_sliding_window", False),
        ("moe_router_enable_expert_bias", True),
    ):
        found = getattr(config, field, computed)
        if found != computed:
            raise TidecacheError(
                f"{where}/config.json: {field} = {found!r}, but the LLaDA2-MoE of tidecache computes "
                f"{field} = {computed!r} only"
            )
    if config.num_experts % config.n_group or config.topk_group > config.n_group:
        raise TidecacheError(
            f"{where}/config.json: {config.num_experts} experts do not form {config.n_group} equal groups of which "
            f"{config.topk_group} can be chosen"
        )


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
