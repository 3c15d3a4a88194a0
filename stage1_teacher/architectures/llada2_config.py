"""The configuration of LLaDA2-MoE, by the official config.json, and which of its variants are computed (`llada2`)."""

# mypy: disable-error-code="no-untyped-call"
# The library that this builds on is not annotated.

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

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
    embedding_dropout: float = 0.0  # not used here; vLLM reads it
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
